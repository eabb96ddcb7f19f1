package nbd

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"thaw/blockmap"
)

// memDevice is a writable device in memory, with holes, with blocks that are
// not resident before they are faulted in, and with hooks that wait or fail. A
// block is never changed in place: a write puts a new one, so that views stay
// what they are.
type memDevice struct {
	size   int64
	weight int64 // what a segment pins, if more than a block

	// Hooks; set them before the device is served.
	onFault func(ctx context.Context, e blockmap.Extent) error
	onWrite func(ctx context.Context, e blockmap.Extent) error

	pinned   atomic.Int64  // segments that nobody has released
	unpinned chan struct{} // told when there are none

	mu struct {
		sync.RWMutex
		blocks  [][]byte // nil: a hole
		absent  []bool
		dirty   int // writes that no flush has covered
		flushes int
		calls   []string // of what is not a read
	}
}

func newMemDevice(size int64) *memDevice {
	d := &memDevice{size: size, unpinned: make(chan struct{}, 1)}
	d.mu.blocks = make([][]byte, size/blockmap.BlockSize)
	d.mu.absent = make([]bool, size/blockmap.BlockSize)
	return d
}

// newPatternDevice is full of data that tells where it belongs, but for holes
// in every fourth block.
func newPatternDevice(size int64) *memDevice {
	d := newMemDevice(size)
	for i := range d.mu.blocks {
		if i%4 != 3 {
			d.mu.blocks[i] = pattern(int64(i)*blockmap.BlockSize, blockmap.BlockSize)
		}
	}
	return d
}

// pattern is what newPatternDevice holds at off, were there no holes.
func pattern(off, n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		at := uint64(off) + uint64(i)
		p[i] = byte(at*2654435761>>13) | 1
	}
	return p
}

// content is what reading e must give.
func (d *memDevice) content(e blockmap.Extent) []byte {
	d.mu.RLock()
	defer d.mu.RUnlock()
	p := make([]byte, e.Len())
	for off := e.Start; off < e.End; {
		i, at := off/blockmap.BlockSize, off%blockmap.BlockSize
		n := min(blockmap.BlockSize-at, e.End-off)
		if b := d.mu.blocks[i]; b != nil {
			copy(p[off-e.Start:], b[at:at+n])
		}
		off += n
	}
	return p
}

// evict makes blocks absent until they are faulted in.
func (d *memDevice) evict(e blockmap.Extent) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e = e.Aligned()
	for i := e.Start / blockmap.BlockSize; i < e.End/blockmap.BlockSize; i++ {
		d.mu.absent[i] = true
	}
}

func (d *memDevice) Size() int64 { return d.size }

func (d *memDevice) Pinned(uint64) int64 { return max(d.weight, blockmap.BlockSize) }
func (d *memDevice) Damaged(uint64)      {}

func (d *memDevice) Unpin(uint64) {
	if d.pinned.Add(-1) == 0 {
		select {
		case d.unpinned <- struct{}{}:
		default:
		}
	}
}

func (d *memDevice) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	if err := e.Check(d.size); err != nil || e.Len() == 0 {
		panic("View of " + e.String())
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	a := e.Aligned()
	for i := a.Start / blockmap.BlockSize; i < a.End/blockmap.BlockSize; i++ {
		if d.mu.absent[i] {
			return blockmap.View{}, false
		}
	}
	for off := e.Start; off < e.End; {
		i, at := off/blockmap.BlockSize, off%blockmap.BlockSize
		n := min(blockmap.BlockSize-at, e.End-off)
		if b := d.mu.blocks[i]; b != nil {
			d.pinned.Add(1)
			v.Append(b[at:at+n], d, 0)
		} else {
			v.AppendZeros(n)
		}
		off += n
	}
	return v, true
}

