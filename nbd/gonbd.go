package nbd

import (
	"context"
	"io"
	"time"

	"thaw/blockmap"

	"github.com/pojntfx/go-nbd/pkg/backend"
)

// Backend makes a device a backend.Backend of go-nbd, for programs that already have a
// server of that library.
type Backend struct {
	Device  blockmap.Device
	Timeout time.Duration // for one call, 0: DefaultFaultTimeout
}

var _ backend.Backend = (*Backend)(nil)

// ReadAt reads like [io.ReaderAt]: fewer than len(p) bytes only at the end of the
// device.
func (b *Backend) ReadAt(p []byte, off int64) (int, error) {
	if err := blockmap.Range(off, 0).Check(b.Device.Size()); err != nil {
		if off >= 0 {
			err = io.EOF
		}
		return 0, err
	}
	ctx, cancel := b.context()
	defer cancel()
	e := blockmap.Range(off, min(int64(len(p)), b.Device.Size()-off))
	if err := blockmap.ReadInto(ctx, b.Device, e, p[:e.Len()]); err != nil {
		return 0, err
	}
	if e.Len() < int64(len(p)) {
		return int(e.Len()), io.EOF
	}
	return len(p), nil
}

// WriteAt writes all of p or fails.
func (b *Backend) WriteAt(p []byte, off int64) (int, error) {
	w, ok := b.Device.(blockmap.WritableDevice)
	if !ok {
		return 0, blockmap.ErrReadOnly
	}
	if err := blockmap.Range(off, int64(len(p))).Check(w.Size()); err != nil {
		return 0, err
	}
	ctx, cancel := b.context()
	defer cancel()
	if err := w.WriteAt(ctx, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Size is the length of the device.
func (b *Backend) Size() (int64, error) { return b.Device.Size(), nil }

// Sync makes durable what was written.
func (b *Backend) Sync() error {
	w, ok := b.Device.(blockmap.WritableDevice)
	if !ok {
		return nil
	}
	ctx, cancel := b.context()
	defer cancel()
	return w.Flush(ctx)
}

func (b *Backend) context() (context.Context, context.CancelFunc) {
	d := b.Timeout
	if d == 0 {
		d = DefaultFaultTimeout
	}
	return context.WithTimeout(context.Background(), d)
}
