package host

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/blockmap"
	"thaw/blockmap/flatten"
	"thaw/fetcher/registry"
)

// This file makes block images of overlays: of one that no process has open, and of one
// that clients write to meanwhile.

// CommitOptions are the settings of a commit.
type CommitOptions struct {
	Target   string // reference of the new image, with a tag
	Dirty    flatten.Dirty
	Level    int    // zstd, 1 to 22; 0: the default
	TempDir  string // for streams until they are pushed; "": the system's
	Progress *flatten.CommitProgress
}

// ParseDirty reads what to do with a dirty filesystem: refuse, replay or crash-consistent.
// "" is refuse.
func ParseDirty(word string) (flatten.Dirty, error) {
	switch word {
	case "", "refuse":
		return flatten.RefuseDirty, nil
	case "replay":
		return flatten.ReplayJournal, nil
	case "crash-consistent":
		return flatten.CrashConsistent, nil
	}
	return 0, InvalidError{fmt.Errorf("a dirty filesystem %.20q: it must be refuse, replay or crash-consistent", word)}
}

// CommitTarget reads the reference of an image to commit to.
func CommitTarget(name string) (registry.Ref, error) {
	ref, err := registry.ParseRef(name)
	switch {
	case err != nil:
	case ref.Archive != "":
		err = fmt.Errorf("%s: archives cannot be written: give a registry reference or oci:DIR:TAG", name)
	case ref.Digest != (v1.Hash{}):
		err = fmt.Errorf("%s: a digest cannot be pushed to: give a tag", name)
	case ref.Tag == "":
		err = fmt.Errorf("%s: the new image needs a tag", name)
	}
	if err != nil {
		return registry.Ref{}, InvalidError{err}
	}
	return ref, nil
}

// CommitResult describes the image that was committed. Its JSON is what the control API
// answers.
type CommitResult struct {
	Target     string `json:"target"`
	Digest     string `json:"digest"`
	Base       string `json:"base"` // the block image, by digest
	DeviceSize int64  `json:"device_bytes"`
	Changed    int64  `json:"changed_bytes"`  // in blocks that were written
	Equal      int64  `json:"equal_bytes"`    // of these, in blocks that the base has in the same place
	Zeros      int64  `json:"zero_bytes"`     // in blocks that became zeros
	Content    int64  `json:"content_bytes"`  // in the new stream
	Stored     int64  `json:"stored_bytes"`   // of the new stream in the registry
	IndexBytes int64  `json:"index_bytes"`    // of the new index
	Uploaded   int64  `json:"uploaded_bytes"` // all that was sent
	Copied     int64  `json:"copied_bytes"`   // of streams of the base that the target lacked
	Mounted    int    `json:"mounted_streams"`
	Dropped    int    `json:"dropped_overlays"` // overlays of the base that nothing uses any more
	Filesystem string `json:"filesystem"`       // none, clean, replayed or dirty
	Replayed   int    `json:"replayed_blocks"`  // of the journal
}

// filesystemOf names the state in which a filesystem was committed.
func filesystemOf(s flatten.Settled) string {
	switch {
	case !s.Ext4:
		return "none"
	case s.Replayed.Needed:
		return "replayed"
	case s.Dirty:
		return "dirty"
	}
	return "clean"
}

// commit makes a block image of d, which was made of b and written to.
func (f *Finder) commit(ctx context.Context, d flatten.Changed, b *BlockImage, device blockmap.Device, s flatten.Settled, o CommitOptions) (*CommitResult, error) {
	ref, err := CommitTarget(o.Target)
	if err != nil {
		return nil, err
	}
	dst, err := f.Client.Open(ref)
	if err != nil {
		return nil, err
	}
	if err := dst.CheckPush(ctx); err != nil {
		return nil, err
	}
	defer f.Client.FinishUploads()
	if raw, _, err := dst.ReadManifest(ctx, ref); err == nil {
		if _, err := flatten.ParseImage(raw); errors.Is(err, flatten.ErrNotBlockImage) && !errors.Is(err, flatten.ErrFormat1) {
			return nil, InvalidError{conflict("%s is no block image, and the commit would take its place: give the new image a tag of its own", ref)}
		}
	}
	c, err := flatten.Commit(ctx, d, flatten.CommitBase{
		Image: b.Manifest, Index: b.Index, Device: device, Name: b.Reference(),
		Manifest: v1.Descriptor{MediaType: types.OCIManifestSchema1, Size: int64(len(b.Raw)), Digest: b.Digest},
		Place:    NewPlace(b.Repo), Here: canonical(ref).Place() == canonical(b.Repo.Ref()).Place(),
	}, NewTarget(dst), flatten.CommitOptions{Level: o.Level, TempDir: o.TempDir, Tag: ref.Tag, Progress: o.Progress, Log: f.Log})
	if err != nil {
		return nil, err
	}
	return &CommitResult{
		Target: ref.String(), Digest: c.Manifest.Digest.String(), Base: b.Reference(), DeviceSize: d.Size(),
		Changed: c.Changed, Equal: c.Equal, Zeros: c.Zeros, Content: c.Content, Stored: c.Stored, IndexBytes: c.IndexBytes,
		Uploaded: c.Uploaded, Copied: c.Copied, Mounted: c.Mounted, Dropped: c.Dropped,
		Filesystem: filesystemOf(s), Replayed: s.Replayed.Blocks,
	}, nil
}

