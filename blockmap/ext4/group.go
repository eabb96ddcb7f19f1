package ext4

import (
	"cmp"
	"slices"
)

// A group is 32768 blocks: the number that one block of bitmap covers. Its descriptor
// is 64 bytes in a table that starts at block 1:
const (
	gdBlockBitmap         = 0x00 // 4, low half
	gdInodeBitmap         = 0x04 // 4, low half
	gdInodeTable          = 0x08 // 4, low half
	gdFreeBlocks          = 0x0C // 2, low half
	gdFreeInodes          = 0x0E // 2, low half
	gdUsedDirs            = 0x10 // 2, low half
	gdFlags               = 0x12 // 2
	gdBlockBitmapCsum     = 0x18 // 2, low half: of the bitmap's 4096 bytes
	gdInodeBitmapCsum     = 0x1A // 2, low half: of inodes per group / 8 bytes
	gdUnusedInodes        = 0x1C // 2, low half: never used, at the end of the table
	gdChecksum            = 0x1E // 2: low half of crc32c(group number, descriptor with 0 here)
	gdBlockBitmapHigh     = 0x20 // 4
	gdInodeBitmapHigh     = 0x24 // 4
	gdInodeTableHigh      = 0x28 // 4
	gdFreeBlocksHigh      = 0x2C // 2
	gdFreeInodesHigh      = 0x2E // 2
	gdUsedDirsHigh        = 0x30 // 2
	gdUnusedInodesHigh    = 0x32 // 2
	gdBlockBitmapCsumHigh = 0x38 // 2
	gdInodeBitmapCsumHigh = 0x3A // 2

	descsPerBlock = blockSize / descSize

	groupInodeUninit = 0x1 // the inode bitmap is not stored: all inodes are free
	groupBlockUninit = 0x2 // the block bitmap is not stored: all blocks except the group's own metadata are free
	groupTableZeroed = 0x4 // unused inodes are zero, so the kernel need not initialise them in the background
)

// setBits sets the bits [from, to) of b.
func setBits(b []byte, from, to uint32) {
	for ; from < to && from%8 != 0; from++ {
		b[from/8] |= 1 << (from % 8)
	}
	for ; from+8 <= to; from += 8 {
		b[from/8] = 0xFF
	}
	for ; from < to; from++ {
		b[from/8] |= 1 << (from % 8)
	}
}

// group holds the fields of a group's descriptor that do not follow from the places of
// the parts.
type group struct {
	size       uint32 // in blocks: the last one may be short
	usedBlocks uint32
	usedInodes uint32
	lastInode  uint32 // of its inodes, counted from 1, the last one in use; 0: none is
	dirs       uint32

	blockBitmapCsum, inodeBitmapCsum uint32
}

// countGroups fills fs.used and fs.groups.
func (fs *Filesystem) countGroups() {
	g := &fs.geo
	fs.used = make([]blockRange, 0, len(fs.data)+len(fs.body))
	for _, r := range fs.data {
		fs.used = append(fs.used, blockRange{r.Device, r.Count})
	}
	for _, p := range fs.body {
		fs.used = append(fs.used, blockRange{p.block, p.count})
	}
	slices.SortFunc(fs.used, func(a, b blockRange) int { return cmp.Compare(a.start, b.start) })
	fs.groups = make([]group, g.groups)
	var b [blockSize]byte
	setBits(b[:], 0, 8*blockSize)
	full := crc32c(checksumSeed, b[:])
	for i := range fs.groups {
		gr := &fs.groups[i]
		gr.size = min(blocksPerGroup, g.blocks-uint32(i)*blocksPerGroup)
		gr.usedBlocks = fs.blockBitmap(b[:], uint32(i))
		switch {
		case gr.usedBlocks == blocksPerGroup:
			gr.blockBitmapCsum = full
		case gr.usedBlocks > 0 || i == len(fs.groups)-1:
			gr.blockBitmapCsum = crc32c(checksumSeed, b[:])
		}
	}
	for _, i := range fs.byNumber {
		n := &fs.nodes[i]
		gr := &fs.groups[(n.number-1)/g.inodesPerGroup]
		gr.usedInodes++
		gr.lastInode = (n.number-1)%g.inodesPerGroup + 1
		if n.is(modeDir) {
			gr.dirs++
		}
	}
	fs.groups[0].usedInodes += firstInode - 2 // the reserved inodes without the root
	fs.groups[0].lastInode = max(fs.groups[0].lastInode, firstInode-1)
	for i := range fs.groups {
		if gr := &fs.groups[i]; gr.usedInodes > 0 {
			fs.inodeBitmap(b[:], uint32(i))
			gr.inodeBitmapCsum = crc32c(checksumSeed, b[:g.inodesPerGroup/8])
		}
	}
}

