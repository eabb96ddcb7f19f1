package blockmap_test

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"reflect"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

func TestIndexRoundTrip(t *testing.T) {
	for seed := range uint64(20) {
		m := blocktest.NewImage(t, seed, 500)
		b := m.Index.Encode()
		got, err := blockmap.DecodeIndex(b)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, m.Index) {
			t.Fatalf("seed %d: the decoded index differs from the encoded one", seed)
		}
	}
}

// The program reads indexes of earlier versions, and writes the same bytes.
func TestFrozenIndex(t *testing.T) {
	chunks := func(first byte, counts ...uint32) (all []blockmap.Chunk) {
		var block, off uint32
		for i, n := range counts {
			all = append(all, blockmap.Chunk{Digest: blockmap.Digest{first, byte(i)}, Offset: int64(off + 7), Stored: 100 * n, Block: block, Count: n})
			block, off = block+n, off+7+100*n
		}
		return all
	}
	ix := &blockmap.Index{
		Blocks: 5000,
		Streams: []blockmap.Table{
			{Blob: blockmap.Digest{1}, BlobSize: 50_000, Chunks: chunks(3, 256, 1, 44)},
			{Blob: blockmap.Digest{2}, BlobSize: 1 << 33, Chunks: chunks(4, 1024, 300)},
		},
		Runs: []blockmap.Run{{Device: 0, Count: 200}, {Device: 300, Stream: 1, Block: 1000, Count: 324}, {Device: 4000, Block: 200, Count: 101}},
	}
	must(t, ix.Seal())
	got, err := blockmap.DecodeIndex(frozen(t, "index", ix.Encode()))
	must(t, err)
	if !reflect.DeepEqual(got, ix) {
		t.Error("the frozen index decodes to another index")
	}
}

func TestIndexAltered(t *testing.T) {
	b := blocktest.NewImage(t, 1, 200).Index.Encode()
	for i := range b {
		c := append([]byte(nil), b...)
		c[i] ^= 1 << (i % 8)
		if _, err := blockmap.DecodeIndex(c); !errors.Is(err, blockmap.ErrCorrupt) {
			t.Fatalf("a bit of byte %d was changed: %v", i, err)
		}
		if _, err := blockmap.DecodeIndex(b[:i]); !errors.Is(err, blockmap.ErrCorrupt) {
			t.Fatalf("cut to %d bytes: %v", i, err)
		}
	}
}

