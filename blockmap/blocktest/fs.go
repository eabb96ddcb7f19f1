package blocktest

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// FS is a blockmap.FS over a real directory that can fail, be full and lose power. It
// remembers which contents of each file were synced. After PowerCut, each page that was
// written since its last sync is, at random, as it was synced, or as it was written last, or
// torn: some of its sectors are the ones and some the others. Names and lengths are durable
// at once, unless LoseNames was called. (A journalling file system with ordered metadata
// makes them durable a little later.)
type FS struct {
	mu     sync.Mutex
	files  map[string]*file // by path
	locks  []io.Closer
	fault  func(op, path string) error
	mounts uint64 // that there were

	disk *int64 // pages that are free, if they are counted

	// named are the files by durable names, if names can be lost.
	named map[string]*file
}

// file is what an FS remembers of a file. It keeps it under a new name.
type file struct {
	synced []byte
	// lost are the pages that a sync failed to write. Later syncs take them for
	// written, as the kernel does, until they are written to again.
	lost  map[int64]bool
	taken map[int64]bool // pages that take room since Shrink

	// copying is held to write a page, shared, and to look at the pages for a sync, alone.
	// Otherwise a sync could see a part of a write within a sector. (A kernel that writes
	// back a page while somebody copies to it can do so, too. No program above a page
	// cache can prevent that, and it concerns only sectors that were being written.)
	copying sync.RWMutex
}

func newFile() *file { return &file{lost: make(map[int64]bool), taken: make(map[int64]bool)} }

// NewFS makes an FS without faults.
func NewFS() *FS {
	return &FS{files: make(map[string]*file)}
}

// LoseNames has names, and the lengths of files, be lost like contents: a name that was
// made, changed or removed is durable once its directory was synced, and a length once the
// file was. It is called before the first file is opened.
func (f *FS) LoseNames() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.named = make(map[string]*file)
}

// Fail makes the FS call fault before each operation: "open", "read", "write", "sync",
// "punch", "zero", "truncate", "map", "rename", "remove", "lock". The operation fails with
// the error that fault returns.
func (f *FS) Fail(fault func(op, path string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault = fault
}

func (f *FS) check(op, path string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fault == nil {
		return nil
	}
	if err := f.fault(op, path); err != nil {
		return &os.PathError{Op: op, Path: path, Err: err}
	}
	return nil
}

// Shrink leaves room on the disk for that many more pages of 4 KiB. As on a real disk, a
// write that does not fit writes as much as fits, and takes that room.
func (f *FS) Shrink(pages int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.disk = &pages
	for _, x := range f.files {
		clear(x.taken)
	}
}

// take finds room for a page of a file.
func (h *handle) take(page int64) error {
	f := h.fs
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.disk == nil || h.file.taken[page] {
		return nil
	}
	if *f.disk == 0 {
		return &os.PathError{Op: "write", Path: h.path, Err: ErrDiskFull}
	}
	h.file.taken[page] = true
	*f.disk--
	return nil
}

func (h *handle) giveBack(first, behind int64) {
	f := h.fs
	f.mu.Lock()
	defer f.mu.Unlock()
	for page := first; page < behind; page++ {
		if h.file.taken[page] {
			delete(h.file.taken, page)
			*f.disk++
		}
	}
}

// PowerCut kills, and leaves the files as a power cut at this point might. Nothing may be
// using them.
func (f *FS) PowerCut(rng *rand.Rand) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	contents := make(map[*file][]byte)
	for _, path := range slices.Sorted(maps.Keys(f.files)) {
		x := f.files[path]
		now, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		contents[x] = f.afterCut(x, now, rng)
		if err := os.WriteFile(path, contents[x], 0o600); err != nil {
			return err
		}
		x.synced = contents[x]
		clear(x.lost)
	}
	return f.loseNames(contents, rng)
}

