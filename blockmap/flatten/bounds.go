package flatten

import (
	"slices"

	"golang.org/x/sys/unix"
)

// bounds are the budgets of the layers of a build. A layer takes room, then ahead, then
// work, and gives them back in the opposite order, so that none waits for one that waits.
type bounds struct {
	work  *budget // layers under conversion, and tables of contents that are checked
	ahead *budget // bytes of layers that were read and not converted yet
	tocs  *budget // bytes of tables of contents that are fetched and checked
	room  *budget // bytes of streams that were not pushed yet; a stream counts as its layer
}

const (
	// aheadMemory bounds all that is read ahead, and aheadWindow what is read ahead of
	// one layer. aheadLeast is what the smallest layer counts as: 64 layers are read at
	// once at most, so that each gets enough of a slow line not to be taken for stuck.
	aheadMemory = 32 << 20
	aheadWindow = 4 << 20
	aheadLeast  = aheadMemory / 64

	tocMemory = 64 << 20

	// commonRoom is what streams may take on disk in any case, if it is free.
	commonRoom = 1 << 30
)

func newBounds(jobs int) bounds {
	return bounds{work: newBudget(int64(jobs)), ahead: newBudget(aheadMemory), tocs: newBudget(tocMemory), room: newBudget(commonRoom)}
}

// roomFor is the room of a build with temporary files in dir. Twice as many of the
// largest layers as are converted at once have room, so that some are converted while
// others are pushed; but a quarter of a disk stays free where that leaves room for a
// layer, since streams can be larger than their layers.
func (b *builder) roomFor(dir string) int64 {
	sizes := make([]int64, len(b.src.Layers))
	for i := range sizes {
		sizes[i] = b.sizeOf(i)
	}
	slices.SortFunc(sizes, func(x, y int64) int { return int(min(max(y-x, -1), 1)) })
	var most int64
	for _, n := range sizes[:min(2*b.Jobs, len(sizes))] {
		most += n
	}
	most = max(most, commonRoom)
	var s unix.Statfs_t
	if unix.Statfs(dir, &s) == nil {
		most = min(most, int64(s.Bavail)*s.Bsize/4*3)
	}
	return max(most, 1)
}

// sizeOf is the size of a layer as it is stored, or a guess where that is not known.
func (b *builder) sizeOf(i int) int64 {
	if n := b.src.Layers[i].Size; n > 0 {
		return n
	}
	return aheadWindow
}
