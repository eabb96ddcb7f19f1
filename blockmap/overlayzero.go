package blockmap

import (
	"context"
	"errors"
	"fmt"
)

// Zero implements WritableDevice.
func (o *Overlay) Zero(ctx context.Context, e Extent, mayDiscard bool) error {
	if err := o.zero(ctx, e, mayDiscard); err != nil {
		return fmt.Errorf("zero bytes %v of overlay %s: %w", e, o.dir, err)
	}
	return nil
}

// Discard implements WritableDevice.
func (o *Overlay) Discard(ctx context.Context, e Extent) error {
	if err := o.zero(ctx, e, true); err != nil {
		return fmt.Errorf("discard bytes %v of overlay %s: %w", e, o.dir, err)
	}
	return nil
}

// zero makes e read as zeros: whole blocks by their state, or by zeros that have space;
// parts of blocks by a write.
func (o *Overlay) zero(ctx context.Context, e Extent, mayDiscard bool) error {
	if err := o.admit(e); err != nil {
		return err
	}
	for at := e.Start; at < e.End; {
		end := min(e.End, (at/stepSize+1)*stepSize)
		whole := Extent{(at + BlockSize - 1) &^ (BlockSize - 1), end &^ (BlockSize - 1)}
		switch {
		case at%BlockSize != 0 || whole.Len() <= 0:
			end = min(e.End, at&^(BlockSize-1)+BlockSize)
			if err := o.writeStep(ctx, zeros[:end-at], at); err != nil {
				return err
			}
		default:
			if err := o.zeroStep(ctx, whole, mayDiscard); err != nil {
				return err
			}
			end = whole.End
		}
		at = end
	}
	return nil
}

// zeroStep makes whole blocks zeros.
func (o *Overlay) zeroStep(ctx context.Context, e Extent, mayDiscard bool) error {
	b, n := blocksOf(e)
	first, end := wordsOf(b, n)
	if err := o.replaceCut(o.layers.Load().target()); err != nil {
		return err
	}
	for flushed := false; ; {
		o.stripes.lock(first, end)
		err := o.zeroBlocksOf(b, n, mayDiscard)
		o.stripes.unlock(first, end)
		if !errors.Is(err, ErrNoSpace) || flushed || !o.reclaimable() {
			return err
		}
		flushed = true
		if err := o.Flush(ctx); err != nil {
			return err
		}
	}
}

// zeroBlocksOf makes n blocks from b zeros. The stripes are held.
func (o *Overlay) zeroBlocksOf(b, n uint32, mayDiscard bool) error {
	if o.closed.Load() {
		return ErrClosed
	}
	s := o.layers.Load()
	if mayDiscard {
		return o.mark(s, b, n, stateZero)
	}
	reserved, err := o.reserve(s, b, n)
	if err != nil {
		return err
	}
	t, e := s.target(), blockRange(b, n)
	if err = t.file.Load().zero(e.Start, e.Len()); err != nil {
		o.tidy(t, b, n)
		err = o.full(err)
	} else {
		t.wrote()
		t.trust(b, n)
		err = o.mark(s, b, n, stateData)
	}
	if err != nil {
		o.dataBlocks.Add(-reserved)
	}
	return err
}