// dirtyError is the refusal of a dirty filesystem.
func dirtyError(what string, err error) error {
	if !errors.Is(err, flatten.ErrDirty) {
		return err
	}
	return ConflictError{fmt.Errorf("%s: %w: pass --replay to replay its journal as a mount does, or --crash-consistent to commit it as it is after a loss of power", what, err)}
}

// ClosedOverlay is an overlay that no other process has open, over its base.
type ClosedOverlay struct {
	*blockmap.Overlay
	Dir  string
	Base *BlockImage

	host  *Host
	image *openImage
}

// OpenOverlay opens an overlay with its base, which its header names. The caller closes
// it before the host.
func (h *Host) OpenOverlay(ctx context.Context, dir string) (*ClosedOverlay, error) {
	dir = absolute(dir)
	info, err := blockmap.ReadOverlay(blockmap.OS, dir)
	if err != nil {
		return nil, err
	}
	if info.InUse {
		return nil, ConflictError{fmt.Errorf("open overlay %s: %w", dir, blockmap.ErrLocked)}
	}
	ref, err := registry.ParseRef(info.Image)
	if err != nil || digestOf(ref.Digest) != info.Digest {
		return nil, fmt.Errorf("overlay %s: its header names no image by digest: %q", dir, info.Image)
	}
	o := h.traces.opener
	image, err := o.open(ctx, info.Image, func(*BlockImage) {})
	if err != nil {
		return nil, fmt.Errorf("the base of overlay %s: %w", dir, err)
	}
	overlay, err := h.overlays.open(dir, image.Image, image.of)
	if err != nil {
		image.close()
		return nil, err
	}
	return &ClosedOverlay{overlay, dir, image.of, h, image}, nil
}

// BaseDevice is the device without the changes.
func (c *ClosedOverlay) BaseDevice() blockmap.Device { return c.image.Image }

// Estimate says how large a commit would be.
func (c *ClosedOverlay) Estimate(ctx context.Context, exact bool) (flatten.Estimate, error) {
	return flatten.EstimateCommit(ctx, c.Overlay, flatten.CommitBase{Image: c.Base.Manifest, Index: c.Base.Index, Device: c.image.Image}, exact)
}

// Commit makes a block image of the overlay. If the journal of its filesystem is to be
// replayed, the overlay has that as well afterwards.
func (c *ClosedOverlay) Commit(ctx context.Context, o CommitOptions) (*CommitResult, error) {
	s, err := flatten.Settle(ctx, c.Overlay, o.Dirty, func() (blockmap.WritableDevice, error) { return c.Overlay, nil })
	if err != nil {
		return nil, dirtyError("overlay "+c.Dir, err)
	}
	return c.host.finder.commit(ctx, c.Overlay, c.Base, c.image.Image, s, o)
}

// Close closes the overlay and its base.
func (c *ClosedOverlay) Close() error {
	err := c.Overlay.Close()
	c.image.close()
	return err
}

// CommitInfo says how far the commit of a device is, in bytes. Its JSON is what the
// control API answers.
type CommitInfo struct {
	Target  string `json:"target"`
	Changed int64  `json:"changed_bytes"`
	Read    int64  `json:"read_bytes"`
	Send    int64  `json:"send_bytes"` // 0 until all is read
	Sent    int64  `json:"sent_bytes"`
	Copy    int64  `json:"copy_bytes"` // streams of the base that the target lacks
	Copied  int64  `json:"copied_bytes"`
}

