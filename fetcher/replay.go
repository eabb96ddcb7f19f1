package fetcher

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"thaw/blockmap"
)

// ReplayOptions are the settings of a Replay.
type ReplayOptions struct {
	// Rate bounds the bytes per second that the replay requests from the origin; 0
	// means no limit except the Fetcher's.
	Rate int64
	// Window is how many compressed bytes of the list are queued at once, so that
	// neighbours can share requests. It defaults to 16 MiB, and in a zone to 4 MiB.
	Window int64
	// MaxBytes bounds the bytes that the chunks take in the cache; 0 means no limit.
	// The replay ends at this limit. The bundle's chunks count first, and then the
	// list's.
	MaxBytes int64
	// Bundle, if not nil, is downloaded first. Its leaves need not be in the list.
	Bundle *Bundle
}

// Replay prefetches a list of chunks in its order. Demands still go first.
type Replay struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu struct {
		sync.Mutex
		p       ReplayProgress
		changed chan struct{} // closed and replaced when p changes
	}
}

// ReplayProgress is the progress of a Replay. Bytes are compressed.
type ReplayProgress struct {
	Chunks, Bytes         int64 // of the list and the bundle
	DoneChunks, DoneBytes int64 // resident, or evicted again, whatever request or download brought them
	Failed                int64 // chunks that were given up
	Err                   error // of the first of these, or why the replay ended early
	Began, Ended          time.Time
}

