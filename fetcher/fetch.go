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

// Who asks for chunks.
type asker uint8

const (
	reader   asker = iota
	prefetch       // which takes back what it does not want any more
	hint           // which is dropped where there are many
)

// maxHints bounds the fetches that a Bound has by hints and guesses.
const maxHints = 256

// join finds or makes the fetches of chunks: one for each of wants, or nil where
// it is resident. Hints have no fetch but the ones they make. All start together,
// so that neighbours share a request.
func (b *Bound) join(wants []blockmap.Want, hinted []blockmap.Want, as asker) []*fetch {
	f := b.f
	fetches := make([]*fetch, len(wants))
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, w := range wants {
		fetches[i] = b.fetch(w, as)
	}
	for _, w := range hinted {
		b.fetch(w, hint)
	}
	f.dispatch()
	return fetches
}

// fetch finds or makes the fetch of a chunk, or returns nil where it is
// resident. f.mu is held.
func (b *Bound) fetch(w blockmap.Want, as asker) *fetch {
	f := b.f
	k := key{w.Stream, w.Chunk}
	here := place{b.src, w.Table}
	if ft := f.mu.fetches[k]; ft != nil {
		if as == hint {
			return ft // it comes anyway
		}
		if !ft.isAt(here) && len(ft.others) < 4 {
			ft.others = append(ft.others, here)
			if ft.state == queued {
				f.pushTo(ft, b.src)
			}
		}
		if as == prefetch {
			ft.wanted++
			return ft
		}
		ft.readers++
		f.promote(ft)
		return ft
	}
	if w.Stream.Has(w.Chunk) {
		return nil
	}
	if as == hint && len(b.hints) >= maxHints {
		f.dropped.Add(1)
		return nil
	}
	f.mu.seq++
	ft := &fetch{key: k, place: here, seq: f.mu.seq, done: make(chan struct{})}
	if f.mu.closed {
		ft.state, ft.err = ended, blockmap.ErrClosed
		close(ft.done)
		return ft
	}
	f.mu.fetches[k] = ft
	switch as {
	case reader:
		ft.readers = 1
		f.markDemand(ft)
	case hint:
		ft.hint = b
		b.hints[ft] = struct{}{}
		fallthrough
	case prefetch:
		ft.wanted = 1
	}
	f.enqueue(ft)
	return ft
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
			q := &ft.place.src.prefetch
			q.fetches = append([]*fetch{ft}, q.fetches...)
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

// enqueue has a fetch be fetched: alone, or behind one that brings its content
// already. A fetch that a bundle was to bring has had enough of waiting for
// such. f.mu is held, and dispatch is called behind it.
func (f *Fetcher) enqueue(ft *fetch) {
	if ft.state == downloading {
		ft.download.leave(ft)
	}
	digest := ft.chunk().Digest
	original := f.mu.contents[digest]
	switch {
	case original == ft || original == nil:
	case original.state == downloading && ft.state == downloading:
		f.addDuplicates(ft, original.duplicates...)
		original.duplicates = nil
	default:
		ft.state = duplicated
		f.addDuplicates(original, ft)
		f.addDuplicates(original, ft.duplicates...)
		ft.duplicates = nil
		if ft.demand {
			f.promote(original)
		}
		return
	}
	f.mu.contents[digest] = ft
	f.push(ft)
}

func (f *Fetcher) addDuplicates(original *fetch, duplicates ...*fetch) {
	for _, x := range duplicates {
		x.original = original
	}
	original.duplicates = append(original.duplicates, duplicates...)
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

// copyTo fills the chunk of a fetch with a copy: another was quicker to bring its
// content, from a source that works.
func (f *Fetcher) copyTo(ft *fetch) {
	if !ft.isWanted() {
		return
	}
	f.wg.Go(func() {
		if ft.stream.FillLocal(ft.key.chunk) {
			f.local.Add(1)
			f.mu.Lock()
			defer f.mu.Unlock()
			f.end(ft, nil)
			f.dispatch()
		}
	})
}
