package blockmap

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// streamStore has the streams of a cache: it finds them by ID and their chunks by
// digest, opens them for images, and closes and removes those that no image uses.
type streamStore struct {
	disk    *disk
	writer  *fileWriter
	evictor *evictor
	held    held
	clock   clock
	memory  *pageCache
	reads   diskReads

	open      atomic.Int64 // streams whose files are open
	openLimit int64

	// turn makes the opening of streams for images and the removal of streams
	// take turns: no image gets a stream that is being removed. It is held across
	// the I/O of a removal.
	turn sync.Mutex

	mu struct {
		sync.RWMutex
		streams  map[Digest]*Stream
		byDigest map[Digest][]chunkRef // lists are replaced, never changed
	}
}

// chunkRef names a chunk of a stream of the cache.
type chunkRef struct {
	stream *Stream
	chunk  int
}

func newStreamStore(d *disk, w *fileWriter, e *evictor, memory int64) *streamStore {
	st := &streamStore{disk: d, writer: w, evictor: e, openLimit: openLimit()}
	st.held.limit = memory
	st.memory = newPageCache(majorFaults)
	st.reads.log = d.log
	st.mu.streams = make(map[Digest]*Stream)
	st.mu.byDigest = make(map[Digest][]chunkRef)
	return st
}

// openLimit is how many streams may be open at once. Each takes two descriptors
// and a mapping, and the process needs others.
func openLimit() int64 {
	limit := int64(65530) // the kernel's default of mappings
	if b, err := os.ReadFile("/proc/sys/vm/max_map_count"); err == nil {
		if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil {
			limit = n
		}
	}
	var r unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) == nil && r.Cur < uint64(limit) {
		limit = int64(r.Cur)
	}
	return max(limit/4, 16)
}

// load takes over the streams that an earlier process left, removes what it
// cannot read, and keeps no file open.
func (st *streamStore) load() error {
	dirs, err := st.disk.fs.ReadDir(st.disk.path(streamsDir))
	if err != nil {
		return err
	}
	// On a cold disk each of its small files is a wait, so many are read at once.
	var g errgroup.Group
	g.SetLimit(loadsAtOnce)
	for _, d := range dirs {
		g.Go(func() error { return st.loadDir(d.Name()) })
	}
	return g.Wait()
}

const loadsAtOnce = 32

// loadDir takes over one stream, or removes it.
func (st *streamStore) loadDir(name string) error {
	s, err := st.loadStream(name)
	if err == nil && s.Resident() > 0 {
		st.add(s)
		_, err := s.tryClose()
		return err
	}
	if err != nil {
		st.disk.drop("stream", name, err)
	}
	if s != nil {
		if _, err := s.remove(); err != nil {
			return err
		}
	}
	return st.disk.fs.RemoveAll(st.disk.path(streamsDir, name))
}

// The largest table: 16 TiB in chunks of the largest size make 4 million lines,
// but nobody has such a layer in chunks that small or that large.
const tableLimit = 256 << 20

// loadStream reads the stream of that name. It returns the stream also where only
// the table could be read.
func (st *streamStore) loadStream(name string) (*Stream, error) {
	b, err := readFile(st.disk.fs, st.disk.path(streamsDir, name, tableName), tableLimit)
	if err != nil {
		return nil, err
	}
	t := new(Table)
	d := NewDecoder(b)
	DecodeTable(d, t)
	d.End()
	if d.Err() != nil {
		return nil, d.Err()
	}
	id := t.ID()
	if id.String() != name {
		return nil, fmt.Errorf("%w: its table is that of stream %.12s", ErrCorrupt, id)
	}
	s := st.newStream(id, t)
	s.setFixed(s.fixedSize(len(b)))
	if err := s.load(); err != nil {
		err = errors.Join(err, s.res.file.detach()) // load may have opened it
		s.res = newResidency(id, t.Blocks())        // drops what was read of it
		return s, err
	}
	return s, nil
}

// add makes s a stream of the cache.
func (st *streamStore) add(s *Stream) {
	st.disk.used.Add(s.Resident())
	st.mu.Lock()
	defer st.mu.Unlock()
	st.mu.streams[s.id] = s
	for i := range s.table.Chunks {
		d := s.table.Chunks[i].Digest
		st.mu.byDigest[d] = append(st.mu.byDigest[d], chunkRef{s, i})
	}
}

