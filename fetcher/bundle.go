package fetcher

import (
	"context"
	"io"
	"slices"
	"time"

	"thaw/blockmap"
)

// Bundle is a sequence of chunks in one download, in the order in which a start reads
// them.
type Bundle struct {
	Parts []Part
	// Open returns a body with the frames of all parts, one after the other, from byte
	// off to the end. The body ends with ctx.
	Open func(ctx context.Context, off int64) (io.ReadCloser, error)
	// Asked is when the first body that Open returns was requested. It is zero if Open
	// requests that body itself.
	Asked time.Time
	// Close, if not nil, is called after the last call of Open.
	Close func()
}

// Part is one chunk's content in a Bundle.
type Part struct {
	Stored int64 // bytes of its zstd frame
	// Wants are all chunks of the cache that have this content; there may be none.
	Wants []blockmap.Want
}

// before returns the wants of a bundle, followed by the wants of rest that are not in
// the bundle.
func (b *Bundle) before(rest []blockmap.Want) (all []blockmap.Want) {
	seen := make(map[key]bool)
	for _, p := range b.Parts {
		for _, w := range p.Wants {
			seen[key{w.Stream, w.Chunk}] = true
			all = append(all, w)
		}
	}
	for _, w := range rest {
		if !seen[key{w.Stream, w.Chunk}] {
			all = append(all, w)
		}
	}
	return all
}

// only returns the bundle with only the wants in kept, up to the last part that has
// any.
func (b *Bundle) only(kept []blockmap.Want) *Bundle {
	in := make(map[key]bool, len(kept))
	for _, w := range kept {
		in[key{w.Stream, w.Chunk}] = true
	}
	less := *b
	less.Parts = nil
	last := 0
	for i, p := range b.Parts {
		p.Wants = slices.DeleteFunc(slices.Clone(p.Wants), func(w blockmap.Want) bool { return !in[key{w.Stream, w.Chunk}] })
		less.Parts = append(less.Parts, p)
		if len(p.Wants) > 0 {
			last = i + 1
		}
	}
	less.Parts = less.Parts[:last]
	return &less
}
