package blockmap

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// ErrDigest is what Fill returns for bytes that are not the content of the chunk.
var ErrDigest = errors.New("the content does not match its digest")

// Stream is one stream in a Cache: a sparse file of its uncompressed bytes, and
// the residency that says which of them are on disk. The file is opened and
// mapped when it is first used, and closed when no image uses it; the residency
// stays in memory. All methods may be called at once.
type Stream struct {
	id    Digest
	table *Table
	store *streamStore
	res   *residency
	pins  pins
	files streamFiles
	bad   unreadable

	// used is the clock at the last use of each chunk, lastUse at that of any.
	used    []atomic.Uint32
	lastUse atomic.Uint32

	// What the stream takes of the quota besides its resident blocks, in bytes.
	fixed atomic.Int64 // table, map and directory; 0 if there is no directory
	extra atomic.Int64 // of the data file: the guard, and what measure found

	users int // images that have the stream; guarded by store.mu
}

func (st *streamStore) newStream(id Digest, t *Table) *Stream {
	return &Stream{
		id: id, table: t, store: st, res: newResidency(id, t.Blocks()),
		pins: make(pins, len(t.Chunks)), used: make([]atomic.Uint32, len(t.Chunks)),
	}
}

// ID names the stream by its content.
func (s *Stream) ID() Digest { return s.id }

// Resident is the number of bytes that are on disk.
func (s *Stream) Resident() int64 { return s.res.count() * BlockSize }

// Has says whether chunk i can be viewed as a whole: it is on disk, or held in memory.
func (s *Stream) Has(i int) bool {
	return s.has(i) && s.usable() || s.store.held.any() && s.HasLeaves(i, s.table.Chunks[i].All())
}

// Viewed says whether chunk i has been viewed since this process filled it.
func (s *Stream) Viewed(i int) bool { return isView(s.used[i].Load()) }

// has says whether chunk i is on disk.
func (s *Stream) has(i int) bool {
	c := &s.table.Chunks[i]
	return s.res.has(c.Block, c.Count)
}

func (s *Stream) fail(err error) error { return fmt.Errorf("cached stream %.12s: %w", s.id, err) }

// Unpin implements Pinner: the token holds the first and the last chunk of a
// view's segment.
func (s *Stream) Unpin(token uint64) {
	for i := uint32(token >> 32); i <= uint32(token); i++ {
		s.pins.unpin(int(i))
	}
}

// Pinned implements Pinner.
func (s *Stream) Pinned(token uint64) (n int64) {
	for i := uint32(token >> 32); i <= uint32(token); i++ {
		n += int64(s.table.Chunks[i].Size())
	}
	return n
}

// Damaged implements Pinner. Chunks that other views show are not punched: their
// space is given back when they are filled again, or when room is needed.
func (s *Stream) Damaged(token uint64) {
	if f := s.files.current.Load(); f == nil || !f.intact() {
		return // the next reader gives up the whole file
	}
	s.store.memory.doubt()
	for i := uint32(token >> 32); i <= uint32(token); i++ {
		if s.lose(int(i)) > 0 {
			s.store.disk.damaged.Add(1)
			s.store.disk.log.Warn("a cached chunk cannot be read; it will be fetched again", "stream", s.id.String(), "chunk", i)
		}
	}
}

// unread implements diskPinner.
func (s *Stream) unread(token uint64) {
	now := time.Now()
	for i := uint32(token >> 32); i <= uint32(token); i++ {
		if s.has(int(i)) { // the first of those who found out
			s.bad.add(int(i), now)
		}
	}
	s.Damaged(token)
}

// lose makes chunk i absent, and returns how many bytes of it were resident.
func (s *Stream) lose(i int) int64 {
	c := &s.table.Chunks[i]
	n := int64(s.res.clear(c.Block, c.Count)) * BlockSize
	s.store.disk.used.Add(-n)
	if n > 0 {
		s.store.evictor.tear(chunkRef{s, i})
	}
	return n
}

func (s *Stream) touch(i int, use uint32) {
	if s.used[i].Load() != use {
		s.used[i].Store(use)
		s.lastUse.Store(timeOf(use))
	}
}

// view appends n bytes from off to v, or returns false if some of them are not resident
// or not in memory. v may have got a part of them then.
func (s *Stream) view(v *View, off, n int64) bool {
	return s.viewDisk(v, off, n) || s.store.held.any() &&
		s.mixed(v, off, n, func(off, n int64) bool { return s.viewDisk(v, off, n) })
}

