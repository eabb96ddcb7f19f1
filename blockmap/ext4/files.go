package ext4

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Bounds of a walk. The metadata that the device really holds bounds it, too; these keep
// one directory, and the way down to it, within reason.
const (
	maxEntries = 4 << 20 // of a directory
	maxDepth   = 4096    // of directories
)

// files reads the files of a filesystem, as the next mount will make it. It trusts
// nothing that it reads, but it is no check: it reads only what it needs.
type files struct {
	*checker
	visited map[uint32]struct{} // directories
}

func openFiles(r io.ReaderAt, size int64) (*files, error) {
	v, err := Recover(r, size)
	if err != nil {
		return nil, err
	}
	f := &files{&checker{r: v, size: size, used: true}, make(map[uint32]struct{})}
	for _, step := range []func() error{f.checkSuperblock, f.checkDescriptors} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("ext4: %w", err)
		}
	}
	return f, nil
}

// diskInode is an inode as it was read.
type diskInode struct {
	number uint32
	in     [inodeSize]byte
}

func (d *diskInode) mode() uint32 { return uint32(le.Uint16(d.in[inMode:])) }
func (d *diskInode) size() int64  { return int64(min(inodeLength(d.in[:]), 1<<62)) }
func (d *diskInode) isDir() bool  { return d.mode()&modeType == modeDir }
func (d *diskInode) extents() bool {
	return le.Uint32(d.in[inFlags:])&inodeFlagExtents != 0
}

// same reports whether d and o are one file at two times.
func (d *diskInode) same(o *diskInode) bool {
	return d.number == o.number && d.mode()&modeType == o.mode()&modeType &&
		bytes.Equal(d.in[inGeneration:inGeneration+4], o.in[inGeneration:inGeneration+4]) &&
		bytes.Equal(d.in[inCrtime:inCrtimeExtra+4], o.in[inCrtime:inCrtimeExtra+4])
}

func (f *files) inode(number uint32) (*diskInode, error) {
	if number != rootInode && number < firstInode || uint64(number) > uint64(f.groupCount)*uint64(f.perGroup) {
		return nil, fmt.Errorf("ext4: a directory has inode %d, which does not exist", number)
	}
	d := &diskInode{number: number}
	if err := f.readInode(d.in[:], number); err != nil {
		return nil, fmt.Errorf("ext4: %w", err)
	}
	if err := f.sum(getHalves(d.in[:], inChecksum, inChecksumHi), inodeChecksum(f.seed, number, d.in[:]), fmt.Sprint("inode ", number)); err != nil {
		return nil, fmt.Errorf("ext4: %w", err)
	}
	return d, nil
}

// runs calls fn with the extents of a file in order; neighbours are one.
func (f *files) runs(d *diskInode, fn func(e extent64, unwritten bool) error) error {
	if !d.extents() {
		return nil
	}
	var last extent64
	var lastUnwritten bool
	_, err := f.checker.extents(d.number, d.in[:], false, func(e extent, unwritten bool) error {
		x := extent64{e.file, e.device, uint64(e.count)}
		if last.count > 0 && unwritten == lastUnwritten && uint64(last.file)+last.count == uint64(x.file) && uint64(last.device)+last.count == uint64(x.device) {
			last.count += x.count
			return nil
		}
		if last.count > 0 {
			if err := fn(last, lastUnwritten); err != nil {
				return err
			}
		}
		last, lastUnwritten = x, unwritten
		return nil
	})
	if err == nil && last.count > 0 {
		err = fn(last, lastUnwritten)
	}
	if err != nil {
		return fmt.Errorf("ext4: inode %d %w", d.number, err)
	}
	return nil
}

// extent64 is one or more extents in a row.
type extent64 struct {
	file, device uint32
	count        uint64
}

// entry is a name in a directory, without "." and "..".
type entry struct {
	name   string
	number uint32
}

// entries reads a directory, sorted by name. Each directory is read once: a filesystem
// in which one contains itself has no end.
func (f *files) entries(d *diskInode) ([]entry, error) {
	fail := func(format string, args ...any) ([]entry, error) {
		return nil, fmt.Errorf("ext4: directory inode %d: "+format, append([]any{d.number}, args...)...)
	}
	if _, again := f.visited[d.number]; again {
		return fail("two directories have it")
	}
	f.visited[d.number] = struct{}{}
	var list []entry
	var b [blockSize]byte
	err := f.runs(d, func(e extent64, _ bool) error {
		for i := range uint32(e.count) {
			if err := f.readBlocks(b[:], e.device+i, "a directory"); err != nil {
				return err
			}
			// The blocks of a hash tree look like blocks without names.
			for at := 0; at+deName <= blockSize; {
				p := b[at:]
				length, name := int(le.Uint16(p[deLength:])), int(p[deNameLn])
				if length < direntSize(name) || length%4 != 0 || length > len(p) {
					return fmt.Errorf("an entry of %d bytes with a name of %d, at byte %d of block %d", length, name, at, e.device+i)
				}
				if number := le.Uint32(p[deInode:]); number != 0 {
					switch s := string(p[deName : deName+name]); {
					case s == "." || s == "..":
					case s == "" || strings.ContainsAny(s, "/\x00"):
						return fmt.Errorf("a name with a slash or a NUL in it, or none: %q", s)
					case len(list) == maxEntries:
						return fmt.Errorf("more than %d entries", maxEntries)
					default:
						list = append(list, entry{s, number})
					}
				}
				at += length
			}
		}
		return nil
	})
	if err != nil {
		return fail("%w", err)
	}
	slices.SortFunc(list, func(a, b entry) int { return cmp.Compare(a.name, b.name) })
	for i := 1; i < len(list); i++ {
		if list[i].name == list[i-1].name {
			return fail("two entries %q", list[i].name)
		}
	}
	return list, nil
}

// content sums up where the content of a file lies. written is how many of its blocks
// changed reports.
func (f *files) content(d *diskInode, changed func(start, count uint32) uint32) (where [sha256.Size]byte, written uint64, err error) {
	h := sha256.New()
	if !d.extents() {
		h.Write(d.in[inBlock : inBlock+blockMapSize])
		return [sha256.Size]byte(h.Sum(nil)), 0, nil
	}
	err = f.runs(d, func(e extent64, unwritten bool) error {
		if unwritten {
			return nil // it reads as zeros, as a hole does
		}
		var b [16]byte
		le.PutUint32(b[:], e.file)
		le.PutUint32(b[4:], e.device)
		le.PutUint64(b[8:], e.count)
		h.Write(b[:])
		written += uint64(changed(e.device, uint32(e.count)))
		return nil
	})
	return [sha256.Size]byte(h.Sum(nil)), written, err
}
