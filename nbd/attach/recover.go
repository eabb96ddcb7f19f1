package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// Recover goes on serving a node whose server was killed. dev has the same content as
// the device that the node was made for.
//
//   - ublk: requests that the dead server had not answered are asked again. No reader
//     and no writer sees an error; all wait from the death to Recover.
//   - nbd: the same, but a request that was in flight waits for the node's timeout,
//     which is FaultTimeout and ten seconds more. A node that was made by ioctl does not
//     go on: its requests have failed, Recover fails, and the node is to be removed.
//   - fuse: every request failed in between. A read-only node goes on, but a filesystem
//     on it has to be mounted anew: the kernel takes the disk for another one. A
//     writable node does not go on: Recover fails, and the node is to be removed.
//
// It fails with ErrGone where the node is not there any more. It waits for the dead
// process to be gone, for as long as ctx allows. Recover takes Name, FaultTimeout,
// Admission, ReadAhead and Log of o. It takes Token for a node of fuse, which gets another one:
// whoever must not leave the node behind keeps both until it has the new State.
func Recover(ctx context.Context, s State, dev blockmap.Device, o Options) (*Node, error) {
	o, err := o.fill()
	if err != nil {
		return nil, err
	}
	if err := s.here(); err != nil {
		return nil, fmt.Errorf("recover: %w", err)
	}
	if dev.Size() != s.Size {
		return nil, fmt.Errorf("recover %s: it has %d bytes, and the device %d: it is another one", s.Path, s.Size, dev.Size())
	}
	if err := s.waitUnserved(ctx); err != nil {
		return nil, fmt.Errorf("recover %s: process %d still serves it: %w", s.Path, s.PID, err)
	}
	o.ReadOnly = s.ReadOnly
	n := newNode(dev, o)
	if !s.ReadOnly && n.serving.wdev == nil {
		return nil, fmt.Errorf("recover %s: it is writable, and the device is not: %w", s.Path, blockmap.ErrReadOnly)
	}
	n.serving.protectWriters()
	n.Driver, n.Why, n.state = s.Driver, "it had this driver before", s
	switch s.Driver {
	case UBLK:
		n.driver, err = recoverUBLK(ctx, n, o)
	case NBD:
		n.driver, err = recoverNBD(ctx, n, o)
	default:
		n.driver, err = recoverFUSE(ctx, n, o)
	}
	if err != nil {
		n.serving.cancel(err)
		return nil, fmt.Errorf("recover %s: %w", s.Path, err)
	}
	n.state.serve()
	n.ready(o)
	return n, nil
}

// Remove removes a node whose server was killed and that nobody is to go on serving. It
// fails with ErrBusy where the node is mounted, and with ErrGone where there is nothing
// to remove.
func Remove(ctx context.Context, s State) error {
	if err := s.here(); err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	if s.served() {
		return fmt.Errorf("remove %s: process %d serves it: let that detach it: %w", s.Path, s.PID, ErrBusy)
	}
	var err error
	switch s.Driver {
	case UBLK:
		err = removeUBLK(ctx, s)
	case NBD:
		err = removeNBD(ctx, s)
	default:
		err = removeFUSE(ctx, s)
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", s.Path, err)
	}
	return nil
}

// notMounted fails with ErrBusy where a node is mounted. A node without a server may not
// even be opened; then it is not known, and the kernel decides. What is not below the /dev of
// this process, as in a new container, may be mounted by those who see it elsewhere.
func notMounted(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		rdev, err := sysDev(filepath.Join("/sys/block", filepath.Base(path), "dev"))
		if errors.Is(err, os.ErrNotExist) {
			return nil // the kernel has no such disk
		}
		if err == nil {
			err = unix.Mknod(path, unix.S_IFBLK|0o600, int(rdev))
		}
		switch {
		case err == nil:
			defer os.Remove(path)
		case !errors.Is(err, unix.EEXIST): // by udev, a moment later
			return fmt.Errorf("make %s, to see whether it is mounted: %w", path, err)
		}
	}
	opened := make(chan error, 1)
	go func() {
		f, err := openExclusive(path)
		if err == nil {
			err = f.Close()
		}
		opened <- err
	}()
	select {
	case err := <-opened:
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("it is mounted, or another program has it for itself: unmount it first: %w", ErrBusy)
		}
	case <-ctx.Done():
	}
	return nil
}
