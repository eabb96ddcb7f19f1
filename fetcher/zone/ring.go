package zone

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"sync"

	"thaw/blockmap"
)

const (
	// RunChunks is how many neighbouring chunks of a stream have one owner. With more than
	// one, a member counts as a holder of a run of which it has asked for a part; in
	// simulations of 10,000 hosts that start one image, others then asked it for the rest in
	// vain, and the registry sent 19 times the bytes.
	RunChunks = 1
	// PieceBytes is how many bytes of a bundle's blob have one owner.
	PieceBytes = 1 << 20
)

// Run is what has one owner: RunChunks chunks of a stream, or PieceBytes bytes of a blob.
type Run struct {
	Of     blockmap.Digest // of the stream or the blob
	Number uint32          // chunk / RunChunks, or offset / PieceBytes
}

// Ring says which members of a zone own a run. It never changes, and many Routers may
// share it.
//
// It is rendezvous hashing: a member has a score for each run, and the member with the
// highest score is the owner, the next one the second owner. So hosts that know the same
// members agree on all owners in their order. When a member leaves, its second owner
// becomes the owner, for the hosts that still list the member as for those that do not,
// and no other run moves. go-rendezvous, which is the library for this, finds only the
// first owner, and its Remove indexes past its slice; hashring has no even shares.
type Ring struct {
	names  []string // sorted
	hashes []uint64
	at     map[string]int

	mu     sync.Mutex
	memo   map[Run][]int32 // the first members in the order of the runs that were looked up lately
	ranked int             // members in memo
}

// A ranking has the first few members in the order of a run. It is made longer when these
// are not enough, because they cannot be reached. It never has more than maxRank: when so
// many cannot be reached, it is this host that cannot reach anybody.
const (
	firstRank = 3
	nextRank  = 16
	maxRank   = 64
	maxMemo   = 8192    // runs
	maxRanked = 1 << 17 // members in all rankings
)

// NewRing makes the ring of these members. The salt, the name of the zone, makes owners
// in one zone say nothing about those in another.
func NewRing(salt string, names []string) *Ring {
	names = slices.Clone(names)
	slices.Sort(names)
	names = slices.Compact(names)
	r := &Ring{names: names, hashes: make([]uint64, len(names)), at: make(map[string]int, len(names)),
		memo: make(map[Run][]int32)}
	for i, name := range names {
		sum := sha256.Sum256([]byte(salt + "\x00" + name))
		r.hashes[i] = binary.LittleEndian.Uint64(sum[:])
		r.at[name] = i
	}
	return r
}

// Len returns how many members there are.
func (r *Ring) Len() int { return len(r.names) }

// Has reports whether a host is a member.
func (r *Ring) Has(name string) bool { _, ok := r.at[name]; return ok }

// Owners appends the first n owners of a run, at most maxRank, in their order.
func (r *Ring) Owners(owners []string, run Run, n int) []string {
	best := r.ranking(run, n)
	for _, i := range best[:min(n, len(best))] {
		owners = append(owners, r.names[i])
	}
	return owners
}

// owner returns the first member in the order of a run. There is at least one member.
func (r *Ring) owner(run Run) string { return r.names[r.ranking(run, 1)[0]] }

// ranking returns at least the first n members in the order of a run, as far as there are
// so many and maxRank allows. Nobody changes what it returns.
func (r *Ring) ranking(run Run, n int) []int32 {
	n = min(n, maxRank, len(r.names))
	r.mu.Lock()
	defer r.mu.Unlock()
	best := r.memo[run]
	if len(best) >= n {
		return best
	}
	longer := firstRank
	for longer < n {
		if longer = nextRank; longer < n {
			longer = maxRank
		}
	}
	r.ranked -= len(best)
	best = r.rank(run, longer)
	if len(r.memo) >= maxMemo || r.ranked+len(best) > maxRanked {
		clear(r.memo)
		r.ranked = 0
	}
	r.memo[run] = best
	r.ranked += len(best)
	return best
}

// rank finds the n members with the highest scores.
func (r *Ring) rank(run Run, n int) []int32 {
	n = min(n, len(r.names))
	// The digest is even already, so that any part of it serves as its hash.
	key := mix(binary.LittleEndian.Uint64(run.Of[:8]) + uint64(run.Number)*0x9e3779b97f4a7c15)
	best := make([]int32, 0, n)
	var scores [maxRank]uint64
	for i, h := range r.hashes {
		score := mix(key ^ h)
		if len(best) == n && score <= scores[n-1] {
			continue
		}
		// Equal scores stay in the order of the names.
		at := len(best)
		for at > 0 && scores[at-1] < score {
			at--
		}
		if len(best) < n {
			best = append(best, 0)
		}
		copy(scores[at+1:len(best)], scores[at:])
		copy(best[at+1:], best[at:])
		scores[at], best[at] = score, int32(i)
	}
	return best
}

// mix is the finalizer of splitmix64: each bit of x changes half of the result's.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
