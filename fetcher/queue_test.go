package fetcher

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"thaw/blockmap"
)

// queuedChunks is a queue, with the fetches of one blob's chunks that a test has made.
type queuedChunks struct {
	queue
	here    place
	stream  *blockmap.Stream
	fetches map[int]*fetch
	seq     int64
}

// newQueue makes a queue at a blob whose chunks have 10 bytes each, one behind the
// other, but for a hole before each of those listed.
func newQueue(holes ...int) *queuedChunks {
	t := &blockmap.Table{}
	var at int64
	for i := range 200 {
		if slices.Contains(holes, i) {
			at += 5
		}
		t.Chunks = append(t.Chunks, blockmap.Chunk{Offset: at, Stored: 10, Block: uint32(i), Count: 1})
		at += 10
	}
	return &queuedChunks{here: place{&source{}, t}, stream: &blockmap.Stream{}, fetches: make(map[int]*fetch)}
}

// do runs steps, each a letter and the number of a chunk: a prefetch (p), one of a list
// (l), an idle one (i), a demand
// (d), a demand that no reader waits for any more (c), a fetch that another source
// starts (s), a fetch that ends (e).
func (q *queuedChunks) do(t *testing.T, steps string) {
	t.Helper()
	for _, step := range strings.Fields(steps) {
		i, err := strconv.Atoi(step[1:])
		if err != nil {
			t.Fatal(err)
		}
		ft := q.fetches[i]
		if ft == nil {
			q.seq++
			ft = &fetch{key: key{q.stream, i}, place: q.here, seq: q.seq}
			q.fetches[i] = ft
		}
		switch step[0] {
		case 'p', 'l', 'i':
			ft.rank = map[byte]rank{'p': predicted, 'l': listed, 'i': idle}[step[0]]
			q.push(ft)
		case 'd':
			ft.demand = true
			q.push(ft)
		case 'c':
			ft.demand = false
			q.pushFront(ft)
		case 's':
			ft.state = running
		case 'e':
			ft.state = ended
			delete(q.fetches, i)
		default:
			t.Fatalf("step %q", step)
		}
	}
}

// start takes what is next until there is nothing, demands first.
func (q *queuedChunks) start() string {
	var order []string
	for _, demand := range []bool{true, false} {
		for ft := q.next(demand); ft != nil; ft = q.next(demand) {
			ft.state = running
			order = append(order, map[bool]string{true: "d", false: "p"}[demand]+strconv.Itoa(ft.key.chunk))
		}
	}
	return strings.Join(order, " ")
}

func TestQueueOrder(t *testing.T) {
	for _, c := range []struct{ name, steps, want string }{
		{"nothing", "", ""},
		{"in order of arrival", "p5 p1 p3", "p5 p1 p3"},
		{"demands before prefetches", "p5 p1 d3 p2 d4", "d3 d4 p5 p1 p2"},
		{"a prefetch that is demanded", "p5 p1 p3 d3", "d3 p5 p1"},
		{"and demanded no more: its turn has been", "p5 p1 p3 d3 c3", "p3 p5 p1"},
		{"predictions before lists", "l5 l1 p3 l2 p4", "p3 p4 p5 p1 p2"},
		{"a listed one that is predicted", "l5 l1 l3 p3", "p3 p5 p1"},
		{"and demanded no more", "l5 l1 d1 c1 p2", "p2 p1 p5"},
		{"idle ones have no turn among the others", "i5 l1 i2 d3", "d3 p1"},
		{"twice", "p5 p1 d1 c1 d1", "d1 p5"},
		{"started elsewhere", "p5 p1 d3 d4 s3 s5", "d4 p1"},
		{"ended", "d3 d4 e3 p5 e5", "d4"},
		{"ended and asked for again", "p5 p1 e5 p5", "p1 p5"},
	} {
		t.Run(c.name, func(t *testing.T) {
			q := newQueue()
			q.do(t, c.steps)
			if got := q.start(); got != c.want {
				t.Errorf("after %q: %q, want %q", c.steps, got, c.want)
			}
			for q.nextIdle() != nil {
				q.nextIdle().state = running
			}
			if q.len() != 0 || len(q.at) != 0 {
				t.Errorf("the empty queue holds %d fetches, and %d to find neighbours", q.len(), len(q.at))
			}
		})
	}
}

