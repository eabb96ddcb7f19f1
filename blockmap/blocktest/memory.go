package blocktest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"thaw/blockmap"
)

// Memory is a blockmap.WritableDevice in memory. It has holes, data that is absent until
// it is faulted in, data that only Load shows as if it were on a disk, a bound on space, a loss of power, and hooks that wait or fail. A
// write replaces a grain and never changes it in place, so a view stays what it is
// without a pin. The device still counts pins, for tests that look for views that were
// not released.
//
// Set the fields before the device is used.
type Memory struct {
	Space    int64 // bytes that grains may take, 0: no bound
	Weight   int64 // bytes that a segment of a view pins, where more than a grain
	ReadOnly bool

	OnFault    func(ctx context.Context, e blockmap.Extent) error // before a Fault
	OnLoad     func(ctx context.Context, e blockmap.Extent) bool  // before a Load shows something that View does not; false: it refuses, too
	OnWrite    func(ctx context.Context, e blockmap.Extent) error // before a WriteAt
	OnPrefetch func(e blockmap.Extent)                            // instead of a Prefetch, which makes e resident

	size, grain int64
	pinned      atomic.Int64  // segments that nobody has released
	unpinned    chan struct{} // told when there are none

	mu struct {
		sync.RWMutex
		grains  [][]byte // nil: a hole
		durable [][]byte // grains as they were at the last Flush
		absent  []bool
		cold    []bool
		used    int64    // bytes that grains take
		dirty   int      // writes that no Flush has covered
		calls   []string // the first maxCalls of what is not a read
	}
}

var _ blockmap.WritableDevice = (*Memory)(nil)

// NewMemory makes a device of size bytes, all holes and resident.
func NewMemory(size int64) *Memory { return NewGrainy(size, blockmap.BlockSize) }

// NewGrainy makes a device of size bytes whose holes are grains of that many bytes,
// of which size is a multiple. Suites of other projects want holes of 512 bytes.
func NewGrainy(size, grain int64) *Memory {
	d := &Memory{size: size, grain: grain, unpinned: make(chan struct{}, 1)}
	d.mu.grains = make([][]byte, size/grain)
	d.mu.durable = make([][]byte, size/grain)
	d.mu.absent = make([]bool, size/grain)
	d.mu.cold = make([]bool, size/grain)
	return d
}

// Fill writes p at off without a call of OnWrite, and as if it had been flushed.
func (d *Memory) Fill(p []byte, off int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.put(p, off)
	copy(d.mu.durable, d.mu.grains)
}

// Punch makes the grains of e holes, as if that had been flushed.
func (d *Memory) Punch(e blockmap.Extent) {
	d.mu.Lock()
	defer d.mu.Unlock()
	first, end := d.span(e)
	for i := first; i < end; i++ {
		d.replace(i, nil)
	}
	copy(d.mu.durable, d.mu.grains)
}

// Evict makes the data of e absent until it is faulted in, by whole grains.
func (d *Memory) Evict(e blockmap.Extent) { d.setAbsent(e, true) }

// Chill makes the data of e, by whole grains, such that View refuses it and Load shows
// it: resident, but not in memory. It stays so until it is written to, or Warm.
func (d *Memory) Chill(e blockmap.Extent) { d.setCold(e, true) }

// Warm undoes Chill.
func (d *Memory) Warm(e blockmap.Extent) { d.setCold(e, false) }

func (d *Memory) setCold(e blockmap.Extent, cold bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	first, end := d.span(e)
	for i := first; i < end; i++ {
		d.mu.cold[i] = cold
	}
}

func (d *Memory) setAbsent(e blockmap.Extent, absent bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	first, end := d.span(e)
	for i := first; i < end; i++ {
		d.mu.absent[i] = absent
	}
}

// Content is what reading e must give.
func (d *Memory) Content(e blockmap.Extent) []byte {
	d.mu.RLock()
	defer d.mu.RUnlock()
	p := make([]byte, e.Len())
	d.parts(e, func(i, at, n, from int64) {
		if b := d.mu.grains[i]; b != nil {
			copy(p[from:], b[at:at+n])
		}
	})
	return p
}

// Calls returns what was called since the last Calls, of write, zero, discard and
// flush; at most the first 1000.
func (d *Memory) Calls() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	calls := d.mu.calls
	d.mu.calls = nil
	return calls
}

