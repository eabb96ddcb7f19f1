package fetcher

import (
	"context"
	"slices"
	"time"

	"thaw/blockmap"
)

// fetch is one chunk that is to become resident. There is at most one for each chunk of
// the cache. Every reader or prefetch that needs the chunk joins it.
type fetch struct {
	key
	place  place   // where the next try reads the chunk, or the last one did
	others []place // other places that have the chunk, the next one first

	// near is the peers that are asked before the origin; nil for none. route says which of
	// them comes next. peer is the one that is asked in the next try, as the owner if owner
	// is set; its source is nil if the next try goes to place. fromOrigin says that the
	// route has come to its end, originFailed that an origin has failed since.
	near                     *Nearby
	by                       *Bound // the reader's that made it, if it has peers
	route                    Route
	peer                     place
	owner                    bool
	fromOrigin, originFailed bool

	demand bool // a reader waits for it, or for a duplicate of it
	rank   rank // its turn among prefetches while no reader waits
	// The readers that wait and the prefetches that want it, except those that left.
	readers, wanted int
	hint            *Bound // one of wanted is a hint or prediction of this Bound
	state           state
	seq             int64 // its number among all fetches, in order of arrival
	started         bool
	began           time.Time // when it was first tried, or when a reader began to wait
	since           time.Time // when a reader began to wait
	tries           int
	passed          int // smaller fetches that were started before it
	wrong           int // tries that brought wrong bytes

	// need is the leaves that those who have joined it need, and reads those that readers
	// need. moved is closed when leaves of the chunk have come before the rest; nil if
	// nobody looks.
	need, reads blockmap.LeafSet
	moved       chan struct{}

	requests      []*request // requests that bring it, while it is running
	noExtraBefore time.Time  // no extra request may be made before this time

	original   *fetch   // the fetch in flight that it is a duplicate of
	duplicates []*fetch // fetches of the same content for other chunks of the cache

	download *download        // the bundle download that brings leaves of it; nil if there is none
	coming   blockmap.LeafSet // the leaves that the download is still to bring
	arriving []arriving       // and where they are in the bundle
	late     *time.Timer      // runs while a reader waits for the download

	done chan struct{} // closed when err is final
	err  error
}

type state uint8

const (
	queued      state = iota // it waits for a request
	running                  // one or several requests bring it
	waiting                  // it waits for its next try
	downloading              // a bundle download brings leaves of it, and no request does
	duplicate                // another fetch brings its content; then it copies the content
	ended
)

func (ft *fetch) chunk() *blockmap.Chunk { return &ft.place.table.Chunks[ft.key.chunk] }

// at returns where a chunk lies at a source.
func (ft *fetch) at(s *source) place {
	if ft.place.src == s {
		return ft.place
	}
	if ft.peer.src == s {
		return ft.peer
	}
	for _, p := range ft.others {
		if p.src == s {
			return p
		}
	}
	return ft.place
}

// isAt reports whether the next try may read a chunk at a place.
func (ft *fetch) isAt(p place) bool {
	if ft.peer.src != nil {
		return ft.peer == p
	}
	return ft.hasPlace(p)
}

// hasPlace reports whether a chunk can be read at a place of an origin.
func (ft *fetch) hasPlace(p place) bool { return ft.place == p || slices.Contains(ft.others, p) }

// take makes p the place of the next try.
func (ft *fetch) take(p place) {
	if i := slices.Index(ft.others, p); i >= 0 && ft.place != p {
		ft.place, ft.others[i] = p, ft.place
	}
}

// here reports whether all that is needed of it is resident.
func (ft *fetch) here() bool {
	if len(ft.duplicates) > 0 || ft.need == 0 {
		return ft.stream.Has(ft.key.chunk)
	}
	return ft.stream.HasLeaves(ft.key.chunk, ft.need)
}

// isWanted reports whether a reader or a prefetch still wants it, or a duplicate of it.
func (ft *fetch) isWanted() bool {
	return ft.demand || ft.wanted > 0 || slices.ContainsFunc(ft.duplicates, (*fetch).isWanted)
}

// hasReader reports whether a reader waits for it, or for a duplicate of it.
func (ft *fetch) hasReader() bool {
	return ft.readers > 0 || slices.ContainsFunc(ft.duplicates, func(x *fetch) bool { return x.demand })
}

// markDemand records that a reader waits for a fetch from now on.
func (f *Fetcher) markDemand(ft *fetch) {
	ft.demand = true
	ft.began = time.Now()
	ft.started = ft.state == running
	ft.since = ft.began
	f.mu.urgent[ft] = struct{}{}
	f.watch()
}

// promote makes a prefetch a demand. If it is a duplicate, promote does the same for
// its original. f.mu is held; the caller calls dispatch.
func (f *Fetcher) promote(ft *fetch) {
	if ft.demand || ft.state == ended {
		return
	}
	f.markDemand(ft)
	switch ft.state {
	case queued:
		f.push(ft)
	case running:
		if f.leaveIdle(ft) {
			break
		}
		for _, r := range ft.requests {
			r.markDemand()
		}
		f.wakePaused()
	case downloading:
		f.awaitDownload(ft)
	case duplicate:
		f.promote(ft.original)
	}
}

