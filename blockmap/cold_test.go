package blockmap_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// ways are the ways to read a disk.
var ways = []struct {
	name    string
	mode    blockmap.Mode
	threads bool
}{
	{"ring", blockmap.Buffered, false}, {"threads", blockmap.Buffered, true},
	{"direct ring", blockmap.Direct, false}, {"direct threads", blockmap.Direct, true},
}

// openCold returns an image that is resident in dir as a whole, and of which nothing is in
// memory.
func openCold(t *testing.T, dir string, m *blocktest.Image, o blockmap.CacheOptions, threads bool) (*blockmap.Cache, *blockmap.Image, *blocktest.Origin) {
	t.Helper()
	o.Boot = blockmap.BootID{1}
	c, image, _ := openImage(t, dir, m, o)
	must(t, image.Fault(t.Context(), blockmap.Range(0, image.Size())))
	must(t, c.Close())
	for _, path := range dataFiles(t, dir) {
		f, err := os.Open(path)
		must(t, err)
		must(t, errors.Join(f.Sync(), f.Close())) // the tests' FS does not
		// The kernel keeps a page that it uses at the moment.
		eventually(t, "the kernel keeps pages of "+path, func() bool {
			forget(t, path)
			return inMemory(t, path) == 0
		})
	}
	c, image, origin := openImage(t, dir, m, o)
	if threads {
		c.ReadWithThreads()
	}
	t.Cleanup(func() { must(t, c.Close()) })
	must(t, image.Fault(t.Context(), blockmap.Range(0, image.Size()))) // opens the files
	return c, image, origin
}

// inMemory is how many pages of a file are in the page cache.
func inMemory(t *testing.T, path string) (n int) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	fi, err := f.Stat()
	must(t, err)
	m, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	must(t, err)
	defer unix.Munmap(m)
	pages := make([]byte, (fi.Size()+4095)/4096)
	if _, _, e := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&pages[0]))); e != 0 {
		t.Fatal(e)
	}
	for _, p := range pages {
		n += int(p & 1)
	}
	return n
}

// What is on the disk and not in memory is never viewed, and always loaded.
func TestColdImage(t *testing.T) {
	m := blocktest.NewImage(t, 90, 3000)
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			blocktest.TestCold(t, m.Content, func(t *testing.T) blockmap.Device {
				_, image, origin := openCold(t, t.TempDir(), m, blockmap.CacheOptions{Mode: w.mode}, w.threads)
				t.Cleanup(func() {
					if n := origin.Requests(); n != 0 {
						t.Errorf("%d requests for what is resident", n)
					}
				})
				return image
			})
		})
	}
}

// In buffered mode, what was loaded is viewed next time. In direct mode the page cache
// keeps nothing but the guards.
func TestWhatReadsLeaveInMemory(t *testing.T) {
	m := blocktest.NewImage(t, 91, 3000)
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			dir := t.TempDir()
			_, image, _ := openCold(t, dir, m, blockmap.CacheOptions{Mode: w.mode}, w.threads)
			readAll(t, image, m)
			pages := 0
			for _, path := range dataFiles(t, dir) {
				pages += inMemory(t, path)
			}
			files := len(dataFiles(t, dir))
			v, ok := image.View(blockmap.Range(0, image.Size()))
			v.Release()
			switch direct := w.mode == blockmap.Direct; {
			case ok == direct:
				t.Errorf("a view of what was read: %v", ok)
			case direct && pages > files:
				t.Errorf("%d pages of %d files are in memory", pages, files)
			case !direct && pages < len(m.Content)/4096/2:
				t.Errorf("%d pages are in memory", pages)
			}
		})
	}
}

