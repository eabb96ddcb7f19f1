package blockmap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"
)

// ErrDigest is what Fill says of bytes that are not the chunk they are said to
// be.
var ErrDigest = errors.New("the content does not match its digest")

// Stream is one stream in a Cache: a sparse file of its uncompressed bytes, and
// the residency that says which of them are here. The file is opened and mapped
// when it is first used, and closed when nobody uses it; the residency stays in
// memory. All methods may be called at once.
type Stream struct {
	id    Digest
	table *Table
	cache *Cache
	res   *residency

	// pins counts, chunk by chunk, the views and fills that need it to stay.
	// The evictor adds evicting to a count of zero, so that whoever comes
	// next sees a negative number and leaves.
	pins []atomic.Int32
	// used is the cache's tick at the last use of each chunk.
	used []atomic.Uint32
	// lastUse is the cache's tick at the last use of any.
	lastUse atomic.Uint32

	// files is nil while they are closed. Who has pinned a chunk and then
	// finds files has them until the pin is gone: closing takes files away
	// first, and looks at the pins then.
	files   atomic.Pointer[streamFiles]
	opening sync.Mutex     // held across opening, syncing and closing
	gone    bool           // the stream is no longer one of the cache; guarded by opening
	retired []*streamFiles // files that were damaged, and views may still point to; guarded by opening
	// storing is held to say that a chunk is here, which is said of the files
	// that it was written to: others may have come in their place.
	storing sync.RWMutex
	broken  atomic.Int64
	onDisk  atomic.Int64 // bytes of table and map, counted as used

	dirty atomic.Bool // blocks were set since the last sync

	users int // images that have it; guarded by the cache's mu
}

// streamFiles are the open files of a stream.
type streamFiles struct {
	data File
	id   FileID    // of data
	m    mmap.MMap // the stream and the guard
}

// Behind the content of a stream its file has one more block, the guard, filled
// with guardWord. While the end of it is there nobody has cut the file short, nor
// cut it and made it longer again: then some blocks would fault, and others
// silently read as zeros.
const (
	guardSize = BlockSize
	guardWord = 0x6472_6175_6777_6174 // "tawguard", read as little-endian
)

// guard is the content of the guard.
func guard() []byte {
	b := make([]byte, 0, guardSize)
	for range guardSize / 8 {
		b = binary.LittleEndian.AppendUint64(b, guardWord)
	}
	return b
}

// intact says whether the file is still what it was. It costs a load.
func (f *streamFiles) intact() (ok bool) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if recover() != nil {
			ok = false
		}
	}()
	return binary.LittleEndian.Uint64(f.m[len(f.m)-8:]) == guardWord
}

const evicting = math.MinInt32 / 2

// Within the directory of a stream.
const (
	dataName  = "data"
	mapName   = "map"
	tableName = "table"
)

// brokenFor is how long a stream whose files could not be opened is left alone:
// its chunks are held in memory meanwhile.
const brokenFor = time.Second

func (c *Cache) newStream(id Digest, t *Table) *Stream {
	return &Stream{
		id: id, table: t, cache: c, res: newResidency(id, t.Blocks()),
		pins: make([]atomic.Int32, len(t.Chunks)), used: make([]atomic.Uint32, len(t.Chunks)),
	}
}

func (s *Stream) dir() string             { return filepath.Join(s.cache.dir, "streams", s.id.String()) }
func (s *Stream) path(name string) string { return filepath.Join(s.dir(), name) }
func (s *Stream) size() int64             { return int64(s.table.Blocks()) * BlockSize }
func (s *Stream) fail(err error) error    { return fmt.Errorf("cached stream %.12s: %w", s.id, err) }
func (s *Stream) fileSize() int64         { return s.size() + guardSize }
func (s *Stream) metadataSize(n int) int64 {
	return int64(n) + residencySize(s.table.Blocks()) + guardSize
}

// load reads what an earlier process left of the stream, or says what is wrong
// with it.
func (s *Stream) load() error {
	c := s.cache
	data, err := c.fs.Open(s.path(dataName), false)
	if err != nil {
		return err
	}
	defer data.Close()
	size, allocated, err := data.Stat()
	if err != nil {
		return err
	}
	if size != s.fileSize() {
		return fmt.Errorf("the data has %d bytes instead of %d", size, s.fileSize())
	}
	var end [8]byte
	if _, err := data.ReadAt(end[:], size-8); err != nil || binary.LittleEndian.Uint64(end[:]) != guardWord {
		return errors.Join(errors.New("the data was cut short"), err)
	}
	id, err := data.Identity()
	if err != nil {
		return err
	}
	if err := s.res.load(c.fs, s.path(mapName), c.boot, id); err != nil {
		return err
	}
	if here := s.res.count() * BlockSize; allocated > here+here/8+1<<20 {
		// A process was killed between writing and marking, or between
		// unmarking and punching; or the machine was rebooted.
		return s.punchAbsent()
	}
	return nil
}

