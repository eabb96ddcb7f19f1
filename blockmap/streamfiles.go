package blockmap

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// streamFiles is the part of a Stream that opens, closes and replaces its files.
type streamFiles struct {
	// current is nil while the files are closed. A goroutine that has pinned a
	// chunk and then loads current may use it until it unpins: closing takes
	// current away first, and looks at the pins then. looking counts those that do so
	// without a chunk.
	current atomic.Pointer[dataFile]
	looking atomic.Int32

	// mu is held across opening, syncing and closing.
	mu struct {
		sync.Mutex
		gone    bool        // the stream is no longer one of the cache
		retired []*dataFile // damaged files that views may still point to
	}

	// marking is held, by many at once, from the write of a chunk until it is
	// marked resident; and by one alone to replace current, or to compare the
	// space that the file takes with the blocks that are resident.
	marking sync.RWMutex

	brokenUntil atomic.Int64 // ns since 1970: opening failed, and is not tried before
	dirty       atomic.Bool  // blocks were set since the last sync
	unmeasured  atomic.Bool  // data was written or punched since the last measure
}

// Names within the directory of a stream.
const (
	dataName  = "data"
	mapName   = "map"
	tableName = "table"
)

// brokenFor is how long a stream is left alone after its files could not be
// opened. Its chunks are held in memory meanwhile.
const brokenFor = time.Second

func (s *Stream) path(name string) string {
	return s.store.disk.path(streamsDir, s.id.String(), name)
}

func (s *Stream) size() int64 { return int64(s.table.Blocks()) * BlockSize }

// fixedSize is the space of everything but the data: a table of n bytes, the map
// and the directory.
func (s *Stream) fixedSize(n int) int64 {
	return allocated(int64(n)) + residencyMap.size(s.table.Blocks()) + BlockSize
}

// setFixed and setExtra change what the stream takes of the quota besides its
// resident blocks.
func (s *Stream) setFixed(n int64) { s.store.disk.used.Add(n - s.fixed.Swap(n)) }
func (s *Stream) setExtra(n int64) { s.store.disk.used.Add(n - s.extra.Swap(n)) }

// load reads what an earlier process left of the stream, or says what is wrong
// with it.
func (s *Stream) load() error {
	d := s.store.disk
	id, space, err := statData(d.fs, s.path(dataName), s.size())
	if err != nil {
		return err
	}
	if err := s.res.file.load(d.fs, s.path(mapName), d.boot, id); err != nil {
		return err
	}
	resident := s.Resident()
	if space > resident+resident/8+1<<20 {
		// A process was killed between writing and marking, or between clearing
		// and punching; or the machine rebooted.
		if err := s.punchAllAbsent(); err != nil {
			return err
		}
		if space, err = s.files.current.Load().space(); err != nil {
			return err
		}
	}
	s.setExtra(max(0, space-resident))
	return nil
}

// punchAllAbsent gives back the space of all blocks that are not resident. As with
// any eviction, the map that says so is made durable first.
func (s *Stream) punchAllAbsent() error {
	if err := s.open(); err != nil {
		return err
	}
	if err := s.res.flush(); err != nil {
		return err
	}
	_, err := s.punchAbsent(s.files.current.Load(), 0, s.table.Blocks())
	return err
}

// punchAbsent gives back the space of those of the n blocks from b that are not
// resident, and returns how many bytes they have. The map that says so is durable, and
// nobody fills them meanwhile.
func (s *Stream) punchAbsent(f *dataFile, b, n uint32) (bytes int64, err error) {
	for n > 0 {
		run, resident := s.res.run(b, n)
		if !resident {
			if err := f.punch(int64(b)*BlockSize, int64(run)*BlockSize); err != nil {
				return bytes, err
			}
			bytes += int64(run) * BlockSize
		}
		b, n = b+run, n-run
	}
	return bytes, nil
}

// measure compares the space that the data takes on disk with the resident
// blocks, and counts the rest as used: the guard, what the file system needs for
// the file, and chunks that could not be punched. Space below the blocks is not
// believed: some file systems allocate late. The evictor's turn is held.
func (s *Stream) measure() {
	if !s.files.unmeasured.Load() || !s.files.mu.TryLock() {
		return
	}
	defer s.files.mu.Unlock()
	f := s.files.current.Load()
	if f == nil || !s.files.marking.TryLock() {
		return // the next one measures
	}
	defer s.files.marking.Unlock()
	s.files.unmeasured.Store(false)
	if space, err := f.space(); err == nil {
		s.setExtra(max(0, space-s.Resident()))
	}
}