// Direct mode conforms as buffered mode does, and what is durable of fills leaves nothing in
// memory: on file systems that overwrite in place and others, and on a disk of large sectors.
func TestDirectConforms(t *testing.T) {
	m := blocktest.NewImage(t, 92, 3000)
	on := func(name string, dir func(t *testing.T) string) {
		t.Run(name, func(t *testing.T) {
			at := dir(t)
			n := 0
			blocktest.TestDevice(t, m.Content, func(t *testing.T) blockmap.Device {
				n++
				c := newCache(t, filepath.Join(at, fmt.Sprint("cache", n)), blockmap.CacheOptions{Mode: blockmap.Direct})
				image, err := blockmap.NewImage(m.Index, c, newDirect(t, blocktest.NewOrigin(m)))
				must(t, err)
				return image
			})
			cache := filepath.Join(at, "once more")
			c, image, _ := openImage(t, cache, m, blockmap.CacheOptions{Mode: blockmap.Direct})
			defer c.Close()
			readAll(t, image, m)
			must(t, c.Sync())
			files := dataFiles(t, cache)
			for _, path := range files {
				if n := inMemory(t, path); n > 1 && name != "tmpfs" {
					t.Errorf("%d pages of %s are in memory", n, path)
				}
			}
			v, ok := image.View(blockmap.Range(0, image.Size()))
			v.Release()
			if ok {
				t.Error("the cache was not opened in direct mode")
			}
		})
	}
	on("ext4", func(t *testing.T) string { return newDisk(t, 256<<20, "mkfs.ext4", "-q").at })
	on("btrfs", func(t *testing.T) string { return newDisk(t, 400<<20, "mkfs.btrfs", "-q").at })
	on("sectors of 4 KiB", func(t *testing.T) string { return newSectorDisk(t, 256<<20, 4096, "mkfs.ext4", "-q", "-b", "4096").at })
	on("tmpfs", func(t *testing.T) string {
		at := mountMemory(t, "tmpfs")
		c, err := blockmap.OpenCache(filepath.Join(at, "cache"), quiet(blockmap.CacheOptions{Mode: blockmap.Direct}))
		if errors.Is(err, blockmap.ErrNoDirect) {
			t.Skip("before Linux 6.6, tmpfs has no direct I/O")
		}
		must(t, err)
		must(t, c.Close())
		return at
	})
}

func mountMemory(t *testing.T, kind string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root")
	}
	at := t.TempDir()
	must(t, unix.Mount(kind, at, kind, 0, "mode=0700"))
	t.Cleanup(func() { must(t, blocktest.Unmount(at)) })
	return at
}

// On a file system without direct I/O, opening a cache in direct mode fails, and says what
// to do.
func TestNoDirect(t *testing.T) {
	dir := filepath.Join(mountMemory(t, "ramfs"), "cache")
	_, err := blockmap.OpenCache(dir, quiet(blockmap.CacheOptions{Mode: blockmap.Direct}))
	if !errors.Is(err, blockmap.ErrNoDirect) || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "buffered") {
		t.Fatalf("direct mode on ramfs: %v", err)
	}
	// The failure leaves neither a lock nor a file.
	c, err := blockmap.OpenCache(dir, quiet(blockmap.CacheOptions{Mode: blockmap.Buffered}))
	must(t, err)
	must(t, c.Close())
	if left, err := filepath.Glob(filepath.Join(dir, "*test*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// The mode of a cache may change from one process to the next.
func TestModeChanges(t *testing.T) {
	m := blocktest.NewImage(t, 93, 2000)
	dir := t.TempDir()
	half := blockmap.Range(0, int64(len(m.Content))/2&^4095)
	for i, mode := range []blockmap.Mode{blockmap.Buffered, blockmap.Direct, blockmap.Buffered, blockmap.Direct} {
		c, image, origin := openImage(t, dir, m, blockmap.CacheOptions{Mode: mode, Boot: blockmap.BootID{1}})
		if i == 0 {
			_, err := blocktest.Read(t.Context(), image, half)
			must(t, err)
		} else {
			readAll(t, image, m)
		}
		if i > 1 && origin.Requests() > 0 {
			t.Errorf("%s: %d requests", mode, origin.Requests())
		}
		must(t, c.Close())
	}
}

// slowDisk makes reads of data files wait until open is closed, or fail with fault.
type slowDisk struct {
	*blocktest.FS
	open chan struct{}
}

func newSlowDisk() *slowDisk {
	d := &slowDisk{blocktest.NewFS(), make(chan struct{})}
	return d
}

func (d *slowDisk) slow() {
	d.Fail(func(op, path string) error {
		if op == "read" && filepath.Base(path) == "data" {
			<-d.open
		}
		return nil
	})
}

// A reader whose time is over leaves a hung disk. The read that it leaves behind keeps
// its chunk in the cache: the kernel may still write to its buffer, and reads what is
// where the chunk was.
func TestHungDisk(t *testing.T) {
	m := blocktest.NewImage(t, 94, 2000)
	disk := newSlowDisk()
	dir := t.TempDir()
	c, image, _ := openImage(t, dir, m, blockmap.CacheOptions{FS: disk.FS, Mode: blockmap.Direct})
	must(t, image.Fault(t.Context(), blockmap.Range(0, image.Size())))
	e := blockmap.Range(0, 4096)
	for image.Status(e).Zero {
		e = blockmap.Range(e.End, 4096)
	}
	disk.slow()
	// A reader that is alone reads on its own thread; the second has one of the pool.
	var first sync.WaitGroup
	first.Go(func() {
		got, err := blocktest.Read(context.Background(), image, e)
		if err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
			t.Errorf("the reader that waited: wrong bytes, or %v", err)
		}
	})
	eventually(t, "the first read has not begun", func() bool { return c.Reading() == 1 })
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := blockmap.Read(ctx, image, e)
		left <- err
	}()
	eventually(t, "the second read has not begun", func() bool { return c.Reading() == 2 })
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("a read of a hung disk: %v", err)
	}
	var async sync.WaitGroup
	async.Add(1)
	blockmap.LoadAsync(image, e, func(v blockmap.View, ok bool) {
		defer async.Done()
		p := make([]byte, 4096)
		if !ok || v.CopyTo(p) != nil || !bytes.Equal(p, m.Content[e.Start:e.End]) {
			t.Error("an asynchronous load has wrong bytes")
		}
		v.Release()
	})
	if n := c.Reading(); n != 3 {
		t.Errorf("%d reads are under way, want 3", n)
	}
	closed := make(chan error)
	go func() { closed <- c.Close() }()
	select {
	case <-closed:
		t.Fatal("the cache was closed while the disk was being read")
	case <-time.After(20 * time.Millisecond): // a wrong Close is found now and then
	}
	close(disk.open)
	first.Wait()
	async.Wait()
	must(t, <-closed)
}

