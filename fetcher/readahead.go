package fetcher

import (
	"math/bits"
	"slices"
	"sync"

	"thaw/blockmap"
)

// readahead predicts, from the chunks that readers have demanded, those that they will
// demand next. It is for starts without a trace, and for all that follows a start. It
// uses two habits of readers:
//
// Readers read in sequence. If a reader demands the chunk behind one that was demanded
// lately, readahead begins a sequence, and keeps a window of chunks ahead of it. The
// window doubles each time that the reader has used half of it. So it is soon large
// enough for requests of many chunks, and these are asked for before the reader waits
// for them.
//
// Starts read neighbours. Chunks follow files in the order of their layer, so the
// neighbours of a chunk belong to the same file, directory or package. If a chunk
// nearby was demanded before, the neighbours on each side are likely to be demanded too.
//
// The second habit is not one of all readers: of one that reads at random, each
// prediction is wrong. So neighbours are paid for from a credit, of the stream and of the
// device, and so is the first window of a sequence of two chunks. A prediction costs its
// bytes. One that is used brings back wonFor times as many, and each demand a small part
// of its own bytes, so that readahead finds out when the reader has changed its habits.
//
// What it gains and costs: bench/RESULTS.md, "What is fetched ahead without a trace", and
// bench/NOTES.md.
type readahead struct {
	most int64 // bytes of the cache that a window may take; 0: no limit

	mu      sync.Mutex
	credit  credit // of the device
	streams map[*blockmap.Stream]*reading
}

const (
	nearby     = 8        // chunks on either side that count as nearby
	lately     = 16       // demands of a stream that count as late ones
	maxReaders = 32       // sequences of a stream, and demands after which one without any has ended
	maxGuesses = 256      // predictions of a stream that are remembered until they are used
	aside      = 64 << 10 // stored bytes of neighbours on each side; at least one chunk
	firstAhead = 2        // chunks of the first window of a sequence
	astray     = 2        // chunks before the last demanded one that a reader in sequence may demand later

	leastAheadOf = 4 << 20  // stored bytes of the largest window of a sequence, on a slow link
	mostAheadOf  = 32 << 20 // on a fast one

	streamCredit = 2 << 20 // stored bytes at the beginning
	deviceCredit = 8 << 20
	maxCredit    = 8   // multiple of that
	wonFor       = 3   // multiple of its bytes that a prediction brings back: one of three must be used
	probes       = 128 // of so many demanded bytes, one is for a prediction
)

// credit is how many stored bytes may be predicted.
type credit struct{ now, first int64 }

func newCredit(first int64) credit { return credit{first, first} }

func (c *credit) add(bytes int64) { c.now = min(c.now+bytes, maxCredit*c.first) }

// reading is what is known about the demands of one stream.
type reading struct {
	demanded  []uint64      // one bit a chunk
	late      [lately]int   // the chunks demanded last, as a ring
	n         int           // demands
	sequences []*sequence   // the one that was demanded last comes last
	guesses   map[int]int64 // predicted chunks that were not used yet, and their stored bytes
	order     []int         // these chunks in their order, and some that were used
	credit    credit
}

// sequence is a reader that reads in sequence.
type sequence struct {
	from, end int   // the last demanded chunk, and the first one that is not predicted
	window    int64 // stored bytes to predict ahead of it
	sure      bool  // two chunks before its first were demanded lately; otherwise a guess
	last      int   // reading.n when it was demanded last
}

func newReadahead(most int64) *readahead {
	return &readahead{most: most, credit: newCredit(deviceCredit), streams: make(map[*blockmap.Stream]*reading)}
}

// after returns what to prefetch when readers demand chunks. ahead is how many stored
// bytes a window may have. comes reports whether a chunk is in flight.
func (r *readahead) after(wants []blockmap.Want, ahead int64, comes func(key) bool) (predicted []blockmap.Want) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, w := range wants {
		s := r.streams[w.Stream]
		if s == nil {
			s = &reading{
				demanded: make([]uint64, (len(w.Table.Chunks)+63)/64), guesses: make(map[int]int64), credit: newCredit(streamCredit),
			}
			r.streams[w.Stream] = s
		}
		r.settle(s, w, comes)
		if slices.Contains(s.late[:min(s.n, lately)], w.Chunk) {
			// Another reader of the same chunk, as when many devices start from one image. It
			// says nothing new: its own chunk is not a neighbour that was demanded before.
			continue
		}
		r.earn(s, stored(w)/probes)
		predict := func(i int) {
			if !w.Stream.Has(i) {
				predicted = append(predicted, blockmap.Want{Stream: w.Stream, Table: w.Table, Chunk: i})
			}
		}
		known := s.near(w.Chunk)
		x := s.sequence(w.Chunk)
		s.demand(w.Chunk)
		switch {
		case x != nil && (x.sure || x.window > 0 || min(r.credit.now, s.credit.now) >= firstAhead*stored(w)):
			r.extend(x, s, w, min(max(ahead, leastAheadOf), mostAheadOf), predict)
		case known:
			r.neighbours(s, w, predict)
		}
	}
	return predicted
}

