package ext4

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"

	"thaw/blockmap"
)

// Use is what blocks of a device are used for.
type Use string

// The uses.
const (
	UseData      Use = "data"        // the content of a file
	UseDirectory Use = "directory"   // names
	UseTree      Use = "extent tree" // where the blocks of a file are
	UseXattrs    Use = "attributes"
	UseSuper     Use = "superblock" // and the descriptors of the groups
	UseBitmap    Use = "bitmap"
	UseInodes    Use = "inodes"
	UseJournal   Use = "journal"
	UseFree      Use = "free"
)

// Owned are blocks with one use.
type Owned struct {
	blockmap.Extent
	Use  Use
	Path string // of the first file found that has the blocks; "" if it is none
}

// maxOwned bounds the memory of Owners.
const maxOwned = 4 << 20

// Owners says what the blocks in ranges, which are sorted and disjoint, are used for. It
// reads the filesystem on a device of size bytes as the next mount will make it, and
// trusts nothing that it reads. Deleted files that are still open own nothing. Where two
// owners claim a block, as in a damaged filesystem, the one that was found first has it.
func Owners(r io.ReaderAt, size int64, ranges []blockmap.Extent) ([]Owned, error) {
	f, err := openFiles(r, size)
	if err != nil {
		return nil, err
	}
	o := &owners{files: f, ranges: ranges, seen: make(map[uint32]struct{})}
	if err := o.filesystem(); err != nil {
		return nil, err
	}
	root, err := f.inode(rootInode)
	if err != nil {
		return nil, err
	}
	if err := o.file("/", root, 0); err != nil {
		return nil, err
	}
	return o.rest(), nil
}

type owners struct {
	*files
	ranges []blockmap.Extent
	found  []Owned
	seen   map[uint32]struct{} // inodes with several names
}

// claim notes the part of blocks that is in ranges.
func (o *owners) claim(start uint32, count uint64, use Use, name string) error {
	e := blockmap.Range(int64(start)*blockSize, int64(count)*blockSize)
	i, _ := slices.BinarySearchFunc(o.ranges, e.Start, func(r blockmap.Extent, at int64) int {
		return cmp.Compare(r.End, at+1) // the first that ends behind it
	})
	for ; i < len(o.ranges) && o.ranges[i].Start < e.End; i++ {
		if len(o.found) == maxOwned {
			return fmt.Errorf("the ranges have more than %d owners", maxOwned)
		}
		o.found = append(o.found, Owned{e.Intersect(o.ranges[i]), use, name})
	}
	return nil
}

// filesystem claims what is not in a file.
func (o *owners) filesystem() error {
	if err := o.claim(0, 1+uint64((o.groupCount-1)/descsPerBlock+1), UseSuper, ""); err != nil {
		return err
	}
	for i := range o.groups {
		g := &o.groups[i]
		for _, part := range []struct {
			start, count uint32
			use          Use
		}{{g.blockBitmap, 1, UseBitmap}, {g.inodeBitmap, 1, UseBitmap}, {g.inodeTable, o.perGroup / inodesPerBlock, UseInodes}} {
			if err := o.claim(part.start, uint64(part.count), part.use, ""); err != nil {
				return err
			}
		}
	}
	if !o.hasJournal {
		return nil
	}
	j := &diskInode{number: journalInode}
	if err := o.readInode(j.in[:], journalInode); err != nil {
		return err
	}
	return o.blocks("", j, UseJournal)
}

// blocks claims the content and the extent tree of a file.
func (o *owners) blocks(name string, d *diskInode, use Use) error {
	if err := o.runs(d, func(e extent64, _ bool) error { return o.claim(e.device, e.count, use, name) }); err != nil {
		return err
	}
	if !d.extents() {
		return nil
	}
	return o.trees(d.in[inBlock:inBlock+blockMapSize], rootExtents, name)
}

// trees claims the nodes of an extent tree, which runs has checked.
func (o *owners) trees(node []byte, room int, name string) error {
	if le.Uint16(node[ehDepth:]) == 0 {
		return nil
	}
	b := make([]byte, blockSize)
	for i := range min(int(le.Uint16(node[ehEntries:])), room) {
		block := le.Uint32(node[ehSize+i*extentSize+eiLeaf:])
		if err := o.claim(block, 1, UseTree, name); err != nil {
			return err
		}
		if err := o.readBlocks(b, block, "an extent tree"); err != nil {
			return err
		}
		if le.Uint16(b[ehDepth:]) >= le.Uint16(node[ehDepth:]) {
			return errors.New("ext4: an extent tree has changed meanwhile")
		}
		if err := o.trees(b, blockExtents, name); err != nil {
			return err
		}
	}
	return nil
}

// file claims the blocks of a file, and of what is below a directory.
func (o *owners) file(name string, d *diskInode, depth int) error {
	if d.isDir() || le.Uint16(d.in[inLinks:]) > 1 {
		if _, again := o.seen[d.number]; again {
			return nil
		}
		o.seen[d.number] = struct{}{}
	}
	use := UseData
	if d.isDir() {
		use = UseDirectory
	}
	if err := o.blocks(name, d, use); err != nil {
		return err
	}
	if block := le.Uint32(d.in[inXattr:]); block != 0 {
		if err := o.claim(block, 1, UseXattrs, name); err != nil {
			return err
		}
	}
	if !d.isDir() {
		return nil
	}
	if depth == maxDepth {
		return fmt.Errorf("directories are nested more than %d deep", maxDepth)
	}
	list, err := o.entries(d)
	if err != nil {
		return err
	}
	for _, e := range list {
		child, err := o.inode(e.number)
		if err == nil {
			err = o.file(path.Join(name, e.name), child, depth+1)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// rest sorts what was found, drops second owners, and adds what is free.
func (o *owners) rest() []Owned {
	slices.SortStableFunc(o.found, func(a, b Owned) int { return cmp.Compare(a.Start, b.Start) })
	var list []Owned
	at := 0
	for _, r := range o.ranges {
		for next := r.Start; next < r.End; {
			for at < len(o.found) && o.found[at].End <= next {
				at++
			}
			if at == len(o.found) || o.found[at].Start >= r.End {
				list = append(list, Owned{Extent: blockmap.Extent{Start: next, End: r.End}, Use: UseFree})
				break
			}
			f := o.found[at]
			if f.Start > next {
				list = append(list, Owned{Extent: blockmap.Extent{Start: next, End: f.Start}, Use: UseFree})
			}
			f.Start = max(f.Start, next)
			list = append(list, f)
			next = f.End
		}
	}
	return list
}
