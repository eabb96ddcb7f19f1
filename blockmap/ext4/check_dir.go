package ext4

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
)

// checkTree walks the directories from the root and compares what it finds with
// the inodes in use.
func (c *checker) checkTree() error {
	root := c.find(rootInode)
	root.parent = rootInode
	todo := []uint32{rootInode}
	w := dirWalk{c: c, names: make(map[string]struct{}), visited: make(map[uint32]struct{})}
	for len(todo) > 0 {
		number := todo[len(todo)-1]
		w.subdirs = todo[:len(todo)-1]
		if err := w.directory(number); err != nil {
			return fmt.Errorf("directory inode %d %w", number, err)
		}
		todo = w.subdirs
	}
	for _, s := range c.inodes {
		if s.found == 0 && !(s.links == 0 && c.orphan(s.number)) {
			return fmt.Errorf("inode %d is in use, but no directory has it", s.number)
		}
	}
	for _, s := range c.inodes {
		// One link means that an indexed directory has or had more subdirectories
		// than a link count can hold.
		if uint32(s.links) != s.found && !(s.index && s.links == 1) {
			return fmt.Errorf("inode %d has %d links, but its link count is %d", s.number, s.found, s.links)
		}
	}
	return nil
}

// dirWalk reads one directory after the other.
type dirWalk struct {
	c       *checker
	subdirs []uint32 // to be visited
	names   map[string]struct{}

	number  uint32
	seed    uint32
	extents []extent // without holes; a list of blocks could be as long as the device
	blocks  uint32
	visited map[uint32]struct{} // blocks that the hash tree has named
	buf     [blockSize]byte
}

func (w *dirWalk) directory(number uint32) error {
	c := w.c
	var in [inodeSize]byte
	if err := c.readInode(in[:], number); err != nil {
		return err
	}
	w.number = number
	w.seed = inodeSeed(c.seed, number, le.Uint32(in[inGeneration:]))
	w.extents, w.blocks = w.extents[:0], 0
	clear(w.names)
	if _, err := c.extents(number, in[:], false, func(e extent, _ bool) error {
		w.extents = append(w.extents, e)
		w.blocks = e.file + e.count
		return nil
	}); err != nil {
		return err
	}
	if le.Uint32(in[inFlags:])&inodeFlagIndex != 0 {
		return w.hashTree()
	}
	for i := range w.blocks {
		if err := w.read(i); err != nil {
			return err
		}
		if err := w.leaf(i == 0, 0, ^uint32(0)); err != nil {
			return fmt.Errorf("block %d: %w", i, err)
		}
	}
	return nil
}

// read reads a block of the directory. The directory has the block.
func (w *dirWalk) read(block uint32) error {
	i, ok := slices.BinarySearchFunc(w.extents, block, func(e extent, b uint32) int { return cmp.Compare(e.file, b) })
	if !ok {
		i--
	}
	e := w.extents[i]
	return w.c.readBlocks(w.buf[:], e.device+block-e.file, "a directory")
}

// leaf checks the block of entries in w.buf, whose names have hashes from low to
// high; first is the one that begins with "." and "..".
func (w *dirWalk) leaf(first bool, low, high uint32) error {
	b := w.buf[:]
	if le.Uint32(b[dirTail+deInode:]) != 0 || le.Uint16(b[dirTail+deLength:]) != blockSize-dirTail ||
		b[dirTail+deNameLn] != 0 || b[dirTail+deType] != tailType {
		return fmt.Errorf("has no checksum")
	}
	if err := w.c.sum(le.Uint32(b[dirTailCsum:]), crc32c(w.seed, b[:dirTail]), "which"); err != nil {
		return err
	}
	for at, n := 0, 0; at < dirTail; n++ {
		if at+deName > dirTail {
			return fmt.Errorf("ends within an entry")
		}
		e := b[at:dirTail]
		length, nameLn := int(le.Uint16(e[deLength:])), int(e[deNameLn])
		if length < direntSize(nameLn) || length%4 != 0 || length > len(e) {
			return fmt.Errorf("has an entry of %d bytes with a name of %d at byte %d", length, nameLn, at)
		}
		name := e[deName : deName+nameLn]
		if dot := dotName(n); first && dot != "" {
			if err := w.dot(e, dot, string(name)); err != nil {
				return err
			}
		} else if le.Uint32(e[deInode:]) != 0 {
			if err := w.entry(e, string(name), low, high); err != nil {
				return err
			}
		}
		at += length
	}
	return nil
}

// dotName is the name that entry i of a directory has to have.
func dotName(i int) string {
	if i < 2 {
		return ".."[:i+1]
	}
	return ""
}

// dot checks one of the two first entries of a directory.
func (w *dirWalk) dot(e []byte, want, name string) error {
	number := w.number
	if want == ".." {
		number = w.c.find(w.number).parent
	}
	if name != want || le.Uint32(e[deInode:]) != number || e[deType] != fileTypes[modeDir>>12] {
		return fmt.Errorf("has an entry %q of type %d for inode %d, want %q for inode %d", name, e[deType], le.Uint32(e[deInode:]), want, number)
	}
	w.c.find(number).found++
	return nil
}

