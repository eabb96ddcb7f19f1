package fetcher

import (
	"context"
	"sync/atomic"
	"time"

	"thaw/blockmap"
)

// Bound is a Fetcher bound to the origin of one image. Its requests have limits of
// their own, so an origin that hangs delays no other image.
type Bound struct {
	f     *Fetcher
	src   *source
	near  *Nearby // nil if only the origin is asked
	ahead atomic.Pointer[readahead]
	hints map[*fetch]struct{} // of its hints and predictions; guarded by f.mu
	last  atomic.Int64        // when a reader last waited, in ns since 1970; 0: never

	replays atomic.Int32 // that have not ended
}

// From binds f to an origin.
func (f *Fetcher) From(o Origin) *Bound {
	return &Bound{f: f, src: f.newSource(o), hints: make(map[*fetch]struct{})}
}

// ReadAhead prefetches chunks that readers are likely to demand next, as predicted from
// the chunks that they have demanded. Ahead of a reader in sequence it prefetches at most
// this many bytes of content; 0 means no limit except that of the link.
func (b *Bound) ReadAhead(most int64) { b.ahead.Store(newReadahead(most)) }

// Fetch returns when what wants need is resident, or with the first error: that of a chunk
// that was given up, or the cause of the end of ctx. After an error it cancels the
// fetches that no other reader or prefetch wants.
func (b *Bound) Fetch(ctx context.Context, wants []blockmap.Want) error {
	var ahead []blockmap.Want
	if r := b.ahead.Load(); r != nil {
		b.f.mu.Lock()
		window := 4 * b.src.pace.window()
		flying := make(map[key]bool)
		for _, w := range wants {
			k := key{w.Stream, w.Chunk}
			flying[k] = b.f.mu.fetches[k] != nil
		}
		b.f.mu.Unlock()
		ahead = r.after(wants, window, func(k key) bool { return flying[k] })
	}
	b.last.Store(time.Now().UnixNano())
	defer func() { b.last.Store(time.Now().UnixNano()) }()
	return b.awaitAll(ctx, wants, b.join(wants, ahead, reader))
}

// awaitAll waits for the fetches of wants as a reader, and leaves them.
func (b *Bound) awaitAll(ctx context.Context, wants []blockmap.Want, fetches []*fetch) error {
	for i, ft := range fetches {
		if ft == nil {
			continue
		}
		ended, err := b.f.await(ctx, ft, wants[i])
		if err != nil {
			b.f.leave(fetches[i:])
			return err
		}
		if !ended {
			b.f.leave(fetches[i : i+1])
		}
	}
	return nil
}

// LastDemand returns when a reader last waited for chunks, or the zero time.
func (b *Bound) LastDemand() time.Time {
	if ns := b.last.Load(); ns > 0 {
		return time.Unix(0, ns)
	}
	return time.Time{}
}

// Prefetch fetches wants when no demand is waiting. It is a hint: it is dropped if
// maxHints chunks are being prefetched already.
func (b *Bound) Prefetch(wants []blockmap.Want) { b.join(nil, wants, hint) }

// Close cancels the fetches that Prefetch and ReadAhead have asked for. The caller
// calls it when the image is no longer in use.
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

// asker is the kind of caller that asks for a chunk.
type asker uint8

const (
	reader   asker = iota // waits, and leaves if it gives up
	owner                 // like reader, and wants the chunk from the origin
	prefetch              // waits, and calls cancelPrefetches if it is stopped
	hint                  // does not wait, and is dropped if there are many
	idler                 // like prefetch, but behind everything else
)

// rank is the rank of what a caller that is no reader asks for.
func (a asker) rank() rank {
	switch a {
	case hint:
		return predicted
	case idler:
		return idle
	}
	return listed
}

// maxHints bounds the fetches of a Bound that come from hints and predictions.
const maxHints = 256

// join finds or makes the fetches of chunks. It returns one for each of wants, nil if
// what is needed of the chunk is resident. For the chunks of hinted it makes fetches but returns none. It
// starts requests when all fetches are queued, so that neighbours share one.
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

// fetch finds or makes the fetch of a chunk, or returns nil if what is needed of the chunk
// is resident. f.mu is held.
func (b *Bound) fetch(w blockmap.Want, as asker) *fetch {
	f := b.f
	if w.Here() {
		return nil
	}
	k := key{w.Stream, w.Chunk}
	here := place{b.src, w.Table}
	if ft := f.mu.fetches[k]; ft != nil {
		f.raise(ft, as)
		if as == hint {
			return ft
		}
		if !ft.hasPlace(here) && len(ft.others) < 4 {
			ft.others = append(ft.others, here)
			if ft.state == queued && ft.peer.src == nil {
				f.pushTo(ft, b.src)
			}
		}
		ft.need |= w.Needs()
		if as != reader && as != owner {
			ft.wanted++
			return ft
		}
		ft.readers++
		ft.reads |= w.Needs()
		if as == owner {
			f.own(ft)
		}
		if ft.demand && ft.state == downloading {
			f.awaitDownload(ft) // it may bring what others wait for sooner than this
		}
		f.promote(ft)
		return ft
	}
	if as == hint && len(b.hints) >= maxHints {
		f.dropped.Add(1)
		return nil
	}
	f.mu.seq++
	ft := &fetch{key: k, place: here, near: b.near, seq: f.mu.seq, need: w.Needs(), done: make(chan struct{})}
	if as == owner {
		ft.near = nil
	}
	if f.mu.closed {
		ft.state, ft.err = ended, blockmap.ErrClosed
		close(ft.done)
		return ft
	}
	f.mu.fetches[k] = ft
	switch as {
	case reader, owner:
		ft.readers, ft.reads = 1, w.Needs()
		if ft.near != nil {
			ft.by = b
		}
		f.markDemand(ft)
	case hint:
		ft.hint = b
		b.hints[ft] = struct{}{}
		fallthrough
	default:
		ft.wanted, ft.rank = 1, as.rank()
	}
	f.enqueue(ft)
	return ft
}
