package registry

import (
	"context"
	"errors"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Body is a range of the bytes of a blob: exactly as long as was asked for, or it ends in
// an error.
type Body struct {
	rc   io.ReadCloser
	left int64
	err  error // what the last Read returned

	// Where it comes from over HTTP; nil otherwise.
	e       *endpoint
	digest  v1.Hash
	watched *watchedBody
	release func() // ends the contexts of the request
	// guessed is set if the server did not say which bytes these are.
	guessed bool
}

// Read never returns io.EOF before the last byte.
func (b *Body) Read(p []byte) (int, error) {
	if b.err != nil || b.left == 0 {
		if b.err == nil {
			return 0, io.EOF
		}
		return 0, b.err
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.rc.Read(p)
	b.left -= int64(n)
	switch {
	case b.left == 0:
		err = nil
		if b.e != nil {
			b.e.src.succeeded()
		}
	case err == io.EOF:
		err = fmt.Errorf("%d bytes are missing: %w", b.left, ErrTruncated)
	}
	if b.err = err; err != nil && b.e != nil {
		b.e.failed(b.digest, err)
	}
	return n, err
}

// Close ends the request if there are bytes left. A mirror that sent them too slowly rests,
// as if it had failed.
func (b *Body) Close() error {
	if b.left > 0 && b.err == nil && b.watched != nil && b.watched.trickles() {
		b.err = errors.New("read of a closed body")
		b.e.failed(b.digest, fmt.Errorf("%w: %w", ErrUnavailable, errStalled))
	}
	if b.left == 0 && b.err == nil && b.watched != nil && b.rc == io.ReadCloser(b.watched) {
		// What ends the body must be read too, or its connection cannot be used again.
		b.watched.limit(b.watched.drain)
		_, _ = io.CopyN(io.Discard, b.watched, drainBytes)
	}
	err := b.rc.Close()
	if b.release != nil {
		b.release()
	}
	return err
}

// Source is the scheme and host that the bytes come from, or empty for a file.
func (b *Body) Source() string {
	if b.e == nil {
		return ""
	}
	return b.e.src.name
}

// Distrust is called when the bytes do not match their digest. A mirror then rests, longer
// each time; a location that a registry redirected to is forgotten.
func (b *Body) Distrust() {
	if b.e == nil {
		return
	}
	b.e.update(b.digest, func(s *blobState) { s.location, s.size = nil, 0 })
	if b.guessed {
		b.e.src.ignoreRanges("the bytes of a range without a Content-Range were not those that were asked for")
	}
	b.e.src.distrust()
}

// failed notes a request for a blob that failed. A missing blob says nothing about the
// health of a source, nor do unsupported ranges, or a caller that has gone away.
func (e *endpoint) failed(h v1.Hash, err error) {
	if errors.Is(err, ErrNotFound) || errors.Is(err, errParts) || errors.Is(err, errPulling) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return
	}
	// The location may be what does not work.
	if e.state(h).location != nil {
		e.forget(h)
	}
	e.src.failed(RetryAfter(err), err)
}
