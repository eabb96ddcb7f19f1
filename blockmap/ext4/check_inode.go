package ext4

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
)

// groupDesc is a descriptor as it was read.
type groupDesc struct {
	blockBitmap, inodeBitmap, inodeTable uint32
	freeBlocks, freeInodes               uint32
	dirs, unusedInodes                   uint32
	blockBitmapCsum, inodeBitmapCsum     uint32
	flags                                uint16
}

func (c *checker) checkDescriptors() error {
	tableBlocks := c.perGroup / inodesPerBlock
	descBlocks := (c.groupCount-1)/descsPerBlock + 1
	if err := c.claim(0, 1+uint64(descBlocks), 0); err != nil {
		return err
	}
	c.groups = make([]groupDesc, 0, c.groupCount) // 131072 at most
	var b [blockSize]byte
	for i := range c.groupCount {
		d := b[i%descsPerBlock*descSize:][:descSize]
		if i%descsPerBlock == 0 {
			if err := c.readBlocks(b[:], 1+i/descsPerBlock, "the descriptor table"); err != nil {
				return err
			}
		}
		if err := c.sum(uint32(le.Uint16(d[gdChecksum:])), uint32(descChecksum(c.seed, i, d)), fmt.Sprint("the descriptor of group ", i)); err != nil {
			return err
		}
		if le.Uint32(d[gdBlockBitmapHigh:])|le.Uint32(d[gdInodeBitmapHigh:])|le.Uint32(d[gdInodeTableHigh:]) != 0 {
			return fmt.Errorf("group %d: its bitmaps or inodes are beyond the device", i)
		}
		g := groupDesc{
			blockBitmap:     le.Uint32(d[gdBlockBitmap:]),
			inodeBitmap:     le.Uint32(d[gdInodeBitmap:]),
			inodeTable:      le.Uint32(d[gdInodeTable:]),
			freeBlocks:      getHalves(d, gdFreeBlocks, gdFreeBlocksHigh),
			freeInodes:      getHalves(d, gdFreeInodes, gdFreeInodesHigh),
			dirs:            getHalves(d, gdUsedDirs, gdUsedDirsHigh),
			unusedInodes:    getHalves(d, gdUnusedInodes, gdUnusedInodesHigh),
			blockBitmapCsum: getHalves(d, gdBlockBitmapCsum, gdBlockBitmapCsumHigh),
			inodeBitmapCsum: getHalves(d, gdInodeBitmapCsum, gdInodeBitmapCsumHigh),
			flags:           le.Uint16(d[gdFlags:]),
		}
		for _, part := range []struct{ start, count uint32 }{
			{g.blockBitmap, 1}, {g.inodeBitmap, 1}, {g.inodeTable, tableBlocks},
		} {
			if err := c.claim(part.start, uint64(part.count), 0); err != nil {
				return fmt.Errorf("group %d: %w", i, err)
			}
		}
		switch uninit := g.flags&groupInodeUninit != 0; {
		case g.flags&^(groupInodeUninit|groupBlockUninit|groupTableZeroed) != 0:
			return fmt.Errorf("group %d has unknown flags %#x", i, g.flags)
		case g.freeInodes > c.perGroup || g.unusedInodes > g.freeInodes || g.dirs > c.perGroup:
			return fmt.Errorf("group %d has %d inodes, of which %d are free, %d never used and %d directories",
				i, c.perGroup, g.freeInodes, g.unusedInodes, g.dirs)
		case uninit && g.unusedInodes != c.perGroup:
			return fmt.Errorf("group %d has no inode bitmap, but %d inodes that were used", i, c.perGroup-g.unusedInodes)
		case uninit && i == 0:
			return fmt.Errorf("group 0 has no inode bitmap, but the root is in it")
		}
		c.groups = append(c.groups, g)
	}
	return nil
}

// checkInodes goes through the inode bitmaps and tables.
func (c *checker) checkInodes() error {
	free := uint64(0)
	var bitmap [blockSize]byte
	for i := range c.groupCount {
		g := &c.groups[i]
		free += uint64(g.freeInodes)
		if g.flags&groupInodeUninit != 0 {
			continue
		}
		if err := c.readBlocks(bitmap[:], g.inodeBitmap, "an inode bitmap"); err != nil {
			return fmt.Errorf("group %d: %w", i, err)
		}
		if err := c.sum(g.inodeBitmapCsum, crc32c(c.seed, bitmap[:c.perGroup/8]), "its inode bitmap"); err != nil {
			return fmt.Errorf("group %d: %w", i, err)
		}
		for bit := c.perGroup; bit < 8*blockSize; bit++ {
			if !bitSet(bitmap[:], bit) {
				return fmt.Errorf("group %d: its inode bitmap is not padded with ones", i)
			}
		}
		if err := c.inodeTable(i, bitmap[:]); err != nil {
			return err
		}
	}
	if got := le.Uint32(c.super[sbFreeInodes:]); uint64(got) != free {
		return fmt.Errorf("the superblock says %d free inodes, but the groups have %d", got, free)
	}
	if s := c.find(rootInode); s == nil || uint32(s.mode)&modeType != modeDir {
		return fmt.Errorf("there is no root directory")
	}
	return nil
}

