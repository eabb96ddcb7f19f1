package flatten

import (
	"fmt"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
)

// newChunkDecoder is a decoder for decodeChunk.
func newChunkDecoder() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecodeAllCapLimit(true))
}

// decodeChunk decompresses a chunk into buf, which has room for it, and checks it
// against the chunk table.
func decodeChunk(dec *zstd.Decoder, stored, buf []byte, c *blockmap.Chunk) ([]byte, error) {
	content, err := dec.DecodeAll(stored, buf[:0:c.Size()])
	if err != nil {
		return nil, fmt.Errorf("%w: %w", blockmap.ErrCorrupt, err)
	}
	if !c.Holds(content) {
		return nil, blockmap.ErrDigest
	}
	return content, nil
}