// viewDisk is view for what is in the data file.
func (s *Stream) viewDisk(v *View, off, n int64) bool {
	f, token := s.pin(off, n)
	if f == nil {
		return false
	}
	if !s.store.memory.has(f, off, n) {
		s.Unpin(token)
		return false
	}
	v.Append(f.bytes(off, n), s, token)
	return true
}

// addTo adds n bytes from off to l, or returns false if some of them are not resident. l
// may have got a part of them then. It is view for a caller that may wait for the disk:
// what is not in memory is read to a buffer. To read the mapping would make the caller's
// thread wait, page after page.
func (s *Stream) addTo(l *load, off, n int64) bool {
	disk := func(off, n int64) bool {
		f, token := s.pin(off, n)
		switch {
		case f == nil:
			return false
		case s.store.memory.trusted(f):
			l.view.Append(f.bytes(off, n), s, token)
		default:
			l.read(&s.store.reads, s, f, token, off, n)
		}
		return true
	}
	return disk(off, n) || s.store.held.any() && s.mixed(&l.view, off, n, disk)
}

// pin pins the chunks of n bytes from off, and returns the file that they are in and the
// token that unpins them. f is nil, and nothing is pinned, if not all of the bytes are on
// disk, or the file is not open.
func (s *Stream) pin(off, n int64) (f *dataFile, token uint64) {
	b := uint32(off / BlockSize)
	last := uint32((off + n - 1) / BlockSize)
	first := s.table.Find(b)
	i := first
	// The pin comes first: once it holds, a bit that is set stays set, and
	// files that are open stay open.
	now := s.store.clock.now()
	for ; ; i++ {
		if !s.pins.pin(i) {
			i--
			break
		}
		s.touch(i, now)
		if c := &s.table.Chunks[i]; c.Block+c.Count > last {
			f := s.files.current.Load()
			if f == nil || !s.res.has(b, last-b+1) || !f.intact() {
				break
			}
			return f, uint64(first)<<32 | uint64(i)
		}
	}
	for ; i >= first; i-- {
		s.pins.unpin(i)
	}
	return nil, 0
}

// mixed is view or read where some of the leaves are in memory only. disk is the part of
// it that serves the others.
func (s *Stream) mixed(v *View, off, n int64, disk func(off, n int64) bool) bool {
	for n > 0 {
		i := s.table.Find(uint32(off / BlockSize))
		c := &s.table.Chunks[i]
		skip := off - int64(c.Block)*BlockSize
		m := min(int64(c.Size())-skip, n)
		if !s.store.held.has(chunkRef{s, i}, c.All()) {
			// The chunk may be on disk in part, and in memory in part.
			m = min(LeafSize-skip%LeafSize, m)
		}
		first, last := uint32(off/BlockSize), uint32((off+m-1)/BlockSize)
		if p := s.store.held.get(chunkRef{s, i}, c.leavesOf(first, last)); p != nil {
			v.Append(p[skip:skip+m:skip+m], nil, 0)
		} else if !disk(off, m) {
			return false
		}
		off, n = off+m, n-m
	}
	return true
}

// check says whether p is the content of chunk i.
func (s *Stream) check(i int, p []byte) error {
	if err := s.table.Chunks[i].Verify(p); err != nil {
		return fmt.Errorf("chunk %d of stream %.12s: %w", i, s.id, err)
	}
	return nil
}

// Fill verifies that p is the content of chunk i, and stores what is absent of it.
// Nothing gets into the cache but by Fill, FillArrived and FillLeaves. Fill fails with ErrDigest
// where p is something else, and with ErrNoSpace where neither the disk nor the quota
// has room; what was absent may be so in part then. It also fails for a chunk that the
// disk has taken before and could not read back.
func (s *Stream) Fill(i int, p []byte) error {
	if err := s.check(i, p); err != nil {
		return err
	}
	return s.fill(i, s.table.Chunks[i].Block, p)
}

// FillArrived is Fill for a content that was verified as far as possible while it arrived.
func (s *Stream) FillArrived(i int, a *Arriving) error {
	if err := s.checkArrived(i, a); err != nil {
		return err
	}
	return s.fill(i, s.table.Chunks[i].Block, a.Content)
}

