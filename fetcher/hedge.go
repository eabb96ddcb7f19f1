package fetcher

import (
	"io"
	"slices"
	"time"

	"thaw/blockmap"
)

// This file watches demanded chunks. If the request for a chunk brings nothing for
// stallAfter, or will take longer than tooLong at its present speed, the Fetcher asks
// another server or source for the chunk as well. If the request brings nothing for
// againAfter, it asks the same origin again. The first request that brings the chunk
// ends the fetch, and with it the other requests.
const (
	watchEvery  = 250 * time.Millisecond
	stallAfter  = 2 * time.Second // without a byte, until another server or source is asked
	againAfter  = 4 * time.Second // without a byte, until the same origin is asked again
	tooLong     = 3 * time.Second
	avoidFor    = 30 * time.Second // how long to avoid a server that was slower than an extra request
	maxExtra    = 8                // extra requests of a source in flight at once
	freeExtra   = 16               // extra requests of a source in all, in addition to a tenth of its requests
	maxTries    = 3                // requests for a chunk in flight at once
	leastSpeed  = 4 << 10          // bytes per second, of a request on a shared link
	sharedSpeed = 256 << 10        // bytes per second, of a source whose link is busy
	goodBytes   = 64 << 10         // a chunk of at least this size proves that its source works, however long the chunk took
	longest     = 4                // multiple of RetryFor that a chunk may take on a busy link
	maxUseless  = 3                // extra requests in a row that were not quicker, on a busy link
)

// askElsewhere makes an extra request for a chunk: to another server, to another source
// that has the chunk, or to the same source again. f.mu is held.
func (f *Fetcher) askElsewhere(ft *fetch, again bool, now time.Time) {
	first := ft.requests[0]
	src := first.place.src
	var ways []way
	bytes := first.place.cost(ft)
	if src.extra >= freeExtra+src.asked/10 || src.extraLoad.requests >= maxExtra ||
		src.extraLoad.requests > 0 && !f.mu.extraPool.admits(src.extraLoad, bytes) {
		return
	}
	pause := stallAfter
	if src.isPeer() {
		pause = watchEvery
		last := ft.requests[len(ft.requests)-1]
		if ft.noExtraBefore = now.Add(pause); !first.route.MayHedge(last.place.src.peer) {
			return
		}
		ways = append(ways, f.nearWay(ft, first))
	} else if o, ok := src.origin.(Elsewhere); ok && ft.demand {
		ways = append(ways, way{place: first.place, other: o, avoid: first.server})
	}
	for _, p := range ft.others {
		if !src.isPeer() && !slices.ContainsFunc(ft.requests, func(r *request) bool { return r.place.src == p.src }) {
			ways = append(ways, way{place: p})
		}
	}
	if again && !src.isPeer() {
		ways = append(ways, way{place: first.place})
	}
	if len(ways) == 0 {
		return
	}
	ft.noExtraBefore = now.Add(pause)
	f.chargeExtra(src, 1, bytes)
	r := newRequest(f.ctx, first.place)
	r.extra, r.route = true, first.route
	r.fetches = []*fetch{ft}
	if ft.demand {
		r.markDemand()
	}
	ft.requests = append(ft.requests, r)
	f.wg.Go(func() {
		asked := f.runExtra(r, ft, ways)
		f.mu.Lock()
		defer f.mu.Unlock()
		if asked {
			src.extra++
			f.extra.Add(1)
			if src.useless++; r.won {
				src.useless = 0
			}
			src.uselessTill = time.Now().Add(avoidFor)
		}
		f.ended(r)
		f.chargeExtra(src, -1, -bytes)
		f.dispatch()
	})
}

// chargeExtra is charge for extra requests.
func (f *Fetcher) chargeExtra(s *source, n int, bytes int64) {
	f.mu.extraPool.taken.add(n, bytes)
	s.extraLoad.add(n, bytes)
}

// way is one way to ask for a chunk again.
type way struct {
	place place
	other Elsewhere // if not nil, asks a server other than avoid
	avoid string
	route Route // if not nil, place is a peer, which is asked
	owner bool  // as an owner
}

// runExtra brings a chunk by the first way that gets an answer, and reports whether it
// has made any request.
func (f *Fetcher) runExtra(r *request, ft *fetch, ways []way) (asked bool) {
	err := errNowhereElse
	for _, w := range ways {
		f.mu.Lock()
		r.place, r.elsewhere = w.place, w.other != nil
		r.route, r.owner = w.route, w.owner
		r.expect(r.fetches)
		r.made = true
		f.mu.Unlock()
		c := &w.place.table.Chunks[ft.key.chunk]
		var body io.ReadCloser
		began := time.Now()
		if w.route != nil {
			body, err = f.openChunks(r, w.route, w.place, w.owner, r.fetches)
		} else if w.other != nil {
			body, err = w.other.OpenRangeElsewhere(r.ctx, w.place.table.Blob, c.Offset, int64(c.Stored), w.avoid)
			if body == nil && err == nil {
				err = errNowhereElse
				continue
			}
		} else {
			body, err = w.place.src.origin.OpenRange(r.ctx, w.place.table.Blob, c.Offset, int64(c.Stored))
		}
		asked = true
		f.counts(w.place.src).requests.Add(1)
		if err == nil {
			f.answered(r, body, time.Since(began))
			f.receive(r, body, r.fetches)
			body.Close()
			return true
		}
		if r.ctx.Err() != nil {
			break
		}
	}
	f.fail(r, r.fetches, err)
	return asked
}

// avoidSlower records which server an extra request has overtaken, so that other
// servers are asked first for avoidFor. The slower request is cancelled, so the
// registry client's own measurements do not show how slow it was. f.mu is held.
func (f *Fetcher) avoidSlower(ft *fetch, quicker *request) {
	for _, r := range ft.requests {
		src := r.place.src
		switch {
		case r == quicker || r.extra:
		case src.isPeer():
			r.route.Overtaken(src.peer)
		case quicker.elsewhere && src == quicker.place.src && r.server != "":
			src.avoid, src.avoidTill = r.server, time.Now().Add(avoidFor)
		}
	}
}

// openElsewhere opens a range from a server other than the one to avoid. It returns nil
// without an error if no server is to be avoided, or if there is no other server.
func (f *Fetcher) openElsewhere(r *request, e blockmap.Extent) (io.ReadCloser, error) {
	src := r.place.src
	o, ok := src.origin.(Elsewhere)
	if !ok {
		return nil, nil
	}
	f.mu.Lock()
	avoid, now := src.avoid, time.Now().Before(src.avoidTill)
	f.mu.Unlock()
	if !now {
		return nil, nil
	}
	return o.OpenRangeElsewhere(r.ctx, r.place.table.Blob, e.Start, e.Len(), avoid)
}
