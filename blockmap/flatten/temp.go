package flatten

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// TempDir is a temporary directory that does not outlive its process for long. The
// process keeps a lock (flock) on it, which ends with the process: a directory
// without a lock is what a killed process left behind. The next process that makes a
// directory with the same prefix removes it.
type TempDir struct {
	path string
	lock *os.File // the directory
}

// tempDir holds the streams of one build until they are pushed.
type tempDir struct {
	*TempDir

	mu    sync.Mutex
	kept  map[blockmap.Digest]*tempFile // streams that were pushed, by blob; see keep
	parts map[*part]bool                // layers that are being read and kept
}

const tempPrefix = "thaw-streams-"

// maxKept bounds the bytes of pushed streams that a build keeps on disk. The
// largest go first: of those, a guess reads the smallest part.
const maxKept = 2 << 30

func newTempDir(parent string) (*tempDir, error) {
	dir, err := makeTempDir(parent, tempPrefix)
	if err != nil {
		return nil, err
	}
	t := &tempDir{TempDir: dir, kept: make(map[blockmap.Digest]*tempFile), parts: make(map[*part]bool)}
	removeLeftovers(cmp.Or(parent, os.TempDir()), tempPrefix, t.salvage)
	return t, nil
}

// NewTempDir makes a directory below parent, "" for the system's directory. Its name
// begins with prefix, which no other kind of file or directory has.
func NewTempDir(parent, prefix string) (*TempDir, error) {
	removeLeftovers(cmp.Or(parent, os.TempDir()), prefix, nil)
	return makeTempDir(parent, prefix)
}

func makeTempDir(parent, prefix string) (*TempDir, error) {
	parent = cmp.Or(parent, os.TempDir())
	for {
		path, err := os.MkdirTemp(parent, prefix)
		if err != nil {
			return nil, fmt.Errorf("make a temporary directory: %w", err)
		}
		lock, err := os.Open(path)
		if err == nil {
			err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		}
		// Between the two calls another process may have taken the directory for a
		// leftover.
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, os.ErrNotExist) || err == nil && !sameFile(lock, path) {
			lock.Close()
			continue
		}
		if lock == nil {
			os.Remove(path)
			return nil, fmt.Errorf("open the temporary directory: %w", err)
		}
		// A file system without locks has no leftovers either: nobody can lock
		// them, so nobody removes them.
		return &TempDir{path, lock}, nil
	}
}

// Path is where the directory is.
func (t *TempDir) Path() string { return t.path }

// Remove removes the directory with all that is in it.
func (t *TempDir) Remove() error { return errors.Join(os.RemoveAll(t.path), t.lock.Close()) }

func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(path)
	return err == nil && os.SameFile(a, b)
}

// removeLeftovers removes the directories of killed processes of this user. salvage, if
// not nil, takes out of each what is of use. Failures to do so are no fault of the
// process that begins.
func removeLeftovers(parent, prefix string, salvage func(dir string)) {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return
	}
	for _, e := range entries {
		if e.IsDir() && strings.HasPrefix(e.Name(), prefix) {
			removeLeftover(filepath.Join(parent, e.Name()), salvage)
		}
	}
}

func removeLeftover(path string, salvage func(dir string)) {
	// Others may write to the parent: only a directory of this user is opened.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	dir := os.NewFile(uintptr(fd), path)
	defer dir.Close()
	var s unix.Stat_t
	if unix.Fstat(fd, &s) != nil || int(s.Uid) != os.Geteuid() || unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) != nil {
		return
	}
	if sameFile(dir, path) {
		if salvage != nil {
			salvage(path)
		}
		os.RemoveAll(path)
	}
}

// remove removes the directory, except for what helps a later build.
func (t *tempDir) remove() error {
	t.release()
	names, _ := useful(t.path)
	if len(names) == 0 {
		return t.Remove()
	}
	entries, err := os.ReadDir(t.path)
	for _, e := range entries {
		if !slices.Contains(names, e.Name()) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(t.path, e.Name())))
		}
	}
	return errors.Join(err, t.lock.Close())
}

func (t *tempDir) create() (*tempFile, error) {
	f, err := os.CreateTemp(t.path, "stream-")
	if err != nil {
		return nil, fmt.Errorf("make a temporary file for a stream: %w", err)
	}
	return &tempFile{File: f, dir: t}, nil
}

// keep takes over the file of a stream that was pushed, so that the guess can read
// the stream from disk. The file has no name any more.
func (t *tempDir) keep(blob blockmap.Digest, f *tempFile) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.kept[blob] != nil {
		f.discard()
		return
	}
	os.Remove(f.Name()) // the target may have moved it away
	t.kept[blob] = f
	for {
		var total int64
		largest := blob
		for b, f := range t.kept {
			total += f.size
			if f.size > t.kept[largest].size {
				largest = b
			}
		}
		if total <= maxKept {
			return
		}
		t.kept[largest].Close()
		delete(t.kept, largest)
		if largest == blob {
			return // all was within the bound without it
		}
	}
}

// read returns n bytes of a kept stream from off, or nil if it is not kept.
func (t *tempDir) read(blob blockmap.Digest, off, n int64) []byte {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	f := t.kept[blob]
	t.mu.Unlock()
	if f == nil || off < 0 || n < 0 || n > f.size-off {
		return nil
	}
	b := make([]byte, n)
	if _, err := f.ReadAt(b, off); err != nil {
		t.drop(blob)
		return nil
	}
	return b
}

// drop gives up one kept stream.
func (t *tempDir) drop(blob blockmap.Digest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f := t.kept[blob]; f != nil {
		f.Close()
		delete(t.kept, blob)
	}
}

// makeRoom gives up what saves work at most, and reports whether there was anything.
func (t *tempDir) makeRoom() bool {
	t.mu.Lock()
	parts := slices.Collect(maps.Keys(t.parts))
	clear(t.parts)
	t.mu.Unlock()
	for _, p := range parts {
		p.drop()
	}
	// Those of layers that were read to their ends are closed.
	closed, _ := filepath.Glob(filepath.Join(t.path, partPrefix+"*"))
	for _, path := range closed {
		os.Remove(path)
	}
	return t.release() || len(parts)+len(closed) > 0
}

// release gives up all kept streams, and reports whether there were any.
func (t *tempDir) release() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	any := len(t.kept) > 0
	for _, f := range t.kept {
		f.Close()
	}
	clear(t.kept)
	return any
}

// tempFile is the file of a stream.
type tempFile struct {
	*os.File
	dir  *tempDir
	size int64
	path string // "": File.Name
}

// Name is where the file is.
func (f *tempFile) Name() string { return cmp.Or(f.path, f.File.Name()) }

// Write makes room for p, where the disk is full, by giving up kept streams.
func (f *tempFile) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	if errors.Is(err, unix.ENOSPC) && f.dir.makeRoom() {
		var m int
		m, err = f.File.Write(p[n:])
		n += m
	}
	f.size += int64(n)
	return n, err
}

// ReadFrom is for io.Copy, which would otherwise use that of the File.
func (f *tempFile) ReadFrom(r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{f}, r)
}

func (f *tempFile) discard() {
	if f == nil {
		return // a test's stream, which is not in a file
	}
	f.Close()
	os.Remove(f.Name())
}
