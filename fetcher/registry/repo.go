package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Limits of what is read into memory.
const (
	maxManifest = 4 << 20   // the distribution spec's limit
	maxBlob     = 256 << 20 // of Blob
)

// Repo is a place that images are in. It is safe for concurrent use.
type Repo struct {
	ref    Ref
	client *Client

	reader reader
	finder finder
	target target // nil where nothing can be written
}

// The roles of a medium. What they return is not verified yet, but open delivers n bytes
// or fails.
type (
	reader interface {
		// manifest returns a manifest by its digest or, without one, by its tag. The
		// media type may be empty.
		manifest(ctx context.Context, ref Ref) (raw []byte, mediaType string, err error)
		// open reads n bytes of a blob from off. whole means that this is all of the
		// blob.
		open(ctx context.Context, digest v1.Hash, off, n int64, whole bool) (*Body, error)
	}
	finder interface {
		// referrers returns the manifests that have this subject.
		referrers(ctx context.Context, subject v1.Descriptor, artifactTypes []string) ([]v1.Descriptor, error)
		// stat returns the size of a blob.
		stat(ctx context.Context, digest v1.Hash) (int64, error)
	}
	target interface {
		has(ctx context.Context, d v1.Descriptor) (bool, error)
		putBlob(ctx context.Context, d v1.Descriptor, b blob, progress func(int64)) error
		// putManifest takes the descriptor that a list of referrers has of the manifest.
		putManifest(ctx context.Context, d v1.Descriptor, raw []byte, tag string, subject *v1.Descriptor) error
	}
)

// An Image is an image manifest as it was found under a reference.
type Image struct {
	v1.Descriptor
	// Raw are the bytes that the digest is of, Manifest is what they say.
	Raw      []byte
	Manifest v1.Manifest
	// Index is the index that the reference leads to, nil where it leads to the manifest
	// itself.
	Index *v1.Descriptor
}

// Ref is the reference that r was opened by.
func (r *Repo) Ref() Ref { return r.ref }

func (r *Repo) String() string { return r.ref.Place() }

// Resolve returns the image manifest that r's reference leads to. From an index it chooses
// the manifest for platform; a nil platform is enough for an index of one image. If the
// reference leads to a manifest, platform is not compared.
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

// Lookup returns the descriptor of the manifest or index that ref leads to.
func (r *Repo) Lookup(ctx context.Context, ref Ref) (v1.Descriptor, error) {
	_, d, err := r.lookup(ctx, ref)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("look up %s: %w", ref, err)
	}
	return d, nil
}

// ReadManifest returns the manifest or index that ref leads to, with its descriptor.
func (r *Repo) ReadManifest(ctx context.Context, ref Ref) ([]byte, v1.Descriptor, error) {
	raw, d, err := r.lookup(ctx, ref)
	if err != nil {
		return nil, v1.Descriptor{}, fmt.Errorf("fetch manifest %s: %w", ref, err)
	}
	return raw, d, nil
}

// Manifest returns the bytes of the manifest that d describes.
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

// lookup fetches a manifest, verifies it if ref has a digest, and finds its media type.
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

// manifestType is the media type of a manifest, from its mediaType field, from the header
// that it was sent with, or from the fields that it has.
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
	// The same bytes must not be an image to one program and an index to another.
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
