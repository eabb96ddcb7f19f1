package blockmap_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// dataFiles lists the data files of a cache.
func dataFiles(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "streams/*/data"))
	if err != nil || len(files) == 0 {
		t.Fatalf("the cache has no data (%v)", err)
	}
	return files
}

// If a data file is truncated under readers, its chunks are fetched again.
func TestTruncatedUnderReaders(t *testing.T) {
	m := blocktest.NewImage(t, 60, 1500)
	for _, left := range []int64{0, 4096, 100_000, -4096, -1} {
		t.Run(fmt.Sprint(left), func(t *testing.T) {
			dir := t.TempDir()
			c, image, _ := openImage(t, dir, m, blockmap.CacheOptions{})
			defer c.Close()
			readAll(t, image, m)
			used := c.Used()
			v, ok := image.View(blockmap.Range(image.Size()/2, 1<<20))
			if !ok {
				t.Fatal("the image was read but is not resident")
			}
			for _, path := range dataFiles(t, dir) {
				fi, err := os.Stat(path)
				must(t, err)
				must(t, os.Truncate(path, (left+fi.Size())%fi.Size()))
			}
			if left == 0 {
				if err := v.CopyTo(make([]byte, v.Len())); !errors.Is(err, blockmap.ErrDamaged) {
					t.Errorf("a view of a truncated file: %v", err)
				}
			}
			v.Release()
			readAll(t, image, m)
			if c.Damaged() == 0 {
				t.Error("no chunk was counted as damaged")
			}
			readAll(t, image, m)
			if c.Used() != used {
				t.Errorf("%d bytes are counted; before, %d were", c.Used(), used)
			}
		})
	}
}

// While another program truncates data files all the time, and the cache closes them, every
// read gets the right bytes.
func TestTruncatedAllTheTime(t *testing.T) {
	m := blocktest.NewImage(t, 61, 1500)
	dir := t.TempDir()
	c, image, _ := openImage(t, dir, m, blockmap.CacheOptions{Quota: int64(len(m.Content)) * 3 / 4})
	defer c.Close()
	readAll(t, image, m)
	image.Close()
	fetch := newDirect(t, blocktest.NewOrigin(m))
	fetch.hold = true
	image, err := blockmap.NewImage(m.Index, c, fetch)
	must(t, err)
	files := dataFiles(t, dir)
	var readers, cutter sync.WaitGroup
	stop := make(chan struct{})
	cutter.Go(func() {
		rng := rand.New(rand.NewPCG(1, 61))
		for {
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
			}
			path := files[rng.IntN(len(files))]
			if fi, err := os.Stat(path); err == nil && fi.Size() > 0 {
				// The cache removes a truncated file.
				if err := os.Truncate(path, rng.Int64N(fi.Size())); err != nil && !errors.Is(err, fs.ErrNotExist) {
					t.Error(err)
				}
			}
		}
	})
	cutter.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				c.CloseIdle()
			}
		}
	})
	for i := range 4 {
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 62))
			for range 300 {
				e := blockmap.Range(rng.Int64N(image.Size()/4096-20)*4096, 4096*(1+rng.Int64N(20)))
				got := make([]byte, e.Len())
				if err := blockmap.ReadInto(t.Context(), image, e, got); err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
					t.Errorf("read %v: wrong bytes, or %v", e, err)
					return
				}
			}
		})
	}
	readers.Wait()
	close(stop)
	cutter.Wait()
}

// unmappedFS maps data files such that only their last page can be read there.
type unmappedFS struct{ blockmap.FS }

type unmappedFile struct{ blockmap.File }

func (f unmappedFS) Open(path string, create bool) (blockmap.File, error) {
	file, err := f.FS.Open(path, create)
	if err == nil && filepath.Base(path) == "data" {
		file = unmappedFile{file}
	}
	return file, err
}

func (f unmappedFile) Map(n int64) (mmap.MMap, error) {
	m, err := f.File.Map(n)
	if err == nil {
		err = unix.Mprotect(m[:n-4096], unix.PROT_NONE)
	}
	return m, err
}

