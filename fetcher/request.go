package fetcher

import (
	"context"
	"slices"
	"sync"
	"time"
)

// request brings chunks of one blob, in its order.
type request struct {
	place  place
	ctx    context.Context
	cancel context.CancelFunc
	asked  time.Time
	demand bool  // somebody waited when it was made
	bytes  int64 // what it takes of MaxBytes
	extra  bool  // it was made since another brings its chunk too late

	elsewhere bool      // of an extra one: another server of the same origin was asked
	download  *download // of a bundle's download, which is no request for chunks

	demanded chan struct{} // closed when somebody waits for one of its fetches
	once     sync.Once     // closes demanded

	// What follows is guarded by Fetcher.mu.
	fetches    []*fetch  // what is to come, in its order
	ends       []int64   // where each ends in what comes
	total, got int64     // bytes that are to come, and that have
	moved      time.Time // when bytes came last, or when they were asked for
	samples    samples   // of got
	made       bool      // and not only looked for in the cache
	server     string    // that the bytes come from, where that is known
	cancelled  bool
	won        bool // it was an extra one, and the quickest

	claimed      time.Time // when it began to have the line for itself, see claimLink
	before       int64     // what had come by then
	paused, free time.Time // since and until when it gives way, and does not, see awaitLink
}

func newRequest(ctx context.Context, p place) *request {
	now := time.Now()
	r := &request{place: p, asked: now, moved: now, demanded: make(chan struct{})}
	r.ctx, r.cancel = context.WithCancel(ctx)
	return r
}

// hurry says that somebody waits for one of its fetches.
func (r *request) markDemand() { r.once.Do(func() { close(r.demanded) }) }

// brings says whether a fetch is still to come by this request.
func (r *request) brings(ft *fetch) bool {
	return ft.state == running && slices.Contains(ft.requests, r)
}

// read says whether somebody waits for something that is to come. f.mu is held.
func (r *request) awaited() bool {
	if r.download != nil {
		return len(r.download.awaited) > 0
	}
	return slices.ContainsFunc(r.fetches, func(ft *fetch) bool { return ft.demand && r.brings(ft) })
}

// expect says what is to come.
func (r *request) expect(fetches []*fetch) {
	r.fetches, r.ends, r.total = fetches, make([]int64, len(fetches)), 0
	for i, ft := range fetches {
		r.total += int64(r.stored(ft))
		r.ends[i] = r.total
	}
}

// stored is the length of a chunk's frame where the request is made.
func (r *request) stored(ft *fetch) int { return int(r.place.table.Chunks[ft.key.chunk].Stored) }

// left is how much is to come until a fetch is here.
func (r *request) left(ft *fetch) int64 {
	if i := slices.Index(r.fetches, ft); i >= 0 && i < len(r.ends) {
		return r.ends[i] - r.got
	}
	return int64(r.stored(ft))
}

// leave notes that a request does not bring the fetch any more.
func (ft *fetch) leave(r *request) {
	ft.requests = slices.DeleteFunc(slices.Clone(ft.requests), func(x *request) bool { return x == r })
}

// ended takes a request out of the books. f.mu is held.
func (f *Fetcher) ended(r *request) {
	r.cancel()
	delete(r.place.src.running, r)
	delete(f.mu.running, r)
	f.unclaim(r)
}

// check cancels a request if nobody wants any more of what it is to bring. f.mu
// is held, and dispatch is called behind it.
func (f *Fetcher) cancelUnwanted(r *request) {
	if r.cancelled {
		return
	}
	for _, ft := range r.fetches {
		if r.brings(ft) && ft.isWanted() {
			return
		}
	}
	r.cancelled = true
	if r.got < r.total {
		f.cancelled.Add(1)
	}
	r.cancel()
	for _, ft := range r.fetches {
		if !r.brings(ft) {
			continue
		}
		if ft.leave(r); len(ft.requests) == 0 {
			f.end(ft, context.Canceled)
		}
	}
}
