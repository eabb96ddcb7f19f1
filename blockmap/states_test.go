package blockmap

import (
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// all64 are all words.
func (s states) all64() []uint64 {
	words := make([]uint64, s.words)
	for i := range words {
		words[i] = s.word(uint32(i))
	}
	return words
}

// States give the same answers as a slice of them.
func TestStates(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 117))
	for _, n := range []uint32{1, 31, 32, 33, 200, 1000, pageBlocks, 3*pageBlocks + 5} {
		s, model := newStates(n), make([]state, n)
		for range min(500, 10*pageBlocks/n) {
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
			if st != stateAbsent && s.count(st) != int64(all) {
				t.Fatalf("%d blocks are counted, %d have the state %d", s.count(st), all, st)
			}
			if !slices.Equal(s.clone().all64(), s.all64()) {
				t.Fatal("a clone has other states")
			}
		}
		if again := statesOf(s.all64()); !slices.Equal(again.all64(), s.all64()) {
			t.Error("the states of the words are others")
		}
	}
}

// Pages of which nothing is changed take no memory, also where they are written as absent.
func TestStatesAreSparse(t *testing.T) {
	const pages = 1000
	s := newStates(pages * pageBlocks)
	for i := range s.words {
		s.put(i, 0)
	}
	s.put(7*pageWords+3, repeat(stateData))
	have := 0
	for _, c := range []states{s, s.clone(), statesOf([]uint64{pageWords: 1})} {
		for i := range c.pages {
			if c.pages[i].Load() != nil {
				have++
			}
		}
	}
	if have != 3 {
		t.Errorf("three maps with one changed page each have %d pages", have)
	}
	if n, st := s.run(0, pages*pageBlocks); n != 7*pageBlocks+3*perWord || st != stateAbsent {
		t.Errorf("the first run has %d blocks of state %d", n, st)
	}
	if n, st := s.run(8*pageBlocks, 992*pageBlocks); n != 992*pageBlocks || st != stateAbsent {
		t.Errorf("the last run has %d blocks of state %d", n, st)
	}
}

// Goroutines that change words of one page at once lose none.
func TestStatesAtOnce(t *testing.T) {
	for range 100 {
		s := newStates(pageBlocks)
		var wg sync.WaitGroup
		for i := range uint32(8) {
			wg.Go(func() { s.put(i, repeat(stateZero)) })
		}
		wg.Wait()
		if n := s.count(stateZero); n != 8*perWord {
			t.Fatalf("%d blocks are zero of %d", n, 8*perWord)
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
