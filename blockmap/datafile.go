package blockmap

import (
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"runtime/debug"
	"unsafe"

	"github.com/edsrzf/mmap-go"
	"github.com/ncw/directio"
	"golang.org/x/sys/unix"
)

// dataFile is an open sparse file of blocks, mapped for reading. It knows nothing
// of what the blocks are. Only its methods touch the file and the mapping.
//
// There are two ways to read. What is in memory is read where it is mapped. The rest is
// read by descriptor. So the kernel reads ahead for reads by descriptor, which are in
// order if the client's are, and not for the mapping: on a disk with a readahead of
// megabytes, a page fault would read as much for 4 KiB, and evict what others need.
//
// With direct set, blocks are read and written by that descriptor only, and the mapping
// serves the guard alone: the page cache keeps nothing else of the file.
//
// Behind its content the file has one more block, the guard, filled with
// guardWord. While the end of the guard is there nobody has cut the file short,
// nor cut it and made it longer again: then some blocks would fault, and others
// would silently read as zeros.
type dataFile struct {
	f    File
	id   FileID
	size int64     // of the content, without the guard
	m    mmap.MMap // the content and the guard

	direct  File // the same file without the page cache; nil: blocks are read and written by f
	buffers *buffers
}

const (
	guardSize = BlockSize
	guardWord = 0x6472_6175_6777_6174 // "tawguard", read as little-endian
)

// guard is the content of the guard.
func guard() []byte {
	b := make([]byte, 0, guardSize)
	for range guardSize / 8 {
		b = binary.LittleEndian.AppendUint64(b, guardWord)
	}
	return b
}

// errReplaced says that a data file is not the one that was written.
var errReplaced = errors.New("the data was cut short or replaced")

// notOurs says whether err means that something else, or nothing, is in the place
// of a file of the cache. A full or read-only disk is not that.
func notOurs(err error) bool {
	for _, e := range []error{errReplaced, fs.ErrNotExist, unix.EISDIR, unix.ENOTDIR, unix.ELOOP, unix.ENXIO, unix.EINVAL, unix.ESPIPE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// statData checks the data file at path for size bytes of content without keeping
// it open, and returns which file it is and the space that it takes.
func statData(fsys FS, path string, size int64) (id FileID, space int64, err error) {
	f, err := fsys.Open(path, false)
	if err != nil {
		return id, 0, err
	}
	defer f.Close()
	length, space, err := f.Stat()
	if err != nil {
		return id, 0, err
	}
	if length != size+guardSize {
		return id, 0, errReplaced
	}
	var end [8]byte
	if _, err := f.ReadAt(end[:], length-8); err != nil || binary.LittleEndian.Uint64(end[:]) != guardWord {
		return id, 0, errors.Join(errReplaced, err)
	}
	id, err = f.Identity()
	return id, space, err
}

// createData makes the data file at path, which does not exist, for size bytes of content.
func createData(fsys FS, path string, size int64) (d *dataFile, err error) {
	d = &dataFile{size: size}
	if d.f, err = fsys.Open(path, true); err != nil {
		return nil, err
	}
	d.f.InPlace()
	if err = d.makeAnew(); err == nil {
		d.id, err = d.f.Identity()
	}
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

// tempData makes a data file without a name, in the directory dir.
func tempData(fsys FS, dir string, size int64) (d *dataFile, err error) {
	d = &dataFile{size: size}
	if d.f, err = fsys.OpenTemp(dir); err != nil {
		return nil, err
	}
	if err := d.makeAnew(); err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

// openData opens the data file at path for size bytes of content. Where known is
// set it must be the file was, or errReplaced is returned; where not, a file that
// is missing or not whole is made anew. With direct set, which has memory for that, blocks
// do not go through the page cache.
func openData(fsys FS, path string, size int64, was FileID, known bool, direct *buffers) (d *dataFile, err error) {
	d = &dataFile{size: size}
	if d.f, err = fsys.Open(path, !known); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
			d = nil
		}
	}()
	length, _, err := d.f.Stat()
	if err != nil {
		return d, err
	}
	if d.id, err = d.f.Identity(); err != nil {
		return d, err
	}
	if direct != nil {
		d.buffers = direct
		if d.direct, err = fsys.OpenDirect(path); err != nil {
			return d, err
		}
		if id, err := d.direct.Identity(); err != nil || id != d.id {
			return d, errors.Join(errReplaced, err) // between the two opens
		}
	}
	whole := length == size+guardSize
	if known && (!was.sameFile(d.id) || !whole) {
		return d, errReplaced
	}
	if whole {
		if d.m, err = d.f.Map(length); err != nil {
			return d, err
		}
		if d.intact() {
			return d, nil
		}
		if known {
			return d, errReplaced
		}
	}
	return d, d.makeAnew()
}

// makeAnew empties the file and writes the guard. Nothing is known of what lay in
// it.
func (d *dataFile) makeAnew() (err error) {
	if d.m != nil {
		err = d.m.Unmap()
		d.m = nil
	}
	if err = errors.Join(err, d.f.Truncate(0)); err != nil {
		return err
	}
	if d.direct != nil {
		// Btrfs writes what it keeps checksums of through the page cache.
		d.f.InPlace()
	}
	if err = d.f.Truncate(d.size + guardSize); err != nil {
		return err
	}
	if _, err := d.f.WriteAt(guard(), d.size); err != nil {
		return err
	}
	d.m, err = d.f.Map(d.size + guardSize)
	return err
}

// intact says whether the file is still what it was. It costs a load.
func (d *dataFile) intact() (ok bool) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if recover() != nil {
			ok = false
		}
	}()
	return binary.LittleEndian.Uint64(d.m[len(d.m)-8:]) == guardWord
}

