package blockmap

import "sync/atomic"

// clock is the time by which the evictor orders uses. It moves once in
// fillsATick fills, so that a hit rarely writes to memory that others read. It
// may wrap: ages are differences.
//
// It only has even times. A use that is a fill has the odd time behind, so the last
// use of a chunk also says whether it was viewed since it was filled.
type clock struct{ tick, fills atomic.Uint32 }

const fillsATick = 64

func (c *clock) now() uint32 { return c.tick.Load() }

// fill is the use of a chunk by a fill now.
func (c *clock) fill() uint32 { return c.now() | 1 }

// isView says whether a use was a view.
func isView(use uint32) bool { return use%2 == 0 }

// timeOf is the time of a use.
func timeOf(use uint32) uint32 { return use &^ 1 }

func (c *clock) filled() {
	if c.fills.Add(1)%fillsATick == 0 {
		c.tick.Add(2)
	}
}
