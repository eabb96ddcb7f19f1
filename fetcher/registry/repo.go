package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/blockmap"
)

// The bounds of what is read whole.
const (
	maxManifest = 4 << 20   // the distribution spec's limit
	maxBlob     = 256 << 20 // of Blob
)

// Repo is a place that images are in. Its methods may be called at once.
type Repo struct {
	ref    Ref
	client *Client

	reader reader
	finder finder
	target target // nil where nothing can be written
}

// The roles of a medium. What they return is not verified yet, except that
// open delivers n bytes or fails.
type (
	reader interface {
		// manifest by digest, or else tag; the media type may be empty.
		manifest(ctx context.Context, ref Ref) (raw []byte, mediaType string, err error)
		// open reads n bytes of a blob from off. whole says that this is
		// all of the blob.
		open(ctx context.Context, digest v1.Hash, off, n int64, whole bool) (*Body, error)
	}
	finder interface {
		// referrers are the manifests whose subject it is.
		referrers(ctx context.Context, subject v1.Descriptor, artifactTypes []string) ([]v1.Descriptor, error)
		// stat is the size of a blob.
		stat(ctx context.Context, digest v1.Hash) (int64, error)
	}
	target interface {
		has(ctx context.Context, d v1.Descriptor) (bool, error)
		putBlob(ctx context.Context, d v1.Descriptor, b blob, progress func(int64)) error
		// putManifest takes the descriptor as a list of referrers has it.
		putManifest(ctx context.Context, d v1.Descriptor, raw []byte, tag string, subject *v1.Descriptor) error
	}
)

// An Image is an image manifest as it was found under a reference.
type Image struct {
	v1.Descriptor
	// Raw is what the descriptor's digest is of, Manifest what it says.
	Raw      []byte
	Manifest v1.Manifest
	// Index is the descriptor of the index that the reference leads to, nil
	// where it leads to the manifest itself.
	Index *v1.Descriptor
}

// Ref is the reference that r was opened by.
func (r *Repo) Ref() Ref { return r.ref }

func (r *Repo) String() string { return r.ref.Place() }

// Resolve gives the image manifest that r's reference leads to. Where that is
// an index, the manifest for platform is taken; a nil platform will do only
// when there is but one. A manifest that no index offers is taken as it is:
// its platform is in its config.
func (r *Repo) Resolve(ctx context.Context, platform *v1.Platform) (*Image, error) {
	raw, d, err := r.lookup(ctx, r.ref)
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", r.ref, err)
	}
	var index *v1.Descriptor
	// An index may hold indexes.
	for depth := 0; d.MediaType.IsIndex(); depth++ {
		if depth == 4 {
			return nil, fmt.Errorf("resolve %s: the indexes are nested too deep", r.ref)
		}
		if index == nil {
			top := d
			index = &top
		}
		next, err := pick(ctx, raw, platform, r.lookAt)
		if err != nil {
			return nil, fmt.Errorf("resolve %s: %w", r.ref, err)
		}
		if raw, d, err = r.lookup(ctx, r.ref.WithDigest(next.Digest)); err != nil {
			return nil, fmt.Errorf("resolve %s, manifest %s: %w", r.ref, next.Digest, err)
		}
		if d.Size != next.Size && next.Size != 0 {
			return nil, fmt.Errorf("resolve %s: manifest %s has %d bytes, its descriptor says %d",
				r.ref, next.Digest, d.Size, next.Size)
		}
		d.Platform = next.Platform
	}
	img := &Image{Descriptor: d, Raw: raw, Index: index}
	if err := json.Unmarshal(raw, &img.Manifest); err != nil {
		return nil, fmt.Errorf("resolve %s: parse manifest %s: %w", r.ref, d.Digest, err)
	}
	img.ArtifactType = artifactType(&img.Manifest)
	return img, nil
}

// artifactType as the distribution spec has it for a list of referrers.
func artifactType(m *v1.Manifest) string {
	if m.ArtifactType == "" {
		return string(m.Config.MediaType)
	}
	return m.ArtifactType
}

// Lookup gives the descriptor that a tag, or the digest of a manifest, leads
// to, without walking an index.
func (r *Repo) Lookup(ctx context.Context, ref Ref) (v1.Descriptor, error) {
	_, d, err := r.lookup(ctx, ref)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("look up %s: %w", ref, err)
	}
	return d, nil
}

// Manifest gives the bytes of the manifest that d describes.
func (r *Repo) Manifest(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	raw, got, err := r.lookup(ctx, r.ref.WithDigest(d.Digest))
	if err == nil && got.Size != d.Size {
		err = fmt.Errorf("it has %d bytes, its descriptor says %d", got.Size, d.Size)
	}
	if err != nil {
		return nil, fmt.Errorf("fetch manifest %s of %s: %w", d.Digest, r, err)
	}
	return raw, nil
}

