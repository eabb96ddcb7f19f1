package flatten

import "thaw/blockmap"

// StreamReport says of one stream of an index what `thaw inspect` shows.
type StreamReport struct {
	DiffID  string // of the layer; empty for the metadata
	Blob    blockmap.Digest
	Chunks  int
	Content int64 // bytes of the stream
	Live    int64 // of these, bytes that the file system shows: no upper layer hides them
	Stored  int64 // bytes of the blob
	Shared  int64 // bytes in chunks that another stream has too, of this image or of one reported before
}

// Reporter makes reports of one image after the other, and knows what the
// images have in common.
type Reporter struct {
	seen map[blockmap.Digest]bool
}

// Report describes the streams of an image, in the order of its index.
func (r *Reporter) Report(m *Image, ix *blockmap.Index) []StreamReport {
	if r.seen == nil {
		r.seen = make(map[blockmap.Digest]bool)
	}
	diffIDs := make(map[string]string)
	for _, d := range m.Layers[1:] {
		diffIDs[d.Digest.Hex] = d.Annotations[AnnotationDiffID]
	}
	reports := make([]StreamReport, len(ix.Streams))
	for i := range ix.Streams {
		t := &ix.Streams[i]
		p := &reports[i]
		*p = StreamReport{
			DiffID: diffIDs[t.Blob.String()], Blob: t.Blob, Chunks: len(t.Chunks),
			Content: int64(t.Blocks()) * blockSize, Stored: t.BlobSize,
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
