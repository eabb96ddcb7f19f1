package blockmap

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Cache keeps streams on local disk, and the small blobs (manifests, configs,
// indexes) that a restart without a network needs. Its directory belongs to
// one process at a time:
//
//	lock                    held by the process
//	streams/ID/table        the chunk table, as in an Index
//	streams/ID/data         sparse: the uncompressed bytes of the stream
//	streams/ID/map          which blocks of data are here, see residency
//	blobs/sha256/DIGEST     small blobs, checked when they are read
//	refs/SHA256-OF-NAME     what a name meant when it was last resolved
//
// Nothing else need be kept consistent: a stream that is damaged or half made
// is dropped and fetched again.
type Cache struct {
	dir   string
	fs    FS
	boot  BootID
	quota int64
	log   *slog.Logger
	lock  io.Closer

	used    atomic.Int64  // bytes of data that are here or being written
	tick    atomic.Uint32 // the clock of used: moves once in ticksAFill fills
	fills   atomic.Uint32
	dropped atomic.Int64
	evicted atomic.Int64

	// opening makes streams be opened one after the other. It is held across
	// I/O, and is on no read's way.
	opening sync.Mutex
	// evictor makes eviction one process's work at a time; who finds a chunk
	// on its way out waits for it. It is held across I/O as well.
	evictor sync.Mutex
	// crowded is held across the storing of a chunk: by many at once while
	// the disk has room, by one alone when it is full.
	crowded sync.RWMutex

	// writing has small files be written one after the other: two exports of an
	// image keep the same index, under one name until it is whole.
	writing sync.Mutex

	mu struct {
		sync.RWMutex
		streams  map[Digest]*Stream
		byDigest map[Digest][]holder
		unsynced []string            // small files that are not durable yet
		torn     map[holder]struct{} // chunks that are not here, and may take room on disk
	}

	stop func()
	wg   sync.WaitGroup
}

type holder struct {
	stream *Stream
	chunk  int
}

// CacheOptions are the settings of a Cache.
type CacheOptions struct {
	// Quota bounds the bytes of data kept, 0 for no bound but the disk. Beyond
	// it the chunks that were not used for the longest time go.
	Quota int64
	// Boot is the boot ID of the machine. The zero value trusts only what was
	// made durable, which is always right and sometimes fetches again.
	Boot BootID
	// SyncEvery is how often what was fetched is made durable; 5 s if zero.
	SyncEvery time.Duration
	FS        FS           // the machine's if nil
	Log       *slog.Logger // silent if nil
}

const ticksAFill = 64

// OpenCache opens or creates the cache in dir. It fails with ErrLocked when
// another process has it.
func OpenCache(dir string, o CacheOptions) (c *Cache, err error) {
	c = &Cache{dir: dir, fs: o.FS, boot: o.Boot, quota: o.Quota, log: o.Log}
	if c.fs == nil {
		c.fs = OS
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.mu.streams = make(map[Digest]*Stream)
	c.mu.byDigest = make(map[Digest][]holder)
	c.mu.torn = make(map[holder]struct{})
	for _, d := range []string{"streams", "blobs/sha256", "refs"} {
		if err := c.fs.MkdirAll(filepath.Join(dir, d)); err != nil {
			return nil, fmt.Errorf("open cache: %w", err)
		}
	}
	if c.lock, err = c.fs.Lock(filepath.Join(dir, "lock")); err != nil {
		return nil, fmt.Errorf("open cache %s: %w", dir, err)
	}
	if err := c.openStreams(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	every := o.SyncEvery
	if every == 0 {
		every = 5 * time.Second
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.stop = cancel
	c.wg.Go(func() { c.syncLoop(ctx, every) })
	return c, nil
}

// openStreams opens what an earlier process left. What cannot be understood is
// removed; a stream of which nothing is here takes no file handles.
func (c *Cache) openStreams() error {
	root := filepath.Join(c.dir, "streams")
	dirs, err := c.fs.ReadDir(root)
	if err != nil {
		return fmt.Errorf("open cache: %w", err)
	}
	for _, d := range dirs {
		dir := filepath.Join(root, d.Name())
		t, err := c.readTable(dir, d.Name())
		if err != nil {
			c.log.Warn("dropped a damaged stream of the cache; it will be fetched again",
				"stream", d.Name(), "cause", err)
			c.dropped.Add(1)
			if err := c.fs.RemoveAll(dir); err != nil {
				return fmt.Errorf("open cache: %w", err)
			}
			continue
		}
		s, err := c.openStream(dir, t)
		if err != nil {
			return err
		}
		if s.Resident() == 0 {
			if err := errors.Join(s.close(), c.fs.RemoveAll(dir)); err != nil {
				return fmt.Errorf("open cache: %w", err)
			}
			continue
		}
		c.add(s)
	}
	return nil
}

// The largest table: 16 TiB in chunks of the largest size make 4 million
// lines, but nobody has such a layer in chunks that small or that large.
const tableLimit = 256 << 20

func (c *Cache) readTable(dir, name string) (*Table, error) {
	b, err := readFile(c.fs, filepath.Join(dir, tableName), tableLimit)
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
	if id := t.ID(); id.String() != name {
		return nil, fmt.Errorf("%w: its table is that of stream %.12s", ErrCorrupt, id)
	}
	return t, nil
}

func (c *Cache) add(s *Stream) {
	c.used.Add(s.Resident())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.streams[s.id] = s
	for i := range s.table.Chunks {
		d := s.table.Chunks[i].Digest
		c.mu.byDigest[d] = append(c.mu.byDigest[d], holder{s, i})
	}
}

// Stream returns the stream that t describes, empty if it was never here. Two
// tables of the same content have the same stream.
func (c *Cache) Stream(t *Table) (*Stream, error) {
	id := t.ID()
	c.opening.Lock()
	defer c.opening.Unlock()
	c.mu.RLock()
	s := c.mu.streams[id]
	c.mu.RUnlock()
	if s != nil {
		return s, nil
	}
	dir := filepath.Join(c.dir, "streams", id.String())
	if err := c.fs.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("make cached stream: %w", err)
	}
	// The table goes first: a directory without one is no stream.
	if err := c.write(filepath.Join(dir, tableName), t.Append(nil)); err != nil {
		return nil, fmt.Errorf("make cached stream: %w", err)
	}
	s, err := c.openStream(dir, t)
	if err != nil {
		return nil, err
	}
	c.add(s)
	return s, nil
}

// write puts b at path now, and makes that durable with the next Sync: the start
// of a device does not wait for the disk.
func (c *Cache) write(path string, b []byte) error {
	c.writing.Lock()
	err := writeFile(c.fs, path, b)
	c.writing.Unlock()
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.unsynced = append(c.mu.unsynced, path)
	return nil
}

func (c *Cache) all() []*Stream {
	c.mu.RLock()
	defer c.mu.RUnlock()
	all := make([]*Stream, 0, len(c.mu.streams))
	for _, s := range c.mu.streams {
		all = append(all, s)
	}
	return all
}

func (c *Cache) holders(d Digest) []holder {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.mu.byDigest[d]
}

// Quota bounds what is kept, in bytes; 0 where only the disk does.
func (c *Cache) Quota() int64 { return c.quota }

// Used is the number of bytes of data that are here.
func (c *Cache) Used() int64 { return c.used.Load() }

// Dropped counts the streams that were damaged and thrown away.
func (c *Cache) Dropped() int64 { return c.dropped.Load() }

// Evicted counts the bytes that had to go for others.
func (c *Cache) Evicted() int64 { return c.evicted.Load() }

func (c *Cache) filled() {
	if c.fills.Add(1)%ticksAFill == 0 {
		c.tick.Add(1)
	}
}

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
	type candidate struct {
		holder
		age uint32
	}
	var cold []candidate
	tick := c.tick.Load()
	for _, s := range c.all() {
		for i := range s.table.Chunks {
			if s.Has(i) {
				cold = append(cold, candidate{holder{s, i}, tick - s.used[i].Load()})
			}
		}
	}
	slices.SortFunc(cold, func(a, b candidate) int { return cmp.Compare(b.age, a.age) })
	var going []holder
	touched := make(map[*Stream]bool)
	var n int64
	unmark := func(x holder) {
		t := &x.stream.table.Chunks[x.chunk]
		n += int64(x.stream.res.clear(t.Block, t.Count)) * BlockSize
		going = append(going, x)
		touched[x.stream] = true
	}
	for x := range c.takeTorn() {
		switch pins := &x.stream.pins[x.chunk]; {
		case !pins.CompareAndSwap(0, evicting):
			c.tear(x) // somebody tries again, or looks
		case x.stream.Has(x.chunk):
			pins.Add(-evicting)
		default:
			unmark(x)
		}
	}
	for _, x := range cold {
		if n >= want {
			break
		}
		if x.stream.pins[x.chunk].CompareAndSwap(0, evicting) {
			unmark(x.holder)
		}
	}
	// No bit may say "here" of a block whose data has gone, not even after a
	// power cut: the maps reach the disk before the holes are punched.
	failed := make(map[*Stream]bool)
	for s := range touched {
		if err := s.res.flush(); err != nil {
			c.log.Error("evict: the map could not be written; the data stays", "stream", s.id.String(), "cause", err)
			failed[s] = true
		}
	}
	for _, x := range going {
		t := &x.stream.table.Chunks[x.chunk]
		var err error
		if !failed[x.stream] {
			if err = x.stream.data.PunchHole(int64(t.Block)*BlockSize, int64(t.Size())); err != nil {
				c.log.Error("evict", "stream", x.stream.id.String(), "cause", err)
			}
		}
		if failed[x.stream] || err != nil {
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

func (c *Cache) syncLoop(ctx context.Context, every time.Duration) {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := c.Sync(); err != nil {
				c.log.Error("cache", "cause", err)
			}
		}
	}
}

// Sync makes durable all that is here.
func (c *Cache) Sync() error {
	c.mu.Lock()
	unsynced := c.mu.unsynced
	c.mu.unsynced = nil
	c.mu.Unlock()
	var errs []error
	for _, path := range unsynced {
		errs = append(errs, syncFile(c.fs, path))
	}
	for _, s := range c.all() {
		errs = append(errs, s.sync())
	}
	return errors.Join(errs...)
}

// Close makes all durable and gives the directory back. All views have been
// released by then.
func (c *Cache) Close() error {
	if c.stop != nil {
		c.stop()
	}
	c.wg.Wait()
	errs := []error{c.Sync()}
	for _, s := range c.all() {
		errs = append(errs, s.close())
	}
	return errors.Join(append(errs, c.lock.Close())...)
}

// blobLimit bounds a blob that is read back: the largest index.
const blobLimit = 1 << 30

// Blob returns the small blob of that digest, or fs.ErrNotExist. One that has
// been damaged is removed and is not there.
func (c *Cache) Blob(d Digest) ([]byte, error) {
	path := filepath.Join(c.dir, "blobs/sha256", d.String())
	b, err := readFile(c.fs, path, blobLimit)
	if err != nil {
		return nil, err
	}
	if sha256.Sum256(b) != d {
		c.log.Warn("dropped a damaged blob of the cache", "digest", d.String())
		c.dropped.Add(1)
		return nil, errors.Join(fs.ErrNotExist, c.fs.RemoveAll(path))
	}
	return b, nil
}

// PutBlob keeps b for a later Blob.
func (c *Cache) PutBlob(b []byte) error {
	path := filepath.Join(c.dir, "blobs/sha256", Digest(sha256.Sum256(b)).String())
	return c.write(path, b)
}

// Ref returns what PutRef kept under name, or fs.ErrNotExist. After a power cut
// it may be anything: whoever reads it checks it.
func (c *Cache) Ref(name string) ([]byte, error) {
	return readFile(c.fs, c.refPath(name), 1<<20)
}

// PutRef keeps b under a name, in place of what was there.
func (c *Cache) PutRef(name string, b []byte) error {
	return c.write(c.refPath(name), b)
}

func (c *Cache) refPath(name string) string {
	sum := sha256.Sum256([]byte(name))
	return filepath.Join(c.dir, "refs", hex.EncodeToString(sum[:]))
}
