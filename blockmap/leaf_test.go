package blockmap_test

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"thaw/blockmap"
)

// chunkOf is n blocks of content, and their chunk.
func chunkOf(seed uint64, n int) (blockmap.Chunk, []byte) {
	rng := rand.New(rand.NewPCG(seed, 1))
	content := make([]byte, n*blockmap.BlockSize)
	for i := 0; i < len(content); i += 8 {
		binary.LittleEndian.PutUint64(content[i:], rng.Uint64())
	}
	return blockmap.Chunk{Digest: blockmap.ChunkDigest(content), Count: uint32(n)}, content
}

// The digest of a chunk is that of the digests of its leaves, computed here from the words
// of the format.
func TestLeafDigests(t *testing.T) {
	for _, n := range []int{1, 15, 16, 17, 32, 250, 256, 1023, 1024} {
		c, content := chunkOf(uint64(n), n)
		var sums []byte
		var list []blockmap.Digest
		for left := content; len(left) > 0; {
			leaf := left[:min(len(left), 65536)]
			left = left[len(leaf):]
			sum := sha256.Sum256(leaf)
			sums, list = append(sums, sum[:]...), append(list, sum)
		}
		if want := blockmap.Digest(sha256.Sum256(sums)); c.Digest != want {
			t.Errorf("%d blocks: the digest is %v, want %v", n, c.Digest, want)
		}
		if got := blockmap.LeafDigests(nil, content); !slices.Equal(got, list) || c.Leaves() != len(list) || c.All().Len() != len(list) {
			t.Errorf("%d blocks: %d leaves, want %d", n, c.Leaves(), len(list))
		}
		l, err := blockmap.NewLeafList(&c, list)
		if err != nil {
			t.Fatal(err)
		}
		size := 0
		for i := range c.Leaves() {
			leaf := content[size : size+c.LeafSize(i)]
			size += len(leaf)
			if err := c.VerifyLeaf(l, i, leaf); err != nil {
				t.Errorf("%d blocks: leaf %d: %v", n, i, err)
			}
			leaf[len(leaf)-1]++
			if err := c.VerifyLeaf(l, i, leaf); !errors.Is(err, blockmap.ErrDigest) {
				t.Errorf("%d blocks: leaf %d altered: %v", n, i, err)
			}
			leaf[len(leaf)-1]--
			for _, j := range []int{-1, i + 1, c.Leaves()} {
				if err := c.VerifyLeaf(l, j, leaf); !errors.Is(err, blockmap.ErrDigest) {
					t.Errorf("%d blocks: leaf %d taken for leaf %d: %v", n, i, j, err)
				}
			}
			if err := c.VerifyLeaf(l, i, leaf[1:]); !errors.Is(err, blockmap.ErrDigest) {
				t.Errorf("%d blocks: leaf %d cut short: %v", n, i, err)
			}
		}
		if size != len(content) {
			t.Errorf("%d blocks: the leaves have %d bytes", n, size)
		}
		for name, bad := range map[string][]blockmap.Digest{
			"one less": list[1:], "none": nil, "one more": append(slices.Clone(list), list[0]), "another": append([]blockmap.Digest{{1}}, list[1:]...),
		} {
			if _, err := blockmap.NewLeafList(&c, bad); !errors.Is(err, blockmap.ErrDigest) {
				t.Errorf("%d blocks: a list with %s: %v", n, name, err)
			}
		}
		// The list of one chunk does not vouch for another.
		if other, _ := chunkOf(99, n); l.Of(&other) || !errors.Is(other.VerifyLeaf(l, 0, content[:other.LeafSize(0)]), blockmap.ErrDigest) {
			t.Errorf("%d blocks: the list is taken for that of another chunk", n)
		}
	}
}

func TestLeafSet(t *testing.T) {
	for first := range 64 {
		for count := range 65 - first {
			s := blockmap.LeafRange(first, count)
			var got []int
			for i := range s.Each {
				got = append(got, i)
			}
			if s.Len() != count || len(got) != count || count > 0 && (got[0] != first || got[count-1] != first+count-1) {
				t.Fatalf("leaves %d+%d: %v", first, count, got)
			}
			if s.Has(first) != (count > 0) || !blockmap.LeafSet(^uint64(0)).Contains(s) || count > 0 && blockmap.LeafSet(0).Contains(s) {
				t.Fatalf("leaves %d+%d: %b", first, count, s)
			}
		}
	}
}

// An index of format 1 says what to do, and one of a later format does not say it.
func TestIndexOfOtherVersions(t *testing.T) {
	for version, want := range map[uint32]string{1: "thaw build", 3: "a later thaw"} {
		b := make([]byte, 64)
		copy(b, "thawindx")
		binary.LittleEndian.PutUint32(b[8:], version)
		if _, err := blockmap.DecodeIndex(b); !errors.Is(err, blockmap.ErrCorrupt) || !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("version %d: %v", version, err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	c, content := chunkOf(1, 256)
	l, err := blockmap.NewLeafList(&c, blockmap.LeafDigests(nil, content))
	if err != nil {
		b.Fatal(err)
	}
	b.Run("chunk", func(b *testing.B) {
		b.SetBytes(int64(len(content)))
		b.ReportAllocs()
		for b.Loop() {
			if c.Verify(content) != nil {
				b.Fatal("wrong")
			}
		}
	})
	b.Run("leaf", func(b *testing.B) {
		b.SetBytes(blockmap.LeafSize)
		b.ReportAllocs()
		for b.Loop() {
			if c.VerifyLeaf(l, 3, content[3*blockmap.LeafSize:4*blockmap.LeafSize]) != nil {
				b.Fatal("wrong")
			}
		}
	})
}
