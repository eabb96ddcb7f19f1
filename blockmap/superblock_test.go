package blockmap_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// elsewhere runs f on a thread of its own with new namespaces: its paths are those of a copy
// of all mounts. The copy ends with the thread.
func elsewhere(t *testing.T, namespaces int, f func() error) {
	t.Helper()
	done, thread := make(chan error), 0
	var start func()
	start = func() {
		runtime.LockOSThread() // and never unlocks: the thread ends here
		if unix.Gettid() == unix.Getpid() {
			// The first thread of a process would not end. Held here, it is not the next.
			defer runtime.UnlockOSThread()
			var other sync.WaitGroup
			other.Go(start)
			other.Wait()
			return
		}
		thread = unix.Gettid()
		err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS | namespaces)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, "")
		}
		if err == nil {
			err = f()
		}
		done <- err
	}
	go start()
	must(t, <-done)
	eventually(t, "the thread does not end", func() bool {
		_, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", thread))
		return err != nil
	})
}

func identity(path string) (id blockmap.FileID, err error) {
	f, err := blockmap.OS.Open(path, false)
	if err != nil {
		return id, err
	}
	defer f.Close()
	return f.Identity()
}

// All mounts of a file system that is mounted have one identity, in all mount namespaces:
// the kernel has one superblock, and so one page cache. When the last one has been unmounted,
// and the file system is mounted again, it has another.
func TestSuperblock(t *testing.T) {
	type mounted struct {
		at             string
		mount, unmount func()
	}
	onDisk := func(size int64, mkfs ...string) func(t *testing.T) mounted {
		return func(t *testing.T) mounted {
			d := newDisk(t, size, mkfs...)
			return mounted{d.at, d.mount, d.unmount}
		}
	}
	for kind, make := range map[string]func(t *testing.T) mounted{
		"ext4":  onDisk(64<<20, "mkfs.ext4", "-q"),
		"btrfs": onDisk(128<<20, "mkfs.btrfs", "-q"),
		"fuse": func(t *testing.T) mounted {
			files, at := t.TempDir(), t.TempDir()
			var s *fuse.Server
			m := mounted{at: at, mount: func() {
				root, err := fs.NewLoopbackRoot(files)
				must(t, err)
				s, err = fs.Mount(at, root, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true}})
				must(t, err)
			}}
			m.unmount = func() {
				must(t, blocktest.Unmount(at))
				s.Wait()
			}
			m.mount()
			t.Cleanup(m.unmount)
			return m
		},
		"tmpfs": func(t *testing.T) mounted { return mounted{at: mountMemory(t, "tmpfs")} },
	} {
		t.Run(kind, func(t *testing.T) {
			m := make(t)
			path := filepath.Join(m.at, "data")
			must(t, os.WriteFile(path, []byte("data"), 0o600))
			want, err := identity(path)
			must(t, err)
			if want.Superblock>>63 != 1 {
				t.Fatalf("%+v: the superblock is not known but by a mount", want)
			}
			same := func(what, path string) error {
				id, err := identity(path)
				if id != want {
					t.Errorf("%s: %+v, want %+v", what, id, want)
				}
				return err
			}

			other := t.TempDir()
			must(t, unix.Mount(m.at, other, "", unix.MS_BIND, ""))
			must(t, same("a bind mount", filepath.Join(other, "data")))
			must(t, blocktest.Unmount(other))
			must(t, unix.Mount("", m.at, "", unix.MS_REMOUNT|unix.MS_NOATIME, ""))
			must(t, same("remounted", path))
			elsewhere(t, 0, func() error { return same("another mount namespace", path) })
			elsewhere(t, unix.CLONE_NEWNET, func() error {
				if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
					return err
				}
				return same("the sysfs of another network namespace", path)
			})
			// Inode numbers of another file system are not believed.
			elsewhere(t, 0, func() error {
				if err := unix.Mount("tmpfs", "/sys", "tmpfs", 0, ""); err != nil {
					return err
				}
				for _, dir := range []string{"/sys/dev", "/sys/class", "/sys/fs"} {
					if err := os.Mkdir(dir, 0o755); err != nil {
						return err
					}
				}
				id, err := identity(path)
				if kind != "tmpfs" && id.Superblock>>63 != 0 {
					t.Errorf("without /sys: %+v", id)
				}
				return err
			})
			if m.mount == nil {
				return
			}

			// A program that has a file open keeps the superblock when it is unmounted.
			f, err := os.Open(path)
			must(t, err)
			defer f.Close()
			if kind != "fuse" {
				must(t, unix.Unmount(m.at, unix.MNT_DETACH))
				m.mount()
				must(t, same("unmounted lazily", path))
			}
			must(t, f.Close())
			// The kernel ends the mounts of the other namespaces in its own time.
			var got blockmap.FileID
			eventually(t, "mounted again, it has the same superblock", func() bool {
				m.unmount()
				m.mount()
				got, err = identity(path)
				must(t, err)
				return got.Superblock != want.Superblock
			})
			if got.Superblock>>63 != 1 || got.Inode != want.Inode || got.Born != want.Born {
				t.Errorf("mounted again: %+v, was %+v", got, want)
			}
		})
	}
}

func BenchmarkIdentity(b *testing.B) {
	f, err := blockmap.OS.Open(filepath.Join(b.TempDir(), "data"), true)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	for b.Loop() {
		if _, err := f.Identity(); err != nil {
			b.Fatal(err)
		}
	}
}
