package flatten

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"math/bits"
	"sync"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

const (
	blockSize = blockmap.BlockSize

	// ext4 numbers the blocks of a file with 32 bits.
	maxFileSize = (1<<32 - 1) * blockSize
)

// holeWindow is the granularity at which zeros in a file become a hole. Finer
// holes would cost an extent each, in the filesystem and in the index, and
// save bytes that compress to nothing.
const holeWindow = 64 << 10

// Chunk sizes that a build can choose from, in bytes; powers of two.
const (
	MinChunkSize = 16 << 10
	MaxChunkSize = blockmap.MaxChunkBlocks * blockSize
)

// compressor compresses chunks for all streams of a build, as many at once as
// there are processors.
type compressor struct {
	size   int // of a full chunk
	enc    *zstd.Encoder
	slots  chan struct{} // taken by chunks under compression
	flight chan struct{} // taken by chunks that are not written yet
	bufs   sync.Pool
	frames sync.Pool
}

// However many processors there are, encoders take this much memory together,
// and so do chunks in flight with their frames.
const compressorMemory = 64 << 20

// encoderMemory is about what one encoder takes, most of it hash tables.
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
	flight := max(workers+1, min(4*workers, compressorMemory/(2*chunkSize)))
	c := &compressor{size: chunkSize, enc: enc, slots: make(chan struct{}, workers), flight: make(chan struct{}, flight)}
	c.bufs.New = func() any { b := make([]byte, 0, chunkSize); return &b }
	c.frames.New = func() any { return new([]byte) }
	return c, nil
}

// packer writes one stream: it cuts what it is given into chunks, has them
// compressed beside each other, and writes them in order.
//
// A large file starts a chunk and is cut at fixed steps from its own start, and
// its end ends a chunk: so its chunks are the same in any stream. Smaller files
// are packed together. A pack ends before a file that would overflow it, and,
// once half full, behind a file whose checksum says so: a boundary that depends
// on a file alone, so that two layers with some of their files in common fall
// into step again.
type packer struct {
	ctx  context.Context
	c    *compressor
	size int // of a full chunk
	w    io.Writer

	chunk *[]byte // being filled
	block uint32  // of the stream, where chunk begins

	// The file being packed.
	large bool
	sum   uint32
	at    int64 // in the file
	runs  []ext4.Run

	// pending holds the chunks in flight in stream order.
	pending chan *compressed
	done    chan struct{} // closed when all of pending has been written
	err     error         // of writing; to be read when done is closed
	failed  chan struct{} // closed when err is set
	table   blockmap.Table
	sha     hash.Hash
	seek    []byte
}

type compressed struct {
	count  uint32
	digest blockmap.Digest
	frame  *[]byte
	buf    *[]byte
	ready  chan struct{}
}

// newPacker starts a stream that is written to w. close ends it, in any case.
func newPacker(ctx context.Context, c *compressor, w io.Writer) *packer {
	p := &packer{
		ctx: ctx, c: c, size: c.size, w: w, sha: sha256.New(),
		pending: make(chan *compressed, cap(c.flight)),
		done:    make(chan struct{}),
		failed:  make(chan struct{}),
	}
	p.chunk = c.bufs.Get().(*[]byte)
	go p.write()
	return p
}

// file packs a file of size bytes, read from r, and returns where its blocks
// went. The runs' Stream is left zero.
func (p *packer) file(r io.Reader, size int64) ([]ext4.Run, error) {
	if size > maxFileSize {
		return nil, fmt.Errorf("a file of %d bytes is larger than ext4 can hold", size)
	}
	padded := (size + blockSize - 1) &^ (blockSize - 1)
	p.large = padded >= int64(p.size)
	if p.large || int64(len(*p.chunk))+padded > int64(p.size) {
		if err := p.cut(); err != nil {
			return nil, err
		}
	}
	p.sum, p.at, p.runs = 0, 0, nil
	window := min(holeWindow, p.size)
	for p.at < size {
		n := int(min(int64(window), size-p.at))
		if err := p.window(r, n); err != nil {
			return nil, err
		}
	}
	if p.large || len(p.runs) > 0 && len(*p.chunk) >= p.size/2 && p.marks(padded) {
		if err := p.cut(); err != nil {
			return nil, err
		}
	}
	return p.runs, nil
}

// marks says whether the file just packed ends a pack that is half full. On
// average one does in each quarter of a chunk's size, however large files are:
// often enough that most packs end there and not where they overflow, and
// seldom enough that packs which began at different files end at the same.
func (p *packer) marks(padded int64) bool {
	return uint64(p.sum)*uint64(p.size/4) < uint64(padded)<<32
}

var zeroWindow [holeWindow]byte

