package blockmap

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// evictor makes room: for the quota, and on a full disk. It evicts, in this
// order, the least recently used first:
//
//  1. chunks of streams that no root holds,
//  2. other chunks,
//  3. empty streams that no image has,
//  4. small files that no root holds,
//  5. roots, with the small files that only they hold.
//
// Small files go before chunks only where they take more than their share.
type evictor struct {
	disk    *disk
	streams *streamStore
	small   *smallStore
	roots   *rootStore

	// crowded is held across the storing of a chunk or a small file: by many at
	// once while the disk has room, by one alone while it is full.
	crowded sync.RWMutex

	// turn makes eviction one goroutine's work at a time. A fill that finds its
	// chunk being evicted waits for it. It is held across I/O.
	turn sync.Mutex

	waiting atomic.Int32 // calls of reserve that evict, or wait for their turn

	fullUntil atomic.Int64 // ns since 1970: the disk is full, and left alone
	evicted   atomic.Int64

	// torn are chunks whose absent blocks may take room on disk all the same: they
	// could not be written, or not be punched, or not be read.
	torn struct {
		sync.Mutex
		chunks map[chunkRef]struct{}
	}
}

// squeeze calls store, which puts n bytes on the disk. Where the disk is full it
// evicts, and calls store again while nothing else is stored: otherwise several
// would take what is freed, and none would have enough. It fails with ErrNoSpace
// where that does not help.
func (e *evictor) squeeze(n int64, store func() error) error {
	e.crowded.RLock()
	err := store()
	e.crowded.RUnlock()
	if diskFull(err) {
		err = e.storeAlone(n, store)
	}
	if diskFull(err) {
		err = fmt.Errorf("the disk of the cache is full: %w", ErrNoSpace)
	}
	return err
}

// storeAlone evicts more with each try: other programs may be quicker to take what
// is freed, and file systems that write nothing in place give an extent back only
// when all of it is free. Where that does not help the disk is left alone for a
// while, so that neither the cache nor time is wasted on it.
func (e *evictor) storeAlone(n int64, store func() error) (err error) {
	e.crowded.Lock()
	defer e.crowded.Unlock()
	err = unix.ENOSPC
	if time.Now().UnixNano() < e.fullUntil.Load() {
		return err
	}
	for try := 0; diskFull(err) && try < fullTries; try++ {
		if freed, _ := e.evict(n << try); freed == 0 {
			break
		}
		err = store()
	}
	if diskFull(err) {
		e.fullUntil.Store(time.Now().Add(fullFor).UnixNano())
	}
	return err
}

const (
	fullTries = 5
	fullFor   = time.Second
)

// reserve counts n bytes as used, evicting where the quota requires it. Callers that
// evict get their bytes in turn: while one waits, nobody takes what it frees.
func (e *evictor) reserve(n int64) error {
	if e.waiting.Load() == 0 && e.disk.take(n) {
		return nil
	}
	e.waiting.Add(1)
	defer e.waiting.Add(-1)
	e.turn.Lock()
	defer e.turn.Unlock()
	// Small files and maps take room, too, and do not wait.
	for range 16 {
		if e.disk.take(n) {
			return nil
		}
		if freed, err := e.evictInTurn(e.disk.lacks(n) + e.disk.quota/32); freed == 0 || err != nil {
			break // it would evict more and more, and free nothing
		}
	}
	if e.disk.take(n) {
		return nil
	}
	return fmt.Errorf("all %d bytes of the cache are in use: %w", e.disk.quota, ErrNoSpace)
}

// await returns when the eviction that is under way has ended.
func (e *evictor) await() {
	e.turn.Lock()
	e.turn.Unlock() //nolint:staticcheck // SA2001: the wait is all that is wanted
}

// tear notes a torn chunk.
func (e *evictor) tear(x chunkRef) {
	x.stream.files.unmeasured.Store(true)
	e.torn.Lock()
	defer e.torn.Unlock()
	if e.torn.chunks == nil {
		e.torn.chunks = make(map[chunkRef]struct{})
	}
	e.torn.chunks[x] = struct{}{}
}

func (e *evictor) takeTorn() map[chunkRef]struct{} {
	e.torn.Lock()
	defer e.torn.Unlock()
	torn := e.torn.chunks
	e.torn.chunks = nil
	return torn
}

// forget drops the torn chunks of a stream that was removed.
func (e *evictor) forget(s *Stream) {
	e.torn.Lock()
	defer e.torn.Unlock()
	for x := range e.torn.chunks {
		if x.stream == s {
			delete(e.torn.chunks, x)
		}
	}
}

// measure corrects what is counted as used by what the streams take on disk, and
// evicts where that is over the quota.
func (e *evictor) measure() {
	e.turn.Lock()
	for _, s := range e.streams.all() {
		s.measure()
	}
	e.turn.Unlock()
	_, _ = e.evict(0) // the next fill meets the failure
}

// evict frees at least atLeast bytes, and what is over the quota together with a
// reserve, so that not every fill has to evict; and the space of torn chunks. It
// returns the bytes freed, for torn chunks an upper bound, and why some could not
// be freed.
func (e *evictor) evict(atLeast int64) (freed int64, err error) {
	e.turn.Lock()
	defer e.turn.Unlock()
	want := atLeast
	if over := e.disk.over(); over > 0 {
		want = max(want, over+e.disk.quota/32)
	}
	if want == 0 {
		return 0, nil
	}
	return e.evictInTurn(want)
}

