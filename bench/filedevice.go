package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// FileDevice is a blockmap.WritableDevice over a file, in the simplest way that can be
// had: it is mapped to be read, and written with system calls. It measures a transport
// without the rest of thaw.
type FileDevice struct {
	f *os.File
	b []byte
}

var _ blockmap.WritableDevice = (*FileDevice)(nil)

// OpenFileDevice opens a file whose size is a multiple of blockmap.BlockSize.
func OpenFileDevice(path string) (*FileDevice, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && (st.Size() == 0 || st.Size()%blockmap.BlockSize != 0) {
		err = fmt.Errorf("%s has %d bytes, which is not a multiple of %d", path, st.Size(), blockmap.BlockSize)
	}
	var b []byte
	if err == nil {
		b, err = unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &FileDevice{f, b}, nil
}

// Close unmaps and closes the file.
func (d *FileDevice) Close() error { return errors.Join(unix.Munmap(d.b), d.f.Close()) }

// Size implements blockmap.Device.
func (d *FileDevice) Size() int64 { return int64(len(d.b)) }

// View implements blockmap.Device.
func (d *FileDevice) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	if e.Check(d.Size()) != nil {
		return v, false
	}
	v.Append(d.b[e.Start:e.End:e.End], nil, 0)
	return v, true
}

// Load implements blockmap.Device.
func (d *FileDevice) Load(_ context.Context, e blockmap.Extent) (blockmap.View, bool) {
	return d.View(e)
}

// Fault implements blockmap.Device.
func (d *FileDevice) Fault(_ context.Context, e blockmap.Extent) error { return e.Check(d.Size()) }

// Status implements blockmap.Device.
func (d *FileDevice) Status(e blockmap.Extent) blockmap.Status {
	if e.Check(d.Size()) != nil {
		e.End = e.Start
	}
	return blockmap.Status{Extent: e, Resident: true}
}

// Prefetch implements blockmap.Device.
func (d *FileDevice) Prefetch(blockmap.Extent) {}

// WriteAt implements blockmap.WritableDevice.
func (d *FileDevice) WriteAt(_ context.Context, p []byte, off int64) error {
	if err := blockmap.Range(off, int64(len(p))).Check(d.Size()); err != nil {
		return err
	}
	_, err := d.f.WriteAt(p, off)
	return noSpace(err)
}

// Zero implements blockmap.WritableDevice.
func (d *FileDevice) Zero(_ context.Context, e blockmap.Extent, mayDiscard bool) error {
	if mayDiscard {
		return d.allocate(e, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE)
	}
	return d.allocate(e, unix.FALLOC_FL_ZERO_RANGE)
}

// Discard implements blockmap.WritableDevice.
func (d *FileDevice) Discard(_ context.Context, e blockmap.Extent) error {
	return d.allocate(e, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE)
}

func (d *FileDevice) allocate(e blockmap.Extent, mode uint32) error {
	if err := e.Check(d.Size()); err != nil || e.Len() == 0 {
		return err
	}
	return noSpace(unix.Fallocate(int(d.f.Fd()), mode, e.Start, e.Len()))
}

// Flush implements blockmap.WritableDevice.
func (d *FileDevice) Flush(context.Context) error { return unix.Fdatasync(int(d.f.Fd())) }

func noSpace(err error) error {
	if errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("%w: %w", blockmap.ErrNoSpace, err)
	}
	return err
}
