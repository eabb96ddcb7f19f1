package blockmap

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"
)

// FS is what a Cache needs of a file system: the seam at which tests inject a
// full disk, an I/O error or a power cut. OS is the real one.
type FS interface {
	MkdirAll(path string) error
	// Open opens a file for reading and writing. One that is not there is
	// created or, if create is false, fs.ErrNotExist.
	Open(path string, create bool) (File, error)
	Rename(from, to string) error
	RemoveAll(path string) error
	ReadDir(path string) ([]fs.DirEntry, error)
	// SyncDir makes the entries of a directory durable.
	SyncDir(path string) error
	// Lock takes path as the lock of this process, or fails at once with
	// ErrLocked. Closing it, or the end of the process, lets go.
	Lock(path string) (io.Closer, error)
}

// File is an open file of an FS.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Stat is the length of the file, and the space that it takes on disk.
	Stat() (size, allocated int64, err error)
	Truncate(size int64) error
	// Sync makes the content and the length durable.
	Sync() error
	// PunchHole gives the space of a range back; it reads as zeros then.
	PunchHole(off, n int64) error
	// Map maps the first n bytes, shared with the file.
	Map(n int64, writable bool) (mmap.MMap, error)
}

// ErrLocked is what the second process on one cache directory gets.
var ErrLocked = errors.New("in use by another process")

// OS is the file system of the machine.
var OS FS = osFS{}

type osFS struct{}

type osFile struct{ *os.File }

func (osFS) MkdirAll(path string) error                 { return os.MkdirAll(path, 0o700) }
func (osFS) Rename(from, to string) error               { return os.Rename(from, to) }
func (osFS) RemoveAll(path string) error                { return os.RemoveAll(path) }
func (osFS) ReadDir(path string) ([]fs.DirEntry, error) { return os.ReadDir(path) }

func (osFS) Open(path string, create bool) (File, error) {
	flag := os.O_RDWR
	if create {
		flag |= os.O_CREATE
	}
	f, err := os.OpenFile(path, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFS) SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (osFS) Lock(path string) (io.Closer, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrLocked
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

func (f osFile) Stat() (size, allocated int64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, 0, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return st.Size, st.Blocks * 512, nil
}

func (f osFile) Sync() error {
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return &os.PathError{Op: "fdatasync", Path: f.Name(), Err: err}
	}
	return nil
}

func (f osFile) PunchHole(off, n int64) error {
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if err != nil {
		return &os.PathError{Op: "punch hole", Path: f.Name(), Err: err}
	}
	return nil
}

func (f osFile) Map(n int64, writable bool) (mmap.MMap, error) {
	prot := mmap.RDONLY
	if writable {
		prot = mmap.RDWR
	}
	m, err := mmap.MapRegion(f.File, int(n), prot, 0, 0)
	if err != nil {
		return nil, &os.PathError{Op: "map", Path: f.Name(), Err: err}
	}
	return m, nil
}

// writeFile puts b at path, in place of what was there. A killed process leaves
// the one or the other whole; a power cut may leave anything until the file has
// been synced, so whoever reads it checks what it reads.
func writeFile(fsys FS, path string, b []byte) error {
	tmp := path + ".new"
	if err := fsys.RemoveAll(tmp); err != nil {
		return err
	}
	f, err := fsys.Open(tmp, true)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return fsys.Rename(tmp, path)
}

// syncFile makes a file and its name durable. One that has been removed
// meanwhile needs no more.
func syncFile(fsys FS, path string) error {
	f, err := fsys.Open(path, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(path))
}

// readFile reads a file of at most limit bytes. A file that is not there is
// fs.ErrNotExist.
func readFile(fsys FS, path string, limit int64) ([]byte, error) {
	f, err := fsys.Open(path, false)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, _, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are expected", path, size, limit)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
		return nil, err
	}
	return b, nil
}
