package flatten

import (
	"context"
	"errors"
	"fmt"
	"io"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

// Dirty says what to do with a filesystem that is in use, or was when its machine
// stopped. An image of it needs a recovery at each start.
type Dirty int

// What to do with a dirty filesystem.
const (
	// RefuseDirty fails with ErrDirty.
	RefuseDirty Dirty = iota
	// ReplayJournal replays the journal of the filesystem, as a mount does.
	ReplayJournal
	// CrashConsistent takes the device as it is: as after a loss of power.
	CrashConsistent
)

// ErrDirty means that a filesystem is dirty, and that this was not allowed.
var ErrDirty = errors.New("the filesystem is dirty")

// Settled says what Settle has found and done.
type Settled struct {
	Ext4     bool // the device has an ext4 filesystem
	Dirty    bool // it was dirty
	Replayed ext4.Replayed
}

// Settle brings the filesystem on d to the state that how asks for. write, called only
// if the journal is replayed, returns the device to write to, which may be d or lie on
// top of it. Content that is no ext4 is left alone.
func Settle(ctx context.Context, d blockmap.Device, how Dirty, write func() (blockmap.WritableDevice, error)) (Settled, error) {
	at := deviceAt{ctx, d}
	st, err := ext4.ReadState(at)
	switch {
	case errors.Is(err, ext4.ErrNotExt4):
		return Settled{}, nil
	case how == CrashConsistent:
		return Settled{Ext4: true, Dirty: err != nil || st.Dirty()}, nil
	case err != nil:
		return Settled{}, fmt.Errorf("%w: %w", ErrDirty, err)
	}
	s := Settled{Ext4: true, Dirty: st.Dirty()}
	if !s.Dirty {
		return s, nil
	}
	if how == RefuseDirty {
		return s, fmt.Errorf("%w: %s", ErrDirty, st)
	}
	w, err := write()
	if err != nil {
		return s, err
	}
	if s.Replayed, err = ext4.Replay(deviceAt{ctx, w}, d.Size()); err != nil {
		return s, err
	}
	if st, err = ext4.ReadState(deviceAt{ctx, w}); err != nil {
		return s, err
	}
	if st.Dirty() {
		return s, fmt.Errorf("%w after the replay of its journal: %s", ErrDirty, st)
	}
	return s, nil
}

// deviceAt is a device for package ext4.
type deviceAt struct {
	ctx context.Context
	d   blockmap.Device
}

// ReaderAt reads a device. Reads fail when ctx ends.
func ReaderAt(ctx context.Context, d blockmap.Device) io.ReaderAt { return deviceAt{ctx, d} }

func (a deviceAt) ReadAt(p []byte, off int64) (int, error) {
	size := a.d.Size()
	if off < 0 || off >= size {
		return 0, io.EOF
	}
	n := min(int64(len(p)), size-off)
	if err := blockmap.ReadInto(a.ctx, a.d, blockmap.Range(off, n), p[:n]); err != nil {
		return 0, err
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

func (a deviceAt) WriteAt(p []byte, off int64) (int, error) {
	w, ok := a.d.(blockmap.WritableDevice)
	if !ok {
		return 0, blockmap.ErrReadOnly
	}
	if err := w.WriteAt(a.ctx, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (a deviceAt) Flush() error {
	w, ok := a.d.(blockmap.WritableDevice)
	if !ok {
		return blockmap.ErrReadOnly
	}
	return w.Flush(a.ctx)
}