// window packs the next n bytes of the file.
func (p *packer) window(r io.Reader, n int) error {
	b := *p.chunk
	start := len(b)
	b = b[:start+n]
	if _, err := io.ReadFull(r, b[start:]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	first := uint32(p.at / blockSize)
	p.at += int64(n)
	if bytes.Equal(b[start:], zeroWindow[:n]) {
		// What lies in the buffer behind its length is never read again.
		if p.large && p.at%int64(p.size) == 0 {
			return p.cut()
		}
		return nil
	}
	p.sum = crc32.Update(p.sum, castagnoli, b[start:])
	for len(b)%blockSize != 0 {
		pad := blockSize - len(b)%blockSize
		b = append(b, zeroWindow[:pad]...)
	}
	*p.chunk = b
	count := uint32(len(b)-start) / blockSize
	block := p.block + uint32(start/blockSize)
	if k := len(p.runs) - 1; k >= 0 && p.runs[k].FileBlock+p.runs[k].Count == first && p.runs[k].Block+p.runs[k].Count == block {
		p.runs[k].Count += count
	} else {
		p.runs = append(p.runs, ext4.Run{FileBlock: first, Block: block, Count: count})
	}
	if p.large && p.at%int64(p.size) == 0 {
		return p.cut()
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Write packs metadata: blocks that belong to no file, cut at fixed steps.
func (p *packer) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		m := min(len(b), p.size-len(*p.chunk))
		*p.chunk = append(*p.chunk, b[:m]...)
		b = b[m:]
		if len(*p.chunk) == p.size {
			if err := p.cut(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

// cut ends the chunk, if there is anything in it.
func (p *packer) cut() error {
	if p.ctx.Err() != nil {
		return context.Cause(p.ctx)
	}
	if len(*p.chunk) == 0 {
		return nil
	}
	x := &compressed{count: uint32(len(*p.chunk) / blockSize), buf: p.chunk, ready: make(chan struct{})}
	if int64(p.block)+int64(x.count) > 1<<32-1 {
		return errors.New("a layer of more than 16 TiB")
	}
	// A chunk in flight waits for chunks of its stream alone that came before
	// it, so the one that came first goes on.
	select {
	case p.c.flight <- struct{}{}:
	case <-p.failed:
		return p.err
	case <-p.ctx.Done():
		return context.Cause(p.ctx)
	}
	go func() {
		p.c.slots <- struct{}{}
		x.digest = sha256.Sum256(*x.buf)
		x.frame = p.c.frames.Get().(*[]byte)
		*x.frame = p.c.enc.EncodeAll(*x.buf, (*x.frame)[:0])
		*x.buf = (*x.buf)[:0]
		p.c.bufs.Put(x.buf)
		x.buf = nil
		<-p.c.slots
		close(x.ready)
	}()
	// Sent to from here alone, so the order is that of the stream. write
	// takes from it until it is closed.
	p.pending <- x
	p.block += x.count
	p.chunk = p.c.bufs.Get().(*[]byte)
	return nil
}

func (p *packer) write() {
	defer close(p.done)
	for x := range p.pending {
		<-x.ready
		if p.err == nil {
			p.add(x)
		}
		p.c.frames.Put(x.frame)
		<-p.c.flight
	}
}

func (p *packer) add(x *compressed) {
	stored := uint32(len(*x.frame))
	p.table.Chunks = append(p.table.Chunks, blockmap.Chunk{
		Digest: x.digest, Offset: p.table.BlobSize, Stored: stored,
		Block: p.table.Blocks(), Count: x.count,
	})
	p.seek = binary.LittleEndian.AppendUint32(p.seek, stored)
	p.seek = binary.LittleEndian.AppendUint32(p.seek, x.count*blockSize)
	p.put(*x.frame)
}

func (p *packer) put(b []byte) {
	p.sha.Write(b)
	p.table.BlobSize += int64(len(b))
	if _, err := p.w.Write(b); err != nil {
		p.err = err
		close(p.failed)
	}
}

// close ends the stream. With an error the rest of it is thrown away. The blob
// ends in a seek table, as the zstd seekable format has it (contrib/seekable_format
// of zstd): a skippable frame that lists the frames before it.
//
//	0  4  0x184D2A5E, little-endian as all that follows
//	4  4  length of the rest
//	8     for each chunk: 4 bytes compressed length, 4 bytes content length
//	..  4  number of chunks
//	..  1  0: no checksums
//	..  4  0x8F92EAB1
func (p *packer) close(cause error) (*blockmap.Table, error) {
	if cause == nil {
		cause = p.cut()
	}
	close(p.pending)
	<-p.done
	if p.err == nil && cause == nil {
		n := len(p.seek)
		tail := binary.LittleEndian.AppendUint32(nil, 0x184D2A5E)
		tail = binary.LittleEndian.AppendUint32(tail, uint32(n+9))
		tail = append(tail, p.seek...)
		tail = binary.LittleEndian.AppendUint32(tail, uint32(n/8))
		tail = append(tail, 0)
		tail = binary.LittleEndian.AppendUint32(tail, 0x8F92EAB1)
		p.put(tail)
	}
	if cause == nil {
		cause = p.err
	}
	if cause != nil {
		return nil, cause
	}
	p.sha.Sum(p.table.Blob[:0])
	return &p.table, nil
}

// CheckChunkSize says whether n can be the size of chunks.
func CheckChunkSize(n int) error {
	if n < MinChunkSize || n > MaxChunkSize || bits.OnesCount(uint(n)) != 1 {
		return fmt.Errorf("a chunk size of %d bytes: it is to be a power of two from %d to %d", n, MinChunkSize, MaxChunkSize)
	}
	return nil
}
