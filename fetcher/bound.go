package fetcher

import (
	"context"
	"sync/atomic"

	"thaw/blockmap"
)

// Bound is a Fetcher that knows where to fetch from. It has bounds of its own, so
// that what hangs there holds up nobody else.
type Bound struct {
	f     *Fetcher
	src   *source
	ahead atomic.Pointer[readahead]
	hints map[*fetch]struct{} // that it has guessed; guarded by f.mu
}

// From binds f to an origin.
func (f *Fetcher) From(o Origin) *Bound {
	return &Bound{f: f, src: f.newSource(o), hints: make(map[*fetch]struct{})}
}

// ReadAhead has chunks fetched that are likely to be demanded next, going by those
// that have been. It is for where no Replay knows.
func (b *Bound) ReadAhead() { b.ahead.Store(&readahead{streams: make(map[*blockmap.Stream]*reading)}) }

// Fetch returns when all of wants are resident, or with the first error: that
// of a chunk given up, or that of ctx. What nobody else waits for is not fetched
// any more then.
func (b *Bound) Fetch(ctx context.Context, wants []blockmap.Want) error {
	var ahead []blockmap.Want
	if r := b.ahead.Load(); r != nil {
		ahead = r.after(wants)
	}
	fetches := b.join(wants, ahead, reader)
	for i, ft := range fetches {
		if ft == nil {
			continue
		}
		select {
		case <-ft.done:
			if ft.err != nil {
				b.f.leave(fetches[i:])
				return ft.err
			}
		case <-ctx.Done():
			b.f.leave(fetches[i:])
			return context.Cause(ctx)
		}
	}
	return nil
}

// Prefetch has wants fetched when nobody waits for anything else. It is a hint:
// where many are waiting to be fetched already, it is dropped.
func (b *Bound) Prefetch(wants []blockmap.Want) { b.join(nil, wants, hint) }

// Close takes back what Prefetch and ReadAhead have asked for. It is for when
// nobody uses the image any more.
func (b *Bound) Close() {
	b.ahead.Store(nil)
	b.f.mu.Lock()
	hinted := make(map[*fetch]int)
	for ft := range b.hints {
		hinted[ft] = 1
		ft.hint = nil
	}
	clear(b.hints)
	b.f.mu.Unlock()
	b.f.cancelPrefetches(hinted, context.Canceled)
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
