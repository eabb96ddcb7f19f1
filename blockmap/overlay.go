package blockmap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"sync"
	"sync/atomic"
)

// Overlay is a WritableDevice: it keeps what is written, block by block, over a base that
// does not change. It lies in a directory that belongs to one process at a time, one user,
// and one image:
//
//	lock     held by the process
//	header   the image, and the size of the device: see overlayHeader
//	data     sparse: each changed block at the offset that it has on the device, see dataFile
//	live     which blocks are changed, see changeMap
//	map      which changes a flush has made durable
//	data.1, live.1, map.1  the same for the changes since a Freeze, until they are merged
//
// This is the way of a write. WriteAt divides it into steps of at most 8 MiB and takes the
// stripes of their blocks. Whole blocks go to the data file by one pwrite, without a look
// at what is below. If the map does not have them as data yet, the words that say so are
// written to the live copy of the map, by another pwrite; only then does the write
// return. So it outlives the process, and a second write to the same blocks is one pwrite
// and no more. A part of a block that has data is written as it is. Of any other block the
// rest is read first, from below and without the stripes, and the block is written as a
// whole.
//
// Zero and Discard change the map alone. The space of such blocks is given back by the
// next flush, once the durable copy of the map says that they are zeros.
//
// This is the way of a flush. Flush joins the next round: one round serves all who wait.
// A round takes a snapshot of the words that have changed, syncs the data file if anything
// was written, writes the words to the durable copy, and syncs the map: data before bit.
// A write that comes meanwhile waits for the next round. After a loss of power, each block
// is as the last flush has left it, or as a later write has. A sync that fails poisons the
// overlay: what the kernel could not write it forgets, and reports once.
//
// A read looks at the map, and costs a few loads where nothing was changed: see layers.
// Views of changed blocks point into the data file.
//
// A goroutine takes the locks in this order, and may leave out any:
//
//	Overlay.freezing
//	Overlay.syncing
//	stripes, in the order of the array
//	one of changeMap.mu, level.mu, rounds.mu
type Overlay struct {
	dir    string
	fs     FS
	boot   BootID
	log    *slog.Logger
	size   int64
	header overlayHeader
	temp   bool // it goes with the process

	volatile  bool      // nothing is made durable
	unpunched sync.Once // the log says that the space of zeroed blocks is not given back, of a volatile one
	existing  bool      // it is not made

	base    Device
	layers  atomic.Pointer[layers]
	memory  *pageCache
	reads   diskReads
	stripes stripes

	// dataBlocks and zeroBlocks are how many blocks read as data of the overlay, and as
	// zeros of it. They change under the stripes.
	dataBlocks, zeroBlocks atomic.Int64
	limit                  int64 // of dataBlocks; 0: none

	rounds rounds
	// syncing is held over a round, and while levels come and go.
	syncing        sync.Mutex
	retired        []retired // guarded by syncing
	flushes, syncs atomic.Int64
	poison         atomic.Pointer[error]
	closed         atomic.Bool // set with all stripes held

	freezing sync.Mutex // held by a Freeze, and to begin a merge
	merging  *merge     // the last one, guarded by freezing

	lock io.Closer
	life context.Context // ends when Close begins
	stop context.CancelFunc
	wg   sync.WaitGroup
}

var (
	_ WritableDevice = (*Overlay)(nil)
	_ AsyncDevice    = (*Overlay)(nil)
)

// OverlayOptions are the settings of an Overlay.
type OverlayOptions struct {
	// Image is the reference of the base by digest, by which the base can be opened
	// again. It is kept in the header.
	Image string
	// Digest is that of the base's manifest. An overlay of another image is refused.
	Digest Digest
	// Limit bounds the bytes of blocks with data; 0 means that only the disk does.
	// Beyond it writes fail with ErrNoSpace. While there are two levels, a block
	// that both have counts once and takes space twice.
	Limit int64
	// Boot is the boot ID of the machine. With the zero value an overlay that was
	// not closed is as its last flush has left it, also where only the process ended.
	Boot BootID
	// Volatile is for an overlay that has to outlive the process, and not the machine:
	// Flush does nothing. OpenOverlay fails with ErrVolatile where the kernel may not
	// have had all of it since.
	Volatile bool
	// Existing has OpenOverlay fail with ErrNoOverlay instead of making an overlay.
	Existing bool
	FS       FS           // defaults to OS
	Log      *slog.Logger // defaults to none
}

// OverlayStats says how much an overlay has.
type OverlayStats struct {
	Data    int64 // bytes of blocks that the overlay has data for
	Zero    int64 // bytes of blocks that it has made zeros
	Space   int64 // bytes that it takes on disk
	Limit   int64 // of Data; 0: none
	Flushes int64 // since it was opened
	Syncs   int64 // of files, for these flushes
	Err     error // why it takes no more writes; nil: it does
}

