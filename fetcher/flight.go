package fetcher

import (
	"cmp"
	"slices"
	"time"

	"thaw/blockmap"
)

// flight is one chunk on its way.
type flight struct {
	key
	source source
	others []source // further places that readers who joined know of
	demand bool     // somebody waits
	wanted int      // by so many prefetches, less those that were taken back
	state  state
	turn   int64     // its place among all that were ever asked for
	began  time.Time // its first try, or when somebody began to wait
	tries  int
	wrong  int

	followers []*flight // of the same content, for other places

	carrier *carrier    // whose download brings it, while state is carried
	at      int64       // where its frame ends in there
	late    *time.Timer // runs while a reader waits for the carrier

	done chan struct{} // closed when err is final
	err  error
}

type state uint8

const (
	queued    state = iota
	running         // within a request
	waiting         // for its next try
	carried         // within a bundle that is on its way
	following       // behind a flight of the same content, to copy it then
	ended
)

// source says where the compressed bytes of a chunk are.
type source struct {
	origin Origin
	table  *blockmap.Table
}

func (fl *flight) chunk() *blockmap.Chunk { return &fl.source.table.Chunks[fl.key.chunk] }

// cost is what the flight takes of MaxBytes.
func (fl *flight) cost() int64 { return int64(fl.chunk().Stored) + int64(fl.chunk().Size()) }

// join finds or makes the flights of chunks, one for each of demanded and then of
// ahead, which nobody waits for. Those that are resident by now have nil. They
// start together, so that neighbours share a request.
func (f *Fetcher) join(demanded, ahead []blockmap.Want, o Origin) []*flight {
	flights := make([]*flight, 0, len(demanded)+len(ahead))
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range demanded {
		flights = append(flights, f.flight(w, o, true))
	}
	for _, w := range ahead {
		flights = append(flights, f.flight(w, o, false))
	}
	f.dispatch()
	return flights
}

// flight finds or makes the flight of a chunk, or returns nil where it is
// resident. f.mu is held.
func (f *Fetcher) flight(w blockmap.Want, o Origin, demand bool) *flight {
	k := key{w.Stream, w.Chunk}
	src := source{o, w.Table}
	if fl := f.mu.flights[k]; fl != nil {
		if fl.source != src && len(fl.others) < 4 {
			fl.others = append(fl.others, src)
		}
		if demand {
			f.promote(fl)
		} else {
			fl.wanted++
		}
		return fl
	}
	if w.Stream.Has(w.Chunk) {
		return nil
	}
	f.mu.turns++
	fl := &flight{key: k, source: src, demand: demand, turn: f.mu.turns, done: make(chan struct{})}
	if !demand {
		fl.wanted = 1
	}
	if f.mu.closed {
		fl.err = blockmap.ErrClosed
		close(fl.done)
		return fl
	}
	f.mu.flights[k] = fl
	f.board(fl)
	return fl
}

// promote makes a flight, and the one that it follows, one that somebody waits
// for. f.mu is held, and dispatch is called behind it.
func (f *Fetcher) promote(fl *flight) {
	if fl.demand {
		return
	}
	fl.demand = true
	fl.began = time.Now()
	switch fl.state {
	case queued:
		f.mu.demand = append(f.mu.demand, fl)
	case carried:
		f.awaitCarrier(fl)
	case following:
		if leader := f.mu.contents[fl.chunk().Digest]; leader != nil {
			f.promote(leader)
		}
	}
}

// board has a flight be fetched: alone, or behind one that brings its content
// already. A flight that a bundle was to bring has had enough of waiting for
// such. f.mu is held, and dispatch is called behind it.
func (f *Fetcher) board(fl *flight) {
	digest := fl.chunk().Digest
	leader := f.mu.contents[digest]
	switch {
	case leader == fl || leader == nil:
	case leader.state == carried && fl.state == carried:
		fl.followers = append(fl.followers, leader.followers...)
		leader.followers = nil
	default:
		fl.state = following
		leader.followers = append(append(leader.followers, fl), fl.followers...)
		fl.followers = nil
		if fl.demand {
			f.promote(leader)
		}
		return
	}
	f.mu.contents[digest] = fl
	f.enqueue(fl)
}