func bitSet(b []byte, i uint32) bool { return b[i/8]>>(i%8)&1 != 0 }

func anyBitSet(b []byte, from, to uint32) bool {
	for i := from; i < to; i++ {
		if bitSet(b, i) {
			return true
		}
	}
	return false
}

// inodeTable checks the inodes of one group, all but those that were never used.
func (c *checker) inodeTable(group uint32, bitmap []byte) error {
	g := &c.groups[group]
	used, dirs := uint32(0), uint32(0)
	limit := c.perGroup - g.unusedInodes
	const perRead = 16 * inodesPerBlock
	var buf [perRead * inodeSize]byte
	for n := uint32(0); n < c.perGroup; n++ {
		number := group*c.perGroup + n + 1
		inUse := bitSet(bitmap, n)
		if n >= limit {
			if inUse {
				return fmt.Errorf("inode %d is in use, but lies in the part of the table that was never used", number)
			}
			continue
		}
		if n%perRead == 0 {
			some := min(perRead, limit-n)
			// Blocks of the table without an inode in use are not read: a device can
			// have a terabyte of them.
			if !anyBitSet(bitmap, n, n+some) && number >= firstInode {
				n += some - 1
				continue
			}
			blocks := (some + inodesPerBlock - 1) / inodesPerBlock
			if err := c.readBlocks(buf[:blocks*blockSize], g.inodeTable+n/inodesPerBlock, "an inode table"); err != nil {
				return fmt.Errorf("group %d: %w", group, err)
			}
		}
		in := buf[n%perRead*inodeSize:][:inodeSize]
		if !inUse {
			if number < firstInode {
				return fmt.Errorf("inode %d is reserved, but marked free", number)
			}
			if le.Uint16(in[inLinks:]) != 0 {
				return fmt.Errorf("inode %d is free, but has links", number)
			}
			continue
		}
		used++
		if number < firstInode && number != rootInode && (number != journalInode || !c.hasJournal) {
			if le.Uint16(in[inMode:]) != 0 || le.Uint16(in[inLinks:]) != 0 || inodeLength(in) != 0 || le.Uint32(in[inBlocks:]) != 0 {
				return fmt.Errorf("inode %d is reserved, but is a file", number)
			}
			continue
		}
		if err := c.inode(number, in); err != nil {
			return fmt.Errorf("inode %d %w", number, err)
		}
		if uint32(le.Uint16(in[inMode:]))&modeType == modeDir {
			dirs++
		}
	}
	if used != c.perGroup-g.freeInodes {
		return fmt.Errorf("group %d has %d inodes in use, but its descriptor says %d", group, used, c.perGroup-g.freeInodes)
	}
	if dirs != g.dirs {
		return fmt.Errorf("group %d has %d directories, but its descriptor says %d", group, dirs, g.dirs)
	}
	return nil
}

func inodeLength(in []byte) uint64 {
	return uint64(le.Uint32(in[inSize:])) | uint64(le.Uint32(in[inSizeHigh:]))<<32
}

// readInode reads an inode that has been checked.
func (c *checker) readInode(b []byte, number uint32) error {
	i := number - 1
	at := int64(c.groups[i/c.perGroup].inodeTable)*blockSize + int64(i%c.perGroup)*inodeSize
	if n, err := c.r.ReadAt(b[:inodeSize], at); n < inodeSize {
		return fmt.Errorf("read inode %d: %w", number, err)
	}
	return nil
}

// find is the summary of an inode in use, or nil.
func (c *checker) find(number uint32) *inodeSummary {
	i, ok := slices.BinarySearchFunc(c.inodes, number, func(s inodeSummary, n uint32) int { return cmp.Compare(s.number, n) })
	if !ok {
		return nil
	}
	return &c.inodes[i]
}

// Flags that do not affect how a file is stored: whether it may be changed, and what
// happens when it is.
const harmlessFlags = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40 | 0x80 | 0x10000 | 0x20000 | 0x2000000