// open opens the files, and makes those that are missing.
func (s *Stream) open() error {
	if s.files.current.Load() != nil {
		return nil
	}
	err := s.tryOpen()
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) {
		s.store.closeIdle(true)
		err = s.tryOpen()
	}
	if err != nil {
		s.files.brokenUntil.Store(time.Now().Add(brokenFor).UnixNano())
		return s.fail(fmt.Errorf("open: %w", err))
	}
	s.files.brokenUntil.Store(0)
	if s.store.open.Load() > s.store.openLimit {
		s.store.closeIdle(true)
	}
	return nil
}

// usable says whether the files are open, or it is worth trying to open them.
func (s *Stream) usable() bool {
	return s.files.current.Load() != nil || s.files.brokenUntil.Load() < time.Now().UnixNano()
}

// prepare makes resident blocks ready to be viewed: the files are open, and are
// the ones that were written.
func (s *Stream) prepare() error {
	s.files.looking.Add(1)
	f := s.files.current.Load()
	intact := f != nil && f.intact()
	s.files.looking.Add(-1)
	switch {
	case f == nil && s.fixed.Load() == 0:
		return nil // nothing is on disk
	case intact:
		return nil
	case f != nil:
		if err := s.abandon(f); err != nil {
			return s.fail(err)
		}
	}
	return s.open()
}

// inUse reports whether somebody may use a file that was taken away before.
func (f *streamFiles) inUse(p pins) bool { return f.looking.Load() > 0 || p.any() }

func (s *Stream) tryOpen() error {
	s.files.mu.Lock()
	defer s.files.mu.Unlock()
	switch {
	case s.files.current.Load() != nil:
		return nil
	case s.files.mu.gone:
		return ErrClosed
	}
	if s.fixed.Load() == 0 {
		if err := s.makeDir(); err != nil {
			return err
		}
	}
	err := s.openFiles()
	if notOurs(err) {
		err = s.replaceFiles(err)
	}
	if err == nil {
		s.store.open.Add(1)
	}
	return err
}

// replaceFiles makes the directory anew because of err. The data goes too: a map
// that survives a power cut must not be believed of another file. s.files.mu is
// held.
func (s *Stream) replaceFiles(err error) error {
	if s.forgetAll() > 0 {
		s.store.disk.drop("stream", s.id.String(), err)
	}
	if err := errors.Join(s.store.disk.fs.RemoveAll(s.path("")), s.makeDir()); err != nil {
		return err
	}
	return s.openFiles()
}

// makeDir makes the directory of the stream, and its table: a directory without
// one is no stream. s.files.mu is held.
func (s *Stream) makeDir() error {
	if err := s.store.disk.fs.MkdirAll(s.path("")); err != nil {
		return err
	}
	table := s.table.Append(nil)
	if err := s.store.writer.put(s.path(tableName), table); err != nil {
		return err
	}
	s.setFixed(s.fixedSize(len(table)))
	s.setExtra(guardSize)
	return nil
}

// openFiles opens data and map, and makes those that never existed. It fails with
// errReplaced where the data is not in the file that it was written to.
// s.files.mu is held.
func (s *Stream) openFiles() error {
	d := s.store.disk
	was, known := s.res.file.identity()
	var direct *buffers
	if d.direct {
		direct = &s.store.reads.buffers
	}
	f, err := openData(d.fs, s.path(dataName), s.size(), was, known, direct)
	if err != nil {
		return err
	}
	if err := s.res.file.attach(d.fs, s.path(mapName), d.boot, f.id); err != nil {
		return errors.Join(err, f.close())
	}
	s.files.current.Store(f)
	return nil
}

// forgetAll marks all blocks as absent, whatever file they were in, and returns
// how many bytes were resident.
func (s *Stream) forgetAll() int64 {
	n := int64(s.res.clear(0, s.table.Blocks())) * BlockSize
	s.res.file.forgetIdentity()
	s.store.disk.used.Add(-n)
	return n
}