// Dirty is how many writes no Flush has covered.
func (d *Memory) Dirty() int {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.mu.dirty
}

// Pins is how many segments of views are not released.
func (d *Memory) Pins() int64 { return d.pinned.Load() }

// NoPins fails t unless every view is released within a minute: a client may have
// read a reply before the server is back from sending it.
func (d *Memory) NoPins(t testing.TB) {
	t.Helper()
	timeout := time.After(time.Minute)
	for d.pinned.Load() != 0 {
		select {
		case <-d.unpinned:
		case <-timeout:
			t.Fatalf("%d segments are still pinned", d.pinned.Load())
		}
	}
}

// Crash returns the device as it is after a loss of power: each grain is what it
// was at the last Flush, or what it is now, as rng decides.
func (d *Memory) Crash(rng *rand.Rand) *Memory {
	d.mu.RLock()
	defer d.mu.RUnlock()
	after := NewGrainy(d.size, d.grain)
	after.Space = d.Space
	for i := range after.mu.grains {
		after.mu.grains[i] = d.mu.durable[i]
		if rng.IntN(2) == 0 {
			after.mu.grains[i] = d.mu.grains[i]
		}
		if after.mu.grains[i] != nil {
			after.mu.used += d.grain
		}
	}
	after.mu.durable = slices.Clone(after.mu.grains)
	return after
}

// Size implements blockmap.Device.
func (d *Memory) Size() int64 { return d.size }

// View implements blockmap.Device.
func (d *Memory) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	v, ok, _ = d.view(e, false)
	return v, ok
}

// Load implements blockmap.Device.
func (d *Memory) Load(ctx context.Context, e blockmap.Extent) (v blockmap.View, ok bool) {
	v, ok, cold := d.view(e, false)
	if ok || !cold || d.OnLoad != nil && !d.OnLoad(ctx, e) {
		return v, ok
	}
	v, ok, _ = d.view(e, true)
	return v, ok
}

