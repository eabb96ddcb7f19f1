package tracefile_test

import (
	"cmp"
	"errors"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/tracefile"
)

const ms = time.Millisecond

func traceOf(blocks uint32, touches ...tracefile.Touch) *tracefile.Trace {
	for i := range touches {
		touches[i].Starts = 1
	}
	return &tracefile.Trace{Header: tracefile.Header{Blocks: blocks, Starts: 1}, Touches: touches}
}

// Ten starts: what most touch comes by its median time, then what fewer do, and
// last what one of ten touched.
func TestMergeOrder(t *testing.T) {
	var traces []*tracefile.Trace
	for i := range 10 {
		d := time.Duration(i) * ms
		var x []tracefile.Touch
		if i != 3 { // nine of ten, early
			x = append(x, tracefile.Touch{At: d / 10, Block: 500, Count: 4, Miss: i < 6})
		}
		if i == 7 { // one, early
			x = append(x, tracefile.Touch{At: 2 * ms, Block: 0, Count: 1})
		}
		if i < 3 { // three, early
			x = append(x, tracefile.Touch{At: 3 * ms, Block: 10, Count: 1})
		}
		x = append(x, tracefile.Touch{At: 100*ms + d, Block: 200, Count: 8, Miss: true}) // all, late
		if i < 6 {                                                                       // six, between
			x = append(x, tracefile.Touch{At: 150*ms + d, Block: 204 + 96, Count: 100})
		}
		traces = append(traces, traceOf(1000, x...))
	}
	traces[2].Dropped, traces[3].After = 5, time.Second
	m, err := tracefile.Merge(traces...)
	if err != nil {
		t.Fatal(err)
	}
	want := []tracefile.Touch{
		{At: 500 * us, Block: 500, Count: 4, Starts: 9, Miss: true},
		{At: 104 * ms, Block: 200, Count: 8, Starts: 10, Miss: true},
		{At: 152 * ms, Block: 300, Count: 100, Starts: 6},
		{At: 3 * ms, Block: 10, Count: 1, Starts: 3},
		{At: 2 * ms, Block: 0, Count: 1, Starts: 1},
	}
	if !reflect.DeepEqual(m.Touches, want) {
		t.Errorf("merged to\n%+v, want\n%+v", m.Touches, want)
	}
	if m.Starts != 10 || m.Why != tracefile.Merged || m.Dropped != 5 || m.After != time.Second {
		t.Errorf("merged to %+v, %+v", m.Header, m.End)
	}
	slices.Reverse(traces)
	if again, err := tracefile.Merge(traces...); err != nil || !reflect.DeepEqual(again, m) {
		t.Error("the order of the traces makes a difference")
	}
	if back := decode(t, encode(t, m)); !reflect.DeepEqual(back, m) {
		t.Error("a merged trace does not survive a round trip")
	}
	// A merged trace counts for as many starts as it is of.
	both, err := tracefile.Merge(m, traceOf(1000, tracefile.Touch{At: 9 * ms, Block: 0, Count: 2}))
	if err != nil {
		t.Fatal(err)
	}
	if both.Starts != 11 || both.Touches[len(both.Touches)-1].Block != 1 {
		t.Errorf("merged once more: %+v", both)
	}
	if i := slices.IndexFunc(both.Touches, func(x tracefile.Touch) bool { return x.Block == 0 }); both.Touches[i].Starts != 2 {
		t.Errorf("two of eleven became %d", both.Touches[i].Starts)
	}
}