// afterCut is the content that a file has after a power cut.
func (f *FS) afterCut(x *file, now []byte, rng *rand.Rand) []byte {
	if f.named != nil && len(now) != len(x.synced) && rng.IntN(2) == 0 {
		now = append(now, make([]byte, max(0, len(x.synced)-len(now)))...)[:len(x.synced)]
	}
	old := append(slices.Clip(x.synced), make([]byte, max(0, len(now)-len(x.synced)))...)[:len(now)]
	for at := 0; at < len(now); at += pageSize {
		end := min(at+pageSize, len(now))
		switch {
		case x.lost[int64(at/pageSize)], rng.IntN(5) < 2:
			copy(now[at:end], old[at:end])
		case rng.IntN(3) == 0: // torn
			for sector := at; sector < end; sector += sectorSize {
				if rng.IntN(2) == 0 {
					copy(now[sector:min(sector+sectorSize, end)], old[sector:])
				}
			}
		}
	}
	return now
}

// sectorSize is what a disk writes as a whole.
const sectorSize = 512

// loseNames gives names that are not durable the files that they had before, at random. A
// file that was renamed keeps one of its names.
func (f *FS) loseNames(contents map[*file][]byte, rng *rand.Rand) error {
	if f.named == nil {
		return nil
	}
	keep := make(map[*file]bool) // the later name
	all := maps.Clone(f.files)
	maps.Copy(all, f.named)
	for _, path := range slices.Sorted(maps.Keys(all)) {
		old, now := f.named[path], f.files[path]
		x := now
		if x == nil {
			x = old
		}
		if _, drawn := keep[x]; !drawn {
			keep[x] = rng.IntN(2) == 0
		}
		if old == now || keep[x] {
			continue
		}
		if old == nil {
			delete(f.files, path)
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			continue
		}
		f.files[path] = old
		content, ok := contents[old]
		if !ok {
			content = old.synced
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return err
		}
	}
	f.named = maps.Clone(f.files)
	return nil
}

// Remount detaches the file system by force and mounts it again, without a reboot: what
// was not synced is lost as by PowerCut, and the superblock is another one.
func (f *FS) Remount(rng *rand.Rand) error {
	f.mu.Lock()
	f.mounts++
	f.mu.Unlock()
	return f.PowerCut(rng)
}

func (f *FS) Private(path string) error                  { return blockmap.OS.Private(path) }
func (f *FS) MkdirAll(path string) error                 { return blockmap.OS.MkdirAll(path) }
func (f *FS) ReadDir(path string) ([]fs.DirEntry, error) { return blockmap.OS.ReadDir(path) }

func (f *FS) SyncDir(path string) error {
	if err := f.check("sync", path); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.named == nil {
		return nil
	}
	for p := range f.named {
		if filepath.Dir(p) == path && f.files[p] == nil {
			delete(f.named, p)
		}
	}
	for p, x := range f.files {
		if filepath.Dir(p) == path {
			f.named[p] = x
		}
	}
	return nil
}

func (f *FS) Lock(path string) (io.Closer, error) {
	if err := f.check("lock", path); err != nil {
		return nil, err
	}
	l, err := blockmap.OS.Lock(path)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.locks = append(f.locks, l)
	return l, nil
}

// Kill releases all locks, as the kernel does for a process that was killed. Their
// holders must do nothing more.
func (f *FS) Kill() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.locks {
		l.Close()
	}
	f.locks = nil
}

func (f *FS) Open(path string, create bool) (blockmap.File, error) {
	if err := f.check("open", path); err != nil {
		return nil, err
	}
	file, err := blockmap.OS.Open(path, create)
	return f.handle(path, file, err)
}

func (f *FS) OpenDirect(path string) (blockmap.File, error) {
	if err := f.check("open", path); err != nil {
		return nil, err
	}
	file, err := blockmap.OS.OpenDirect(path)
	return f.handle(path, file, err)
}

func (f *FS) OpenTemp(dir string) (blockmap.File, error) {
	if err := f.check("open", dir); err != nil {
		return nil, err
	}
	file, err := blockmap.OS.OpenTemp(dir)
	return f.handle(filepath.Join(dir, "unnamed"), file, err)
}

func (f *FS) handle(path string, opened blockmap.File, err error) (blockmap.File, error) {
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	x := f.files[path]
	if x == nil {
		x = newFile()
		f.files[path] = x
	}
	return &handle{opened, f, x, path}, nil
}

