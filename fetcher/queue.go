package fetcher

import (
	"cmp"
	"slices"
)

// queue decides what a source's next request brings. It holds the fetches that wait for
// a request to the source, in lists: fetches that readers demand, and fetches that are
// prefetched, by their rank. Each list is in order of arrival. The queue starts no
// goroutine and uses no clock and no I/O. Its callers hold Fetcher.mu.
//
// A fetch may be in the queues of several sources, and its state says whether it still
// waits. So if another source has taken a fetch, or the fetch has ended, it is not
// removed from the lists at once: the queue skips it, and drops it when it reaches the
// front or when a list has doubled. A fetch that becomes a demand is pushed again, into
// the other list.
type queue struct {
	demand   list
	prefetch [ranks]list
	at       map[key]*fetch // what the lists hold, to find the neighbours of a fetch
	peer     *source        // the source if it is a peer, otherwise nil
}

// rank is the turn of a fetch that no reader waits for. Each rank goes before the next
// one.
type rank uint8

const (
	predicted rank = iota // hints, and predictions from what readers have demanded
	listed                // what a Replay lists
	idle                  // what Complete fetches, see complete.go
	ranks
)

// list is one of the orders.
type list struct {
	fetches []*fetch
	sweep   int // the length at which fetches that no longer wait here are removed
}

// limits bound one request. Bytes are compressed.
type limits struct {
	request int64 // limit for a request of any kind, in bytes
	bytes   int64 // bytes up to which prefetched chunks are added
	ranges  int   // ranges of a blob that a request may have
	near    int64 // how far out of its turn a prefetched chunk may come
}

// push adds a fetch at the end of the list of its kind.
func (q *queue) push(ft *fetch) {
	l := q.list(ft)
	// A source that hangs must not let its queue grow without bound as readers come and
	// go.
	if len(l.fetches) >= max(l.sweep, 64) {
		l.fetches = slices.DeleteFunc(l.fetches, func(x *fetch) bool { return q.skip(x, l) })
		l.sweep = 2 * len(l.fetches)
	}
	l.fetches = append(l.fetches, ft)
	q.index(ft)
}

// pushFront adds a fetch at the front, because its turn has passed.
func (q *queue) pushFront(ft *fetch) {
	l := q.list(ft)
	l.fetches = append([]*fetch{ft}, l.fetches...)
	q.index(ft)
}

// list returns the list in which a fetch waits.
func (q *queue) list(ft *fetch) *list {
	if ft.demand {
		return &q.demand
	}
	return &q.prefetch[ft.rank]
}

func (q *queue) index(ft *fetch) {
	if q.at == nil {
		q.at = make(map[key]*fetch)
	}
	q.at[ft.key] = ft
}

// skip reports whether a fetch no longer waits in a list. A fetch that no longer waits at
// all is not a neighbour of any fetch either.
func (q *queue) skip(ft *fetch, l *list) bool {
	if (ft.state != queued || ft.peer.src != q.peer) && q.at[ft.key] == ft {
		delete(q.at, ft.key)
	}
	return !q.waits(ft, l)
}

// waits reports whether a fetch is to be started from a list.
func (q *queue) waits(ft *fetch, l *list) bool {
	return ft.state == queued && ft.peer.src == q.peer && q.list(ft) == l
}

// len returns how many fetches the lists hold, including skipped ones.
func (q *queue) len() int {
	n := len(q.demand.fetches)
	for i := range q.prefetch {
		n += len(q.prefetch[i].fetches)
	}
	return n
}

// next returns the fetch whose turn it is, or nil. Idle fetches have no turn here: see
// nextIdle.
func (q *queue) next(demand bool) *fetch {
	if demand {
		return q.first(&q.demand)
	}
	for r := range idle {
		if ft := q.first(&q.prefetch[r]); ft != nil {
			return ft
		}
	}
	return nil
}

// nextIdle is next for idle fetches.
func (q *queue) nextIdle() *fetch { return q.first(&q.prefetch[idle]) }

