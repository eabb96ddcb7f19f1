package flatten

import (
	"context"
	"io"
	"iter"
	"runtime"
	"slices"

	"thaw/blockmap"
)

// Estimate says how large a commit would be.
type Estimate struct {
	Changed int64 // bytes of changed blocks
	Content int64 // bytes of the new stream
	Stored  int64 // bytes of its blob
	Exact   bool  // all was compared and compressed; otherwise a sample
}

// A sample is this many pieces of this many bytes, evenly spread over the changed bytes.
const (
	samplePieces = 48
	samplePiece  = 256 << 10
)

// EstimateCommit compares and compresses what a commit of d would, or a sample of it, and
// keeps nothing. Of base it needs Image, Index and Device.
func EstimateCommit(ctx context.Context, d Changed, base CommitBase, exact bool) (Estimate, error) {
	var e Estimate
	var data int64
	for x := range d.Changes() {
		e.Changed += x.Len()
		if !x.Zero {
			data += x.Len()
		}
	}
	sampled := d
	part := 1.0
	if e.Exact = exact || data <= samplePieces*samplePiece; !e.Exact {
		s := sample(d, data)
		sampled, part = s, float64(s.bytes)/float64(data)
	}
	c, err := newCompressor(DefaultChunkSize, DefaultLevel, runtime.GOMAXPROCS(0))
	if err != nil {
		return Estimate{}, err
	}
	w := newStreamWriter(ctx, c, io.Discard)
	delta := &delta{ctx: ctx, base: base, device: sampled, progress: new(CommitProgress), w: w, chunk: DefaultChunkSize}
	t, err := w.finish(delta.write())
	if err != nil {
		return Estimate{}, err
	}
	if blocks := int64(t.Blocks()); blocks > 0 {
		e.Content = int64(float64(blocks*blockSize) / part)
		e.Stored = int64(float64(t.BlobSize) / part)
	}
	return e, nil
}

// sampling is a device with a part of its changes.
type sampling struct {
	Changed
	list  []blockmap.Change
	bytes int64
}

func (s *sampling) Changes() iter.Seq[blockmap.Change] { return slices.Values(s.list) }

// sample chooses pieces of the changes with data, of which there are so many bytes.
func sample(d Changed, data int64) *sampling {
	s := &sampling{Changed: d}
	step := data / samplePieces / blockSize * blockSize
	var seen, next int64 // bytes of data; next is where the next piece begins
	for x := range d.Changes() {
		if x.Zero {
			continue
		}
		for next < seen+x.Len() {
			from := x.Start + max(next-seen, 0)
			p := blockmap.Extent{Start: from, End: min(from+samplePiece-s.bytes%samplePiece, x.End)}
			s.list = append(s.list, blockmap.Change{Extent: p})
			s.bytes += p.Len()
			if s.bytes%samplePiece != 0 { // the piece goes on in the next run
				next = seen + x.Len()
				break
			}
			next = max(next+step, seen+p.End-x.Start)
		}
		seen += x.Len()
	}
	return s
}