func (f *Fetcher) enqueue(fl *flight) {
	fl.state = queued
	if fl.demand {
		f.mu.demand = append(f.mu.demand, fl)
	} else {
		f.mu.prefetch = append(f.mu.prefetch, fl)
	}
}

// dispatch starts requests while the bounds allow. f.mu is held.
func (f *Fetcher) dispatch() {
	for !f.mu.closed {
		demand := true
		q := &f.mu.demand
		skipStarted(q)
		if len(*q) == 0 {
			demand, q = false, &f.mu.prefetch
			skipStarted(q)
			if len(*q) == 0 {
				return
			}
		}
		batch := f.gather((*q)[0])
		var bytes, stored int64
		for _, fl := range batch {
			bytes += fl.cost()
			stored += int64(fl.chunk().Stored)
		}
		// One request is always let through, however large its chunk is, and
		// whatever bundle hangs.
		if a := &f.mu.active; a.requests > f.mu.carriers && (a.requests >= f.o.MaxRequests || a.bytes+bytes > f.o.MaxBytes) {
			return
		}
		if a := &f.mu.ahead; !demand && a.requests > f.mu.carriers &&
			(float64(a.requests) >= float64(f.o.MaxRequests)*f.o.PrefetchShare ||
				float64(a.bytes+bytes) > float64(f.o.MaxBytes)*f.o.PrefetchShare ||
				a.requests >= f.mu.carriers+paced(batch[0].source.origin) && a.stored+stored > f.mu.pace.window()) {
			return
		}
		if f.mu.active.requests == f.mu.carriers {
			f.mu.pace.resume()
		}
		f.mu.active.add(1, bytes, stored)
		if !demand {
			f.mu.ahead.add(1, bytes, stored)
		}
		f.mostAlive.Store(max(f.mostAlive.Load(), int64(f.mu.active.requests)))
		for _, fl := range batch {
			fl.state = running
			if fl.tries == 0 {
				fl.began = time.Now()
			}
		}
		f.wg.Go(func() {
			f.request(batch)
			f.mu.Lock()
			defer f.mu.Unlock()
			f.mu.active.add(-1, -bytes, -stored)
			if !demand {
				f.mu.ahead.add(-1, -bytes, -stored)
			}
			f.dispatch()
		})
	}
}

// skipStarted drops the flights at the head of q that need not start from
// there: they went along with a neighbour, or were promoted and have ended.
func skipStarted(q *[]*flight) {
	for len(*q) > 0 && (*q)[0].state != queued {
		(*q)[0] = nil
		*q = (*q)[1:]
	}
}

// pacedRequests are always in flight, however large they are: each of them leaves
// the line idle for a round trip.
const pacedRequests = 5

// pacedRanges are, where a request may have several ranges and so as many bytes as
// the window has. With two the line has been seen idle for a seventh of the time,
// with three for a sixteenth; and each is in the way of what a reader demands.
const pacedRanges = 3

func paced(o Origin) int {
	if rangesOf(o) > 1 {
		return pacedRanges
	}
	return pacedRequests
}

// nearTurns is how far from its turn a chunk may be fetched that nobody waits for,
// at leastWindow. It goes by the square of the window: on a line that is twice as
// fast a chunk out of its turn holds up others half as long, and a request that it
// saves is worth twice as many bytes.
const nearTurns = 8

