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
	"io"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/time/rate"

	"thaw/blockmap"
)

// Origin is where the blobs of an image are read from.
type Origin interface {
	// OpenRange reads n bytes at off of a blob. The body ends with io.EOF
	// after n bytes, or with another error before.
	OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error)
}

// Ranger is an Origin that may read several ranges in one request. What nobody
// waits for then shares requests with what is near in turn, and not in the blob
// alone: a start touches a little everywhere, and a request costs a registry as
// much as a megabyte or more.
type Ranger interface {
	Origin
	// Ranges is how many ranges a request may have at present, at least 1.
	Ranges() int
	// OpenRanges reads ranges of a blob, which have nothing in common, one behind
	// the other, as OpenRange reads one. A nil body without an error says to ask
	// for each by OpenRange.
	OpenRanges(ctx context.Context, blob blockmap.Digest, ranges []blockmap.Extent) (io.ReadCloser, error)
}

// distruster is a body that can be told that its bytes were wrong, so that its
// source is asked last from then on.
type distruster interface{ Distrust() }

// Options are the settings of a Fetcher. Zero values mean what is said here.
type Options struct {
	// What one origin's requests have at most. Several origins share twice as
	// much, and each may have as much as is left.
	MaxRequests int   // in flight at once; 64
	MaxBytes    int64 // in flight, compressed and not; 128 MiB

	MaxRequest    int64         // compressed bytes of a request for several chunks; 4 MiB
	PrefetchShare float64       // of both bounds, at most this much for prefetches; 0.5
	RetryFor      time.Duration // how long a chunk is tried before its readers get the error; 30 s
	Backoff       time.Duration // before the second try, doubled each time up to 2 s; 50 ms
	Log           *slog.Logger  // silent if nil

	// Decoders is the number of threads of low priority that decompress what
	// nobody waits for; GOMAXPROCS if zero. Where something else is served
	// meanwhile that is urgent, GOMAXPROCS is better larger than this.
	Decoders int

	// Temporary says whether an origin's error may pass, RetryAfter how long
	// the origin asked to be left alone for. Nil: every error may, at once.
	Temporary  func(error) bool
	RetryAfter func(error) time.Duration
}

// Stats counts what a Fetcher has done so far.
type Stats struct {
	Requests  int64 `json:"requests"`           // made to origins
	Bytes     int64 `json:"fetched_bytes"`      // received from origins
	Chunks    int64 `json:"fetched_chunks"`     // brought from origins
	Local     int64 `json:"local_chunks"`       // chunks that another stream held already
	Retries   int64 `json:"retries"`            // tries after a first one
	Wrong     int64 `json:"wrong_chunks"`       // chunks that came and did not match their digest
	Failed    int64 `json:"failed_chunks"`      // chunks given up
	Held      int64 `json:"held_chunks"`        // chunks kept in memory, since the cache could not keep them
	Dropped   int64 `json:"dropped_hints"`      // chunks not prefetched, since too many were being
	Extra     int64 `json:"extra_requests"`     // made since another brought its chunk too late
	Overtaken int64 `json:"overtaken_requests"` // requests that an extra one was quicker than
	Cancelled int64 `json:"cancelled_fetches"`  // chunks and requests that nobody waited for any more
	InFlight  int64 `json:"in_flight"`          // requests now
	MostAlive int64 `json:"most_in_flight"`     // the most requests that were in flight at once
}

// wrongTries bounds how often wrong bytes are asked for again: an origin that
// lies twice is not believed a fourth time.
const wrongTries = 4

// spaceTries bounds how often room is looked for that a reader waits for.
const spaceTries = 4

// Fetcher is the scheduler.
type Fetcher struct {
	o        Options
	log      *slog.Logger
	ctx      context.Context
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	zstd     *zstd.Decoder
	buffers  sync.Pool
	decode   chan struct{} // a token for each demanded chunk that is decoded beside its request
	decoders *decoders     // of all other chunks

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
	// What a reader waits for does not wait for the decoders. Only a
	// nonsensical option makes this fail.
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(procs+o.Decoders), zstd.WithDecodeAllCapLimit(true),
		zstd.WithDecoderMaxMemory(blockmap.MaxChunkBlocks*blockmap.BlockSize))
	if err != nil {
		panic(err)
	}
	f := &Fetcher{o: o, log: o.Log, zstd: dec, decode: make(chan struct{}, procs), decoders: newDecoders(o.Decoders)}
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
	f.zstd.Close()
}

// Stats returns the counts so far.
func (f *Fetcher) Stats() Stats {
	f.mu.Lock()
	n := f.mu.pool.taken.requests + f.mu.extraPool.taken.requests
	f.mu.Unlock()
	return Stats{
		Requests: f.requests.Load(), Bytes: f.bytes.Load(), Chunks: f.chunks.Load(), Local: f.local.Load(),
		Retries: f.retries.Load(), Wrong: f.wrong.Load(), Failed: f.failed.Load(),
		Held: f.held.Load(), Dropped: f.dropped.Load(),
		Extra: f.extra.Load(), Overtaken: f.overtaken.Load(), Cancelled: f.cancelled.Load(),
		InFlight: int64(n), MostAlive: f.maxInFlight.Load(),
	}
}

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