// NewCommitInfo says how far a commit is.
func NewCommitInfo(target string, p *flatten.CommitProgress) *CommitInfo {
	return &CommitInfo{target, p.Changed.Load(), p.Read.Load(), p.Send.Load(), p.Sent.Load(), p.Copy.Load(), p.Copied.Load()}
}

// running is a commit of a device.
type running struct {
	target   string
	progress flatten.CommitProgress
}

// commits are the commits of a host's devices.
type commits struct {
	once   sync.Once
	ctx    context.Context
	cancel context.CancelCauseFunc

	mu struct {
		sync.Mutex
		stopped bool
		wg      sync.WaitGroup
	}
}

// begin returns the context of a commit that is about to begin, and its end.
func (c *commits) begin(ctx context.Context) (context.Context, func(), error) {
	c.init()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.stopped {
		return nil, nil, ErrClosed
	}
	c.mu.wg.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(c.ctx, func() { cancel(ErrClosed) })
	return ctx, func() {
		stop()
		cancel(nil)
		c.mu.wg.Done()
	}, nil
}

func (c *commits) init() {
	c.once.Do(func() { c.ctx, c.cancel = context.WithCancelCause(context.Background()) })
}

// stop ends all commits, and waits for them.
func (c *commits) stop() {
	c.init()
	c.mu.Lock()
	c.mu.stopped = true
	c.mu.Unlock()
	c.cancel(ErrClosed)
	c.mu.wg.Wait()
}

// committing is the commit of a device that runs, or nil.
type committing struct{ atomic.Pointer[running] }

func (c *committing) info() *CommitInfo {
	r := c.Load()
	if r == nil {
		return nil
	}
	return NewCommitInfo(r.target, &r.progress)
}

// CommitDevice makes a block image of the device with that ID, which clients may write to
// meanwhile. The image has what was written before. The writes go to a second level of
// the overlay until the image is pushed, and then both become one again, also if the
// commit fails or ctx ends.
//
// A filesystem that is mounted is dirty. Its journal is replayed in a copy: the device
// stays as it is.
func (h *Host) CommitDevice(ctx context.Context, id string, o CommitOptions) (res *CommitResult, err error) {
	if _, err := CommitTarget(o.Target); err != nil {
		return nil, err
	}
	ctx, end, err := h.commits.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	d, release, err := h.useByID(id)
	if err != nil {
		return nil, err
	}
	defer release()
	if d.overlay == nil {
		return nil, InvalidError{conflict("commit device %s: it is read-only, so nothing has changed", id)}
	}
	run := &running{target: o.Target}
	if !d.committing.CompareAndSwap(nil, run) {
		return nil, conflict("commit device %s: another commit of it is running", id)
	}
	defer d.committing.Store(nil)
	o.Progress = &run.progress
	frozen, err := d.overlay.Freeze(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		// It goes on when the client has left. If the host stops, the overlay has two
		// levels until it is opened the next time.
		if mergeErr := frozen.Merge(h.commits.ctx); mergeErr != nil && !errors.Is(mergeErr, ErrClosed) {
			h.log.Warn("the overlay keeps two levels until the next commit, or until it is opened again", "device", d.spec.Name, "err", mergeErr)
		}
	}()
	image := d.whose().image
	var changed flatten.Changed = frozen
	var copied *blockmap.Overlay
	s, err := flatten.Settle(ctx, frozen, o.Dirty, func() (w blockmap.WritableDevice, err error) {
		copied, err = blockmap.OpenEphemeral(h.overlays.temp, frozen, blockmap.OverlayOptions{Log: h.log})
		return copied, err
	})
	if copied != nil {
		defer func() { _ = copied.Close() }()
		changed = flatten.Over(copied, frozen)
	}
	if err != nil {
		return nil, dirtyError("device "+id, err)
	}
	return h.finder.commit(ctx, changed, image.of, image.Image, s, o)
}

// useByID makes the caller a user of the device with that ID, which is open.
func (h *Host) useByID(id string) (d *Device, release func(), err error) {
	if d = h.Device(id); d == nil {
		return nil, nil, ErrNoDevice
	}
	t := h.devices
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.named[d.key()] != d || !d.isOpen() {
		return nil, nil, conflict("device %s is not open yet, or is closing", id)
	}
	t.use(d)
	return d, func() { t.release(d) }, nil
}