// Bytes that cannot be read where they are mapped are read by descriptor. Without that, a
// reader fetched them again until its time was over: on a disk with bad sectors, the kernel
// maps no page of a large folio of which it could not read a part.
func TestUnreadableMapping(t *testing.T) {
	m := blocktest.NewImage(t, 63, 300)
	c, image, _ := openImage(t, t.TempDir(), m, blockmap.CacheOptions{FS: unmappedFS{blockmap.OS}})
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	for at := int64(0); at < image.Size(); at += 16 << 10 {
		c.TrustMemory()
		e := blockmap.Range(at, min(16<<10, image.Size()-at))
		got := make([]byte, e.Len())
		if err := blockmap.ReadInto(ctx, image, e, got); err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
			t.Fatalf("read %v: wrong bytes, or %v", e, err)
		}
	}
	if c.Damaged() == 0 {
		t.Error("no chunk was damaged: this tests nothing")
	}
}

// unreadableFS takes all writes of data files, and reads nothing back but their guards.
type unreadableFS struct{ unmappedFS }

type unreadableFile struct{ blockmap.File }

func (f unreadableFS) Open(path string, create bool) (blockmap.File, error) {
	file, err := f.unmappedFS.Open(path, create)
	if err == nil && filepath.Base(path) == "data" {
		file = unreadableFile{file}
	}
	return file, err
}

func (f unreadableFile) Descriptor() int { return -1 }

func (f unreadableFile) ReadAt(p []byte, off int64) (int, error) {
	if len(p) > 8 {
		return 0, syscall.EIO
	}
	return f.File.ReadAt(p, off)
}

// A disk that takes writes and reads nothing back costs no reader more than a few fetches:
// the chunks are held in memory. Without that, a reader fetched them again until its time
// was over.
func TestUnreadableDisk(t *testing.T) {
	m := blocktest.NewImage(t, 63, 300)
	c, err := blockmap.OpenCache(t.TempDir(), quiet(blockmap.CacheOptions{FS: unreadableFS{unmappedFS{blockmap.OS}}}))
	must(t, err)
	defer c.Close()
	origin := blocktest.NewOrigin(m)
	fetch := newDirect(t, origin)
	fetch.hold = true
	image, err := blockmap.NewImage(m.Index, c, fetch)
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	for range 2 {
		for at := int64(0); at < image.Size(); at += 16 << 10 {
			e := blockmap.Range(at, min(16<<10, image.Size()-at))
			got := make([]byte, e.Len())
			if err := blockmap.ReadInto(ctx, image, e, got); err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
				t.Fatalf("read %v: wrong bytes, or %v", e, err)
			}
		}
	}
	if c.Damaged() == 0 || c.Held() == 0 {
		t.Errorf("%d chunks were damaged, and %d bytes are held: this tests nothing", c.Damaged(), c.Held())
	}
	for _, n := range fetch.filled {
		if n > 6 { // lost twice by descriptor, and before that where it is mapped
			t.Errorf("a chunk was fetched %d times", n)
		}
	}
}

// countedFS counts the files that are open, and punches no holes.
type countedFS struct {
	blockmap.FS
	open *atomic.Int64
}

type countedFile struct {
	blockmap.File
	open *atomic.Int64
}

func (f countedFS) Open(path string, create bool) (blockmap.File, error) {
	file, err := f.FS.Open(path, create)
	if err != nil {
		return nil, err
	}
	f.open.Add(1)
	return countedFile{file, f.open}, nil
}

func (f countedFile) Close() error {
	f.open.Add(-1)
	return f.File.Close()
}

func (countedFile) PunchHole(_, _ int64) error { return syscall.ENOSPC }

