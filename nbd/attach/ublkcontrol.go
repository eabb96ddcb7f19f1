package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"thaw/blockmap/uring"
)

// ublkControl gives commands to the driver. Each node has one: a command that the kernel
// never answers, which has happened on several kernels, holds up no other node.
type ublkControl struct {
	mu   sync.Mutex
	file *os.File
	ring *uring.Queues
	page []byte // mapped: the kernel reads and writes it, perhaps late
	n    uint64 // commands so far
	hung error  // no more commands
}

// ublkPatience bounds a command that waits for nobody outside the kernel.
const ublkPatience = 15 * time.Second

func openUBLK() (*ublkControl, error) {
	fd, err := unix.Open("/dev/ublk-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return nil, fmt.Errorf("/dev/ublk-control is missing: load the kernel module by `modprobe ublk_drv` (Linux 6.5 or later): %w", ErrUnavailable)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return nil, fmt.Errorf("cannot open /dev/ublk-control: %w: a container requires this device: %w", err, ErrUnavailable)
	case err != nil:
		return nil, fmt.Errorf("open /dev/ublk-control: %w", err)
	}
	c := &ublkControl{file: os.NewFile(uintptr(fd), "/dev/ublk-control")}
	if c.ring, err = uring.Open(uring.Setup{Entries: 8, Large: true}); err != nil {
		c.file.Close()
		if errors.Is(err, errors.ErrUnsupported) {
			return nil, fmt.Errorf("ublk requires io_uring: %w: %w", err, ErrUnavailable)
		}
		return nil, err
	}
	if c.page, err = unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE); err != nil {
		c.close()
		return nil, fmt.Errorf("map a page: %w", err)
	}
	return c, nil
}

func (c *ublkControl) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ring.Close()
	c.file.Close()
	if c.page != nil && c.hung == nil { // the kernel may still write to it otherwise
		_ = unix.Munmap(c.page)
		c.page = nil
	}
	if c.hung == nil {
		c.hung = os.ErrClosed
	}
}

// waits reports whether the kernel is still at an earlier command.
func (c *ublkControl) waits() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.hung != nil && c.hung != os.ErrClosed
}

// put copies a structure to the page for the next command.
func put[T any](c *ublkControl, v *T) { *(*T)(unsafe.Pointer(&c.page[0])) = *v }

// get copies a structure that a command has left in the page.
func get[T any](c *ublkControl, v *T) { *v = *(*T)(unsafe.Pointer(&c.page[0])) }

// exchange gives a command with a structure, which the kernel may change.
func exchange[T any](ctx context.Context, c *ublkControl, what string, op, id uint32, v *T, size int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.hung != nil {
		return c.hung
	}
	put(c, v)
	cmd := ublkCommand{devID: id, queueID: ublkNoQueue, len: uint16(size), addr: uint64(uintptr(unsafe.Pointer(&c.page[0])))}
	if err := c.do(ctx, what, op, cmd, ublkPatience); err != nil {
		return err
	}
	get(c, v)
	return nil
}

// command gives a command with a number.
func (c *ublkControl) command(ctx context.Context, what string, op, id uint32, data uint64, patience time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.hung != nil {
		return c.hung
	}
	return c.do(ctx, what, op, ublkCommand{devID: id, queueID: ublkNoQueue, data: data}, patience)
}

// do gives a command, and waits for its end for as long as patience and ctx allow. After
// that c takes no more: the kernel is still at it. c.mu is held.
func (c *ublkControl) do(ctx context.Context, what string, op uint32, cmd ublkCommand, patience time.Duration) error {
	c.n++
	e := c.ring.Next()
	e.Op, e.FD, e.Off, e.UserData = uring.OpCommand, int32(c.file.Fd()), uint64(op), c.n
	*(*ublkCommand)(unsafe.Pointer(&e.Command)) = cmd
	for end := time.Now().Add(patience); ; {
		left := time.Until(end)
		if left <= 0 || ctx.Err() != nil {
			if left <= 0 {
				c.hung = fmt.Errorf("ublk: the kernel does not answer %s within %v; it may need a restart of the machine to give up the device", what, patience)
			} else {
				c.hung = fmt.Errorf("ublk: waiting for %s: %w", what, context.Cause(ctx))
			}
			return c.hung
		}
		if err := c.ring.EnterFor(min(left, 50*time.Millisecond)); err != nil {
			return fmt.Errorf("ublk: %s: %w", what, err)
		}
		for done, ok := c.ring.Reap(); ok; done, ok = c.ring.Reap() {
			if done.UserData != c.n {
				continue
			}
			if done.Result < 0 {
				return fmt.Errorf("ublk: %s: %w", what, unix.Errno(-done.Result))
			}
			return nil
		}
	}
}

// features asks what the kernel's driver can do.
func (c *ublkControl) features(ctx context.Context) (uint64, error) {
	var f uint64
	err := exchange(ctx, c, "GET_FEATURES", ublkGetFeatures, ^uint32(0), &f, 8)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODEV):
		return 0, fmt.Errorf("ublk of this kernel is older than Linux 6.5: %w: %w", err, ErrUnavailable)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return 0, fmt.Errorf("ublk requires CAP_SYS_ADMIN: %w: %w", err, ErrUnavailable)
	case err != nil:
		return 0, err
	case f&ublkFNeeded != ublkFNeeded:
		return 0, fmt.Errorf("ublk of this kernel lacks USER_COPY (it has the features %#x): it requires Linux 6.5: %w", f, ErrUnavailable)
	}
	return f, nil
}

// info asks for the description of a device.
func (c *ublkControl) info(ctx context.Context, id uint32) (i ublkInfo, err error) {
	i.devID = id
	err = exchange(ctx, c, "GET_DEV_INFO", ublkGetInfo, id, &i, int(unsafe.Sizeof(i)))
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
		return i, fmt.Errorf("%w: %w", err, ErrGone)
	}
	return i, err
}

// stop takes the disk from the kernel. Requests in flight are waited for.
func (c *ublkControl) stop(ctx context.Context, id uint32) error {
	err := c.command(ctx, "STOP_DEV", ublkStop, id, 0, ublkPatience)
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// remove deletes a device that was stopped. A program that still has it open keeps its
// number in use until it closes it. Before Linux 6.9 that is waited for.
func (c *ublkControl) remove(ctx context.Context, id uint32) error {
	err := c.command(ctx, "DEL_DEV_ASYNC", ublkDeleteAsync, id, 0, ublkPatience)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		if err = c.command(ctx, "DEL_DEV", ublkDelete, id, 0, ublkPatience); err != nil && c.hung != nil {
			return fmt.Errorf("another program has the device open, and the kernel removes it when that closes it: %w", err)
		}
	}
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}
