package fetcher

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"golang.org/x/time/rate"

	"thaw/blockmap"
)

// This file fetches the rest of an image, which nobody is known to need soon, so that
// the image needs its origin no longer. It takes what all others leave: an idle request
// starts when no demand and no other request is in flight and none has been for calmFor.
// When there is one again, the idle requests pause as in link.go. If the pause becomes
// long, they end, and their chunks wait for the next calm.
const (
	calmFor     = 250 * time.Millisecond // after the last demand and the last other request
	maxIdle     = 2                      // idle requests of a source in flight
	maxWrong    = 16                     // chunks with wrong bytes that do not end Complete
	leastBroken = 256 << 10              // bytes before its chunk for which a demand does not wait
)

// CompleteOptions are the settings of Bound.Complete.
type CompleteOptions struct {
	// Rate bounds the bytes per second that are requested; 0 means no limit.
	Rate int64
	// Room returns how many bytes the cache may still take; nil means no limit.
	// Complete ends before a chunk that does not fit.
	Room func() int64
}

// Complete fetches wants at idle priority, in large requests in their order. It returns
// nil when all are resident, and otherwise the first error: blockmap.ErrNoSpace if the
// cache has no room, the error of a chunk that could not be fetched, or the cause of the
// end of ctx. A failed chunk is not tried again. If its bytes are wrong, Complete goes on
// with the others, and returns the error at the end: that says nothing about them, unless
// there are many.
func (b *Bound) Complete(ctx context.Context, wants []blockmap.Want, o CompleteOptions) (err error) {
	limit := rate.NewLimiter(rate.Inf, 0)
	if o.Rate > 0 {
		limit = rate.NewLimiter(rate.Limit(o.Rate), int(max(o.Rate/4, largestFrame)))
	}
	pending := make(map[*fetch]int)
	defer func() {
		if err != nil {
			b.f.cancelPrefetches(pending, err)
		}
	}()
	type batch struct {
		fetches []*fetch
		content int64 // bytes that they take in the cache
	}
	var batches []batch // asked for and not awaited, the oldest first
	var asked int64     // bytes that these take in the cache
	wrong, wrongErr := 0, error(nil)
	await := func() error {
		for _, ft := range batches[0].fetches {
			select {
			case <-ft.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			delete(pending, ft)
			if errors.Is(ft.err, blockmap.ErrDigest) && wrong < maxWrong {
				wrong++
				wrongErr = cmp.Or(wrongErr, ft.err)
			} else if ft.err != nil {
				return ft.err
			}
		}
		asked -= batches[0].content
		batches = batches[1:]
		return nil
	}
	for len(wants) > 0 {
		if len(batches) == maxIdle+1 {
			if err := await(); err != nil {
				return err
			}
		}
		room := int64(math.MaxInt64)
		if o.Room != nil {
			room = o.Room() - asked
		}
		n, content := b.nextBatch(wants, o.Rate, room)
		if n == 0 {
			// Some of what is in flight may be in the cache by now, and counts twice.
			if len(batches) == 0 {
				return fmt.Errorf("complete the image: %w", blockmap.ErrNoSpace)
			}
			if err := await(); err != nil {
				return err
			}
			continue
		}
		for _, w := range wants[:n] {
			if err := limit.WaitN(ctx, int(stored(w))); err != nil {
				return errors.Join(err, context.Cause(ctx))
			}
		}
		next := batch{content: content}
		asked += content
		for _, ft := range b.join(wants[:n], nil, idler) {
			if ft != nil {
				pending[ft]++
				next.fetches = append(next.fetches, ft)
			}
		}
		batches = append(batches, next)
		wants = wants[n:]
	}
	for len(batches) > 0 {
		if err := await(); err != nil {
			return err
		}
	}
	return wrongErr
}

// nextBatch returns how many of wants to ask for next, and how many bytes they take in
// the cache, which has this much room.
func (b *Bound) nextBatch(wants []blockmap.Want, rate, room int64) (n int, content int64) {
	most := b.f.o.MaxRequest
	if rate > 0 {
		most = min(most, max(rate/4, 1)) // a steady rate instead of bursts
	}
	for bytes := int64(0); n < len(wants) && (n == 0 || bytes+stored(wants[n]) <= most); n++ {
		size := wants[n].Absent()
		if content+size > room {
			break
		}
		bytes += stored(wants[n])
		content += size
	}
	return n, content
}

// busy reports whether idle requests have to wait: for a demand, or for a request or
// download that is not idle. f.mu is held.
func (f *Fetcher) busy() bool {
	return len(f.mu.urgent) > 0 || len(f.mu.running) > f.mu.idle || f.mu.bundles > 0
}

// calmed records that no reader waits for a fetch any more. f.mu is held.
func (f *Fetcher) calmed(ft *fetch) {
	if _, ok := f.mu.urgent[ft]; ok {
		delete(f.mu.urgent, ft)
		f.mu.calm = time.Now()
	}
}

// dispatchIdle starts idle requests if nothing else is to be fetched. f.mu is held.
func (f *Fetcher) dispatchIdle() {
	for again := true; again && !f.busy(); {
		again = false
		for _, s := range f.mu.sources {
			first := s.queue.nextIdle()
			for first != nil && s.isPeer() && !first.route.Usable(s.peer) {
				f.push(first)
				again = true
				first = s.queue.nextIdle()
			}
			if first == nil || s.idle >= maxIdle || !f.admits(s, false, first.at(s).cost(first)) {
				continue
			}
			if wait := calmFor - time.Since(f.mu.calm); wait > 0 {
				f.dispatchLater(wait)
				return
			}
			f.startBatch(s, first, false, limits{request: f.o.MaxRequest, bytes: f.o.MaxRequest, ranges: 1, near: math.MaxInt64 / 2})
			again = true
		}
	}
}

// dispatchLater calls dispatch once, when it has been calm for long enough.
func (f *Fetcher) dispatchLater(wait time.Duration) {
	if f.mu.calming {
		return
	}
	f.mu.calming = true
	time.AfterFunc(wait, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.mu.calming = false
		f.dispatch()
	})
}

// raise gives a fetch the rank of another caller that asks for it, if that is higher.
// f.mu is held; the caller calls dispatch.
func (f *Fetcher) raise(ft *fetch, as asker) {
	if as == reader || as == owner || as.rank() >= ft.rank || ft.state == ended {
		return
	}
	ft.rank = as.rank()
	switch {
	case ft.demand:
	case ft.state == queued:
		f.push(ft)
	case ft.state == duplicate:
		f.raise(ft.original, as)
	}
}

// leaveIdle takes a fetch that a reader needs out of an idle request that brings much
// else before it, and queues it. It reports whether it has done so. f.mu is held.
func (f *Fetcher) leaveIdle(ft *fetch) bool {
	if len(ft.requests) != 1 {
		return false
	}
	r := ft.requests[0]
	if !r.idle || r.left(ft)-r.size(ft) <= max(r.place.src.pace.roundTrip(), leastBroken) {
		return false
	}
	ft.leave(r)
	f.push(ft)
	return true
}