// An index may be wrong in spite of a right checksum: the other checks find that.
func TestIndexHostile(t *testing.T) {
	chunk := func(block, count uint32) blockmap.Chunk {
		return blockmap.Chunk{Block: block, Count: count, Stored: 10, Offset: int64(block) * 10}
	}
	table := blockmap.Table{BlobSize: 1000, Chunks: []blockmap.Chunk{chunk(0, 4), chunk(4, 4)}}
	for name, ix := range map[string]blockmap.Index{
		"overlap":         {Blocks: 100, Streams: []blockmap.Table{table}, Runs: []blockmap.Run{{Device: 0, Count: 4}, {Device: 3, Count: 2}}},
		"beyond device":   {Blocks: 3, Streams: []blockmap.Table{table}, Runs: []blockmap.Run{{Device: 0, Count: 4}}},
		"beyond stream":   {Blocks: 100, Streams: []blockmap.Table{table}, Runs: []blockmap.Run{{Device: 0, Block: 5, Count: 4}}},
		"far in stream":   {Blocks: 100, Streams: []blockmap.Table{table}, Runs: []blockmap.Run{{Device: 0, Block: 1<<32 - 1, Count: 4}}},
		"empty run":       {Blocks: 100, Streams: []blockmap.Table{table}, Runs: []blockmap.Run{{Device: 0, Count: 0}}},
		"empty chunk":     {Blocks: 100, Streams: []blockmap.Table{{BlobSize: 100, Chunks: []blockmap.Chunk{chunk(0, 0)}}}},
		"huge chunk":      {Blocks: 100, Streams: []blockmap.Table{{BlobSize: 100, Chunks: []blockmap.Chunk{chunk(0, blockmap.MaxChunkBlocks+1)}}}},
		"chunk of much":   {Blocks: 100, Streams: []blockmap.Table{{BlobSize: 1 << 40, Chunks: []blockmap.Chunk{{Count: 1, Stored: 1 << 30}}}}},
		"no streams":      {Blocks: 100},
		"no blocks":       {Streams: []blockmap.Table{table}},
		"many streams":    {Blocks: 100, Streams: make([]blockmap.Table, blockmap.MaxStreams+1)},
		"beyond the blob": {Blocks: 100, Streams: []blockmap.Table{{BlobSize: 5, Chunks: []blockmap.Chunk{chunk(0, 1)}}}},
	} {
		if _, err := blockmap.DecodeIndex(ix.Encode()); !errors.Is(err, blockmap.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	good := blockmap.Index{Blocks: 100, Streams: []blockmap.Table{table}, Runs: []blockmap.Run{{Device: 9, Block: 2, Count: 6}}}
	if _, err := blockmap.DecodeIndex(good.Encode()); err != nil {
		t.Error(err)
	}
}

// The memory of an index depends on its length, and not on its numbers.
func TestIndexOfFewBytes(t *testing.T) {
	ix := blockmap.Index{Blocks: math.MaxUint32, Streams: make([]blockmap.Table, 1)}
	b := ix.Encode()
	var got *blockmap.Index
	allocated := testing.Benchmark(func(b2 *testing.B) {
		for b2.Loop() {
			var err error
			if got, err = blockmap.DecodeIndex(b); err != nil {
				t.Fatal(err)
			}
		}
	}).AllocedBytesPerOp()
	if allocated > 16<<10 {
		t.Errorf("an index of %d bytes takes %d bytes of memory", len(b), allocated)
	}
	for _, block := range []uint32{0, 1, 1 << 20, math.MaxUint32 - 1} {
		if run, ok := got.Lookup(block); ok || run.Device != 0 || run.Count != math.MaxUint32 {
			t.Errorf("block %d is in run %v, but the index has no runs", block, run)
		}
	}
}

// noFetch fails every fetch.
type noFetch struct{}

func (noFetch) Fetch(context.Context, []blockmap.Want) error { return blocktest.ErrInjected }
func (noFetch) Prefetch([]blockmap.Want)                     {}

// use reads an index in the same ways as a server.
func use(t *testing.T, c *blockmap.Cache, ix *blockmap.Index) {
	image, err := blockmap.NewImage(ix, c, noFetch{})
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	size := image.Size()
	for _, e := range []blockmap.Extent{
		blockmap.Range(0, min(size, 1<<20)), blockmap.Range(size-min(size, 1<<20), min(size, 1<<20)), blockmap.Range(size/2&^4095, 4096),
	} {
		if v, ok := image.View(e); ok {
			v.Release()
		} else if err := image.Fault(t.Context(), e); !errors.Is(err, blocktest.ErrInjected) {
			t.Fatalf("a fetch that must fail: %v", err)
		}
		if s := image.Status(e); s.Len() <= 0 || s.Start != e.Start {
			t.Fatalf("the status of %v is about %v", e, s.Extent)
		}
		image.Prefetch(e)
	}
	image.MissingStream(0)
	for at, n := int64(0), 0; at < size && n < 1000; n++ {
		at = image.Status(blockmap.Extent{Start: at, End: size}).End
	}
}

func FuzzIndex(f *testing.F) {
	f.Add(blocktest.NewImage(f, 1, 50).Index.Encode())
	f.Add(blocktest.NewImage(f, 2, 300).Index.Encode())
	empty := blockmap.Index{Blocks: 8}
	f.Add(empty.Encode())
	empty.Streams = make([]blockmap.Table, 2)
	f.Add(empty.Encode())
	c := newCache(f, f.TempDir(), blockmap.CacheOptions{})
	f.Fuzz(func(t *testing.T, b []byte) {
		// With a right checksum the fuzzer reaches the code behind the check.
		if len(b) >= 20 {
			b = append([]byte(nil), b...)
			blockmap.SealIndex(b)
		}
		ix, err := blockmap.DecodeIndex(b)
		if err != nil {
			return
		}
		if ix.Blocks < 1<<24 { // the size of streams' bitmaps depends on their length
			use(t, c, ix)
		}
		again, err := blockmap.DecodeIndex(ix.Encode())
		if err != nil || !reflect.DeepEqual(again, ix) {
			t.Fatalf("an index that was accepted does not survive a round trip: %v", err)
		}
		for i := range ix.Streams {
			s := &ix.Streams[i]
			for _, b := range []uint32{0, s.Blocks() / 2, s.Blocks() - 1} {
				if s.Blocks() > 0 {
					if c := s.Chunks[s.Find(b)]; b < c.Block || b >= c.Block+c.Count {
						t.Fatalf("block %d is not in the chunk found for it", b)
					}
				}
			}
		}
	})
}

func BenchmarkView(b *testing.B) {
	m := blocktest.NewImage(b, 1, 20000)
	image := newImage(b, m, blocktest.NewOrigin(m))
	if _, err := blocktest.Read(b.Context(), image, blockmap.Range(0, image.Size())); err != nil {
		b.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	b.ReportAllocs()
	for b.Loop() {
		v, ok := image.View(blockmap.Range(rng.Int64N(image.Size()/4096)*4096, 4096))
		if !ok {
			b.Fatal("not resident")
		}
		v.Release()
	}
}
