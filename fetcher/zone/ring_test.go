package zone

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"thaw/blockmap"
)

func names(n int) (all []string) {
	for i := range n {
		all = append(all, fmt.Sprintf("host-%d", i))
	}
	return all
}

func runs(n int) (all []Run) {
	for i := range n {
		all = append(all, Run{blockmap.Digest(sha256.Sum256([]byte{byte(i % 7)})), uint32(i / 7)})
	}
	return all
}

// However members are listed, hosts agree on the owners.
func TestOwnersDoNotDependOnTheList(t *testing.T) {
	members := names(50)
	a := NewRing("zone", members)
	shuffled := append(slices.Clone(members), members[:10]...)
	rand.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	b := NewRing("zone", shuffled)
	if b.Len() != 50 {
		t.Fatalf("%d members", b.Len())
	}
	for _, run := range runs(500) {
		x, y := a.Owners(nil, run, 3), b.Owners(nil, run, 3)
		if !slices.Equal(x, y) || len(x) != 3 || x[0] == x[1] || x[1] == x[2] || x[0] == x[2] {
			t.Fatalf("%v and %v", x, y)
		}
	}
}

// Owners are the members with the highest scores, in order.
func TestRank(t *testing.T) {
	for n := range 9 {
		r := NewRing("", names(n))
		for _, run := range runs(50) {
			owners := r.Owners(nil, run, 3)
			if len(owners) != min(n, 3) {
				t.Fatalf("%d owners of %d members", len(owners), n)
			}
			left := names(n)
			for _, o := range owners {
				// The first owner among those who are left.
				if got := NewRing("", left).Owners(nil, run, 1)[0]; got != o {
					t.Fatalf("%s instead of %s", o, got)
				}
				left = slices.DeleteFunc(left, func(x string) bool { return x == o })
			}
		}
	}
}

// A member that leaves moves only its own runs, and these to their second owners.
func TestLeavingMovesOnlyAShare(t *testing.T) {
	members := names(40)
	before := NewRing("zone", members)
	after := NewRing("zone", members[1:])
	moved := 0
	all := runs(20000)
	for _, run := range all {
		x, y := before.Owners(nil, run, 3), after.Owners(nil, run, 2)
		if x[0] != members[0] {
			if y[0] != x[0] {
				t.Fatal("the run of another member has moved")
			}
			continue
		}
		moved++
		if y[0] != x[1] || y[1] != x[2] {
			t.Fatal("the second owner has not become the first")
		}
	}
	// 500 runs, with a deviation of 22.
	if share := len(all) / len(members); moved < share-110 || moved > share+110 {
		t.Errorf("%d of %d runs moved", moved, len(all))
	}
}

// Shares are even, also among few members, and for runs of one stream.
func TestSharesAreEven(t *testing.T) {
	for _, n := range []int{2, 3, 8, 100} {
		count := make(map[string]int)
		r := NewRing("zone", names(n))
		all := 1000 * n
		for i := range all {
			count[r.Owners(nil, Run{Number: uint32(i)}, 1)[0]]++
		}
		for name, c := range count {
			if c < 850 || c > 1150 { // the deviation is about 30
				t.Errorf("%d members: %s owns %d runs instead of 1000", n, name, c)
			}
		}
	}
}

// Another zone has other owners.
func TestSalt(t *testing.T) {
	same := 0
	a, b := NewRing("a", names(10)), NewRing("b", names(10))
	for _, run := range runs(1000) {
		if a.Owners(nil, run, 1)[0] == b.Owners(nil, run, 1)[0] {
			same++
		}
	}
	if same > 200 {
		t.Errorf("%d of 1000 runs have the same owner", same)
	}
}

// The memory for runs that were looked up is bounded.
func TestMemoIsBounded(t *testing.T) {
	r := NewRing("", names(3))
	for i := range 3 * maxMemo {
		r.Owners(nil, Run{Number: uint32(i)}, 1)
	}
	if n := len(r.memo); n > maxMemo {
		t.Errorf("%d runs", n)
	}
}

// A ranking is made longer when the first members are not enough. It keeps its beginning, is
// that of all hosts, and has no member twice.
func TestLongRanking(t *testing.T) {
	for _, n := range []int{1, 2, 5, 20, 100} {
		a, b := NewRing("zone", names(n)), NewRing("zone", names(n))
		for i, run := range runs(30) {
			var last []string
			for _, k := range []int{1, 3, 4, 16, 17, 64, 1000} {
				x := a.Owners(nil, run, k)
				if len(x) != min(k, n, maxRank) || !slices.Equal(x[:len(last)], last) {
					t.Fatalf("run %d: the first %d of %d are %v after %v", i, k, n, x, last)
				}
				last = x
			}
			if y := b.Owners(nil, run, 1000); !slices.Equal(y, last) {
				t.Fatalf("%v and %v", last, y)
			}
			slices.Sort(last)
			if len(slices.Compact(last)) != min(n, maxRank) {
				t.Fatalf("%v", last)
			}
		}
	}
	// Their memory is bounded, too.
	r := NewRing("", names(100))
	for i := range maxMemo {
		r.Owners(nil, Run{Number: uint32(i)}, maxRank)
		r.Owners(nil, Run{Number: uint32(i)}, 1)
	}
	kept := 0
	for _, best := range r.memo {
		kept += len(best)
	}
	if kept != r.ranked || kept > maxRanked {
		t.Errorf("%d members in rankings, counted as %d", kept, r.ranked)
	}
}

func BenchmarkOwners(b *testing.B) {
	for _, n := range []int{10, 1000, 10000} {
		r := NewRing("zone", names(n))
		b.Run(fmt.Sprintf("first of %d", n), func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				r.rank(Run{Number: uint32(i)}, firstRank)
			}
		})
		b.Run(fmt.Sprintf("again of %d", n), func(b *testing.B) {
			for b.Loop() {
				r.ranking(Run{Number: 1}, 1)
			}
		})
	}
}
