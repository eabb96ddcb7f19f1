package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"thaw/blockmap"
	"thaw/fetcher"
	"thaw/fetcher/registry"
	"thaw/nbd"
)

// Options are the settings of a Host.
type Options struct {
	// Finder finds the images. The host closes it.
	Finder *Finder
	// Dir is the cache directory. Only one process can use it at a time.
	Dir string
	// Mode says whether the cache uses the page cache. It defaults to blockmap.Buffered.
	Mode blockmap.Mode
	// Quota bounds the bytes in the cache: at least MinQuota, or 0 for no bound except
	// the size of the disk.
	Quota int64
	// Trace says what to record and what to prefetch when a device starts.
	Trace TraceOptions
	// Complete says when to fetch the rest of the images.
	Complete CompleteOptions
	// Overlay says whether clients may write.
	Overlay OverlayOptions
	// Decoders is the number of threads that decompress prefetched chunks. It defaults
	// to GOMAXPROCS.
	Decoders int
	// Sockets say where virtual machines find their disks.
	Sockets SocketOptions
	// NBD is the server whose counts Stats includes; nil for none.
	NBD *nbd.Server
	// Zone says which zone the host is a member of; its Name is empty for none.
	Zone ZoneOptions
	// Admission bounds the requests in flight of all nodes together; nil for no bound.
	Admission *nbd.Admission
	// EndsUnused says that the host is about to be stopped whenever nobody uses it.
	EndsUnused bool
	Patience   time.Duration // how long a start waits for a registry where it can go on without an answer; 0: 2 s
}

// MinQuota is the smallest quota of a cache. Transports read in windows of 4 MiB, which
// touch two of the largest chunks, and an eighth of the quota is for manifests and
// indexes. Four of the largest chunks have room for one request of any size, and for
// the next one.
const MinQuota = 4 * blockmap.MaxChunkBlocks * blockmap.BlockSize

// CheckQuota refuses a quota below MinQuota.
func CheckQuota(quota int64) error {
	if quota < 0 || quota > 0 && quota < MinQuota {
		return InvalidError{fmt.Errorf("a cache of %d bytes cannot hold what one request needs: the least size is %dM", quota, MinQuota>>20)}
	}
	return nil
}

// InvalidError says that a request is invalid in any state of the registry, the cache
// and the devices: repeating it does not help.
type InvalidError struct{ error }

func (e InvalidError) Unwrap() error { return e.error }

// Host is thaw on one host. The package documentation says which methods may run at
// once.
type Host struct {
	cache    *blockmap.Cache
	fetcher  *fetcher.Fetcher
	finder   *Finder
	traces   *tracer
	devices  *devices
	overlays *overlays
	commits  commits
	nodes    *nodes
	kept     kept
	sockets  *sockets
	zone     *hostZone // nil: none
	nbd      *nbd.Server
	meter    *meter
	mode     blockmap.Mode
	quota    int64
	began    time.Time
	once     atomic.Bool // a device was added to a host that takes one only
	dir      string
	log      *slog.Logger
	unused   bool // it ends when nobody uses it

	mu struct {
		sync.Mutex
		lost error // of overlays that could not be closed
	}

	limited context.CancelCauseFunc // ends the waits of Stop
	stop    sync.Once
	close   sync.Once
}

// absolute makes dir valid for processes that have another working directory.
func absolute(dir string) string {
	if abs, err := filepath.Abs(dir); err == nil {
		return abs
	}
	return dir
}

// Open opens the cache and makes a host without devices. If another process uses the
// cache directory, it fails with blockmap.ErrLocked. The caller closes the host.
func Open(o Options) (*Host, error) {
	h := &Host{finder: o.Finder, nbd: o.NBD, dir: absolute(o.Dir), mode: cmp.Or(o.Mode, blockmap.Buffered), quota: o.Quota, began: time.Now(), log: o.Finder.Log, unused: o.EndsUnused}
	boot := bootID(h.log)
	err := CheckQuota(o.Quota)
	if err == nil {
		h.overlays, err = newOverlays(o.Overlay, h.dir, boot, h.log)
	}
	if err == nil {
		h.sockets, err = newSockets(o.Sockets, h.log)
	}
	if err == nil {
		h.cache, err = blockmap.OpenCache(o.Dir, blockmap.CacheOptions{Mode: o.Mode, Quota: o.Quota, Boot: boot, Log: h.log})
	}
	if err != nil {
		o.Finder.Close()
		return nil, err
	}
	h.fetcher = fetcher.New(fetcher.Options{
		Decoders: o.Decoders, Log: h.log, Temporary: registry.Temporary, RetryAfter: registry.RetryAfter,
	})
	limit, limited := context.WithCancelCause(context.Background())
	h.limited = limited
	opener := &opener{Finder: o.Finder, cache: h.cache, fetcher: h.fetcher, patience: cmp.Or(o.Patience, patience)}
	if o.Zone.Name != "" {
		if h.zone, err = openZone(limit, o.Zone, opener); err != nil {
			limited(nil)
			h.fetcher.Close()
			o.Finder.Close()
			return nil, errors.Join(err, h.cache.Close())
		}
		opener.zone.Store(h.zone)
	}
	h.traces = newTracer(limit, o.Trace, opener, recordDir{o.Dir})
	h.traces.completer = newCompleter(o.Complete, h.cache, o.Dir)
	h.devices = newDevices(h.log, h.openDevice, h.closeDevice)
	h.devices.clients = h.overlays.clients()
	if o.Overlay.Ephemeral {
		h.devices.linger = ephemeralLinger
	}
	h.nodes = newNodes(h, o.Admission)
	h.meter = startMeter(h.moved)
	return h, nil
}

