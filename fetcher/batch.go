package fetcher

import (
	"cmp"
	"slices"
)

// nearTurns is how far from its turn a chunk may be fetched that nobody waits for,
// at leastWindow. It goes by the square of the window: on a line that is twice as
// fast a chunk out of its turn holds up others half as long, and a request that it
// saves is worth twice as many bytes.
const nearTurns = 8

// reach is how many of the queue are looked at for what else is in a blob.
const reach = 64

// gather collects the flights that can share a request with first: its neighbours
// in the blob and, where nobody waits for it and the origin gives several ranges,
// what of the blob is next in turn, with its neighbours.
func (f *Fetcher) gather(s *source, first *flight) []*flight {
	from := first.at(s)
	if first.demand {
		return f.gatherRun(from, first, nil, min(f.o.MaxRequest, s.pace.behind()))
	}
	// What nobody waits for comes in several requests at once, so that the line
	// is not idle for the time from a request to its answer.
	ranges := rangesOf(s.origin)
	if ranges == 1 {
		return f.gatherRun(from, first, nil, min(f.o.MaxRequest, s.pace.run()))
	}
	room := min(f.o.MaxRequest, s.pace.ranges())
	var batch []*flight
	for _, fl := range s.prefetch.flights[:min(reach, len(s.prefetch.flights))] {
		if !fl.waits(false) || fl.at(s) != from || slices.Contains(batch, fl) {
			continue
		}
		run := f.gatherRun(from, fl, batch, room)
		for _, fl := range run {
			room -= int64(fl.chunk().Stored)
		}
		if ranges--; len(batch) > 0 && (ranges < 0 || room < 0) {
			break
		}
		batch = append(batch, run...)
	}
	return batch
}

// gatherRun collects first and its queued neighbours in a place that are not in
// batch: at most so many bytes, but for what somebody waits for, which goes in any
// case.
// Those that nobody waits for only come behind one that somebody does, so that
// they hold up nothing; and else only if their turn is near, so that chunks come
// about in their order.
func (f *Fetcher) gatherRun(from place, first *flight, batch []*flight, most int64) []*flight {
	chunk := func(fl *flight) (off, stored int64) {
		c := &from.table.Chunks[fl.key.chunk]
		return c.Offset, int64(c.Stored)
	}
	run := []*flight{first}
	_, bytes := chunk(first)
	near := from.src.pace.near()
	neighbour := func(of *flight, step int) *flight {
		fl := f.mu.flights[key{of.stream, of.key.chunk + step}]
		if fl == nil || fl.state != queued || !fl.isAt(from) || slices.Contains(batch, fl) ||
			!fl.demand && (fl.turn < first.turn-near || fl.turn > first.turn+near) {
			return nil
		}
		a, stored := chunk(of)
		b, n := chunk(fl)
		if bytes+n > f.o.MaxRequest || bytes+n > most && !fl.demand {
			return nil
		}
		if step < 0 {
			a, b, stored = b, a, n
		}
		if a+stored != b {
			return nil
		}
		return fl
	}
	add := func(fl *flight) {
		_, n := chunk(fl)
		run, bytes = append(run, fl), bytes+n
	}
	for fl := neighbour(first, 1); fl != nil; fl = neighbour(run[len(run)-1], 1) {
		add(fl)
	}
	for fl := neighbour(first, -1); fl != nil && fl.demand == first.demand; fl = neighbour(fl, -1) {
		add(fl)
	}
	slices.SortFunc(run, func(a, b *flight) int { return cmp.Compare(a.key.chunk, b.key.chunk) })
	return run
}

// rangesOf is how many ranges of a blob an origin gives in one answer.
func rangesOf(o Origin) int {
	if r, ok := o.(Ranger); ok {
		return r.Ranges()
	}
	return 1
}
