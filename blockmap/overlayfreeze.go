package blockmap

import (
	"context"
	"errors"
	"fmt"
	"iter"
)

// Frozen is an overlay as it was at a Freeze: a Device that nobody writes to. It is of use
// until Merge, or until the overlay is closed.
type Frozen struct {
	o      *Overlay
	layers *layers // the base and the frozen level
}

var _ AsyncDevice = (*Frozen)(nil)

// ErrFrozen means that an overlay has been frozen, and not merged since.
var ErrFrozen = errors.New("the overlay is frozen already: merge it first")

// Freeze makes all writes so far durable, and keeps them as they are: later writes go to a
// second level. There is one Frozen at a time. If the overlay is being merged, Freeze
// waits for that.
func (o *Overlay) Freeze(ctx context.Context) (*Frozen, error) {
	f, err := o.freeze(ctx)
	if err != nil {
		return nil, fmt.Errorf("freeze overlay %s: %w", o.dir, err)
	}
	return f, nil
}

func (o *Overlay) freeze(ctx context.Context) (*Frozen, error) {
	o.freezing.Lock()
	for o.layers.Load().merging {
		m, err := o.startMerge()
		o.freezing.Unlock()
		if err == nil {
			err = m.wait(ctx)
		}
		if err != nil {
			return nil, err
		}
		o.freezing.Lock()
	}
	defer o.freezing.Unlock()
	err := o.poison.Load()
	switch {
	case o.closed.Load():
		return nil, ErrClosed
	case err != nil:
		return nil, *err
	case o.layers.Load().low != nil:
		return nil, ErrFrozen
	}
	return o.addLevel()
}

// addLevel puts a new level on top, and makes the one below durable. A crash before the
// new one has its name leaves one level, and after that two, of which the upper one is
// empty. o.freezing is held.
func (o *Overlay) addLevel() (*Frozen, error) {
	upper, err := o.newLevel(upperSuffix)
	if err != nil {
		return nil, o.full(err)
	}
	o.syncing.Lock()
	defer o.syncing.Unlock()
	s := o.switchLayers(func(s layers) layers { return layers{top: upper, low: s.top} })
	if err := o.syncLayers(s); err != nil {
		// Nobody gets the Frozen whose Merge would end this freeze.
		o.switchLayers(func(s layers) layers { return layers{top: s.top, low: s.low, merging: true} })
		_, e := o.startMerge()
		return nil, errors.Join(err, e)
	}
	return &Frozen{o, &layers{base: o.base, size: o.size, top: s.low}}, nil
}

// switchLayers replaces the layers while nobody writes.
func (o *Overlay) switchLayers(to func(layers) layers) *layers {
	o.stripes.lockAll()
	defer o.stripes.unlockAll()
	s := to(*o.layers.Load())
	s.base, s.size = o.base, o.size
	o.layers.Store(&s)
	return &s
}

// Merge ends the freeze: both levels become one, beside reads and writes. Where ctx ends
// before that, or the disk has no room, the overlay goes on with two levels, and a later
// Merge, Freeze or OpenOverlay goes on with the merge.
func (f *Frozen) Merge(ctx context.Context) error {
	o := f.o
	o.freezing.Lock()
	s := o.layers.Load()
	if s.low != f.layers.top {
		o.freezing.Unlock()
		return nil // it was merged
	}
	if !s.merging {
		o.switchLayers(func(s layers) layers { return layers{top: s.top, low: s.low, merging: true} })
	}
	m, err := o.startMerge()
	o.freezing.Unlock()
	if err == nil {
		err = m.wait(ctx)
	}
	if err != nil {
		return fmt.Errorf("merge overlay %s: %w", o.dir, err)
	}
	return nil
}

// Size implements Device.
func (f *Frozen) Size() int64 { return f.layers.size }

// View implements Device.
func (f *Frozen) View(e Extent) (v View, ok bool) { return f.layers.view(e) }

// Load implements Device.
func (f *Frozen) Load(ctx context.Context, e Extent) (v View, ok bool) {
	return f.layers.load(ctx, e)
}

// LoadAsync implements AsyncDevice.
func (f *Frozen) LoadAsync(e Extent, done func(v View, ok bool)) { f.layers.loadAsync(e, done) }

// Fault implements Device.
func (f *Frozen) Fault(ctx context.Context, e Extent) error {
	if f.o.closed.Load() {
		return fmt.Errorf("overlay %s: %w", f.o.dir, ErrClosed)
	}
	return f.layers.fault(ctx, e)
}

// Status implements Device.
func (f *Frozen) Status(e Extent) Status { return f.layers.status(e) }

// Prefetch implements Device.
func (f *Frozen) Prefetch(e Extent) { f.layers.prefetch(e) }

// Changes walks the runs of changed blocks in the order of the device.
func (f *Frozen) Changes() iter.Seq[Change] { return f.layers.changes }
