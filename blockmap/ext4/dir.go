package ext4

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// A directory is a file of blocks of entries. An entry is:
const (
	deInode  = 0x0 // 4: 0 means no entry
	deLength = 0x4 // 2: bytes to the next entry, a multiple of 4; the last entry extends to the tail
	deNameLn = 0x6 // 1
	deType   = 0x7 // 1
	deName   = 0x8 // the name, not terminated

	// Each block ends in an entry of inode 0. Its type is tailType, and its name is the
	// checksum of the block.
	dirTail     = blockSize - 12 // 12: 0, length 12, name length 0, tailType, checksum
	tailType    = 0xDE
	dirTailCsum = dirTail + 8 // 4: crc32c(inode seed, block up to dirTail)

	maxName = 255
)

// fileTypes are the values of deType, by the type bits of the mode >> 12.
var fileTypes = [16]byte{
	modeRegular >> 12: 1, modeDir >> 12: 2, modeChar >> 12: 3, modeBlock >> 12: 4,
	modeFifo >> 12: 5, modeSocket >> 12: 6, modeSymlink >> 12: 7,
}

// direntSize returns the smallest size of an entry: names are padded to 4 bytes.
func direntSize(name int) int { return deName + (name+3)&^3 }

// sortEntries sorts entries by name. It fails on names that are not allowed.
func sortEntries(entries []Dirent) error {
	slices.SortFunc(entries, func(a, b Dirent) int { return strings.Compare(a.Name, b.Name) })
	for i := range entries {
		switch name := entries[i].Name; {
		case name == "":
			return fmt.Errorf("has an entry with an empty name")
		case len(name) > maxName:
			return fmt.Errorf("has a name of %d bytes, and %d is the most: %.255q", len(name), maxName, name)
		case name == "." || name == "..":
			return fmt.Errorf("has an entry %q, which is not to be given", name)
		case strings.IndexByte(name, '/') >= 0 || strings.IndexByte(name, 0) >= 0:
			return fmt.Errorf("has a name with a slash or a NUL in it: %.255q", name)
		case i > 0 && name == entries[i-1].Name:
			return fmt.Errorf("has two entries %q", name)
		}
	}
	return nil
}

// dirBlocks plans directory in, whose entries are sorted by name, and returns how many
// blocks it takes. If it takes several, dirBlocks sorts its entries by hash.
func (fs *Filesystem) dirBlocks(in *Inode) (uint32, error) {
	size := direntSize(1) + direntSize(2)
	for i := range in.Entries {
		size += direntSize(len(in.Entries[i].Name))
	}
	if size <= dirTail {
		return 1, nil
	}
	fs.sortByHash(in.Entries)
	leaves := 0
	for rest := in.Entries; len(rest) > 0; leaves++ {
		rest = rest[leafEntries(rest):]
	}
	tree := newHashTree(leaves, fs.opts.dxFan)
	if tree.indirect() > maxIndirect {
		return 0, fmt.Errorf("has %d entries, which is more than a hash tree holds", len(in.Entries))
	}
	fs.largeDir = fs.largeDir || tree.indirect() == maxIndirect
	return uint32(tree.blocks()), nil
}

func (fs *Filesystem) sortByHash(entries []Dirent) {
	type hashed struct {
		hash, minor uint32
		Dirent
	}
	l := make([]hashed, len(entries))
	for i, e := range entries {
		hash, minor := fs.hasher.hash(e.Name)
		l[i] = hashed{hash, minor, e}
	}
	slices.SortFunc(l, func(a, b hashed) int {
		return cmp.Or(cmp.Compare(a.hash, b.hash), cmp.Compare(a.minor, b.minor), strings.Compare(a.Name, b.Name))
	})
	for i := range l {
		entries[i] = l[i].Dirent
	}
}

// dirWriter makes the blocks of one directory.
type dirWriter struct {
	fs     *Filesystem
	seed   uint32 // of the directory's checksums
	number uint32 // of the directory
	parent uint32
	buf    [blockSize]byte
}

// blocks calls emit with the n blocks of directory in. The buffer is valid only during
// the call.
func (w *dirWriter) blocks(in *Inode, n uint32, emit func(b []byte) error) error {
	if n == 1 {
		w.begin()
		at := w.put(0, ".", w.number, modeDir)
		at, last := w.put(at, "..", w.parent, modeDir), at
		for i := range in.Entries {
			at, last = w.putEntry(at, &in.Entries[i]), at
		}
		return emit(w.end(last))
	}
	return w.hashTree(in.Entries, emit)
}

func (w *dirWriter) begin() { clear(w.buf[:]) }

// end extends the entry at last to the tail and writes the tail.
func (w *dirWriter) end(last int) []byte {
	b := w.buf[:]
	le.PutUint16(b[last+deLength:], uint16(dirTail-last))
	le.PutUint16(b[dirTail+deLength:], blockSize-dirTail)
	b[dirTail+deType] = tailType
	le.PutUint32(b[dirTailCsum:], crc32c(w.seed, b[:dirTail]))
	return b
}

func (w *dirWriter) putEntry(at int, e *Dirent) (next int) {
	return w.put(at, e.Name, w.fs.nodes[e.Inode.index].number, e.Inode.Mode)
}

func (w *dirWriter) put(at int, name string, number, mode uint32) (next int) {
	b := w.buf[at:]
	n := direntSize(len(name))
	le.PutUint32(b[deInode:], number)
	le.PutUint16(b[deLength:], uint16(n))
	b[deNameLn] = byte(len(name))
	b[deType] = fileTypes[mode>>12&15]
	copy(b[deName:], name)
	return at + n
}
