package fetcher

import (
	"context"
	"errors"
	"io"
	"slices"
	"time"

	"thaw/blockmap"
)

// Elsewhere is an Origin behind which there are several servers with the same
// blobs, as mirrors of a registry.
type Elsewhere interface {
	// OpenRangeElsewhere reads as OpenRange does, but not from the server that is
	// late. avoid is its name, which its body gives as Source; it is empty where
	// there has been no body yet. A nil body without an error says that there is
	// no other server.
	OpenRangeElsewhere(ctx context.Context, blob blockmap.Digest, off, n int64, avoid string) (io.ReadCloser, error)
}

// sourced is a body that says which server it comes from.
type sourced interface{ Source() string }

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

var (
	errLate        = errors.New("the origin did not keepPart it")
	errNowhereElse = errors.New("there is nowhere else to ask")
)

// watch has what is on its way looked after. f.mu is held.
func (f *Fetcher) watch() {
	if f.mu.watching || f.mu.closed {
		return
	}
	f.mu.watching = true
	time.AfterFunc(watchEvery, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.mu.watching = false
		if f.mu.closed || len(f.mu.urgent)+len(f.mu.running) == 0 {
			return
		}
		f.checkAll(time.Now())
		f.dispatch()
		f.watch()
	})
}

func (f *Fetcher) checkAll(now time.Time) {
	seen := make(map[*request]bool)
	sample := func(r *request) {
		if !seen[r] {
			seen[r] = true
			r.samples.add(now, r.got)
		}
	}
	for r := range f.mu.running {
		sample(r)
	}
	rates := make(map[*source]rates)
	for ft := range f.mu.urgent {
		for _, r := range ft.requests {
			sample(r)
			if src := r.place.src; rates[src].of == 0 {
				rates[src] = src.rates(now)
			}
		}
	}
	for ft := range f.mu.urgent {
		switch {
		case ft.state == running:
			f.checkRunning(ft, now, rates)
		case ft.state == duplicated && now.Sub(ft.since) > stallAfter && ft.original.outlook(now, rates) == stalls &&
			ft.place.src != ft.original.place.src:
			// Its own source may be better than that of who was first.
			original := ft.original
			original.duplicates = slices.DeleteFunc(original.duplicates, func(x *fetch) bool { return x == ft })
			ft.original = nil
			f.push(ft)
			f.update(original)
		case ft.state == queued && now.Sub(ft.lastGood()) >= f.o.RetryFor:
			f.giveUp(ft, f.late(ft))
		}
	}
	for r := range f.mu.running {
		if r.paused.IsZero() && now.Sub(r.moved) >= stallAfter {
			f.checkStalled(r, now)
		}
	}
	f.reclaim(now)
}

// checkStalled asks other origins for what nobody waits for and does not come,
// or gives it up.
func (f *Fetcher) checkStalled(r *request, now time.Time) {
	for _, ft := range r.fetches {
		switch {
		case ft.demand || !r.brings(ft) || len(ft.requests) > 1:
		case now.Sub(r.moved) >= f.o.RetryFor:
			f.giveUp(ft, f.late(ft))
		case len(ft.others) > 0 && !now.Before(ft.noExtraBefore):
			f.askElsewhere(ft, false, now)
		}
	}
}

// lastGood is when one of its sources has brought a chunk last, or when a reader
// began to wait if that was later.
func (ft *fetch) lastGood() time.Time {
	last := ft.since
	for _, p := range append([]place{ft.place}, ft.others...) {
		if p.src.good.After(last) {
			last = p.src.good
		}
	}
	return last
}

// checkRunning asks for a chunk once more, or gives it up, where it does not come.
func (f *Fetcher) checkRunning(ft *fetch, now time.Time, rates map[*source]rates) {
	tried := now.Sub(ft.began)
	hope := ft.outlook(now, rates)
	switch {
	case hope == comes && tried < longest*f.o.RetryFor:
		return
	case hope == shares && tried < longest*f.o.RetryFor:
		// It has its share of a line that is at work. Elsewhere may be another line.
		if src := ft.requests[0].place.src; src.useless >= maxUseless && now.Before(src.uselessTill) {
			return
		}
	case tried >= f.o.RetryFor, now.Sub(ft.lastGood()) >= f.o.RetryFor:
		f.giveUp(ft, f.late(ft))
		return
	}
	if now.Before(ft.noExtraBefore) || len(ft.requests) >= maxTries {
		return
	}
	again := hope == stalls && !slices.ContainsFunc(ft.requests, func(r *request) bool { return !r.dead(ft, now) })
	f.askElsewhere(ft, again, now)
}

// outlook is what is to be expected of a request for a chunk.
type outlook uint8

const (
	stalls outlook = iota // hardly anything comes
	shares                // it comes late, since others come as well
	comes                 // soon
)

// outlook is the best one of its requests.
func (ft *fetch) outlook(now time.Time, rates map[*source]rates) (best outlook) {
	for _, r := range ft.requests {
		best = max(best, r.outlook(ft, now, rates[r.place.src]))
	}
	return best
}

// left is how much is to come until a fetch is here.
func (r *request) left(ft *fetch) int64 {
	if i := slices.Index(r.fetches, ft); i >= 0 && i < len(r.ends) {
		return r.ends[i] - r.got
	}
	return int64(r.stored(ft))
}

func (r *request) outlook(ft *fetch, now time.Time, all rates) outlook {
	if now.Sub(r.moved) >= stallAfter {
		return stalls
	}
	rate, known := r.samples.rate()
	switch {
	case !known, float64(r.left(ft)) <= rate*tooLong.Seconds():
		return comes
	case all.sum >= sharedSpeed && rate >= max(all.sum/float64(4*all.of), leastSpeed):
		return shares
	}
	return stalls
}

// dead says whether a request will not bring a fetch at all.
func (r *request) dead(ft *fetch, now time.Time) bool {
	if now.Sub(r.asked) < againAfter {
		return false
	}
	rate, known := r.samples.rate()
	return now.Sub(r.moved) >= againAfter || known && float64(r.left(ft)) > rate*30
}

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

// samples are how much had come at points in time, watchEvery apart.
type samples struct {
	at  [int(stallAfter/watchEvery) + 1]time.Time
	got [int(stallAfter/watchEvery) + 1]int64
	n   int
}

func (s *samples) add(now time.Time, got int64) {
	i := s.n % len(s.at)
	s.at[i], s.got[i] = now, got
	s.n++
}

// rate is how many bytes a second came in the last stallAfter; it is not known
// before that.
func (s *samples) rate() (bytes float64, known bool) {
	if s.n < len(s.at) {
		return 0, false
	}
	first, last := s.n%len(s.at), (s.n-1)%len(s.at)
	return float64(s.got[last]-s.got[first]) / s.at[last].Sub(s.at[first]).Seconds(), true
}

// lately is the rate of the last half second.
func (s *samples) lately() (bytes float64, known bool) {
	const back = int(500 * time.Millisecond / watchEvery)
	if s.n <= back {
		return 0, false
	}
	first, last := (s.n-1-back)%len(s.at), (s.n-1)%len(s.at)
	return float64(s.got[last]-s.got[first]) / s.at[last].Sub(s.at[first]).Seconds(), true
}

// rates are those of a source's requests together.
type rates struct {
	sum float64
	of  int
}

func (s *source) rates(now time.Time) (all rates) {
	for r := range s.running {
		if rate, known := r.samples.rate(); known && now.Sub(r.moved) < stallAfter {
			all.sum += rate
		}
		all.of++
	}
	return all
}
