package fetcher

import (
	"context"
	"io"

	"thaw/blockmap"
)

// Origin reads the blobs of an image. Its methods are safe for concurrent use.
type Origin interface {
	// OpenRange reads n bytes at off of a blob. The body ends with io.EOF
	// after n bytes, or with another error before.
	OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error)
}

// Ranger is an Origin that may read several ranges of a blob in one request. Prefetches
// then share a request if their turn is near, even where they lie far apart in the
// blob: a start reads a little of everything, and a request costs a registry as much as
// a megabyte or more.
type Ranger interface {
	Origin
	// Ranges returns how many ranges a request may have at present, at least 1.
	Ranges() int
	// OpenRanges reads ranges that do not overlap, one after the other, as OpenRange
	// reads one. A nil body without an error means that the caller must read each range
	// by OpenRange.
	OpenRanges(ctx context.Context, blob blockmap.Digest, ranges []blockmap.Extent) (io.ReadCloser, error)
}

// Elsewhere is an Origin with several servers that have the same blobs, such as a
// registry with mirrors.
type Elsewhere interface {
	// OpenRangeElsewhere is OpenRange from a server other than avoid, which is late.
	// avoid is what the late body's Source method returned, or empty if the request has
	// had no answer. A nil body without an error means that there is no other server.
	OpenRangeElsewhere(ctx context.Context, blob blockmap.Digest, off, n int64, avoid string) (io.ReadCloser, error)
}

// sourced is a body that says which server it comes from.
type sourced interface{ Source() string }

// distruster is a body with a method that reports its bytes as wrong, so that the
// client avoids its server for some time.
type distruster interface{ Distrust() }

// rangesOf returns how many ranges a request to an origin may have.
func rangesOf(o Origin) int {
	if r, ok := o.(Ranger); ok {
		return r.Ranges()
	}
	return 1
}
