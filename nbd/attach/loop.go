package attach

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// A loop device is a block device whose bytes are those of a file. Its driver is in
// nearly every kernel. With direct I/O it keeps no copy of the file in the page cache,
// and has as many requests of the file in flight as it has itself.

// loBlockSize is the logical block size of loop devices. Nothing is faster with 4096, and
// programs that read 512 bytes with O_DIRECT work.
const loBlockSize = 512

// loopChangeFD is LOOP_CHANGE_FD, which x/sys does not have.
const loopChangeFD = 0x4c06

// makeLoop makes a loop device of a file, marked with token. It is the kernel that
// decides which one: other programs look for a free loop device at the same time, and the
// device belongs to this file once LOOP_CONFIGURE has succeeded, in one step.
func makeLoop(ctx context.Context, file *os.File, token string, readOnly bool) (number uint32, err error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return 0, fmt.Errorf("/dev/loop-control is missing: load the kernel module by `modprobe loop`: %w", ErrUnavailable)
		}
		return 0, err
	}
	defer control.Close()
	c := &unix.LoopConfig{Fd: uint32(file.Fd()), Size: loBlockSize}
	c.Info.Flags = unix.LO_FLAGS_DIRECT_IO
	copy(c.Info.File_name[:len(c.Info.File_name)-1], token)
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
		c.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	for end := time.Now().Add(10 * time.Second); ; {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return 0, fmt.Errorf("find a free loop device: %w", err)
		}
		number = uint32(n)
		f, err := openNode(ctx, nodePath(FUSE, number), mode, func() (uint64, error) { return sysDev(fmt.Sprintf("/sys/block/loop%d/dev", number)) })
		if err == nil {
			err = unix.IoctlLoopConfigure(int(f.Fd()), c)
			if err == nil {
				err = flushPages(f) // of another file that it was the device of
			}
			if e := f.Close(); err == nil {
				err = e
			}
			runtime.KeepAlive(file)
			if err == nil {
				return number, nil
			}
		}
		switch {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTTY):
			return 0, fmt.Errorf("LOOP_CONFIGURE: %w: it requires Linux 5.8: %w", err, ErrUnavailable)
		case !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENXIO) || time.Now().After(end):
			return 0, fmt.Errorf("make a loop device: %w", err)
		}
	}
}

// loop is an open loop device.
type loop struct{ f *os.File }

// openLoop opens a loop device that belongs to a token, or fails with ErrGone.
func openLoop(s State, exclusive bool) (*loop, error) {
	flags := unix.O_RDONLY | unix.O_CLOEXEC
	if exclusive {
		flags |= unix.O_EXCL
	}
	fd, err := unix.Open(s.Path, flags, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO) {
		return nil, ErrGone
	}
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("it is mounted, or another program has it for itself: unmount it first: %w", ErrBusy)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: s.Path, Err: err}
	}
	l := &loop{os.NewFile(uintptr(fd), s.Path)}
	if err := l.mustBe(s.Token); err != nil {
		l.f.Close()
		return nil, err
	}
	return l, nil
}

// mustBe fails with ErrGone unless the device is marked with token.
func (l *loop) mustBe(token string) error {
	info, err := unix.IoctlLoopGetStatus64(int(l.f.Fd()))
	if errors.Is(err, unix.ENXIO) {
		return ErrGone
	}
	if err != nil {
		return fmt.Errorf("status of %s: %w", l.f.Name(), err)
	}
	name, _, _ := bytes.Cut(info.File_name[:], []byte{0})
	if string(name) != token {
		return fmt.Errorf("%s belongs to another program by now: %w", l.f.Name(), ErrGone)
	}
	return nil
}

// mark marks the device with another token.
func (l *loop) mark(token string) error {
	info, err := unix.IoctlLoopGetStatus64(int(l.f.Fd()))
	if err == nil {
		clear(info.File_name[:])
		copy(info.File_name[:len(info.File_name)-1], token)
		err = unix.IoctlLoopSetStatus64(int(l.f.Fd()), info)
	}
	if err != nil {
		return fmt.Errorf("mark %s: %w", l.f.Name(), err)
	}
	return nil
}

// clear takes the file from the device. It happens when the last program that has the
// device open closes it.
func (l *loop) clear() error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, l.f.Fd(), unix.LOOP_CLR_FD, 0); e != 0 && e != unix.ENXIO {
		return fmt.Errorf("LOOP_CLR_FD: %w", e)
	}
	return nil
}

// change gives a read-only device another file of the same size. Since Linux 6.6 a
// filesystem that is mounted on it fails afterwards, as if a disk had been changed.
func (l *loop) change(file *os.File) error {
	_, _, e := unix.Syscall(unix.SYS_IOCTL, l.f.Fd(), loopChangeFD, file.Fd())
	runtime.KeepAlive(file)
	if e != 0 {
		return fmt.Errorf("LOOP_CHANGE_FD: %w", e)
	}
	return nil
}

// direct reports whether the device reads its file with direct I/O.
func (l *loop) direct() bool {
	info, err := unix.IoctlLoopGetStatus64(int(l.f.Fd()))
	return err == nil && info.Flags&unix.LO_FLAGS_DIRECT_IO != 0
}