// A stream that cannot be taken over, because the disk has no room to give back what is not
// resident, leaves no file open.
func TestDroppedStreamIsClosed(t *testing.T) {
	m := blocktest.NewImage(t, 63, 4000)
	dir, o := t.TempDir(), blockmap.CacheOptions{Boot: blockmap.BootID{1}}
	c, image, _ := openImage(t, dir, m, o)
	_, err := blocktest.Read(t.Context(), image, blockmap.Range(0, image.Size()/4&^4095))
	must(t, err)
	must(t, c.Close())
	for _, path := range dataFiles(t, dir) {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		must(t, err)
		fi, err := f.Stat()
		must(t, err)
		// As after a process that was killed between writing and marking.
		end := fi.Size() &^ 4095
		for off := max(0, end-6<<20); off < end-4096; off += 4096 {
			b := make([]byte, 4096)
			if _, err := f.ReadAt(b, off); err == nil && bytes.Equal(b, make([]byte, 4096)) {
				b[0] = 1
				_, err = f.WriteAt(b, off)
				must(t, err)
			}
		}
		must(t, errors.Join(f.Sync(), f.Close()))
	}
	var open atomic.Int64
	o.FS = countedFS{blockmap.OS, &open}
	c, err = blockmap.OpenCache(dir, quiet(o))
	must(t, err)
	if c.Dropped() == 0 {
		t.Error("no stream was dropped: this tests nothing")
	}
	if n := open.Load(); n != 0 {
		t.Errorf("%d files are open", n)
	}
	must(t, c.Close())
}

// After an fdatasync that failed, the next one succeeds without writing the same
// pages: the blocks that the first should have made durable are absent.
func TestFailedSync(t *testing.T) {
	m := blocktest.NewImage(t, 62, 1000)
	dir, fsys := t.TempDir(), blocktest.NewFS()
	c, image, origin := openImage(t, dir, m, blockmap.CacheOptions{FS: fsys, Boot: blockmap.BootID{1}})
	half := blockmap.Range(0, image.Size()/2&^4095)
	_, err := blocktest.Read(t.Context(), image, half)
	must(t, err)
	must(t, c.Sync())
	readAll(t, image, m)
	before := origin.Requests()
	fsys.Fail(func(op, path string) error {
		if op == "sync" && filepath.Base(path) == "data" {
			return syscall.EIO
		}
		return nil
	})
	if err := c.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("a sync that failed: %v", err)
	}
	fsys.Fail(nil)
	_, err = blocktest.Read(t.Context(), image, half)
	must(t, err)
	if origin.Requests() != before {
		t.Error("blocks that were durable before were fetched again")
	}
	must(t, c.Sync())
	fsys.Kill()
	must(t, fsys.PowerCut(rand.New(rand.NewPCG(1, 2))))
	c, image, _ = openImage(t, dir, m, blockmap.CacheOptions{FS: fsys, Boot: blockmap.BootID{2}})
	defer c.Close()
	readAll(t, image, m)
	if origin.Requests() != before {
		t.Fatal("this tests nothing: the first origin was asked again")
	}
}

// The same if the sync of the map fails before an eviction.
func TestFailedMapSync(t *testing.T) {
	m := blocktest.NewImage(t, 63, 1200)
	for seed := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, 63))
		dir, fsys := t.TempDir(), blocktest.NewFS()
		o := blockmap.CacheOptions{FS: fsys, Boot: blockmap.BootID{1}, Quota: int64(len(m.Content)) / 2}
		c, image, _ := openImage(t, dir, m, o)
		image.Close()
		fetch := newDirect(t, blocktest.NewOrigin(m))
		fetch.hold = true
		image, err := blockmap.NewImage(m.Index, c, fetch)
		must(t, err)
		fsys.Fail(func(op, path string) error {
			if op == "sync" && filepath.Base(path) == "map" && rng.IntN(2) == 0 {
				return syscall.EIO
			}
			return nil
		})
		for range 60 {
			e := blockmap.Range(rng.Int64N(image.Size()/4096-20)*4096, 4096*(1+rng.Int64N(20)))
			got, err := blocktest.Read(t.Context(), image, e)
			if err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
				t.Fatalf("read %v: wrong bytes, or %v", e, err)
			}
			if rng.IntN(8) == 0 {
				_ = c.Sync() // the cache tries again a map whose sync failed
			}
		}
		fsys.Fail(nil)
		fsys.Kill()
		must(t, fsys.PowerCut(rng))
		o.Boot, o.Quota = blockmap.BootID{2}, 0
		c, image, _ = openImage(t, dir, m, o)
		readAll(t, image, m)
		must(t, c.Close())
	}
}