// punchAbsent gives back the space of all blocks that are not here. As with
// any eviction, the map that says so is made durable first.
func (s *Stream) punchAbsent() error {
	if err := s.open(); err != nil {
		return err
	}
	if err := s.res.flush(); err != nil {
		return err
	}
	blocks := s.table.Blocks()
	for b := uint32(0); b < blocks; {
		n, here := s.res.run(b, blocks-b)
		if !here {
			if err := s.files.Load().data.PunchHole(int64(b)*BlockSize, int64(n)*BlockSize); err != nil {
				return err
			}
		}
		b += n
	}
	return nil
}

// open opens the files, and makes those that are not there.
func (s *Stream) open() error {
	if s.files.Load() != nil {
		return nil
	}
	err := s.tryOpen()
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) {
		s.cache.closeIdle(true)
		err = s.tryOpen()
	}
	if err != nil {
		s.broken.Store(time.Now().Add(brokenFor).UnixNano())
		return s.fail(fmt.Errorf("open: %w", err))
	}
	s.broken.Store(0)
	if s.cache.open.Load() > s.cache.openLimit {
		s.cache.closeIdle(true)
	}
	return nil
}

// prepare makes what is here ready to be viewed: the files are open, and are what
// they were.
func (s *Stream) prepare() error {
	f := s.files.Load()
	switch {
	case f == nil && s.onDisk.Load() == 0:
		return nil // nothing is here
	case f != nil && f.intact():
		return nil
	case f != nil:
		if err := s.abandon(f); err != nil {
			return s.fail(err)
		}
	}
	return s.open()
}

func (s *Stream) tryOpen() error {
	s.opening.Lock()
	defer s.opening.Unlock()
	switch {
	case s.files.Load() != nil:
		return nil
	case s.gone:
		return ErrClosed
	}
	if err := s.openFiles(); err != nil {
		return err
	}
	s.cache.open.Add(1)
	return nil
}

// errReplaced says that the files of a stream are not those that it left.
var errReplaced = errors.New("the data was cut short or replaced")

// notOurs says whether err means that in the place of a stream's files there is
// something else, or nothing: a disk that is full or read-only is not that.
func notOurs(err error) bool {
	for _, e := range []error{errReplaced, fs.ErrNotExist, unix.EISDIR, unix.ENOTDIR, unix.ELOOP, unix.ENXIO, unix.EINVAL, unix.ESPIPE} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// openFiles does the work of open. s.opening is held.
func (s *Stream) openFiles() error {
	if s.onDisk.Load() == 0 {
		if err := s.makeDir(); err != nil {
			return err
		}
	}
	err := s.openThem()
	if !notOurs(err) {
		return err
	}
	// All of it is made anew, the data too: a map that survives a power cut is
	// not believed of another file.
	if n := s.forgetAll(); n > 0 {
		s.cache.drop(s.id.String(), err)
	}
	if err := errors.Join(s.cache.fs.RemoveAll(s.dir()), s.makeDir()); err != nil {
		return err
	}
	return s.openThem()
}

// makeDir makes the directory of the stream.
func (s *Stream) makeDir() error {
	c := s.cache
	if err := c.fs.MkdirAll(s.dir()); err != nil {
		return err
	}
	// The table goes first: a directory without one is no stream.
	table := s.table.Append(nil)
	if err := c.put(s.path(tableName), table); err != nil {
		return err
	}
	n := s.metadataSize(len(table))
	c.used.Add(n - s.onDisk.Swap(n))
	return nil
}

// openThem opens data and map, and makes those that were never there. It fails
// with errReplaced where the data is not in the file that it was put into.
func (s *Stream) openThem() (err error) {
	c, f := s.cache, new(streamFiles)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.closeFiles(f))
		}
	}()
	was, known := s.res.identity()
	if f.data, err = c.fs.Open(s.path(dataName), !known); err != nil {
		return err
	}
	size, _, err := f.data.Stat()
	if err != nil {
		return err
	}
	if f.id, err = f.data.Identity(); err != nil {
		return err
	}
	if known && (!was.sameFile(f.id) || size != s.fileSize()) {
		return errReplaced
	}
	if size == s.fileSize() {
		if f.m, err = f.data.Map(size); err != nil {
			return err
		}
		if !f.intact() {
			if known {
				return errReplaced
			}
			size = 0
		}
	}
	if size != s.fileSize() {
		if f.m != nil {
			err = f.m.Unmap()
			f.m = nil
		}
		// From zero length: what lies there is not known to be anything.
		if err = errors.Join(err, f.data.Truncate(0), f.data.Truncate(s.fileSize())); err != nil {
			return err
		}
		if _, err := f.data.WriteAt(guard(), s.size()); err != nil {
			return err
		}
		if f.m, err = f.data.Map(s.fileSize()); err != nil {
			return err
		}
	}
	if err := s.res.attach(c.fs, s.path(mapName), c.boot, f.id); err != nil {
		return err
	}
	s.files.Store(f)
	return nil
}

