package tracefile

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"
)

// maxMerge bounds the ranges that Merge takes, and so its memory: some 200
// bytes for each.
const maxMerge = 1 << 21

// Merge makes one trace of several of the same image. A trace that was merged itself
// counts for as many starts as it is of. Blocks that more than half of the starts
// touch come first, ordered by their median time. The others follow: the fewer starts
// touch a block, the later it comes. The times stay the medians, so time goes back
// there. Merge fails with ErrOtherImage where the traces are not all of one image.
func Merge(traces ...*Trace) (*Trace, error) {
	if len(traces) == 0 {
		return nil, errors.New("merge traces: no trace is given")
	}
	m := &Trace{Header: traces[0].Header, End: End{Why: Merged}}
	m.Starts = 0
	ranges := 0
	for i, t := range traces {
		if t.Index != m.Index || t.Blocks != m.Blocks {
			return nil, fmt.Errorf("merge traces: %w: of index sha256:%.12s…, the first one of sha256:%.12s…",
				ErrOtherImage, t.Index, m.Index)
		}
		if err := t.check(); err != nil {
			return nil, fmt.Errorf("merge traces: number %d: %w", i+1, err)
		}
		ranges += len(t.Touches)
		if ranges > maxMerge || int(m.Starts)+int(t.Starts) > maxStarts {
			return nil, fmt.Errorf("merge traces: more than %d ranges or %d starts", maxMerge, maxStarts)
		}
		m.Starts += t.Starts
		m.After = max(m.After, t.After)
		m.Dropped += t.Dropped
	}
	m.Touches = overlay(traces, ranges)
	// Among blocks that more than half of the starts touch, time decides: a
	// block that nine of ten touch early must not wait for one that all ten
	// touch at the end.
	few := func(t Touch) uint32 {
		if t.Starts > m.Starts/2 {
			return 0
		}
		return m.Starts - t.Starts
	}
	slices.SortFunc(m.Touches, func(a, b Touch) int {
		return cmp.Or(cmp.Compare(few(a), few(b)), cmp.Compare(a.At, b.At), cmp.Compare(a.Block, b.Block))
	})
	return m, nil
}

// DefaultLeast is the percentage of starts that have to touch a block for it to be packed
// into a bundle.
const DefaultLeast = 25

// leastStarts is how many starts it takes to tell which blocks few of them touch.
const leastStarts = 4

// Common returns the trace without what fewer than least percent of its starts touched, and
// how many bytes that was. A bundle is downloaded from its beginning to its end, so each
// start waits for what other starts have read. Of fewer than four starts the trace stays as
// it is: what one of them touched may well be touched by half of the next.
func (t *Trace) Common(least int) (common *Trace, rare int64) {
	if t.Starts < leastStarts {
		return t, 0
	}
	c := *t
	c.Touches = nil
	for _, x := range t.Touches {
		if int64(max(x.Starts, 1))*100 < int64(t.Starts)*int64(least) {
			rare += x.Bytes()
		} else {
			c.Touches = append(c.Touches, x)
		}
	}
	return &c, rare
}

// overlay cuts the device where a touch of any trace begins or ends, and returns
// the pieces that some touch covers, sorted by block, each with the median of
// its times. Pieces that are alike are merged again.
func overlay(traces []*Trace, ranges int) []Touch {
	all := make([]Touch, 0, ranges)
	cuts := make([]uint64, 0, 2*ranges)
	for _, t := range traces {
		for _, x := range t.Touches {
			x.Starts = max(x.Starts, 1)
			all = append(all, x)
			cuts = append(cuts, uint64(x.Block), x.end())
		}
	}
	slices.SortStableFunc(all, func(a, b Touch) int { return cmp.Compare(a.Block, b.Block) })
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)
	var pieces []Touch
	var here []Touch // the touches that cover the piece, one of a trace at most
	for i := 0; i+1 < len(cuts); i++ {
		from, to := cuts[i], cuts[i+1]
		here = slices.DeleteFunc(here, func(x Touch) bool { return x.end() <= from })
		for len(all) > 0 && uint64(all[0].Block) == from {
			here = append(here, all[0])
			all = all[1:]
		}
		if len(here) == 0 {
			continue
		}
		p := median(here)
		p.Block, p.Count = uint32(from), uint32(to-from)
		if n := len(pieces); n > 0 && alike(pieces[n-1], p) {
			pieces[n-1].Count += p.Count
			continue
		}
		pieces = append(pieces, p)
	}
	return pieces
}

// alike says that b goes on where a ends, at nearly the same time.
func alike(a, b Touch) bool {
	return a.end() == uint64(b.Block) && a.Starts == b.Starts && a.Miss == b.Miss && (b.At-a.At).Abs() <= joinTime
}

// median sums up touches of the same blocks. It sorts them.
func median(touches []Touch) (m Touch) {
	slices.SortFunc(touches, func(a, b Touch) int { return cmp.Compare(a.At, b.At) })
	var misses uint32
	for _, x := range touches {
		m.Starts += x.Starts
		if x.Miss {
			misses += x.Starts
		}
	}
	m.Miss = misses > m.Starts/2
	var n uint32
	for _, x := range touches {
		if n += x.Starts; 2*n >= m.Starts {
			m.At = x.At.Truncate(time.Microsecond)
			break
		}
	}
	return m
}
