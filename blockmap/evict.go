package blockmap

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// squeeze calls store, which puts n bytes on the disk. Where the disk is full it
// is called again while nothing else is stored, after others have been evicted: or
// else several would take what is freed, and none have enough. It fails with
// ErrNoSpace where that does not help.
func (c *Cache) squeeze(n int64, store func() error) error {
	c.crowded.RLock()
	err := store()
	c.crowded.RUnlock()
	if diskFull(err) {
		err = c.storeAlone(n, store)
	}
	if diskFull(err) {
		err = fmt.Errorf("the disk of the cache is full: %w", ErrNoSpace)
	}
	return err
}

// storeAlone evicts more with each try: other programs may be quicker to take what is
// freed, and file systems that write nothing in place give an extent back only
// when all of it has gone. Where that does not help either, the disk is left alone
// for a while, so that neither the cache nor time is wasted on it.
func (c *Cache) storeAlone(n int64, store func() error) (err error) {
	c.crowded.Lock()
	defer c.crowded.Unlock()
	err = unix.ENOSPC
	if time.Now().UnixNano() < c.fullUntil.Load() {
		return err
	}
	for try := 0; diskFull(err) && try < fullTries && c.evict(n<<try) > 0; try++ {
		err = store()
	}
	if diskFull(err) {
		c.fullUntil.Store(time.Now().Add(fullFor).UnixNano())
	}
	return err
}

const (
	fullTries = 5
	fullFor   = time.Second
)

// reserve makes room for n bytes, evicting where the quota needs it.
func (c *Cache) reserve(n int64) error {
	if c.used.Add(n) <= c.quota || c.quota == 0 {
		return nil
	}
	// What is freed may be another's by the time that it is counted.
	for range 16 {
		c.evict(0)
		if c.used.Load() <= c.quota {
			return nil
		}
	}
	c.used.Add(-n)
	return fmt.Errorf("the cache's %d bytes are all in use: %w", c.quota, ErrNoSpace)
}

func (c *Cache) unreserve(n int64) { c.used.Add(-n) }

// awaitEviction returns when the eviction that is under way has ended.
func (c *Cache) awaitEviction() {
	c.evictor.Lock()
	//lint:ignore SA2001 the wait is all that is wanted
	c.evictor.Unlock()
}

// tear notes that a chunk is not here and may take room on the disk all the same,
// since it could not be written to its end, or not be punched: its blocks go
// when the room is needed.
func (c *Cache) tear(h holder) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.torn[h] = struct{}{}
}

func (c *Cache) takeTorn() map[holder]struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	torn := c.mu.torn
	c.mu.torn = make(map[holder]struct{})
	return torn
}

// evict frees at least atLeast bytes and what lies over the quota, in one go
// with a reserve, so that not every fill has to; and what torn chunks take. It
// returns the bytes freed, of torn chunks the most that it may be.
func (c *Cache) evict(atLeast int64) (freed int64) {
	c.evictor.Lock()
	defer c.evictor.Unlock()
	want := atLeast
	if c.quota > 0 {
		if over := c.used.Load() - c.quota; over > 0 {
			want = max(want, over+c.quota/32)
		}
	}
	if want == 0 {
		return 0
	}
	freed = c.evictChunks(want)
	freed += c.removeEmpty()
	if freed < want {
		freed += c.small.evict(want - freed)
	}
	return freed
}

