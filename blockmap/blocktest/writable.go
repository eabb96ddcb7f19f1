package blocktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"thaw/blockmap"
)

// Writable is what TestWritableDevice puts to the test.
type Writable struct {
	// Open makes a new device, cold, whose content is Content: at least 64
	// blocks, some of them holes and some not. It is called more than once.
	Open    func(t *testing.T) blockmap.WritableDevice
	Content []byte

	// Crash ends d as a loss of power does, and opens what is left of it. Nil:
	// this is not tested.
	Crash func(t *testing.T, d blockmap.WritableDevice) blockmap.WritableDevice
	// Limited is Open for a device that has room for at least that many bytes
	// of new data, and for less than all of its size. Nil: this is not tested.
	Limited func(t *testing.T, room int64) blockmap.WritableDevice
	// ReadOnly is Open for a device that refuses writes. Nil: this is not tested.
	ReadOnly func(t *testing.T) blockmap.WritableDevice

	// Seed repeats the random sequences of a run that has failed; it printed
	// its seed. 0: a new one.
	Seed uint64
}

// TestWritableDevice puts a device through what every blockmap.WritableDevice must
// do, as a Device and as one that takes writes.
func TestWritableDevice(t *testing.T, w Writable) {
	t.Run("Device", func(t *testing.T) {
		TestDevice(t, w.Content, func(t *testing.T) blockmap.Device { return w.Open(t) })
	})
	t.Run("Write", w.write)
	t.Run("PartBlocks", w.partBlocks)
	t.Run("Zero", w.zero)
	t.Run("Discard", w.discard)
	t.Run("WriteOutOfRange", w.outOfRange)
	t.Run("HeldViews", w.heldViews)
	t.Run("DisjointWriters", w.disjoint)
	t.Run("OverlappingWriters", w.overlapping)
	t.Run("CancelledWrites", w.cancelled)
	t.Run("Flush", w.flush)
	if w.Limited != nil {
		t.Run("NoSpace", w.noSpace)
	}
	if w.ReadOnly != nil {
		t.Run("WriteReadOnly", w.readOnly)
	}
	t.Run("Random", w.random)
}

const blockSize = blockmap.BlockSize

// open opens a device with a model of it.
func (w Writable) open(t *testing.T) (blockmap.WritableDevice, *model) {
	t.Helper()
	return w.Open(t), newModel(w.Content)
}

