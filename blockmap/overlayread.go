package blockmap

import (
	"context"
	"fmt"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// layers are what a read of an overlay looks at, from the top: the level that takes
// writes, the frozen one if there are two, and the base. They are never changed: other
// layers take their place.
type layers struct {
	base Device
	size int64
	top  *level
	low  *level // nil unless there are two
	// merging says that the low level takes writes, and that the blocks of the top
	// one move there.
	merging bool
}

// target is the level that takes writes.
func (s *layers) target() *level {
	if s.merging {
		return s.low
	}
	return s.top
}

// levels are the levels, the top one first.
func (s *layers) levels() []*level {
	if s.low == nil {
		return []*level{s.top}
	}
	return []*level{s.top, s.low}
}

// run is the length of the first run of the n blocks from b that come from the same
// place: lv has them, with the state st, or the base if st is stateAbsent.
func (s *layers) run(b, n uint32) (length uint32, lv *level, st state) {
	length, st = s.top.m.live.run(b, n)
	if st != stateAbsent || s.low == nil {
		return length, s.top, st
	}
	length, st = s.low.m.live.run(b, length)
	return length, s.low, st
}

// unchanged says whether the base has all of the n blocks from b. It costs a few loads.
func (s *layers) unchanged(b, n uint32) bool {
	return s.top.m.live.none(b, n) && (s.low == nil || s.low.m.live.none(b, n))
}

// inBase says whether e is an extent within the device that the base has as a whole.
func (s *layers) inBase(e Extent) bool {
	return e.Start >= 0 && e.Start < e.End && e.End <= s.size && s.unchanged(blocksOf(e))
}

// part is a part of an extent that comes from one place.
type part struct {
	Extent
	lv *level
	st state
}

// parts walks the parts of e in order.
func (s *layers) parts(e Extent) func(yield func(part) bool) {
	return func(yield func(part) bool) {
		for at := e.Start; at < e.End; {
			b, n := blocksOf(Extent{at, e.End})
			n, lv, st := s.run(b, n)
			end := min(blockRange(b, n).End, e.End)
			if !yield(part{Extent{at, end}, lv, st}) {
				return
			}
			at = end
		}
	}
}

// view is Device.View.
func (s *layers) view(e Extent) (v View, ok bool) {
	if e.Check(s.size) != nil {
		return View{}, false
	}
	if e.Len() == 0 || s.unchanged(blocksOf(e)) {
		return s.base.View(e)
	}
	for p := range s.parts(e) {
		switch p.st {
		case stateZero:
			v.AppendZeros(p.Len())
			ok = true
		case stateData:
			ok = p.lv.view(&v, p.Start, p.Len())
		case stateAbsent:
			var below View
			if below, ok = s.base.View(p.Extent); ok {
				v.take(&below)
			}
		default:
			ok = false
		}
		if !ok {
			v.Release()
			return View{}, false
		}
	}
	return v, true
}

// load is Device.Load.
func (s *layers) load(ctx context.Context, e Extent) (v View, ok bool) {
	if e.Check(s.size) != nil {
		return View{}, false
	}
	if e.Len() == 0 || s.unchanged(blocksOf(e)) {
		return s.base.Load(ctx, e)
	}
	l := new(load)
	if whole, fits := s.gather(l, e); !fits {
		return View{}, false
	} else if whole {
		return l.wait(ctx)
	}
	j := &join{told: make(chan struct{})}
	s.begin(j, e)
	select {
	case <-j.told:
		return j.outcome()
	case <-ctx.Done():
		if j.state.CompareAndSwap(loadWaited, loadAbandoned) {
			return View{}, false
		}
		<-j.told
		return j.outcome()
	}
}

// loadAsync is AsyncDevice.LoadAsync.
func (s *layers) loadAsync(e Extent, done func(v View, ok bool)) {
	if e.Check(s.size) != nil {
		done(View{}, false)
		return
	}
	if e.Len() == 0 || s.unchanged(blocksOf(e)) {
		LoadAsync(s.base, e, done)
		return
	}
	l := new(load)
	if whole, fits := s.gather(l, e); !fits {
		done(View{}, false)
	} else if whole {
		l.begin(done)
	} else {
		s.begin(&join{done: done}, e)
	}
}

// gather adds e to l. whole is false, and l empty, where parts of e are in the base. fits
// is false where a part cannot be read.
func (s *layers) gather(l *load, e Extent) (whole, fits bool) {
	for p := range s.parts(e) {
		if p.st == stateAbsent {
			l.drop()
			return false, true
		}
		if !p.addTo(l) {
			l.drop()
			return false, false
		}
	}
	return true, true
}

// addTo adds a part that is in a level to l.
func (p *part) addTo(l *load) bool {
	switch p.st {
	case stateZero:
		l.view.AppendZeros(p.Len())
		return true
	case stateData:
		return p.lv.addTo(l, p.Start, p.Len())
	}
	return false
}

// join is a load of parts that come from levels and from the base, each by itself and in
// any order.
type join struct {
	parts  []View
	left   atomic.Int32
	failed atomic.Bool
	state  atomic.Int32 // as that of a load
	done   func(v View, ok bool)
	told   chan struct{} // closed at the end, if done is nil
}

// begin begins the loads of the parts of e.
func (s *layers) begin(j *join, e Extent) {
	var all []part
	for p := range s.parts(e) {
		all = append(all, p)
	}
	j.parts = make([]View, len(all))
	j.left.Store(int32(len(all)))
	for i := range all {
		p := &all[i]
		end := func(v View, ok bool) { j.end(i, v, ok) }
		if p.st == stateAbsent {
			LoadAsync(s.base, p.Extent, end)
			continue
		}
		l := new(load)
		if !p.addTo(l) {
			end(View{}, false)
			continue
		}
		l.begin(end)
	}
}

// end takes the end of the load of part i.
func (j *join) end(i int, v View, ok bool) {
	if j.parts[i] = v; !ok {
		j.failed.Store(true)
	}
	if j.left.Add(-1) > 0 {
		return
	}
	switch {
	case j.done != nil:
		j.done(j.outcome())
	case j.state.CompareAndSwap(loadWaited, loadDone):
		close(j.told)
	default:
		j.failed.Store(true)
		j.outcome()
	}
}

// outcome puts the parts together, or releases them where one has failed.
func (j *join) outcome() (v View, ok bool) {
	for i := range j.parts {
		v.take(&j.parts[i])
	}
	if j.failed.Load() {
		v.Release()
		return View{}, false
	}
	return v, true
}

// faultsAtOnce bounds how many parts of an extent are faulted at once.
const faultsAtOnce = 16

// fault is Device.Fault.
func (s *layers) fault(ctx context.Context, e Extent) error {
	if err := e.Check(s.size); err != nil {
		return err
	}
	if e.Len() == 0 || s.unchanged(blocksOf(e)) {
		return s.base.Fault(ctx, e)
	}
	g, inner := errgroup.WithContext(ctx)
	g.SetLimit(faultsAtOnce)
	for p := range s.parts(e) {
		switch p.st {
		case stateAbsent:
			g.Go(func() error { return s.base.Fault(inner, p.Extent) })
		case stateData:
			b, n := blocksOf(p.Extent)
			g.Go(func() error { return p.lv.check(inner, b, n) })
		case stateLost:
			g.Go(func() error { return fmt.Errorf("read bytes %v: %w", p.Extent, errLost) })
		}
	}
	return g.Wait()
}

// status is Device.Status.
func (s *layers) status(e Extent) Status {
	if e.Check(s.size) != nil {
		return Status{Extent: Extent{e.Start, e.Start}}
	}
	for p := range s.parts(e) {
		switch p.st {
		case stateAbsent:
			return s.base.Status(p.Extent)
		case stateZero:
			return Status{p.Extent, true, true}
		default:
			return Status{p.Extent, false, p.st == stateData}
		}
	}
	return Status{Extent: Extent{e.Start, e.Start}}
}

// prefetch is Device.Prefetch.
func (s *layers) prefetch(e Extent) {
	if e.Check(s.size) != nil {
		return
	}
	for p := range s.parts(e) {
		if p.st == stateAbsent {
			s.base.Prefetch(p.Extent)
		}
	}
}

// Change is a run of changed blocks of an overlay.
type Change struct {
	Extent
	Zero bool // reads as zeros; otherwise the overlay has the data
}

// changes walks the runs of changed blocks in order.
func (s *layers) changes(yield func(Change) bool) {
	var run Change
	for p := range s.parts(Range(0, s.size)) {
		c := Change{p.Extent, p.st == stateZero}
		switch {
		case p.st == stateAbsent:
			continue
		case c.Start == run.End && c.Zero == run.Zero && run.Len() > 0:
			run.End = c.End
			continue
		case run.Len() > 0 && !yield(run):
			return
		}
		run = c
	}
	if run.Len() > 0 {
		yield(run)
	}
}