func (w *dirWalk) entry(e []byte, name string, low, high uint32) error {
	switch {
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("has an entry %q", name)
	case bytes.IndexByte([]byte(name), '/') >= 0 || bytes.IndexByte([]byte(name), 0) >= 0:
		return fmt.Errorf("has a name with a slash or a NUL in it: %q", name)
	}
	if _, ok := w.names[name]; ok {
		return fmt.Errorf("has two entries %q", name)
	}
	w.names[name] = struct{}{}
	if low > 0 || high < ^uint32(0) {
		if hash, _ := w.c.hasher.hash(name); hash < low || hash > high {
			return fmt.Errorf("has %q with hash %#x in a block for hashes from %#x to %#x", name, hash, low, high)
		}
	}
	number := le.Uint32(e[deInode:])
	s := w.c.find(number)
	if s == nil || number < firstInode {
		return fmt.Errorf("has %q for inode %d, which is not in use", name, number)
	}
	if e[deType] != fileTypes[s.mode>>12] {
		return fmt.Errorf("has %q of type %d for inode %d of mode %#o", name, e[deType], number, s.mode)
	}
	s.found++
	if uint32(s.mode)&modeType == modeDir {
		if s.parent != 0 {
			return fmt.Errorf("has %q for directory inode %d, which is in directory inode %d already", name, number, s.parent)
		}
		s.parent = w.number
		w.subdirs = append(w.subdirs, number)
	}
	return nil
}

// hashTree checks a directory with an index. Every block of it must be named by
// the index once.
func (w *dirWalk) hashTree() error {
	clear(w.visited)
	if err := w.read(0); err != nil {
		return err
	}
	b := w.buf[:]
	w.visited[0] = struct{}{}
	dot, dotDot := b[dxDot:], b[dxDotDot:]
	if le.Uint16(dot[deLength:]) != dxDotDot-dxDot || le.Uint16(dotDot[deLength:]) != blockSize-dxDotDot ||
		dot[deNameLn] != 1 || dotDot[deNameLn] != 2 {
		return fmt.Errorf("has a hash tree root without %q and %q", ".", "..")
	}
	if err := w.dot(dot, ".", string(dot[deName:deName+1])); err != nil {
		return err
	}
	if err := w.dot(dotDot, "..", string(dotDot[deName:deName+2])); err != nil {
		return err
	}
	most := byte(maxIndirect - 1)
	if w.c.incompat&incompatLargeDir != 0 {
		most = maxIndirect
	}
	if b[dxHash] != hashHalfMD4 || b[dxInfoLength] != 8 || b[dxIndirect] > most || b[dxIndirect+1] != 0 {
		return fmt.Errorf("has a hash tree root with hash version %d, %d bytes of it, %d levels and flags %#x",
			b[dxHash], b[dxInfoLength], b[dxIndirect], b[dxIndirect+1])
	}
	if err := w.index(0, dxRoot, dxRootLimit, int(b[dxIndirect]), 0, ^uint32(0)); err != nil {
		return err
	}
	if n := uint32(len(w.visited)); n != w.blocks {
		return fmt.Errorf("has %d blocks, but its hash tree names %d", w.blocks, n)
	}
	return nil
}

// index walks the node in w.buf, whose names have hashes from low to high.
func (w *dirWalk) index(block uint32, start, limit, indirect int, low, high uint32) error {
	b := w.buf[:]
	count := int(le.Uint16(b[start+dxCount:]))
	if got := int(le.Uint16(b[start+dxLimit:])); got != limit || count == 0 || count > limit {
		return fmt.Errorf("block %d: a hash tree node has %d entries of %d", block, count, got)
	}
	tail := start + limit*dxEntrySize
	if err := w.c.sum(le.Uint32(b[tail+4:]), dxChecksum(w.seed, b, start, count, limit), fmt.Sprintf("block %d, a hash tree node,", block)); err != nil {
		return err
	}
	type child struct{ key, block uint32 }
	children := make([]child, count)
	for i := range children {
		e := b[start+i*dxEntrySize:]
		children[i] = child{le.Uint32(e), le.Uint32(e[dxBlock:])}
	}
	children[0].key = low

	for i, ch := range children {
		last := high
		if i+1 < count {
			next := children[i+1].key
			if hash := next &^ dxContinued; hash < ch.key&^dxContinued || hash > high || hash == ch.key&^dxContinued && next == hash {
				return fmt.Errorf("block %d: a hash tree node lists hash %#x behind %#x, and its range ends at %#x", block, next, ch.key, high)
			}
			last = next
			if next&dxContinued == 0 {
				last--
			}
		}
		if _, again := w.visited[ch.block]; again || ch.block >= w.blocks {
			return fmt.Errorf("block %d: a hash tree node names block %d of %d, which does not exist or was named before", block, ch.block, w.blocks)
		}
		w.visited[ch.block] = struct{}{}
		if err := w.read(ch.block); err != nil {
			return err
		}
		var err error
		if indirect == 0 {
			if err = w.leaf(false, ch.key&^dxContinued, last); err != nil {
				err = fmt.Errorf("block %d: %w", ch.block, err)
			}
		} else {
			if fake := w.buf[dxFake:]; le.Uint32(fake[deInode:]) != 0 || le.Uint16(fake[deLength:]) != blockSize {
				return fmt.Errorf("block %d: a hash tree node does not look like an empty directory block", ch.block)
			}
			err = w.index(ch.block, dxNode, dxNodeLimit, indirect-1, ch.key, last)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
