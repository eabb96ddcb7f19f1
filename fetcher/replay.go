package fetcher

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"thaw/blockmap"
)

// ReplayOptions are the settings of a Replay.
type ReplayOptions struct {
	// Rate bounds the bytes a second that are asked of the origin; 0 for no
	// bound but the Fetcher's.
	Rate int64
	// Window is how many compressed bytes of the list may be queued, where
	// neighbours find each other; 16 MiB if zero.
	Window int64
	// MaxBytes bounds what the chunks take in the cache, uncompressed; 0 for no
	// bound. What is beyond it, the bundle's chunks first and then the list, is
	// left out.
	MaxBytes int64
	// Bundle, if there is one, is downloaded first. Its chunks need not be in
	// the list as well.
	Bundle *Bundle
}

// Replay fetches a list of chunks in its order, ahead of readers. What a reader
// asks for meanwhile goes first, as ever.
type Replay struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu struct {
		sync.Mutex
		p       ReplayProgress
		changed chan struct{} // closed, and made anew, when p changes
	}
}

// ReplayProgress says how far a Replay is. Bytes are compressed ones.
type ReplayProgress struct {
	Chunks, Bytes         int64 // of the list, the bundle's included
	DoneChunks, DoneBytes int64 // here, whoever brought them
	Failed                int64 // chunks that could not be had
	Err                   error // of the first of them, or why it was ended
	Began, Ended          time.Time
}

// Replay starts to fetch wants, which are in the order that they are to come
// in. It goes on until all are here or given up, until ctx ends, or until Stop.
func (b *Bound) Replay(ctx context.Context, wants []blockmap.Want, o ReplayOptions) *Replay {
	if o.Window == 0 {
		o.Window = 16 << 20
	}
	ctx, cancel := context.WithCancel(ctx)
	r := &Replay{cancel: cancel, done: make(chan struct{})}
	r.mu.changed = make(chan struct{})
	r.mu.p.Began = time.Now()
	if o.Bundle != nil {
		wants = o.Bundle.before(wants)
	}
	if kept := within(wants, o.MaxBytes); len(kept) < len(wants) {
		b.f.log.Info("the prefetch is larger than the cache, so thaw leaves out the end of it",
			"chunks", len(kept), "of", len(wants), "max_bytes", o.MaxBytes)
		wants = kept
		if o.Bundle != nil {
			o.Bundle = o.Bundle.without(kept)
		}
	}
	r.mu.p.Chunks = int64(len(wants))
	for _, w := range wants {
		r.mu.p.Bytes += stored(w)
	}
	go func() {
		defer close(r.done)
		defer cancel()
		r.run(ctx, b, wants, o)
	}()
	return r
}

// within lists the first of wants that take at most so many bytes. A chunk that is
// listed twice takes none the second time.
func within(wants []blockmap.Want, most int64) []blockmap.Want {
	if most <= 0 {
		return wants
	}
	seen := make(map[key]bool, len(wants))
	for i, w := range wants {
		if k := (key{w.Stream, w.Chunk}); !seen[k] {
			seen[k] = true
			if most -= int64(w.Table.Chunks[w.Chunk].Size()); most < 0 {
				return wants[:i:i]
			}
		}
	}
	return wants
}

// largestFrame is the most that a chunk takes: raw blocks in a zstd frame.
const largestFrame = blockmap.MaxChunkBlocks*blockmap.BlockSize + 1<<17

func stored(w blockmap.Want) int64 { return int64(w.Table.Chunks[w.Chunk].Stored) }

