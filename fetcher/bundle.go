package fetcher

import (
	"context"
	"io"
	"slices"
	"time"

	"thaw/blockmap"
)

// Bundle is chunks that come in one download, in the order in which a start wants
// them.
type Bundle struct {
	Parts []Part
	// Open reads the frames of all parts, one behind the other, from byte off
	// of them to their end. The body lives no longer than ctx.
	Open func(ctx context.Context, off int64) (io.ReadCloser, error)
	// Asked is when the body that Open gives first was asked for; zero if that is
	// when Open is called.
	Asked time.Time
	// Close, if not nil, is called when Open will not be any more.
	Close func()
}

// Part is one chunk's content in a Bundle.
type Part struct {
	Stored int64 // bytes of its zstd frame
	// Wants are all places that the content belongs to. They may be none.
	Wants []blockmap.Want
}

// before lists the wants of a bundle, and then those of rest that are not in it.
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

// without is the bundle without the places that are not in kept, and up to the
// last part that has any.
func (b *Bundle) without(kept []blockmap.Want) *Bundle {
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
