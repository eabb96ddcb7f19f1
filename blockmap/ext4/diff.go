package ext4

import (
	"bytes"
	"fmt"
	"io"
	"path"
)

// Change is how a file differs between two states of a filesystem. Its values are the
// letters that git status has for them.
type Change string

// The changes.
const (
	Added    Change = "A"
	Modified Change = "M"
	Deleted  Change = "D"
	Renamed  Change = "R" // it may be modified as well
)

// Difference is a file that differs between two states of a filesystem.
type Difference struct {
	Change Change
	Path   string // from the root, beginning with a slash; of a Deleted file, the one that it had
	From   string // of a Renamed file, the path that it had
	Mode   uint32 // as st_mode; of a Deleted file, the one that it had
	Before int64  // bytes of the file before; 0 if there was none
	After  int64  // and now
	// Written is how many bytes of the blocks of the file were written.
	Written int64
	// Metadata: only the owner, the mode, a time or an attribute of the file differs.
	Metadata bool
}

// maxDifferences bounds the memory of a comparison.
const maxDifferences = 1 << 20

// Diff compares two states of a filesystem on devices of size bytes, each as the next
// mount will make it, and returns the files that differ, in the order of their paths.
// changed reports how many blocks of a range were written in between: so Diff finds what
// was written in place, and reads no content. It reads all directories and inodes of
// both, and trusts none of them.
func Diff(before, after io.ReaderAt, size int64, changed func(start, count uint32) uint32) ([]Difference, error) {
	old, err := openFiles(before, size)
	if err != nil {
		return nil, fmt.Errorf("before the changes: %w", err)
	}
	now, err := openFiles(after, size)
	if err != nil {
		return nil, fmt.Errorf("after the changes: %w", err)
	}
	d := &differ{old: old, now: now, changed: changed, gone: make(map[uint32]int)}
	x, err := old.inode(rootInode)
	if err != nil {
		return nil, err
	}
	y, err := now.inode(rootInode)
	if err != nil {
		return nil, err
	}
	if err := d.both("/", x, y, 0); err != nil {
		return nil, err
	}
	return d.renames(), nil
}

type differ struct {
	old, now *files
	changed  func(start, count uint32) uint32
	list     []Difference
	inodes   []*diskInode   // of the list, for those that were added or deleted
	gone     map[uint32]int // deleted inodes, by number: where in the list
}

func (d *differ) add(x Difference, in *diskInode) error {
	if len(d.list) == maxDifferences {
		return fmt.Errorf("more than %d files differ", maxDifferences)
	}
	if x.Change == Deleted {
		d.gone[in.number] = len(d.list)
	}
	d.list, d.inodes = append(d.list, x), append(d.inodes, in)
	return nil
}

