package host

import (
	"context"
	"fmt"
)

// ConflictError says that the host's devices do not allow a request now: its name is
// taken, or a client uses the device.
type ConflictError struct{ error }

func (e ConflictError) Unwrap() error { return e.error }

func conflict(format string, args ...any) error { return ConflictError{fmt.Errorf(format, args...)} }

func notAdded(id string) error {
	return InvalidError{conflict("remove device %s: it was not added, and closes when its last client leaves", id)}
}

// RemoveUnused is Remove for a device that no client has open. If a client has it open,
// RemoveUnused fails with a ConflictError and changes nothing.
func (h *Host) RemoveUnused(ctx context.Context, id string) error {
	d := h.Device(id)
	if d == nil {
		return fmt.Errorf("remove device %s: %w", id, ErrNoDevice)
	}
	switch was, users := h.devices.removeUnused(d); {
	case !was:
		return notAdded(id)
	case users > 0:
		return conflict("remove device %s: %d clients have it open; disconnect them, or drain it", id, users)
	}
	if err := h.forget(d); err != nil {
		return err
	}
	return d.awaitClosed(ctx)
}

// removeUnused undoes add, unless d has other users. It reports whether d was
// permanent.
func (t *devices) removeUnused(d *Device) (was bool, users int) {
	t.mu.Lock()
	was, users = d.permanent, d.users-1
	if !was || users > 0 {
		t.mu.Unlock()
		return was, users
	}
	d.permanent = false
	if t.mu.named[d.key()] == d {
		delete(t.mu.named, d.key())
	}
	s := d.socket
	d.socket = nil
	t.mu.Unlock()
	s.close()
	t.release(d)
	return true, 0
}

// awaitClosed waits until d, which was removed, is closed.
func (d *Device) awaitClosed(ctx context.Context) error {
	select {
	case <-d.closed:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("remove device %s: it is still in use: %w", d.id, context.Cause(ctx))
	}
}

// StopRecording ends the recording of the device's start, if there is one. It returns
// when the file is complete, or when ctx ends, and reports whether it has ended a
// recording.
func (d *Device) StopRecording(ctx context.Context) bool {
	select {
	case <-d.ready:
		return d.err == nil && d.start != nil && d.start.stopRecording(ctx)
	default:
		return false
	}
}

// SetStopping says that the host will be stopped. It opens no device from now on.
// Devices that are open or being opened stay until Stop.
func (h *Host) SetStopping() {
	h.traces.packing.stop()
	h.devices.mu.Lock()
	h.devices.mu.stopping = true
	h.devices.mu.Unlock()
	h.kept.freeze(h.devices)
}

// Stopping reports whether the host has ceased to open devices.
func (h *Host) Stopping() bool {
	h.devices.mu.Lock()
	defer h.devices.mu.Unlock()
	return h.devices.mu.stopping
}
