package blockmap

import (
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// States give the same answers as a slice of them.
func TestStates(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 117))
	for _, n := range []uint32{1, 31, 32, 33, 200, 1000} {
		s, model := newStates(n), make([]state, n)
		for range 500 {
			b := rng.Uint32N(n)
			k := 1 + rng.Uint32N(n-b)
			part := model[b : b+k]
			end := slices.IndexFunc(part, func(st state) bool { return st != part[0] })
			if end < 0 {
				end = len(part)
			}
			if length, st := s.run(b, k); int(length) != end || st != part[0] {
				t.Fatalf("the run from %d of %d is %d times %d, not %d times %d", b, n, length, st, end, part[0])
			}
			for st := range state(4) {
				count := 0
				for _, x := range part {
					if x == st {
						count++
					}
				}
				if s.all(b, k, st) != (count == len(part)) || st == stateAbsent && s.none(b, k) != (count == len(part)) {
					t.Fatalf("blocks %d+%d: all %v, none %v, and %d of them have the state %d", b, k, s.all(b, k, st), s.none(b, k), count, st)
				}
				counted := int64(0)
				for i, end := wordsOf(b, k); i < end; i++ {
					counted += countIn(s.word(i), wordMask(i, b, k), st)
				}
				if counted != int64(count) {
					t.Fatalf("blocks %d+%d: %d have the state %d, not %d", b, k, counted, st, count)
				}
			}
			st := state(rng.IntN(4))
			for i, end := wordsOf(b, k); i < end; i++ {
				mask := wordMask(i, b, k)
				s.put(i, s.word(i)&^mask|repeat(st)&mask)
			}
			for i := range part {
				part[i] = st
			}
			all := 0
			for i, x := range model {
				if s.at(uint32(i)) != x {
					t.Fatalf("block %d has the state %d, not %d", i, s.at(uint32(i)), x)
				}
				if x == st {
					all++
				}
			}
			if rest := int64(len(s))*perWord - int64(n); st != stateAbsent && s.count(st) != int64(all) || st == stateAbsent && s.count(st) != int64(all)+rest {
				t.Fatalf("%d blocks are counted, %d have the state %d", s.count(st), all, st)
			}
		}
	}
}

// Ranges of words that overlap exclude each other, also around the end of the array, and
// nobody waits for ever.
func TestStripes(t *testing.T) {
	var s stripes
	counts := make([]int, 3*stripeCount) // by stripe: the race detector watches them
	var wg sync.WaitGroup
	for i := range uint64(8) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(i, 118))
			for range 2000 {
				n := 1 + rng.Uint32N(stripeCount)
				first := rng.Uint32N(3 * stripeCount)
				s.lock(first, first+n)
				for w := first; w < first+n; w++ {
					counts[w%stripeCount]++
				}
				s.unlock(first, first+n)
				if rng.IntN(100) == 0 {
					s.lockAll()
					counts[0]++
					s.unlockAll()
				}
			}
		})
	}
	wg.Wait()
}