// aCtx bounds what the calls of a test take.
func aCtx(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// filled is n bytes that no other call returns, as far as bytes can tell.
//
//go:norace
func filled(rng *rand.Rand, n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

// A write is seen by the next view and read, and changes nothing else.
func (w Writable) write(t *testing.T) {
	d, m := w.open(t)
	ctx := aCtx(t)
	rng := rand.New(rand.NewPCG(1, 11))
	for _, e := range extents(rng, d.Size(), 60) {
		p := filled(rng, e.Len())
		if err := d.WriteAt(ctx, p, e.Start); err != nil {
			t.Fatalf("write %v: %v", e, err)
		}
		m.write(p, e.Start)
		clear(p) // the device has kept no reference to it
		m.check(t, d, e)
		m.check(t, d, around(e, d.Size()))
		// Written bytes are resident.
		if v, ok := d.Load(ctx, e); !ok {
			t.Errorf("%v was written and is not resident", e)
		} else {
			v.Release()
		}
		if st := d.Status(e); st.Start != e.Start || !st.Resident || st.Zero || st.Len() <= 0 {
			t.Errorf("the status of what was written at %v is %+v", e, st)
		}
	}
	m.check(t, d, blockmap.Range(0, d.Size()))
	if err := d.WriteAt(ctx, nil, 5); err != nil {
		t.Errorf("write nothing: %v", err)
	}
	if err := d.WriteAt(ctx, nil, d.Size()); err != nil {
		t.Errorf("write nothing at the end: %v", err)
	}
}

// around is e with the blocks before and after it.
func around(e blockmap.Extent, size int64) blockmap.Extent {
	a := e.Aligned()
	return blockmap.Extent{Start: max(a.Start-blockSize, 0), End: min(a.End+blockSize, size)}
}

// A write to a part of a block leaves the rest of it, whether the block was data, a
// hole, absent, or has been written before.
func (w Writable) partBlocks(t *testing.T) {
	d, m := w.open(t)
	ctx := aCtx(t)
	rng := rand.New(rand.NewPCG(2, 11))
	if !holey(d) {
		t.Error("the device has no hole, or nothing else: this tests too little")
	}
	for block := int64(0); block < d.Size()/blockSize-1; block++ {
		for _, e := range []blockmap.Extent{
			blockmap.Range(block*blockSize+rng.Int64N(blockSize), 1),
			blockmap.Range(block*blockSize, 1+rng.Int64N(blockSize-1)),
			blockmap.Range(block*blockSize+1+rng.Int64N(blockSize-1), blockSize), // of two blocks
		} {
			p := filled(rng, e.Len())
			if err := d.WriteAt(ctx, p, e.Start); err != nil {
				t.Fatalf("write %v: %v", e, err)
			}
			m.write(p, e.Start)
			m.check(t, d, around(e, d.Size()))
			if t.Failed() {
				return
			}
		}
	}
}

// holey reports whether d has holes and data.
func holey(d blockmap.Device) bool {
	var holes, data bool
	for e := blockmap.Range(0, d.Size()); e.Len() > 0; {
		st := d.Status(e)
		holes, data = holes || st.Zero, data || !st.Zero
		e.Start = max(st.End, e.Start+1)
	}
	return holes && data
}

// Zeroed bytes read as zeros. They keep their space unless mayDiscard is true.
func (w Writable) zero(t *testing.T) {
	for _, mayDiscard := range []bool{true, false} {
		t.Run(fmt.Sprintf("mayDiscard=%v", mayDiscard), func(t *testing.T) {
			d, m := w.open(t)
			ctx := aCtx(t)
			rng := rand.New(rand.NewPCG(3, 11))
			for i, e := range extents(rng, d.Size(), 60) {
				if i%3 == 0 {
					p := filled(rng, e.Len())
					if err := d.WriteAt(ctx, p, e.Start); err != nil {
						t.Fatalf("write %v: %v", e, err)
					}
					m.write(p, e.Start)
				}
				if err := d.Zero(ctx, e, mayDiscard); err != nil {
					t.Fatalf("zero %v: %v", e, err)
				}
				m.zero(e)
				m.check(t, d, around(e, d.Size()))
				for at := e.Start; at < e.End; {
					st := d.Status(blockmap.Extent{Start: at, End: e.End})
					if st.Len() <= 0 {
						t.Fatalf("the status at %d is %+v", at, st)
					}
					if st.Zero && !mayDiscard {
						t.Errorf("%v is a hole after Zero without mayDiscard", st.Extent)
					}
					if !st.Resident {
						t.Errorf("%v was zeroed and has to be fetched", st.Extent)
					}
					at = st.End
				}
			}
			m.check(t, d, blockmap.Range(0, d.Size()))
			if err := d.Zero(ctx, blockmap.Range(d.Size(), 0), mayDiscard); err != nil {
				t.Errorf("zero nothing at the end: %v", err)
			}
		})
	}
}

// Discarded bytes read as zeros or as earlier content, and take writes again.
func (w Writable) discard(t *testing.T) {
	d, m := w.open(t)
	ctx := aCtx(t)
	rng := rand.New(rand.NewPCG(4, 11))
	for i, e := range extents(rng, d.Size(), 60) {
		if i%2 == 0 {
			p := filled(rng, e.Len())
			if err := d.WriteAt(ctx, p, e.Start); err != nil {
				t.Fatalf("write %v: %v", e, err)
			}
			m.write(p, e.Start)
		}
		if err := d.Discard(ctx, e); err != nil {
			t.Fatalf("discard %v: %v", e, err)
		}
		m.discard(e)
		m.check(t, d, around(e, d.Size()))
		part := blockmap.Range(e.Start+rng.Int64N(e.Len()), 1)
		p := filled(rng, 1)
		if err := d.WriteAt(ctx, p, part.Start); err != nil {
			t.Fatalf("write to what was discarded: %v", err)
		}
		m.write(p, part.Start)
		m.check(t, d, around(part, d.Size()))
	}
	m.check(t, d, blockmap.Range(0, d.Size()))
}

// Writes that reach beyond the device fail, and change nothing.
func (w Writable) outOfRange(t *testing.T) {
	d, m := w.open(t)
	ctx := aCtx(t)
	size := d.Size()
	for _, off := range []int64{-1, -1 << 62, size - 50, size, size + 1, 1<<63 - 50} {
		if err := d.WriteAt(ctx, bytes.Repeat([]byte{0xee}, 100), off); !errors.Is(err, blockmap.ErrOutOfRange) {
			t.Errorf("write 100 bytes at %d: %v", off, err)
		}
	}
	for _, e := range []blockmap.Extent{
		{Start: -1, End: 1}, {Start: size - 1, End: size + 1}, {Start: size + 1, End: size + 2}, {Start: 5, End: 4}, {Start: 0, End: 1<<63 - 1},
	} {
		for call, err := range map[string]error{
			"zero": d.Zero(ctx, e, false), "zero and discard": d.Zero(ctx, e, true), "discard": d.Discard(ctx, e),
		} {
			if !errors.Is(err, blockmap.ErrOutOfRange) {
				t.Errorf("%s %v: %v", call, e, err)
			}
		}
	}
	m.check(t, d, blockmap.Range(0, size))
}

// A view that is held over a write shows each byte as it was before or as it is after,
// and stays readable. Bytes that were not written stay the same.
func (w Writable) heldViews(t *testing.T) {
	d, m := w.open(t)
	ctx := aCtx(t)
	rng := rand.New(rand.NewPCG(5, 11))
	writes := map[string]func(e blockmap.Extent) error{
		"write": func(e blockmap.Extent) error {
			p := filled(rng, e.Len())
			m.write(p, e.Start)
			return d.WriteAt(ctx, p, e.Start)
		},
		"zero":             func(e blockmap.Extent) error { m.zero(e); return d.Zero(ctx, e, false) },
		"zero and discard": func(e blockmap.Extent) error { m.zero(e); return d.Zero(ctx, e, true) },
		"discard":          func(e blockmap.Extent) error { m.discard(e); return d.Discard(ctx, e) },
	}
	for _, name := range []string{"write", "zero", "zero and discard", "discard"} {
		for _, e := range extents(rng, d.Size(), 20) {
			shown := around(e, d.Size())
			before := m.snapshot(shown)
			v, err := blockmap.Read(ctx, d, shown)
			if err != nil {
				t.Fatalf("read %v: %v", shown, err)
			}
			if err := writes[name](e); err != nil {
				v.Release()
				t.Fatalf("%s %v: %v", name, e, err)
			}
			got := make([]byte, v.Len())
			err = v.CopyTo(got)
			v.Release()
			if err != nil {
				t.Fatalf("a view that was held over a %s cannot be read: %v", name, err)
			}
			for i, b := range got {
				if at := shown.Start + int64(i); !before.now[i].has(b) && !m.now[at].has(b) {
					t.Fatalf("a view that was held over a %s of %v shows %#x at %d: neither old nor new", name, e, b, at)
				}
			}
			m.check(t, d, shown)
		}
	}
}

// Writers that share blocks, but no bytes, do not lose each other's bytes.
func (w Writable) disjoint(t *testing.T) {
	d, m := w.open(t)
	ctx := aCtx(t)
	const writers, stripe = 8, 700 // a block has the stripes of several
	size := min(d.Size(), 64*blockSize)
	var wg sync.WaitGroup
	start := m.snapshot(blockmap.Range(0, size))
	for i := range int64(writers) {
		mine := start.snapshot(blockmap.Range(0, size))
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 12))
			for off := i * stripe; off+stripe <= size; off += writers * stripe {
				e := blockmap.Range(off, stripe)
				for range 3 {
					p := filled(rng, stripe)
					if err := d.WriteAt(ctx, p, off); err != nil {
						t.Errorf("write %v: %v", e, err)
						return
					}
					mine.write(p, off)
				}
				if rng.IntN(4) == 0 {
					if err := d.Zero(ctx, e, rng.IntN(2) == 0); err != nil {
						t.Errorf("zero %v: %v", e, err)
						return
					}
					mine.zero(e)
				}
				mine.check(t, d, e)
			}
			// No other writer has these bytes, so the models can be joined.
			for off := i * stripe; off+stripe <= size; off += writers * stripe {
				e := blockmap.Range(off, stripe)
				copy(m.of(e), mine.of(e))
			}
		})
	}
	wg.Wait()
	m.check(t, d, blockmap.Range(0, d.Size()))
}

