package fetcher

import (
	"context"
	"slices"
	"time"

	"thaw/blockmap"
)

// fetch is one chunk on its way.
type fetch struct {
	key
	place  place
	others []place // further places that readers who joined know of
	demand bool    // somebody waits for it, or for one that follows it
	// Readers that wait, and prefetches that want it, less those that left.
	readers, wanted int
	hint            *Bound // that has guessed it, which is one of wanted
	state           state
	seq             int64 // its place among all that were ever asked for
	started         bool
	began           time.Time // its first try, or when somebody began to wait
	since           time.Time // somebody waits
	tries           int
	passed          int // how many were started before it that are smaller
	wrong           int

	requests      []*request // that are to bring it, while it is running
	noExtraBefore time.Time  // no extra request for it before

	original   *fetch   // that it follows
	duplicates []*fetch // of the same content, for other places

	download *download   // whose download brings it, while state is downloading
	until    int64       // where its frame ends in there
	late     *time.Timer // runs while a reader waits for the download

	done chan struct{} // closed when err is final
	err  error
}

type state uint8

const (
	queued      state = iota
	running           // within a request, or several
	waiting           // for its next try
	downloading       // within a bundle that is on its way
	duplicated        // behind a fetch of the same content, to copy it then
	ended
)

func (ft *fetch) chunk() *blockmap.Chunk { return &ft.place.table.Chunks[ft.key.chunk] }

// cost is what a chunk takes of MaxBytes.
func cost(c *blockmap.Chunk) int64 { return int64(c.Stored) + int64(c.Size()) }

// at is where a source has the chunk.
func (ft *fetch) at(s *source) place {
	if ft.place.src == s {
		return ft.place
	}
	for _, p := range ft.others {
		if p.src == s {
			return p
		}
	}
	return ft.place
}

func (ft *fetch) isAt(p place) bool { return ft.place == p || slices.Contains(ft.others, p) }

// take makes p the place that is tried.
func (ft *fetch) take(p place) {
	if i := slices.Index(ft.others, p); i >= 0 && ft.place != p {
		ft.place, ft.others[i] = p, ft.place
	}
}

// isWanted says whether anybody waits for it, or has it prefetched.
func (ft *fetch) isWanted() bool {
	return ft.demand || ft.wanted > 0 || slices.ContainsFunc(ft.duplicates, (*fetch).isWanted)
}

// isDemanded says whether a reader waits for it, or for one that follows it.
func (ft *fetch) hasReader() bool {
	return ft.readers > 0 || slices.ContainsFunc(ft.duplicates, func(x *fetch) bool { return x.demand })
}

// hurry notes that somebody waits for a fetch from now on.
func (f *Fetcher) markDemand(ft *fetch) {
	ft.demand = true
	ft.began = time.Now()
	ft.started = ft.state == running
	ft.since = ft.began
	f.mu.urgent[ft] = struct{}{}
	f.watch()
}

// promote makes a fetch, and the one that it follows, one that somebody waits
// for. f.mu is held, and dispatch is called behind it.
func (f *Fetcher) promote(ft *fetch) {
	if ft.demand || ft.state == ended {
		return
	}
	f.markDemand(ft)
	switch ft.state {
	case queued:
		f.push(ft)
	case running:
		for _, r := range ft.requests {
			r.markDemand()
		}
		f.wakePaused()
	case downloading:
		f.awaitDownload(ft)
	case duplicated:
		f.promote(ft.original)
	}
}

// leave takes back that readers wait for fetches. What nobody else wants is not
// fetched any more.
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

// update has a fetch be what those who are left want of it, which may be
// nothing. f.mu is held, and dispatch is called behind it.
func (f *Fetcher) update(ft *fetch) {
	if ft.state == ended {
		return
	}
	calmed := ft.demand && !ft.hasReader()
	if calmed {
		ft.demand = false
		delete(f.mu.urgent, ft)
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
			// Its turn has been, so it is the next.
			ft.place.src.queue.pushFront(ft)
			f.addSource(ft.place.src)
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
	case duplicated:
		original := ft.original
		if !wanted {
			f.drop(ft)
		}
		f.update(original)
	}
}

// drop ends a fetch that nobody wants.
func (f *Fetcher) drop(ft *fetch) {
	f.cancelled.Add(1)
	f.end(ft, context.Canceled)
}

// cancelPrefetches takes back prefetches, each of which joined a fetch so many times. It
// ends the fetches that nobody else wants: at once those that have not started,
// and the others if they go on for long, since what comes may be of use.
func (f *Fetcher) cancelPrefetches(fetches map[*fetch]int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var started []*fetch
	for ft, n := range fetches {
		ft.wanted -= n
		switch ft.state {
		case running:
			started = append(started, ft)
		case queued, waiting, duplicated:
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

// cancelAfter is how long a request goes on that only prefetches wanted that have
// been stopped.
const cancelAfter = time.Second

// end makes err final and wakes who waits. f.mu is held.
func (f *Fetcher) end(ft *fetch, err error) {
	if f.mu.fetches[ft.key] != ft {
		return
	}
	delete(f.mu.fetches, ft.key)
	if ft.state == downloading {
		ft.download.leave(ft)
	}
	if ft.original != nil {
		ft.original.duplicates = slices.DeleteFunc(ft.original.duplicates, func(x *fetch) bool { return x == ft })
		ft.original = nil
	}
	ft.state = ended
	delete(f.mu.urgent, ft)
	if ft.hint != nil {
		delete(ft.hint.hints, ft)
	}
	ft.err = err
	close(ft.done)
	// Who follows it has the content now, to be copied; or else they try
	// themselves, the first of them for all.
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
		return // Close ends them all
	}
	for _, r := range ft.requests {
		f.cancelUnwanted(r)
	}
	ft.requests = nil
	for _, duplicate := range duplicates {
		switch {
		case err == nil:
			f.push(duplicate)
		case duplicate.isWanted():
			f.enqueue(duplicate)
		default:
			f.end(duplicate, err)
		}
	}
	if err == nil && other != nil && other != ft {
		f.copyTo(other)
	}
}