// forgetAll has nothing here any more, whatever file it was in, and returns how
// many bytes were.
func (s *Stream) forgetAll() int64 {
	n := int64(s.res.clear(0, s.table.Blocks())) * BlockSize
	s.res.forgetIdentity()
	s.cache.used.Add(-n)
	return n
}

func (s *Stream) closeFiles(f *streamFiles) error {
	errs := []error{s.res.detach()}
	if f.m != nil {
		errs = append(errs, f.m.Unmap())
	}
	if f.data != nil {
		errs = append(errs, f.data.Close())
	}
	return errors.Join(errs...)
}

// tryClose closes the files unless somebody uses them, or what is in them is not
// durable yet: the kernel reports what it could not write to who has them open.
func (s *Stream) tryClose() (closed bool, err error) {
	if s.files.Load() == nil || s.dirty.Load() || !s.opening.TryLock() {
		return false, nil
	}
	defer s.opening.Unlock()
	return s.take()
}

// take takes the files from whoever may come, and closes them unless somebody has
// them. s.opening is held.
func (s *Stream) take() (closed bool, err error) {
	f := s.files.Swap(nil)
	// Who comes from here on finds no files. Who has come has a pin.
	for i := range s.pins {
		if s.pins[i].Load() != 0 {
			s.files.Store(f)
			return false, nil
		}
	}
	if f == nil {
		return true, nil
	}
	s.cache.open.Add(-1)
	return true, s.closeFiles(f)
}

// abandon gives up files that somebody has cut short, with all that is in them.
// They are not made whole: what views of them have lost must go on to fault, and
// not read as zeros. New files take their place.
func (s *Stream) abandon(f *streamFiles) error {
	s.opening.Lock()
	defer s.opening.Unlock()
	if s.files.Load() != f {
		return nil
	}
	s.storing.Lock()
	s.files.Store(nil)
	n := s.forgetAll()
	s.storing.Unlock()
	s.cache.open.Add(-1)
	s.cache.damaged.Add(1)
	s.cache.log.Warn("a file of the cache was cut short; what was in it is fetched again", "stream", s.id.String(), "bytes", n)
	s.retired = append(s.retired, f)
	return errors.Join(s.res.detach(), s.cache.fs.RemoveAll(s.path(mapName)), s.cache.fs.RemoveAll(s.path(dataName)))
}

// closeRetired closes files that were given up, once nobody looks at them.
func (s *Stream) closeRetired() (err error) {
	s.opening.Lock()
	defer s.opening.Unlock()
	for i := range s.pins {
		if len(s.retired) == 0 || s.pins[i].Load() != 0 {
			return nil
		}
	}
	return s.dropRetired()
}

// dropRetired does the work of closeRetired.
func (s *Stream) dropRetired() (err error) {
	for _, f := range s.retired {
		err = errors.Join(err, f.m.Unmap(), f.data.Close())
	}
	s.retired = nil
	return err
}

// ID names the stream by its content.
func (s *Stream) ID() Digest { return s.id }

// Resident is the number of bytes that are on disk.
func (s *Stream) Resident() int64 { return s.res.count() * BlockSize }

// Has says whether chunk i is here.
func (s *Stream) Has(i int) bool {
	return s.has(i) && s.usable() || s.cache.held.has(holder{s, i})
}

// has says whether chunk i is on disk.
func (s *Stream) has(i int) bool {
	c := &s.table.Chunks[i]
	return s.res.has(c.Block, c.Count)
}