// view shows e unless some of it is absent, or cold without load.
func (d *Memory) view(e blockmap.Extent, load bool) (v blockmap.View, ok, cold bool) {
	if e.Check(d.size) != nil {
		return v, false, false
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	first, end := d.span(e)
	for i := first; i < end; i++ {
		if d.absent(i) {
			return v, false, false
		}
		cold = cold || d.mu.cold[i] && d.mu.grains[i] != nil
	}
	if cold && !load {
		return v, false, true
	}
	d.parts(e, func(i, at, n, _ int64) {
		if b := d.mu.grains[i]; b != nil {
			d.pinned.Add(1)
			v.Append(b[at:at+n], d, 0)
		} else {
			v.AppendZeros(n)
		}
	})
	return v, true, false
}

// Unpin implements blockmap.Pinner.
func (d *Memory) Unpin(uint64) {
	if d.pinned.Add(-1) == 0 {
		select {
		case d.unpinned <- struct{}{}:
		default:
		}
	}
}

// Pinned implements blockmap.Pinner.
func (d *Memory) Pinned(uint64) int64 { return max(d.Weight, d.grain) }

// Damaged implements blockmap.Pinner. Memory does not fail.
func (d *Memory) Damaged(uint64) {}

// Fault implements blockmap.Device.
func (d *Memory) Fault(ctx context.Context, e blockmap.Extent) error {
	if err := e.Check(d.size); err != nil {
		return err
	}
	if d.OnFault != nil {
		if err := d.OnFault(ctx, e); err != nil {
			return err
		}
	} else if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	d.setAbsent(e, false)
	return nil
}

// Status implements blockmap.Device.
func (d *Memory) Status(e blockmap.Extent) blockmap.Status {
	st := blockmap.Status{Extent: blockmap.Range(e.Start, 0)}
	if e.Check(d.size) != nil || e.Len() == 0 {
		return st
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	first, end := d.span(e)
	last := first + 1
	hole, absent := d.mu.grains[first] == nil, d.absent(first)
	for last < end && (d.mu.grains[last] == nil) == hole && d.absent(last) == absent {
		last++
	}
	st.End = min(e.End, last*d.grain)
	st.Zero, st.Resident = hole, !absent
	return st
}

// Prefetch implements blockmap.Device.
func (d *Memory) Prefetch(e blockmap.Extent) {
	switch {
	case e.Check(d.size) != nil:
	case d.OnPrefetch != nil:
		d.OnPrefetch(e)
	default:
		d.setAbsent(e, false)
	}
}

// WriteAt implements blockmap.WritableDevice.
func (d *Memory) WriteAt(ctx context.Context, p []byte, off int64) error {
	e := blockmap.Range(off, int64(len(p)))
	if err := d.writable(e); err != nil {
		return err
	}
	if d.OnWrite != nil {
		if err := d.OnWrite(ctx, e); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.room(e); err != nil {
		return err
	}
	d.called("write")
	d.mu.dirty++
	d.put(p, off)
	return nil
}

// Zero implements blockmap.WritableDevice.
func (d *Memory) Zero(_ context.Context, e blockmap.Extent, mayDiscard bool) error {
	return d.zero("zero", e, mayDiscard)
}

// Discard implements blockmap.WritableDevice.
func (d *Memory) Discard(_ context.Context, e blockmap.Extent) error {
	return d.zero("discard", e, true)
}

func (d *Memory) zero(call string, e blockmap.Extent, mayDiscard bool) error {
	if err := d.writable(e); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !mayDiscard {
		if err := d.room(e); err != nil {
			return err
		}
	}
	d.called(call)
	d.mu.dirty++
	d.parts(e, func(i, at, n, _ int64) {
		switch {
		case n == d.grain && mayDiscard:
			d.replace(i, nil)
		case d.mu.grains[i] == nil && mayDiscard: // zeros already
		default:
			b := d.copyOf(i)
			clear(b[at : at+n])
			d.replace(i, b)
		}
	})
	return nil
}

// Flush implements blockmap.WritableDevice.
func (d *Memory) Flush(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.dirty = 0
	d.called("flush")
	copy(d.mu.durable, d.mu.grains)
	return nil
}

func (d *Memory) writable(e blockmap.Extent) error {
	if d.ReadOnly {
		return blockmap.ErrReadOnly
	}
	return e.Check(d.size)
}

// room fails unless every hole of e may become data; d.mu is held.
func (d *Memory) room(e blockmap.Extent) error {
	need := d.mu.used
	first, end := d.span(e)
	for i := first; i < end; i++ {
		if d.mu.grains[i] == nil {
			need += d.grain
		}
	}
	if d.Space > 0 && need > d.Space {
		return fmt.Errorf("write bytes %v to a device with %d of %d bytes in use: %w", e, d.mu.used, d.Space, blockmap.ErrNoSpace)
	}
	return nil
}

// maxCalls bounds what a device that nobody asks for its Calls keeps of them.
const maxCalls = 1000

// called notes a call; d.mu is held.
func (d *Memory) called(what string) {
	if len(d.mu.calls) < maxCalls {
		d.mu.calls = append(d.mu.calls, what)
	}
}

// put writes p at off; d.mu is held.
func (d *Memory) put(p []byte, off int64) {
	d.parts(blockmap.Range(off, int64(len(p))), func(i, at, n, from int64) {
		b := d.copyOf(i)
		copy(b[at:at+n], p[from:])
		d.replace(i, b)
	})
}

func (d *Memory) copyOf(i int64) []byte {
	b := make([]byte, d.grain)
	copy(b, d.mu.grains[i])
	return b
}

// replace makes b grain i, a hole if b is nil; d.mu is held.
func (d *Memory) replace(i int64, b []byte) {
	if d.mu.grains[i] != nil {
		d.mu.used -= d.grain
	}
	if b != nil {
		d.mu.used += d.grain
	}
	d.mu.grains[i], d.mu.absent[i], d.mu.cold[i] = b, false, false
}

// absent reports whether grain i has to be faulted in. A hole never has; d.mu is held.
func (d *Memory) absent(i int64) bool { return d.mu.absent[i] && d.mu.grains[i] != nil }

// span is which grains e touches. An empty e touches none.
func (d *Memory) span(e blockmap.Extent) (first, end int64) {
	if e.Len() == 0 {
		return 0, 0
	}
	return e.Start / d.grain, (e.End + d.grain - 1) / d.grain
}

// parts calls f for each grain that e touches: n bytes at at of grain i, which are
// those at from of e.
func (d *Memory) parts(e blockmap.Extent, f func(i, at, n, from int64)) {
	for off := e.Start; off < e.End; {
		at := off % d.grain
		n := min(d.grain-at, e.End-off)
		f(off/d.grain, at, n, off-e.Start)
		off += n
	}
}
