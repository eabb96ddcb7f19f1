package blocktest

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Loop makes a file a block device until release is called, or the test ends. Other
// programs may look for a free loop device at the same time. A device belongs to this
// test only once the kernel has configured it with the test's file, which
// LOOP_CONFIGURE does in one step. The device goes when release was called and its last
// mount is gone.
func Loop(t testing.TB, file string, readOnly bool) (device string, release func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loop devices require root")
	}
	mode := os.O_RDWR
	var flags uint32 = unix.LO_FLAGS_AUTOCLEAR
	if readOnly {
		mode, flags = os.O_RDONLY, flags|unix.LO_FLAGS_READ_ONLY
	}
	backing, err := os.OpenFile(file, mode, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer backing.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	for end := time.Now().Add(time.Minute); ; {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatalf("find a free loop device: %v", err)
		}
		device = fmt.Sprintf("/dev/loop%d", n)
		f, err := os.OpenFile(device, mode, 0)
		if errors.Is(err, os.ErrNotExist) { // no udev makes the node
			err = unix.Mknod(device, unix.S_IFBLK|0o660, int(unix.Mkdev(7, uint32(n))))
			if err == nil || errors.Is(err, unix.EEXIST) {
				f, err = os.OpenFile(device, mode, 0)
			}
		}
		if err == nil {
			c := &unix.LoopConfig{Fd: uint32(backing.Fd()), Info: unix.LoopInfo64{Flags: flags}}
			if err = unix.IoctlLoopConfigure(int(f.Fd()), c); err == nil {
				open := true
				release = func() {
					if open {
						open = false
						f.Close()
					}
				}
				t.Cleanup(release)
				return device, release
			}
			f.Close()
		}
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) || time.Now().After(end) {
			t.Fatalf("make %s a device: %v", file, err)
		}
	}
}

// Mount mounts the file system in a file on a directory of this test, until unmount is
// called or the test ends.
func Mount(t testing.TB, file, kind string, readOnly bool) (dir string, unmount func()) {
	t.Helper()
	device, release := Loop(t, file, readOnly)
	dir = t.TempDir()
	var flags uintptr
	if readOnly {
		flags = unix.MS_RDONLY
	}
	if err := unix.Mount(device, dir, kind, flags, ""); err != nil {
		t.Fatalf("mount the %s of %s: %v", kind, file, err)
	}
	mounted := true
	unmount = func() {
		t.Helper()
		if !mounted {
			return
		}
		mounted = false
		if err := Unmount(dir); err != nil {
			t.Error(err)
			return
		}
		// The device goes with its last user. The file then has all that was
		// written.
		release()
	}
	t.Cleanup(unmount)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	if got := st.Flags&unix.ST_RDONLY != 0; got != readOnly {
		t.Fatalf("%s is mounted read-only=%v, want %v", file, got, readOnly)
	}
	return dir, unmount
}

// Unmount unmounts what is mounted on a directory. A child that another test of this
// process starts has copies of all descriptors until its exec closes them, so a file that
// is closed here may keep the mount busy for a moment. If the mount stays busy, Unmount
// fails with the files that this process still has there. If it has none, the kernel or
// another process keeps the mount busy, and the mount is detached: it goes when they are done.
func Unmount(dir string) error {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		err := unix.Unmount(dir, 0)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		if time.Now().After(end) {
			break
		}
	}
	used, err := usedBelow(dir)
	if err == nil && len(used) > 0 {
		err = fmt.Errorf("this process uses %q", used)
	}
	return errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
}

// usedBelow lists the files below a directory that this process has open or mapped.
func usedBelow(dir string) (used []string, err error) {
	below := func(path string) {
		if path == dir || strings.HasPrefix(path, dir+"/") {
			used = append(used, path)
		}
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	for _, fd := range fds {
		if path, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil {
			below(path)
		}
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(maps)) {
		if f := strings.Fields(line); len(f) >= 6 {
			below(f[5])
		}
	}
	return used, nil
}
