package fetcher

import (
	"context"
	"slices"
	"time"

	"thaw/blockmap"
)

// flight is one chunk on its way.
type flight struct {
	key
	place  place
	others []place // further places that readers who joined know of
	demand bool    // somebody waits for it, or for one that follows it
	// Readers that wait, and prefetches that want it, less those that left.
	readers, wanted int
	hint            *Bound // that has guessed it, which is one of wanted
	state           state
	turn            int64 // its place among all that were ever asked for
	started         bool
	began           time.Time // its first try, or when somebody began to wait
	since           time.Time // somebody waits
	tries           int
	passed          int // how many were started before it that are smaller
	wrong           int

	requests []*request // that are to bring it, while it is running
	rested   time.Time  // no extra request for it before

	leader    *flight   // that it follows
	followers []*flight // of the same content, for other places

	carrier *carrier    // whose download brings it, while state is carried
	until   int64       // where its frame ends in there
	late    *time.Timer // runs while a reader waits for the carrier

	done chan struct{} // closed when err is final
	err  error
}

type state uint8

const (
	queued    state = iota
	running         // within a request, or several
	waiting         // for its next try
	carried         // within a bundle that is on its way
	following       // behind a flight of the same content, to copy it then
	ended
)

func (fl *flight) chunk() *blockmap.Chunk { return &fl.place.table.Chunks[fl.key.chunk] }

// cost is what a chunk takes of MaxBytes.
func cost(c *blockmap.Chunk) int64 { return int64(c.Stored) + int64(c.Size()) }

// at is where a source has the chunk.
func (fl *flight) at(s *source) place {
	if fl.place.src == s {
		return fl.place
	}
	for _, p := range fl.others {
		if p.src == s {
			return p
		}
	}
	return fl.place
}

func (fl *flight) isAt(p place) bool { return fl.place == p || slices.Contains(fl.others, p) }

// take makes p the place that is tried.
func (fl *flight) take(p place) {
	if i := slices.Index(fl.others, p); i >= 0 && fl.place != p {
		fl.place, fl.others[i] = p, fl.place
	}
}

// isWanted says whether anybody waits for it, or has it prefetched.
func (fl *flight) isWanted() bool {
	return fl.demand || fl.wanted > 0 || slices.ContainsFunc(fl.followers, (*flight).isWanted)
}

// isRead says whether a reader waits for it, or for one that follows it.
func (fl *flight) isRead() bool {
	return fl.readers > 0 || slices.ContainsFunc(fl.followers, func(x *flight) bool { return x.demand })
}

// Who asks for chunks.
type asker uint8

const (
	reader   asker = iota
	prefetch       // which takes back what it does not want any more
	hint           // which is dropped where there are many
)

// maxHints bounds the flights that a Bound has by hints and guesses.
const maxHints = 256

// join finds or makes the flights of chunks: one for each of wants, or nil where
// it is resident. Hints have no flight but the ones they make. All start together,
// so that neighbours share a request.
func (b *Bound) join(wants []blockmap.Want, hinted []blockmap.Want, as asker) []*flight {
	f := b.f
	flights := make([]*flight, len(wants))
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, w := range wants {
		flights[i] = b.flight(w, as)
	}
	for _, w := range hinted {
		b.flight(w, hint)
	}
	f.dispatch()
	return flights
}

// flight finds or makes the flight of a chunk, or returns nil where it is
// resident. f.mu is held.
func (b *Bound) flight(w blockmap.Want, as asker) *flight {
	f := b.f
	k := key{w.Stream, w.Chunk}
	here := place{b.src, w.Table}
	if fl := f.mu.flights[k]; fl != nil {
		if as == hint {
			return fl // it comes anyway
		}
		if !fl.isAt(here) && len(fl.others) < 4 {
			fl.others = append(fl.others, here)
			if fl.state == queued {
				f.list(fl, b.src)
			}
		}
		if as == prefetch {
			fl.wanted++
			return fl
		}
		fl.readers++
		f.promote(fl)
		return fl
	}
	if w.Stream.Has(w.Chunk) {
		return nil
	}
	if as == hint && len(b.hints) >= maxHints {
		f.dropped.Add(1)
		return nil
	}
	f.mu.turns++
	fl := &flight{key: k, place: here, turn: f.mu.turns, done: make(chan struct{})}
	if f.mu.closed {
		fl.state, fl.err = ended, blockmap.ErrClosed
		close(fl.done)
		return fl
	}
	f.mu.flights[k] = fl
	switch as {
	case reader:
		fl.readers = 1
		f.hurry(fl)
	case hint:
		fl.hint = b
		b.hints[fl] = struct{}{}
		fallthrough
	case prefetch:
		fl.wanted = 1
	}
	f.board(fl)
	return fl
}

// hurry notes that somebody waits for a flight from now on.
func (f *Fetcher) hurry(fl *flight) {
	fl.demand = true
	fl.began = time.Now()
	fl.started = fl.state == running
	fl.since = fl.began
	f.mu.urgent[fl] = struct{}{}
	f.watch()
}

// promote makes a flight, and the one that it follows, one that somebody waits
// for. f.mu is held, and dispatch is called behind it.
func (f *Fetcher) promote(fl *flight) {
	if fl.demand || fl.state == ended {
		return
	}
	f.hurry(fl)
	switch fl.state {
	case queued:
		f.enqueue(fl)
	case running:
		for _, r := range fl.requests {
			r.hurry()
		}
		f.turnover()
	case carried:
		f.awaitCarrier(fl)
	case following:
		f.promote(fl.leader)
	}
}

