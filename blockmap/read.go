package blockmap

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// pieceSize is how much of a large read is looked at at a time where the cache has
// no room for all of it.
const pieceSize = 1 << 20

// Read returns a view of e once all of it is there, bringing what is missing: the
// way of every transport's read that is not a hit. The view has e's bytes where
// they lie or, where the cache is too small to hold them together, copies that
// pin nothing.
func Read(ctx context.Context, d Device, e Extent) (View, error) {
	for range 2 {
		if v, ok := d.View(e); ok {
			return v, nil
		}
		if err := d.Fault(ctx, e); err != nil {
			return View{}, err
		}
	}
	if v, ok := d.View(e); ok {
		return v, nil
	}
	// Chunks go as fast as they come. One after the other gets through.
	var all View
	for at := e.Start; at < e.End; {
		next := Extent{at, min(e.End, (at/pieceSize+1)*pieceSize)}
		p := make([]byte, next.Len())
		if err := readInto(ctx, d, next, p); err != nil {
			return View{}, err
		}
		all.Append(p, nil, 0)
		at = next.End
	}
	return all, nil
}

// ReadInto reads e to p, which has its length.
func ReadInto(ctx context.Context, d Device, e Extent, p []byte) error {
	for e.Len() > 0 {
		next := Extent{e.Start, min(e.End, (e.Start/pieceSize+1)*pieceSize)}
		if err := readInto(ctx, d, next, p[:next.Len()]); err != nil {
			return err
		}
		p, e.Start = p[next.Len():], next.End
	}
	return nil
}

// readInto reads e, as much of it at a time as can be had together.
func readInto(ctx context.Context, d Device, e Extent, p []byte) error {
	for n := 0; ; n++ {
		if v, ok := d.View(e); ok {
			err := v.CopyTo(p)
			v.Release()
			if !errors.Is(err, ErrDamaged) {
				return err
			}
		}
		if n > 2 {
			// Evicted, closed or damaged again and again before we could look.
			if mid := (e.Start + e.Len()/2 + BlockSize - 1) &^ (BlockSize - 1); e.Start < mid && mid < e.End {
				if err := readInto(ctx, d, Extent{e.Start, mid}, p[:mid-e.Start]); err != nil {
					return err
				}
				p, e.Start, n = p[mid-e.Start:], mid, 0
				continue
			}
			select {
			case <-time.After(min(time.Duration(n)*time.Millisecond, 100*time.Millisecond)):
			case <-ctx.Done():
				return fmt.Errorf("read %v: %w", e, context.Cause(ctx))
			}
		}
		if err := d.Fault(ctx, e); err != nil {
			return err
		}
	}
}