// Replay starts to fetch wants, in their order. The replay ends when all chunks are
// resident or given up, when ctx ends, or by Stop.
func (b *Bound) Replay(ctx context.Context, wants []blockmap.Want, o ReplayOptions) *Replay {
	near := b.hasPeers()
	if o.Window == 0 {
		o.Window = 16 << 20
		if near {
			o.Window = nearWindow
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	r := &Replay{cancel: cancel, done: make(chan struct{})}
	r.mu.changed = make(chan struct{})
	r.mu.p.Began = time.Now()
	bundle := o.Bundle
	if bundle == nil {
		bundle = new(Bundle)
	}
	items := bundle.before(wants)
	if kept := within(items, o.MaxBytes); len(kept) < len(items) {
		b.f.log.Info("the prefetch is larger than the cache, so thaw leaves out the end of it",
			"chunks", len(kept), "of", len(items), "max_bytes", o.MaxBytes)
		items = kept
		if o.Bundle != nil {
			o.Bundle = o.Bundle.only(kept)
		}
	}
	if near {
		spread(items)
	}
	r.mu.p.Chunks = int64(len(items))
	for i := range items {
		r.mu.p.Bytes += items[i].bytes
	}
	b.replays.Add(1)
	go func() {
		defer close(r.done)
		defer cancel()
		r.run(ctx, b, items, o)
	}()
	return r
}

// In a zone, hosts that start the same image together should not all ask for the same
// chunk at the same time: each takes one of the next few chunks of its list at random. So
// different chunks spread from different hosts, and the links of all are busy. In
// simulations of 10,000 hosts this and the smaller window made a start 1.5 times as fast.
const (
	nearWindow = 4 << 20
	nearSpread = 32
)

// spread takes items out of their order, each by about nearSpread. What a bundle brings
// stays in order.
func spread(items []item) {
	for len(items) > 0 && items[0].bundled {
		items = items[1:]
	}
	for i := range items {
		j := i + rand.IntN(min(nearSpread, len(items)-i))
		items[i], items[j] = items[j], items[i]
	}
}

// within returns the first items that together take at most this many bytes. A chunk
// that is listed twice counts once.
func within(items []item, most int64) []item {
	if most <= 0 {
		return items
	}
	seen := make(map[key]bool, len(items))
	for i, w := range items {
		if k := (key{w.Stream, w.Chunk}); !seen[k] {
			seen[k] = !w.bundled // the rest of a chunk of the bundle comes on top
			if most -= w.size; most < 0 {
				return items[:i:i]
			}
		}
	}
	return items
}

// largestFrame is the length of the longest frame of a chunk: raw blocks and their
// headers.
const largestFrame = blockmap.MaxChunkBlocks*blockmap.BlockSize + 1<<17

func stored(w blockmap.Want) int64 { return int64(w.Table.Chunks[w.Chunk].Stored) }

// run downloads the bundle, and then keeps a window of the list queued or in flight.
func (r *Replay) run(ctx context.Context, b *Bound, wants []item, o ReplayOptions) {
	defer r.update(func(p *ReplayProgress) {
		b.replays.Add(-1)
		p.Ended = time.Now()
	})
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
		window = min(window, max(o.Rate/4, 1)) // a steady rate instead of bursts
	}
	arrived := make(chan arrival)
	pending := make(map[*fetch]int)
	var ahead int64
	ask := func(n int) error {
		var bytes int64
		list := make([]blockmap.Want, n)
		for i, w := range wants[:n] {
			list[i] = w.Want
			if err := limit.WaitN(ctx, int(stored(w.Want))); err != nil {
				return err
			}
		}
		for i, ft := range b.join(list, nil, prefetch) {
			l := arrival{want: wants[i], fetch: ft}
			bytes += stored(l.want.Want)
			if ft != nil {
				pending[ft]++
			}
			wg.Go(func() { l.await(ctx, b.f, arrived) })
		}
		wants = wants[n:]
		ahead += bytes
		return nil
	}
	for len(wants) > 0 || ahead > 0 {
		if room := window - ahead; len(wants) > 0 && (room >= window/4 || ahead == 0) {
			n := 0
			for bytes := int64(0); n < len(wants) && (n == 0 || bytes+stored(wants[n].Want) <= room); n++ {
				bytes += stored(wants[n].Want)
			}
			if ask(n) == nil {
				continue
			}
		}
		select {
		case l := <-arrived:
			ahead -= stored(l.want.Want)
			if pending[l.fetch]--; l.ended || pending[l.fetch] <= 0 {
				delete(pending, l.fetch)
			}
			if l.fetch != nil && !l.ended {
				b.f.leavePrefetch(l.fetch)
			}
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

// arrival says that one chunk's fetch has ended, or has brought what was needed. The fetch
// is nil if that was resident.
type arrival struct {
	want  item
	fetch *fetch
	ended bool
}

// await sends the arrival when it has come.
func (l arrival) await(ctx context.Context, f *Fetcher, arrived chan<- arrival) {
	if l.fetch != nil {
		var err error
		if l.ended, err = f.await(ctx, l.fetch, l.want.Want); err != nil && !l.ended {
			return
		}
	}
	select {
	case arrived <- l:
	case <-ctx.Done():
	}
}

// notStored is the reason why the cache did not store a chunk that arrived.
func (l arrival) notStored() error {
	var notStored *storeError
	if l.fetch == nil || !l.ended || !errors.As(l.fetch.err, &notStored) {
		return nil
	}
	return l.fetch.err
}

// count adds the arrival to the progress.
func (l arrival) count(p *ReplayProgress) {
	if l.fetch != nil && l.ended && l.fetch.err != nil && !l.want.Here() {
		p.Failed++
		p.Err = cmp.Or(p.Err, l.fetch.err)
		return
	}
	// A small cache may have evicted it since; it counts all the same.
	p.DoneChunks++
	p.DoneBytes += l.want.bytes
}

// leavePrefetch removes a prefetch from a fetch that has brought what it needs.
func (f *Fetcher) leavePrefetch(ft *fetch) {
	f.mu.Lock()
	defer f.mu.Unlock()
	ft.wanted--
	f.update(ft)
	f.dispatch()
}

// downloadBundle downloads the bundle. It returns the items that the bundle did not
// bring, and the error that ended the download early.
func (r *Replay) downloadBundle(ctx context.Context, b *Bound, bundle *Bundle, limit *rate.Limiter, items []item) ([]item, error) {
	var mu sync.Mutex
	at := make(map[key]*item) // those of the bundle
	for i := range items {
		if w := &items[i]; w.bundled {
			at[key{w.Stream, w.Chunk}] = w
		}
	}
	came := make(map[*item]blockmap.LeafSet)
	chunks := 0
	err := b.downloadBundle(ctx, bundle, limit, func(fr *Frame, p *Part) {
		var n, bytes int64
		mu.Lock()
		for i, w := range p.Wants {
			x := at[key{w.Stream, w.Chunk}]
			if came[x].Contains(p.leaves()) {
				continue // it was resident before
			}
			came[x] |= p.leaves()
			if i == 0 {
				x.bytes -= fr.share(p)
				bytes += fr.share(p)
			}
			if came[x] == x.Leaves {
				n++
			}
		}
		chunks += int(n)
		mu.Unlock()
		r.update(func(g *ReplayProgress) {
			g.DoneChunks += n
			g.DoneBytes += bytes
		})
	})
	var left []item
	for i := range items {
		if x := &items[i]; !x.bundled || came[x] != x.Leaves {
			left = append(left, *x)
		}
	}
	if err != nil && ctx.Err() == nil && !errors.Is(err, blockmap.ErrNoSpace) {
		b.f.log.Warn("the bundle download failed, so thaw fetches the chunks that it did not bring one by one",
			"err", err, "came", chunks, "left", len(left))
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

// Progress returns the progress so far.
func (r *Replay) Progress() ReplayProgress {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.p
}

// Wait returns nil when share (0 to 1) of the bytes are resident. It returns an error when
// the replay has ended before that.
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

// Stop ends the replay, and returns when it has ended. Chunks that no reader wants are
// not fetched any more.
func (r *Replay) Stop() {
	r.cancel()
	<-r.done
}