// leave takes back that readers wait for flights. What nobody else wants is not
// fetched any more.
func (f *Fetcher) leave(flights []*flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, fl := range flights {
		if fl != nil {
			fl.readers--
			f.reconsider(fl)
		}
	}
	f.dispatch()
}

// reconsider has a flight be what those who are left want of it, which may be
// nothing. f.mu is held, and dispatch is called behind it.
func (f *Fetcher) reconsider(fl *flight) {
	if fl.state == ended {
		return
	}
	calmed := fl.demand && !fl.isRead()
	if calmed {
		fl.demand = false
		delete(f.mu.urgent, fl)
		if fl.state == carried {
			fl.carrier.leave(fl)
		}
	}
	wanted := fl.isWanted()
	switch fl.state {
	case queued:
		if !wanted {
			f.drop(fl)
		} else if calmed {
			// Its turn has been, so it is the next.
			q := &fl.place.src.prefetch
			q.flights = append([]*flight{fl}, q.flights...)
			f.enlist(fl.place.src)
		}
	case running:
		for _, r := range slices.Clone(fl.requests) {
			f.check(r)
		}
		f.turnover()
	case waiting:
		if !wanted {
			f.drop(fl)
		}
	case following:
		leader := fl.leader
		if !wanted {
			f.drop(fl)
		}
		f.reconsider(leader)
	}
}

// drop ends a flight that nobody wants.
func (f *Fetcher) drop(fl *flight) {
	f.cancelled.Add(1)
	f.end(fl, context.Canceled)
}

// board has a flight be fetched: alone, or behind one that brings its content
// already. A flight that a bundle was to bring has had enough of waiting for
// such. f.mu is held, and dispatch is called behind it.
func (f *Fetcher) board(fl *flight) {
	if fl.state == carried {
		fl.carrier.leave(fl)
	}
	digest := fl.chunk().Digest
	leader := f.mu.contents[digest]
	switch {
	case leader == fl || leader == nil:
	case leader.state == carried && fl.state == carried:
		f.follow(fl, leader.followers...)
		leader.followers = nil
	default:
		fl.state = following
		f.follow(leader, fl)
		f.follow(leader, fl.followers...)
		fl.followers = nil
		if fl.demand {
			f.promote(leader)
		}
		return
	}
	f.mu.contents[digest] = fl
	f.enqueue(fl)
}

func (f *Fetcher) follow(leader *flight, followers ...*flight) {
	for _, x := range followers {
		x.leader = leader
	}
	leader.followers = append(leader.followers, followers...)
}

// forget takes back prefetches, each of which joined a flight so many times. It
// ends the flights that nobody else wants: at once those that have not started,
// and the others if they go on for long, since what comes may be of use.
func (f *Fetcher) forget(flights map[*flight]int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var started []*flight
	for fl, n := range flights {
		fl.wanted -= n
		switch fl.state {
		case running:
			started = append(started, fl)
		case queued, waiting, following:
			if !fl.isWanted() {
				leader := fl.leader
				f.end(fl, err)
				if leader != nil {
					f.reconsider(leader)
				}
			}
		}
	}
	if len(started) > 0 {
		time.AfterFunc(forgetAfter, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			for _, fl := range started {
				f.reconsider(fl)
			}
			f.dispatch()
		})
	}
	f.dispatch()
}

// forgetAfter is how long a request goes on that only prefetches wanted that have
// been stopped.
const forgetAfter = time.Second

// end makes err final and wakes who waits. f.mu is held.
func (f *Fetcher) end(fl *flight, err error) {
	if f.mu.flights[fl.key] != fl {
		return
	}
	delete(f.mu.flights, fl.key)
	if fl.state == carried {
		fl.carrier.leave(fl)
	}
	if fl.leader != nil {
		fl.leader.followers = slices.DeleteFunc(fl.leader.followers, func(x *flight) bool { return x == fl })
		fl.leader = nil
	}
	fl.state = ended
	delete(f.mu.urgent, fl)
	if fl.hint != nil {
		delete(fl.hint.hints, fl)
	}
	fl.err = err
	close(fl.done)
	// Who follows it has the content now, to be copied; or else they try
	// themselves, the first of them for all.
	followers := fl.followers
	fl.followers = nil
	for _, x := range followers {
		x.leader = nil
	}
	digest := fl.chunk().Digest
	other := f.mu.contents[digest]
	if other == fl {
		delete(f.mu.contents, digest)
	}
	if f.mu.closed {
		return // Close ends them all
	}
	for _, r := range fl.requests {
		f.check(r)
	}
	fl.requests = nil
	for _, follower := range followers {
		switch {
		case err == nil:
			f.enqueue(follower)
		case follower.isWanted():
			f.board(follower)
		default:
			f.end(follower, err)
		}
	}
	if err == nil && other != nil && other != fl {
		f.copyTo(other)
	}
}

// copyTo fills the chunk of a flight with a copy: another was quicker to bring its
// content, from a source that works.
func (f *Fetcher) copyTo(fl *flight) {
	if !fl.isWanted() {
		return
	}
	f.wg.Go(func() {
		if fl.stream.FillLocal(fl.key.chunk) {
			f.local.Add(1)
			f.mu.Lock()
			defer f.mu.Unlock()
			f.end(fl, nil)
			f.dispatch()
		}
	})
}
