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

// Fetcher schedules the fetches of a process. It is safe for concurrent use.
type Fetcher struct {
	o            Options
	log          *slog.Logger
	ctx          context.Context
	cancel       context.CancelFunc
	wg           sync.WaitGroup
	chunkDecoder *blockmap.ChunkDecoder
	buffers      sync.Pool
	decode       chan struct{} // a token for each demanded chunk that is being decompressed while its request is read
	decoders     *decoders     // decompress all other chunks

	warnings rate.Sometimes

	origins, nearby                                    counts
	local, retries, wrong, failed, maxInFlight         atomic.Int64
	passedOver                                         atomic.Int64 // requests of chunks to peers that failed
	nearStored                                         atomic.Int64 // bytes of chunks that peers have sent as the registry has them
	held, dropped, extra, overtaken, cancelled, leaves atomic.Int64
	unstored                                           atomic.Int64 // failed attempts to store a chunk since the last success
	claimed                                            atomic.Int64 // len(mu.claims)

	mu struct {
		sync.Mutex
		closed    bool
		seq       int64 // of the last fetch
		fetches   map[key]*fetch
		contents  map[blockmap.Digest]*fetch // the fetch that brings each content
		urgent    map[*fetch]struct{}        // the demanded ones
		sources   []*source                  // those with something queued, the next to be served first
		running   map[*request]struct{}      // all requests except extra ones
		watching  bool
		pool      pool // shared by requests
		extraPool pool // shared by extra requests
		bundles   int
		refused   bool                  // a source had no room for a request since reclaim was last called
		claims    map[*request]struct{} // requests that others pause for, see link.go
		resumed   chan struct{}         // closed and replaced when paused requests may go on
		peers     map[string]*source    // by name
		moved     bool                  // startNext has queued fetches elsewhere since dispatch last looked at all sources
		idle      int                   // requests for idle fetches
		calm      time.Time             // when the last demand or request that is not idle ended
		calming   bool                  // a timer calls dispatchIdle
	}
}

// key names a chunk of the cache.
type key struct {
	stream *blockmap.Stream
	chunk  int
}

// New makes a Fetcher. The caller closes it.
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
	// Demanded chunks are decompressed in addition to the work of the decoders.
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
	f.mu.peers = make(map[string]*source)
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

// Close ends all fetches. Their waiters get blockmap.ErrClosed. Close returns when no
// goroutine is left.
func (f *Fetcher) Close() {
	f.mu.Lock()
	f.mu.closed = true
	f.cancel() // a request that ends by this asks no other source
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
