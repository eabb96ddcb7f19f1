package fetcher

import (
	"math/bits"
	"sync"

	"thaw/blockmap"
)

// readahead guesses from the chunks that readers demand which they will want
// next, where no trace says so. It goes by two habits of starts:
//
// What lies together is read together. Chunks follow files in the order of
// their layer, so a chunk's neighbours are of the same file, directory or
// package. Where something nearby has been demanded before, the nearest chunk
// on each side is likely to be.
//
// What is read in sequence goes on. A demand for the very chunk at which the
// last guess ended says that all of it was read, and doubles the next one.
//
// Over a slow link that takes a quarter off a start, for an eighth to a quarter
// more bytes: bench/README.md has the figures, and the command that gave them.
type readahead struct {
	mu      sync.Mutex
	streams map[*blockmap.Stream]*reading
}

// reading is what is known of the demands of one stream.
type reading struct {
	demanded []uint64    // one bit a chunk
	next     map[int]int // where a guess ended, and how many chunks it had
}

const (
	nearby       = 8  // chunks on either side that make a place known
	maxAhead     = 8  // chunks in a sequence
	maxSequences = 64 // sequences of a stream that are remembered
)

// after returns what to fetch behind demanded chunks.
func (r *readahead) after(wants []blockmap.Want) (ahead []blockmap.Want) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, w := range wants {
		s := r.streams[w.Stream]
		if s == nil {
			s = &reading{demanded: make([]uint64, (len(w.Table.Chunks)+63)/64), next: make(map[int]int)}
			r.streams[w.Stream] = s
		}
		before, behind := s.demand(w.Chunk)
		for i := w.Chunk - before; i <= w.Chunk+behind; i++ {
			if i >= 0 && i < len(w.Table.Chunks) && i != w.Chunk && !w.Stream.Has(i) {
				ahead = append(ahead, blockmap.Want{Stream: w.Stream, Table: w.Table, Chunk: i})
			}
		}
	}
	return ahead
}

// demand notes that chunk i is demanded, and says how many chunks before and
// behind it are likely to be.
func (s *reading) demand(i int) (before, behind int) {
	known := s.near(i)
	s.demanded[i/64] |= 1 << (i % 64)
	if n, ok := s.next[i]; ok {
		delete(s.next, i)
		behind = min(2*n, maxAhead)
	} else if known {
		behind = 1
	}
	if known {
		before = 1
	}
	if behind > 0 {
		if len(s.next) == maxSequences {
			for old := range s.next {
				delete(s.next, old) // any: few of them are still being read
				break
			}
		}
		s.next[i+behind+1] = behind
	}
	return before, behind
}

// near says whether a chunk nearby has been demanded before.
func (s *reading) near(i int) bool {
	for first := max(i-nearby, 0); first <= i+nearby && first/64 < len(s.demanded); {
		last := min(first|63, i+nearby)
		mask := ^uint64(0) << (first % 64) & (^uint64(0) >> (63 - last%64))
		if bits.OnesCount64(s.demanded[first/64]&mask) > 0 {
			return true
		}
		first = last + 1
	}
	return false
}
