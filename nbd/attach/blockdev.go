package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// openExclusive opens a node as a mount does: it fails with EBUSY where a filesystem on
// it is mounted.
func openExclusive(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// flushPages drops what the kernel has cached of a node. A later device of the same
// number must not show them.
func flushPages(f *os.File) error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKFLSBUF, 0); e != 0 {
		return fmt.Errorf("drop the cached pages of %s: %w", f.Name(), e)
	}
	return nil
}

// deviceSize is the size of a node in bytes.
func deviceSize(f *os.File) (int64, error) {
	var n uint64
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&n))); e != 0 {
		return 0, fmt.Errorf("size of %s: %w", f.Name(), e)
	}
	return int64(n), nil
}

// setReadAhead sets how many bytes the kernel reads ahead on a node. It uses the ioctl,
// because a write to read_ahead_kb in sysfs has the kernel stop the queue, which takes 10
// to 20 ms.
func setReadAhead(path string, n int) error {
	now, err := sysNumber(filepath.Join("/sys/block", filepath.Base(path), "queue/read_ahead_kb"))
	if err == nil && now == int64(n>>10) {
		return nil
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKRASET, uintptr(n>>9)); e != 0 {
		return fmt.Errorf("set the readahead of %s: %w", path, e)
	}
	return nil
}

// openNode opens a node that the kernel has just made. Its file comes from udev, or from
// the kernel where /dev is a devtmpfs, perhaps a moment later. Where nobody makes it, as
// in a container, openNode does.
func openNode(ctx context.Context, path string, flags int, dev func() (uint64, error)) (*os.File, error) {
	const patience = 500 * time.Millisecond
	began, made := time.Now(), false
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), path), nil
		case err == unix.EINTR:
			continue
		case !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENXIO):
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		case time.Since(began) > patience && !made:
			made = true
			rdev, e := dev()
			if e == nil {
				e = unix.Mknod(path, unix.S_IFBLK|0o600, int(rdev))
			}
			if e != nil && !errors.Is(e, unix.EEXIST) {
				return nil, fmt.Errorf("make %s, which nobody has made: %w", path, e)
			}
		case time.Since(began) > 20*patience:
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		if err := sleep(ctx, pause); err != nil {
			return nil, fmt.Errorf("wait for %s: %w", path, err)
		}
	}
}

// sysDev reads the number of a device from a file of sysfs, such as /sys/block/loop0/dev.
func sysDev(file string) (uint64, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err != nil {
		return 0, fmt.Errorf("%s has %q: want MAJOR:MINOR", file, text)
	}
	return unix.Mkdev(major, minor), nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
