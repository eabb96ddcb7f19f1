package fetcher

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"time"

	"thaw/blockmap"
)

const (
	// wrongTries bounds the tries of a chunk whose bytes do not match its digest.
	wrongTries = 4
	// spaceTries bounds the tries of a demanded chunk that the cache has no room for.
	spaceTries = 4
)

// finish ends a fetch that a request has brought, or arranges another try. A failed
// request does not matter while other requests still bring the fetch.
func (f *Fetcher) finish(r *request, ft *fetch, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.dispatch() // other fetches may have waited for this one or for its room
	f.finishOne(r, ft, err)
}

// finishOne is finish for a caller that holds f.mu and calls dispatch.
func (f *Fetcher) finishOne(r *request, ft *fetch, err error) {
	if ft.state == ended || err != nil && !r.brings(ft) {
		return // another request was faster, or this one does not bring the fetch any more
	}
	others := len(ft.requests) > 1
	if err == nil {
		f.finished(r, ft, others)
		return
	}
	ft.leave(r)
	var noRoom *storeError
	unstored := errors.As(err, &noRoom)
	peerFailed := r.place.src.isPeer() && !unstored
	if errors.Is(err, blockmap.ErrDigest) {
		f.wrong.Add(1)
	}
	if !peerFailed {
		ft.tries++
		if errors.Is(err, blockmap.ErrDigest) {
			ft.wrong++
		}
	}
	if len(ft.requests) > 0 {
		f.log.Debug("one of several requests for a chunk failed", "err", err)
		return
	}
	if peerFailed && !f.mu.closed {
		f.passOver(r, ft, err)
		return
	}
	c := ft.chunk()
	err = fmt.Errorf("fetch %s chunk %d (%d bytes at %d of blob sha256:%.12s…): %w",
		map[bool]string{true: "demanded", false: "prefetched"}[ft.demand],
		ft.key.chunk, c.Stored, c.Offset, ft.place.table.Blob, err)
	pause := f.pause(ft, err)
	switch {
	case f.mu.closed:
		f.end(ft, fmt.Errorf("%w: %w", blockmap.ErrClosed, err))
	case pause < 0 && !ft.demand && unstored:
		f.log.Debug("no room for a prefetched chunk", "err", err)
		f.end(ft, err)
	case pause < 0 && ft.near != nil && !ft.originFailed && !unstored:
		f.retries.Add(1)
		f.log.Debug("the origin failed, so thaw asks the peers again", "err", err)
		ft.askPeersAgain()
		f.push(ft)
	case pause < 0:
		f.giveUp(ft, err)
	default:
		f.retries.Add(1)
		f.log.Debug("trying a chunk again", "err", err, "in", pause)
		if len(ft.others) > 0 {
			ft.place, ft.others = ft.others[0], append(ft.others[1:], ft.place)
		}
		if !unstored {
			ft.askPeersAgain()
		}
		ft.state = waiting
		f.wg.Go(func() { f.retryAfter(ft, pause) })
	}
}

// finished ends a fetch that a request has brought, or whose bytes the cache has.
func (f *Fetcher) finished(r *request, ft *fetch, others bool) {
	f.chunkCame(r, ft, others)
	f.end(ft, nil)
	f.cancelUnwanted(r) // perhaps no reader or prefetch wants the rest of it any more
}

// finishHere ends a fetch if all that is needed of it is resident by now, and reports
// whether it was.
func (f *Fetcher) finishHere(r *request, ft *fetch) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if ft.state == ended {
		return true
	}
	if !ft.here() {
		return false
	}
	f.finished(r, ft, false)
	f.dispatch()
	return true
}

// chunkCame counts a chunk that a request has brought.
func (f *Fetcher) chunkCame(r *request, ft *fetch, others bool) {
	if !r.made {
		return // the cache had it
	}
	src := r.place.src
	if now := time.Now(); now.Sub(r.asked) < tooLong || r.size(ft) >= goodBytes {
		src.good = now // the source works, and does not only trickle
	}
	f.counts(src).chunks.Add(1)
	if r.extra && others {
		r.won = true
		f.overtaken.Add(1)
		f.avoidSlower(ft, r)
	}
}

// askPeersAgain makes the next try of a fetch whose origin has failed ask the peers again,
// even for what this host owns.
func (ft *fetch) askPeersAgain() { ft.route, ft.fromOrigin, ft.originFailed = nil, false, true }

// giveUp ends a fetch with an error.
func (f *Fetcher) giveUp(ft *fetch, err error) {
	level := slog.LevelError
	switch {
	case ft.demand:
	case ft.rank == idle:
		level = slog.LevelDebug // the caller of Complete reports it once
	default:
		level = slog.LevelWarn
	}
	if level > slog.LevelDebug {
		f.failed.Add(1)
	}
	f.log.Log(f.ctx, level, "gave up a chunk", "err", err, "tries", ft.tries)
	f.end(ft, err)
}

// late returns the error of a fetch that its sources did not deliver in time.
func (f *Fetcher) late(ft *fetch) error {
	c := ft.chunk()
	return fmt.Errorf("fetch chunk %d (%d bytes at %d of blob sha256:%.12s…): %w within %v",
		ft.key.chunk, c.Stored, c.Offset, ft.place.table.Blob, errLate, f.o.RetryFor)
}

// pause returns how long to wait before the next try. It is negative if there is to be
// none.
func (f *Fetcher) pause(ft *fetch, err error) time.Duration {
	permanent := ft.wrong >= wrongTries
	var noRoom *storeError
	switch {
	case errors.Is(err, blockmap.ErrDigest), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, errNowhereElse):
	case errors.As(err, &noRoom):
		// Prefetched chunks may have taken the room; the cache can evict them for a
		// demand.
		if !ft.demand || ft.tries >= spaceTries {
			return -1
		}
	default:
		permanent = permanent || f.o.Temporary != nil && !f.o.Temporary(err)
	}
	if (permanent || !ft.demand && ft.rank == idle) && ft.tries > len(ft.others) {
		return -1 // Complete has pauses of its own
	}
	// Anything up to a limit that doubles: those who failed together do not return together.
	limit := min(f.o.Backoff<<min(max(ft.tries-1, 0), 10), 2*time.Second)
	pause := f.heed(err, rand.N(limit+1))
	if time.Since(ft.began)+pause > f.o.RetryFor || ft.demand && time.Since(ft.lastGood())+pause > f.o.RetryFor {
		return -1
	}
	return pause
}

// heed lengthens a pause to the time that the origin asked for, and a little more, so that
// not all who were asked to wait return at the same moment.
func (f *Fetcher) heed(err error, pause time.Duration) time.Duration {
	if f.o.RetryAfter == nil {
		return pause
	}
	after := f.o.RetryAfter(err)
	return max(pause, after+rand.N(max(after, 0)/8+1))
}

// retryAfter queues a fetch again after a pause.
func (f *Fetcher) retryAfter(ft *fetch, pause time.Duration) {
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-f.ctx.Done():
		return // Close has ended the fetch
	case <-ft.done:
		return
	case <-t.C:
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if ft.state == waiting && !f.mu.closed {
		f.push(ft)
		f.dispatch()
	}
}
