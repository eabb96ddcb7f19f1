package blockmap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Cache keeps streams on local disk, and the small blobs (manifests, configs,
// indexes) that a restart without a network needs. Its directory belongs to
// one process at a time, and to one user:
//
//	lock                    held by the process
//	streams/ID/table        the chunk table, as in an Index
//	streams/ID/data         sparse: the uncompressed bytes of the stream
//	streams/ID/map          which blocks of data are here, see residency
//	blobs/sha256/DIGEST     small blobs, checked when they are read
//	refs/SHA256-OF-NAME     what a name meant when it was last resolved
//
// Nothing else need be kept consistent: a stream that is damaged or half made
// is dropped and fetched again. What the disk has no room for is held in memory,
// within a bound, for those who wait for it.
type Cache struct {
	dir   string
	fs    FS
	boot  BootID
	quota int64
	log   *slog.Logger
	lock  io.Closer

	used    atomic.Int64  // bytes that are here or being written: data, tables, maps, small files
	tick    atomic.Uint32 // the clock of used: moves once in ticksAFill fills
	fills   atomic.Uint32
	dropped atomic.Int64
	evicted atomic.Int64
	damaged atomic.Int64

	fullUntil atomic.Int64 // ns since 1970, while the disk is left alone

	open      atomic.Int64 // streams whose files are open
	openLimit int64

	held  held
	small small

	// opening makes images and the removal of streams take turns.
	opening sync.Mutex
	// evictor makes eviction one process's work at a time; who finds a chunk
	// on its way out waits for it. It is held across I/O.
	evictor sync.Mutex
	// crowded is held across the storing of a chunk or a small file: by many at
	// once while the disk has room, by one alone when it is full.
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

const (
	streamsDir = "streams"
	blobsDir   = "blobs/sha256"
	refsDir    = "refs"
)

// CacheOptions are the settings of a Cache.
type CacheOptions struct {
	// Quota bounds the bytes kept on disk, 0 for no bound but the disk. Beyond
	// it the chunks that were not used for the longest time go.
	Quota int64
	// Memory bounds the bytes held in memory where the disk has no room;
	// DefaultMemory if zero.
	Memory int64
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
// another process has it, and refuses a directory that another user could write
// to: what lies in there is served.
func OpenCache(dir string, o CacheOptions) (c *Cache, err error) {
	c = &Cache{dir: dir, fs: o.FS, boot: o.Boot, quota: o.Quota, log: o.Log, openLimit: openLimit()}
	if c.fs == nil {
		c.fs = OS
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.small.c = c
	if c.held.limit = o.Memory; c.held.limit == 0 {
		c.held.limit = DefaultMemory
	}
	c.mu.streams = make(map[Digest]*Stream)
	c.mu.byDigest = make(map[Digest][]holder)
	c.mu.torn = make(map[holder]struct{})
	if err := c.fs.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	if err := c.fs.Private(dir); err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	for _, d := range []string{streamsDir, blobsDir, refsDir} {
		if err := c.fs.MkdirAll(filepath.Join(dir, d)); err != nil {
			return nil, fmt.Errorf("open cache: %w", err)
		}
	}
	if c.lock, err = c.fs.Lock(filepath.Join(dir, "lock")); err != nil {
		return nil, fmt.Errorf("open cache %s: %w", dir, err)
	}
	if err := c.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("open cache: %w", err), c.Close())
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

// openLimit is how many streams may be open at once: each takes two descriptors
// and a mapping, of which the process needs others.
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

// load takes over what an earlier process left. What cannot be understood is
// removed; nothing is kept open.
func (c *Cache) load() error {
	for _, d := range []string{blobsDir, refsDir} {
		if err := c.small.load(filepath.Join(c.dir, d)); err != nil {
			return err
		}
	}
	root := filepath.Join(c.dir, streamsDir)
	dirs, err := c.fs.ReadDir(root)
	if err != nil {
		return err
	}
	for _, d := range dirs {
		dir := filepath.Join(root, d.Name())
		s, err := c.loadStream(dir, d.Name())
		if err == nil && s.Resident() > 0 {
			c.add(s)
			if _, err := s.tryClose(); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			c.drop(d.Name(), err)
		}
		if s != nil {
			if _, err := s.remove(); err != nil {
				return err
			}
		}
		if err := c.fs.RemoveAll(dir); err != nil {
			return err
		}
	}
	if c.quota > 0 && c.used.Load() > c.quota {
		c.evict(0)
	}
	return nil
}

// drop says that something of the cache was not right, and is thrown away.
func (c *Cache) drop(what string, err error) {
	c.log.Warn("dropped a damaged part of the cache; it is fetched again", "what", what, "err", err)
	c.dropped.Add(1)
}

// The largest table: 16 TiB in chunks of the largest size make 4 million
// lines, but nobody has such a layer in chunks that small or that large.
const tableLimit = 256 << 20

// loadStream reads what is in dir, and gives the stream if it is one, even where
// the rest is damaged.
func (c *Cache) loadStream(dir, name string) (*Stream, error) {
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
	id := t.ID()
	if id.String() != name {
		return nil, fmt.Errorf("%w: its table is that of stream %.12s", ErrCorrupt, id)
	}
	s := c.newStream(id, t)
	s.onDisk.Store(s.metadataSize(len(b)))
	c.used.Add(s.onDisk.Load())
	if err := s.load(); err != nil {
		s.res = newResidency(id, t.Blocks()) // whatever was read of it
		return s, err
	}
	return s, nil
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

// forget takes a stream out of the maps. Lists that somebody walks stay what they
// are.
func (c *Cache) forget(s *Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.mu.streams, s.id)
	for i := range s.table.Chunks {
		d := s.table.Chunks[i].Digest
		left := slices.DeleteFunc(slices.Clone(c.mu.byDigest[d]), func(h holder) bool { return h.stream == s })
		if len(left) == 0 {
			delete(c.mu.byDigest, d)
		} else {
			c.mu.byDigest[d] = left
		}
		delete(c.mu.torn, holder{s, i})
	}
	c.held.dropAll(s)
}

// Stream returns the stream that t describes, empty if it was never here, to be
// given back by Release. Two tables of the same content have the same stream.
func (c *Cache) Stream(t *Table) (*Stream, error) {
	id := t.ID()
	c.opening.Lock()
	defer c.opening.Unlock()
	c.mu.RLock()
	s := c.mu.streams[id]
	c.mu.RUnlock()
	if s == nil {
		s = c.newStream(id, t)
		c.add(s)
	}
	c.mu.Lock()
	s.users++
	c.mu.Unlock()
	return s, nil
}

// Release gives the stream back to its cache. When nobody has it any more its
// files are closed, now or as soon as what is in them is durable.
func (s *Stream) Release() {
	c := s.cache
	c.mu.Lock()
	s.users--
	last := s.users == 0
	c.mu.Unlock()
	if !last {
		return
	}
	if _, err := s.tryClose(); err != nil {
		c.log.Warn("close", "stream", s.id.String(), "err", err)
	}
}

// put puts b at path now, and makes that durable with the next Sync: the start
// of a device does not wait for the disk.
func (c *Cache) put(path string, b []byte) error {
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

// Used is the number of bytes that are here: data, what says which of it is here,
// and small files.
func (c *Cache) Used() int64 { return c.used.Load() }

// Held is the number of bytes in memory that the disk had no room for.
func (c *Cache) Held() int64 { return c.held.size() }

// Dropped counts the streams and blobs that were damaged and thrown away.
func (c *Cache) Dropped() int64 { return c.dropped.Load() }

// Damaged counts the chunks that could not be read when somebody wanted them.
func (c *Cache) Damaged() int64 { return c.damaged.Load() }

// Evicted counts the bytes that had to go for others.
func (c *Cache) Evicted() int64 { return c.evicted.Load() }

// OpenStreams is how many streams have their files open.
func (c *Cache) OpenStreams() int64 { return c.open.Load() }

func (c *Cache) filled() {
	if c.fills.Add(1)%ticksAFill == 0 {
		c.tick.Add(1)
	}
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
				c.log.Error("what was fetched is not durable yet", "err", err)
			}
			c.storeHeld()
			c.closeIdle(false)
			c.removeEmpty()
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
		errs = append(errs, s.close(), s.closeRetired())
	}
	return errors.Join(append(errs, c.lock.Close())...)
}
