package blockmap

import (
	"math"
	"sync/atomic"
)

// pins counts, chunk by chunk, the views and fills that need the chunk to stay.
// There is no lock: the evictor adds evicting to a count of zero, so that
// whoever pins the chunk next sees a negative count and gives up.
type pins []atomic.Int32

const evicting = math.MinInt32 / 2

// pin keeps chunk i from being evicted, or returns false: it is being evicted.
func (p pins) pin(i int) bool {
	if p[i].Add(1) > 0 {
		return true
	}
	p[i].Add(-1)
	return false
}

func (p pins) unpin(i int) { p[i].Add(-1) }

// beginEvict takes chunk i for the evictor unless it is pinned.
func (p pins) beginEvict(i int) bool { return p[i].CompareAndSwap(0, evicting) }

func (p pins) endEvict(i int) { p[i].Add(-evicting) }

// any says whether a chunk is pinned or being evicted.
func (p pins) any() bool {
	for i := range p {
		if p[i].Load() != 0 {
			return true
		}
	}
	return false
}
