package flatten

import (
	"context"
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"
)

// adopt finds a conversion that the target lacks in the places of Options.Reuse, and
// makes it one of the target, so that the next build finds it there. What is found is
// checked as a conversion of the target is. It only saves work: any failure counts as
// no conversion.
func (b *builder) adopt(ctx context.Context, i int, tag string) *converted {
	if len(b.places) == 0 {
		return nil
	}
	// All places are asked at once, so that more of them take no more time.
	found := make([][]byte, len(b.places))
	var g errgroup.Group
	for k, p := range b.places {
		g.Go(guarded(func() error {
			raw, err := p.Tagged(ctx, tag)
			if err != nil && ctx.Err() == nil {
				b.Log.Debug("cannot look up a converted layer", "place", p.String(), "tag", tag, "err", err)
			}
			found[k] = raw
			return nil
		}))
	}
	if err := g.Wait(); err != nil {
		b.Log.Warn("cannot look up a converted layer", "tag", tag, "err", err)
		return nil
	}
	for k, p := range b.places {
		if found[k] == nil {
			continue
		}
		c, err := b.bring(ctx, i, found[k], p)
		if err == nil {
			if err := b.pushConversion(ctx, c, tag); err != nil && ctx.Err() == nil {
				b.Log.Warn("the target has the parts of the converted layer, but not its tag: later builds will look for it again", "tag", tag, "err", err)
			}
			return c
		}
		if ctx.Err() != nil {
			return nil
		}
		b.Log.Warn("cannot reuse a conversion of the layer", "place", p.String(), "tag", tag, "err", err)
	}
	return nil
}

// bring makes the parts of a conversion parts of the target.
func (b *builder) bring(ctx context.Context, i int, raw []byte, from *place) (*converted, error) {
	c, err := b.readLayer(ctx, i, raw, from)
	if err != nil {
		return nil, err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(guarded(func() error { return b.dst.PushBytes(ctx, describe(MediaTypeTOC, c.toc), c.toc) }))
	if c.stream != nil {
		g.Go(guarded(func() error {
			mounted, err := b.dst.Mount(ctx, *c.stream, from.Place)
			if err != nil || mounted {
				return err
			}
			return b.copy(ctx, i, *c.stream, from)
		}))
	}
	return c, g.Wait()
}

// copy downloads a stream from a place, and pushes it.
func (b *builder) copy(ctx context.Context, i int, d v1.Descriptor, from *place) error {
	room, err := b.bounds.room.take(ctx, i, d.Size)
	if err != nil {
		return err
	}
	defer b.bounds.room.give(room)
	b.Progress.Push(i, d.Size)
	return copyBlob(ctx, b.streams.temp, from, b.dst, d, func(n int64) { b.Progress.Pushed(i, n) })
}

// copyBlob copies a blob by way of a temporary file.
func copyBlob(ctx context.Context, temp *tempDir, from *place, to Target, d v1.Descriptor, progress func(sent int64)) error {
	in, err := from.OpenBlob(ctx, d)
	if err != nil {
		return err
	}
	defer in.Close()
	f, err := temp.create()
	if err != nil {
		return err
	}
	defer f.discard()
	if _, err := f.ReadFrom(in); err != nil {
		return fmt.Errorf("copy the stream: %w", err)
	}
	return to.PushFile(ctx, d, f.Name(), progress)
}