func TestQueueGathers(t *testing.T) {
	chunks := func(first, last int) (l []int) {
		for i := first; i <= last; i++ {
			l = append(l, i)
		}
		return l
	}
	wide := limits{request: 1000, bytes: 1000, ranges: 1, near: 100}
	for _, c := range []struct {
		name  string
		holes []int
		steps string
		limits
		want []int
	}{
		{"one", nil, "d5", wide, []int{5}},
		{"demanded neighbours on both sides, in the blob's order", nil, "d5 d7 d4 d6 d9", wide, []int{4, 5, 6, 7}},
		{"not beyond a hole", []int{5, 7}, "d5 d6 d7 d4", wide, []int{5, 6}},
		{"prefetches behind a demand", nil, "d5 p6 p7", wide, []int{5, 6, 7}},
		{"but none before it, which would delay it", nil, "d5 p4 p6", wide, []int{5, 6}},
		{"a demand behind a prefetch behind a demand", nil, "d5 p6 d7", wide, []int{5, 6, 7}},
		{"demands up to the bound of a request", nil, "d5 d6 d7 d8", limits{30, 10, 1, 100}, []int{5, 6, 7}},
		{"prefetches up to theirs", nil, "d5 p6 p7 p8", limits{1000, 25, 1, 100}, []int{5, 6}},
		{"a prefetch whose turn is near", nil, "p5 p9 p6 p8 p7", limits{1000, 1000, 1, 2}, []int{5, 6}},
		{"on both sides", nil, "p5 p4 p6 p3", limits{1000, 1000, 1, 2}, []int{4, 5, 6}},
		{"not what was started", nil, "d5 d6 d7 s6", wide, []int{5}},
		{"not what has ended", nil, "d5 d6 e6 d7", wide, []int{5}},
		{"several ranges", nil, "p5 p6 p50 p100 p51", limits{1000, 1000, 3, 100}, []int{5, 6, 50, 51, 100}},
		{"in order of their turn", nil, "p50 p5 p51", limits{1000, 1000, 3, 100}, []int{50, 51, 5}},
		{"as many as a request may have", nil, "p5 p50 p100 p150", limits{1000, 1000, 2, 100}, []int{5, 50}},
		{"and as many bytes", nil, "p5 p50 p100 p150", limits{1000, 25, 16, 100}, []int{5, 50}},
		{"no idle ones behind others", nil, "d5 i6 p7", wide, []int{5}},
		{"idle ones behind idle ones", nil, "i5 i6 i7 i4", wide, []int{4, 5, 6, 7}},
		{"ranges of one rank", nil, "l5 p50 l100 p150", limits{1000, 1000, 16, 100}, []int{50, 150}},
		{"demands share no ranges", nil, "d5 d50 p100", limits{1000, 1000, 16, 100}, []int{5}},
	} {
		t.Run(c.name, func(t *testing.T) {
			q := newQueue(c.holes...)
			q.do(t, c.steps)
			first := q.next(true)
			if first == nil {
				first = q.next(false)
			}
			if first == nil {
				first = q.nextIdle()
			}
			var got []int
			for _, ft := range q.gather(q.here, first, c.limits) {
				got = append(got, ft.key.chunk)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("of %q: %v, want %v", c.steps, got, c.want)
			}
		})
	}

	t.Run("only what is at the place", func(t *testing.T) {
		q := newQueue()
		q.do(t, "d5 d6 d7 d8")
		other := place{&source{}, q.here.table}
		q.fetches[6].place, q.fetches[6].others = other, []place{q.here} // the other source has it too
		q.fetches[7].place = other
		var got []int
		for _, ft := range q.gather(q.here, q.next(true), wide) {
			got = append(got, ft.key.chunk)
		}
		if want := chunks(5, 6); !slices.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
	})
}

// A large chunk at the front lets smaller ones pass, but not for ever.
func TestQueuePassesTheFirst(t *testing.T) {
	q := newQueue()
	q.do(t, "d0 p1")
	for i := range 2 * maxPassed {
		q.do(t, fmt.Sprint("d", 10+i))
	}
	large := q.fetches[0]
	fits := func(ft *fetch) bool { return ft != large }
	passed := 0
	for ft := q.smaller(fits); ft != nil; ft = q.smaller(fits) {
		if want := 10 + passed; ft.key.chunk != want {
			t.Errorf("chunk %d goes first, want %d", ft.key.chunk, want)
		}
		ft.state = running
		passed++
	}
	if passed != maxPassed || q.next(true) != large {
		t.Errorf("%d chunks passed the first one, want %d", passed, maxPassed)
	}
	if q.smaller(func(*fetch) bool { return true }) != nil {
		t.Error("one more passed it")
	}
	if newQueue().smaller(fits) != nil {
		t.Error("an empty queue has a fetch")
	}
}

// Fetches that end while they wait do not make the queue grow.
func TestQueueOfCancelledFetches(t *testing.T) {
	q := newQueue()
	q.do(t, "d0")
	for i := range 10_000 {
		kind := map[bool]string{true: "d", false: "p"}[i%3 > 0]
		q.do(t, fmt.Sprintf("%s%d e%d", kind, 1+i%100, 1+i%100))
		if q.len() > 300 || len(q.at) > 300 {
			t.Fatalf("the queue holds %d fetches, and %d to find neighbours; one waits", q.len(), len(q.at))
		}
	}
	if got := q.start(); got != "d0" {
		t.Errorf("%q waited", got)
	}
}