// Add opens devices concurrently; they stay open until Remove or Stop. It returns when
// all of them are ready. If one fails, Add returns the first error and adds none. If a
// client already has a device open, Add makes it permanent.
func (h *Host) Add(ctx context.Context, specs ...Spec) ([]*Device, error) {
	switch one := h.traces.Record != "" || h.overlays.Dir != ""; {
	case !one || len(specs) == 1 && !h.once.Swap(true):
	case h.overlays.Dir != "":
		return nil, InvalidError{conflict("this server keeps the changes of one device in %s, so it takes no other device", h.overlays.Dir)}
	default:
		return nil, InvalidError{conflict("this server records one start to %s, so it takes no other device", h.traces.Record)}
	}
	added, err := h.devices.add(ctx, specs)
	if err != nil {
		return nil, err
	}
	err = h.openSockets(ctx, added, specs)
	if err == nil {
		err = h.keep(added, specs)
	}
	if err != nil {
		for _, d := range added {
			h.devices.remove(d)
		}
		return nil, err
	}
	return added, nil
}

// Remove removes a device that was added: clients cannot open it any more. Remove waits
// until the last user has left and the device is closed. If ctx ends first, Remove
// returns the cause, and the device is closed later.
func (h *Host) Remove(ctx context.Context, id string) error {
	d := h.Device(id)
	if d == nil {
		return fmt.Errorf("remove device %s: %w", id, ErrNoDevice)
	}
	if !h.devices.remove(d) {
		return notAdded(id)
	}
	if err := h.forget(d); err != nil {
		return err
	}
	return d.awaitClosed(ctx)
}

// Acquire makes the caller a user of the device of that name, and waits until it is
// ready. If clients have overlays of their own, NAME~CLIENT is the device of that client
// over the image of the device NAME. "" is the default device: the device that was added while there was no other,
// or the only one that was added. If there is no such device, Acquire opens the image
// of that name if mayOpen is not nil and allows it. Otherwise it fails with
// ErrNoDevice. The caller calls release once, when it has no view of the device any
// more.
func (h *Host) Acquire(ctx context.Context, name string, mayOpen func(name string) bool) (d *Device, release func(), err error) {
	return h.devices.acquire(ctx, name, mayOpen)
}

// Devices lists all devices in the order of the requests for them, also those that are
// being opened or closed.
func (h *Host) Devices() []*Device { return h.devices.list() }

// Device returns the device with that ID, or nil if there is none.
func (h *Host) Device(id string) *Device {
	for _, d := range h.Devices() {
		if d.id == id {
			return d
		}
	}
	return nil
}

// SetServing says that clients can read from now on. Recordings that end before are not
// kept, because no client has read anything.
// The sockets for virtual machines are served from now on, too.
func (h *Host) SetServing() {
	h.traces.serving.Store(true)
	h.sockets.setServing()
	h.awaitClients()
}

// StopRecordings ends the recordings of all devices. It returns how many it has ended,
// once their files are complete or ctx has ended.
func (h *Host) StopRecordings(ctx context.Context) int { return h.traces.stopRecordings(ctx) }

// Stop ends the nodes as StopNodes does, and closes all devices; no transport may use one
// afterwards. Recordings end, and are
// stored if that is enabled. Stop waits for the registry, and for readers of
// recordings, until ctx ends. No device can be opened any more. Stop fails if an overlay
// could not be made durable: changes that no flush has covered may be lost then.
func (h *Host) Stop(ctx context.Context) error {
	h.stop.Do(func() {
		stop := context.AfterFunc(ctx, func() { h.limited(context.Cause(ctx)) })
		defer stop()
		h.commits.stop()
		_ = h.StopNodes(ctx)
		h.stopKept()
		h.devices.stop()
		h.kept.restoring.Wait()
		h.sockets.stop()
		h.traces.stop() // the starts of devices that are still in use
	})
	h.mu.Lock()
	defer h.mu.Unlock()
	return errors.Join(h.mu.lost, h.nodes.stopErr)
}

// Close stops the host, if Stop has not, and releases the cache directory. Stats may be
// called afterwards. If a node outlives the host, the cache stays open for it until the end
// of the process.
func (h *Host) Close() {
	h.close.Do(func() {
		over, cancel := context.WithCancel(context.Background())
		cancel()
		_ = h.Stop(over) // which has logged it
		h.limited(nil)
		h.meter.stop()
		if h.zone != nil {
			h.zone.close()
		}
		if h.nodes.outlived() {
			return
		}
		h.fetcher.Close()
		// Usually the disk is full. Only data that can be fetched again is lost.
		if err := h.cache.Close(); err != nil {
			h.log.Warn("the cache cannot be made durable; the newest chunks will be fetched again", "err", err)
		}
		h.finder.Close()
	})
}

// openDevice opens the image of that name for d, and begins its start.
func (t *tracer) openDevice(ctx context.Context, d *Device, name string) error {
	s, image, err := t.open(ctx, name)
	if err != nil {
		return err
	}
	block, err := s.attach(ctx, image)
	if err != nil {
		s.stop()
		image.close()
		return err
	}
	d.start, d.image, d.below, d.completion = s, image, block, t.completer.begin(s, image)
	return nil
}

// bootID identifies this run of the kernel. Without a boot ID, the cache trusts only
// blocks that were made durable.
func bootID(log *slog.Logger) blockmap.BootID {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	var id blockmap.BootID
	if err == nil {
		id, err = blockmap.ParseBootID(strings.TrimSpace(string(b)))
	}
	if err != nil {
		log.Warn("this machine has no boot ID; after a crash the newest chunks will be fetched again", "err", err)
	}
	return id
}
