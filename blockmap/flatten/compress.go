package flatten

import (
	"fmt"
	"math/bits"
	"sync"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
	"thaw/blockmap/race"
)

// Chunk sizes that a build can choose from, in bytes; powers of two.
const (
	MinChunkSize = 16 << 10
	MaxChunkSize = blockmap.MaxChunkBlocks * blockSize
)

// compressor compresses the chunks of all streams of a build, one at a time on each
// processor.
type compressor struct {
	size      int // of a full chunk
	enc       *zstd.Encoder
	slots     chan struct{} // taken by chunks under compression
	unwritten chan struct{} // taken by chunks that are not written yet
	bufs      sync.Pool
	frames    sync.Pool
}

// compressorMemory bounds the memory of all encoders together, on any number of
// processors, and that of the chunks that are not written yet, with their frames.
const compressorMemory = 64 << 20

// encoderMemory estimates the memory of one encoder, most of it hash tables.
func encoderMemory(level zstd.EncoderLevel, chunkSize int) int {
	n := 2 << 20
	switch level {
	case zstd.SpeedBetterCompression:
		n = 8 << 20
	case zstd.SpeedBestCompression:
		n = 40 << 20
	}
	return n + 2*chunkSize
}

func newCompressor(chunkSize, level, workers int) (*compressor, error) {
	workers = min(workers, max(compressorMemory/encoderMemory(zstd.EncoderLevelFromZstd(level), chunkSize), 2))
	enc, err := zstd.NewWriter(nil,
		zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)),
		zstd.WithEncoderConcurrency(workers),
		zstd.WithWindowSize(max(chunkSize, zstd.MinWindowSize)),
		zstd.WithEncoderCRC(false), // a chunk is checked by its SHA-256
		zstd.WithLowerEncoderMem(true),
	)
	if err != nil {
		return nil, fmt.Errorf("compression level %d: %w", level, err)
	}
	unwritten := max(workers+1, min(4*workers, compressorMemory/(2*chunkSize)))
	c := &compressor{size: chunkSize, enc: enc, slots: make(chan struct{}, workers), unwritten: make(chan struct{}, unwritten)}
	c.bufs.New = func() any { b := make([]byte, 0, chunkSize); return &b }
	c.frames.New = func() any { return new([]byte) }
	return c, nil
}

// compress makes the frame of a chunk. It runs on a goroutine of its own.
func (c *compressor) compress(x *compressed) {
	defer close(x.ready)
	defer recovered(&x.err)
	c.slots <- struct{}{}
	defer func() { <-c.slots }()
	x.digest = blockmap.ChunkDigest(*x.buf)
	x.frame = c.frames.Get().(*[]byte)
	race.Read(*x.buf)
	race.Write((*x.frame)[:cap(*x.frame)])
	*x.frame = c.enc.EncodeAll(*x.buf, (*x.frame)[:0])
	*x.buf = (*x.buf)[:0]
	c.bufs.Put(x.buf)
	x.buf = nil
}

// CheckChunkSize fails if n cannot be the size of chunks.
func CheckChunkSize(n int) error {
	if n < MinChunkSize || n > MaxChunkSize || bits.OnesCount(uint(n)) != 1 {
		return fmt.Errorf("a chunk size of %d bytes: pass a power of two from %d to %d", n, MinChunkSize, MaxChunkSize)
	}
	return nil
}
