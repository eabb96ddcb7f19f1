package fetcher

import (
	"context"
	"io"
	"slices"
	"time"

	"thaw/blockmap"
)

// Bundle is a sequence of leaves in one download, in the order in which a start reads
// them.
type Bundle struct {
	Frames []Frame
	// Open returns a body with all frames, one after the other, from byte off to the end.
	// The body ends with ctx.
	Open func(ctx context.Context, off int64) (io.ReadCloser, error)
	// Asked is when the first body that Open returns was requested. It is zero if Open
	// requests that body itself.
	Asked time.Time
	// Close, if not nil, is called after the last call of Open.
	Close func()
}

// Frame is a zstd frame of a Bundle. Its content is that of its parts, one after the
// other. It has at most blockmap.MaxChunkBlocks blocks.
type Frame struct {
	Stored int64 // bytes of the frame
	Parts  []Part
}

// Part is the content of consecutive leaves of one chunk.
type Part struct {
	Leaf, Count int // the first leaf, and how many there are
	Size        int // bytes of their content
	// List verifies the leaves. It is nil if they are all leaves of the chunk.
	List *blockmap.LeafList
	// Wants are all chunks of the cache that have this content; there may be none.
	Wants []blockmap.Want
}

func (p *Part) leaves() blockmap.LeafSet { return blockmap.LeafRange(p.Leaf, p.Count) }

// size is the length of the content of the frame.
func (f *Frame) size() (n int) {
	for i := range f.Parts {
		n += f.Parts[i].Size
	}
	return n
}

// share is the part of the frame's bytes that a part of it takes.
func (f *Frame) share(p *Part) int64 { return f.Stored * int64(p.Size) / int64(max(f.size(), 1)) }

// item is a chunk that a Replay prefetches.
type item struct {
	blockmap.Want
	bundled bool  // the bundle has all that is needed
	bytes   int64 // compressed, as far as it is still to come
	size    int64 // uncompressed
}

// itemOf is a chunk of a list, which a request brings as a whole.
func itemOf(w blockmap.Want) item {
	return item{Want: w, bytes: stored(w), size: int64(w.Table.Chunks[w.Chunk].Size())}
}

// before returns the chunks of a bundle with the leaves that it brings, followed by those
// of rest of which it does not bring all that is needed.
func (b *Bundle) before(rest []blockmap.Want) (all []item) {
	at := make(map[key]int)
	for i := range b.Frames {
		f := &b.Frames[i]
		for j := range f.Parts {
			p := &f.Parts[j]
			bytes := f.share(p) // for one of the places
			for _, w := range p.Wants {
				n, ok := at[key{w.Stream, w.Chunk}]
				if !ok {
					n = len(all)
					at[key{w.Stream, w.Chunk}] = n
					all = append(all, item{Want: w, bundled: true})
					all[n].Leaves = 0
				}
				all[n].Leaves |= p.leaves()
				all[n].bytes += bytes
				all[n].size += int64(p.Size)
				bytes = 0
			}
		}
	}
	for _, w := range rest {
		if n, ok := at[key{w.Stream, w.Chunk}]; !ok || !all[n].Leaves.Contains(w.Needs()) {
			all = append(all, itemOf(w))
		}
	}
	return all
}

// only returns the bundle with only the places in kept, up to the last frame that has
// any.
func (b *Bundle) only(kept []item) *Bundle {
	in := make(map[key]bool, len(kept))
	for _, w := range kept {
		if w.bundled {
			in[key{w.Stream, w.Chunk}] = true
		}
	}
	less := *b
	less.Frames = nil
	last := 0
	for i, f := range b.Frames {
		f.Parts = slices.Clone(f.Parts)
		for j := range f.Parts {
			p := &f.Parts[j]
			p.Wants = slices.DeleteFunc(slices.Clone(p.Wants), func(w blockmap.Want) bool { return !in[key{w.Stream, w.Chunk}] })
			if len(p.Wants) > 0 {
				last = i + 1
			}
		}
		less.Frames = append(less.Frames, f)
	}
	less.Frames = less.Frames[:last]
	return &less
}