// evictInTurn is evict for a caller that holds e.turn, and frees want bytes.
func (e *evictor) evictInTurn(want int64) (freed int64, err error) {
	freed, err = e.evictChunks(want)
	freed += e.streams.removeEmpty()
	if freed < want {
		freed += e.evictSmall(want - freed)
	}
	return freed, err
}

// evictSmall frees about n bytes of small files.
func (e *evictor) evictSmall(n int64) (freed int64) {
	for {
		freed += e.small.evict(n-freed, e.roots.holdsFile)
		if freed >= n {
			return freed
		}
		image, ok := e.roots.coldest(e.streams.idInUse)
		if !ok {
			return freed
		}
		// What only this root held can go in the next round.
		n, err := e.roots.remove(image)
		if err != nil {
			e.disk.log.Warn("cannot evict the root of an image", "image", image.String(), "err", err)
		}
		freed += n
	}
}

// coldest lists the chunks that may be evicted, the first to go first.
func (e *evictor) coldest() []chunkRef {
	type candidate struct {
		chunkRef
		rooted bool
		age    uint32
	}
	var all []candidate
	now := e.streams.clock.now()
	for _, s := range e.streams.all() {
		rooted := e.roots.holdsStream(s.id)
		for i := range s.table.Chunks {
			if c := &s.table.Chunks[i]; s.res.any(c.Block, c.Count) {
				all = append(all, candidate{chunkRef{s, i}, rooted, now - timeOf(s.used[i].Load())})
			}
		}
	}
	slices.SortFunc(all, func(a, b candidate) int {
		if a.rooted != b.rooted {
			if b.rooted {
				return -1
			}
			return 1
		}
		return cmp.Compare(b.age, a.age)
	})
	cold := make([]chunkRef, len(all))
	for i := range all {
		cold[i] = all[i].chunkRef
	}
	return cold
}

// eviction is one call of evictChunks.
type eviction struct {
	e      *evictor
	going  []chunkRef        // taken; their absent blocks are to be punched
	failed map[*Stream]error // of the streams touched
	bytes  int64             // that were resident
}

// evictChunks frees about want bytes of chunks, and the space of torn ones.
// e.turn is held.
func (e *evictor) evictChunks(want int64) (freed int64, err error) {
	v := &eviction{e: e, failed: make(map[*Stream]error)}
	for x := range e.takeTorn() {
		switch {
		case !v.begin(x):
			e.tear(x) // it is being filled or viewed
		case x.stream.has(x.chunk):
			x.stream.pins.endEvict(x.chunk)
		default:
			v.going = append(v.going, x) // what is resident of it stays
		}
	}
	if v.bytes < want {
		for _, x := range e.coldest() {
			if v.bytes >= want {
				break
			}
			if v.begin(x) {
				v.clear(x)
			}
		}
	}
	v.flush()
	freed, err = v.punch()
	e.disk.used.Add(-v.bytes)
	e.evicted.Add(v.bytes)
	for s := range v.failed {
		s.measure()
	}
	return freed, err
}

// begin takes a chunk for the evictor, and opens the files that it is in.
func (v *eviction) begin(x chunkRef) bool {
	if v.failed[x.stream] != nil || !x.stream.pins.beginEvict(x.chunk) {
		return false
	}
	if err := x.stream.open(); err != nil {
		x.stream.pins.endEvict(x.chunk)
		v.e.disk.log.Warn("cannot evict", "stream", x.stream.id.String(), "err", err)
		v.failed[x.stream] = err
		return false
	}
	v.failed[x.stream] = nil
	return true
}

func (v *eviction) clear(x chunkRef) {
	c := &x.stream.table.Chunks[x.chunk]
	v.bytes += int64(x.stream.res.clear(c.Block, c.Count)) * BlockSize
	v.going = append(v.going, x)
}

// flush makes the maps durable before the holes are punched: no bit may say
// "resident" of a block whose data is gone, not even after a power cut.
func (v *eviction) flush() {
	for s, err := range v.failed {
		if err != nil {
			continue
		}
		if err := s.res.flush(); err != nil {
			v.e.disk.log.Error("cannot evict: the map could not be written, so the data stays", "stream", s.id.String(), "err", err)
			v.failed[s] = err
		}
	}
}

// punch gives the space back. It returns how many bytes that were, and the first
// failure.
func (v *eviction) punch() (freed int64, first error) {
	for _, x := range v.going {
		c := &x.stream.table.Chunks[x.chunk]
		err := v.failed[x.stream]
		// A file that was given up meanwhile is gone from the disk.
		n := int64(c.Size())
		if f := x.stream.files.current.Load(); err == nil && f != nil {
			if n, err = x.stream.punchAbsent(f, c.Block, c.Count); err != nil {
				v.e.disk.log.Error("cannot evict: the data could not be punched, so it stays", "stream", x.stream.id.String(), "err", err)
			}
		}
		x.stream.files.unmeasured.Store(true)
		if err != nil {
			v.e.tear(x)
			first = cmp.Or(first, err)
		}
		freed += n
		x.stream.pins.endEvict(x.chunk)
	}
	return freed, first
}
