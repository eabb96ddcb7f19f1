package flatten

import (
	"iter"

	"thaw/blockmap"
)

// Changed is a device that was written to, and that says where: a blockmap.Overlay or a
// blockmap.Frozen. Nobody writes to it meanwhile.
type Changed interface {
	blockmap.Device
	// Changes are the runs of changed blocks, in the order of the device.
	Changes() iter.Seq[blockmap.Change]
}

// Over is a device, upper, that was written to on top of another one, lower, that was
// written to before. The changes of both are its changes.
func Over(upper, lower Changed) Changed { return over{upper, lower} }

type over struct {
	Changed // the upper one, which reads through to the lower one
	lower   Changed
}

// Changes merges both lists. Where both have a block, the upper one counts.
func (o over) Changes() iter.Seq[blockmap.Change] {
	return func(yield func(blockmap.Change) bool) {
		next, stop := iter.Pull(o.Changed.Changes())
		defer stop()
		up, more := next()
		for low := range o.lower.Changes() {
			for low.Len() > 0 {
				if !more || up.Start >= low.End {
					if !yield(low) {
						return
					}
					break
				}
				if up.Start > low.Start {
					if !yield(blockmap.Change{Extent: blockmap.Extent{Start: low.Start, End: up.Start}, Zero: low.Zero}) {
						return
					}
				}
				if up.End > low.End {
					break // all that is left of low is hidden
				}
				low.Start = max(low.Start, up.End)
				if !yield(up) {
					return
				}
				up, more = next()
			}
		}
		for more {
			if !yield(up) {
				return
			}
			up, more = next()
		}
	}
}

// subtract calls keep with the parts of r, in order, that are in none of gone, which is
// sorted. It returns the rest of gone, from the first that may concern a later range.
func subtract(r blockRange, gone []blockRange, keep func(blockRange)) []blockRange {
	end := r.start + r.count
	for r.start < end {
		for len(gone) > 0 && gone[0].start+gone[0].count <= r.start {
			gone = gone[1:]
		}
		if len(gone) == 0 || gone[0].start >= end {
			keep(blockRange{r.start, end - r.start})
			break
		}
		if g := gone[0]; g.start > r.start {
			keep(blockRange{r.start, g.start - r.start})
		}
		r.start = min(gone[0].start+gone[0].count, end)
	}
	return gone
}
