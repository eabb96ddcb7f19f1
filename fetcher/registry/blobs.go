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

// HasBlob says whether the repository has the blob. It asks the registry itself, never a
// mirror, so that a push can rely on it.
func (r *Repo) HasBlob(ctx context.Context, d v1.Descriptor) (bool, error) {
	size, err := r.finder.stat(ctx, d.Digest)
	if m, ok := r.finder.(*remote); ok && err == nil && size >= 0 && size != d.Size {
		size, err = m.origin.sizeByGet(ctx, d.Digest, false) // some give a wrong length for HEAD
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

// Holds is HasBlob, but for a layout it also verifies the blob's bytes, which registries do
// by themselves.
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

// Blob returns all bytes of a blob, verified. It is for small ones.
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
		// The size in the descriptor is not trusted with an allocation yet.
		var buf bytes.Buffer
		buf.Grow(int(min(d.Size, 1<<20)) + bytes.MinRead)
		_, err = buf.ReadFrom(rc)
		rc.Close()
		if err == nil {
			return buf.Bytes(), nil
		}
		// The mirror that was wrong is not asked again; other sources may be right.
		if !errors.Is(err, ErrDigest) || !rc.(*stream).mirrored() {
			return nil, err
		}
	}
}

// OpenRange reads n bytes of a blob from off. The reader returns all of them or an error,
// never an early io.EOF. The bytes are not verified: the reader is a *Body, and its
// Distrust is to be called when they are wrong.
//
// Mirrors that work are asked before the registry. If an answer does not begin in the time
// that its source usually takes, the next source is asked too, and the first answer wins.
// OpenRange does not retry: see Temporary.
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

// OpenRangeElsewhere is OpenRange for bytes that come too slowly from one source: it asks
// the others. avoid is what Body.Source returned for the late request, or empty if that has
// no answer. A nil reader without an error means that there is no other source at present.
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
	if avoid == "" && m.awaited(digest) {
		return nil, nil // to ask the registry now would defeat the wait
	}
	for _, e := range m.mirrors(false) {
		if e.src.name == avoid {
			e.src.overtaken()
		}
	}
	list := m.givers(digest, avoid, nil)
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

// LastFailure returns the error of the last request to the registry that has failed since a
// point in time, or nil. It is for a caller that does not wait until all attempts of a call
// have failed: the result of the call is not known then, but the registry's answers are.
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

// CheckAccess fails if r's reference cannot be read with the present credentials. It costs
// a request or two.
func (r *Repo) CheckAccess(ctx context.Context) error {
	if _, _, err := r.lookup(ctx, r.ref); err != nil {
		return fmt.Errorf("check access to %s: %w", r.ref, err)
	}
	return nil
}
