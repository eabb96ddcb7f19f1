package vhost

import (
	"bytes"
	"context"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/nbd"
)

// stuckAt is where a stuckDevice waits: a write there, or a read there of the disk.
var stuckAt = blockmap.Range(1<<20, 4096)

// stuckDevice is a device that waits at stuckAt until it is let go, or the context ends.
type stuckDevice struct {
	*blocktest.Memory
	waiting chan struct{}
	open    chan struct{}
}

func newStuckDevice() *stuckDevice {
	d := &stuckDevice{filled(testSize), make(chan struct{}, 100), make(chan struct{})}
	d.Chill(stuckAt)
	wait := func(ctx context.Context, e blockmap.Extent) error {
		if e.Intersect(stuckAt).Len() <= 0 {
			return nil
		}
		d.waiting <- struct{}{}
		select {
		case <-d.open:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	d.OnWrite = wait
	d.OnLoad = func(ctx context.Context, e blockmap.Extent) bool { return wait(ctx, e) == nil }
	return d
}

// inflightDisk is a driver of dev whose front end keeps what is in flight.
func inflightDisk(t *testing.T, dev blockmap.Device) *driver {
	f := connect(t, serve(t, new(Server), nbd.Export{Device: dev}))
	f.negotiate(0)
	f.share(newGuestMemory(t))
	f.keepInflight(1, 64, nil)
	d := f.newDriver(0, 64)
	d.start(0)
	return d
}

// lone makes requests one after the other, until the queue does the next one itself.
func (d *driver) lone() {
	for range 2 * loneTakes {
		d.ok(opIn, 0, nil, 4096)
	}
}

// A request that its queue does itself and that takes long holds up nothing: neither the
// answers to those before it, nor those after it.
func TestStuckHoldsUpNothing(t *testing.T) {
	for name, c := range map[string]struct {
		op   operation
		lone bool
	}{
		"a write among others": {opOut, false}, "a lone write": {opOut, true}, "a lone read": {opIn, true},
	} {
		t.Run(name, func(t *testing.T) {
			dev := newStuckDevice()
			d := inflightDisk(t, dev)
			want := bytes.Repeat([]byte{0xab}, 4096)
			var before []int
			if c.lone {
				d.lone()
			} else {
				before = append(before, d.add(opIn, 0, nil, 4096), d.add(opOut, 0, want, 0))
			}
			old := d.next - uint16(len(before))
			var stuck int
			if c.op == opOut {
				stuck = d.add(opOut, uint64(stuckAt.Start>>sectorShift), want, 0)
			} else {
				stuck = d.add(opIn, uint64(stuckAt.Start>>sectorShift), nil, 4096)
				want = content(dev.Memory, stuckAt.Start, 4096)
			}
			d.notify(old)
			<-dev.waiting
			for _, i := range before {
				if code, _ := d.wait(i); code != statusOK {
					t.Errorf("a request before it: status %d", code)
				}
			}
			for i := range uint64(200) {
				d.ok(opIn, 8*i, nil, 4096)
				d.ok(opOut, 8*i, make([]byte, 4096), 0)
			}
			d.ok(opFlush, 0, nil, 0)
			if d.collect(); d.done[stuck] {
				t.Fatal("it was not stuck")
			}
			close(dev.open)
			code, p := d.wait(stuck)
			if code != statusOK || !bytes.Equal(p, want) || !bytes.Equal(content(dev.Memory, stuckAt.Start, 4096), want) {
				t.Errorf("status %d, or wrong bytes", code)
			}
			d.ok(opIn, 0, nil, 4096)
			if base := d.stop(); base != d.next {
				t.Errorf("the base is %d after %d requests", base, d.next)
			}
			dev.NoPins(t)
		})
	}
}

// A queue that is stopped while a request of its own is stuck ends in no time, and what was
// stuck is done again by the next start.
func TestStuckStops(t *testing.T) {
	for _, op := range []operation{opOut, opIn} {
		dev := newStuckDevice()
		d := inflightDisk(t, dev)
		d.lone()
		old := d.next
		out, in, want := []byte(nil), 4096, content(dev.Memory, stuckAt.Start, 4096)
		if op == opOut {
			out, in, want = bytes.Repeat([]byte{0xcd}, 4096), 0, bytes.Repeat([]byte{0xcd}, 4096)
		}
		stuck := d.add(op, uint64(stuckAt.Start>>sectorShift), out, in)
		d.notify(old)
		<-dev.waiting
		d.ok(opIn, 0, nil, 4096) // another goroutine has taken over
		base := d.stop()
		if base != d.next {
			t.Errorf("%v: the base is %d after %d requests", op, base, d.next)
		}
		close(dev.open)
		d.start(base)
		if code, p := d.wait(stuck); code != statusOK || !bytes.Equal(p, want) {
			t.Errorf("%v: status %d, or wrong bytes", op, code)
		}
		if op == opOut && !bytes.Equal(content(dev.Memory, stuckAt.Start, 4096), want) {
			t.Errorf("%v: the device has other bytes", op)
		}
		dev.NoPins(t)
	}
}

// A write that gets stuck is done again after each start, and gets stuck again. Whoever was
// stuck in it before touches nothing of the queue that runs by then, which the race detector
// sees.
func TestStuckAtEachStart(t *testing.T) {
	dev := newStuckDevice()
	d := inflightDisk(t, dev)
	want := bytes.Repeat([]byte{0xcd}, 4096)
	old := d.next
	stuck := d.add(opOut, uint64(stuckAt.Start>>sectorShift), want, 0)
	d.notify(old)
	for range 3 {
		<-dev.waiting
		for i := range uint64(100) { // until the queue does writes itself again
			d.ok(opOut, 8*i, make([]byte, 4096), 0)
		}
		base := d.stop()
		if base != d.next {
			t.Errorf("the base is %d after %d requests", base, d.next)
		}
		d.start(base)
	}
	close(dev.open)
	if code, _ := d.wait(stuck); code != statusOK || !bytes.Equal(content(dev.Memory, stuckAt.Start, 4096), want) {
		t.Errorf("status %d, or wrong bytes", code)
	}
	dev.NoPins(t)
}

// A device whose writes are slow costs a queue goroutines while they last, and none
// afterwards.
func TestStuckLeavesNothing(t *testing.T) {
	dev := filled(testSize)
	var slow atomic.Bool
	dev.OnWrite = func(context.Context, blockmap.Extent) error {
		if slow.Load() {
			time.Sleep(4 * stuckTime)
		}
		return nil
	}
	_, d := disk(t, nbd.Export{Device: dev})
	d.ok(opFlush, 0, nil, 0)
	before := runtime.NumGoroutine()
	for range 20 {
		slow.Store(false)
		for range 2 * loneTakes {
			d.ok(opOut, 0, make([]byte, 4096), 0)
		}
		slow.Store(true)
		for i := range uint64(4) {
			d.ok(opOut, 8*i, make([]byte, 4096), 0)
		}
	}
	for end := time.Now().Add(limit); runtime.NumGoroutine() > before+2; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines before, %d after", before, runtime.NumGoroutine())
		}
	}
}