// usable says whether the files are open, or it is worth trying to open them.
func (s *Stream) usable() bool {
	return s.files.Load() != nil || s.broken.Load() < time.Now().UnixNano()
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

// Damaged implements Pinner. Chunks that others look at are not punched: their
// space is given back when they are filled again, or when room is needed.
func (s *Stream) Damaged(token uint64) {
	if f := s.files.Load(); f == nil || !f.intact() {
		return // all of it is given up by whoever comes next
	}
	for i := uint32(token >> 32); i <= uint32(token); i++ {
		if s.lose(int(i)) > 0 {
			s.cache.damaged.Add(1)
			s.cache.log.Warn("a cached chunk cannot be read; it is fetched again", "stream", s.id.String(), "chunk", i)
		}
	}
}

// lose has chunk i be no longer here, and returns how many bytes of it were.
func (s *Stream) lose(i int) int64 {
	c := &s.table.Chunks[i]
	n := int64(s.res.clear(c.Block, c.Count)) * BlockSize
	s.cache.used.Add(-n)
	if n > 0 {
		s.cache.tear(holder{s, i})
	}
	return n
}

func (s *Stream) touch(i int, tick uint32) {
	if s.used[i].Load() != tick {
		s.used[i].Store(tick)
		s.lastUse.Store(tick)
	}
}

// view appends n bytes from off to v, or does nothing and returns false if some
// of them are not here.
func (s *Stream) view(v *View, off, n int64) bool {
	b := uint32(off / BlockSize)
	last := uint32((off + n - 1) / BlockSize)
	first := s.table.Find(b)
	i := first
	tick := s.cache.tick.Load()
	// The pin comes first: once it holds, a bit that is set stays set, and
	// files that are open stay open.
	for ; ; i++ {
		if !s.pin(i) {
			i--
			break
		}
		s.touch(i, tick)
		if c := &s.table.Chunks[i]; c.Block+c.Count > last {
			f := s.files.Load()
			if f == nil || !s.res.has(b, last-b+1) || !f.intact() {
				break
			}
			v.Append(f.m[off:off+n:off+n], s, uint64(first)<<32|uint64(i))
			return true
		}
	}
	for ; i >= first; i-- {
		s.pins[i].Add(-1)
	}
	return s.cache.held.any() && s.viewHeld(v, off, n)
}

// viewHeld is view where some of the chunks are in memory only.
func (s *Stream) viewHeld(v *View, off, n int64) bool {
	var found View
	for n > 0 {
		i := s.table.Find(uint32(off / BlockSize))
		c := &s.table.Chunks[i]
		skip := off - int64(c.Block)*BlockSize
		m := min(int64(c.Size())-skip, n)
		if p := s.cache.held.get(holder{s, i}); p != nil {
			found.Append(p[skip:skip+m:skip+m], nil, 0)
		} else if f := s.pinned(i); f != nil {
			found.Append(f.m[off:off+m:off+m], s, uint64(i)<<32|uint64(i))
		} else {
			found.Release()
			return false
		}
		off, n = off+m, n-m
	}
	for _, seg := range found.Segments() {
		v.add(seg)
	}
	return true
}

// pinned pins chunk i and returns the files that it is in, or nil if it is not on
// disk or they are not open.
func (s *Stream) pinned(i int) *streamFiles {
	if !s.pin(i) {
		return nil
	}
	if f := s.files.Load(); f != nil && s.has(i) && f.intact() {
		return f
	}
	s.pins[i].Add(-1)
	return nil
}

// check says whether p is the content of chunk i.
func (s *Stream) check(i int, p []byte) error {
	if err := s.table.Chunks[i].Verify(p); err != nil {
		return fmt.Errorf("chunk %d of stream %.12s: %w", i, s.id, err)
	}
	return nil
}

// Fill stores p as the content of chunk i, once it has found p to be that:
// nothing gets into the cache another way. It fails with ErrDigest where p is
// something else, with ErrNoSpace where neither the disk nor the quota has
// room, and leaves the chunk absent then.
func (s *Stream) Fill(i int, p []byte) error {
	if err := s.check(i, p); err != nil {
		return err
	}
	err := ErrDamaged
	// Who cuts files short faster than they are made is not waited for.
	for try := 0; errors.Is(err, ErrDamaged) && try < 8; try++ {
		err = s.cache.squeeze(int64(len(p)), func() error { return s.store(i, p) })
	}
	if err != nil {
		return fmt.Errorf("keep chunk %d of stream %.12s: %w", i, s.id, err)
	}
	s.cache.held.drop(holder{s, i})
	return nil
}

// Hold keeps p as the content of chunk i in memory, once it has found p to be
// that: for chunks that somebody waits for and that Fill has no room for. Views
// see it as if it was in the cache. What is held is bounded, and goes in the
// order in which it came.
func (s *Stream) Hold(i int, p []byte) error {
	if err := s.check(i, p); err != nil {
		return err
	}
	s.cache.held.put(holder{s, i}, p)
	return nil
}

// store writes chunk i, and says then that it is here.
func (s *Stream) store(i int, p []byte) error {
	for !s.pin(i) {
		s.cache.awaitEviction()
	}
	defer s.pins[i].Add(-1)
	if err := s.prepare(); err != nil {
		return err
	}
	if err := s.open(); err != nil || s.has(i) {
		return err
	}
	f := s.files.Load()
	if f == nil {
		return s.fail(ErrDamaged)
	}
	if err := s.cache.reserve(int64(len(p))); err != nil {
		return err
	}
	c := &s.table.Chunks[i]
	if _, err := f.data.WriteAt(p, int64(c.Block)*BlockSize); err != nil {
		s.cache.unreserve(int64(len(p)))
		s.cache.tear(holder{s, i})
		return err
	}
	s.storing.RLock()
	defer s.storing.RUnlock()
	if s.files.Load() != f {
		s.cache.unreserve(int64(len(p)))
		return s.fail(ErrDamaged)
	}
	added := s.res.set(c.Block, c.Count)
	s.cache.unreserve(int64(c.Count-added) * BlockSize)
	s.touch(i, s.cache.tick.Load())
	s.dirty.Store(true)
	s.cache.filled()
	return nil
}

func diskFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// FillLocal fills chunk i with a copy from another place of the cache that
// holds the same content, and says whether there was one.
func (s *Stream) FillLocal(i int) bool {
	c := &s.table.Chunks[i]
	for _, l := range s.cache.holders(c.Digest) {
		o := &l.stream.table.Chunks[l.chunk]
		if l.stream == s && l.chunk == i || o.Count != c.Count || !l.stream.Has(l.chunk) {
			continue
		}
		var v View
		if l.stream.prepare() != nil || !l.stream.view(&v, int64(o.Block)*BlockSize, int64(o.Size())) {
			continue
		}
		p := make([]byte, o.Size())
		err := v.CopyTo(p)
		v.Release()
		if err == nil && s.Fill(i, p) == nil {
			return true
		}
	}
	return false
}

// sync makes durable what was here when it was called. What may have been lost
// on the way to the disk is not here any more.
func (s *Stream) sync() error {
	if !s.dirty.Swap(false) {
		return nil
	}
	s.opening.Lock()
	defer s.opening.Unlock()
	f := s.files.Load()
	if f == nil {
		return nil
	}
	if err := s.res.attach(s.cache.fs, s.path(mapName), s.cache.boot, f.id); err != nil {
		s.dirty.Store(true)
		return s.fail(err)
	}
	err := s.res.sync(f.data.Sync, func(b, n uint32) {
		for i := s.table.Find(b); i < len(s.table.Chunks) && s.table.Chunks[i].Block < b+n; i++ {
			s.lose(i)
		}
	})
	if err != nil {
		s.dirty.Store(true)
		return s.fail(fmt.Errorf("make it durable: %w", errors.Join(err, s.res.flush())))
	}
	return nil
}

// close lets go of the files. While somebody still holds a view the mapping
// stays: a leak is better than a fault in whoever looks at it.
func (s *Stream) close() error {
	if s.files.Load() == nil {
		return nil
	}
	s.dirty.Store(false)
	if closed, err := s.tryClose(); err != nil {
		return s.fail(err)
	} else if !closed {
		return fmt.Errorf("stream %.12s is closed with views of it held", s.id)
	}
	return nil
}

// remove takes the stream's directory off the disk, if nothing of it is here and
// nobody fills it just now.
func (s *Stream) remove() (removed bool, err error) {
	s.opening.Lock()
	defer s.opening.Unlock()
	if s.res.count() > 0 {
		return false, nil
	}
	closed, err := s.take()
	if !closed {
		return false, err
	}
	s.gone = true
	s.cache.used.Add(-s.onDisk.Swap(0))
	return true, errors.Join(err, s.dropRetired(), s.cache.fs.RemoveAll(s.dir()))
}
