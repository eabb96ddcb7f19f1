package fetcher

import (
	"time"

	"thaw/blockmap"
)

// source is where the chunks of one image come from, with its queue and its requests in
// flight. Sources share the Fetcher's bounds, and none can use them up: see pool.
type source struct {
	origin Origin // nil if it is a peer
	peer   string // the name of the peer; empty for an origin
	run    int    // chunks of a run, from which a peer's requests are
	keep   keeper // of chunks as the registry has them; nil: nobody

	queue queue // the fetches that wait for a request

	active       load // what its requests use
	prefetchLoad load // the part of active of requests that were prefetches when they were made
	bundles      int  // bundle downloads, which count in both
	running      map[*request]struct{}
	pace         *pace

	extraLoad   load      // what its extra requests use; not part of active
	asked       int64     // requests made
	extra       int64     // extra requests made
	good        time.Time // when it last brought a right chunk
	avoid       string    // a server of the origin that was too slow; avoided until avoidTill
	avoidTill   time.Time
	useless     int // extra requests in a row that were not quicker; counts until uselessTill
	uselessTill time.Time

	idle     int           // requests for idle fetches
	decoding chan struct{} // a token for each of its jobs that the decoders work on
	listed   bool          // it is in Fetcher.mu.sources
}

func (f *Fetcher) newSource(o Origin) *source {
	return &source{
		origin: o, running: make(map[*request]struct{}), pace: newPace(int64(float64(f.o.MaxBytes) * f.o.PrefetchShare)),
		decoding: make(chan struct{}, f.o.Decoders),
	}
}

// place is where a chunk can be read: a source, and the table with the position of the
// chunk in the blob.
type place struct {
	src   *source
	table *blockmap.Table
}

// offset returns the position of a chunk in the blob; stored returns its length there.
// Peers may send chunks uncompressed, so there it is the position in the stream, unless
// request.form says that a chunk comes as it is stored.
func (p place) offset(ft *fetch) int64 {
	c := &p.table.Chunks[ft.key.chunk]
	if p.src.isPeer() {
		return int64(c.Block) * blockmap.BlockSize
	}
	return c.Offset
}

func (p place) stored(ft *fetch) int64 {
	c := &p.table.Chunks[ft.key.chunk]
	if p.src.isPeer() {
		return int64(c.Size())
	}
	return int64(c.Stored)
}

// cost returns how many bytes of Options.MaxBytes a chunk takes.
func (p place) cost(ft *fetch) int64 {
	c := &p.table.Chunks[ft.key.chunk]
	if p.src.isPeer() && int(c.Stored) >= c.Size() {
		return int64(c.Size()) // it comes uncompressed
	}
	return int64(c.Stored) + int64(c.Size())
}

// together reports whether one request may bring two chunks: from a peer, it may if they
// are of one run.
func (p place) together(a, b *fetch) bool {
	return !p.src.isPeer() || a.key.chunk/p.src.run == b.key.chunk/p.src.run
}

// load is what requests in flight use.
type load struct {
	requests int
	bytes    int64 // of memory
}

func (l *load) add(n int, bytes int64) { l.requests += n; l.bytes += bytes }

// pool is what the requests of all sources share. A source may use as much as it leaves
// free. So a single source uses half of the pool, and beside k sources that hang the
// next one still gets 1/(k+2).
type pool struct {
	most, taken load
}

// free returns what is left after one more request of this many bytes.
func (p *pool) free(bytes int64) load {
	return load{p.most.requests - p.taken.requests - 1, p.most.bytes - p.taken.bytes - bytes}
}

// admits reports whether a source that uses own may make one more request.
func (p *pool) admits(own load, bytes int64) bool {
	free := p.free(bytes)
	return own.requests+1 <= free.requests && own.bytes+bytes <= free.bytes
}

// admits reports whether a source may make one more request. f.mu is held.
func (f *Fetcher) admits(s *source, demand bool, bytes int64) bool {
	if demand {
		// One demand is always admitted, regardless of the size of its chunk and of
		// requests that hang.
		return s.active.requests == s.prefetchLoad.requests || f.mu.pool.admits(s.active, bytes)
	}
	if s.active.requests == s.bundles {
		return true
	}
	return f.mu.pool.admits(s.active, bytes) && f.admitsPrefetch(s, bytes)
}

// admitsPrefetch reports whether the part of the bounds for prefetches has room.
func (f *Fetcher) admitsPrefetch(s *source, bytes int64) bool {
	free := f.mu.pool.free(bytes)
	return float64(s.prefetchLoad.requests) < float64(min(f.o.MaxRequests, free.requests))*f.o.PrefetchShare &&
		float64(s.prefetchLoad.bytes+bytes) <= float64(min(f.o.MaxBytes, free.bytes))*f.o.PrefetchShare
}

// charge adds the load of a request that begins. With negative numbers it removes the
// load of one that has ended.
func (f *Fetcher) charge(s *source, demand bool, n int, bytes int64) {
	f.mu.pool.taken.add(n, bytes)
	s.active.add(n, bytes)
	if !demand {
		s.prefetchLoad.add(n, bytes)
	}
}