// both compares two files of one path.
func (d *differ) both(name string, x, y *diskInode, depth int) error {
	if x.mode()&modeType != y.mode()&modeType {
		if err := d.side(d.old, Deleted, name, x, depth); err != nil {
			return err
		}
		return d.side(d.now, Added, name, y, depth)
	}
	diff := Difference{Change: Modified, Path: name, Mode: y.mode(), Before: x.size(), After: y.size()}
	differs := metadata(x, y)
	diff.Metadata = differs
	if !x.isDir() {
		before, _, err := d.old.content(x, d.none)
		if err != nil {
			return err
		}
		after, written, err := d.now.content(y, d.changed)
		if err != nil {
			return err
		}
		diff.Written = int64(written) * blockSize
		if before != after || written > 0 || x.size() != y.size() || !x.same(y) {
			differs, diff.Metadata = true, false
		}
	}
	if differs {
		if err := d.add(diff, nil); err != nil {
			return err
		}
	}
	if !x.isDir() {
		return nil
	}
	if depth == maxDepth {
		return fmt.Errorf("directories are nested more than %d deep", maxDepth)
	}
	was, err := d.old.entries(x)
	if err != nil {
		return err
	}
	is, err := d.now.entries(y)
	if err != nil {
		return err
	}
	for len(was) > 0 || len(is) > 0 {
		switch {
		case len(is) == 0 || len(was) > 0 && was[0].name < is[0].name:
			err = d.child(d.old, Deleted, name, was[0], depth)
			was = was[1:]
		case len(was) == 0 || is[0].name < was[0].name:
			err = d.child(d.now, Added, name, is[0], depth)
			is = is[1:]
		default:
			var a, b *diskInode
			if a, err = d.old.inode(was[0].number); err == nil {
				if b, err = d.now.inode(is[0].number); err == nil {
					err = d.both(path.Join(name, is[0].name), a, b, depth+1)
				}
			}
			was, is = was[1:], is[1:]
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *differ) none(uint32, uint32) uint32 { return 0 }

// child is side for an entry of a directory.
func (d *differ) child(f *files, c Change, dir string, e entry, depth int) error {
	in, err := f.inode(e.number)
	if err != nil {
		return err
	}
	return d.side(f, c, path.Join(dir, e.name), in, depth+1)
}

// side notes a file that only one side has, and what is below it.
func (d *differ) side(f *files, c Change, name string, in *diskInode, depth int) error {
	diff := Difference{Change: c, Path: name, Mode: in.mode()}
	if c == Deleted {
		diff.Before = in.size()
	} else {
		_, written, err := f.content(in, d.changed)
		if err != nil {
			return err
		}
		diff.After, diff.Written = in.size(), int64(written)*blockSize
	}
	if err := d.add(diff, in); err != nil {
		return err
	}
	if !in.isDir() {
		return nil
	}
	if depth >= maxDepth {
		return fmt.Errorf("directories are nested more than %d deep", maxDepth)
	}
	list, err := f.entries(in)
	if err != nil {
		return err
	}
	for _, e := range list {
		if err := d.child(f, c, name, e, depth); err != nil {
			return err
		}
	}
	return nil
}

// metadata reports whether the inodes of one path differ in what stat and the extended
// attributes show, but for times of access, and for directories but for all times.
func metadata(x, y *diskInode) bool {
	fields := [][2]int{{inMode, inMode + 4}, {inGID, inGID + 2}, {inUIDHigh, inGIDHigh + 2}}
	if !x.isDir() {
		fields = append(fields, [2]int{inMtime, inMtime + 4}, [2]int{inMtimeExtra, inMtimeExtra + 4},
			[2]int{inCtime, inCtime + 4}, [2]int{inCtimeExtra, inCtimeExtra + 4}, [2]int{inLinks, inLinks + 2})
	}
	fields = append(fields, [2]int{inXattr, inXattr + 4}, [2]int{inodeXattrs, inodeSize})
	for _, f := range fields {
		if !bytes.Equal(x.in[f[0]:f[1]], y.in[f[0]:f[1]]) {
			return true
		}
	}
	return false
}

// renames makes one difference of a file that is gone and one that has come, if they are
// the same inode. A file that only came along with its directory is left out.
func (d *differ) renames() []Difference {
	moved := make(map[string]string) // directories, by their old path
	drop := make(map[int]bool)
	for i := range d.list {
		x := &d.list[i]
		if x.Change != Added {
			continue
		}
		at, ok := d.gone[d.inodes[i].number]
		if !ok || drop[at] || !d.inodes[at].same(d.inodes[i]) {
			continue
		}
		was := &d.list[at]
		drop[at] = true
		x.Change, x.From, x.Before = Renamed, was.Path, was.Before
		if d.inodes[i].isDir() {
			moved[was.Path] = x.Path
			x.Written = 0
		}
		along := moved[path.Dir(was.Path)] == path.Dir(x.Path) && path.Base(was.Path) == path.Base(x.Path)
		if along && x.Written == 0 && x.Before == x.After && !metadata(d.inodes[at], d.inodes[i]) {
			drop[i] = true
		}
	}
	var list []Difference
	for i := range d.list {
		if !drop[i] {
			list = append(list, d.list[i])
		}
	}
	return list
}