// What the disk fails to read is fetched again, in all ways to read it.
func TestFailingReads(t *testing.T) {
	m := blocktest.NewImage(t, 95, 2000)
	for _, mode := range []blockmap.Mode{blockmap.Buffered, blockmap.Direct} {
		for _, fault := range []error{syscall.EIO, syscall.ENODATA, syscall.ENOMEM} {
			t.Run(fmt.Sprint(mode, " ", fault), func(t *testing.T) {
				fsys := blocktest.NewFS()
				var mu sync.Mutex
				rng := rand.New(rand.NewPCG(1, 95))
				c, image, origin := openCold(t, t.TempDir(), m, blockmap.CacheOptions{FS: fsys, Mode: mode}, false)
				image.Close()
				fetch := newDirect(t, origin)
				fetch.hold = true // a chunk whose reads have failed twice is not stored for a while
				image, err := blockmap.NewImage(m.Index, c, fetch)
				must(t, err)
				must(t, image.Fault(t.Context(), blockmap.Range(0, image.Size()))) // opens the files
				fsys.Fail(func(op, path string) error {
					mu.Lock()
					defer mu.Unlock()
					if op == "read" && filepath.Base(path) == "data" && rng.IntN(3) == 0 {
						return fault
					}
					return nil
				})
				var wg sync.WaitGroup
				for i := range 8 {
					wg.Go(func() {
						rng := rand.New(rand.NewPCG(uint64(i), 96))
						for range 100 {
							e := blockmap.Range(rng.Int64N(image.Size()/4096-20)*4096, 4096*(1+rng.Int64N(20)))
							got, err := blocktest.Read(t.Context(), image, e)
							if err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
								t.Errorf("read %v: wrong bytes, or %v", e, err)
								return
							}
						}
					})
				}
				wg.Wait()
				if c.Damaged() == 0 || origin.Requests() == 0 {
					t.Errorf("%d chunks were damaged, and %d requests made: this tests nothing", c.Damaged(), origin.Requests())
				}
			})
		}
	}
}

