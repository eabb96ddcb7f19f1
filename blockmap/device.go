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
// use. An [Image] is one; so is whatever stands before one, as a recorder does.
//
// Every transport serves a read in the same way. View hands out bytes that are in
// memory at the cost of a few loads. Where View refuses, [Read] loops Load and
// Fault, on a goroutine that may wait. So a byte has one of three distances: in
// memory, resident (on the local disk, say), or absent. A transport need not know
// which: one slow read never holds up the others, wherever its bytes are.
//
// No method panics for an extent that does not lie within the device: View and Load
// refuse it, Fault fails with ErrOutOfRange, Status returns an empty run, and
// Prefetch does nothing.
type Device interface {
	// Size is the length of the device in bytes, a multiple of BlockSize.
	Size() int64

	// View returns the bytes of e without copying them and without waiting,
	// neither for a source nor for the disk; ok is false unless all of e is
	// resident and, as far as the device knows, in memory. The caller releases
	// the view. Until then its bytes stay what they are, except those that are
	// written to meanwhile: see WritableDevice.
	View(e Extent) (v View, ok bool)

	// Load is View for a caller that may wait for the disk: ok is false unless
	// all of e is resident. The view may show copies. ok is false as well where
	// ctx ends first, and where bytes cannot be read: they are absent then.
	Load(ctx context.Context, e Extent) (v View, ok bool)

	// Fault makes e resident, or fails with the cause. It waits for what must
	// be fetched, for as long as ctx allows. It does not promise that e is
	// still resident when it returns, only that e was.
	Fault(ctx context.Context, e Extent) error

	// Status describes the first run of e whose blocks are alike, without
	// reading them. The run starts where e starts, is not empty unless e is,
	// and ends within e. The next run may be like it: a device need not merge
	// neighbours.
	Status(e Extent) Status

	// Prefetch asks for e without waiting, behind every Fault. It is a hint:
	// the device may drop it, and reports no end and no failure.
	Prefetch(e Extent)
}

// AsyncDevice is a Device whose Load needs no goroutine that waits. Transports call
// [LoadAsync], which takes any Device.
type AsyncDevice interface {
	Device
	// LoadAsync begins a Load of e and returns. It calls done once, with what Load
	// would have returned: on any thread, perhaps before LoadAsync returns. done
	// must not block, and must not call the device.
	LoadAsync(e Extent, done func(v View, ok bool))
}

// LoadAsync is Load without waiting: see AsyncDevice. A device that is not one gets a
// goroutine.
func LoadAsync(d Device, e Extent, done func(v View, ok bool)) {
	if a, ok := d.(AsyncDevice); ok {
		a.LoadAsync(e, done)
		return
	}
	go func() { done(d.Load(context.Background(), e)) }()
}

// WritableDevice is a Device that takes writes. WriteAt, Zero and Discard are
// called writes below. Each acts on all of its range, or fails; a write that
// fails may have changed any part of its range. Outside the device a write fails
// with ErrOutOfRange and changes nothing.
//
// A View or read that begins after a write has returned sees it. A View or read
// that overlaps a write in time sees, byte by byte, what was there before it or
// what it has put there. The same holds for a view that is held meanwhile: a
// view does not hold up writes, and is no snapshot. So a device may map the file
// that it writes to. (A client whose read and write overlap has no claim to
// either order.) Of writes that overlap each other in time, each byte is the one
// of either. A write never changes bytes outside its range, whatever other
// writes do to the same block at the same time.
type WritableDevice interface {
	Device
	// WriteAt writes all of p at off. It keeps no reference to p.
	WriteAt(ctx context.Context, p []byte, off int64) error
	// Zero makes e read as zeros. Where mayDiscard is true, its whole blocks
	// may become holes. Where it is false, all of e keeps or gets space, so
	// that a later write there cannot fail with ErrNoSpace.
	Zero(ctx context.Context, e Extent, mayDiscard bool) error
	// Discard says that the bytes of e are no longer needed. Each of them
	// then reads as zero, or as the device has had it at that place before:
	// never as another device's data.
	Discard(ctx context.Context, e Extent) error
	// Flush makes durable every write that had returned before Flush was
	// called, whichever caller made it. A write that no Flush has covered may
	// be lost with the machine, each block of it by itself.
	Flush(ctx context.Context) error
}

// Status describes a run of blocks: a hole, resident data, or absent data.
type Status struct {
	Extent
	Zero     bool // a hole: reads as zeros and takes no space
	Resident bool // can be read without fetching anything, perhaps from the disk; true of a hole
}

// Errors that a transport tells apart, to map them to an errno.
var (
	ErrOutOfRange = errors.New("beyond the end of the device")
	ErrReadOnly   = errors.New("the device is read-only")
	ErrNoSpace    = errors.New("no space left")
	ErrClosed     = errors.New("closed")
	// ErrDamaged: a file of the cache could not be read. No request fails
	// with it: the damaged bytes are absent from then on and fetched again.
	ErrDamaged = errors.New("the cached bytes cannot be read")
)

// Extent is a half-open byte range: Start is in it, End is not.
type Extent struct{ Start, End int64 }

// Range is the extent of n bytes from off.
func Range(off, n int64) Extent { return Extent{off, off + n} }

// Len is the number of bytes in e.
func (e Extent) Len() int64 { return e.End - e.Start }

// Intersect is the part that e and o have in common; its Len is 0 where there is
// none.
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
