package flatten

import (
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// StreamReport describes one stream of an index, as `thaw inspect` shows it.
type StreamReport struct {
	Role    Role
	DiffID  string // of the layer; "" if the stream was not made of one
	Blob    blockmap.Digest
	Chunks  int
	Content int64 // bytes of the stream
	Live    int64 // of these, bytes that the file system shows: no upper layer hides them
	Stored  int64 // bytes of the blob
	Shared  int64 // bytes in chunks that another stream has too, of this image or of one reported before
}

// Reporter describes one image after the other, and finds the chunks that they share.
type Reporter struct {
	seen map[blockmap.Digest]bool
}

// Report describes the streams of an image, in the order of its index.
func (r *Reporter) Report(m *Image, ix *blockmap.Index) []StreamReport {
	if r.seen == nil {
		r.seen = make(map[blockmap.Digest]bool)
	}
	reports := make([]StreamReport, len(ix.Streams))
	for i := range ix.Streams {
		t := &ix.Streams[i]
		p := &reports[i]
		*p = StreamReport{
			Role: m.Role(i), Blob: t.Blob, Chunks: len(t.Chunks),
			Content: int64(t.Blocks()) * blockSize, Stored: t.BlobSize,
		}
		if id := m.DiffID(i); id != (v1.Hash{}) {
			p.DiffID = id.String()
		}
		for j := range t.Chunks {
			if c := &t.Chunks[j]; r.seen[c.Digest] {
				p.Shared += int64(c.Size())
			} else {
				r.seen[c.Digest] = true
			}
		}
	}
	for _, run := range ix.Runs {
		reports[run.Stream].Live += int64(run.Count) * blockSize
	}
	return reports
}
