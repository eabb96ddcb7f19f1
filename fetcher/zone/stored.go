package zone

import (
	"container/list"
	"sync"
	"sync/atomic"
	"time"

	"thaw/blockmap"
)

// storedChunks are chunks in memory as the registry has them, compressed: those that came
// lately, for peers that want the same ones soon. Whatever is kept was verified. The cache
// on disk has chunks uncompressed, and these take several times as many bytes on the way.
//
// It also keeps the digests of the leaves of chunks that this host was asked leaves of:
// making them takes as long as to verify the chunk.
//
// What is being sent is never dropped, so all memory counts. The least recently used goes
// first, and nothing is kept that there is no room for.
type storedChunks struct {
	most         int64 // bytes to keep
	hits, misses atomic.Int64

	mu struct {
		sync.Mutex
		closed bool
		here   map[chunkKey]*storedChunk
		recent list.List // of these; the next to go is last
		bytes  int64     // of these, and of those that are dropped and still in use
	}
}

// chunkKey names a chunk of a stream, or the digests of its leaves.
type chunkKey struct {
	stream  blockmap.Digest
	chunk   int
	digests bool
}

// sizeOf is how many bytes a chunk takes, with what the cache itself needs for it: the digests
// of a small chunk are fewer.
func sizeOf(b []byte) int64 { return int64(cap(b)) + storedOverhead }

// storedChunk is a chunk that is here. Nobody changes its bytes.
type storedChunk struct {
	of    *storedChunks
	key   chunkKey
	bytes []byte
	users int // that send it
	place *list.Element
	used  time.Time // last
}

const (
	// StoredMemory is how many bytes of chunks a member keeps as the registry has them, if
	// Options.Memory does not say.
	StoredMemory = 64 << 20
	// storedOverhead is what an entry takes besides its bytes, about.
	storedOverhead = 384
	// storedIdle is how long a chunk is kept that no peer asks for.
	storedIdle = 2 * time.Minute
)

func newStoredChunks(most int64) *storedChunks {
	s := &storedChunks{most: most}
	s.mu.here = make(map[chunkKey]*storedChunk)
	return s
}

// put keeps a chunk that was verified. The caller no longer changes its bytes.
func (s *storedChunks) put(k chunkKey, b []byte) {
	n := sizeOf(b)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.closed || len(b) == 0 || n > s.most {
		return
	}
	if old := s.mu.here[k]; old != nil {
		if len(old.bytes) == len(b) {
			s.use(old)
			return
		}
		s.drop(old) // another image has the same chunk in another form
	}
	for e := s.mu.recent.Back(); s.mu.bytes+n > s.most && e != nil; {
		x := e.Value.(*storedChunk)
		e = e.Prev()
		if x.users == 0 {
			s.drop(x)
		}
	}
	if s.mu.bytes+n > s.most {
		return // all that is here is being sent
	}
	x := &storedChunk{of: s, key: k, bytes: b, used: time.Now()}
	s.mu.here[k] = x
	x.place = s.mu.recent.PushFront(x)
	s.mu.bytes += n
}

// take returns a chunk that has n bytes, or nil. The caller releases it.
func (s *storedChunks) take(k chunkKey, n int64) *storedChunk {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.mu.here[k]
	if x == nil || int64(len(x.bytes)) != n {
		return nil
	}
	x.users++
	s.use(x)
	return x
}

// use notes that a chunk is used. s.mu is held.
func (s *storedChunks) use(x *storedChunk) {
	x.used = time.Now()
	s.mu.recent.MoveToFront(x.place)
}

// release ends a use. A nil chunk has none.
func (x *storedChunk) release() {
	if x == nil {
		return
	}
	s := x.of
	s.mu.Lock()
	defer s.mu.Unlock()
	if x.users--; x.users == 0 && x.place == nil {
		s.mu.bytes -= sizeOf(x.bytes)
	}
}

// drop takes out a chunk. Its memory counts until nobody sends it any more. s.mu is held.
func (s *storedChunks) drop(x *storedChunk) {
	s.mu.recent.Remove(x.place)
	delete(s.mu.here, x.key)
	x.place = nil
	if x.users == 0 {
		s.mu.bytes -= sizeOf(x.bytes)
	}
}

// expire drops the chunks that nobody has used since a time.
func (s *storedChunks) expire(since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for e := s.mu.recent.Back(); e != nil && e.Value.(*storedChunk).used.Before(since); e = s.mu.recent.Back() {
		s.drop(e.Value.(*storedChunk))
	}
}

// looked counts a request for a chunk as the registry has it, and whether it was here.
func (s *storedChunks) looked(hit bool) {
	if hit {
		s.hits.Add(1)
	} else {
		s.misses.Add(1)
	}
}

// size is how many bytes are kept.
func (s *storedChunks) size() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.bytes
}

// close drops everything, and keeps nothing any more.
func (s *storedChunks) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.closed = true
	for e := s.mu.recent.Back(); e != nil; e = s.mu.recent.Back() {
		s.drop(e.Value.(*storedChunk))
	}
}