// A file that is cut short under readers in direct mode: see TestTruncatedUnderReaders.
func TestTruncatedColdFile(t *testing.T) {
	m := blocktest.NewImage(t, 97, 1500)
	for _, w := range ways {
		for _, left := range []int64{0, 4096, 100_000, -4096, -1} {
			t.Run(fmt.Sprint(w.name, " ", left), func(t *testing.T) {
				dir := t.TempDir()
				c, image, _ := openCold(t, dir, m, blockmap.CacheOptions{Mode: w.mode}, w.threads)
				for _, path := range dataFiles(t, dir) {
					fi, err := os.Stat(path)
					must(t, err)
					must(t, os.Truncate(path, (left+fi.Size())%fi.Size()))
					must(t, os.Truncate(path, fi.Size())) // what is gone reads as zeros
				}
				readAll(t, image, m)
				if c.Damaged() == 0 {
					t.Error("no chunk was counted as damaged")
				}
			})
		}
	}
}

// Chunks are evicted while they are read from the disk: every reader gets its bytes.
func TestColdReadsAndEviction(t *testing.T) {
	m := blocktest.NewImage(t, 98, 3000)
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			c, image, _ := openImage(t, t.TempDir(), m, blockmap.CacheOptions{Mode: w.mode, Quota: int64(len(m.Content)) * 3 / 5})
			if w.threads {
				c.ReadWithThreads()
			}
			var wg sync.WaitGroup
			for i := range 8 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(i), 99))
					for range 60 {
						e := blockmap.Range(rng.Int64N(image.Size()/4096-20)*4096, 4096*(1+rng.Int64N(20)))
						got := make([]byte, e.Len())
						if err := blockmap.ReadInto(t.Context(), image, e, got); err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
							t.Errorf("read %v: wrong bytes, or %v", e, err)
							return
						}
					}
				})
			}
			wg.Wait()
			if c.Evicted() == 0 {
				t.Error("nothing was evicted: this tests nothing")
			}
			must(t, c.Close())
		})
	}
}

// BenchmarkColdReads reads 4 KiB at random, 32 at once, what is on the disk only.
func BenchmarkColdReads(b *testing.B) {
	m := blocktest.NewImage(b, 99, 8000)
	for _, w := range ways {
		b.Run(strings.ReplaceAll(w.name, " ", "-"), func(b *testing.B) {
			dir := b.TempDir()
			c := newCache(b, dir, blockmap.CacheOptions{Mode: blockmap.Direct})
			if w.mode != blockmap.Direct {
				b.Skip("the page cache has it after the first round")
			}
			if w.threads {
				c.ReadWithThreads()
			}
			image, err := blockmap.NewImage(m.Index, c, newDirect(b, blocktest.NewOrigin(m)))
			if err == nil {
				err = image.Fault(b.Context(), blockmap.Range(0, image.Size()))
			}
			if err != nil {
				b.Fatal(err)
			}
			b.SetParallelism(16)
			b.SetBytes(4096)
			b.RunParallel(func(pb *testing.PB) {
				rng := rand.New(rand.NewPCG(rand.Uint64(), 1))
				for pb.Next() {
					v, ok := image.Load(b.Context(), blockmap.Range(rng.Int64N(image.Size()/4096)*4096, 4096))
					if !ok {
						b.Error("not resident")
						return
					}
					v.Release()
				}
			})
		})
	}
}

// Close waits until those who began reads have been told of their ends: they may hold
// views until then.
func TestCloseWaitsForThoseWhoAreTold(t *testing.T) {
	m := blocktest.NewImage(t, 97, 300)
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			c, image, _ := openImage(t, t.TempDir(), m, blockmap.CacheOptions{Mode: w.mode, Boot: blockmap.BootID{1}})
			must(t, image.Fault(t.Context(), blockmap.Range(0, image.Size())))
			if w.threads {
				c.ReadWithThreads()
			}
			told, goOn := make(chan struct{}), make(chan struct{})
			image.LoadAsync(blockmap.Range(0, image.Size()), func(v blockmap.View, ok bool) {
				close(told)
				<-goOn
				v.Release()
			})
			select {
			case <-told:
			case <-time.After(time.Minute):
				t.Fatal("the load has not ended")
			}
			closed := make(chan error, 1)
			go func() { closed <- c.Close() }()
			select {
			case err := <-closed:
				t.Errorf("it is closed before: %v", err)
				close(goOn)
			case <-time.After(100 * time.Millisecond):
				close(goOn)
				must(t, <-closed)
			}
		})
	}
}