// Ranges that overlap in part: each block has the count and the median of those
// that touch it, as counted one block after the other.
func TestMergeAgainstBlocks(t *testing.T) {
	rng := rand.New(rand.NewPCG(4, 4))
	for range 20 {
		var traces []*tracefile.Trace
		times := make([][]time.Duration, 1000)
		misses := make([]int, 1000)
		n := 1 + rng.IntN(7)
		for range n {
			tr := randomTrace(rng, blockmap.Digest{}, 1000, 20+rng.IntN(30), 1)
			traces = append(traces, tr)
			for _, x := range tr.Touches {
				for b := x.Block; b < x.Block+x.Count; b++ {
					times[b] = append(times[b], x.At)
					if x.Miss {
						misses[b]++
					}
				}
			}
		}
		m, err := tracefile.Merge(traces...)
		if err != nil {
			t.Fatal(err)
		}
		seen := 0
		for i, x := range m.Touches {
			for b := x.Block; b < x.Block+x.Count; b++ {
				seen++
				slices.Sort(times[b])
				k := len(times[b])
				if int(x.Starts) != k || x.Miss != (misses[b] > k/2) {
					t.Fatalf("block %d is touched by %d of %d starts, and said to be by %d", b, k, n, x.Starts)
				}
				// Neighbours of nearly the same time are one range.
				if d := x.At - times[b][(k-1)/2]; d.Abs() > 4*ms {
					t.Fatalf("block %d has times %v and is put at %v", b, times[b], x.At)
				}
			}
			if i == 0 {
				continue
			}
			p := m.Touches[i-1]
			few := func(x tracefile.Touch) int {
				if 2*int(x.Starts) > n {
					return 0
				}
				return n - int(x.Starts)
			}
			if c := cmp.Or(cmp.Compare(few(p), few(x)), cmp.Compare(p.At, x.At)); c > 0 {
				t.Fatalf("%+v comes before %+v", p, x)
			}
		}
		for _, ts := range times {
			if len(ts) > 0 {
				seen--
			}
		}
		if seen != 0 {
			t.Fatalf("%d blocks too many", seen)
		}
	}
}

// A touch that does not say by how many starts it is of one.
func TestMergeCountsOne(t *testing.T) {
	a, b := traceOf(10), traceOf(10)
	a.Touches = []tracefile.Touch{{Block: 1, Count: 1}}
	b.Touches = []tracefile.Touch{{Block: 1, Count: 1}}
	m, err := tracefile.Merge(a, b)
	if err != nil || len(m.Touches) != 1 || m.Touches[0].Starts != 2 {
		t.Errorf("merged to %+v, %v", m, err)
	}
}

func TestMergeRefuses(t *testing.T) {
	if _, err := tracefile.Merge(); err == nil {
		t.Error("no traces were merged")
	}
	a, b := traceOf(10), traceOf(10)
	b.Index[0] = 1
	if _, err := tracefile.Merge(a, b); !errors.Is(err, tracefile.ErrOtherImage) {
		t.Errorf("traces of two images: %v", err)
	}
	if _, err := tracefile.Merge(a, traceOf(10, tracefile.Touch{Block: 10, Count: 1})); !errors.Is(err, blockmap.ErrCorrupt) {
		t.Errorf("a touch behind the device: %v", err)
	}
	a.Starts = 1 << 16
	if _, err := tracefile.Merge(a, traceOf(10)); err == nil || !strings.Contains(err.Error(), "65536 starts") {
		t.Errorf("too many starts: %v", err)
	}
}

// What fewer than a quarter of four starts or more touch is not common. Of three starts
// all is.
func TestCommon(t *testing.T) {
	for _, c := range []struct {
		starts, least int
		want          []int // how many starts touched what stays
	}{
		{1, 25, []int{1}}, {3, 25, []int{1, 2, 3}}, {3, 100, []int{1, 2, 3}},
		{4, 25, []int{1, 2, 3, 4}}, {4, 26, []int{2, 3, 4}}, {5, 25, []int{2, 3, 4, 5}}, {8, 25, []int{2, 3, 4, 5, 6, 7, 8}},
		{8, 0, []int{1, 2, 3, 4, 5, 6, 7, 8}}, {8, 100, []int{8}},
	} {
		var traces []*tracefile.Trace
		for i := range c.starts {
			x := traceOf(1000)
			for n := 1; n <= c.starts; n++ {
				if i < n { // block n*10 is touched by n starts
					x.Touches = append(x.Touches, tracefile.Touch{At: time.Duration(n) * ms, Block: uint32(n * 10), Count: 2, Starts: 1})
				}
			}
			traces = append(traces, x)
		}
		m, err := tracefile.Merge(traces...)
		if err != nil {
			t.Fatal(err)
		}
		all := m.Bytes()
		common, rare := m.Common(c.least)
		var got []int
		for _, x := range common.Touches {
			got = append(got, int(x.Starts))
		}
		slices.Sort(got)
		if !slices.Equal(got, c.want) || common.Bytes()+rare != all || m.Bytes() != all || common.Starts != m.Starts {
			t.Errorf("of %d starts, at least %d %%: %v and %d bytes less, want %v", c.starts, c.least, got, rare, c.want)
		}
	}
}