// A copy of a cache in use has files of different moments, so the cache trusts none of
// it.
func TestCopiedCache(t *testing.T) {
	m := blocktest.NewImage(t, 64, 1000)
	dir, boot := t.TempDir(), blockmap.BootID{1}
	c, image, _ := openImage(t, dir, m, blockmap.CacheOptions{Boot: boot})
	defer c.Close()
	copied := filepath.Join(t.TempDir(), "copy")
	must(t, os.MkdirAll(copied, 0o700))
	// The data files are copied first, and the maps later, with reads between.
	_, err := blocktest.Read(t.Context(), image, blockmap.Range(0, image.Size()/3))
	must(t, err)
	first := t.TempDir()
	must(t, os.CopyFS(filepath.Join(first, "a"), os.DirFS(dir)))
	readAll(t, image, m)
	must(t, c.Sync())
	must(t, os.CopyFS(copied, os.DirFS(dir)))
	for _, path := range dataFiles(t, filepath.Join(first, "a")) {
		b, err := os.ReadFile(path)
		must(t, err)
		rel, err := filepath.Rel(filepath.Join(first, "a"), path)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(copied, rel), b, 0o600))
	}
	c2, image2, origin := openImage(t, copied, m, blockmap.CacheOptions{Boot: boot})
	defer c2.Close()
	readAll(t, image2, m)
	if origin.Requests() == 0 {
		t.Error("the copy was trusted")
	}
}

// Without a boot ID the cache trusts only blocks that were made durable.
func TestUnknownBoot(t *testing.T) {
	m := blocktest.NewImage(t, 65, 800)
	for name, boots := range map[string][2]blockmap.BootID{
		"never known": {}, "not known now": {{1}, {}}, "not known before": {{}, {1}},
	} {
		t.Run(name, func(t *testing.T) {
			dir, fsys := t.TempDir(), blocktest.NewFS()
			_, image, _ := openImage(t, dir, m, blockmap.CacheOptions{FS: fsys, Boot: boots[0]})
			readAll(t, image, m)
			fsys.Kill()
			c, image, origin := openImage(t, dir, m, blockmap.CacheOptions{FS: fsys, Boot: boots[1]})
			defer c.Close()
			readAll(t, image, m)
			if origin.Requests() == 0 {
				t.Error("blocks that were never made durable were trusted")
			}
		})
	}
}

// On a disk that other files fill, reads are served from memory.
func TestHeldInMemory(t *testing.T) {
	for name, leaves := range map[string]bool{"chunks": false, "leaves": true} {
		t.Run(name, func(t *testing.T) { testHeldInMemory(t, leaves) })
	}
}

func testHeldInMemory(t *testing.T, leaves bool) {
	m := blocktest.NewImage(t, 66, 2000)
	fsys := blocktest.NewFS()
	c := newCache(t, t.TempDir(), quiet(blockmap.CacheOptions{FS: fsys, Memory: 2 << 20}))
	fetch := newDirect(t, blocktest.NewOrigin(m))
	fetch.hold, fetch.leaves = true, leaves
	image, err := blockmap.NewImage(m.Index, c, fetch)
	must(t, err)
	check := func() {
		t.Helper()
		rng := rand.New(rand.NewPCG(1, 66))
		for range 200 {
			e := blockmap.Range(rng.Int64N(image.Size()/4096-20)*4096, 4096*(1+rng.Int64N(20)))
			got, err := blocktest.Read(t.Context(), image, e)
			if err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
				t.Fatalf("read %v: wrong bytes, or %v", e, err)
			}
		}
		if c.Held() > 2<<20 {
			t.Errorf("%d bytes are held in memory", c.Held())
		}
	}
	for _, broken := range []struct{ op, base string }{{"write", ""}, {"write", "data"}, {"write", "map"}, {"open", ""}, {"map", ""}} {
		for _, cause := range []error{syscall.ENOSPC, syscall.EIO, syscall.EMFILE} {
			fsys.Fail(func(op, path string) error {
				if op == broken.op && (broken.base == "" || filepath.Base(path) == broken.base) {
					return cause
				}
				return nil
			})
			check()
			_ = c.Sync()
		}
	}
	fsys.Fail(nil)
	readAll(t, image, m)
	c.StoreHeld()
	readAll(t, image, m)
	if c.Held() != 0 {
		t.Errorf("%d bytes are held in memory although the disk has room", c.Held())
	}
}