// settle gives credit for predictions that readers have used: before they waited, or
// while the chunk is in flight, as w may be.
func (r *readahead) settle(s *reading, w blockmap.Want, comes func(key) bool) {
	for i, bytes := range s.guesses {
		if i == w.Chunk && comes(key{w.Stream, i}) || w.Stream.Has(i) && w.Stream.Viewed(i) {
			delete(s.guesses, i)
			r.earn(s, wonFor*bytes)
		}
	}
	delete(s.guesses, w.Chunk) // otherwise it was evicted before it was used
}

func (r *readahead) earn(s *reading, bytes int64) {
	s.credit.add(bytes)
	r.credit.add(bytes)
}

// guess pays for the prediction of a chunk, and reports whether there was credit.
func (r *readahead) guess(s *reading, i int, bytes int64) bool {
	if s.credit.now < bytes || r.credit.now < bytes {
		return false
	}
	if len(s.order) == maxGuesses {
		delete(s.guesses, s.order[0])
		s.order = s.order[1:]
	}
	s.order = append(s.order, i)
	s.guesses[i] = bytes
	s.credit.now -= bytes
	r.credit.now -= bytes
	return true
}

// extend predicts what follows in a sequence, if its reader has used half of the window.
func (r *readahead) extend(x *sequence, s *reading, w blockmap.Want, most int64, predict func(int)) {
	chunks := w.Table.Chunks
	var left, content int64
	for i := x.from + 1; i < x.end; i++ {
		left, content = left+int64(chunks[i].Stored), content+int64(chunks[i].Size())
	}
	if x.window > 0 && left > x.window/2 {
		return
	}
	guess := x.window == 0 && !x.sure
	x.window = min(max(2*x.window, firstAhead*stored(w)), most)
	x.end = max(x.end, x.from+1)
	for n := 0; x.end < len(chunks); n++ {
		c := &chunks[x.end]
		left, content = left+int64(c.Stored), content+int64(c.Size())
		if n > 0 && (left > x.window || r.most > 0 && content > r.most) ||
			guess && !w.Stream.Has(x.end) && !r.guess(s, x.end, int64(c.Stored)) {
			break
		}
		predict(x.end)
		x.end++
	}
}

// neighbours predicts the chunks on both sides of a demanded one, as far as there is
// credit.
func (r *readahead) neighbours(s *reading, w blockmap.Want, predict func(int)) {
	for _, step := range []int{1, -1} {
		var bytes int64
		for i := w.Chunk + step; i >= 0 && i < len(w.Table.Chunks); i += step {
			n := stored(blockmap.Want{Table: w.Table, Chunk: i})
			if bytes > 0 && bytes+n > aside {
				break
			}
			bytes += n
			if _, ok := s.guesses[i]; ok || w.Stream.Has(i) {
				continue
			}
			if !r.guess(s, i, n) {
				break
			}
			predict(i)
		}
	}
}

// sequence finds the sequence that chunk i belongs to, or begins one if the chunk before
// it was demanded lately. It returns nil if there is none.
func (s *reading) sequence(i int) *sequence {
	s.sequences = slices.DeleteFunc(s.sequences, func(x *sequence) bool { return s.n-x.last > maxReaders })
	for at, x := range s.sequences {
		if x.from-astray <= i && i <= x.end {
			s.sequences = append(slices.Delete(s.sequences, at, at+1), x)
			x.from, x.last = max(x.from, i), s.n
			return x
		}
	}
	late := s.late[:min(s.n, lately)]
	if !slices.Contains(late, i-1) {
		return nil
	}
	x := &sequence{from: i, end: i, sure: slices.Contains(late, i-2), last: s.n}
	s.sequences = append(s.sequences, x)
	return x
}

// demand records that chunk i is demanded.
func (s *reading) demand(i int) {
	s.demanded[i/64] |= 1 << (i % 64)
	s.late[s.n%lately] = i
	s.n++
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
