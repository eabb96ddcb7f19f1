package blockmap

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"sync/atomic"

	"github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"
)

// ErrDigest is what Fill says of bytes that are not the chunk they are said to
// be.
var ErrDigest = errors.New("the content does not match its digest")

// Stream is one stream in a Cache: a sparse file of its uncompressed bytes,
// mapped, and the residency that says which of them are here. All methods may
// be called at once.
type Stream struct {
	id    Digest
	table *Table
	cache *Cache
	data  File
	m     mmap.MMap
	res   *residency

	// pins counts, chunk by chunk, the views and fills that need it to stay.
	// The evictor adds evicting to a count of zero, so that whoever comes
	// next sees a negative number and leaves.
	pins []atomic.Int32
	// used is the cache's tick at the last use of each chunk.
	used []atomic.Uint32

	dirty atomic.Bool // blocks were set since the last sync
}

const evicting = math.MinInt32 / 2

// Within the directory of a stream.
const (
	dataName  = "data"
	mapName   = "map"
	tableName = "table"
)

// openStream opens the stream in dir, and makes what is not there or not right.
func (c *Cache) openStream(dir string, t *Table) (s *Stream, err error) {
	s = &Stream{id: t.ID(), table: t, cache: c}
	blocks := t.Blocks()
	defer func() {
		if err != nil {
			err = fmt.Errorf("open cached stream %.12s: %w", s.id, errors.Join(err, s.close()))
			s = nil
		}
	}()
	if s.data, err = c.fs.Open(filepath.Join(dir, dataName), true); err != nil {
		return s, err
	}
	size, allocated, err := s.data.Stat()
	if err != nil {
		return s, err
	}
	var fresh bool
	var cause error
	s.res, fresh, cause, err = openResidency(c.fs, filepath.Join(dir, mapName), s.id, blocks, c.boot)
	if err != nil {
		return s, err
	}
	want := int64(blocks) * BlockSize
	if size != want && !fresh {
		cause = fmt.Errorf("the data has %d bytes instead of %d", size, want)
		s.res.clear(0, blocks)
		if err := s.res.flush(); err != nil {
			return s, err
		}
	}
	if cause != nil {
		c.log.Warn("dropped a damaged stream of the cache; it will be fetched again",
			"stream", s.id.String(), "cause", cause)
		c.dropped.Add(1)
	}
	if size != want || fresh {
		// From zero length: what lies there is not known to be anything.
		if err := errors.Join(s.data.Truncate(0), s.data.Truncate(want)); err != nil {
			return s, err
		}
		allocated = 0
	}
	if blocks > 0 {
		if s.m, err = s.data.Map(want, false); err != nil {
			return s, err
		}
	}
	s.pins = make([]atomic.Int32, len(t.Chunks))
	s.used = make([]atomic.Uint32, len(t.Chunks))
	if here := s.res.count() * BlockSize; allocated > here+here/8+1<<20 {
		// A process was killed between writing and marking, or between
		// unmarking and punching.
		if err := s.punchAbsent(); err != nil {
			return s, err
		}
	}
	return s, nil
}

// punchAbsent gives back the space of all blocks that are not here. As with
// any eviction, the map that says so is made durable first.
func (s *Stream) punchAbsent() error {
	if err := s.res.flush(); err != nil {
		return err
	}
	blocks := s.table.Blocks()
	for b := uint32(0); b < blocks; {
		n, here := s.res.run(b, blocks-b)
		if !here {
			if err := s.data.PunchHole(int64(b)*BlockSize, int64(n)*BlockSize); err != nil {
				return err
			}
		}
		b += n
	}
	return nil
}

// ID names the stream by its content.
func (s *Stream) ID() Digest { return s.id }

// Resident is the number of bytes that are here.
func (s *Stream) Resident() int64 { return s.res.count() * BlockSize }

// Has says whether chunk i is here.
func (s *Stream) Has(i int) bool {
	c := &s.table.Chunks[i]
	return s.res.has(c.Block, c.Count)
}

// pin keeps chunk i from being evicted; false says that it is just being.
func (s *Stream) pin(i int) bool {
	if s.pins[i].Add(1) > 0 {
		return true
	}
	s.pins[i].Add(-1)
	return false
}

// Unpin implements Pinner: the token holds the first and the last chunk of a
// view's segment.
func (s *Stream) Unpin(token uint64) {
	for i := uint32(token >> 32); i <= uint32(token); i++ {
		s.pins[i].Add(-1)
	}
}

// Pinned implements Pinner.
func (s *Stream) Pinned(token uint64) (n int64) {
	for i := uint32(token >> 32); i <= uint32(token); i++ {
		n += int64(s.table.Chunks[i].Size())
	}
	return n
}

// Damaged implements Pinner.
func (s *Stream) Damaged(token uint64) {
	for i := uint32(token >> 32); i <= uint32(token); i++ {
		c := &s.table.Chunks[i]
		s.cache.used.Add(-int64(s.res.clear(c.Block, c.Count)) * BlockSize)
	}
}