// Another goroutine may close a file that is being synced, as when a damaged stream is
// given up during an eviction. No call then reaches a descriptor that another file has
// taken over.
func TestFileClosedMeanwhile(t *testing.T) {
	dir := t.TempDir()
	for i := range 200 {
		f, err := blockmap.OS.Open(filepath.Join(dir, "file"), true)
		must(t, err)
		var wg sync.WaitGroup
		for _, call := range []func() error{
			f.Sync,
			func() error { return f.PunchHole(0, 4096) },
			func() error { _, _, err := f.Stat(); return err },
			func() error { _, err := f.Identity(); return err },
			func() error { f.InPlace(); return nil },
		} {
			wg.Go(func() {
				if err := call(); err != nil && !errors.Is(err, fs.ErrClosed) {
					t.Errorf("a call while the file is closed: %v", err)
				}
			})
		}
		if i%2 == 0 {
			must(t, f.Close())
			wg.Wait()
		} else {
			wg.Wait()
			must(t, f.Close())
		}
		if err := f.Sync(); !errors.Is(err, fs.ErrClosed) {
			t.Fatalf("a sync of a closed file: %v", err)
		}
	}
}

// The cache refuses a directory that another user could write to.
func TestForeignDirectory(t *testing.T) {
	refused := func(name, dir, why string) {
		t.Helper()
		c, err := blockmap.OpenCache(dir, blockmap.CacheOptions{})
		if err == nil {
			c.Close()
		}
		if err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", name, err)
		}
	}
	dir := filepath.Join(t.TempDir(), "cache")
	must(t, os.Mkdir(dir, 0o700))
	for _, mode := range []fs.FileMode{0o777, 0o770, 0o702, 0o777 | fs.ModeSticky} {
		must(t, os.Chmod(dir, mode))
		refused(mode.String(), dir, "can write to")
	}
	must(t, os.Chmod(dir, 0o755))
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(dir, link))
	newCache(t, link, blockmap.CacheOptions{}).Close()
	parent := filepath.Join(t.TempDir(), "open")
	must(t, os.Mkdir(parent, 0o700))
	must(t, os.Chmod(parent, 0o777))
	refused("a directory of everybody's", filepath.Join(parent, "cache"), "can replace")
	if os.Geteuid() == 0 {
		must(t, os.Chown(dir, 12345, 12345))
		refused("another user's", dir, "belongs to user 12345")
		refused("behind a link", link, "belongs to user 12345")
		must(t, os.Chown(dir, 0, 0))
		must(t, os.Mkdir(filepath.Join(dir, "in"), 0o700))
		must(t, os.Chown(dir, 12345, 12345))
		refused("within another user's", filepath.Join(dir, "in"), "can replace")
		must(t, os.Chown(dir, 0, 0))
	}
}

// A small file gets room on a full disk, and is not written again while it exists.
func TestSmallFilesOnAFullDisk(t *testing.T) {
	m := blocktest.NewImage(t, 67, 1500)
	fsys := blocktest.NewFS()
	dir := t.TempDir()
	c, image, _ := openImage(t, dir, m, blockmap.CacheOptions{FS: fsys})
	defer c.Close()
	fsys.Shrink(900)
	fetch := func() {
		for at := int64(0); at < image.Size(); at += 64 << 10 {
			if _, err := blocktest.Read(t.Context(), image, blockmap.Range(at, min(64<<10, image.Size()-at))); err != nil {
				t.Fatal(err)
			}
		}
	}
	fetch()
	for i := range 40 {
		fetch()
		if err := c.PutBlob(bytes.Repeat([]byte{byte(i)}, 20_000)); err != nil {
			t.Fatalf("blob %d on a full disk: %v", i, err)
		}
		if err := c.PutRef(fmt.Sprint(i), bytes.Repeat([]byte{byte(i)}, 100)); err != nil {
			t.Fatal(err)
		}
	}
	fsys.Fail(func(op, path string) error {
		if op == "write" {
			return errors.New("it is written again")
		}
		return nil
	})
	for i := range 40 {
		if err := c.PutBlob(bytes.Repeat([]byte{byte(i)}, 20_000)); err != nil {
			t.Fatal(err)
		}
		if err := c.PutRef(fmt.Sprint(i), bytes.Repeat([]byte{byte(i)}, 100)); err != nil {
			t.Fatal(err)
		}
	}
	fsys.Fail(func(op, _ string) error {
		if op == "write" {
			return blocktest.ErrDiskFull
		}
		return nil
	})
	if err := c.PutBlob([]byte("no room")); !errors.Is(err, blockmap.ErrNoSpace) {
		t.Errorf("a blob on a disk without any room: %v", err)
	}
	fsys.Fail(nil)
	if left, _ := filepath.Glob(filepath.Join(dir, "*/*/*.new")); len(left) > 0 {
		t.Errorf("unfinished files are left behind: %v", left)
	}
}