func (s *Stream) checkArrived(i int, a *Arriving) error {
	if err := a.Verify(&s.table.Chunks[i]); err != nil {
		return fmt.Errorf("chunk %d of stream %.12s: %w", i, s.id, err)
	}
	return nil
}

// fill stores what is absent of p, which is verified: blocks of chunk i from block b of
// the stream on.
func (s *Stream) fill(i int, b uint32, p []byte) error {
	err := ErrDamaged
	// The bound is for a file that another program cuts short again and again.
	for try := 0; errors.Is(err, ErrDamaged) && try < 8; try++ {
		err = s.store.evictor.squeeze(int64(len(p)), func() error { return s.put(i, b, p) })
	}
	if err != nil {
		return fmt.Errorf("store chunk %d of stream %.12s: %w", i, s.id, err)
	}
	s.store.held.dropStored(chunkRef{s, i})
	return nil
}

// Hold verifies that p is the content of chunk i, and keeps it in memory: for
// chunks that a reader waits for and that Fill cannot store. Views show it as
// if it was on disk. The memory is bounded; the first chunk that came is the
// first to go.
func (s *Stream) Hold(i int, p []byte) error {
	if err := s.check(i, p); err != nil {
		return err
	}
	s.store.held.put(chunkRef{s, i}, 0, p)
	return nil
}

// HoldArrived is Hold for a content that was verified while it arrived.
func (s *Stream) HoldArrived(i int, a *Arriving) error {
	if err := s.checkArrived(i, a); err != nil {
		return err
	}
	s.store.held.put(chunkRef{s, i}, 0, a.Content)
	return nil
}

// put writes what is absent of p, and marks it resident then.
func (s *Stream) put(i int, b uint32, p []byte) error {
	for !s.pins.pin(i) {
		s.store.evictor.await()
	}
	defer s.pins.unpin(i)
	if err := s.prepare(); err != nil {
		return err
	}
	if err := s.open(); err != nil {
		return err
	}
	n := int64(s.res.absent(b, uint32(len(p)/BlockSize))) * BlockSize
	if n == 0 {
		return nil
	}
	if s.bad.has(i, time.Now()) {
		return errUnreadable
	}
	f := s.files.current.Load()
	if f == nil {
		return s.fail(ErrDamaged)
	}
	if err := s.store.evictor.reserve(n); err != nil {
		return err
	}
	if c := &s.table.Chunks[i]; !s.res.any(c.Block, c.Count) {
		s.touch(i, s.store.clock.fill()) // before any view of it
	}
	added, err := s.writeTo(f, i, b, p)
	s.store.disk.used.Add(added - n)
	if err != nil {
		return err
	}
	s.files.dirty.Store(true)
	s.store.clock.filled()
	return nil
}

// writeTo writes what is absent of p to f and marks it resident, unless another file
// has come in f's place. Views may show what is resident, so it is not written again. It
// returns how many bytes became resident.
func (s *Stream) writeTo(f *dataFile, i int, b uint32, p []byte) (added int64, err error) {
	s.files.marking.RLock()
	defer s.files.marking.RUnlock()
	if s.files.current.Load() != f {
		return 0, s.fail(ErrDamaged)
	}
	for len(p) > 0 {
		n, resident := s.res.run(b, uint32(len(p)/BlockSize))
		if !resident {
			if err := f.write(p[:int(n)*BlockSize], int64(b)*BlockSize); err != nil {
				s.store.evictor.tear(chunkRef{s, i})
				return added, err
			}
			s.files.unmeasured.Store(true)
			added += int64(s.res.set(b, n)) * BlockSize
		}
		b, p = b+n, p[int(n)*BlockSize:]
	}
	return added, nil
}

// FillLocal fills chunk i with a copy from another place of the cache that has all of
// the same content, and says whether it could.
func (s *Stream) FillLocal(i int) bool {
	c := &s.table.Chunks[i]
	for _, x := range s.store.holders(c.Digest) {
		o := &x.stream.table.Chunks[x.chunk]
		if x.stream == s && x.chunk == i || o.Count != c.Count || !x.stream.Has(x.chunk) {
			continue
		}
		if p := make([]byte, o.Size()); x.stream.ReadChunk(x.chunk, p) && s.Fill(i, p) == nil {
			return true
		}
	}
	return false
}
