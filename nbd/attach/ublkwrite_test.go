package attach

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// The thread of a queue does small writes of whole blocks. After a slow one it gives writes
// away, for longer each time, and for a short time again once one was fast.
func TestInlineWrites(t *testing.T) {
	takes := func(w *ublkInline, off, n int64, flags uint32) bool {
		return w.takes(&ublkRequest{op: ublkWrite, flags: flags, e: blockmap.Range(off, n)})
	}
	for _, c := range []struct {
		off, n int64
		flags  uint32
		want   bool
	}{
		{8192, 4096, 0, true}, {0, ublkInlineMax, 0, true}, {0, ublkInlineMax + 4096, 0, false},
		{512, 4096, 0, false}, {4096, 512, 0, false}, {3584, 512, 0, false}, {0, 4096, ublkIOFUA, false},
	} {
		var w ublkInline
		if got := takes(&w, c.off, c.n, c.flags); got != c.want {
			t.Errorf("%d bytes at %d, flags %#x: %t", c.n, c.off, c.flags, got)
		}
	}
	var w ublkInline
	away := func() (n int) {
		for !takes(&w, 0, 4096, 0) {
			n++
		}
		return n
	}
	w.took(ublkInlineTime)
	if n := away(); n != 0 {
		t.Errorf("after a fast write, %d are given away", n)
	}
	for want := ublkAwayMin; want <= 2*ublkAwayMax; want *= 2 {
		w.took(ublkInlineTime + 1)
		if n := away(); n != min(want, ublkAwayMax) {
			t.Errorf("after a slow write, %d are given away: want %d", n, want)
		}
	}
	w.took(0)
	w.took(time.Second)
	if n := away(); n != ublkAwayMin {
		t.Errorf("after a fast write and a slow one, %d are given away", n)
	}
}

// A device whose writes take long holds up a queue once. After that, writes that hang hold
// up no reader.
func TestSlowWrites(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		dev := newDevice(testSize)
		var hang atomic.Bool
		hanging, release := make(chan struct{}, 64), make(chan struct{})
		dev.OnWrite = func(ctx context.Context, _ blockmap.Extent) error {
			if !hang.Load() {
				time.Sleep(10 * time.Millisecond)
				return nil
			}
			hanging <- struct{}{}
			select {
			case <-release:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		n := attachTo(t, d, dev, Options{Queues: 1, Depth: 16})
		f := open(t, n.Path, unix.O_RDWR|unix.O_DIRECT)
		if err := f.write(pattern(1, 4096), 0); err != nil {
			t.Fatal(err)
		}
		hang.Store(true)
		const writes = 4
		written := make(chan error, writes)
		for i := range int64(writes) {
			go func() { written <- f.write(pattern(i, 4096), i*4096) }()
		}
		for range writes {
			within(t, "a write that hangs", hanging)
		}
		for i := range int64(50) {
			e := blockmap.Range(testSize/2+i*4096, 4096)
			f.mustRead(e, dev.Content(e))
		}
		close(release)
		for range writes {
			if err := within(t, "a write", written); err != nil {
				t.Error(err)
			}
		}
		for i := range int64(writes) {
			f.mustRead(blockmap.Range(i*4096, 4096), pattern(i, 4096))
		}
	})
}
