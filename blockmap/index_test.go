package blockmap_test

import (
	"errors"
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
			t.Fatalf("seed %d: what was decoded is not what was encoded", seed)
		}
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

// A right checksum makes no index right: these are what the checks behind it
// are for.
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

func FuzzIndex(f *testing.F) {
	f.Add(blocktest.NewImage(f, 1, 50).Index.Encode())
	f.Add(blocktest.NewImage(f, 2, 300).Index.Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		// Past the checksum, which would keep the fuzzer from everything
		// that lies behind it.
		if len(b) >= 20 {
			b = append([]byte(nil), b...)
			blockmap.SealIndex(b)
		}
		ix, err := blockmap.DecodeIndex(b)
		if err != nil {
			return
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
