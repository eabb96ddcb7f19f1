package fetcher

import (
	"io"
	"slices"
	"time"

	"thaw/blockmap"
)

// A chunk that somebody waits for is looked after. Where its request brings nothing
// for stallAfter, or will take longer than tooLong by what it has brought lately,
// the chunk is asked for elsewhere as well; and where the request brings nothing
// at all, of the same origin again. The first that has it is the one that counts.
const (
	watchEvery  = 250 * time.Millisecond
	stallAfter  = 2 * time.Second // without a byte
	againAfter  = 4 * time.Second // until the same origin is asked once more
	tooLong     = 3 * time.Second
	avoidFor    = 30 * time.Second // a server that was overtaken
	maxExtra    = 8                // extra requests of a source at once
	freeExtra   = 16               // and in all, and a tenth of its requests
	maxTries    = 3                // requests for a chunk at once
	leastSpeed  = 4 << 10          // bytes a second of a request on a line that is shared
	sharedSpeed = 256 << 10        // bytes a second of a source whose line is at work
	goodBytes   = 64 << 10         // of a chunk that says that a source works
	longest     = 4                // times RetryFor, that a chunk may take on such a line
	maxUseless  = 3                // extra requests in a row that were not quicker on such a line
)

// askElsewhere makes an extra request for a chunk: of another server, of another
// origin that has it, or of the same one again. f.mu is held.
func (f *Fetcher) askElsewhere(ft *fetch, again bool, now time.Time) {
	first := ft.requests[0]
	src := first.place.src
	var ways []way
	if o, ok := src.origin.(Elsewhere); ok && ft.demand {
		ways = append(ways, way{place: first.place, other: o, avoid: first.server})
	}
	for _, p := range ft.others {
		if !slices.ContainsFunc(ft.requests, func(r *request) bool { return r.place.src == p.src }) {
			ways = append(ways, way{place: p})
		}
	}
	if again {
		ways = append(ways, way{place: first.place})
	}
	bytes := cost(ft.chunk())
	if len(ways) == 0 || src.extra >= freeExtra+src.asked/10 || src.extraLoad.requests >= maxExtra ||
		src.extraLoad.requests > 0 && !f.mu.extraPool.admits(src.extraLoad, bytes) {
		return
	}
	ft.noExtraBefore = now.Add(stallAfter)
	f.chargeExtra(src, 1, bytes)
	r := newRequest(f.ctx, first.place)
	r.extra = true
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

func (f *Fetcher) chargeExtra(s *source, n int, bytes int64) {
	f.mu.extraPool.taken.add(n, bytes)
	s.extraLoad.add(n, bytes)
}

// way is where a chunk may be asked for as well.
type way struct {
	place place
	other Elsewhere // if not nil, another server than avoid
	avoid string
}

// runExtra brings a chunk by the first of the ways that has an answer, and says
// whether any was asked.
func (f *Fetcher) runExtra(r *request, ft *fetch, ways []way) (asked bool) {
	err := errNowhereElse
	for _, w := range ways {
		f.mu.Lock()
		r.place, r.elsewhere = w.place, w.other != nil
		r.expect(r.fetches)
		r.made = true
		f.mu.Unlock()
		c := &w.place.table.Chunks[ft.key.chunk]
		var body io.ReadCloser
		began := time.Now()
		if w.other != nil {
			body, err = w.other.OpenRangeElsewhere(r.ctx, w.place.table.Blob, c.Offset, int64(c.Stored), w.avoid)
			if body == nil && err == nil {
				err = errNowhereElse
				continue
			}
		} else {
			body, err = w.place.src.origin.OpenRange(r.ctx, w.place.table.Blob, c.Offset, int64(c.Stored))
		}
		asked = true
		f.requests.Add(1)
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

// avoidSlower notes which server was overtaken, so that others are asked first for a
// while: a request that is overtaken is cancelled, and so does not show what it
// would have come to. f.mu is held.
func (f *Fetcher) avoidSlower(ft *fetch, quicker *request) {
	for _, r := range ft.requests {
		if src := r.place.src; r != quicker && !r.extra && quicker.elsewhere && src == quicker.place.src && r.server != "" {
			src.avoid, src.avoidTill = r.server, time.Now().Add(avoidFor)
		}
	}
}

// openElsewhere opens a range where a server that was overtaken is not asked. It
// gives nil without an error where there is none such, or no other.
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