// newOverlay wires the parts of an overlay.
func newOverlay(dir string, base Device, opt OverlayOptions) (*Overlay, error) {
	o := &Overlay{dir: dir, fs: opt.FS, boot: opt.Boot, log: opt.Log, base: base, size: base.Size(), limit: opt.Limit / BlockSize, volatile: opt.Volatile, existing: opt.Existing}
	if o.fs == nil {
		o.fs = OS
	}
	if o.log == nil {
		o.log = slog.New(slog.DiscardHandler)
	}
	if opt.Limit < 0 || opt.Limit > 0 && o.limit == 0 {
		return nil, fmt.Errorf("the limit of %d bytes is less than a block: it must be at least %d", opt.Limit, BlockSize)
	}
	if o.size < 0 || o.size%BlockSize != 0 || o.size/BlockSize > maxOverlayBlocks {
		return nil, fmt.Errorf("a device of %d bytes cannot have an overlay: the size must be a multiple of %d, and at most %d", o.size, BlockSize, int64(maxOverlayBlocks)*BlockSize)
	}
	o.header = overlayHeader{size: o.size, digest: opt.Digest, image: opt.Image}
	o.memory = newPageCache(majorFaults)
	o.reads.log = o.log
	o.rounds.run = o.syncAll
	return o, nil
}

// maxOverlayBlocks bounds the device: 16 TiB less a word of blocks.
const maxOverlayBlocks = 1<<32 - perWord

func (o *Overlay) blocks() uint32 { return uint32(o.size / BlockSize) }

// start begins what goes on beside requests.
func (o *Overlay) start() {
	o.life, o.stop = context.WithCancel(context.Background())
	o.wg.Go(func() { o.memory.watch(o.life) })
}

// OpenEphemeral makes an overlay that goes with the process, for files without a name in
// dir. Flush does nothing.
func OpenEphemeral(dir string, base Device, opt OverlayOptions) (*Overlay, error) {
	o, err := newOverlay(dir, base, opt)
	if err != nil {
		return nil, fmt.Errorf("open ephemeral overlay in %s: %w", dir, err)
	}
	o.temp, o.volatile = true, true
	if err := o.fs.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("open ephemeral overlay: %w", err)
	}
	lv, err := o.newLevel("")
	if err != nil {
		return nil, fmt.Errorf("open ephemeral overlay in %s: %w", dir, err)
	}
	o.layers.Store(&layers{base: base, size: o.size, top: lv})
	o.start()
	return o, nil
}

// Close makes all durable, unlocks the directory, and waits for reads of the disk that
// nobody waits for. All views have been released by then.
func (o *Overlay) Close() error {
	o.stripes.lockAll()
	was := o.closed.Swap(true)
	o.stripes.unlockAll()
	if was {
		return nil
	}
	o.freezing.Lock() // no merge begins any more
	o.stop()
	o.freezing.Unlock()
	o.wg.Wait()
	var err error
	if o.poison.Load() == nil {
		err = o.rounds.join(context.Background(), o.clean)
	}
	o.rounds.close()
	o.reads.close()
	o.syncing.Lock()
	defer o.syncing.Unlock()
	for _, lv := range o.layers.Load().levels() {
		err = errors.Join(err, lv.close())
	}
	err = errors.Join(err, o.closeRetired())
	if len(o.retired) > 0 {
		err = errors.Join(err, errNotReleased)
	}
	if o.lock != nil {
		err = errors.Join(err, o.lock.Close())
	}
	if err != nil {
		return fmt.Errorf("close overlay %s: %w", o.dir, err)
	}
	return nil
}

// ErrVolatile means that writes to a volatile overlay may be lost: the machine has rebooted
// since, or the filesystem has been unmounted and mounted again, or the directory is a copy.
// Where FileID cannot tell the superblock in another mount namespace, as on overlayfs, a new
// namespace counts as such a mount.
var ErrVolatile = errors.New("what was written to it may be lost")

// ErrNoOverlay means that there is no overlay in a directory.
var ErrNoOverlay = errors.New("there is no overlay in this directory")

// errNotReleased means that somebody holds a view.
var errNotReleased = errors.New("a view of it was not released")

// Size implements Device.
func (o *Overlay) Size() int64 { return o.size }

// View implements Device.
func (o *Overlay) View(e Extent) (v View, ok bool) {
	s := o.layers.Load()
	if s.inBase(e) { // here, it saves a copy of the view
		return s.base.View(e)
	}
	return s.view(e)
}

// Load implements Device.
func (o *Overlay) Load(ctx context.Context, e Extent) (v View, ok bool) {
	return o.layers.Load().load(ctx, e)
}

// LoadAsync implements AsyncDevice.
func (o *Overlay) LoadAsync(e Extent, done func(v View, ok bool)) {
	o.layers.Load().loadAsync(e, done)
}

// Fault implements Device.
func (o *Overlay) Fault(ctx context.Context, e Extent) error {
	if o.closed.Load() {
		return fmt.Errorf("overlay %s: %w", o.dir, ErrClosed)
	}
	return o.layers.Load().fault(ctx, e)
}

// Status implements Device.
func (o *Overlay) Status(e Extent) Status { return o.layers.Load().status(e) }

// Prefetch implements Device.
func (o *Overlay) Prefetch(e Extent) { o.layers.Load().prefetch(e) }

// Stats says how much the overlay has.
func (o *Overlay) Stats() OverlayStats {
	st := OverlayStats{
		Data: o.dataBlocks.Load() * BlockSize, Zero: o.zeroBlocks.Load() * BlockSize, Limit: o.limit * BlockSize,
		Flushes: o.flushes.Load(), Syncs: o.syncs.Load(),
	}
	for _, lv := range o.layers.Load().levels() {
		if n, err := lv.space(); err == nil {
			st.Space += n
		}
	}
	if err := o.poison.Load(); err != nil {
		st.Err = *err
	}
	return st
}

// Changes walks the runs of changed blocks in the order of the device. Nobody writes
// meanwhile.
func (o *Overlay) Changes() iter.Seq[Change] { return o.layers.Load().changes }
