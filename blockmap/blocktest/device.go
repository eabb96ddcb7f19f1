// Package blocktest holds what tests of devices, caches and fetchers share: a
// conformance suites for [blockmap.Device] and [blockmap.WritableDevice], a
// writable device in memory, images made of random data, an origin that fails in
// every way an origin can, and a file system that loses what was not synced.
package blocktest

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"thaw/blockmap"
)

// TestDevice puts a device through what every blockmap.Device must do. open
// makes a new device, cold, whose content must be want; it is called more than
// once.
func TestDevice(t *testing.T, want []byte, open func(t *testing.T) blockmap.Device) {
	t.Run("Size", func(t *testing.T) {
		if n := open(t).Size(); n != int64(len(want)) || n%blockmap.BlockSize != 0 {
			t.Fatalf("the size is %d; the content has %d bytes", n, len(want))
		}
	})
	t.Run("Read", func(t *testing.T) {
		d, r := open(t), new(reader)
		rng := rand.New(rand.NewPCG(1, 2))
		for _, e := range extents(rng, d.Size(), 300) {
			r.check(t, d, e, want)
		}
		r.check(t, d, blockmap.Range(0, d.Size()), want)
		if v, ok := d.Load(t.Context(), blockmap.Range(0, d.Size())); !ok {
			t.Error("the device was read as a whole and is not resident")
		} else {
			v.Release()
		}
	})
	t.Run("OutOfRange", func(t *testing.T) {
		d := open(t)
		for _, e := range []blockmap.Extent{
			{Start: -1, End: 1}, {Start: 0, End: d.Size() + 1}, {Start: d.Size() + 1, End: d.Size() + 2}, {Start: 5, End: 4},
			{Start: -1 << 62, End: 1 << 62},
		} {
			if v, ok := d.View(e); ok {
				t.Errorf("View of %v does not refuse", e)
				v.Release()
			}
			if v, ok := d.Load(t.Context(), e); ok {
				t.Errorf("Load of %v does not refuse", e)
				v.Release()
			}
			if err := d.Fault(context.Background(), e); !errors.Is(err, blockmap.ErrOutOfRange) {
				t.Errorf("fault of %v: %v", e, err)
			}
			if st := d.Status(e); st.Len() != 0 {
				t.Errorf("status of %v is about %v", e, st.Extent)
			}
			d.Prefetch(e)
		}
	})
	t.Run("Empty", func(t *testing.T) {
		d, r := open(t), new(reader)
		for _, at := range []int64{0, 1, d.Size()} {
			r.check(t, d, blockmap.Range(at, 0), want)
			if st := d.Status(blockmap.Range(at, 0)); st.Len() != 0 {
				t.Errorf("status of nothing at %d is about %v", at, st.Extent)
			}
			d.Prefetch(blockmap.Range(at, 0))
		}
	})
	t.Run("Concurrent", func(t *testing.T) {
		readAtOnce(t, open(t), want, 7, 100)
	})
	t.Run("Cancelled", func(t *testing.T) {
		d, r := open(t), new(reader)
		ctx, cancel := context.WithCancelCause(context.Background())
		gone := errors.New("the reader has gone")
		cancel(gone)
		end := time.AfterFunc(5*time.Minute, func() { panic("Fault does not return although its context has ended") })
		defer end.Stop()
		if err := d.Fault(ctx, blockmap.Range(0, d.Size())); err == nil {
			if v, ok := d.Load(t.Context(), blockmap.Range(0, d.Size())); !ok {
				t.Error("Fault returned no error, and its extent is not resident")
			} else {
				v.Release()
			}
		}
		r.check(t, d, blockmap.Range(0, d.Size()), want) // the next reader is served
	})
	t.Run("Status", func(t *testing.T) {
		d, r := open(t), new(reader)
		walk := func(f func(blockmap.Status)) {
			for at := int64(0); at < d.Size(); {
				e := blockmap.Extent{Start: at, End: d.Size()}
				st := d.Status(e)
				if st.Start != at || st.Len() <= 0 || st.End > d.Size() {
					t.Fatalf("status of %v is about %v", e, st.Extent)
				}
				f(st)
				at = st.End
			}
		}
		zero := make([]byte, blockmap.BlockSize)
		walk(func(st blockmap.Status) {
			if st.Resident {
				if v, ok := d.Load(t.Context(), st.Extent); !ok {
					t.Errorf("%v is said to be resident, and cannot be loaded", st.Extent)
				} else {
					v.Release()
				}
			}
			if !st.Zero {
				return
			}
			for at := st.Start; at < st.End; at += blockmap.BlockSize {
				if n := min(st.End-at, blockmap.BlockSize); !bytes.Equal(want[at:at+n], zero[:n]) {
					t.Fatalf("%v is said to be a hole, and has content at %d", st.Extent, at)
				}
			}
			if !st.Resident {
				t.Errorf("the hole %v has to be fetched", st.Extent)
			}
		})
		rng := rand.New(rand.NewPCG(5, 5))
		for _, e := range extents(rng, d.Size(), 100) {
			if st := d.Status(e); st.Start != e.Start || st.Len() <= 0 || st.End > e.End {
				t.Errorf("status of %v is about %v", e, st.Extent)
			}
		}
		r.check(t, d, blockmap.Range(0, d.Size()), want)
		walk(func(st blockmap.Status) {
			if !st.Resident {
				t.Errorf("%v was read and is not resident", st.Extent)
			}
		})
	})
	t.Run("Prefetch", func(t *testing.T) {
		d, r := open(t), new(reader)
		rng := rand.New(rand.NewPCG(6, 6))
		var wg sync.WaitGroup
		wg.Go(func() {
			for _, e := range extents(rng, d.Size(), 50) {
				d.Prefetch(e)
			}
		})
		r.check(t, d, blockmap.Range(0, d.Size()), want)
		wg.Wait()
		r.check(t, d, blockmap.Range(0, d.Size()), want)
	})
}