// lookup fetches a manifest, checks it against the digest if ref has one, and
// finds out what it is.
func (r *Repo) lookup(ctx context.Context, ref Ref) ([]byte, v1.Descriptor, error) {
	raw, mediaType, err := r.reader.manifest(ctx, ref)
	if err != nil {
		return nil, v1.Descriptor{}, err
	}
	d := v1.Descriptor{Digest: hashOf(raw), Size: int64(len(raw))}
	if ref.Digest != (v1.Hash{}) && d.Digest != ref.Digest {
		return nil, v1.Descriptor{}, fmt.Errorf("%w: the manifest is %s", ErrDigest, d.Digest)
	}
	d.MediaType, err = manifestType(raw, mediaType)
	return raw, d, err
}

// manifestType decides between what a manifest says of itself, what it was
// sent as, and what is in it.
func manifestType(raw []byte, sent string) (types.MediaType, error) {
	var m struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     types.MediaType `json:"mediaType"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
		Manifests     json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return "", fmt.Errorf("parse manifest: %w", err)
	}
	// The same bytes must not be an image to one and an index to another.
	if m.Manifests != nil && (m.Config != nil || m.Layers != nil) {
		return "", errors.New("the manifest is an image and an index at once")
	}
	sent, _, _ = strings.Cut(sent, ";")
	t := m.MediaType
	if t == "" {
		t = types.MediaType(strings.TrimSpace(sent))
	}
	switch {
	case t.IsIndex() && m.Config == nil && m.Layers == nil, t.IsImage() && m.Manifests == nil:
		return t, nil
	case t.IsSchema1(), m.SchemaVersion == 1:
		return "", errors.New("the manifest is of Docker's schema 1, which is no longer supported: push the image anew")
	case m.MediaType == "" && m.Manifests != nil:
		return types.OCIImageIndex, nil
	case m.MediaType == "" && m.Config != nil && m.Layers != nil:
		return types.OCIManifestSchema1, nil
	}
	return "", fmt.Errorf("the media type %q is not that of an image or an index", t)
}

// Referrers gives the manifests whose subject is the one given, those of the
// given types if there are any, with their annotations. It asks the referrers
// API and the fallback tag, at the registry or at a mirror that is trusted to
// resolve.
//
// A descriptor in such a list is only a claim of whoever may push there: its
// manifest says what it is and what its subject is.
func (r *Repo) Referrers(ctx context.Context, subject v1.Descriptor, artifactTypes ...string) ([]v1.Descriptor, error) {
	fail := func(err error) ([]v1.Descriptor, error) {
		return nil, fmt.Errorf("find referrers of %s in %s: %w", subject.Digest, r, err)
	}
	all, err := r.finder.referrers(ctx, subject, artifactTypes)
	if err != nil {
		return fail(err)
	}
	seen := make(map[v1.Hash]bool)
	all = slices.DeleteFunc(all, func(d v1.Descriptor) bool {
		again := d.Digest.Algorithm != "sha256" || seen[d.Digest]
		seen[d.Digest] = true
		return again
	})
	if len(artifactTypes) == 0 {
		return all, nil
	}
	lookErr := r.look(ctx, subject, all)
	if ctx.Err() != nil {
		return fail(lookErr)
	}
	found := slices.DeleteFunc(all, func(d v1.Descriptor) bool { return !slices.Contains(artifactTypes, d.ArtifactType) })
	// One that cannot be looked at does not hide the others, and is not none.
	if len(found) == 0 && Temporary(lookErr) {
		return fail(lookErr)
	}
	return found, nil
}

// untyped says that a list of referrers does not say what d is: some leave it
// out, and some take the type of the config for it, as drafts of the spec did.
func untyped(d v1.Descriptor) bool {
	return d.ArtifactType == "" || d.ArtifactType == string(types.OCIEmptyJSON) || d.ArtifactType == string(types.DockerConfigJSON) ||
		strings.Contains(d.ArtifactType, ".config.")
}

// Bounds of the manifests that are looked at to find out what they are: in all,
// and at once.
const maxLooks, looksAtOnce = 64, 8

// look completes the descriptors of a list that do not say what they are, by
// their manifests. One that is about another subject loses its type. The error
// is of the last manifest that could not be had.
func (r *Repo) look(ctx context.Context, subject v1.Descriptor, list []v1.Descriptor) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var failed error
	slots := make(chan struct{}, looksAtOnce)
	looks := 0
	for i, d := range list {
		if !untyped(d) {
			continue
		}
		if looks++; looks > maxLooks {
			break
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			raw, err := r.Manifest(ctx, d)
			if err != nil {
				mu.Lock()
				failed = err
				mu.Unlock()
				return
			}
			s, full, err := asReferrer(raw, d)
			switch {
			case err != nil || s == nil:
			case s.Digest != subject.Digest:
				list[i].ArtifactType = ""
			default:
				list[i] = full
			}
		})
	}
	wg.Wait()
	return failed
}

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

// CheckAccess finds out whether r's reference can be read with the credentials
// there are, at the cost of a request or two.
func (r *Repo) CheckAccess(ctx context.Context) error {
	if _, _, err := r.lookup(ctx, r.ref); err != nil {
		return fmt.Errorf("check access to %s: %w", r.ref, err)
	}
	return nil
}
