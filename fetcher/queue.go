package fetcher

import (
	"cmp"
	"slices"
)

// queue is fetches in order of arrival. Those that have started, or are in another
// queue by now, are skipped.
type queue struct {
	fetches []*fetch
	sweep   int // the length at which those that are skipped are taken out
}

// push adds a fetch. Readers that come and go do not make the queue of a source
// that hangs grow for ever.
func (q *queue) push(ft *fetch) {
	if len(q.fetches) >= max(q.sweep, 64) {
		q.fetches = slices.DeleteFunc(q.fetches, func(x *fetch) bool { return !x.waits(ft.demand) })
		q.sweep = 2 * len(q.fetches)
	}
	q.fetches = append(q.fetches, ft)
}

// first is the one to start next, or nil.
func (q *queue) first(demand bool) *fetch {
	for len(q.fetches) > 0 && !q.fetches[0].waits(demand) {
		q.fetches[0] = nil
		q.fetches = q.fetches[1:]
	}
	if len(q.fetches) == 0 {
		return nil
	}
	return q.fetches[0]
}

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

// smaller finds a fetch behind the first of what is demanded that has room where
// that has none; but not again and again, or the first would never have any.
func (f *Fetcher) smaller(s *source, demand bool) *fetch {
	first := s.demand.first(true)
	if !demand || first.passed >= maxPassed || !f.admits(s, demand, 0) {
		return nil
	}
	for _, ft := range s.demand.fetches[1:min(scanLimit, len(s.demand.fetches))] {
		if ft.waits(true) && f.admits(s, true, cost(ft.chunk())) {
			first.passed++
			return ft
		}
	}
	return nil
}

// maxPassed bounds how many fetches are started before one that has no room.
const maxPassed = 16