// TestCold puts a device through what it must do about data that is resident but not in
// memory. open makes a device of content want all of which is so, but for the holes.
func TestCold(t *testing.T, want []byte, open func(t *testing.T) blockmap.Device) {
	data := func(d blockmap.Device, f func(e blockmap.Extent)) {
		for at := int64(0); at < d.Size(); {
			st := d.Status(blockmap.Extent{Start: at, End: d.Size()})
			if !st.Resident {
				t.Fatalf("%v is not resident: this tests nothing", st.Extent)
			}
			if !st.Zero {
				f(st.Extent)
			}
			at = st.End
		}
	}
	t.Run("View", func(t *testing.T) {
		d := open(t)
		n := 0
		data(d, func(e blockmap.Extent) {
			for _, e := range []blockmap.Extent{e, blockmap.Range(e.Start, 1), blockmap.Range(e.End-1, 1), blockmap.Range(e.Start, min(e.Len(), 4096))} {
				n++
				if v, ok := d.View(e); ok {
					v.Release()
					t.Errorf("the view of %v waits for the disk", e)
				}
			}
		})
		if n == 0 {
			t.Error("there are no data: this tests nothing")
		}
	})
	t.Run("Load", func(t *testing.T) {
		d, r := open(t), new(reader)
		rng := rand.New(rand.NewPCG(1, 3))
		for _, e := range extents(rng, d.Size(), 200) {
			v, ok := d.Load(t.Context(), e)
			r.compare(t, v, ok, e, want)
		}
	})
	t.Run("LoadAsync", func(t *testing.T) {
		d := open(t)
		rng := rand.New(rand.NewPCG(1, 4))
		type loaded struct {
			e  blockmap.Extent
			v  blockmap.View
			ok bool
		}
		all := extents(rng, d.Size(), 200)
		done := make(chan loaded, len(all))
		for _, e := range all {
			blockmap.LoadAsync(d, e, func(v blockmap.View, ok bool) { done <- loaded{e, v, ok} })
		}
		r := new(reader)
		for range all {
			select {
			case l := <-done:
				r.compare(t, l.v, l.ok, l.e, want)
			case <-time.After(5 * time.Minute):
				t.Fatal("a load has not ended")
			}
		}
		blockmap.LoadAsync(d, blockmap.Range(d.Size(), 1), func(_ blockmap.View, ok bool) { done <- loaded{ok: ok} })
		if l := <-done; l.ok {
			t.Error("LoadAsync beyond the end does not refuse")
		}
	})
	t.Run("Concurrent", func(t *testing.T) {
		readAtOnce(t, open(t), want, 8, 60)
	})
	t.Run("Cancelled", func(t *testing.T) {
		d, r := open(t), new(reader)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for range 100 {
			if v, ok := d.Load(ctx, blockmap.Range(0, d.Size())); ok { // it may be quicker
				r.compare(t, v, ok, blockmap.Range(0, d.Size()), want)
			}
		}
		r.check(t, d, blockmap.Range(0, d.Size()), want)
	})
}

