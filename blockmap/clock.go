package blockmap

import "sync/atomic"

// clock is the time by which the evictor orders uses. It moves once in
// fillsATick fills, so that a hit rarely writes to memory that others read. It
// may wrap: ages are differences.
type clock struct{ tick, fills atomic.Uint32 }

const fillsATick = 64

func (c *clock) now() uint32 { return c.tick.Load() }

func (c *clock) filled() {
	if c.fills.Add(1)%fillsATick == 0 {
		c.tick.Add(1)
	}
}