func (f *FS) Rename(from, to string) error {
	if err := f.check("rename", to); err != nil {
		return err
	}
	if err := blockmap.OS.Rename(from, to); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.files, to)
	if x := f.files[from]; x != nil {
		f.files[to] = x
		delete(f.files, from)
	}
	return nil
}

func (f *FS) RemoveAll(path string) error {
	if err := f.check("remove", path); err != nil {
		return err
	}
	if err := blockmap.OS.RemoveAll(path); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for p := range f.files {
		if p == path || strings.HasPrefix(p, path+string(filepath.Separator)) {
			delete(f.files, p)
		}
	}
	return nil
}

// handle is an open file of an FS.
type handle struct {
	blockmap.File
	fs   *FS
	file *file
	path string
}

// Descriptor has every read come by ReadAt, where it can fail.
func (h *handle) Descriptor() int { return -1 }

func (h *handle) ReadAt(p []byte, off int64) (int, error) {
	if err := h.fs.check("read", h.path); err != nil {
		return 0, err
	}
	return h.File.ReadAt(p, off)
}

func (h *handle) WriteAt(p []byte, off int64) (int, error) {
	if err := h.fs.check("write", h.path); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) { // a page at a time, since others may write meanwhile
		at := off + int64(done)
		n := min(len(p)-done, int(pageSize-at%pageSize))
		if err := h.take(at / pageSize); err != nil {
			return done, err
		}
		h.file.copying.RLock()
		n, err := h.File.WriteAt(p[done:done+n], at)
		h.file.copying.RUnlock()
		done += n
		h.fs.mu.Lock()
		delete(h.file.lost, at/pageSize)
		h.fs.mu.Unlock()
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

func (h *handle) Truncate(size int64) error {
	if err := h.fs.check("truncate", h.path); err != nil {
		return err
	}
	return h.File.Truncate(size)
}

func (h *handle) PunchHole(off, n int64) error {
	if err := h.fs.check("punch", h.path); err != nil {
		return err
	}
	if err := h.File.PunchHole(off, n); err != nil {
		return err
	}
	h.giveBack(off/pageSize, (off+n)/pageSize)
	return nil
}

func (h *handle) ZeroRange(off, n int64) error {
	if err := h.fs.check("zero", h.path); err != nil {
		return err
	}
	for page := off / pageSize; page < (off+n+pageSize-1)/pageSize; page++ {
		if err := h.take(page); err != nil {
			return err
		}
	}
	return h.File.ZeroRange(off, n)
}

// Forget shows again what is on the disk: pages that a sync failed to write are what they
// were before.
func (h *handle) Forget() {
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	for page := range h.file.lost {
		if off := page * pageSize; off < int64(len(h.file.synced)) {
			_, _ = h.File.WriteAt(h.file.synced[off:min(off+pageSize, int64(len(h.file.synced)))], off)
		}
	}
}

func (h *handle) Map(n int64) (mmap.MMap, error) {
	if err := h.fs.check("map", h.path); err != nil {
		return nil, err
	}
	return h.File.Map(n)
}

func (h *handle) Identity() (blockmap.FileID, error) {
	id, err := h.File.Identity()
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	id.Superblock += h.fs.mounts
	return id, err
}

func (h *handle) Sync() error {
	failed := h.fs.check("sync", h.path)
	// A sync covers at least the contents at the time of the call.
	size, _, err := h.File.Stat()
	if err != nil {
		return err
	}
	b := make([]byte, size)
	h.file.copying.Lock()
	_, err = h.File.ReadAt(b, 0)
	h.file.copying.Unlock()
	if err != nil && err != io.EOF {
		return err
	}
	h.fs.mu.Lock()
	defer h.fs.mu.Unlock()
	old := h.file.synced
	old = append(old, make([]byte, max(0, len(b)-len(old)))...)[:len(b)]
	lost := h.file.lost
	for at := 0; at < len(b); at += pageSize {
		page, end := int64(at/pageSize), min(at+pageSize, len(b))
		if failed != nil && !bytes.Equal(b[at:end], old[at:end]) {
			lost[page] = true
		}
		if lost[page] {
			copy(b[at:end], old[at:end])
		}
	}
	h.file.synced = b
	return failed
}

const pageSize = 4096

// ErrDiskFull is the error of a full disk.
var ErrDiskFull error = unix.ENOSPC