// blockBitmap fills b with the block bitmap of group i and returns how many blocks are in
// use. Bits that stand for no block are set.
func (fs *Filesystem) blockBitmap(b []byte, i uint32) (used uint32) {
	clear(b)
	start := uint64(i) * blocksPerGroup
	end := min(start+blocksPerGroup, uint64(fs.geo.blocks))
	set := func(from, to uint64) {
		if from, to = max(from, start), min(to, end); from < to {
			setBits(b, uint32(from-start), uint32(to-start))
			used += uint32(to - from)
		}
	}
	content := uint64(fs.geo.content)
	set(0, content)
	if end > content {
		first := max(start, content) - content
		at, _ := slices.BinarySearchFunc(fs.used, first, func(r blockRange, block uint64) int {
			return cmp.Compare(uint64(r.start)+uint64(r.count), block+1) // the first that ends behind block
		})
		for ; at < len(fs.used); at++ {
			from := content + uint64(fs.used[at].start)
			if from >= end {
				break
			}
			set(from, from+uint64(fs.used[at].count))
		}
	}
	setBits(b, uint32(end-start), 8*blockSize)
	return used
}

// inodeBitmap fills b with the inode bitmap of group i. Bits that stand for no inode are
// set.
func (fs *Filesystem) inodeBitmap(b []byte, i uint32) {
	clear(b)
	if i == 0 {
		setBits(b, 0, firstInode-1)
	}
	perGroup := fs.geo.inodesPerGroup
	first := i*perGroup + 1
	for at := fs.firstNumber(first); at < len(fs.byNumber); at++ {
		bit := fs.nodes[fs.byNumber[at]].number - first
		if bit >= perGroup {
			break
		}
		b[bit/8] |= 1 << (bit % 8)
	}
	setBits(b, perGroup, 8*blockSize)
}

// firstNumber returns the position in fs.byNumber of the first inode from a number on.
func (fs *Filesystem) firstNumber(number uint32) int {
	at, _ := slices.BinarySearchFunc(fs.byNumber, number, func(i, number uint32) int {
		return cmp.Compare(fs.nodes[i].number, number)
	})
	return at
}

// usedInodes returns the number of inodes in use, reserved ones included.
func (fs *Filesystem) usedInodes() uint32 { return firstInode - 2 + uint32(len(fs.nodes)) }

// usedBlocks returns the number of blocks in use.
func (fs *Filesystem) usedBlocks() (n uint32) {
	for i := range fs.groups {
		n += fs.groups[i].usedBlocks
	}
	return n
}

// hasBlockBitmap reports whether stream 0 has the block bitmap of group i. If not, the
// bitmap is zeros, which are not stored.
func (fs *Filesystem) hasBlockBitmap(i uint32) bool {
	gr := &fs.groups[i]
	return gr.usedBlocks > 0 || gr.size < blocksPerGroup
}

// descriptors writes the descriptors of the groups from first on to b, which is zeroed.
// It stops at the last group or when b is full.
func (fs *Filesystem) descriptors(b []byte, first uint32) {
	g := &fs.geo
	for i := first; i < g.groups && len(b) >= descSize; i++ {
		d := b[:descSize]
		b = b[descSize:]
		gr := &fs.groups[i]

		le.PutUint32(d[gdBlockBitmap:], g.blockBitmaps+i)
		le.PutUint32(d[gdInodeBitmap:], g.inodeBitmaps+i)
		le.PutUint32(d[gdInodeTable:], g.inodeTables+i*g.tableBlocks())
		le.PutUint16(d[gdFreeBlocks:], uint16(gr.size-gr.usedBlocks))
		le.PutUint16(d[gdFreeInodes:], uint16(g.inodesPerGroup-gr.usedInodes))
		le.PutUint16(d[gdUnusedInodes:], uint16(g.inodesPerGroup-gr.lastInode))
		le.PutUint16(d[gdUsedDirs:], uint16(gr.dirs))

		flags := uint16(groupTableZeroed)
		if gr.usedInodes == 0 {
			flags |= groupInodeUninit
		} else {
			putHalves(d, gdInodeBitmapCsum, gdInodeBitmapCsumHigh, gr.inodeBitmapCsum)
		}
		// The last group's bitmap is stored even if nothing in it is used: it ends in
		// padding that no descriptor describes.
		if gr.usedBlocks == 0 && i < g.groups-1 {
			flags |= groupBlockUninit
		} else {
			putHalves(d, gdBlockBitmapCsum, gdBlockBitmapCsumHigh, gr.blockBitmapCsum)
		}
		le.PutUint16(d[gdFlags:], flags)
		le.PutUint16(d[gdChecksum:], descChecksum(checksumSeed, i, d))
	}
}

func putHalves(d []byte, low, high int, v uint32) {
	le.PutUint16(d[low:], uint16(v))
	le.PutUint16(d[high:], uint16(v>>16))
}

func getHalves(d []byte, low, high int) uint32 {
	return uint32(le.Uint16(d[low:])) | uint32(le.Uint16(d[high:]))<<16
}

// descChecksum returns the checksum of descriptor d. It ignores the content of the
// checksum field.
func descChecksum(seed, group uint32, d []byte) uint16 {
	c := crc32c(crc32cWord(seed, group), d[:gdChecksum])
	c = crc32cHole(c, 2)
	return uint16(crc32c(c, d[gdChecksum+2:]))
}