// Hold keeps p as the content of chunk i in memory, once it has found p to be
// that: for chunks that somebody waits for and that Fill has no room for. Views
// see it as if it was in the cache. What is held is bounded, and goes in the order in
// which it came.
func (s *Stream) Hold(i int, p []byte) error {
	return ErrNoSpace
}

// view appends n bytes from off to v, or does nothing and returns false if some
// of them are not here.
func (s *Stream) view(v *View, off, n int64) bool {
	b := uint32(off / BlockSize)
	last := uint32((off + n - 1) / BlockSize)
	first := s.table.Find(b)
	i := first
	tick := s.cache.tick.Load()
	// The pin comes first: once it holds, a bit that is set stays set.
	for ; ; i++ {
		if !s.pin(i) {
			i--
			break
		}
		if s.used[i].Load() != tick {
			s.used[i].Store(tick)
		}
		if c := &s.table.Chunks[i]; c.Block+c.Count > last {
			if !s.res.has(b, last-b+1) {
				break
			}
			v.Append(s.m[off:off+n:off+n], s, uint64(first)<<32|uint64(i))
			return true
		}
	}
	for ; i >= first; i-- {
		s.pins[i].Add(-1)
	}
	return false
}

// Fill stores p as the content of chunk i, once it has found p to be that:
// nothing gets into the cache another way. It fails with ErrDigest where p is
// something else, with ErrNoSpace where neither the disk nor the quota has
// room, and leaves the chunk absent then.
func (s *Stream) Fill(i int, p []byte) error {
	c := &s.table.Chunks[i]
	if len(p) != c.Size() || Digest(sha256.Sum256(p)) != c.Digest {
		return fmt.Errorf("chunk %d of stream %.12s: %w", i, s.id, ErrDigest)
	}
	s.cache.crowded.RLock()
	err := s.store(i, p)
	s.cache.crowded.RUnlock()
	if diskFull(err) {
		err = s.storeAlone(i, p)
	}
	if diskFull(err) {
		err = fmt.Errorf("the disk of the cache is full: %w", ErrNoSpace)
	}
	if err != nil {
		return fmt.Errorf("keep chunk %d of stream %.12s: %w", i, s.id, err)
	}
	return nil
}

// store writes chunk i, and says then that it is here.
func (s *Stream) store(i int, p []byte) error {
	for !s.pin(i) {
		s.cache.awaitEviction()
	}
	defer s.pins[i].Add(-1)
	if s.Has(i) {
		return nil
	}
	if err := s.cache.reserve(int64(len(p))); err != nil {
		return err
	}
	c := &s.table.Chunks[i]
	if _, err := s.data.WriteAt(p, int64(c.Block)*BlockSize); err != nil {
		s.cache.unreserve(int64(len(p)))
		s.cache.tear(holder{s, i})
		return err
	}
	added := s.res.set(c.Block, c.Count)
	s.cache.unreserve(int64(c.Count-added) * BlockSize)
	s.used[i].Store(s.cache.tick.Load())
	s.dirty.Store(true)
	s.cache.filled()
	return nil
}

// storeAlone stores chunk i on a disk that is full, evicting others, while nothing
// else is stored: or else several would take what is freed, and none have enough.
func (s *Stream) storeAlone(i int, p []byte) (err error) {
	s.cache.crowded.Lock()
	defer s.cache.crowded.Unlock()
	err = unix.ENOSPC
	// Another process may be quicker to take what is freed.
	for try := 0; diskFull(err) && try < 16 && s.cache.evict(int64(len(p))) > 0; try++ {
		err = s.store(i, p)
	}
	return err
}

func diskFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// FillLocal fills chunk i with a copy from another place of the cache that
// holds the same content, and says whether there was one.
func (s *Stream) FillLocal(i int) bool {
	c := &s.table.Chunks[i]
	for _, l := range s.cache.holders(c.Digest) {
		if l.stream == s && l.chunk == i || !l.stream.Has(l.chunk) {
			continue
		}
		var v View
		o := &l.stream.table.Chunks[l.chunk]
		if o.Count != c.Count || !l.stream.view(&v, int64(o.Block)*BlockSize, int64(o.Size())) {
			continue
		}
		p := make([]byte, o.Size())
		err := v.CopyTo(p)
		v.Release()
		if err == nil {
			err = s.Fill(i, p)
		}
		if err == nil {
			return true
		}
	}
	return false
}

// sync makes durable what was here when it was called.
func (s *Stream) sync() error {
	if !s.dirty.Swap(false) {
		return nil
	}
	if err := s.res.sync(s.data.Sync); err != nil {
		s.dirty.Store(true)
		return fmt.Errorf("make stream %.12s durable: %w", s.id, err)
	}
	return nil
}

// close lets go of the files. While somebody still holds a view the mapping
// stays: a leak is better than a fault in whoever looks at it.
func (s *Stream) close() error {
	var errs []error
	for i := range s.pins {
		if s.pins[i].Load() != 0 {
			return fmt.Errorf("stream %.12s is closed with views of it held", s.id)
		}
	}
	if s.m != nil {
		errs = append(errs, s.m.Unmap())
	}
	if s.res != nil {
		errs = append(errs, s.res.close())
	}
	if s.data != nil {
		errs = append(errs, s.data.Close())
	}
	return errors.Join(errs...)
}
