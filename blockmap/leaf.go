package blockmap

import (
	"crypto/sha256"
	"math/bits"
)

// A chunk is a list of leaves of LeafSize bytes; the last one may be shorter. A leaf is
// the least that is verified: with the digests of all leaves of a chunk, whose digest the
// index has, any of them can be verified without the others.
const (
	LeafBlocks = 16
	LeafSize   = LeafBlocks * BlockSize // 64 KiB

	// MaxLeaves is how many leaves the largest chunk has.
	MaxLeaves = MaxChunkBlocks / LeafBlocks
)

// Leaves is how many leaves the chunk has.
func (c *Chunk) Leaves() int { return int(c.Count+LeafBlocks-1) / LeafBlocks }

// LeafSize is the length of leaf i in bytes.
func (c *Chunk) LeafSize(i int) int { return min(LeafSize, c.Size()-i*LeafSize) }

// leafBlocks are the blocks of the stream that leaf i has.
func (c *Chunk) leafBlocks(i int) (block, count uint32) {
	first := uint32(i) * LeafBlocks
	return c.Block + first, min(LeafBlocks, c.Count-first)
}

// LeafDigest is the digest of a leaf of this content.
func LeafDigest(content []byte) Digest { return sha256.Sum256(content) }

// LeafDigests appends the digests of the leaves of a chunk of this content to list.
func LeafDigests(list []Digest, content []byte) []Digest {
	for len(content) > LeafSize {
		list = append(list, LeafDigest(content[:LeafSize]))
		content = content[LeafSize:]
	}
	return append(list, LeafDigest(content))
}

// ListDigest is the digest of a chunk whose leaves have the digests in list: the
// SHA-256 of these digests, one after the other, also for a chunk of one leaf.
func ListDigest(list []Digest) Digest {
	h := sha256.New()
	for i := range list {
		h.Write(list[i][:])
	}
	return Digest(h.Sum(nil))
}

// ChunkDigest is the digest that a Chunk of this content has.
func ChunkDigest(content []byte) Digest {
	var list [MaxLeaves]Digest
	return ListDigest(LeafDigests(list[:0], content))
}

// LeafSet is a set of leaves of a chunk: one bit each.
type LeafSet uint64

// LeafRange is the set of count leaves from first.
func LeafRange(first, count int) LeafSet {
	if count <= 0 {
		return 0
	}
	return LeafSet(^uint64(0) >> (64 - count) << first)
}

// All is the set of all leaves of the chunk.
func (c *Chunk) All() LeafSet { return LeafRange(0, c.Leaves()) }

// Has says whether leaf i is in the set.
func (s LeafSet) Has(i int) bool { return i < MaxLeaves && s>>i&1 != 0 }

// Contains says whether all leaves of o are in the set.
func (s LeafSet) Contains(o LeafSet) bool { return o&^s == 0 }

// Len is how many leaves the set has.
func (s LeafSet) Len() int { return bits.OnesCount64(uint64(s)) }

// Each yields the leaves of the set in ascending order.
func (s LeafSet) Each(yield func(leaf int) bool) {
	for w := uint64(s); w != 0; w &= w - 1 {
		if !yield(bits.TrailingZeros64(w)) {
			return
		}
	}
}
