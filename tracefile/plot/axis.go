package plot

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"thaw/blockmap"
	"thaw/tracefile"
)

// fold is an axis of the device, from 0 to 1, on which long empty stretches are
// short. A stretch is empty where the index has no content and the trace touches
// nothing.
type fold struct {
	end  int64             // of the device, as far as it is shown
	gaps []blockmap.Extent // folded, sorted
	unit float64           // of the axis, for a byte
}

const (
	gapWidth = 0.05 // of the axis, what a folded stretch takes
	maxGaps  = 4

	// A stretch is folded if it is longer than the rest divided by this. Free
	// space is folded as soon as it shows. Without an index it cannot be told
	// from data that was not read, and is folded only where it would leave
	// little room.
	gapPart    = 10
	unreadPart = 2
)

func newFold(points []tracefile.Point, ix *blockmap.Index) *fold {
	var busy []blockmap.Extent
	for _, x := range points {
		busy = append(busy, x.Extent)
	}
	if ix != nil {
		for _, run := range ix.Runs {
			busy = append(busy, blockmap.Range(int64(run.Device)*blockmap.BlockSize, int64(run.Count)*blockmap.BlockSize))
		}
	}
	slices.SortFunc(busy, func(a, b blockmap.Extent) int { return cmp.Compare(a.Start, b.Start) })
	f := &fold{}
	var gaps []blockmap.Extent
	for _, e := range busy {
		if e.Start > f.end {
			gaps = append(gaps, blockmap.Extent{Start: f.end, End: e.Start})
		}
		f.end = max(f.end, e.End)
	}
	f.end = max(f.end, blockmap.BlockSize)
	// The longest first: each folded stretch leaves a smaller rest, of which
	// the next one is a larger share.
	slices.SortFunc(gaps, func(a, b blockmap.Extent) int {
		return cmp.Or(cmp.Compare(b.Len(), a.Len()), cmp.Compare(a.Start, b.Start))
	})
	shown, part := f.end, int64(gapPart)
	if ix == nil {
		part = unreadPart
	}
	for _, g := range gaps {
		if rest := shown - g.Len(); len(f.gaps) == maxGaps || g.Len() <= rest/part {
			break
		}
		f.gaps = append(f.gaps, g)
		shown -= g.Len()
	}
	slices.SortFunc(f.gaps, func(a, b blockmap.Extent) int { return cmp.Compare(a.Start, b.Start) })
	f.unit = (1 - gapWidth*float64(len(f.gaps))) / float64(shown)
	return f
}

// at is the place of an offset on the axis.
func (f *fold) at(off int64) float64 {
	shown, folded := off, 0.0
	for _, g := range f.gaps {
		if off <= g.Start {
			break
		}
		in := min(off, g.End) - g.Start
		shown -= in
		folded += gapWidth * float64(in) / float64(g.Len())
	}
	return float64(shown)*f.unit + folded
}

// tick is a place on an axis that has a label.
type tick struct {
	at    float64
	label string
}

// ticks are at round offsets, some n of them, none in a folded stretch and none
// so close to another that their labels would touch.
func (f *fold) ticks(n int) []tick {
	step := max(byteStep(1/f.unit, n), blockmap.BlockSize)
	apart := 0.6 / float64(n)
	var all []tick
	add := func(off int64, label string) {
		at := f.at(off)
		if len(all) == 0 || at-all[len(all)-1].at >= apart {
			all = append(all, tick{at, label})
		}
	}
	from := int64(0)
	for _, g := range append(slices.Clone(f.gaps), blockmap.Extent{Start: f.end, End: f.end}) {
		for off := (from + step - 1) / step * step; off <= g.Start; off += step {
			add(off, bytesLabel(off))
		}
		if from = g.End; from < f.end {
			add(from, bytesString(from))
		}
	}
	return all
}

// byteStep is a power of two, of which some n are in total.
func byteStep(total float64, n int) int64 {
	step := int64(1)
	for float64(step)*float64(n) < total {
		step *= 2
	}
	return step
}

// byteTicks are at round numbers of bytes.
func byteTicks(top float64, n int) []tick {
	step := byteStep(top, n)
	var all []tick
	for x := int64(0); float64(x) <= top; x += step {
		all = append(all, tick{float64(x), bytesLabel(x)})
	}
	return all
}

// timeTicks are at round times, in seconds.
func timeTicks(span time.Duration, n int) []tick {
	step := math.Pow10(int(math.Floor(math.Log10(span.Seconds() / float64(n)))))
	for _, times := range []float64{2, 2.5, 2} { // 1, 2, 5, 10
		if span.Seconds()/step > float64(n) {
			step *= times
		}
	}
	digits := max(0, int(math.Ceil(-math.Log10(step)-1e-9)))
	var all []tick
	for i := 0; float64(i)*step <= span.Seconds()*(1+1e-9); i++ {
		label := strconv.FormatFloat(float64(i)*step, 'f', digits, 64)
		if span < time.Second/2 {
			label = strconv.FormatFloat(float64(i)*step*1e3, 'f', max(0, digits-3), 64)
		}
		all = append(all, tick{float64(i) * step, label})
	}
	return all
}

// timeUnit is that of timeTicks' labels.
func timeUnit(span time.Duration) string {
	if span < time.Second/2 {
		return "ms"
	}
	return "s"
}

func timeString(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%d µs", d.Microseconds())
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// bytesString is a size to three digits or so.
func bytesString(n int64) string {
	v, unit := binary(n)
	if v >= 100 || unit == "B" {
		return fmt.Sprintf("%.0f %s", v, unit)
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0") + " " + unit
}

// bytesLabel is a size as exactly as an axis needs it.
func bytesLabel(n int64) string {
	if n == 0 {
		return "0"
	}
	v, unit := binary(n)
	return strconv.FormatFloat(math.Round(v*100)/100, 'f', -1, 64) + " " + unit
}

func binary(n int64) (float64, string) {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	v, i := float64(n), 0
	for v >= 1024 && i < len(units)-1 {
		v /= 1024
		i++
	}
	return v, units[i]
}
