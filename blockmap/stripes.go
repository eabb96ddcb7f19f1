package blockmap

import "sync"

// stripes are the locks of the blocks of an overlay. The 32 blocks of a map word have one;
// words that are stripeCount apart share it. It is held while blocks are written and their
// states change, and never while somebody waits for what is below, or for a sync.
type stripes [stripeCount]struct {
	sync.Mutex
	buf [8 * stripeCount]byte // for words on their way to the map, from the first stripe of a range
}

const stripeCount = 64

// lock takes the stripes of words first to end, at most stripeCount of them. Everybody
// takes them in the order of the array.
func (s *stripes) lock(first, end uint32) {
	s.each(first, end, func(i uint32) { s[i].Lock() })
}

func (s *stripes) unlock(first, end uint32) {
	s.each(first, end, func(i uint32) { s[i].Unlock() })
}

func (s *stripes) lockAll()   { s.lock(0, stripeCount) }
func (s *stripes) unlockAll() { s.unlock(0, stripeCount) }

func (s *stripes) each(first, end uint32, f func(i uint32)) {
	from, to := first%stripeCount, first%stripeCount+end-first
	for i := range max(to, stripeCount) - stripeCount {
		f(i)
	}
	for i := from; i < min(to, stripeCount); i++ {
		f(i)
	}
}
