// Package fetcher brings chunks into the cache: each once however many wait
// for it, what is waited for before what is not, several in one request,
// verified, and retried until there is no more hope.
//
// One [Fetcher] serves all devices of a process. From binds it to where an
// image's blobs come from, and makes what a [blockmap.Image] asks:
//
//	f := fetcher.New(fetcher.Options{})
//	defer f.Close()
//	image, err := blockmap.NewImage(index, cache, f.From(repository))
//
// A chunk on its way is a fetch. Whoever asks for it while it is under way
// joins it. A fetch belongs to the Fetcher, not to who asked first: a reader
// that gives up leaves the fetch to the others, and ends it if there are none.
//
// Each Bound has bounds of its own, so that an origin that hangs holds up nobody
// else. A chunk that a reader waits for and that comes too slowly is asked for
// elsewhere as well: see hedge.go. Where the cache has no room for it, it is
// answered from memory.
//
// What is fetched ahead of readers comes by [Bound.Replay], from a list of chunks
// or from a [Bundle] of them, or by [Bound.ReadAhead], which guesses.
package fetcher

import (
	"context"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"thaw/blockmap"
)

// Fetcher is the scheduler.
type Fetcher struct {
	o            Options
	log          *slog.Logger
	ctx          context.Context
	cancel       context.CancelFunc
	wg           sync.WaitGroup
	chunkDecoder *blockmap.ChunkDecoder
	buffers      sync.Pool
	decode       chan struct{} // a token for each demanded chunk that is decoded beside its request
	decoders     *decoders     // of all other chunks

	warnings rate.Sometimes

	requests, bytes, chunks, local, retries, wrong, failed, maxInFlight atomic.Int64
	held, dropped, extra, overtaken, cancelled                          atomic.Int64
	unstored                                                            atomic.Int64 // tries to store since one went well
	claimed                                                             atomic.Int64 // the length of mu.claims

	mu struct {
		sync.Mutex
		closed    bool
		seq       int64 // that were given out
		fetches   map[key]*fetch
		contents  map[blockmap.Digest]*fetch // the one that brings each content
		urgent    map[*fetch]struct{}        // those that somebody waits for
		sources   []*source                  // those with something queued, the next one first
		running   map[*request]struct{}      // but for extra ones
		watching  bool
		pool      pool // of requests
		extraPool pool // of extra ones
		bundles   int
		refused   bool                  // somebody had no room since reclaim was called
		claims    map[*request]struct{} // that have the line for themselves
		resumed   chan struct{}         // closed, and made anew, when others may have it
	}
}

// key names a chunk of the cache.
type key struct {
	stream *blockmap.Stream
	chunk  int
}

// New makes a Fetcher, to be closed.
func New(o Options) *Fetcher {
	setDefault(&o.MaxRequests, 64)
	setDefault(&o.MaxBytes, 128<<20)
	setDefault(&o.MaxRequest, 4<<20)
	setDefault(&o.PrefetchShare, 0.5)
	setDefault(&o.RetryFor, 30*time.Second)
	setDefault(&o.Backoff, 50*time.Millisecond)
	procs := runtime.GOMAXPROCS(0)
	setDefault(&o.Decoders, procs)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	// Chunks that readers wait for are decompressed beside what the decoders do.
	f := &Fetcher{o: o, log: o.Log, chunkDecoder: blockmap.NewChunkDecoder(procs + o.Decoders),
		decode: make(chan struct{}, procs), decoders: newDecoders(o.Decoders)}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.warnings.Interval = warnEvery
	f.mu.pool.most = load{2 * o.MaxRequests, 2 * o.MaxBytes}
	f.mu.extraPool.most = load{8 * maxExtra, o.MaxBytes / 2}
	f.mu.urgent = make(map[*fetch]struct{})
	f.mu.running = make(map[*request]struct{})
	f.mu.claims = make(map[*request]struct{})
	f.mu.resumed = make(chan struct{})
	f.mu.fetches = make(map[key]*fetch)
	f.mu.contents = make(map[blockmap.Digest]*fetch)
	return f
}

func setDefault[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

// Close ends all fetches; who waits for one gets blockmap.ErrClosed.
func (f *Fetcher) Close() {
	f.cancel()
	f.mu.Lock()
	f.mu.closed = true
	for _, ft := range f.mu.fetches {
		if ft.state != running {
			f.end(ft, blockmap.ErrClosed)
		}
	}
	f.mu.Unlock()
	f.wg.Wait()
	f.decoders.close()
	f.chunkDecoder.Close()
}
