package fetcher

import (
	"errors"
	"slices"
	"time"
)

var (
	errLate        = errors.New("the origin did not keepPart it")
	errNowhereElse = errors.New("no other server or origin has it")
)

// watch calls checkAll every watchEvery, while there is anything to check. f.mu is
// held.
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

// checkAll samples how fast requests bring their bytes, and acts on late ones. f.mu is
// held.
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
		case ft.near != nil && f.checkNear(ft, now):
		case ft.state == running:
			f.checkRunning(ft, now, rates)
		case ft.state == duplicate && now.Sub(ft.since) > stallAfter && ft.original.outlook(now, rates) == stalls &&
			ft.place.src != ft.original.place.src:
			// The duplicate's own source may be better than that of the original.
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

// checkStalled asks other sources for the prefetches of a request that brings nothing, or
// gives the prefetches up.
func (f *Fetcher) checkStalled(r *request, now time.Time) {
	for _, ft := range r.fetches {
		switch {
		case ft.demand || !r.brings(ft) || len(ft.requests) > 1 || r.place.src.isPeer():
		case now.Sub(r.moved) >= f.o.RetryFor:
			f.giveUp(ft, f.late(ft))
		case len(ft.others) > 0 && !now.Before(ft.noExtraBefore):
			f.askElsewhere(ft, false, now)
		}
	}
}

// lastGood returns when one of its sources last brought a chunk, or when a reader began
// to wait for it, whichever is later.
func (ft *fetch) lastGood() time.Time {
	last := ft.since
	for _, p := range append([]place{ft.place}, ft.others...) {
		if p.src.good.After(last) {
			last = p.src.good
		}
	}
	if s := ft.peer.src; s != nil && s.good.After(last) {
		last = s.good
	}
	return last
}

// checkRunning makes an extra request for a demanded chunk that is late, or gives the
// chunk up.
func (f *Fetcher) checkRunning(ft *fetch, now time.Time, rates map[*source]rates) {
	tried := now.Sub(ft.began)
	hope := ft.outlook(now, rates)
	switch {
	case hope == comes && tried < longest*f.o.RetryFor:
		return
	case hope == shares && tried < longest*f.o.RetryFor:
		// The request has a fair share of a busy link. Another server may have another
		// link.
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

// outlook says whether a request will bring a chunk in time.
type outlook uint8

const (
	stalls outlook = iota // it brings hardly any bytes
	shares                // it is late, because it shares the link with others
	comes                 // the chunk comes soon
)

// outlook returns the best outlook of its requests.
func (ft *fetch) outlook(now time.Time, rates map[*source]rates) (best outlook) {
	for _, r := range ft.requests {
		best = max(best, r.outlook(ft, now, rates[r.place.src]))
	}
	return best
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

// dead reports whether a request will not bring a fetch at all.
func (r *request) dead(ft *fetch, now time.Time) bool {
	if now.Sub(r.asked) < againAfter {
		return false
	}
	rate, known := r.samples.rate()
	return now.Sub(r.moved) >= againAfter || known && float64(r.left(ft)) > rate*30
}