// compare checks a load of e, and releases it.
func (r *reader) compare(t *testing.T, v blockmap.View, ok bool, e blockmap.Extent, want []byte) {
	t.Helper()
	defer v.Release()
	if !ok || v.Len() != e.Len() {
		t.Errorf("%v is resident and was not loaded", e)
		return
	}
	p := make([]byte, e.Len())
	if err := v.CopyTo(p); err != nil || !bytes.Equal(p, want[e.Start:e.End]) {
		t.Errorf("load %v: wrong bytes, or %v", e, err)
	}
}

// readAtOnce has 16 readers read n extents each.
func readAtOnce(t *testing.T, d blockmap.Device, want []byte, seed uint64, n int) {
	t.Helper()
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			r := new(reader)
			rng := rand.New(rand.NewPCG(uint64(i), seed))
			for _, e := range extents(rng, d.Size(), n) {
				r.check(t, d, e, want)
			}
		})
	}
	wg.Wait()
}

// extents are n parts of a device: small and large, aligned and not, at the
// ends and between.
func extents(rng *rand.Rand, size int64, n int) []blockmap.Extent {
	all := []blockmap.Extent{
		blockmap.Range(0, 1), blockmap.Range(size-1, 1), blockmap.Range(0, min(size, 4096)),
		blockmap.Range(size-min(size, 4097), min(size, 4097)),
	}
	for range n {
		off := rng.Int64N(size)
		length := int64(4096)
		switch rng.IntN(4) {
		case 0:
			length = 1 + rng.Int64N(9000)
		case 1:
			off &^= 4095
		case 2:
			off &^= 4095
			length = 4096 * (1 + rng.Int64N(64))
		case 3:
			length = 1 + rng.Int64N(size/3+1)
		}
		all = append(all, blockmap.Range(off, min(length, size-off)))
	}
	return all
}

// Read reads e of d as transports do.
func Read(ctx context.Context, d blockmap.Device, e blockmap.Extent) ([]byte, error) {
	return new(reader).read(ctx, d, e)
}

// reader reads devices into a buffer of its own. New memory costs the race detector far
// more than the read. Each goroutine has a reader: what they share would hide races.
type reader struct{ buf []byte }

// read returns bytes that are valid until the next read.
func (r *reader) read(ctx context.Context, d blockmap.Device, e blockmap.Extent) ([]byte, error) {
	v, err := blockmap.Read(ctx, d, e)
	if err != nil {
		return nil, err
	}
	if n := v.Len(); n > int64(cap(r.buf)) {
		r.buf = make([]byte, n, max(n, min(2*int64(cap(r.buf)), d.Size())))
	} else {
		r.buf = r.buf[:n]
		clear(r.buf) // a read that fills nothing is not to find what the last one has left
	}
	p := r.buf
	err = v.CopyTo(p)
	v.Release()
	if errors.Is(err, blockmap.ErrDamaged) {
		err = blockmap.ReadInto(ctx, d, e, p)
	}
	return p, err
}

func (r *reader) check(t *testing.T, d blockmap.Device, e blockmap.Extent, want []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	got, err := r.read(ctx, d, e)
	switch {
	case err != nil:
		t.Errorf("read %v: %v", e, err)
	case !bytes.Equal(got, want[e.Start:e.End]):
		t.Errorf("read %v: wrong bytes, the first at %d", e, firstDifference(got, want[e.Start:e.End])+e.Start)
	}
}

func firstDifference(a, b []byte) int64 {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return int64(i)
		}
	}
	return int64(min(len(a), len(b)))
}
