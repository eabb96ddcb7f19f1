package fetcher

import (
	"cmp"
	"slices"
)

// nearSeq is how far from its turn a chunk may be fetched that nobody waits for,
// at leastWindow. It goes by the square of the window: on a line that is twice as
// fast a chunk out of its turn holds up others half as long, and a request that it
// saves is worth twice as many bytes.
const nearSeq = 8

// scanLimit is how many of the queue are looked at for what else is in a blob.
const scanLimit = 64

// gather collects the fetches that can share a request with first: its neighbours
// in the blob and, where nobody waits for it and the origin gives several ranges,
// what of the blob is next in turn, with its neighbours.
func (f *Fetcher) gather(s *source, first *fetch) []*fetch {
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
	var batch []*fetch
	for _, ft := range s.prefetch.fetches[:min(scanLimit, len(s.prefetch.fetches))] {
		if !ft.waits(false) || ft.at(s) != from || slices.Contains(batch, ft) {
			continue
		}
		run := f.gatherRun(from, ft, batch, room)
		for _, ft := range run {
			room -= int64(ft.chunk().Stored)
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
func (f *Fetcher) gatherRun(from place, first *fetch, batch []*fetch, most int64) []*fetch {
	chunk := func(ft *fetch) (off, stored int64) {
		c := &from.table.Chunks[ft.key.chunk]
		return c.Offset, int64(c.Stored)
	}
	run := []*fetch{first}
	_, bytes := chunk(first)
	near := from.src.pace.near()
	neighbour := func(of *fetch, step int) *fetch {
		ft := f.mu.fetches[key{of.stream, of.key.chunk + step}]
		if ft == nil || ft.state != queued || !ft.isAt(from) || slices.Contains(batch, ft) ||
			!ft.demand && (ft.seq < first.seq-near || ft.seq > first.seq+near) {
			return nil
		}
		a, stored := chunk(of)
		b, n := chunk(ft)
		if bytes+n > f.o.MaxRequest || bytes+n > most && !ft.demand {
			return nil
		}
		if step < 0 {
			a, b, stored = b, a, n
		}
		if a+stored != b {
			return nil
		}
		return ft
	}
	add := func(ft *fetch) {
		_, n := chunk(ft)
		run, bytes = append(run, ft), bytes+n
	}
	for ft := neighbour(first, 1); ft != nil; ft = neighbour(run[len(run)-1], 1) {
		add(ft)
	}
	for ft := neighbour(first, -1); ft != nil && ft.demand == first.demand; ft = neighbour(ft, -1) {
		add(ft)
	}
	slices.SortFunc(run, func(a, b *fetch) int { return cmp.Compare(a.key.chunk, b.key.chunk) })
	return run
}

// rangesOf is how many ranges of a blob an origin gives in one answer.
func rangesOf(o Origin) int {
	if r, ok := o.(Ranger); ok {
		return r.Ranges()
	}
	return 1
}