func (c *checker) inode(number uint32, in []byte) error {
	mode := uint32(le.Uint16(in[inMode:]))
	flags := le.Uint32(in[inFlags:])
	if extra := le.Uint16(in[inExtraIsize:]); extra < extraIsize || extra > inodeSize-128 || extra%4 != 0 {
		return fmt.Errorf("has %d extra bytes", extra)
	}
	if err := c.sum(getHalves(in, inChecksum, inChecksumHi), inodeChecksum(c.seed, number, in), "as it is read"); err != nil {
		return err
	}
	switch {
	case fileTypes[mode>>12] == 0:
		return fmt.Errorf("has mode %#o, which is no type of file", mode)
	case le.Uint16(in[inLinks:]) == 0 && !c.orphan(number):
		return fmt.Errorf("is in use, but has no links")
	case le.Uint32(in[inDtime:]) != 0 && !c.orphan(number):
		return fmt.Errorf("is in use, but has a deletion time")
	case flags&^(harmlessFlags|inodeFlagExtents|inodeFlagIndex) != 0:
		return fmt.Errorf("has unknown flags %#x", flags)
	case le.Uint16(in[inXattrHigh:]) != 0:
		return fmt.Errorf("has extended attributes beyond the device")
	case flags&inodeFlagIndex != 0 && mode&modeType != modeDir:
		return fmt.Errorf("has a hash tree, but is not a directory")
	}

	size := inodeLength(in)
	hasExtents := flags&inodeFlagExtents != 0
	wantExtents := false
	switch mode & modeType {
	case modeRegular, modeDir:
		wantExtents = true
	case modeSymlink:
		wantExtents = size > maxFastLink
	}
	if hasExtents != wantExtents {
		return fmt.Errorf("of mode %#o and %d bytes has flags %#x", mode, size, flags)
	}
	blocks := uint64(0)
	if hasExtents {
		n, err := c.content(number, in, mode, size)
		if err != nil {
			return err
		}
		blocks = n
	} else if err := shortContent(in, mode, size); err != nil {
		return err
	}

	n, err := c.inodeXattrs(number, in)
	if err != nil {
		return err
	}
	blocks += n
	sectors := uint64(le.Uint32(in[inBlocks:])) | uint64(le.Uint16(in[inBlocksHigh:]))<<32
	if sectors != blocks*(blockSize/512) {
		return fmt.Errorf("has %d blocks, but says %d sectors", blocks, sectors)
	}
	if number == journalInode {
		if mode&modeType != modeRegular {
			return fmt.Errorf("is the journal, but has mode %#o", mode)
		}
		return nil
	}
	c.inodes = append(c.inodes, inodeSummary{
		number: number, mode: uint16(mode), links: le.Uint16(in[inLinks:]), index: flags&inodeFlagIndex != 0,
	})
	return nil
}

// content checks and claims the blocks of an inode with extents, and returns
// how many there are.
func (c *checker) content(number uint32, in []byte, mode uint32, size uint64) (uint64, error) {
	var blocks, next uint64
	var unwrittenEnd bool
	var first extent
	tree, err := c.extents(number, in, true, func(e extent, unwritten bool) error {
		if blocks == 0 {
			first = e
		}
		if mode&modeType != modeRegular && (unwritten || uint64(e.file) != next) {
			return fmt.Errorf("has a hole at block %d", next)
		}
		blocks += uint64(e.count)
		next, unwrittenEnd = uint64(e.file)+uint64(e.count), unwritten
		return c.claim(e.device, uint64(e.count), number)
	})
	if err != nil {
		return 0, err
	}
	if size > uint64(maxFileSize) {
		return 0, fmt.Errorf("has %d bytes", size)
	}
	length := uint64(blocksOf(int64(size)))
	switch mode & modeType {
	case modeRegular:
		// Space may be reserved beyond the end, as long as it reads as zero.
		if next > length && !unwrittenEnd && !c.orphan(number) {
			return 0, fmt.Errorf("has %d bytes, but content up to block %d", size, next)
		}
		if number == journalInode && (next != length || blocks != length || size%blockSize != 0) {
			return 0, fmt.Errorf("is the journal, but has %d bytes in %d blocks", size, blocks)
		}
	case modeDir:
		deleted := size == 0 && c.orphan(number) && le.Uint16(in[inLinks:]) == 0
		if !deleted && (size == 0 || size%blockSize != 0 || next != length) {
			return 0, fmt.Errorf("is a directory of %d bytes in %d blocks", size, next)
		}
	case modeSymlink:
		if size > maxSymlink || blocks != 1 {
			return 0, fmt.Errorf("is a symlink of %d bytes in %d blocks", size, blocks)
		}
		var b [blockSize]byte
		if err := c.readBlocks(b[:], first.device, "a symlink"); err != nil {
			return 0, err
		}
		if n := bytes.IndexByte(b[:], 0); uint64(n) != size {
			return 0, fmt.Errorf("is a symlink of %d bytes that ends after %d", size, n)
		}
	}
	return blocks + tree, nil
}

