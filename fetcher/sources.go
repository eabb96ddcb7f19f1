package fetcher

import (
	"time"

	"thaw/blockmap"
)

// source is where one image's chunks come from, with what is queued and in flight
// there. Sources share the Fetcher's bounds, and none can take them all: see pool.
type source struct {
	origin Origin

	queue queue // what waits for a request

	active       load // what its requests take
	prefetchLoad load // the part of active that nobody waited for when it was asked for
	bundles      int  // the part of both that are bundles
	running      map[*request]struct{}
	pace         *pace

	extraLoad   load      // what its extra requests take, which are not part of active
	asked       int64     // requests
	extra       int64     // extra ones
	good        time.Time // when it last brought a chunk that was right
	avoid       string    // the server behind the origin that was too slow
	avoidTill   time.Time
	useless     int // extra requests in a row that were not quicker
	uselessTill time.Time

	decoding chan struct{} // a token for each job that the decoders have of it
	listed   bool          // in Fetcher.mu.sources
}

func (f *Fetcher) newSource(o Origin) *source {
	return &source{
		origin: o, running: make(map[*request]struct{}), pace: newPace(int64(float64(f.o.MaxBytes) * f.o.PrefetchShare)),
		decoding: make(chan struct{}, f.o.Decoders),
	}
}

// place says where the compressed bytes of a chunk are.
type place struct {
	src   *source
	table *blockmap.Table
}

// offset is where in the blob a chunk lies, stored how many bytes it has there.
func (p place) offset(ft *fetch) int64 { return p.table.Chunks[ft.key.chunk].Offset }
func (p place) stored(ft *fetch) int64 { return int64(p.table.Chunks[ft.key.chunk].Stored) }

// load is what requests in flight take.
type load struct {
	requests int
	bytes    int64 // of memory
}

func (l *load) add(n int, bytes int64) { l.requests += n; l.bytes += bytes }

// pool is what requests of all sources share: at most most together. A source may
// take as much as it leaves free. So one source alone takes half of the pool,
// and beside k sources that hang the next one still gets 1/(k+2).
type pool struct {
	most, taken load
}

// free is what is left when a request of so many bytes has been added.
func (p *pool) free(bytes int64) load {
	return load{p.most.requests - p.taken.requests - 1, p.most.bytes - p.taken.bytes - bytes}
}

// admits says whether who has own may make one more request.
func (p *pool) admits(own load, bytes int64) bool {
	free := p.free(bytes)
	return own.requests+1 <= free.requests && own.bytes+bytes <= free.bytes
}

// admits says whether a source may make one more request. f.mu is held.
func (f *Fetcher) admits(s *source, demand bool, bytes int64) bool {
	if demand {
		// One is always let through, however large its chunk is, and whatever hangs.
		return s.active.requests == s.prefetchLoad.requests || f.mu.pool.admits(s.active, bytes)
	}
	if s.active.requests == s.bundles {
		return true
	}
	return f.mu.pool.admits(s.active, bytes) && f.admitsPrefetch(s, bytes)
}

// admitsPrefetch says whether the part of the bounds that is for prefetches has room.
func (f *Fetcher) admitsPrefetch(s *source, bytes int64) bool {
	free := f.mu.pool.free(bytes)
	return float64(s.prefetchLoad.requests) < float64(min(f.o.MaxRequests, free.requests))*f.o.PrefetchShare &&
		float64(s.prefetchLoad.bytes+bytes) <= float64(min(f.o.MaxBytes, free.bytes))*f.o.PrefetchShare
}

// charge takes account of a request that begins or ends.
func (f *Fetcher) charge(s *source, demand bool, n int, bytes int64) {
	f.mu.pool.taken.add(n, bytes)
	s.active.add(n, bytes)
	if !demand {
		s.prefetchLoad.add(n, bytes)
	}
}
