package ext4

// A tree of extents lists the blocks of a file. Every node starts with a header of 12
// bytes. The inode holds the root (4 entries of 12 bytes). Each other node is a block
// (340 entries), with a checksum after the last possible entry.
const (
	ehMagic   = 0x0 // 2
	ehEntries = 0x2 // 2: entries in use
	ehMax     = 0x4 // 2: capacity in entries
	ehDepth   = 0x6 // 2: 0 is a leaf
	ehSize    = 12  // the last 4 bytes, a generation, are unused

	extentMagic = 0xF30A

	// Leaves have extents:
	eeFile      = 0x0 // 4: first block in the file
	eeCount     = 0x4 // 2: blocks, at most maxExtent; a larger number n is an unwritten extent of n-maxExtent blocks
	eeStartHigh = 0x6 // 2: first block on the device
	eeStart     = 0x8 // 4

	// Index nodes have:
	eiFile     = 0x0 // 4: first file block that the child covers
	eiLeaf     = 0x4 // 4: block of the child
	eiLeafHigh = 0x8 // 2

	extentSize     = 12 // an entry of either kind
	maxExtent      = 32768
	rootExtents    = (blockMapSize - ehSize) / extentSize
	blockExtents   = (blockSize - ehSize) / extentSize
	extentTail     = ehSize + blockExtents*extentSize // 4: crc32c(inode seed, block up to here)
	maxExtentDepth = 5
)

// extent is count blocks of a file, from file, at device on the device.
type extent struct{ file, device, count uint32 }

// appendExtent adds e, which follows l in the file, to l. It extends the last extent
// where possible.
func appendExtent(l []extent, e extent) []extent {
	if n := len(l); n > 0 {
		last := &l[n-1]
		if last.file+last.count == e.file && last.device+last.count == e.device {
			m := min(maxExtent-last.count, e.count)
			last.count += m
			e = extent{e.file + m, e.device + m, e.count - m}
		}
	}
	for e.count > 0 {
		m := min(maxExtent, e.count)
		l = append(l, extent{e.file, e.device, m})
		e = extent{e.file + m, e.device + m, e.count - m}
	}
	return l
}

// treeBlocks returns how many blocks a tree of n extents has besides its root.
func treeBlocks(n int) uint32 {
	var sum int
	for n > rootExtents {
		n = (n + blockExtents - 1) / blockExtents
		sum += n
	}
	return uint32(sum)
}

// treeLevels returns the number of nodes on each level of a tree of n extents, leaves
// first, without the root. Its length is the depth.
func treeLevels(n int) []int {
	var l []int
	for n > rootExtents {
		n = (n + blockExtents - 1) / blockExtents
		l = append(l, n)
	}
	return l
}

// putExtentRoot writes the root of the tree of ext to b, the inode's block map.
// The rest of the tree is at block tree on the device: see extentBlocks.
func putExtentRoot(b []byte, ext []extent, tree uint32) {
	levels := treeLevels(len(ext))
	if len(levels) == 0 {
		putExtents(b, rootExtents, ext)
		return
	}
	top := len(levels) - 1
	putIndex(b, rootExtents, top+1, ext, 0, levels[top], spanOf(top), tree)
}

// extentBlocks calls emit with the blocks of the tree of ext, without its root, in
// their order on the device: the top level first, the leaves last. The buffer is valid
// only during the call.
func extentBlocks(ext []extent, tree, seed uint32, emit func(b []byte) error) error {
	levels := treeLevels(len(ext))
	var b [blockSize]byte
	for level := len(levels) - 1; level >= 0; level-- {
		below := tree + uint32(levels[level]) // where the children are
		for n := range levels[level] {
			clear(b[:])
			span := spanOf(level) // extents below a node of this level
			first, last := n*span, min((n+1)*span, len(ext))
			if level == 0 {
				putExtents(b[:], blockExtents, ext[first:last])
			} else {
				childSpan := spanOf(level - 1)
				children := (last - first + childSpan - 1) / childSpan
				putIndex(b[:], blockExtents, level, ext, first, children, childSpan, below+uint32(n*blockExtents))
			}
			le.PutUint32(b[extentTail:], crc32c(seed, b[:extentTail]))
			if err := emit(b[:]); err != nil {
				return err
			}
		}
		tree = below
	}
	return nil
}

// spanOf returns the number of extents below a full node of a level.
func spanOf(level int) int {
	n := blockExtents
	for range level {
		n *= blockExtents
	}
	return n
}

func putExtents(b []byte, room int, ext []extent) {
	putExtentHeader(b, len(ext), room, 0)
	for i, e := range ext {
		p := b[ehSize+i*extentSize:]
		le.PutUint32(p[eeFile:], e.file)
		le.PutUint16(p[eeCount:], uint16(e.count))
		le.PutUint32(p[eeStart:], e.device)
	}
}

// putIndex writes an index node with n children in consecutive blocks from child on.
// Child i covers the extents from first + i*span on.
func putIndex(b []byte, room, depth int, ext []extent, first, n, span int, child uint32) {
	putExtentHeader(b, n, room, depth)
	for i := range n {
		p := b[ehSize+i*extentSize:]
		le.PutUint32(p[eiFile:], ext[first+i*span].file)
		le.PutUint32(p[eiLeaf:], child+uint32(i))
	}
}

func putExtentHeader(b []byte, entries, room, depth int) {
	le.PutUint16(b[ehMagic:], extentMagic)
	le.PutUint16(b[ehEntries:], uint16(entries))
	le.PutUint16(b[ehMax:], uint16(room))
	le.PutUint16(b[ehDepth:], uint16(depth))
}
