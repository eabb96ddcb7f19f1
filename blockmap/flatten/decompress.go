package flatten

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/semaphore"

	"thaw/blockmap"
)

// commonWindow is a window that few zstd layers exceed. Layers with larger windows, up
// to blockmap.MaxWindow, are converted one at a time.
const commonWindow = 8 << 20

// decompress detects the compression of a layer by its first bytes and ignores its
// media type: images with wrong media types are in use. windows bounds the memory for
// the windows of all zstd layers.
func decompress(ctx context.Context, r io.Reader, windows *semaphore.Weighted) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 1<<20)
	head, err := b.Peek(tarBlock)
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("read the layer: %w", err)
	}
	var plain io.Reader = b
	var close func()
	switch {
	case isTar(head): // whatever its first file is called
	case len(head) >= 2 && head[0] == 0x1f && head[1] == 0x8b:
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, fmt.Errorf("read the gzip layer: %w", err)
		}
		plain = z
	case len(head) >= 4 && (string(head[:4]) == "\x28\xb5\x2f\xfd" || head[0]&0xf0 == 0x50 && string(head[1:4]) == "\x2a\x4d\x18"):
		memory := int64(commonWindow)
		var h zstd.Header
		if h.Decode(head) == nil && !h.Skippable && h.WindowSize > commonWindow {
			memory = blockmap.MaxWindow
		}
		if err := windows.Acquire(ctx, memory); err != nil {
			return nil, context.Cause(ctx)
		}
		z, err := blockmap.NewZstdReader(b)
		if err != nil {
			windows.Release(memory)
			return nil, fmt.Errorf("read the zstd layer: %w", err)
		}
		plain, close = z, func() { z.Close(); windows.Release(memory) }
	default:
		for magic, by := range map[string]string{"\xfd7zXZ\x00": "xz", "BZh": "bzip2", "\x04\x22\x4d\x18": "lz4"} {
			if strings.HasPrefix(string(head), magic) {
				return nil, fmt.Errorf("the layer is compressed by %s: thaw reads gzip, zstd and uncompressed layers; rebuild the image with one of these", by)
			}
		}
	}
	return newReadAhead(plain, close), nil
}

// A tar consists of blocks of 512 bytes. At byte 148 of a header is a checksum: the
// sum of the header's bytes in octal, with the checksum itself taken as spaces.
const (
	tarBlock    = 512
	tarSum      = 148
	tarSumBytes = 8
)

// isTar reports whether head is a header with a correct checksum.
func isTar(head []byte) bool {
	if len(head) < tarBlock {
		return false
	}
	want, err := strconv.ParseUint(strings.Trim(string(head[tarSum:tarSum+tarSumBytes]), " \x00"), 8, 32)
	if err != nil {
		return false
	}
	sum := uint64(tarSumBytes * ' ')
	for i, c := range head[:tarBlock] {
		if i < tarSum || i >= tarSum+tarSumBytes {
			sum += uint64(c)
		}
	}
	return sum == want
}
