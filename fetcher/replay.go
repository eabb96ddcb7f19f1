package fetcher

import (
	"context"
	"fmt"
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
	// Window is how many compressed bytes are asked for ahead of what has
	// come; 16 MiB if zero.
	Window int64
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
	Chunks, Bytes         int64 // of the list
	DoneChunks, DoneBytes int64 // here, whoever brought them
	Failed                int64 // chunks that could not be had
	Err                   error // of the first of them
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

func stored(w blockmap.Want) int64 { return int64(w.Table.Chunks[w.Chunk].Stored) }

// run keeps a window of the list in flight.
func (r *Replay) run(ctx context.Context, b *Bound, wants []blockmap.Want, o ReplayOptions) {
	defer r.update(func(p *ReplayProgress) { p.Ended = time.Now() })
	limit := rate.NewLimiter(rate.Inf, 0)
	if o.Rate > 0 {
		limit = rate.NewLimiter(rate.Limit(o.Rate), int(max(o.Rate/10, blockmap.MaxChunkBlocks*blockmap.BlockSize*2)))
	}
	type part struct {
		flights []*flight
		wants   []blockmap.Want
		bytes   int64
	}
	var window []part
	var ahead int64
	// What is asked for at once can share a request with its neighbours.
	const partBytes = 2 << 20
	for len(wants) > 0 || len(window) > 0 {
		for len(wants) > 0 && (ahead < o.Window || len(window) == 0) {
			var p part
			n := 0
			for ; n < len(wants) && p.bytes < partBytes; n++ {
				p.bytes += stored(wants[n])
			}
			p.wants, wants = wants[:n], wants[n:]
			if err := limit.WaitN(ctx, int(p.bytes)); err != nil {
				return
			}
			p.flights = b.f.join(p.wants, b.origin, false)
			window = append(window, p)
			ahead += p.bytes
		}
		p := window[0]
		window = window[1:]
		ahead -= p.bytes
		var failed int64
		var cause error
		for _, fl := range p.flights {
			select {
			case <-fl.done:
			case <-ctx.Done():
				b.f.forget(p.flights, context.Cause(ctx))
				for _, q := range window {
					b.f.forget(q.flights, context.Cause(ctx))
				}
				return
			}
			if fl.err != nil {
				failed++
				cause = fl.err
			}
		}
		var here, bytes int64
		for _, w := range p.wants {
			if w.Stream.Has(w.Chunk) {
				here++
				bytes += stored(w)
			}
		}
		r.update(func(g *ReplayProgress) {
			g.DoneChunks += here
			g.DoneBytes += bytes
			g.Failed += failed
			if g.Err == nil && cause != nil {
				g.Err = cause
			}
		})
	}
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
			return fmt.Errorf("of %d chunks to prefetch %d came: %w", p.Chunks, p.DoneChunks, p.Err)
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