// evictChunks frees about want bytes: the chunks that were not used for the
// longest time. c.evictor is held.
func (c *Cache) evictChunks(want int64) (freed int64) {
	type candidate struct {
		holder
		age uint32
	}
	var cold []candidate
	tick := c.tick.Load()
	for _, s := range c.all() {
		for i := range s.table.Chunks {
			if s.has(i) {
				cold = append(cold, candidate{holder{s, i}, tick - s.used[i].Load()})
			}
		}
	}
	slices.SortFunc(cold, func(a, b candidate) int { return cmp.Compare(b.age, a.age) })
	var going []holder
	failed := make(map[*Stream]error) // of the streams touched
	var n int64
	unmark := func(x holder) {
		t := &x.stream.table.Chunks[x.chunk]
		n += int64(x.stream.res.clear(t.Block, t.Count)) * BlockSize
		going = append(going, x)
	}
	// begin has a chunk pinned for the evictor, and the files that it is in open.
	begin := func(x holder) bool {
		if failed[x.stream] != nil || !x.stream.pins[x.chunk].CompareAndSwap(0, evicting) {
			return false
		}
		if err := x.stream.open(); err != nil {
			x.stream.pins[x.chunk].Add(-evicting)
			c.log.Warn("cannot evict", "stream", x.stream.id.String(), "err", err)
			failed[x.stream] = err
			return false
		}
		failed[x.stream] = nil
		return true
	}
	for x := range c.takeTorn() {
		switch {
		case !begin(x):
			c.tear(x) // somebody tries again, or looks
		case x.stream.has(x.chunk):
			x.stream.pins[x.chunk].Add(-evicting)
		default:
			unmark(x)
		}
	}
	for _, x := range cold {
		if n >= want {
			break
		}
		if begin(x.holder) {
			unmark(x.holder)
		}
	}
	// No bit may say "here" of a block whose data has gone, not even after a
	// power cut: the maps reach the disk before the holes are punched.
	for s, err := range failed {
		if err == nil {
			if err = s.res.flush(); err != nil {
				c.log.Error("cannot evict: the map could not be written, and the data stays", "stream", s.id.String(), "err", err)
			}
			failed[s] = err
		}
	}
	for _, x := range going {
		t := &x.stream.table.Chunks[x.chunk]
		err := failed[x.stream]
		if err == nil {
			// Files that were given up meanwhile have gone from the disk.
			if f := x.stream.files.Load(); f != nil {
				err = f.data.PunchHole(int64(t.Block)*BlockSize, int64(t.Size()))
			}
			if err != nil {
				c.log.Error("cannot evict", "stream", x.stream.id.String(), "err", err)
			}
		}
		if err != nil {
			c.tear(x)
		} else {
			freed += int64(t.Size())
		}
		x.stream.pins[x.chunk].Add(-evicting)
	}
	c.used.Add(-n)
	c.evicted.Add(n)
	return freed
}

// removeEmpty takes streams that no image has, and of which nothing is here, off
// the disk, and returns the bytes that their tables and maps took.
func (c *Cache) removeEmpty() (freed int64) {
	for _, s := range c.all() {
		if s.res.count() > 0 {
			continue
		}
		// Under the lock that images open streams under: none gets one that goes.
		c.opening.Lock()
		c.mu.RLock()
		users := s.users
		c.mu.RUnlock()
		var removed bool
		var err error
		n := s.onDisk.Load()
		if users == 0 {
			if removed, err = s.remove(); removed {
				c.forget(s)
				freed += n
			}
		}
		c.opening.Unlock()
		if err != nil {
			c.log.Warn("cannot remove an empty stream", "stream", s.id.String(), "err", err)
		}
	}
	return freed
}

// closeIdle closes the files of streams that no image has or, where there are too
// many open or hard is set, of those that were not used for the longest time.
func (c *Cache) closeIdle(hard bool) {
	type idle struct {
		s   *Stream
		age uint32
	}
	var rest []idle
	tick := c.tick.Load()
	for _, s := range c.all() {
		if err := s.closeRetired(); err != nil {
			c.log.Warn("close", "stream", s.id.String(), "err", err)
		}
		if s.files.Load() == nil {
			continue
		}
		c.mu.RLock()
		users := s.users
		c.mu.RUnlock()
		if users > 0 {
			rest = append(rest, idle{s, tick - s.lastUse.Load()})
		} else if _, err := s.tryClose(); err != nil {
			c.log.Warn("close", "stream", s.id.String(), "err", err)
		}
	}
	if !hard {
		return
	}
	slices.SortFunc(rest, func(a, b idle) int { return cmp.Compare(b.age, a.age) })
	for n := len(rest)/8 + 1; n > 0 && len(rest) > 0; rest = rest[1:] {
		s := rest[0].s
		err := s.sync() // or it cannot be closed
		closed, closeErr := s.tryClose()
		if err = errors.Join(err, closeErr); err != nil {
			c.log.Warn("close", "stream", s.id.String(), "err", err)
		}
		if closed {
			n--
		}
	}
}
