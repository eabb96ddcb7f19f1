package blockmap

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Resident reports whether all of e can be read without fetching anything.
func Resident(d Device, e Extent) bool {
	for e.Len() > 0 {
		st := d.Status(e)
		if !st.Resident || st.End <= e.Start {
			return false
		}
		e.Start = st.End
	}
	return true
}

// readWindow is how much of a large read is fetched and copied at a time. The
// read as a whole may be larger than the cache. The cache then evicts the
// beginning before the end has arrived, and fetches it again and again. A miss of
// this size waits for the network, not for the copy.
const readWindow = 4 << 20

// pieceSize is how much of a window is read at a time where the cache cannot hold
// the window.
const pieceSize = 1 << 20

// Read returns a view of e, and fetches what is missing. Every transport serves a
// read that View refuses by it: there is no other loop of Load and Fault. The view
// shows e's bytes where they lie if they are in memory, and copies if they come from
// the disk. Where e is larger than 4 MiB, or the cache is too small to hold e, the view
// shows copies only, which pin nothing.
func Read(ctx context.Context, d Device, e Extent) (View, error) {
	var all View
	for at := e.Start; ; {
		window := Extent{at, min(e.End, at+readWindow)}
		v, ok, err := look(ctx, d, window, true)
		switch {
		case err != nil:
		case ok && window == e:
			return v, nil
		case ok:
			err = appendCopy(ctx, d, window, &v, &all)
			v.Release()
		default:
			err = appendPieces(ctx, d, window, &all)
		}
		if err != nil {
			return View{}, err
		}
		if at = window.End; at >= e.End {
			return all, nil
		}
	}
}

// ReadInto reads e to p, which has its length.
func ReadInto(ctx context.Context, d Device, e Extent, p []byte) error {
	for e.Len() > 0 {
		next := Extent{e.Start, min(e.End, (e.Start/pieceSize+1)*pieceSize)}
		if err := readPiece(ctx, d, next, p[:next.Len()]); err != nil {
			return err
		}
		p, e.Start = p[next.Len():], next.End
	}
	return nil
}

// readTries is how many Faults a read of any size gets before it is divided:
// chunks may be evicted as fast as they arrive.
const readTries = 2

// look is the loop of Load and Fault. Where the bytes were evicted again after each
// of readTries Faults, ok is false and there is no error. With view set, it asks for a View of
// what was just fetched, which is in memory.
func look(ctx context.Context, d Device, e Extent, view bool) (v View, ok bool, err error) {
	for n := 0; ; n++ {
		if n > 0 && view {
			if v, ok := d.View(e); ok {
				return v, true, nil
			}
		}
		if v, ok := d.Load(ctx, e); ok {
			return v, true, nil
		}
		if n == readTries {
			return View{}, false, nil
		}
		if err := d.Fault(ctx, e); err != nil {
			return View{}, false, err
		}
	}
}

// appendCopy appends a copy of v, which shows e. Holes stay holes.
func appendCopy(ctx context.Context, d Device, e Extent, v, all *View) error {
	at := e.Start
	for i := range v.Segments() {
		s := &v.Segments()[i]
		n := int64(len(s.Bytes))
		switch {
		case s.Zero:
			all.AppendZeros(n)
		case s.Pinned() == 0: // a copy already
			all.add(*s)
			*s = Segment{}
		default:
			p := make([]byte, n)
			if err := CopyMapped(p, s.Bytes); err != nil {
				s.Damaged()
				if err := ReadInto(ctx, d, Range(at, n), p); err != nil {
					return err
				}
			}
			all.Append(p, nil, 0)
		}
		at += n
	}
	return nil
}

// appendPieces appends a copy of e, which the cache cannot hold as a whole.
func appendPieces(ctx context.Context, d Device, e Extent, all *View) error {
	for e.Len() > 0 {
		next := Extent{e.Start, min(e.End, (e.Start/pieceSize+1)*pieceSize)}
		p := make([]byte, next.Len())
		if err := readPiece(ctx, d, next, p); err != nil {
			return err
		}
		all.Append(p, nil, 0)
		e.Start = next.End
	}
	return nil
}

// readPiece reads e to p. Where e does not become resident as a whole, it reads the
// halves one after the other, down to one block, for which it tries until ctx ends.
func readPiece(ctx context.Context, d Device, e Extent, p []byte) error {
	view := true
	for n := 1; ; n++ {
		v, ok, err := look(ctx, d, e, view)
		if err != nil {
			return err
		}
		if ok {
			err := v.CopyTo(p)
			v.Release()
			if !errors.Is(err, ErrDamaged) {
				return err
			}
			view = false // what is mapped can fail again where a read by descriptor does not
			if n <= readTries {
				continue // the damaged bytes are absent now, and are fetched
			}
		}
		if mid := (e.Start + e.Len()/2 + BlockSize - 1) &^ (BlockSize - 1); e.Start < mid && mid < e.End {
			if err := readPiece(ctx, d, Extent{e.Start, mid}, p[:mid-e.Start]); err != nil {
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
}
