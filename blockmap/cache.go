package blockmap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"
)

// Cache keeps streams on local disk, and the small blobs (manifests, configs,
// indexes) that a restart without a network needs. Its directory belongs to
// one process at a time, and to one user:
//
//	lock                    held by the process
//	streams/ID/table        the chunk table, as in an Index
//	streams/ID/data         sparse: the uncompressed bytes of the stream, see dataFile
//	streams/ID/map          which blocks of data are resident, see mapFile
//	blobs/sha256/DIGEST     small blobs, verified when they are read
//	refs/SHA256-OF-NAME     what a name led to when it was last resolved
//	roots/IMAGE             which streams, blobs and names an image needs, see Root
//
// The files need not be consistent with each other: a stream that is damaged or
// half made is dropped and fetched again. Chunks that the disk has no room for are
// held in memory, within a bound, for the readers that wait for them.
//
// Cache only puts its parts together:
//
//	streamStore  the streams, their open files, and which images use them
//	evictor      room for the quota and on a full disk: what goes, and when
//	smallStore   blobs, names and the files of the roots
//	rootStore    what the roots hold
//	disk         the directory and the count of its bytes
//
// Each lock stands beside what it guards. A goroutine takes them in this order,
// and may leave out any:
//
//	evictor.crowded
//	evictor.turn
//	streamStore.turn
//	streamFiles.mu            of one stream
//	streamFiles.marking       of one stream
//	residency.syncing
//	rootStore.writing
//	fileWriter.writing
//	one of residency.mu, mapFile.mu, streamStore.mu, smallStore.mu, rootStore.mu,
//	fileWriter.mu, evictor.torn, held.mu
//
// No goroutine holds streamFiles.mu, or marking, of two streams.
type Cache struct {
	disk    *disk
	writer  *fileWriter
	streams *streamStore
	small   *smallStore
	roots   *rootStore
	evictor *evictor

	lock io.Closer
	stop func()
	wg   sync.WaitGroup
}

const (
	streamsDir = "streams"
	blobsDir   = "blobs/sha256"
	refsDir    = "refs"
	rootsDir   = "roots"
)

// CacheOptions are the settings of a Cache.
type CacheOptions struct {
	// Mode is how the content of streams is read and written. Defaults to Buffered.
	Mode Mode
	// Quota bounds the bytes that the directory takes on disk; 0 means that only
	// the disk does. Beyond it the least recently used chunks are evicted.
	Quota int64
	// Memory bounds the bytes held in memory while the disk has no room.
	// Defaults to DefaultMemory.
	Memory int64
	// Boot is the boot ID of the machine. With the zero value the cache trusts
	// only what was made durable: that is always right, and sometimes fetches
	// again.
	Boot BootID
	// SyncEvery is how often what was fetched is made durable. Defaults to 5 s.
	SyncEvery time.Duration
	FS        FS           // defaults to OS
	Log       *slog.Logger // defaults to none
}

// OpenCache opens or creates the cache in dir. It fails with ErrLocked where
// another process has it, and refuses a directory that another user could write
// to: what lies in it is served.
func OpenCache(dir string, o CacheOptions) (*Cache, error) {
	c := newCache(dir, o)
	if err := c.disk.makeDirs(streamsDir, blobsDir, refsDir, rootsDir); err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	var err error
	if c.lock, err = c.disk.fs.Lock(c.disk.path("lock")); err != nil {
		return nil, fmt.Errorf("open cache %s: %w", dir, err)
	}
	if c.disk.direct {
		if err := c.disk.checkDirect(); err != nil {
			return nil, errors.Join(fmt.Errorf("open cache %s: %w", dir, err), c.lock.Close())
		}
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
	c.wg.Go(func() { c.tend(ctx, every) })
	if !c.disk.direct {
		c.wg.Go(func() { c.streams.memory.watch(ctx) })
	}
	return c, nil
}

// newCache wires the parts of a cache.
func newCache(dir string, o CacheOptions) *Cache {
	d := &disk{dir: dir, fs: o.FS, boot: o.Boot, quota: o.Quota, direct: o.Mode == Direct, log: o.Log}
	if d.fs == nil {
		d.fs = OS
	}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	memory := o.Memory
	if memory == 0 {
		memory = DefaultMemory
	}
	e := &evictor{disk: d}
	w := &fileWriter{fs: d.fs}
	e.streams = newStreamStore(d, w, e, memory)
	e.small = &smallStore{disk: d, writer: w, evictor: e}
	e.roots = newRootStore(d, e.small)
	return &Cache{disk: d, writer: w, streams: e.streams, small: e.small, roots: e.roots, evictor: e}
}

// load takes over what an earlier process left, and evicts what is over the
// quota.
func (c *Cache) load() error {
	if err := errors.Join(c.small.load(blobsDir, refsDir, rootsDir), c.roots.load(), c.streams.load()); err != nil {
		return err
	}
	_, _ = c.evictor.evict(0) // the next fill meets the failure
	return nil
}

// tend does the periodic work: it makes durable, stores what is held in memory, and
// closes and removes streams that no image uses.
func (c *Cache) tend(ctx context.Context, every time.Duration) {
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := c.Sync(); err != nil {
				c.disk.log.Error("cannot make durable what was fetched; the next sync tries again", "err", err)
			}
			c.streams.held.store()
			c.streams.closeIdle(false)
			c.streams.removeEmpty()
		}
	}
}