// The quota bounds all bytes of the directory, also after the next start.
func TestQuotaIsOfAll(t *testing.T) {
	m := blocktest.NewImage(t, 68, 6000)
	dir := t.TempDir()
	quota := int64(len(m.Content)) / 2
	c, image, _ := openImage(t, dir, m, blockmap.CacheOptions{Quota: quota})
	for i := range 100 {
		must(t, c.PutBlob(bytes.Repeat([]byte{byte(i)}, int(quota/100))))
	}
	for at := int64(0); at < image.Size(); at += 64 << 10 {
		if _, err := blocktest.Read(t.Context(), image, blockmap.Range(at, min(64<<10, image.Size()-at))); err != nil {
			t.Fatal(err)
		}
	}
	must(t, c.AddRoot(blockmap.Root{Image: blockmap.Digest{1}, Refs: []string{"a name"}}))
	must(t, c.PutRef("a name", []byte("leads there")))
	must(t, c.Sync())
	if n := spaceOf(t, dir); n > c.Used() || c.Used() > quota {
		t.Errorf("%d bytes are on disk and %d are counted, %d are allowed", n, c.Used(), quota)
	}
	const slack = 64 << 10 // an unwritten map already counts
	if n := spaceOf(t, dir); n < c.Used()-slack {
		t.Errorf("%d bytes are on disk, and %d are counted", n, c.Used())
	}
	must(t, c.Close())
	c, image, _ = openImage(t, dir, m, blockmap.CacheOptions{Quota: quota / 4})
	if n := spaceOf(t, dir); n > c.Used() || c.Used() > quota/4 {
		t.Errorf("after a start with a smaller quota %d bytes are on disk and %d are counted, %d are allowed", n, c.Used(), quota/4)
	}
	image.Close()
	must(t, c.Close())
}

// Images that are opened and closed leave no descriptors, mappings or directories
// behind.
func TestImagesComeAndGo(t *testing.T) {
	dir := t.TempDir()
	c, err := blockmap.OpenCache(dir, blockmap.CacheOptions{SyncEvery: 20 * time.Millisecond, Quota: 8 << 20})
	must(t, err)
	defer c.Close()
	for i := range uint64(30) {
		m := blocktest.NewImage(t, 100+i, 400)
		image, err := blockmap.NewImage(m.Index, c, newDirect(t, blocktest.NewOrigin(m)))
		must(t, err)
		if n := c.OpenStreams(); i == 0 && n != 0 {
			t.Errorf("%d streams are open although none was read", n)
		}
		if i%3 != 0 {
			readAll(t, image, m)
		}
		image.Close()
	}
	eventually(t, "streams are still open", func() bool { return c.OpenStreams() == 0 })
	// The directories of empty streams are removed.
	eventually(t, "empty streams are still there", func() bool {
		names, err := os.ReadDir(filepath.Join(dir, "streams"))
		must(t, err)
		return len(names) > 0 && len(names) < 60
	})
}

// eventually waits until the function is returns true, or fails with what.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what)
		}
	}
}

