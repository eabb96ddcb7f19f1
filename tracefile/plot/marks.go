package plot

import (
	"cmp"
	"slices"

	"thaw/blockmap"
	"thaw/tracefile"
)

// mark is what is drawn for a touch, or for several that would cover each other.
type mark struct {
	at       float64 // seconds
	from, to float64 // on the folded axis, 0 to 1
}

// The first cells into which touches are sorted are some pixels wide and one
// high.
const (
	columns = 500
	rows    = 500
)

// mark makes the marks of all series. Touches become one mark if they are in the same
// cell of time and the same series, are all hits or all misses, and are less than a
// cell apart on the device. The cells grow until the marks are few enough.
func (p *Picture) mark(points []tracefile.Point) {
	of := p.seriesOf()
	type touch struct {
		mark
		kind int // series, and hit or missed
	}
	touches := make([]touch, len(points))
	for i, x := range points {
		kind := 2 * of[x.Stream]
		if x.Miss {
			kind++
		}
		touches[i] = touch{mark{x.At.Seconds(), p.fold.at(x.Extent.Start), p.fold.at(x.Extent.End)}, kind}
	}
	for scale := 1.0; ; scale *= 1.25 {
		column := func(t touch) int { return int(t.at / p.span.Seconds() * columns / scale) }
		slices.SortFunc(touches, func(a, b touch) int {
			return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(column(a), column(b)), cmp.Compare(a.from, b.from), cmp.Compare(a.at, b.at))
		})
		var kept []touch
		for _, t := range touches {
			if n := len(kept); n > 0 {
				last := &kept[n-1]
				if t.kind == last.kind && column(t) == column(*last) && t.from-last.to < scale/rows {
					last.to = max(last.to, t.to)
					continue
				}
			}
			kept = append(kept, t)
		}
		// Two for a series is what the largest cell leaves.
		if len(kept) > maxMarks && scale < max(columns, rows) {
			continue
		}
		for _, t := range kept {
			s := &p.series[t.kind/2]
			if t.kind%2 == 1 {
				s.misses = append(s.misses, t.mark)
			} else {
				s.hits = append(s.hits, t.mark)
			}
		}
		return
	}
}

// layout says which series has most of each row of the device, read or not.
func (p *Picture) layout(ix *blockmap.Index) []stretch {
	of := p.seriesOf()
	const none = -1
	held := make([]map[int]float64, rows) // by series, of the row
	for _, run := range ix.Runs {
		series, ok := of[int(run.Stream)]
		if !ok {
			series = none
		}
		from, to := p.fold.at(int64(run.Device)*blockmap.BlockSize), p.fold.at(int64(run.Device+run.Count)*blockmap.BlockSize)
		for row := int(from * rows); row < rows && float64(row) < to*rows; row++ {
			if held[row] == nil {
				held[row] = make(map[int]float64)
			}
			held[row][series] += min(to*rows, float64(row+1)) - max(from*rows, float64(row))
		}
	}
	var strip []stretch
	for row, parts := range held {
		most := none
		for series, part := range parts {
			if part > parts[most] || part == parts[most] && series > most {
				most = series
			}
		}
		from, to := float64(row)/rows, float64(row+1)/rows
		switch n := len(strip); {
		case parts == nil || most == none:
		case n > 0 && strip[n-1].series == most && strip[n-1].to == from:
			strip[n-1].to = to
		default:
			strip = append(strip, stretch{from, to, most})
		}
	}
	return strip
}