// shortContent checks an inode whose block map is not one.
func shortContent(in []byte, mode uint32, size uint64) error {
	m := in[inBlock : inBlock+blockMapSize]
	used := 0
	switch mode & modeType {
	case modeSymlink:
		if n := bytes.IndexByte(m, 0); size == 0 || n < 0 || uint64(n) != size {
			return fmt.Errorf("is a symlink of %d bytes that ends after %d", size, n)
		}
		return nil
	case modeChar, modeBlock:
		used = 8
	}
	if size != 0 {
		return fmt.Errorf("of mode %#o has %d bytes", mode, size)
	}
	for _, b := range m[used:] {
		if b != 0 {
			return fmt.Errorf("of mode %#o has a block map", mode)
		}
	}
	return nil
}

// extents calls fn with the extents of an inode in order, and returns how many
// blocks the tree has beside its root; with claim, it claims those.
//
// Every extent must lie in the range of file blocks that the entries above it
// leave to it, and every node but the root has at least one. So no block can be
// in a tree twice, and the walk ends.
func (c *checker) extents(number uint32, in []byte, claim bool, fn func(e extent, unwritten bool) error) (uint64, error) {
	w := extentWalk{
		c: c, number: number, claim: claim, fn: fn,
		seed: inodeSeed(c.seed, number, le.Uint32(in[inGeneration:])),
	}
	root := in[inBlock : inBlock+blockMapSize]
	depth := int(le.Uint16(root[ehDepth:]))
	if depth > maxExtentDepth {
		return 0, fmt.Errorf("has an extent tree of depth %d", depth)
	}
	err := w.node(root, rootExtents, depth, 0, 1<<32)
	return w.blocks, err
}

type extentWalk struct {
	c      *checker
	number uint32
	seed   uint32
	claim  bool
	fn     func(e extent, unwritten bool) error
	blocks uint64
}

// node walks the node b of a depth, about file blocks [from, to).
func (w *extentWalk) node(b []byte, room, depth int, from, to uint64) error {
	entries := int(le.Uint16(b[ehEntries:]))
	if le.Uint16(b[ehMagic:]) != extentMagic || int(le.Uint16(b[ehMax:])) != room || entries > room ||
		int(le.Uint16(b[ehDepth:])) != depth || entries == 0 && (room != rootExtents || depth > 0) {
		return fmt.Errorf("has an extent tree node with a malformed header: %x", b[:ehSize])
	}
	at := func(i int) []byte { return b[ehSize+i*extentSize:][:extentSize] }
	if depth == 0 {
		for i := range entries {
			e := extent{file: le.Uint32(at(i)[eeFile:]), device: le.Uint32(at(i)[eeStart:]), count: uint32(le.Uint16(at(i)[eeCount:]))}
			unwritten := e.count > maxExtent
			if unwritten {
				e.count -= maxExtent
			}
			end := uint64(e.file) + uint64(e.count)
			if e.count == 0 || uint64(e.file) < from || end > to {
				return fmt.Errorf("has an extent of file blocks [%d, %d), out of order in [%d, %d)", e.file, end, from, to)
			}
			if le.Uint16(at(i)[eeStartHigh:]) != 0 || e.device == 0 || uint64(e.device)+uint64(e.count) > uint64(w.c.blocks) {
				return fmt.Errorf("has an extent of %d blocks at block %d of %d", e.count, e.device, w.c.blocks)
			}
			if err := w.fn(e, unwritten); err != nil {
				return err
			}
			from = end
		}
		return nil
	}

	child := make([]byte, blockSize)
	for i := range entries {
		first, end := uint64(le.Uint32(at(i)[eiFile:])), to
		if i+1 < entries {
			end = uint64(le.Uint32(at(i + 1)[eiFile:]))
		}
		if first < from || end <= first || end > to {
			return fmt.Errorf("has an extent tree entry for file blocks [%d, %d), out of order in [%d, %d)", first, end, from, to)
		}
		block := le.Uint32(at(i)[eiLeaf:])
		if le.Uint16(at(i)[eiLeafHigh:]) != 0 {
			return fmt.Errorf("has an extent tree beyond the device")
		}
		if w.claim {
			if err := w.c.claim(block, 1, w.number); err != nil {
				return err
			}
		}
		w.blocks++
		if err := w.c.readBlocks(child, block, "an extent tree"); err != nil {
			return err
		}
		if err := w.c.sum(le.Uint32(child[extentTail:]), crc32c(w.seed, child[:extentTail]), fmt.Sprintf("has an extent tree, whose block %d", block)); err != nil {
			return err
		}
		if err := w.node(child, blockExtents, depth-1, first, end); err != nil {
			return err
		}
		from = end
	}
	return nil
}