func (d *memDevice) Fault(ctx context.Context, e blockmap.Extent) error {
	if d.onFault != nil {
		if err := d.onFault(ctx, e); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	a := e.Aligned()
	for i := a.Start / blockmap.BlockSize; i < a.End/blockmap.BlockSize; i++ {
		d.mu.absent[i] = false
	}
	return nil
}

func (d *memDevice) Status(e blockmap.Extent) blockmap.Status {
	d.mu.RLock()
	defer d.mu.RUnlock()
	at := func(off int64) (zero, resident bool) {
		i := off / blockmap.BlockSize
		return d.mu.blocks[i] == nil, !d.mu.absent[i]
	}
	st := blockmap.Status{Extent: e}
	st.Zero, st.Resident = at(e.Start)
	for off := e.Start - e.Start%blockmap.BlockSize; off < e.End; off += blockmap.BlockSize {
		if z, r := at(off); z != st.Zero || r != st.Resident {
			st.End = off
			break
		}
	}
	return st
}

func (d *memDevice) WriteAt(ctx context.Context, p []byte, off int64) error {
	e := blockmap.Range(off, int64(len(p)))
	if d.onWrite != nil {
		if err := d.onWrite(ctx, e); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.dirty++
	d.mu.calls = append(d.mu.calls, "write")
	for len(p) > 0 {
		i, at := off/blockmap.BlockSize, off%blockmap.BlockSize
		b := make([]byte, blockmap.BlockSize)
		copy(b, d.mu.blocks[i])
		n := copy(b[at:], p)
		d.mu.blocks[i] = b
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (d *memDevice) Zero(ctx context.Context, e blockmap.Extent, mayDiscard bool) error {
	return d.zero("zero", e, mayDiscard)
}

func (d *memDevice) Discard(ctx context.Context, e blockmap.Extent) error {
	return d.zero("discard", e, true)
}

func (d *memDevice) zero(call string, e blockmap.Extent, mayDiscard bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.dirty++
	d.mu.calls = append(d.mu.calls, call)
	for off := e.Start; off < e.End; {
		i, at := off/blockmap.BlockSize, off%blockmap.BlockSize
		n := min(blockmap.BlockSize-at, e.End-off)
		if n == blockmap.BlockSize && mayDiscard {
			d.mu.blocks[i] = nil
		} else {
			b := make([]byte, blockmap.BlockSize)
			copy(b, d.mu.blocks[i])
			clear(b[at : at+n])
			d.mu.blocks[i] = b
		}
		off += n
	}
	return nil
}

func (d *memDevice) Flush(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.dirty = 0
	d.mu.flushes++
	d.mu.calls = append(d.mu.calls, "flush")
	return nil
}

// flushed returns how often the device was flushed, and the writes since.
func (d *memDevice) flushed() (flushes, dirty int) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.mu.flushes, d.mu.dirty
}

// noPins fails t unless every view is released, at the latest in a moment: a
// reply may be read before its sender is back from sending it.
func (d *memDevice) noPins(t testing.TB) {
	t.Helper()
	timeout := time.After(10 * time.Second)
	for d.pinned.Load() != 0 {
		select {
		case <-d.unpinned:
		case <-timeout:
			t.Fatalf("%d segments are still pinned", d.pinned.Load())
		}
	}
}

// readOnly hides the writes of a device, and keeps its Status.
type readOnly struct{ d *memDevice }

func (r readOnly) Size() int64                                        { return r.d.Size() }
func (r readOnly) View(e blockmap.Extent) (blockmap.View, bool)       { return r.d.View(e) }
func (r readOnly) Fault(ctx context.Context, e blockmap.Extent) error { return r.d.Fault(ctx, e) }
func (r readOnly) Status(e blockmap.Extent) blockmap.Status           { return r.d.Status(e) }

// plain has the three methods of a Device and no more.
type plain struct{ d *memDevice }

func (r plain) Size() int64                                        { return r.d.Size() }
func (r plain) View(e blockmap.Extent) (blockmap.View, bool)       { return r.d.View(e) }
func (r plain) Fault(ctx context.Context, e blockmap.Extent) error { return r.d.Fault(ctx, e) }

var errBroken = errors.New("fetch chunk 7 of layer 3: connection refused")
