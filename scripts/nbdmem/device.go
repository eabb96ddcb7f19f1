package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"thaw/blockmap"
)

// device is a blockmap.WritableDevice in memory. A grain is never changed in
// place: a write puts a new one, so that views stay what they are and need no
// pin. Its size is a multiple of its grain, which need not be
// blockmap.BlockSize: a suite may want holes of 512 bytes.
type device struct {
	size, grain int64
	delay       time.Duration

	mu struct {
		sync.RWMutex
		grains  [][]byte                // nil: a hole
		granted map[blockmap.Extent]int // Views that a Fault has waited for
	}
}

var _ blockmap.WritableDevice = (*device)(nil)

func newDevice(size, grain int64, delay time.Duration) *device {
	d := &device{size: size, grain: grain, delay: delay}
	d.mu.grains = make([][]byte, size/grain)
	d.mu.granted = make(map[blockmap.Extent]int)
	return d
}

// fill writes OFFSET:LENGTH:BYTE.
func (d *device) fill(what string) error {
	var off, n int64
	var b byte
	if _, err := fmt.Sscanf(what, "%d:%d:%d", &off, &n, &b); err != nil {
		return fmt.Errorf("fill %q: want OFFSET:LENGTH:BYTE: %w", what, err)
	}
	if err := blockmap.Range(off, n).Check(d.size); err != nil {
		return fmt.Errorf("fill %q: %w", what, err)
	}
	d.write(bytes.Repeat([]byte{b}, int(n)), off)
	return nil
}

// pattern writes to each 8 bytes their offset.
func (d *device) pattern() {
	p := make([]byte, 0, d.size+8)
	for int64(len(p)) < d.size {
		p = binary.BigEndian.AppendUint64(p, uint64(len(p)))
	}
	d.write(p[:d.size], 0)
}

func (d *device) Size() int64 { return d.size }

// View gives what is at e. Where there is a delay, it has to be asked for with
// Fault each time.
func (d *device) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	if d.delay > 0 {
		d.mu.Lock()
		defer d.mu.Unlock()
		switch n := d.mu.granted[e]; n {
		case 0:
			return v, false
		case 1:
			delete(d.mu.granted, e)
		default:
			d.mu.granted[e] = n - 1
		}
	} else {
		d.mu.RLock()
		defer d.mu.RUnlock()
	}
	for off := e.Start; off < e.End; {
		at := off % d.grain
		n := min(d.grain-at, e.End-off)
		if b := d.mu.grains[off/d.grain]; b != nil {
			v.Append(b[at:at+n], nil, 0)
		} else {
			v.AppendZeros(n)
		}
		off += n
	}
	return v, true
}

func (d *device) Fault(ctx context.Context, e blockmap.Extent) error {
	if d.delay == 0 {
		return nil
	}
	if err := d.wait(ctx); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.granted[e]++
	return nil
}

// Status tells holes from data, for block status.
func (d *device) Status(e blockmap.Extent) blockmap.Status {
	d.mu.RLock()
	defer d.mu.RUnlock()
	hole := func(off int64) bool { return d.mu.grains[off/d.grain] == nil }
	st := blockmap.Status{Extent: e, Zero: hole(e.Start), Resident: true}
	for off := e.Start - e.Start%d.grain + d.grain; off < e.End; off += d.grain {
		if hole(off) != st.Zero {
			st.End = off
			break
		}
	}
	return st
}

func (d *device) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := d.wait(ctx); err != nil {
		return err
	}
	d.write(p, off)
	return nil
}

func (d *device) write(p []byte, off int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(p) > 0 {
		i := off / d.grain
		b := make([]byte, d.grain)
		copy(b, d.mu.grains[i])
		n := copy(b[off%d.grain:], p)
		d.mu.grains[i] = b
		p, off = p[n:], off+int64(n)
	}
}

func (d *device) Zero(ctx context.Context, e blockmap.Extent, mayDiscard bool) error {
	if err := d.wait(ctx); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for off := e.Start; off < e.End; {
		i, at := off/d.grain, off%d.grain
		n := min(d.grain-at, e.End-off)
		if n == d.grain && mayDiscard {
			d.mu.grains[i] = nil
		} else {
			b := make([]byte, d.grain)
			copy(b, d.mu.grains[i])
			clear(b[at : at+n])
			d.mu.grains[i] = b
		}
		off += n
	}
	return nil
}

func (d *device) Discard(ctx context.Context, e blockmap.Extent) error {
	return d.Zero(ctx, e, true)
}

func (d *device) Flush(ctx context.Context) error { return d.wait(ctx) }

// wait takes the delay.
func (d *device) wait(ctx context.Context) error {
	if d.delay == 0 {
		return nil
	}
	select {
	case <-time.After(d.delay):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
