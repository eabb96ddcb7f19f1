package blockmap

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/edsrzf/mmap-go"
	"github.com/ncw/directio"
	"golang.org/x/sys/unix"
)

// FS is what a Cache or an Overlay needs of a file system: the seam at which tests inject a
// full disk, an I/O error or a power cut. OS is the real one.
type FS interface {
	MkdirAll(path string) error
	// Open opens a file for reading and writing. If it does not exist it is
	// created, or Open fails with fs.ErrNotExist where create is false.
	Open(path string, create bool) (File, error)
	// OpenDirect opens an existing file for reading and writing without the page
	// cache, of whole blocks and aligned memory only. It fails with unix.EINVAL
	// where the file system cannot do so.
	OpenDirect(path string) (File, error)
	// OpenTemp makes a file without a name in the directory dir. It goes with its
	// last descriptor.
	OpenTemp(dir string) (File, error)
	Rename(from, to string) error
	RemoveAll(path string) error
	ReadDir(path string) ([]fs.DirEntry, error)
	// SyncDir makes the entries of a directory durable.
	SyncDir(path string) error
	// Lock takes the lock at path for this process, or fails at once with
	// ErrLocked. Closing it, or the end of the process, releases it.
	Lock(path string) (io.Closer, error)
	// Private fails unless the directory at path belongs to this user alone: no
	// other user can write to it, or put another directory in its place.
	Private(path string) error
}

// File is an open file of an FS.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Stat returns the length of the file and the space that it takes on disk, in
	// bytes.
	Stat() (size, allocated int64, err error)
	Truncate(size int64) error
	// Sync makes the content and the length durable.
	Sync() error
	// PunchHole gives the space of a range back to the disk. The range reads as
	// zeros afterwards.
	PunchHole(off, n int64) error
	// ZeroRange makes a range read as zeros and gives it space, so that a write
	// there needs no more. The file becomes longer if the range ends behind it. It
	// fails with unix.EOPNOTSUPP where the file system cannot do so.
	//
	// On ext4 of Linux 6.12, and perhaps others, a later write to a part of such a
	// block that the disk refuses can bring back what the block had before.
	ZeroRange(off, n int64) error
	// Map maps the first n bytes for reading, shared with the file. A page that is
	// not in memory is read alone when it is touched: see dataFile.
	Map(n int64) (mmap.MMap, error)
	// Descriptor is the file's descriptor, for reads at Close's latest, or -1 where
	// reads must be by ReadAt.
	Descriptor() int
	// Identity distinguishes the file from a copy of it, and the superblock of its
	// file system from the next one, when it has been unmounted and mounted again.
	Identity() (FileID, error)
	// InPlace asks the file system to overwrite the blocks of a file in place, so
	// that an overwrite needs no space. The file is still empty. File systems that
	// cannot do so ignore it.
	InPlace()
	// Forget drops what memory has of the file and the disk has too, so that later
	// reads show what the disk has.
	Forget()
}

// FileID identifies a file. A field that is zero is not known.
type FileID struct {
	Inode      uint64
	Born       int64  // when the inode was made, in ns since 1970
	Device     uint64 // of the file system; may change from boot to boot
	Superblock uint64 // ID of its superblock, which is not used again before a reboot
}

// sameFile says whether a and b are the same file, and not a file and its copy.
func (a FileID) sameFile(b FileID) bool {
	return a.Inode == b.Inode && a.Born == b.Born && (a.Born != 0 || a.Device == b.Device)
}

// ErrLocked means that another process has the cache directory.
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

func (osFS) OpenDirect(path string) (File, error) {
	f, err := directio.OpenFile(path, os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFS) OpenTemp(dir string) (File, error) {
	f, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
	if err == nil {
		return osFile{f}, nil
	}
	// Some file systems have no such files, and some kernels take the flag for that of a
	// directory.
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) {
		return nil, err
	}
	if f, err = os.CreateTemp(dir, "thaw-*"); err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
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
	// A link could have a file made anywhere, by somebody who only lists a directory.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
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
	return &fileLock{f}, nil
}

// fileLock is a locked file.
type fileLock struct{ f *os.File }

// Close unlocks the file, and closes it. To close it is not enough: a child of this process
// has a copy of the descriptor from fork to exec, and with it the lock.
func (l *fileLock) Close() error {
	return errors.Join(unix.Flock(int(l.f.Fd()), unix.LOCK_UN), l.f.Close())
}

// control calls do with the descriptor of the file, which stays open and the file's
// own until do returns: another goroutine may close the file meanwhile.
func (f osFile) control(op string, do func(fd int) error) error {
	err := fs.ErrClosed // the only reason for which do is not called
	if raw, e := f.SyscallConn(); e == nil {
		_ = raw.Control(func(fd uintptr) { err = do(int(fd)) })
	}
	if err != nil {
		return &os.PathError{Op: op, Path: f.Name(), Err: err}
	}
	return nil
}

