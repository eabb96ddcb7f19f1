package tracefile

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"thaw/blockmap"
)

// Bounds on what Pack has in flight.
const (
	packRequests = 8
	packRequest  = 4 << 20
)

// Scratch is a temporary file.
type Scratch interface {
	io.ReaderAt
	io.WriterAt
}

// Pack writes the bundle of the plan to w and returns its head. open reads n
// bytes at off of a blob that holds chunks; several are open at once. scratch
// takes the frames until their order is known.
//
// Pack compresses each chunk anew, as hard as it can: a chunk is packed once, and
// each start waits for every byte of it. Pack checks each chunk against its digest,
// and fails where one does not match.
func (p *Plan) Pack(ctx context.Context, w io.Writer, scratch Scratch, open func(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error)) (*Bundle, error) {
	k, err := newPacker(p, scratch)
	if err != nil {
		return nil, fmt.Errorf("pack: %w", err)
	}
	defer k.close()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(packRequests)
	for _, run := range k.runs() {
		g.Go(func() error {
			if err := k.read(ctx, run, open); err != nil {
				return fmt.Errorf("pack chunks of blob sha256:%.12s…: %w", run.blob, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	head := k.bundle.Head()
	if len(head)-bundleHead > maxBundleHead {
		return nil, fmt.Errorf("pack: %d chunks are more than a bundle can have", len(k.bundle.Parts))
	}
	if _, err := w.Write(head); err != nil {
		return nil, fmt.Errorf("pack: %w", err)
	}
	for i, part := range k.bundle.Parts {
		if _, err := io.Copy(w, io.NewSectionReader(scratch, k.at[i], int64(part.Stored))); err != nil {
			return nil, fmt.Errorf("pack: %w", err)
		}
	}
	return k.bundle, nil
}

// packer makes the frames of a bundle.
type packer struct {
	plan    *Plan
	bundle  *Bundle
	at      []int64 // of each part's frame in scratch, which has room for it as it was
	scratch Scratch
	dec     *blockmap.ChunkDecoder
	enc     *zstd.Encoder
	slots   chan struct{} // a token for each chunk that is compressed
}

func newPacker(p *Plan, scratch Scratch) (*packer, error) {
	k := &packer{plan: p, bundle: p.Bundle(), scratch: scratch, slots: make(chan struct{}, min(runtime.GOMAXPROCS(0), packRequests))}
	var at int64
	for _, part := range k.bundle.Parts {
		k.at = append(k.at, at)
		at += int64(part.Stored)
	}
	var err error
	k.enc, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(cap(k.slots)),
		zstd.WithWindowSize(blockmap.MaxChunkBlocks*blockmap.BlockSize), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, err
	}
	k.dec = blockmap.NewChunkDecoder(cap(k.slots))
	return k, nil
}

func (k *packer) close() {
	k.dec.Close()
	k.enc.Close() // writes nothing: EncodeAll alone is used
}

// packRun is chunks that lie side by side in a blob.
type packRun struct {
	blob   blockmap.Digest
	chunks []*blockmap.Chunk
	parts  []int
}

// runs groups the chunks that are read together.
func (k *packer) runs() (runs []*packRun) {
	type piece struct {
		stream, part int
		chunk        *blockmap.Chunk
	}
	var pieces []piece
	for _, s := range k.plan.Steps {
		if !s.Again {
			pieces = append(pieces, piece{s.Stream, len(pieces), k.plan.Chunk(s)})
		}
	}
	slices.SortFunc(pieces, func(a, b piece) int {
		return cmp.Or(cmp.Compare(a.stream, b.stream), cmp.Compare(a.chunk.Block, b.chunk.Block))
	})
	var bytes int64
	for i, x := range pieces {
		n := int64(x.chunk.Stored)
		if i == 0 || pieces[i-1].stream != x.stream || bytes+n > packRequest ||
			pieces[i-1].chunk.Offset+int64(pieces[i-1].chunk.Stored) != x.chunk.Offset {
			runs = append(runs, &packRun{blob: k.plan.Index.Streams[x.stream].Blob})
			bytes = 0
		}
		bytes += n
		r := runs[len(runs)-1]
		r.chunks = append(r.chunks, x.chunk)
		r.parts = append(r.parts, x.part)
	}
	return runs
}

// read brings the chunks of a run to scratch.
func (k *packer) read(ctx context.Context, r *packRun, open func(context.Context, blockmap.Digest, int64, int64) (io.ReadCloser, error)) error {
	first, last := r.chunks[0], r.chunks[len(r.chunks)-1]
	body, err := open(ctx, r.blob, first.Offset, last.Offset+int64(last.Stored)-first.Offset)
	if err != nil {
		return err
	}
	defer body.Close()
	for i, c := range r.chunks {
		frame := make([]byte, c.Stored)
		if _, err := io.ReadFull(body, frame); err != nil {
			return err
		}
		content, err := k.dec.Decode(c, frame, nil)
		if err != nil {
			return fmt.Errorf("%d bytes at %d: %w", c.Stored, c.Offset, err)
		}
		select {
		case k.slots <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if again := k.enc.EncodeAll(content, make([]byte, 0, c.Stored)); len(again) < len(frame) {
			frame = again
		}
		<-k.slots
		part := r.parts[i]
		k.bundle.Parts[part].Stored = uint32(len(frame)) // nobody else has this part
		if _, err := k.scratch.WriteAt(frame, k.at[part]); err != nil {
			return err
		}
	}
	return nil
}