// More streams than may be open at once can all be read.
func TestManyStreams(t *testing.T) {
	ix := &blockmap.Index{}
	blobs := make(map[blockmap.Digest][]byte)
	var want []byte
	const streams = 60
	for i := range uint32(streams) {
		content := bytes.Repeat([]byte{byte(i + 1)}, 8*blockmap.BlockSize)
		table, blob := blocktest.Stream(t, [][]byte{content})
		blobs[table.Blob] = blob
		ix.Streams = append(ix.Streams, *table)
		ix.Runs = append(ix.Runs, blockmap.Run{Device: 8 * i, Stream: i, Count: 8})
		want = append(want, content...)
	}
	ix.Blocks = 8 * streams
	must(t, ix.Seal())
	m := &blocktest.Image{Index: ix, Blobs: blobs, Content: want}
	dir := t.TempDir()
	for range 2 {
		c, image, _ := openImage(t, dir, m, blockmap.CacheOptions{Boot: blockmap.BootID{1}})
		c.LimitOpen(8)
		for range 3 {
			for at := int64(0); at < image.Size(); at += 4096 {
				got, err := blocktest.Read(t.Context(), image, blockmap.Range(at, 4096))
				if err != nil || !bytes.Equal(got, want[at:at+4096]) {
					t.Fatalf("read at %d: wrong bytes, or %v", at, err)
				}
			}
			if n := c.OpenStreams(); n > 9 {
				t.Errorf("%d streams are open", n)
			}
		}
		readAll(t, image, m)
		must(t, c.Close())
	}
}

// Files that are closed because no image uses them may change meanwhile. The cache
// checks them before it trusts them again, in this process and, after a kill, in the
// next.
func TestChangedWhileClosed(t *testing.T) {
	m := blocktest.NewImage(t, 62, 1500)
	each := func(f func(path string) error) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			for _, path := range dataFiles(t, dir) {
				must(t, f(path))
			}
		}
	}
	for name, change := range map[string]func(t *testing.T, dir string){
		"another file": each(func(path string) error {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			clear(b[:len(b)-blockmap.BlockSize])
			return errors.Join(os.WriteFile(path+".x", b, 0o600), os.Rename(path+".x", path))
		}),
		"cut short": each(func(path string) error { return os.Truncate(path, 0) }),
		"cut and grown": each(func(path string) error {
			fi, err := os.Stat(path)
			if err != nil {
				return err
			}
			return errors.Join(os.Truncate(path, 4096), os.Truncate(path, fi.Size()))
		}),
		"removed":           each(os.Remove),
		"directory removed": each(func(path string) error { return os.RemoveAll(filepath.Dir(path)) }),
		"all removed":       func(t *testing.T, dir string) { must(t, os.RemoveAll(filepath.Join(dir, "streams"))) },
		"a directory":       each(func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) }),
		"a FIFO":            each(func(path string) error { return errors.Join(os.Remove(path), syscall.Mkfifo(path, 0o600)) }),
		"map a directory": each(func(path string) error {
			path = filepath.Join(filepath.Dir(path), "map")
			return errors.Join(os.Remove(path), os.Mkdir(path, 0o700))
		}),
	} {
		t.Run(name, func(t *testing.T) {
			dir, fsys := t.TempDir(), blocktest.NewFS()
			o := blockmap.CacheOptions{FS: fsys, Boot: blockmap.BootID{1}}
			c, image, _ := openImage(t, dir, m, o)
			readAll(t, image, m)
			used := c.Used()
			must(t, c.Sync())
			image.Close()
			if n := c.OpenStreams(); n != 0 {
				t.Fatalf("%d streams are open although no image uses them", n)
			}
			change(t, dir)
			image, err := blockmap.NewImage(m.Index, c, newDirect(t, blocktest.NewOrigin(m)))
			must(t, err)
			// The test reads only a part, to find a block that was not fetched again
			// and counts as resident.
			part := blockmap.Range(image.Size()/2, 1<<20)
			got, err := blocktest.Read(t.Context(), image, part)
			if err != nil || !bytes.Equal(got, m.Content[part.Start:part.End]) {
				t.Errorf("a part has wrong bytes, or %v", err)
			}
			must(t, c.Sync())
			fsys.Kill()
			c, image, _ = openImage(t, dir, m, o)
			readAll(t, image, m)
			if held := c.Held(); held != 0 {
				t.Errorf("%d bytes are held in memory although the disk has room", held)
			}
			if c.Used() != used {
				t.Errorf("%d bytes are counted; before, %d were", c.Used(), used)
			}
			must(t, c.Close())
		})
	}
}
