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

	mu   sync.Mutex
	memo map[Run][maxOwners]int32 // runs that were looked up lately
}

const (
	maxOwners = 3    // of a run, in order
	maxMemo   = 8192 // runs
)

// NewRing makes the ring of these members. The salt, the name of the zone, makes owners
// in one zone say nothing about those in another.
func NewRing(salt string, names []string) *Ring {
	names = slices.Clone(names)
	slices.Sort(names)
	names = slices.Compact(names)
	r := &Ring{names: names, hashes: make([]uint64, len(names)), at: make(map[string]int, len(names)),
		memo: make(map[Run][maxOwners]int32)}
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

// Owners appends the first n owners of a run, at most 3, in their order.
func (r *Ring) Owners(owners []string, run Run, n int) []string {
	best := r.owners(run)
	for _, i := range best[:min(n, maxOwners, len(r.names))] {
		owners = append(owners, r.names[i])
	}
	return owners
}

func (r *Ring) owners(run Run) [maxOwners]int32 {
	r.mu.Lock()
	defer r.mu.Unlock()
	best, ok := r.memo[run]
	if !ok {
		best = r.rank(run)
		if len(r.memo) >= maxMemo {
			clear(r.memo)
		}
		r.memo[run] = best
	}
	return best
}

// rank finds the members with the highest scores.
func (r *Ring) rank(run Run) (best [maxOwners]int32) {
	// The digest is even already, so that any part of it serves as its hash.
	key := mix(binary.LittleEndian.Uint64(run.Of[:8]) + uint64(run.Number)*0x9e3779b97f4a7c15)
	var scores [maxOwners]uint64
	n := 0
	for i, h := range r.hashes {
		score := mix(key ^ h)
		at := n
		// Equal scores stay in the order of the names.
		for at > 0 && scores[at-1] < score {
			at--
		}
		if at == maxOwners {
			continue
		}
		n = min(n+1, maxOwners)
		copy(scores[at+1:n], scores[at:n-1])
		copy(best[at+1:n], best[at:n-1])
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
