package blocktest

import (
	"bytes"
	"crypto/sha256"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
)

// Image is a made-up block image: an index, its blobs, and the content of the device.
type Image struct {
	Index   *blockmap.Index
	Blobs   map[blockmap.Digest][]byte
	Content []byte
}

// NewImage makes an image of about the given number of blocks. It has three streams with
// chunks of 1 to 64 blocks, one chunk that is in all streams, and runs with holes between
// them.
func NewImage(t testing.TB, seed uint64, blocks int) *Image {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 0))
	m := &Image{Index: new(blockmap.Index), Blobs: make(map[blockmap.Digest][]byte)}
	var streams [][]byte
	shared := randomBlocks(rng, 8)
	for range 3 {
		var chunks [][]byte
		for n := 0; n < blocks/4; {
			c := randomBlocks(rng, 1+rng.IntN(64))
			n += len(c) / blockmap.BlockSize
			chunks = append(chunks, c)
		}
		chunks = append(chunks, shared)
		table, blob := Stream(t, chunks)
		m.Index.Streams = append(m.Index.Streams, *table)
		m.Blobs[table.Blob] = blob
		streams = append(streams, bytes.Join(chunks, nil))
	}
	// The device: pieces of the streams in turn, some after a hole.
	next := make([]uint32, len(streams))
	device := uint32(rng.IntN(3))
	for left := true; left; {
		left = false
		for i, s := range streams {
			end := uint32(len(s) / blockmap.BlockSize)
			if next[i] == end {
				continue
			}
			left = true
			n := min(1+rng.Uint32N(200), end-next[i])
			m.Index.Runs = append(m.Index.Runs, blockmap.Run{Device: device, Stream: uint32(i), Block: next[i], Count: n})
			next[i] += n
			device += n + rng.Uint32N(2)*rng.Uint32N(100)
		}
	}
	m.Index.Blocks = device + 5
	m.Content = make([]byte, int64(m.Index.Blocks)*blockmap.BlockSize)
	for _, r := range m.Index.Runs {
		copy(m.Content[int64(r.Device)*blockmap.BlockSize:],
			streams[r.Stream][int64(r.Block)*blockmap.BlockSize:][:int64(r.Count)*blockmap.BlockSize])
	}
	if err := m.Index.Seal(); err != nil {
		t.Fatal(err)
	}
	return m
}

// Stream makes a stream of chunks, each a whole number of blocks, and its blob.
func Stream(t testing.TB, chunks [][]byte) (*blockmap.Table, []byte) {
	t.Helper()
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	table := new(blockmap.Table)
	var blob, frame []byte
	size := 0
	for _, c := range chunks {
		size += len(c)
	}
	blob = make([]byte, 0, size) // they hardly compress, and a slice that grows costs the race detector much
	for _, c := range chunks {
		frame = enc.EncodeAll(c, frame[:0])
		table.Chunks = append(table.Chunks, blockmap.Chunk{
			Digest: blockmap.ChunkDigest(c), Offset: int64(len(blob)), Stored: uint32(len(frame)),
			Block: table.Blocks(), Count: uint32(len(c) / blockmap.BlockSize),
		})
		blob = append(blob, frame...)
	}
	table.Blob, table.BlobSize = sha256.Sum256(blob), int64(len(blob))
	return table, blob
}

// randomBlocks are n blocks that compress a little, as real ones do.
func randomBlocks(rng *rand.Rand, n int) []byte {
	b := make([]byte, n*blockmap.BlockSize)
	for i := range b {
		if i%4 != 0 {
			b[i] = byte(rng.Uint32())
		}
	}
	return b
}