// bytes are n bytes at off, where they are mapped. Reading them may fault: see
// CopyMapped.
func (d *dataFile) bytes(off, n int64) []byte { return d.m[off : off+n : off+n] }

// inMemory reports whether n bytes at off are in the page cache.
func (d *dataFile) inMemory(off, n int64) bool {
	e := Range(off, n).Aligned()
	var pages [256]byte
	for e.Len() > 0 {
		m := min(e.Len(), int64(len(pages))*BlockSize)
		// It may have to wait for a lock of the address space: the scheduler must know.
		_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&d.m[e.Start])), uintptr(m), uintptr(unsafe.Pointer(&pages)))
		if errno != 0 {
			return true // as without a check
		}
		for _, p := range pages[:m/BlockSize] {
			if p&1 == 0 {
				return false
			}
		}
		e.Start += m
	}
	return true
}

// blocks is the file that blocks are read and written by.
func (d *dataFile) blocks() File {
	if d.direct != nil {
		return d.direct
	}
	return d.f
}

// descriptor is that of blocks, or -1 if only readAt may be used.
func (d *dataFile) descriptor() int { return d.blocks().Descriptor() }

// readAt fills p, which is aligned and of whole blocks. At the end of the file it reads
// less, without an error.
func (d *dataFile) readAt(p []byte, off int64) (n int, err error) {
	n, err = d.blocks().ReadAt(p, off)
	if err == io.EOF {
		err = nil
	}
	return n, err
}

// zero makes n bytes at off read as zeros and gives them space.
func (d *dataFile) zero(off, n int64) error {
	err := d.f.ZeroRange(off, n)
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	for n > 0 {
		m := min(n, int64(len(zeros)))
		if _, err := d.f.WriteAt(zeros[:m], off); err != nil {
			return err
		}
		off, n = off+m, n-m
	}
	return nil
}

// write writes whole blocks.
func (d *dataFile) write(p []byte, off int64) error {
	if d.direct == nil || uintptr(unsafe.Pointer(&p[0]))%directio.AlignSize == 0 {
		_, err := d.blocks().WriteAt(p, off)
		return err
	}
	b := d.buffers.get(min(int64(len(p)), pieceSize))
	defer b.put()
	for len(p) > 0 {
		n := copy(b.b, p)
		if _, err := d.direct.WriteAt(b.b[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// punch gives the space of n bytes at off back.
func (d *dataFile) punch(off, n int64) error { return d.f.PunchHole(off, n) }

// space is how many bytes the file takes on disk.
func (d *dataFile) space() (int64, error) {
	_, n, err := d.f.Stat()
	return n, err
}

// sync makes what was written durable.
func (d *dataFile) sync() error {
	err := d.f.Sync()
	if err == nil && d.direct != nil {
		// Btrfs writes through the page cache where it keeps checksums (Linux 6.15), and
		// drops the pages afterwards only if nothing else holds them at that moment.
		d.f.Forget()
	}
	return err
}

func (d *dataFile) close() (err error) {
	if d.m != nil {
		err = d.m.Unmap()
	}
	if d.direct != nil {
		err = errors.Join(err, d.direct.Close())
	}
	return errors.Join(err, d.f.Close())
}
