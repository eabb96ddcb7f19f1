package ext4

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

// prefixBitmap fills one block with a bitmap. It sets the first used bits, and the bits
// from size on, which stand for no block or inode.
func prefixBitmap(b []byte, used, size uint32) {
	clear(b)
	setBits(b, 0, used)
	setBits(b, size, 8*blockSize)
}

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
	usedBlocks uint32 // at its start, because everything in use is a prefix of the device
	usedInodes uint32 // likewise
	dirs       uint32
}

func (fs *Filesystem) group(i uint32) group {
	g := &fs.geo
	start := i * blocksPerGroup
	gr := group{size: min(blocksPerGroup, g.blocks-start)}
	if g.end > start {
		gr.usedBlocks = min(gr.size, g.end-start)
	}
	if used, first := fs.usedInodes(), i*g.inodesPerGroup; used > first {
		gr.usedInodes = min(g.inodesPerGroup, used-first)
	}
	if int(i) < len(fs.dirs) {
		gr.dirs = fs.dirs[i]
	}
	return gr
}

// hasBlockBitmap reports whether stream 0 has the block bitmap of group i. If not, the
// bitmap is zeros, which are not stored.
func (fs *Filesystem) hasBlockBitmap(i uint32) bool {
	gr := fs.group(i)
	return gr.usedBlocks > 0 || gr.size < blocksPerGroup
}

// descriptors writes the descriptors of the groups from first on to b, which is zeroed.
// It stops at the last group or when b is full.
func (fs *Filesystem) descriptors(b []byte, first uint32) {
	g := &fs.geo
	for i := first; i < g.groups && len(b) >= descSize; i++ {
		d := b[:descSize]
		b = b[descSize:]
		gr := fs.group(i)

		le.PutUint32(d[gdBlockBitmap:], g.blockBitmaps+i)
		le.PutUint32(d[gdInodeBitmap:], g.inodeBitmaps+i)
		le.PutUint32(d[gdInodeTable:], g.inodeTables+i*g.tableBlocks())
		le.PutUint16(d[gdFreeBlocks:], uint16(gr.size-gr.usedBlocks))
		le.PutUint16(d[gdFreeInodes:], uint16(g.inodesPerGroup-gr.usedInodes))
		le.PutUint16(d[gdUnusedInodes:], uint16(g.inodesPerGroup-gr.usedInodes))
		le.PutUint16(d[gdUsedDirs:], uint16(gr.dirs))

		flags := uint16(groupTableZeroed)
		if gr.usedInodes == 0 {
			flags |= groupInodeUninit
		} else {
			putHalves(d, gdInodeBitmapCsum, gdInodeBitmapCsumHigh, fs.inodeBitmapCsum(gr))
		}
		// The last group's bitmap is stored even if nothing in it is used: it ends in
		// padding that no descriptor describes.
		if gr.usedBlocks == 0 && i < g.groups-1 {
			flags |= groupBlockUninit
		} else {
			putHalves(d, gdBlockBitmapCsum, gdBlockBitmapCsumHigh, fs.blockBitmapCsum(gr))
		}
		le.PutUint16(d[gdFlags:], flags)
		le.PutUint16(d[gdChecksum:], descChecksum(fs.seed, i, d))
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

func (fs *Filesystem) blockBitmapCsum(gr group) uint32 {
	if gr.usedBlocks == blocksPerGroup {
		return fs.fullBlockCsum
	}
	var b [blockSize]byte
	prefixBitmap(b[:], gr.usedBlocks, gr.size)
	return crc32c(fs.seed, b[:])
}

func (fs *Filesystem) inodeBitmapCsum(gr group) uint32 {
	n := fs.geo.inodesPerGroup
	if gr.usedInodes == n {
		return fs.fullInodeCsum
	}
	var b [blockSize]byte
	prefixBitmap(b[:], gr.usedInodes, n)
	return crc32c(fs.seed, b[:n/8])
}