// Sync makes durable all that is in the cache, and counts the space that it takes.
func (c *Cache) Sync() error {
	err := errors.Join(c.writer.sync(), c.streams.sync())
	c.evictor.measure()
	return err
}

// Close makes all durable and gives the directory back. All views have been
// released by then.
func (c *Cache) Close() error {
	if c.stop != nil {
		c.stop()
	}
	c.wg.Wait()
	c.streams.reads.close() // those that nobody waits for still pin chunks
	return errors.Join(c.Sync(), c.streams.close(), c.lock.Close())
}

// Stream returns the stream that t describes, to be given back by Release. It is
// empty if the cache does not have it. Two tables of the same content have the
// same stream.
func (c *Cache) Stream(t *Table) (*Stream, error) { return c.streams.acquire(t), nil }

// Blob returns the small blob of that digest, or fs.ErrNotExist. One that has
// been damaged is removed, and does not exist.
func (c *Cache) Blob(d Digest) ([]byte, error) { return c.small.blob(d) }

// PutBlob keeps b for a later Blob. Where it fails the caller can go on without:
// a restart then needs the registry. AddRoot comes first: a blob that no root
// holds is the first to be evicted.
func (c *Cache) PutBlob(b []byte) error { return c.small.putBlob(b) }

// Ref returns what PutRef kept under name, or fs.ErrNotExist. After a power cut
// it may be anything: the caller checks it.
func (c *Cache) Ref(name string) ([]byte, error) { return c.small.ref(name) }

// PutRef keeps b under a name, in place of what the name had before.
func (c *Cache) PutRef(name string, b []byte) error { return c.small.putRef(name, b) }

// AddRoot notes that an image needs the streams, small blobs and names of r,
// besides those that it is known to need. A name leads to one image: the roots of
// other images lose the names of r. The next Sync makes the root durable. Where
// AddRoot fails because of the disk, the root lasts as long as the process.
func (c *Cache) AddRoot(r Root) error { return c.roots.add(r) }

// RemoveRoot removes the root of an image, durably. What no other root holds is
// then the first to be evicted.
func (c *Cache) RemoveRoot(image Digest) error {
	_, err := c.roots.remove(image)
	return errors.Join(err, c.disk.fs.SyncDir(c.disk.path(rootsDir)))
}

// Roots are the roots of the cache, the most recently used first.
func (c *Cache) Roots() []Root {
	var roots []Root
	for _, r := range c.roots.all() {
		roots = append(roots, r.Root)
	}
	return roots
}

// Quota bounds the bytes on disk; 0 means that only the disk does.
func (c *Cache) Quota() int64 { return c.disk.quota }

// Used is the number of bytes that the directory takes on disk.
func (c *Cache) Used() int64 { return c.disk.used.Load() }

// Held is the number of bytes in memory that the disk had no room for.
func (c *Cache) Held() int64 { return c.streams.held.size() }

// Dropped counts the streams and small files that were damaged and removed.
func (c *Cache) Dropped() int64 { return c.disk.dropped.Load() }

// Damaged counts the chunks that could not be read when a reader wanted them.
func (c *Cache) Damaged() int64 { return c.disk.damaged.Load() }

// Evicted counts the bytes that were evicted to make room.
func (c *Cache) Evicted() int64 { return c.evictor.evicted.Load() }

// OpenStreams is how many streams have their files open.
func (c *Cache) OpenStreams() int64 { return c.streams.open.Load() }
