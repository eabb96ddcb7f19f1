package blockmap_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// disk is a file system on a loop device, both made for one test.
type disk struct {
	t                      *testing.T
	file, device, at, kind string
}

func newDisk(t *testing.T, size int64, mkfs ...string) *disk {
	t.Helper()
	return newSectorDisk(t, size, 0, mkfs...)
}

// newSectorDisk makes a disk with sectors of that many bytes, 0 for the usual ones.
func newSectorDisk(t *testing.T, size int64, sector int, mkfs ...string) *disk {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root")
	}
	file := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, os.Truncate(file, size))
	d := &disk{t: t, file: file, at: t.TempDir(), kind: strings.TrimPrefix(mkfs[0], "mkfs.")}
	d.run(append(mkfs, d.file)...)
	d.device, _ = blocktest.Loop(t, file, false)
	f, err := os.Open(d.device)
	must(t, err)
	defer f.Close()
	if sector > 0 {
		must(t, unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_BLOCK_SIZE, sector))
	}
	// The page cache of the file would hide failures of the disk.
	must(t, unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_DIRECT_IO, 1))
	d.mount()
	t.Cleanup(d.unmount)
	return d
}

func (d *disk) run(args ...string) string {
	d.t.Helper()
	var stderr bytes.Buffer
	c := exec.Command(args[0], args[1:]...)
	c.Stderr = &stderr
	c.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	out, err := c.Output()
	if err != nil {
		d.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

func (d *disk) mount() {
	d.t.Helper()
	must(d.t, unix.Mount(d.device, d.at, d.kind, 0, ""))
}

// writable mounts the file system anew if the kernel has stopped all writes to it.
func (d *disk) writable() {
	d.t.Helper()
	var fs unix.Statfs_t
	must(d.t, unix.Statfs(d.at, &fs))
	if fs.Flags&unix.ST_RDONLY != 0 {
		d.unmount()
		d.mount()
	}
}

func (d *disk) unmount() {
	d.t.Helper()
	must(d.t, blocktest.Unmount(d.at))
}

// fill writes a file that takes all the remaining space, and returns its path.
func (d *disk) fill() string {
	d.t.Helper()
	path := filepath.Join(d.at, "filler")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	must(d.t, err)
	defer f.Close()
	for n := 1 << 20; n >= 512; n /= 2 {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rand.Uint32())
		}
		for err = nil; err == nil; {
			_, err = f.Write(b)
		}
		if !errors.Is(err, unix.ENOSPC) {
			d.t.Fatal(err)
		}
	}
	_ = f.Sync() // a full disk may report the error again
	return path
}

// goodUpTo makes every sector of the disk from end on bad, for reads and for writes:
// the device ends there, and the kernel answers with EIO. The content of the bad
// sectors stays. With end 0 all sectors are good again.
func (d *disk) goodUpTo(end int64) {
	d.t.Helper()
	f, err := os.Open(d.device)
	must(d.t, err)
	defer f.Close()
	status, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	must(d.t, err)
	status.Sizelimit = uint64(end)
	must(d.t, unix.IoctlLoopSetStatus64(int(f.Fd()), status))
}

// forget drops the pages of a file from the kernel's page cache.
func forget(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

// A cache on a disk that fills up, or is full when the cache is opened, gives every
// reader the right bytes, on file systems that overwrite in place and on others.
// When there is room again the cache uses it.
func TestRealFullDisk(t *testing.T) {
	m := blocktest.NewImage(t, 80, 6000)
	for _, mkfs := range [][]string{{"mkfs.btrfs", "-q", "-M"}, {"mkfs.ext4", "-q", "-m", "0"}} {
		t.Run(mkfs[0], func(t *testing.T) {
			d := newDisk(t, 128<<20, mkfs...)
			dir := filepath.Join(d.at, "cache")
			boot := blockmap.BootID{1}
			var image *blockmap.Image
			open := func() *blockmap.Cache {
				c, err := blockmap.OpenCache(dir, quiet(blockmap.CacheOptions{Boot: boot}))
				must(t, err)
				fetch := newDirect(t, blocktest.NewOrigin(m))
				fetch.hold = true
				image, err = blockmap.NewImage(m.Index, c, fetch)
				must(t, err)
				return c
			}
			check := func(when string) {
				t.Helper()
				rng := rand.New(rand.NewPCG(1, 80))
				for range 80 {
					e := blockmap.Range(rng.Int64N(image.Size()/4096-40)*4096, 4096*(1+rng.Int64N(40)))
					got, err := blocktest.Read(t.Context(), image, e)
					if err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
						t.Fatalf("%s: read %v: wrong bytes, or %v", when, e, err)
					}
				}
			}
			c := open()
			_, err := blocktest.Read(t.Context(), image, blockmap.Range(0, image.Size()/2))
			must(t, err)
			filler := d.fill()
			check("full")
			if err := c.Sync(); err != nil {
				t.Logf("sync on a full disk: %v", err)
			}
			check("full, after a sync")
			for i := range 20 {
				_ = c.PutBlob(bytes.Repeat([]byte{byte(i)}, 50_000))
			}
			check("full, after small files")
			if err := c.Close(); err != nil {
				t.Logf("close on a full disk: %v", err)
			}
			boot = blockmap.BootID{2} // another boot, so that the maps are written
			c = open()
			check("opened full")
			must(t, os.Remove(filler))
			d.run("sync", "-f", d.at)
			readAll(t, image, m)
			if err := c.Sync(); err != nil {
				t.Errorf("sync with room again: %v", err)
			}
			must(t, c.Close())
			c = open()
			readAll(t, image, m)
			must(t, c.Close())
		})
	}
}

