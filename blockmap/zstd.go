package blockmap

import (
	"io"

	"github.com/klauspost/compress/zstd"
)

// MaxWindow is the most memory, in bytes, that a decompressor takes for the window
// of a layer or an archive. A frame or block that asks for more is refused: the
// formats allow gigabytes for a header of a few bytes. 128 MiB are what `zstd
// --long` and `xz -9` need, with room to spare.
const MaxWindow = 128 << 20

// NewZstdReader decompresses a layer or an archive on the caller's goroutine. It is
// to be closed.
func NewZstdReader(r io.Reader) (*zstd.Decoder, error) {
	return zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(MaxWindow))
}
