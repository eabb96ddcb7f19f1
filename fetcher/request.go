package fetcher

import (
	"context"
	"slices"
	"sync"
	"time"
)

// request asks a source for chunks of one blob, in its order.
type request struct {
	place  place
	ctx    context.Context
	cancel context.CancelFunc
	asked  time.Time
	demand bool  // a reader waited when it was made
	bytes  int64 // what it takes of Options.MaxBytes
	extra  bool  // it was made because another is late, see hedge.go

	elsewhere bool      // it is an extra one to another server of the same origin
	download  *download // it is a bundle download, which has no fetches of its own

	demanded chan struct{} // closed when a reader waits for one of its fetches
	once     sync.Once     // closes demanded

	// What follows is guarded by Fetcher.mu.
	fetches    []*fetch  // what it brings, in the order of the blob
	ends       []int64   // where each ends in the body
	total, got int64     // bytes of the body, and those received
	moved      time.Time // when the last bytes came, or when it was asked
	samples    samples   // of got, over time
	made       bool      // it was sent, and the chunks were not all in the cache
	server     string    // where the bytes come from, if known
	cancelled  bool
	won        bool // it is an extra one that brought its chunk first

	claimed time.Time // when others began to pause for it, see claimLink
	before  int64     // got at that time
	paused  time.Time // since when it pauses for others, see awaitLink
	free    time.Time // it does not pause again before this
}

func newRequest(ctx context.Context, p place) *request {
	now := time.Now()
	r := &request{place: p, asked: now, moved: now, demanded: make(chan struct{})}
	r.ctx, r.cancel = context.WithCancel(ctx)
	return r
}

// markDemand notes that a reader waits for one of its fetches.
func (r *request) markDemand() { r.once.Do(func() { close(r.demanded) }) }

// brings says whether a fetch is still to be ended by this request.
func (r *request) brings(ft *fetch) bool {
	return ft.state == running && slices.Contains(ft.requests, r)
}

// awaited says whether a reader waits for any of it. f.mu is held.
func (r *request) awaited() bool {
	if r.download != nil {
		return len(r.download.awaited) > 0
	}
	return slices.ContainsFunc(r.fetches, func(ft *fetch) bool { return ft.demand && r.brings(ft) })
}

// expect sets which fetches the body brings.
func (r *request) expect(fetches []*fetch) {
	r.fetches, r.ends, r.total = fetches, make([]int64, len(fetches)), 0
	for i, ft := range fetches {
		r.total += int64(r.stored(ft))
		r.ends[i] = r.total
	}
}

// stored is the length of a chunk's frame at the request's place.
func (r *request) stored(ft *fetch) int { return int(r.place.table.Chunks[ft.key.chunk].Stored) }

// left is how many bytes must still come until a fetch is complete.
func (r *request) left(ft *fetch) int64 {
	if i := slices.Index(r.fetches, ft); i >= 0 && i < len(r.ends) {
		return r.ends[i] - r.got
	}
	return int64(r.stored(ft))
}

// leave notes that a request no longer brings the fetch.
func (ft *fetch) leave(r *request) {
	ft.requests = slices.DeleteFunc(slices.Clone(ft.requests), func(x *request) bool { return x == r })
}

// ended forgets a request. f.mu is held.
func (f *Fetcher) ended(r *request) {
	r.cancel()
	delete(r.place.src.running, r)
	delete(f.mu.running, r)
	f.unclaim(r)
}

// cancelUnwanted cancels a request if nobody wants any of its fetches any more. f.mu is
// held; the caller calls dispatch.
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
