package fetcher

import (
	"context"
	"io"

	"thaw/blockmap"
)

// Origin is where the blobs of an image are read from.
type Origin interface {
	// OpenRange reads n bytes at off of a blob. The body ends with io.EOF
	// after n bytes, or with another error before.
	OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error)
}

// Ranger is an Origin that may read several ranges in one request. What nobody
// waits for then shares requests with what is near in turn, and not in the blob
// alone: a start touches a little everywhere, and a request costs a registry as
// much as a megabyte or more.
type Ranger interface {
	Origin
	// Ranges is how many ranges a request may have at present, at least 1.
	Ranges() int
	// OpenRanges reads ranges of a blob, which have nothing in common, one behind
	// the other, as OpenRange reads one. A nil body without an error says to ask
	// for each by OpenRange.
	OpenRanges(ctx context.Context, blob blockmap.Digest, ranges []blockmap.Extent) (io.ReadCloser, error)
}

// Elsewhere is an Origin behind which there are several servers with the same
// blobs, as mirrors of a registry.
type Elsewhere interface {
	// OpenRangeElsewhere reads as OpenRange does, but not from the server that is
	// late. avoid is its name, which its body gives as Source; it is empty where
	// there has been no body yet. A nil body without an error says that there is
	// no other server.
	OpenRangeElsewhere(ctx context.Context, blob blockmap.Digest, off, n int64, avoid string) (io.ReadCloser, error)
}

// sourced is a body that says which server it comes from.
type sourced interface{ Source() string }

// distruster is a body that can be told that its bytes were wrong, so that its
// source is asked last from then on.
type distruster interface{ Distrust() }

// rangesOf is how many ranges of a blob an origin gives in one answer.
func rangesOf(o Origin) int {
	if r, ok := o.(Ranger); ok {
		return r.Ranges()
	}
	return 1
}