// tryClose closes the files unless they are in use, or what is in them is not
// durable yet: the kernel reports a failed write to those who have the file open.
func (s *Stream) tryClose() (closed bool, err error) {
	if s.files.current.Load() == nil || s.files.dirty.Load() || !s.files.mu.TryLock() {
		return false, nil
	}
	defer s.files.mu.Unlock()
	return s.take()
}

func (s *Stream) closeOrWarn() (closed bool) {
	closed, err := s.tryClose()
	if err != nil {
		s.store.disk.log.Warn("cannot close the files of a stream", "stream", s.id.String(), "err", err)
	}
	return closed
}

// take takes the files away, and closes them unless a chunk is pinned. s.files.mu
// is held.
func (s *Stream) take() (closed bool, err error) {
	f := s.files.current.Swap(nil)
	// Whoever pins from here on finds no files.
	if s.files.inUse(s.pins) {
		s.files.current.Store(f)
		return false, nil
	}
	if f == nil {
		return true, nil
	}
	s.store.open.Add(-1)
	return true, errors.Join(s.res.file.detach(), f.close())
}

// abandon gives up a file that was cut short, with all that is in it. The file is
// not made whole: what its views have lost must go on to fault, and not read as
// zeros. New files take its place.
func (s *Stream) abandon(f *dataFile) error {
	s.files.mu.Lock()
	defer s.files.mu.Unlock()
	if s.files.current.Load() != f {
		return nil
	}
	s.files.marking.Lock()
	s.files.current.Store(nil)
	n := s.forgetAll()
	s.setExtra(guardSize)
	s.files.marking.Unlock()
	d := s.store.disk
	s.store.open.Add(-1)
	d.damaged.Add(1)
	d.log.Warn("a file of the cache was cut short; its content will be fetched again", "stream", s.id.String(), "bytes", n)
	s.files.mu.retired = append(s.files.mu.retired, f)
	return errors.Join(s.res.file.detach(), d.fs.RemoveAll(s.path(mapName)), d.fs.RemoveAll(s.path(dataName)))
}

// closeRetired closes damaged files once no view points to them.
func (s *Stream) closeRetired() error {
	s.files.mu.Lock()
	defer s.files.mu.Unlock()
	if len(s.files.mu.retired) == 0 || s.files.inUse(s.pins) {
		return nil
	}
	return s.dropRetired()
}

// dropRetired closes damaged files. s.files.mu is held.
func (s *Stream) dropRetired() (err error) {
	for _, f := range s.files.mu.retired {
		err = errors.Join(err, f.close())
	}
	s.files.mu.retired = nil
	return err
}

// sync makes durable what was resident when it was called. What may have been
// lost on the way to the disk becomes absent.
func (s *Stream) sync() error {
	if !s.files.dirty.Swap(false) {
		return nil
	}
	s.files.mu.Lock()
	defer s.files.mu.Unlock()
	f, d := s.files.current.Load(), s.store.disk
	if f == nil {
		return nil
	}
	if err := s.res.file.attach(d.fs, s.path(mapName), d.boot, f.id); err != nil {
		s.files.dirty.Store(true)
		return s.fail(err)
	}
	err := s.res.sync(f.sync, func(b, n uint32) {
		for i := s.table.Find(b); i < len(s.table.Chunks) && s.table.Chunks[i].Block < b+n; i++ {
			s.lose(i)
		}
	})
	if err != nil {
		s.files.dirty.Store(true)
		return s.fail(fmt.Errorf("sync: %w", errors.Join(err, s.res.flush())))
	}
	return nil
}

// close closes the files. While a view is held the mapping stays: a leak is
// better than a fault in whoever reads the view.
func (s *Stream) close() error {
	if s.files.current.Load() == nil {
		return nil
	}
	s.files.dirty.Store(false)
	if closed, err := s.tryClose(); err != nil {
		return s.fail(err)
	} else if !closed {
		return s.fail(errors.New("close: a view of it was not released"))
	}
	return nil
}

// remove removes the stream's directory, if no block is resident and no chunk is
// pinned.
func (s *Stream) remove() (removed bool, err error) {
	s.files.mu.Lock()
	defer s.files.mu.Unlock()
	if s.res.count() > 0 {
		return false, nil
	}
	closed, err := s.take()
	if !closed {
		return false, err
	}
	s.files.mu.gone = true
	s.setFixed(0)
	s.setExtra(0)
	return true, errors.Join(err, s.dropRetired(), s.store.disk.fs.RemoveAll(s.path("")))
}