// run keeps a window of the list in flight.
func (r *Replay) run(ctx context.Context, b *Bound, wants []blockmap.Want, o ReplayOptions) {
	defer r.update(func(p *ReplayProgress) { p.Ended = time.Now() })
	limit := rate.NewLimiter(rate.Inf, 0)
	if o.Rate > 0 {
		limit = rate.NewLimiter(rate.Limit(o.Rate), int(max(o.Rate/10, largestFrame)))
	}
	noRoom := func(err error) {
		b.f.log.Info("the cache cannot store what is prefetched, so thaw leaves out the rest", "err", err)
		r.update(func(p *ReplayProgress) { p.Err = cmp.Or(p.Err, err) })
	}
	if o.Bundle != nil {
		var err error
		if wants, err = r.downloadBundle(ctx, b, o.Bundle, limit, wants); errors.Is(err, blockmap.ErrNoSpace) {
			noRoom(err)
			return
		}
	}
	var refusals refusals
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	window := o.Window
	if o.Rate > 0 {
		window = min(window, max(o.Rate/4, 1)) // rather than nothing, and then a lot
	}
	arrived := make(chan arrival)
	pending := make(map[*fetch]int)
	var ahead int64
	ask := func(n int) error {
		var bytes int64
		for _, w := range wants[:n] {
			if err := limit.WaitN(ctx, int(stored(w))); err != nil {
				return err
			}
		}
		for i, ft := range b.join(wants[:n], nil, prefetch) {
			l := arrival{wants[i], ft}
			bytes += stored(l.want)
			if ft != nil {
				pending[ft]++
			}
			wg.Go(func() { l.await(ctx, arrived) })
		}
		wants = wants[n:]
		ahead += bytes
		return nil
	}
	for len(wants) > 0 || ahead > 0 {
		if room := window - ahead; len(wants) > 0 && (room >= window/4 || ahead == 0) {
			n := 0
			for bytes := int64(0); n < len(wants) && (n == 0 || bytes+stored(wants[n]) <= room); n++ {
				bytes += stored(wants[n])
			}
			if ask(n) == nil {
				continue
			}
		}
		select {
		case l := <-arrived:
			n := stored(l.want)
			ahead -= n
			delete(pending, l.fetch)
			r.update(l.count)
			if err := l.notStored(); refusals.full(err) {
				b.f.cancelPrefetches(pending, err)
				noRoom(err)
				return
			}
		case <-ctx.Done():
			b.f.cancelPrefetches(pending, context.Cause(ctx))
			r.update(func(p *ReplayProgress) { p.Err = cmp.Or(p.Err, context.Cause(ctx)) })
			return
		}
	}
}

// arrival is the end of the way of one chunk; fetch is nil where it was here
// before.
type arrival struct {
	want  blockmap.Want
	fetch *fetch
}

func (l arrival) await(ctx context.Context, arrived chan<- arrival) {
	if l.fetch != nil {
		select {
		case <-l.fetch.done:
		case <-ctx.Done():
			return
		}
	}
	select {
	case arrived <- l:
	case <-ctx.Done():
	}
}

// notStored is why a chunk that came could not be kept.
func (l arrival) notStored() error {
	var notStored *storeError
	if l.fetch == nil || !errors.As(l.fetch.err, &notStored) {
		return nil
	}
	return l.fetch.err
}

func (l arrival) count(p *ReplayProgress) {
	if l.fetch != nil && l.fetch.err != nil && !l.want.Stream.Has(l.want.Chunk) {
		p.Failed++
		p.Err = cmp.Or(p.Err, l.fetch.err)
		return
	}
	// It may have had to go again, if the cache is small.
	p.DoneChunks++
	p.DoneBytes += stored(l.want)
}

// downloadBundle downloads the bundle, and returns those of wants that it did not bring, and
// what ended it if that was before its end.
func (r *Replay) downloadBundle(ctx context.Context, b *Bound, bundle *Bundle, limit *rate.Limiter, wants []blockmap.Want) ([]blockmap.Want, error) {
	var mu sync.Mutex
	came := make(map[key]bool)
	err := b.downloadBundle(ctx, bundle, limit, func(p Part) {
		var bytes int64
		mu.Lock()
		for _, w := range p.Wants {
			came[key{w.Stream, w.Chunk}] = true
			bytes += stored(w)
		}
		mu.Unlock()
		r.update(func(g *ReplayProgress) {
			g.DoneChunks += int64(len(p.Wants))
			g.DoneBytes += bytes
		})
	})
	left := slices.DeleteFunc(slices.Clone(wants), func(w blockmap.Want) bool { return came[key{w.Stream, w.Chunk}] })
	if err != nil && ctx.Err() == nil && !errors.Is(err, blockmap.ErrNoSpace) {
		b.f.log.Warn("the bundle is of no more use; what it did not bring is fetched chunk by chunk",
			"err", err, "came", len(came), "left", len(left))
	}
	return left, err
}

func (r *Replay) update(f func(p *ReplayProgress)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(&r.mu.p)
	close(r.mu.changed)
	r.mu.changed = make(chan struct{})
}

// Progress says how far it is.
func (r *Replay) Progress() ReplayProgress {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.p
}

// Wait returns when share (0 to 1) of the list's bytes are here, or when no
// more will come: with an error then, unless it was enough.
func (r *Replay) Wait(ctx context.Context, share float64) error {
	for {
		r.mu.Lock()
		p, changed := r.mu.p, r.mu.changed
		r.mu.Unlock()
		if float64(p.DoneBytes) >= share*float64(p.Bytes) {
			return nil
		}
		if !p.Ended.IsZero() {
			return fmt.Errorf("prefetched %d of %d chunks: %w", p.DoneChunks, p.Chunks, p.Err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Stop ends it, if it has not ended, and returns when nothing of it is left.
// What nobody has asked for is not fetched any more.
func (r *Replay) Stop() {
	r.cancel()
	<-r.done
}