// forget undoes add.
func (st *streamStore) forget(s *Stream) {
	st.mu.Lock()
	delete(st.mu.streams, s.id)
	for i := range s.table.Chunks {
		d := s.table.Chunks[i].Digest
		left := slices.DeleteFunc(slices.Clone(st.mu.byDigest[d]), func(x chunkRef) bool { return x.stream == s })
		if len(left) == 0 {
			delete(st.mu.byDigest, d)
		} else {
			st.mu.byDigest[d] = left
		}
	}
	st.mu.Unlock()
	st.evictor.forget(s)
	st.held.dropAll(s)
}

// acquire returns the stream that t describes, to be given back by Release.
func (st *streamStore) acquire(t *Table) *Stream {
	id := t.ID()
	st.turn.Lock()
	defer st.turn.Unlock()
	st.mu.RLock()
	s := st.mu.streams[id]
	st.mu.RUnlock()
	if s == nil {
		s = st.newStream(id, t)
		st.add(s)
	}
	st.mu.Lock()
	s.users++
	st.mu.Unlock()
	return s
}

// Release gives the stream back to its cache. When no image has it any more its
// files are closed, now or as soon as what is in them is durable.
func (s *Stream) Release() {
	st := s.store
	st.mu.Lock()
	s.users--
	last := s.users == 0
	st.mu.Unlock()
	if last {
		s.closeOrWarn()
	}
}

// inUse says whether an image has the stream.
func (st *streamStore) inUse(s *Stream) bool {
	st.mu.RLock()
	defer st.mu.RUnlock()
	return s.users > 0
}

// idInUse says whether an image has the stream of that ID.
func (st *streamStore) idInUse(id Digest) bool {
	st.mu.RLock()
	defer st.mu.RUnlock()
	s := st.mu.streams[id]
	return s != nil && s.users > 0
}

func (st *streamStore) all() []*Stream {
	st.mu.RLock()
	defer st.mu.RUnlock()
	all := make([]*Stream, 0, len(st.mu.streams))
	for _, s := range st.mu.streams {
		all = append(all, s)
	}
	return all
}

// holders are the chunks whose content has the digest d.
func (st *streamStore) holders(d Digest) []chunkRef {
	st.mu.RLock()
	defer st.mu.RUnlock()
	return st.mu.byDigest[d]
}

// sync makes all streams durable.
func (st *streamStore) sync() (err error) {
	for _, s := range st.all() {
		err = errors.Join(err, s.sync())
	}
	return err
}

func (st *streamStore) close() (err error) {
	for _, s := range st.all() {
		err = errors.Join(err, s.close(), s.closeRetired())
	}
	return err
}

// removeEmpty removes streams that no image has and that have no resident block,
// and returns the bytes that their tables and maps took.
func (st *streamStore) removeEmpty() (freed int64) {
	for _, s := range st.all() {
		if s.res.count() == 0 {
			freed += st.removeIfUnused(s)
		}
	}
	return freed
}

func (st *streamStore) removeIfUnused(s *Stream) (freed int64) {
	st.turn.Lock()
	defer st.turn.Unlock()
	if st.inUse(s) {
		return 0
	}
	n := s.fixed.Load()
	removed, err := s.remove()
	if err != nil {
		st.disk.log.Warn("cannot remove an empty stream", "stream", s.id.String(), "err", err)
	}
	if !removed {
		return 0
	}
	st.forget(s)
	return n
}

// closeIdle closes the files of streams that no image has. Where hard is set it
// also closes some of those that images have, the least recently used first.
func (st *streamStore) closeIdle(hard bool) {
	type idle struct {
		s   *Stream
		age uint32
	}
	var rest []idle
	now := st.clock.now()
	for _, s := range st.all() {
		if err := s.closeRetired(); err != nil {
			st.disk.log.Warn("cannot close damaged files", "stream", s.id.String(), "err", err)
		}
		switch {
		case s.files.current.Load() == nil:
		case st.inUse(s):
			rest = append(rest, idle{s, now - s.lastUse.Load()})
		default:
			s.closeOrWarn()
		}
	}
	if !hard {
		return
	}
	slices.SortFunc(rest, func(a, b idle) int { return cmp.Compare(b.age, a.age) })
	for n := len(rest)/8 + 1; n > 0 && len(rest) > 0; rest = rest[1:] {
		s := rest[0].s
		if err := s.sync(); err != nil { // or it cannot be closed
			st.disk.log.Warn("cannot sync before closing", "stream", s.id.String(), "err", err)
		}
		if s.closeOrWarn() {
			n--
		}
	}
}
