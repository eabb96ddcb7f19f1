package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// HasBlob says whether the blob is there already. It asks the registry itself,
// never a mirror, so that a push may rely on it.
func (r *Repo) HasBlob(ctx context.Context, d v1.Descriptor) (bool, error) {
	size, err := r.finder.stat(ctx, d.Digest)
	if m, ok := r.finder.(*remote); ok && err == nil && size >= 0 && size != d.Size {
		size, err = m.origin.sizeByGet(ctx, d.Digest, false) // some do not tell the truth by HEAD
	}
	switch {
	case errors.Is(err, ErrNotFound):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look for blob %s in %s: %w", d.Digest, r, err)
	case size >= 0 && size != d.Size:
		return false, fmt.Errorf("look for blob %s in %s: it has %d bytes, its descriptor says %d", d.Digest, r, size, d.Size)
	}
	return true, nil
}

// Holds is HasBlob, and for a layout compares the bytes with the digest as
// well, as registries do on their own.
func (r *Repo) Holds(ctx context.Context, d v1.Descriptor) (bool, error) {
	l, ok := r.target.(*layout)
	if !ok {
		return r.HasBlob(ctx, d)
	}
	has, err := l.has(ctx, d)
	if err != nil {
		err = fmt.Errorf("look for blob %s in %s: %w", d.Digest, r, err)
	}
	return has, err
}

// Blob gives a blob whole, verified. It is meant for small ones.
func (r *Repo) Blob(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	if d.Size < 0 || d.Size > maxBlob {
		return nil, fmt.Errorf("fetch blob %s of %s: %d bytes are too many to read at once", d.Digest, r, d.Size)
	}
	if int64(len(d.Data)) == d.Size && d.Size > 0 && hashOf(d.Data) == d.Digest {
		return bytes.Clone(d.Data), nil
	}
	for {
		rc, err := r.OpenBlob(ctx, d)
		if err != nil {
			return nil, err
		}
		// What the descriptor says is not worth an allocation yet.
		var buf bytes.Buffer
		buf.Grow(int(min(d.Size, 1<<20)) + bytes.MinRead)
		_, err = buf.ReadFrom(rc)
		rc.Close()
		if err == nil {
			return buf.Bytes(), nil
		}
		// A mirror that is wrong is not asked again; others may be right.
		if !errors.Is(err, ErrDigest) || !rc.(*stream).mirrored() {
			return nil, err
		}
	}
}

// OpenRange reads the n bytes of a blob from off: all of them, or the reader
// ends in an error; never in an early io.EOF. The bytes are not verified. The
// reader is a *Body, whose Distrust is to be called when they are wrong.
//
// Mirrors that work are asked before the registry. A source whose answer does not
// begin in the time that it usually takes is overtaken: the next one is asked
// too, and the first answer wins. But nothing is asked twice: see Temporary.
func (r *Repo) OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error) {
	digest := hashFrom(blob)
	if off < 0 || n < 0 || off+n < off {
		return nil, fmt.Errorf("read blob %s of %s: there is no range of %d bytes at %d", digest, r, n, off)
	}
	if n == 0 {
		return &Body{rc: io.NopCloser(bytes.NewReader(nil))}, nil
	}
	b, err := r.reader.open(ctx, digest, off, n, false)
	if err != nil {
		return nil, fmt.Errorf("read blob %s of %s: %w", digest, r, err)
	}
	return b, nil
}

// OpenRangeElsewhere is OpenRange for bytes that come too slowly from one source:
// it asks the others, in their order. avoid is Body.Source of the request that is
// late; empty is no source. A nil reader without an error means that there is no
// other source at present.
func (r *Repo) OpenRangeElsewhere(ctx context.Context, blob blockmap.Digest, off, n int64, avoid string) (io.ReadCloser, error) {
	digest := hashFrom(blob)
	if off < 0 || n <= 0 || off+n < off {
		return nil, fmt.Errorf("read blob %s of %s: there is no range of %d bytes at %d", digest, r, n, off)
	}
	m, ok := r.reader.(*remote)
	if !ok {
		return nil, nil
	}
	now := time.Now()
	for _, e := range m.mirrors(false) {
		if e.src.name == avoid {
			e.src.overtaken()
		}
	}
	list := m.holders(digest, avoid)
	if !slices.Contains(list, m.origin) {
		list = slices.DeleteFunc(list, func(e *endpoint) bool { return e.src.resting(now) })
	}
	if len(list) == 0 {
		return nil, nil
	}
	b, err := m.openFrom(ctx, list, digest, off, n, false)
	switch {
	case errors.Is(err, errNoSource):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("read blob %s of %s elsewhere than at %s: %w", digest, r, avoid, err)
	}
	return b, nil
}

// LastFailure is how the last request to the registry that failed since a point in
// time did so, or nil if none has. It is for a caller that will not wait until the
// attempts of an operation are used up: what the operation comes to is not known
// then, but what the registry has answered so far is.
func (r *Repo) LastFailure(since time.Time) error {
	m, ok := r.reader.(*remote)
	if !ok {
		return nil
	}
	s := m.origin.src
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.failedAt.Before(since) {
		return nil
	}
	return s.mu.failure
}

// CheckAccess finds out whether r's reference can be read with the credentials
// there are, at the cost of a request or two.
func (r *Repo) CheckAccess(ctx context.Context) error {
	if _, _, err := r.lookup(ctx, r.ref); err != nil {
		return fmt.Errorf("check access to %s: %w", r.ref, err)
	}
	return nil
}