// first returns the first fetch of a list that waits there, or nil.
func (q *queue) first(l *list) *fetch {
	for len(l.fetches) > 0 && q.skip(l.fetches[0], l) {
		l.fetches[0] = nil
		l.fetches = l.fetches[1:]
	}
	if len(l.fetches) == 0 {
		return nil
	}
	return l.fetches[0]
}

// smaller finds a demanded fetch that fits where the first one does not. It does so a
// bounded number of times for each first fetch; otherwise the first one would never
// have room.
func (q *queue) smaller(fits func(*fetch) bool) *fetch {
	first := q.next(true)
	if first == nil || first.passed >= maxPassed {
		return nil
	}
	l := &q.demand
	for _, ft := range l.fetches[1:min(scanLimit, len(l.fetches))] {
		if q.waits(ft, l) && fits(ft) {
			first.passed++
			return ft
		}
	}
	return nil
}

const (
	// maxPassed bounds how many fetches are started before an earlier one that has no
	// room.
	maxPassed = 16
	// scanLimit bounds how many fetches of a list are examined.
	scanLimit = 64
)

// gather collects the fetches that can share a request with first at a place: its
// neighbours in the blob. If first is prefetched and a request may have several ranges,
// gather adds the fetches of the blob that are next in turn, and their neighbours. The
// result is in the order of the request.
func (q *queue) gather(from place, first *fetch, l limits) []*fetch {
	if first.demand || l.ranges == 1 {
		return q.neighbours(from, first, nil, l)
	}
	var batch []*fetch
	list := q.list(first)
	for _, ft := range list.fetches[:min(scanLimit, len(list.fetches))] {
		if !q.waits(ft, list) || !ft.isAt(from) || slices.Contains(batch, ft) {
			continue
		}
		run := q.neighbours(from, ft, batch, l)
		for _, ft := range run {
			l.bytes -= from.stored(ft)
		}
		if l.ranges--; len(batch) > 0 && (l.ranges < 0 || l.bytes < 0) {
			break
		}
		batch = append(batch, run...)
	}
	return batch
}

// neighbours collects first and the fetches beside it in the blob that wait here and
// are not in batch. It adds demanded ones up to l.request. It adds prefetched ones up
// to l.bytes: only behind a demanded one, so that they delay nothing, and only if their
// turn is near, so that chunks arrive roughly in their order. It adds idle ones only
// behind idle ones.
func (q *queue) neighbours(from place, first *fetch, batch []*fetch, l limits) []*fetch {
	run := []*fetch{first}
	bytes := from.stored(first)
	neighbour := func(of *fetch, step int) *fetch {
		ft := q.at[key{of.stream, of.key.chunk + step}]
		if ft == nil || ft.state != queued || !ft.isAt(from) || !from.together(first, ft) || slices.Contains(batch, ft) ||
			!ft.demand && (ft.seq < first.seq-l.near || ft.seq > first.seq+l.near) ||
			q.list(ft) == &q.prefetch[idle] && q.list(first) != &q.prefetch[idle] {
			return nil
		}
		n := from.stored(ft)
		if bytes+n > l.request || bytes+n > l.bytes && !ft.demand {
			return nil
		}
		before, behind := of, ft
		if step < 0 {
			before, behind = ft, of
		}
		if from.offset(before)+from.stored(before) != from.offset(behind) {
			return nil
		}
		return ft
	}
	add := func(ft *fetch) { run, bytes = append(run, ft), bytes+from.stored(ft) }
	for ft := neighbour(first, 1); ft != nil; ft = neighbour(run[len(run)-1], 1) {
		add(ft)
	}
	for ft := neighbour(first, -1); ft != nil && ft.demand == first.demand; ft = neighbour(ft, -1) {
		add(ft)
	}
	slices.SortFunc(run, func(a, b *fetch) int { return cmp.Compare(a.key.chunk, b.key.chunk) })
	return run
}