// After overlapping writes each byte is that of one of them, for readers meanwhile too,
// and no other byte changes.
func (w Writable) overlapping(t *testing.T) {
	d, m := w.open(t)
	ctx := aCtx(t)
	const writers = 4
	rng := rand.New(rand.NewPCG(6, 11))
	for _, e := range extents(rng, d.Size(), 20) {
		meanwhile := m.snapshot(around(e, d.Size()))
		clear(m.of(e))
		var payloads [writers][]byte
		for i := range payloads {
			payloads[i] = bytes.Repeat([]byte{byte(rng.Uint32())&^3 | byte(i)}, int(e.Len()))
			meanwhile.may(payloads[i], e.Start)
			m.may(payloads[i], e.Start)
		}
		var wg sync.WaitGroup
		for _, p := range payloads {
			wg.Go(func() {
				for range 5 {
					if err := d.WriteAt(ctx, p, e.Start); err != nil {
						t.Errorf("write %v: %v", e, err)
					}
				}
			})
		}
		for range 2 {
			wg.Go(func() {
				for range 5 {
					meanwhile.check(t, d, around(e, d.Size()))
				}
			})
		}
		wg.Wait()
		m.check(t, d, around(e, d.Size()))
		if t.Failed() {
			return
		}
	}
	m.check(t, d, blockmap.Range(0, d.Size()))
}

