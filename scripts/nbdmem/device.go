package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// fill writes OFFSET:LENGTH:BYTE to d.
func fill(d *blocktest.Memory, what string) error {
	var off, n int64
	var b byte
	if _, err := fmt.Sscanf(what, "%d:%d:%d", &off, &n, &b); err != nil {
		return fmt.Errorf("fill %q: want OFFSET:LENGTH:BYTE: %w", what, err)
	}
	if err := blockmap.Range(off, n).Check(d.Size()); err != nil {
		return fmt.Errorf("fill %q: %w", what, err)
	}
	d.Fill(bytes.Repeat([]byte{b}, int(n)), off)
	return nil
}

// pattern writes to each 8 bytes of d their offset.
func pattern(d *blocktest.Memory) {
	p := make([]byte, 0, d.Size()+8)
	for int64(len(p)) < d.Size() {
		p = binary.BigEndian.AppendUint64(p, uint64(len(p)))
	}
	d.Fill(p[:d.Size()], 0)
}

// slow is a device each call of which takes a while. A View has to be asked for with
// Fault each time.
type slow struct {
	*blocktest.Memory
	delay time.Duration

	mu struct {
		sync.Mutex
		granted map[blockmap.Extent]int // Views that a Fault has waited for
	}
}

var _ blockmap.WritableDevice = (*slow)(nil)

func newSlow(d *blocktest.Memory, delay time.Duration) *slow {
	s := &slow{Memory: d, delay: delay}
	s.mu.granted = make(map[blockmap.Extent]int)
	return s
}

func (s *slow) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch n := s.mu.granted[e]; n {
	case 0:
		return v, false
	case 1:
		delete(s.mu.granted, e)
	default:
		s.mu.granted[e] = n - 1
	}
	return s.Memory.View(e)
}

func (s *slow) Load(_ context.Context, e blockmap.Extent) (v blockmap.View, ok bool) {
	return s.View(e)
}

func (s *slow) Fault(ctx context.Context, e blockmap.Extent) error {
	if err := e.Check(s.Size()); err != nil {
		return err
	}
	if err := s.wait(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.granted[e]++
	return nil
}

func (s *slow) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := s.wait(ctx); err != nil {
		return err
	}
	return s.Memory.WriteAt(ctx, p, off)
}

func (s *slow) Zero(ctx context.Context, e blockmap.Extent, mayDiscard bool) error {
	if err := s.wait(ctx); err != nil {
		return err
	}
	return s.Memory.Zero(ctx, e, mayDiscard)
}

func (s *slow) Discard(ctx context.Context, e blockmap.Extent) error {
	if err := s.wait(ctx); err != nil {
		return err
	}
	return s.Memory.Discard(ctx, e)
}

func (s *slow) Flush(ctx context.Context) error {
	if err := s.wait(ctx); err != nil {
		return err
	}
	return s.Memory.Flush(ctx)
}

func (s *slow) wait(ctx context.Context) error {
	select {
	case <-time.After(s.delay):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
