package blockmap

import (
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap/race"
)

// This file is the one place where content is compared with an index. Stream.Fill and
// Stream.Hold call Verify, and so does ChunkDecoder.Decode. Stream.FillLeaves and
// Stream.HoldLeaves call VerifyLeaf, with a LeafList that NewLeafList has verified.
// Stream.FillArrived and Stream.HoldArrived have an Arriving (arriving.go) compare its
// leaves, which were hashed while they arrived.

// Verify says whether content is that of the chunk, by its digest, and fails with
// ErrDigest if it is not.
func (c *Chunk) Verify(content []byte) error {
	if len(content) != c.Size() || ChunkDigest(content) != c.Digest {
		return ErrDigest
	}
	return nil
}

// LeafList is the digests of the leaves of a chunk, verified by the digest of the chunk.
type LeafList struct {
	chunk  Digest
	blocks uint32
	list   []Digest
}

// NewLeafList verifies that list has the digests of all leaves of the chunk, and fails
// with ErrDigest if it has not. The caller no longer changes the list.
func NewLeafList(c *Chunk, list []Digest) (*LeafList, error) {
	if len(list) != c.Leaves() || ListDigest(list) != c.Digest {
		return nil, ErrDigest
	}
	return &LeafList{c.Digest, c.Count, list}, nil
}

// Of says whether the list is that of chunk c, or of a chunk of the same content.
func (l *LeafList) Of(c *Chunk) bool { return l.chunk == c.Digest && l.blocks == c.Count }

// Digests are the digests of the leaves, in order. The caller must not change them.
func (l *LeafList) Digests() []Digest { return l.list }

// VerifyLeaf says whether content is that of leaf i of the chunk. It fails with
// ErrDigest if it is not, or if the list is that of another chunk.
func (c *Chunk) VerifyLeaf(l *LeafList, i int, content []byte) error {
	if !l.Of(c) || i < 0 || i >= len(l.list) || len(content) != c.LeafSize(i) || LeafDigest(content) != l.list[i] {
		return ErrDigest
	}
	return nil
}

// ChunkDecoder makes chunks of what blobs and bundles hold of them: a zstd frame
// each. It may be used at once.
type ChunkDecoder struct {
	zstd    *zstd.Decoder
	readers sync.Pool // of decoders of frames that arrive, without goroutines
}

// NewChunkDecoder makes one that decodes several chunks at once. It is to be closed.
func NewChunkDecoder(atOnce int) *ChunkDecoder {
	// The content's length is known: a frame that claims more is refused before
	// memory is taken for it. Only an option that makes no sense is an error.
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(atOnce), zstd.WithDecodeAllCapLimit(true),
		zstd.WithDecoderMaxMemory(MaxChunkBlocks*BlockSize))
	if err != nil {
		panic(err)
	}
	return &ChunkDecoder{zstd: z}
}

// Close frees the decoder.
func (d *ChunkDecoder) Close() { d.zstd.Close() }

// Decompress returns the content of chunk c from its frame, in buf if c.Size()
// bytes fit there. The content is not verified: Stream.Fill and Stream.Hold do so.
func (d *ChunkDecoder) Decompress(c *Chunk, frame, buf []byte) ([]byte, error) {
	return d.DecompressSize(c.Size(), frame, buf)
}

// DecompressSize is Decompress for a frame with a content of size bytes or less: that of
// leaves in a bundle.
func (d *ChunkDecoder) DecompressSize(size int, frame, buf []byte) ([]byte, error) {
	if cap(buf) < size {
		buf = make([]byte, size)
	}
	race.Read(frame)
	race.Write(buf[:size])
	content, err := d.zstd.DecodeAll(frame, buf[:0:size])
	if err != nil {
		return nil, &frameError{err}
	}
	return content, nil
}

// Decode is Decompress for content that goes anywhere but to a Stream: it verifies
// it.
func (d *ChunkDecoder) Decode(c *Chunk, frame, buf []byte) ([]byte, error) {
	content, err := d.Decompress(c, frame, buf)
	if err != nil {
		return nil, err
	}
	return content, c.Verify(content)
}

// frameError says that a frame cannot be decompressed: then it is not that of the
// chunk, and is corrupt.
type frameError struct{ err error }

func (e *frameError) Error() string {
	return fmt.Sprintf("%v: it cannot be decompressed: %v", ErrDigest, e.err)
}

func (e *frameError) Unwrap() []error { return []error{ErrDigest, ErrCorrupt, e.err} }