// A write whose ctx has ended fails or is done, and the device takes others.
func (w Writable) cancelled(t *testing.T) {
	d, m := w.open(t)
	ended, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("the writer has gone"))
	end := time.AfterFunc(5*time.Minute, func() { panic("a write does not return although its context has ended") })
	defer end.Stop()
	rng := rand.New(rand.NewPCG(7, 11))
	for _, e := range extents(rng, d.Size(), 20) {
		p := filled(rng, e.Len())
		if err := d.WriteAt(ended, p, e.Start); err == nil {
			m.write(p, e.Start)
		} else {
			m.may(p, e.Start)
		}
		if err := d.Zero(ended, e, true); err == nil {
			m.zero(e)
		} else {
			m.may(make([]byte, e.Len()), e.Start)
		}
		m.check(t, d, e)
	}
	_ = d.Flush(ended)
	p := filled(rng, d.Size())
	if err := d.WriteAt(aCtx(t), p, 0); err != nil {
		t.Errorf("write after writes that were cancelled: %v", err)
	}
	m.write(p, 0)
	m.check(t, d, blockmap.Range(0, d.Size()))
}

// Flushed writes outlive a loss of power, whichever goroutine made them. Each block of
// a write that was not flushed may be lost by itself.
func (w Writable) flush(t *testing.T) {
	d, m := w.open(t)
	ctx := aCtx(t)
	if w.Crash == nil {
		if err := d.Flush(ctx); err != nil {
			t.Errorf("flush: %v", err)
		}
		return
	}
	rng := rand.New(rand.NewPCG(8, 11))
	for range 5 {
		for _, e := range extents(rng, d.Size(), 6) {
			m.random(t, ctx, d, e, rng)
		}
		if err := d.Flush(ctx); err != nil {
			t.Fatalf("flush: %v", err)
		}
		m.flush()
		for _, e := range extents(rng, d.Size(), 3) {
			m.random(t, ctx, d, e, rng)
		}
		d = w.Crash(t, d)
		m.crash(t, d)
		if t.Failed() {
			return
		}
	}
	// One flush covers the writes of all goroutines before it.
	var wg sync.WaitGroup
	p := filled(rng, 16*blockSize)
	for i := range 16 {
		wg.Go(func() {
			if err := d.WriteAt(ctx, p[i*blockSize:][:blockSize], int64(i)*blockSize); err != nil {
				t.Errorf("write: %v", err)
			}
		})
	}
	wg.Wait()
	m.write(p, 0)
	if err := d.Flush(ctx); err != nil {
		t.Fatalf("flush: %v", err)
	}
	m.flush()
	m.crash(t, w.Crash(t, d))
}

