package blockmap

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// Flush implements WritableDevice.
func (o *Overlay) Flush(ctx context.Context) error {
	o.flushes.Add(1)
	err := o.poison.Load()
	switch {
	case err != nil:
		return fmt.Errorf("flush overlay %s: %w", o.dir, *err)
	case o.closed.Load():
		return fmt.Errorf("flush overlay %s: %w", o.dir, ErrClosed)
	case o.volatile:
		return nil
	}
	if err := o.rounds.join(ctx, o.clean); err != nil {
		return fmt.Errorf("flush overlay %s: %w", o.dir, err)
	}
	return nil
}

// clean says whether nothing was written since the last round began, and no space is to be
// given back.
func (o *Overlay) clean() bool {
	for _, lv := range o.layers.Load().levels() {
		if !lv.clean() {
			return false
		}
	}
	return true
}

// rounds lets callers share the runs of something. A caller is served by a run that begins
// after its call: it joins the next one.
type rounds struct {
	run func() error
	wg  sync.WaitGroup
	mu  struct {
		sync.Mutex
		running bool
		closed  bool
		next    *round // nil: nobody waits for one
	}
}

// round is one run.
type round struct {
	done chan struct{}
	err  error // once done is closed
}

// join waits for a run that begins after the call, until ctx ends. It returns at once
// where none is under way, and idle says that none is needed.
func (g *rounds) join(ctx context.Context, idle func() bool) error {
	g.mu.Lock()
	if closed := g.mu.closed; closed || !g.mu.running && idle() {
		g.mu.Unlock()
		if closed {
			return ErrClosed
		}
		return nil
	}
	if g.mu.next == nil {
		g.mu.next = &round{done: make(chan struct{})}
	}
	r := g.mu.next
	if !g.mu.running {
		g.mu.running = true
		g.wg.Go(g.serve)
	}
	g.mu.Unlock()
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// close refuses later calls, and waits for runs.
func (g *rounds) close() {
	g.mu.Lock()
	g.mu.closed = true
	g.mu.Unlock()
	g.wg.Wait()
}

// serve runs as long as somebody waits.
func (g *rounds) serve() {
	for {
		g.mu.Lock()
		r := g.mu.next
		g.mu.next = nil
		g.mu.running = r != nil
		g.mu.Unlock()
		if r == nil {
			return
		}
		r.err = g.run()
		close(r.done)
	}
}

// syncAll makes all writes durable that have returned.
func (o *Overlay) syncAll() error {
	o.syncing.Lock()
	defer o.syncing.Unlock()
	return o.syncLayers(o.layers.Load())
}

// syncLayers is syncAll for a caller that holds syncing.
//
// In a merge, blocks leave the top level once the low one has them. So the snapshot of the
// top one is taken first: what it has no more, the low one's has. And it becomes durable
// last: before that, the low one's is.
func (o *Overlay) syncLayers(s *layers) error {
	if o.volatile {
		return nil
	}
	if err := o.poison.Load(); err != nil {
		return *err
	}
	levels := s.levels()
	changes := make([][]wordChange, len(levels))
	for i, lv := range levels {
		changes[i] = lv.m.snapshot()
	}
	for _, lv := range levels {
		if !lv.written.Swap(false) {
			continue
		}
		o.syncs.Add(1)
		if err := lv.file.Load().sync(); err != nil {
			return o.poisonBy("the data", err)
		}
	}
	for i := len(levels) - 1; i >= 0; i-- {
		if len(changes[i]) == 0 {
			continue
		}
		o.syncs.Add(1)
		err := levels[i].m.sync(changes[i])
		if errors.Is(err, ErrNoSpace) { // a file system that copies even what has space
			for ; i >= 0; i-- {
				levels[i].m.restore(changes[i])
			}
			return err
		}
		if err != nil {
			return o.poisonBy("the map", err)
		}
	}
	if err := o.closeRetired(); err != nil {
		o.log.Warn("cannot close a data file that was replaced", "err", err)
	}
	for _, lv := range levels {
		if err := lv.punch(&o.stripes); err != nil {
			o.log.Warn("cannot give back the space of zeroed blocks; the next flush tries again", "err", err)
		}
	}
	return nil
}

// poisonBy ends all writing: what could not be made durable, nobody can tell. The next open
// believes what was durable before.
func (o *Overlay) poisonBy(what string, err error) error {
	err = fmt.Errorf("%s could not be made durable, and what was written since the last flush may be lost: check the disk, then open the overlay again: %w", what, err)
	for _, lv := range o.layers.Load().levels() {
		if e := lv.m.distrust(); e != nil {
			err = errors.Join(err, e)
		}
	}
	if o.poison.CompareAndSwap(nil, &err) {
		o.log.Error("the overlay takes no more writes", "err", err)
	}
	return *o.poison.Load()
}