// leave removes a reader from fetches. It cancels the fetches that no other reader or
// prefetch wants.
func (f *Fetcher) leave(fetches []*fetch) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, ft := range fetches {
		if ft != nil {
			ft.readers--
			f.update(ft)
		}
	}
	f.dispatch()
}

// await waits until what w needs of the chunk of a fetch is resident, until the fetch
// ends, or until ctx does. ended says whether the fetch has ended. If it has not, the caller
// is still counted among those who want it.
func (f *Fetcher) await(ctx context.Context, ft *fetch, w blockmap.Want) (ended bool, err error) {
	for woken := false; ; woken = true {
		f.mu.Lock()
		if ft.moved == nil && (ft.download != nil || ft.near != nil) {
			ft.moved = make(chan struct{})
		}
		moved := ft.moved
		f.mu.Unlock()
		select {
		case <-ft.done:
			return true, ft.err
		default:
		}
		// The download may have ended by now, or a peer may have sent these leaves first.
		if (moved != nil || woken) && w.Here() {
			return false, nil
		}
		select {
		case <-ft.done:
			return true, ft.err
		case <-moved:
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}

// update adapts a fetch to the readers and prefetches that are left: it may become a
// prefetch again, or end. f.mu is held; the caller calls dispatch.
func (f *Fetcher) update(ft *fetch) {
	if ft.state == ended {
		return
	}
	calmed := ft.demand && !ft.hasReader()
	if calmed {
		ft.demand = false
		ft.reads = 0
		if ft.wanted == 0 {
			ft.need = 0
		}
		f.calmed(ft)
		if ft.state == downloading {
			ft.download.leave(ft)
		}
	}
	wanted := ft.isWanted()
	switch ft.state {
	case queued:
		if !wanted {
			f.drop(ft)
		} else if calmed {
			// Its turn as a prefetch has passed, so it goes first.
			src := ft.where().src
			src.queue.pushFront(ft)
			f.addSource(src)
		}
	case running:
		for _, r := range slices.Clone(ft.requests) {
			f.cancelUnwanted(r)
		}
		f.wakePaused()
	case waiting:
		if !wanted {
			f.drop(ft)
		}
	case duplicate:
		original := ft.original
		if !wanted {
			f.drop(ft)
		}
		f.update(original)
	}
}

// drop ends a fetch that no reader or prefetch wants.
func (f *Fetcher) drop(ft *fetch) {
	f.cancelled.Add(1)
	f.end(ft, context.Canceled)
}

// cancelPrefetches removes prefetches from fetches; each has joined its fetch the given
// number of times. Fetches that no other reader or prefetch wants end: at once if they
// have not started, and otherwise after cancelAfter, because their bytes may arrive
// before that and be of use.
func (f *Fetcher) cancelPrefetches(fetches map[*fetch]int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var started []*fetch
	for ft, n := range fetches {
		ft.wanted -= n
		switch ft.state {
		case running:
			started = append(started, ft)
		case queued, waiting, duplicate:
			if !ft.isWanted() {
				original := ft.original
				f.end(ft, err)
				if original != nil {
					f.update(original)
				}
			}
		}
	}
	if len(started) > 0 {
		time.AfterFunc(cancelAfter, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			for _, ft := range started {
				f.update(ft)
			}
			f.dispatch()
		})
	}
	f.dispatch()
}

// cancelAfter is how long a request continues if only stopped prefetches wanted it.
const cancelAfter = time.Second

// end ends a fetch with err, nil for success, and wakes its waiters. f.mu is held.
func (f *Fetcher) end(ft *fetch, err error) {
	if f.mu.fetches[ft.key] != ft {
		return
	}
	delete(f.mu.fetches, ft.key)
	if ft.download != nil {
		ft.download.leave(ft)
	}
	if ft.original != nil {
		ft.original.duplicates = slices.DeleteFunc(ft.original.duplicates, func(x *fetch) bool { return x == ft })
		ft.original = nil
	}
	ft.state = ended
	f.calmed(ft)
	if ft.hint != nil {
		delete(ft.hint.hints, ft)
	}
	ft.err = err
	close(ft.done)
	// After a success the duplicates copy the content. After a failure the first
	// duplicate becomes the original of the others.
	duplicates := ft.duplicates
	ft.duplicates = nil
	for _, x := range duplicates {
		x.original = nil
	}
	digest := ft.chunk().Digest
	other := f.mu.contents[digest]
	if other == ft {
		delete(f.mu.contents, digest)
	}
	if f.mu.closed {
		return // Close ends the duplicates
	}
	for _, r := range ft.requests {
		f.cancelUnwanted(r)
	}
	ft.requests = nil
	for _, d := range duplicates {
		switch {
		case err == nil:
			f.push(d) // to be copied
		case d.isWanted():
			f.enqueue(d)
		default:
			f.end(d, err)
		}
	}
	if err == nil && other != nil && other != ft {
		f.copyTo(other)
	}
}
