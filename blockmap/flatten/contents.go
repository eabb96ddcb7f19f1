package flatten

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

// contents reads files of the image that is being built. The streams that this build
// has made are still on disk, if there was room; it gets the chunks of other streams
// from the target.
type contents struct {
	kept    *tempDir
	src     chunkSource
	streams []Stream
	dec     *blockmap.ChunkDecoder
	held    []heldChunk // the one used last comes first
	budget  int64       // bytes of chunks that may still be read
	failed  error       // of the target; with it, nothing is known of the rest of the files
}

// chunkSource is the part of a Target that contents needs.
type chunkSource interface {
	OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error)
}

type heldChunk struct {
	stream, chunk int
	b             []byte
}

const (
	// maxHeld bounds the chunks that are kept, in bytes of content.
	maxHeld = 16 << 20

	// maxGuessReads bounds the bytes of content that are read for a guess. Chromium
	// with its hundred libraries needs a fifth of it.
	maxGuessReads = 1 << 30
)

// errBudget ends the reads for a guess. The guess so far is used.
var errBudget = errors.New("the limit of reads for the guess is reached")

func newContents(kept *tempDir, src chunkSource, streams []Stream) *contents {
	return &contents{kept: kept, src: src, streams: streams, dec: blockmap.NewChunkDecoder(1), budget: maxGuessReads}
}

func (c *contents) close() { c.dec.Close() }

// read returns n bytes of a file from off, or fewer if the file ends before.
func (c *contents) read(ctx context.Context, in *ext4.Inode, off int64, n int) ([]byte, error) {
	if off < 0 || off >= in.Size {
		return nil, nil
	}
	p := make([]byte, min(int64(n), in.Size-off))
	end := off + int64(len(p))
	for _, r := range runsFrom(in, off/blockSize) {
		start := int64(r.FileBlock) * blockSize
		if start >= end {
			break
		}
		at, to := max(off, start), min(end, start+int64(r.Count)*blockSize)
		for at < to {
			b, err := c.from(ctx, r.Stream, r.Block+uint32((at-start)/blockSize))
			if err != nil {
				return nil, err
			}
			if skip := int(at % blockSize); skip < len(b) {
				at += int64(copy(p[at-off:to-off], b[skip:]))
			}
		}
	}
	return p, nil
}

// runsFrom returns the runs of a file that end behind a block of it.
func runsFrom(in *ext4.Inode, block int64) []ext4.Run {
	return in.Data[sort.Search(len(in.Data), func(i int) bool {
		return int64(in.Data[i].FileBlock)+int64(in.Data[i].Count) > block
	}):]
}

// from returns the content of a chunk, from a block of its stream to its end.
func (c *contents) from(ctx context.Context, stream, block uint32) ([]byte, error) {
	t := c.streams[stream].Table
	i, ok := slices.BinarySearchFunc(t.Chunks, block, func(c blockmap.Chunk, block uint32) int {
		switch {
		case block < c.Block:
			return 1
		case block >= c.Block+c.Count:
			return -1
		}
		return 0
	})
	if !ok {
		return nil, fmt.Errorf("%w: block %d is not in stream %d", blockmap.ErrCorrupt, block, stream)
	}
	b, err := c.chunk(ctx, int(stream), i)
	if err != nil {
		return nil, err
	}
	return b[int(block-t.Chunks[i].Block)*blockSize:], nil
}

func (c *contents) chunk(ctx context.Context, stream, i int) ([]byte, error) {
	for k, h := range c.held {
		if h.stream == stream && h.chunk == i {
			copy(c.held[1:k+1], c.held[:k])
			c.held[0] = h
			return h.b, nil
		}
	}
	t := c.streams[stream].Table
	x := &t.Chunks[i]
	if c.failed != nil {
		return nil, c.failed
	}
	if c.budget -= int64(x.Size()); c.budget < 0 {
		c.budget = 0 // so that smaller chunks fail too
		return nil, errBudget
	}
	var b []byte
	var err error
	// The target may use another mirror or connection at the next attempt.
	for range 3 {
		if b, err = c.fetch(ctx, t, x); err == nil || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		c.failed = fmt.Errorf("chunk %d of blob %v: %w", i, t.Blob, err)
		return nil, c.failed
	}
	c.held = slices.Insert(c.held, 0, heldChunk{stream, i, b})
	total := 0
	for k, h := range c.held {
		if total += len(h.b); total > maxHeld && k > 0 {
			c.held = slices.Delete(c.held, k, len(c.held))
			break
		}
	}
	return b, nil
}

func (c *contents) fetch(ctx context.Context, t *blockmap.Table, x *blockmap.Chunk) ([]byte, error) {
	if stored := c.kept.read(t.Blob, x.Offset, int64(x.Stored)); stored != nil {
		b, err := c.dec.Decode(x, stored, nil)
		if err == nil {
			return b, nil
		}
		c.kept.drop(t.Blob) // the disk does not give what was written
	}
	r, err := c.src.OpenRange(ctx, t.Blob, x.Offset, int64(x.Stored))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	stored := make([]byte, x.Stored)
	if _, err := io.ReadFull(r, stored); err != nil {
		return nil, unexpected(err)
	}
	b, err := c.dec.Decode(x, stored, nil)
	if err != nil {
		if d, ok := r.(interface{ Distrust() }); ok {
			d.Distrust()
		}
		return nil, err
	}
	return b, nil
}
