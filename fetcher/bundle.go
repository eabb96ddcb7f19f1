package fetcher

import (
	"context"
	"io"
	"slices"
	"time"

	"thaw/blockmap"
)

// Bundle is chunks that come in one download, in the order in which a start reads them.
type Bundle struct {
	Parts []Part
	// Open reads the frames of all parts, one behind the other, from byte off of them to
	// their end. The body ends with ctx.
	Open func(ctx context.Context, off int64) (io.ReadCloser, error)
	// Asked is when the body that Open returns first was asked for; zero if Open asks
	// for it.
	Asked time.Time
	// Close, if not nil, is called when Open will not be called any more.
	Close func()
}

// Part is one chunk's content in a Bundle.
type Part struct {
	Stored int64 // bytes of its zstd frame
	// Wants are all chunks of the cache that have this content; there may be none.
	Wants []blockmap.Want
}

// before is the wants of a bundle, followed by those of rest that are not in it.
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

// only is the bundle with the wants that are in kept, up to the last part that has any.
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