// A full device fails with ErrNoSpace. It still reads, and writes to blocks that have
// space.
func (w Writable) noSpace(t *testing.T) {
	ctx := aCtx(t)
	const room = 16 * blockSize
	d, m := w.Limited(t, room), newModel(w.Content)
	rng := rand.New(rand.NewPCG(9, 11))
	// Zeros reserve space for later writes.
	reserved := blockmap.Range(0, 8*blockSize)
	if err := d.Zero(ctx, reserved, false); err != nil {
		t.Fatalf("zero %v within the room of %d: %v", reserved, room, err)
	}
	m.zero(reserved)
	full := false
	for at := reserved.End; at < d.Size() && !full; at += blockSize {
		p := filled(rng, blockSize)
		switch err := d.WriteAt(ctx, p, at); {
		case err == nil:
			m.write(p, at)
		case errors.Is(err, blockmap.ErrNoSpace):
			m.may(p, at)
			full = true
			if at < room {
				t.Errorf("no space at %d, where there is room for %d bytes", at, room)
			}
		default:
			t.Fatalf("write at %d: %v", at, err)
		}
	}
	if !full {
		t.Fatal("a device with limited room took writes to all of its blocks")
	}
	m.check(t, d, blockmap.Range(0, d.Size()))
	p := filled(rng, room)
	if err := d.WriteAt(ctx, p, 0); err != nil {
		t.Errorf("write to blocks that have their space: %v", err)
	} else {
		m.write(p, 0)
	}
	if err := d.Flush(ctx); err != nil {
		t.Errorf("flush: %v", err)
	}
	m.check(t, d, blockmap.Range(0, d.Size()))
}

// A read-only device fails each write with ErrReadOnly, and serves reads.
func (w Writable) readOnly(t *testing.T) {
	d := w.ReadOnly(t)
	ctx := aCtx(t)
	for call, err := range map[string]error{
		"write": d.WriteAt(ctx, make([]byte, 100), 50), "zero": d.Zero(ctx, blockmap.Range(0, blockSize), false),
		"zero and discard": d.Zero(ctx, blockmap.Range(0, blockSize), true), "discard": d.Discard(ctx, blockmap.Range(0, blockSize)),
	} {
		if !errors.Is(err, blockmap.ErrReadOnly) {
			t.Errorf("%s: %v", call, err)
		}
	}
	if err := d.Flush(ctx); err != nil {
		t.Errorf("flush: %v", err)
	}
	new(reader).check(t, d, blockmap.Range(0, d.Size()), w.Content)
}

// Random sequences of everything, against a model.
func (w Writable) random(t *testing.T) {
	seed := w.Seed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("to repeat this, set Writable.Seed to %d", seed)
		}
	})
	ctx := aCtx(t)
	for run := range uint64(4) {
		rng := rand.New(rand.NewPCG(seed, run))
		d, m := w.open(t)
		es := extents(rng, d.Size(), 150)
		for i, e := range es {
			switch rng.IntN(12) {
			case 0:
				if err := d.Flush(ctx); err != nil {
					t.Fatalf("flush: %v", err)
				}
				m.flush()
			case 1:
				if w.Crash != nil {
					d = w.Crash(t, d)
					m.crash(t, d)
				}
			case 2:
				d.Prefetch(e)
			case 3, 4:
				m.check(t, d, e)
			default:
				m.random(t, ctx, d, e, rng)
				m.check(t, d, around(e, d.Size()))
			}
			if t.Failed() {
				t.Fatalf("run %d of seed %d goes wrong at step %d of %d, on %v", run, seed, i, len(es), e)
			}
		}
		m.check(t, d, blockmap.Range(0, d.Size()))
	}
}
