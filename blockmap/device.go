package blockmap

import (
	"context"
	"errors"
	"fmt"
)

// BlockSize is the unit of residency and of every map in thaw: 4 KiB, the
// block of the ext4 filesystems that thaw writes and the page of the hosts
// that it runs on.
const BlockSize = 4096

// Device is the content of a block device: of fixed size, safe for concurrent
// use.
//
// Every transport serves a read in the same two steps. View hands out what is
// here, at the cost of a few loads. When it says no, Fault brings what is
// missing, on a goroutine that may wait, and View is asked again; a chunk may
// have been evicted in between, so this is a loop, which the request's context
// bounds.
type Device interface {
	// Size is the length of the device in bytes, a multiple of BlockSize.
	Size() int64

	// View returns the bytes of e without copying them and without waiting;
	// ok is false unless all of e is resident. e must lie within the device.
	// The caller releases the view, and until then its bytes stay what they
	// are.
	View(e Extent) (v View, ok bool)

	// Fault makes e resident, waiting for what must be fetched, and fails
	// with the cause. It does not promise that e is still resident when it
	// returns, only that it was.
	Fault(ctx context.Context, e Extent) error
}

// WritableDevice is a Device that takes writes. A write is seen by every View
// and read that begins after it has returned; it is durable once a Flush that
// began after it has returned.
type WritableDevice interface {
	Device
	// WriteAt writes all of p at off, or fails.
	WriteAt(ctx context.Context, p []byte, off int64) error
	// Zero makes e read as zeros. Where mayDiscard is false the space
	// stays allocated, so that a later write cannot fail for want of it.
	Zero(ctx context.Context, e Extent, mayDiscard bool) error
	// Discard says that the bytes of e are no longer wanted. What they read
	// as afterwards is not specified, only that it is not somebody else's
	// data.
	Discard(ctx context.Context, e Extent) error
	// Flush makes durable every write that returned before it was called,
	// whichever caller made it.
	Flush(ctx context.Context) error
}

// Status says what is known of a run of a device without reading it.
type Status struct {
	Extent
	Zero     bool // reads as zeros and takes no space: a hole
	Resident bool // can be read without fetching anything
}

// Errors that a transport tells apart, to map them to an errno.
var (
	ErrOutOfRange = errors.New("beyond the end of the device")
	ErrReadOnly   = errors.New("the device is read-only")
	ErrNoSpace    = errors.New("no space left")
	ErrClosed     = errors.New("closed")
	// ErrDamaged: the cache's own file could not be read. It is never a
	// request's last word: what was damaged is fetched again.
	ErrDamaged = errors.New("the cached bytes cannot be read")
)

// Extent is a half-open byte range: Start is in it, End is not.
type Extent struct{ Start, End int64 }

// Range is the extent of n bytes from off.
func Range(off, n int64) Extent { return Extent{off, off + n} }

// Len is the number of bytes in e.
func (e Extent) Len() int64 { return e.End - e.Start }

// Intersect is what e and o have in common; it is empty (Len 0) where they
// have nothing.
func (e Extent) Intersect(o Extent) Extent {
	r := Extent{max(e.Start, o.Start), min(e.End, o.End)}
	if r.End < r.Start {
		r.End = r.Start
	}
	return r
}

// Aligned is the smallest extent of whole blocks that contains e.
func (e Extent) Aligned() Extent {
	const mask = BlockSize - 1
	return Extent{e.Start &^ mask, (e.End + mask) &^ mask}
}

// Check fails with ErrOutOfRange unless e lies within a device of size bytes.
func (e Extent) Check(size int64) error {
	if e.Start < 0 || e.End < e.Start || e.End > size {
		return fmt.Errorf("bytes %v of %d: %w", e, size, ErrOutOfRange)
	}
	return nil
}

func (e Extent) String() string { return fmt.Sprintf("[%d, %d)", e.Start, e.End) }