func (f osFile) Stat() (size, allocated int64, err error) {
	var st unix.Stat_t
	err = f.control("stat", func(fd int) error { return unix.Fstat(fd, &st) })
	if err != nil {
		return 0, 0, err
	}
	return st.Size, st.Blocks * 512, nil
}

func (f osFile) Sync() error { return f.control("fdatasync", unix.Fdatasync) }

func (f osFile) PunchHole(off, n int64) error {
	return f.control("punch hole", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
}

func (f osFile) ZeroRange(off, n int64) error {
	return f.control("zero range", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE, off, n)
	})
}

func (f osFile) Map(n int64) (mmap.MMap, error) {
	m, err := mmap.MapRegion(f.File, int(n), mmap.RDONLY, 0, 0)
	if err != nil {
		return nil, &os.PathError{Op: "map", Path: f.Name(), Err: err}
	}
	// A kernel that does not take the advice reads ahead, and nothing breaks.
	_ = unix.Madvise(m, unix.MADV_RANDOM)
	return m, nil
}

func (f osFile) Descriptor() int { return int(f.Fd()) }

func (f osFile) Identity() (id FileID, err error) {
	var st unix.Statx_t
	const want = unix.STATX_INO | unix.STATX_BTIME | unix.STATX_MNT_ID_UNIQUE
	err = f.control("statx", func(fd int) error {
		err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, want, &st)
		if err == nil {
			id.Superblock = superblockID(fd, &st)
		}
		return err
	})
	if err != nil {
		return id, err
	}
	id.Inode, id.Device = st.Ino, unix.Mkdev(st.Dev_major, st.Dev_minor)
	if st.Mask&unix.STATX_BTIME != 0 {
		id.Born = st.Btime.Sec*1e9 + int64(st.Btime.Nsec)
	}
	return id, nil
}

func (f osFile) InPlace() {
	// Where this fails, a full disk costs more time, and nothing breaks.
	_ = f.control("set flags", func(fd int) error {
		var st unix.Statfs_t
		flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
		if err = errors.Join(err, unix.Fstatfs(fd, &st)); err != nil || st.Type != unix.BTRFS_SUPER_MAGIC {
			return err
		}
		return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags|fsNoCOW)
	})
}

func (f osFile) Forget() {
	_ = f.control("fadvise", func(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) })
}

// fsNoCOW is FS_NOCOW_FL of linux/fs.h.
const fsNoCOW = 0x00800000

func (osFS) Private(path string) error {
	real, err := filepath.EvalSymlinks(path)
	if err == nil {
		real, err = filepath.Abs(real)
	}
	if err != nil {
		return err
	}
	uid := uint32(os.Geteuid())
	for dir := real; ; dir = filepath.Dir(dir) {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return &os.PathError{Op: "stat", Path: dir, Err: err}
		}
		const group, others, sticky = 0o020, 0o002, 0o1000
		switch {
		case dir == real && st.Uid != uid:
			return fmt.Errorf("%s belongs to user %d, and thaw runs as user %d: use a directory of user %d", dir, st.Uid, uid, uid)
		case dir == real && st.Mode&(group|others) != 0:
			return fmt.Errorf("other users can write to %s: remove what they put there and run chmod go-w %s, or use another directory", dir, dir)
		case dir != real && st.Uid != uid && st.Uid != 0:
			return fmt.Errorf("user %d can replace %s, because %s belongs to that user: use another directory", st.Uid, real, dir)
		case dir != real && st.Mode&others != 0 && st.Mode&sticky == 0:
			return fmt.Errorf("other users can replace %s, because they can write to %s: use another directory", real, dir)
		}
		if dir == filepath.Dir(dir) {
			return nil
		}
	}
}

// newSuffix ends the name of a file that is not whole yet.
const newSuffix = ".new"

// writeFile replaces the file at path by one with the content b. A process that is
// killed leaves the old file or the new one, whole. A power cut may leave anything
// until the file has been synced, so every reader checks what it reads.
func writeFile(fsys FS, path string, b []byte) error {
	tmp := path + newSuffix
	if err := fsys.RemoveAll(tmp); err != nil {
		return err
	}
	f, err := fsys.Open(tmp, true)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	if err = errors.Join(err, f.Close()); err == nil {
		err = fsys.Rename(tmp, path)
	}
	if err != nil {
		// It may take the last space of the disk.
		err = errors.Join(err, fsys.RemoveAll(tmp))
	}
	return err
}

// syncFile makes a file and its name durable, unless it has been removed.
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

// readFile reads a file of at most limit bytes. It fails with fs.ErrNotExist where
// there is none.
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
		return nil, fmt.Errorf("%s has %d bytes; at most %d are allowed", path, size, limit)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
		return nil, err
	}
	return b, nil
}
