package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"thaw/blockmap"
	"thaw/fetcher/registry"
)

// This file puts overlays over images: a device is an image, an image with an overlay, or,
// for one client, an overlay over another device's image.

// openDevice opens d. One of the last host in the cache directory is tried again and again,
// until it is removed: whatever is in the way may pass, and its virtual machine waits.
func (h *Host) openDevice(ctx context.Context, d *Device) error {
	if d.spec.saved == nil {
		return h.openOnce(ctx, d)
	}
	for wait := restoreEvery; ; wait = min(2*wait, restoreLeast) {
		err := h.openOnce(ctx, d)
		if err == nil || ctx.Err() != nil {
			return err
		}
		d.of.mu.Lock()
		changed := d.trouble == nil || d.trouble.Error() != err.Error()
		if d.trouble == nil {
			close(d.troubles)
		}
		d.trouble = err
		d.of.mu.Unlock()
		if changed {
			h.log.Error("a device of the last server cannot be opened yet", "device", d.spec.Name, "err", err)
		}
		if pause(ctx, wait) != nil {
			return err
		}
	}
}

func (h *Host) openOnce(ctx context.Context, d *Device) (err error) {
	defer func() {
		if err != nil {
			h.kept.disclaim(d)
		}
	}()
	switch {
	case d.client != "":
		return h.openClient(ctx, d)
	case d.own != nil:
		return h.openOwn(ctx, d)
	case d.private:
		return h.traces.openDevice(ctx, d, d.spec.Image)
	}
	name := d.spec.Image
	dir := h.overlays.Dir
	left := h.left(d)
	switch {
	case dir != "":
		if name, err = h.overlays.base(dir, name, h.finder.Pins); err != nil {
			return err
		}
	case left != nil:
		name = left.Base
	case d.spec.saved != nil:
		name = d.spec.saved.Base // a machine has read from it: the tag may mean another image by now
	}
	if err := h.traces.openDevice(ctx, d, name); err != nil {
		if dir != "" {
			err = fmt.Errorf("the base of overlay %s: %w", dir, err)
		}
		return err
	}
	if dir != "" || h.overlays.Ephemeral {
		if dir != "" {
			d.overlay, err = h.overlays.open(dir, d.below, d.image.of)
		} else {
			d.overlay, err = h.openEphemeral(d, left, d.below, d.image.of)
		}
		if err != nil {
			closeImage(d)
			return err
		}
		d.dir = dir
	}
	if name != d.spec.Image && d.overlay != nil {
		d.asking.Go(func() { h.traces.opener.checkTag(d.start.ctx, d.spec.Image, d.image.of) })
	}
	return nil
}

// openClient opens an overlay for one client over the image of another device.
func (h *Host) openClient(ctx context.Context, d *Device) (err error) {
	dir, err := h.overlays.dirOf(d.client)
	if err != nil {
		return err
	}
	left := h.left(d) // before anything is waited for, or it may be forgotten meanwhile
	// A client that connects again at once waits until its changes are on disk.
	for _, x := range d.after {
		select {
		case <-x.closed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	d.after = nil
	may := func(string) bool { return d.mayOpenBase }
	var base *Device
	var release func()
	switch k := d.spec.saved; {
	case h.devices.byName(d.spec.Image) != nil, k == nil && !h.overlays.Ephemeral:
		base, release, err = h.devices.acquire(ctx, d.spec.Image, may)
	case !d.mayOpenBase:
		return ErrNoDevice
	case k != nil:
		base, release, err = h.acquireImage(ctx, k.Base) // the tag may mean another image by now, or be gone
	default:
		base, release, err = h.acquireImage(ctx, d.spec.Image) // without an overlay that nobody writes to
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	if base.client != "" {
		return ErrNoDevice // IMAGE~ONE~TWO
	}
	name := base.spec.Image
	switch {
	case dir != "":
		if name, err = h.overlays.base(dir, base.spec.Image, h.finder.Pins); err != nil {
			return err
		}
	case left != nil:
		name = left.Base
	}
	if ref, err := registry.ParseRef(name); err == nil && name != base.spec.Image && ref.Digest != base.image.of.Digest {
		h.log.Warn("the name means another image by now; the overlay's own base is served", "image", base.spec.Image, "overlay", dir, "base", name)
		own, releaseOwn, err := h.acquireImage(ctx, name)
		if err != nil {
			return fmt.Errorf("the base of the overlay of %s: %w", d.spec.Name, err)
		}
		release()
		base, release = own, releaseOwn
	}
	if dir != "" {
		// A guest may go on with its disk: it never finds it as it was before its changes.
		existing := d.spec.saved != nil && d.spec.saved.Overlay == dir
		d.overlay, err = h.overlays.openWith(dir, blockmap.OverlayOptions{Limit: h.overlays.Limit, Existing: existing}, base.below, base.image.of)
		if errors.Is(err, blockmap.ErrNoOverlay) {
			err = fmt.Errorf("%w: the last server had one there: put it back, or remove the device", err)
		}
	} else {
		d.overlay, err = h.openEphemeral(d, left, base.below, base.image.of)
	}
	if err != nil {
		return err
	}
	d.base, d.leaveBase, d.dir = base, release, dir
	return nil
}

// closeDevice closes d, which nobody uses.
func (h *Host) closeDevice(d *Device) {
	if d.overlay != nil {
		poison := d.overlay.Stats().Err
		if err := cmp.Or(d.overlay.Close(), poison); err != nil {
			err = fmt.Errorf("close the overlay of %s: %w", d.spec.Name, err)
			h.log.Error("changes that no flush has covered may be lost", "device", d.spec.Name, "err", err)
			h.mu.Lock()
			h.mu.lost = errors.Join(h.mu.lost, err)
			h.mu.Unlock()
		}
		h.endEphemeral(d)
	}
	if d.base != nil {
		d.leaveBase()
		return
	}
	closeImage(d)
}

func closeImage(d *Device) {
	d.completion.stop()
	d.start.stop()
	d.asking.Wait()
	d.image.close()
}

// Overlay is the overlay of the device, or nil if the device is read-only.
func (d *Device) Overlay() *blockmap.Overlay {
	select {
	case <-d.ready:
		return d.overlay
	default:
		return nil
	}
}

// overlayInfo describes the overlay of d, which is open.
func (d *Device) overlayInfo() *OverlayInfo {
	if d.overlay == nil {
		return nil
	}
	st := d.overlay.Stats()
	in := &OverlayInfo{
		Directory: d.dir, Data: st.Data, Zero: st.Zero, Space: st.Space, Limit: st.Limit, Flushes: st.Flushes, Syncs: st.Syncs,
	}
	if st.Err != nil {
		in.Error = st.Err.Error()
	}
	return in
}
