package fetcher

import (
	"math/bits"
	"sync"

	"thaw/blockmap"
)

// readahead predicts, from the chunks that readers have demanded, those that they will
// demand next. It is for starts without a trace, and uses two of their habits:
//
// Starts read neighbours. Chunks follow files in the order of their layer, so the
// neighbours of a chunk belong to the same file, directory or package. If a chunk
// nearby was demanded before, the neighbour on each side is likely to be demanded too.
//
// Starts read in sequence. If a reader demands the chunk behind the last prediction,
// all of the prediction was right, and the next one is twice as long.
//
// Over a slow link this makes a start a quarter shorter, for an eighth to a quarter more
// bytes: bench/README.md has the figures and the commands.
type readahead struct {
	mu      sync.Mutex
	streams map[*blockmap.Stream]*reading
}

// reading is what is known about the demands of one stream.
type reading struct {
	demanded []uint64    // one bit a chunk
	next     map[int]int // the chunk behind a prediction, and how many chunks the prediction had
}

const (
	nearby       = 8  // chunks on either side that count as nearby
	maxAhead     = 8  // chunks of a prediction in a sequence
	maxSequences = 64 // predictions of a stream that are remembered
)

// after returns what to prefetch when readers demand chunks.
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

// demand records that chunk i is demanded, and returns how many chunks before and
// behind it are likely to be demanded next.
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
				delete(s.next, old) // any of them: few are still being read
				break
			}
		}
		s.next[i+behind+1] = behind
	}
	return before, behind
}

// near reports whether a chunk nearby was demanded before.
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