// A file system that is remounted by force, without a reboot, has lost unwritten data,
// though live bits say that the blocks are resident.
func TestRealRemount(t *testing.T) {
	m := blocktest.NewImage(t, 81, 4000)
	d := newDisk(t, 96<<20, "mkfs.ext4", "-q")
	dir, boot := filepath.Join(d.at, "cache"), blockmap.BootID{1}
	c, image, _ := openImage(t, dir, m, blockmap.CacheOptions{Boot: boot, Quota: int64(len(m.Content)) * 3 / 4})
	_, err := blocktest.Read(t.Context(), image, blockmap.Range(0, image.Size()/4))
	must(t, err)
	must(t, c.Sync())
	// Evictions make the maps durable, with live bits of blocks that are not durable.
	for at := int64(0); at < image.Size(); at += 64 << 10 {
		_, err := blocktest.Read(t.Context(), image, blockmap.Range(at, min(64<<10, image.Size()-at)))
		must(t, err)
	}
	if c.Evicted() == 0 {
		t.Fatal("nothing was evicted: this tests nothing")
	}
	f, err := os.Open(d.at)
	must(t, err)
	// _IOR('X', 125, __u32), EXT4_IOC_SHUTDOWN of the kernel's ext4.h; 2 leaves
	// the journal as it is.
	shutdown, flags := uintptr(0x8004587d), uint32(2)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), shutdown, uintptr(unsafe.Pointer(&flags))); e != 0 {
		t.Fatal(e)
	}
	must(t, f.Close())
	_ = c.Close() // it fails: nothing can be made durable
	d.unmount()
	d.mount()
	c, image, _ = openImage(t, dir, m, blockmap.CacheOptions{Boot: boot})
	readAll(t, image, m)
	must(t, c.Close())
}

// Chunks in sectors that cannot be read or written are fetched again. When the sectors
// are good again, the cache uses the disk again. The file systems of ext4 have no journal:
// one in bad sectors makes the kernel stop all writes.
func TestRealBadSectors(t *testing.T) {
	m := blocktest.NewImage(t, 82, 4000)
	for _, mkfs := range [][]string{
		{"mkfs.ext4", "-q", "-b", "1024", "-O", "^has_journal"}, {"mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal"}, {"mkfs.btrfs", "-q", "-M"},
	} {
		for _, w := range ways {
			t.Run(strings.Join(mkfs, " ")+" "+w.name, func(t *testing.T) {
				d := newDisk(t, 320<<20, mkfs...)
				dir, boot := filepath.Join(d.at, "cache"), blockmap.BootID{1}
				var image *blockmap.Image
				open := func() *blockmap.Cache {
					c, err := blockmap.OpenCache(dir, quiet(blockmap.CacheOptions{Boot: boot, Mode: w.mode}))
					must(t, err)
					if w.threads {
						c.ReadWithThreads()
					}
					fetch := newDirect(t, blocktest.NewOrigin(m))
					fetch.hold = true
					image, err = blockmap.NewImage(m.Index, c, fetch)
					must(t, err)
					return c
				}
				check := func(when string) {
					t.Helper()
					for at := int64(0); at < image.Size(); at += 256 << 10 {
						e := blockmap.Range(at, min(256<<10, image.Size()-at))
						got, err := blocktest.Read(t.Context(), image, e)
						if err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
							t.Fatalf("%s: read %v: wrong bytes, or %v", when, e, err)
						}
					}
				}
				c := open()
				readAll(t, image, m)
				must(t, c.Close())
				d.run("sync", "-f", d.at)
				for _, path := range dataFiles(t, dir) {
					forget(t, path)
				}
				c = open()
				d.goodUpTo(14 << 20)
				for range 3 {
					check("bad sectors")
					if err := c.Sync(); err != nil {
						t.Logf("sync to a broken disk: %v", err)
					}
				}
				if c.Damaged() == 0 {
					t.Error("no chunk was damaged: this tests nothing")
				}
				d.goodUpTo(0)
				check("good again")
				_ = c.Close() // it reports syncs that failed
				d.writable()
				for _, path := range dataFiles(t, dir) {
					forget(t, path)
				}
				c = open()
				readAll(t, image, m)
				must(t, c.Close())
			})
		}
	}
}
