package host

import (
	"context"
	"errors"
	"fmt"

	"thaw/blockmap"
)

// This file finds what is behind a node: an image, or an overlay of its own over an image.

// ownOverlay is the overlay of a device that belongs to one node.
type ownOverlay struct {
	dir      string // absolute
	limit    int64
	existing bool // a server that was killed had it: without it, its node is not served
}

// acquireNode makes a node a user of the device behind it: of the image of that name, or of
// the overlay own over it. The caller calls release once.
func (h *Host) acquireNode(ctx context.Context, image string, own *ownOverlay) (d *Device, dev blockmap.Device, release func(), err error) {
	if own == nil {
		if d, release, err = h.acquireImage(ctx, image); err != nil {
			return nil, nil, nil, err
		}
		return d, d.whose().below, release, nil
	}
	d, release, err = h.devices.acquirePrivate(ctx, Spec{Name: image + clientMark + own.dir, Image: image}, own)
	if err != nil {
		return nil, nil, nil, err
	}
	return d, d.overlay, release, nil
}

// acquireImage makes the caller a user of a device that has the image of that name, without
// an overlay that the host may have put over it.
func (h *Host) acquireImage(ctx context.Context, name string) (*Device, func(), error) {
	if h.overlays.Dir != "" || h.overlays.Ephemeral {
		return h.devices.acquirePrivate(ctx, Spec{Name: name, Image: name}, nil)
	}
	return h.devices.acquire(ctx, name, func(string) bool { return true })
}

// acquirePrivate is acquire for a device that clients cannot reach.
func (t *devices) acquirePrivate(ctx context.Context, spec Spec, own *ownOverlay) (*Device, func(), error) {
	d, err := t.joinPrivate(spec, own)
	if err != nil {
		return nil, nil, err
	}
	return t.await(ctx, d)
}

func (t *devices) joinPrivate(spec Spec, own *ownOverlay) (*Device, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	d := t.mu.named[deviceKey{spec.Name, true}]
	if d == nil {
		if t.mu.stopping {
			return nil, ErrClosed
		}
		d = t.begin(&Device{spec: spec, private: true, own: own}, openTimeout)
	}
	t.use(d)
	return d, nil
}

// openOwn opens the overlay of a node over the image of another device.
func (h *Host) openOwn(ctx context.Context, d *Device) (err error) {
	name, err := h.overlays.base(d.own.dir, d.spec.Image, h.finder.Pins)
	if err != nil {
		return err
	}
	base, release, err := h.acquireImage(ctx, name)
	if err != nil {
		if name != d.spec.Image {
			err = fmt.Errorf("the base of overlay %s: %w", d.own.dir, err)
		}
		return err
	}
	image := base.whose()
	if d.overlay, err = h.overlays.openWith(d.own.dir, blockmap.OverlayOptions{Limit: d.own.limit, Existing: d.own.existing}, image.below, image.image.of); err != nil {
		release()
		if errors.Is(err, blockmap.ErrLocked) {
			err = ConflictError{fmt.Errorf("%w: only one node or server can have an overlay", err)}
		}
		return err
	}
	d.base, d.leaveBase, d.dir = image, release, d.own.dir
	if name != d.spec.Image {
		image.asking.Go(func() { h.traces.opener.checkTag(image.start.ctx, d.spec.Image, image.image.of) })
	}
	return nil
}