// gather collects the flights that can share a request with first: its neighbours
// in the blob and, where nobody waits for it and the origin gives several ranges,
// what of the blob is next in turn, with its neighbours.
func (f *Fetcher) gather(first *flight) []*flight {
	if first.demand {
		return f.gatherRun(first, nil, f.o.MaxRequest)
	}
	// What nobody waits for comes in several requests at once, so that the line
	// is not idle for the time from a request to its answer.
	window := f.mu.pace.window()
	ranges := rangesOf(first.source.origin)
	if ranges == 1 {
		return f.gatherRun(first, nil, min(f.o.MaxRequest, window/2-min(window, leastWindow)/4))
	}
	room := min(f.o.MaxRequest, window)
	var batch []*flight
	for _, fl := range f.mu.prefetch[:min(reach, len(f.mu.prefetch))] {
		if fl.state != queued || fl.demand || fl.source != first.source || slices.Contains(batch, fl) {
			continue
		}
		run := f.gatherRun(fl, batch, room)
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

// gatherRun collects first and its queued neighbours that are not in batch: at most
// so many bytes, but for what somebody waits for, which goes in any case.
// Those that nobody waits for only come behind one that somebody does, so that
// they hold up nothing; and else only if their turn is near, so that chunks come
// about in their order.
func (f *Fetcher) gatherRun(first *flight, batch []*flight, most int64) []*flight {
	run := []*flight{first}
	bytes := int64(first.chunk().Stored)
	window := f.mu.pace.window()
	near := max(nearTurns*window/leastWindow*window/leastWindow, 1)
	neighbour := func(of *flight, step int) *flight {
		fl := f.mu.flights[key{of.stream, of.key.chunk + step}]
		if fl == nil || fl.state != queued || fl.source != first.source || slices.Contains(batch, fl) ||
			!fl.demand && (fl.turn < first.turn-near || fl.turn > first.turn+near) {
			return nil
		}
		if n := bytes + int64(fl.chunk().Stored); n > f.o.MaxRequest || n > most && !fl.demand {
			return nil
		}
		a, b := of.chunk(), fl.chunk()
		if step < 0 {
			a, b = b, a
		}
		if a.Offset+int64(a.Stored) != b.Offset {
			return nil
		}
		return fl
	}
	for fl := neighbour(first, 1); fl != nil; fl = neighbour(run[len(run)-1], 1) {
		run = append(run, fl)
		bytes += int64(fl.chunk().Stored)
	}
	for fl := neighbour(first, -1); fl != nil && fl.demand == first.demand; fl = neighbour(fl, -1) {
		run = append(run, fl)
		bytes += int64(fl.chunk().Stored)
	}
	slices.SortFunc(run, func(a, b *flight) int { return cmp.Compare(a.key.chunk, b.key.chunk) })
	return run
}

// reach is how many of the queue are looked at for what else is in a blob.
const reach = 64

// rangesOf is how many ranges of a blob an origin gives in one answer.
func rangesOf(o Origin) int {
	if r, ok := o.(Ranger); ok {
		return r.Ranges()
	}
	return 1
}

// forget takes back prefetches, each of which joined a flight so many times. It
// ends the flights that nobody else wants and that have not started.
func (f *Fetcher) forget(flights map[*flight]int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for fl, n := range flights {
		fl.wanted -= n
		if fl.wanted == 0 && !fl.demand && fl.state != running && fl.state != carried {
			f.end(fl, err)
		}
	}
	f.dispatch()
}

// end makes err final and wakes who waits. f.mu is held.
func (f *Fetcher) end(fl *flight, err error) {
	if f.mu.flights[fl.key] != fl {
		return
	}
	delete(f.mu.flights, fl.key)
	fl.state = ended
	if fl.late != nil {
		fl.late.Stop()
	}
	fl.err = err
	close(fl.done)
	if digest := fl.chunk().Digest; f.mu.contents[digest] == fl {
		delete(f.mu.contents, digest)
	}
	if f.mu.closed {
		return // Close ends them all
	}
	// Their content is here now, to be copied; or else they try themselves,
	// the first of them for all.
	followers := fl.followers
	fl.followers = nil
	for _, follower := range followers {
		switch {
		case follower.state != following:
		case err == nil:
			f.enqueue(follower)
		default:
			f.board(follower)
		}
	}
}
