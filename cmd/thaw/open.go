package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
	"thaw/blockmap/flatten"
	"thaw/fetcher"
	"thaw/fetcher/registry"
)

// blockImage is a block image that was found, with its index.
type blockImage struct {
	name     string
	repo     *registry.Repo
	digest   v1.Hash
	size     int64  // of the manifest
	raw      []byte // the manifest
	manifest *flatten.Image
	index    *blockmap.Index
	recalled bool // from the cache: the registry could not be asked
}

// findManifest finds the manifest of the block image that ref names: itself, or
// what has it as its subject.
func findManifest(ctx context.Context, repo *registry.Repo, platform *v1.Platform) (v1.Descriptor, []byte, error) {
	img, err := repo.Resolve(ctx, platform)
	if err != nil {
		return v1.Descriptor{}, nil, err
	}
	if img.ArtifactType == flatten.ArtifactTypeImage {
		return img.Descriptor, img.Raw, nil
	}
	all, err := repo.Referrers(ctx, img.Descriptor, flatten.ArtifactTypeImage)
	if err != nil {
		return v1.Descriptor{}, nil, err
	}
	if len(all) == 0 {
		return v1.Descriptor{}, nil, fmt.Errorf("%s is not a block image, and has none beside it; make one with: thaw build %s", repo.Ref(), repo.Ref())
	}
	// The one pushed last, where a list keeps the order.
	d := all[len(all)-1]
	raw, err := repo.Manifest(ctx, d)
	return d, raw, err
}

// findImage finds a block image and reads its index, without a cache.
func findImage(ctx context.Context, client *registry.Client, name string, platform *v1.Platform) (*blockImage, error) {
	ref, err := registry.ParseRef(name)
	if err != nil {
		return nil, usageError{err}
	}
	repo, err := client.Open(ref)
	if err != nil {
		return nil, err
	}
	d, raw, err := findManifest(ctx, repo, platform)
	if err != nil {
		return nil, err
	}
	b := &blockImage{name: name, repo: repo, digest: d.Digest, size: d.Size}
	if b.manifest, err = flatten.ParseImage(raw); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	encoded, err := repo.Blob(ctx, b.manifest.Index)
	if err != nil {
		return nil, err
	}
	if b.index, err = b.manifest.ParseIndex(encoded); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

// opener opens images for serving. What it learns it keeps in the cache, so that
// it can do without the registry the next time.
type opener struct {
	client   *registry.Client
	cache    *blockmap.Cache
	fetcher  *fetcher.Fetcher
	platform *v1.Platform
	log      *slog.Logger
}

// remembered is what the cache keeps under the name of an image.
type remembered struct {
	Name     string  `json:"name"`
	Manifest v1.Hash `json:"manifest"` // of the block image
}

// open opens an image. It calls found as soon as the manifest is known, or not at
// all where it fails before.
func (o *opener) open(ctx context.Context, name string, found func(*blockImage)) (*openImage, error) {
	ref, err := registry.ParseRef(name)
	if err != nil {
		return nil, usageError{err}
	}
	repo, err := o.client.Open(ref)
	if err != nil {
		return nil, err
	}
	b, err := o.resolve(ctx, repo, name)
	if err == nil {
		found(b)
		err = o.load(ctx, b)
	}
	if err == nil {
		return o.image(b)
	}
	refused := errors.Is(err, registry.ErrUnauthorized)
	if !refused && !errors.Is(err, registry.ErrUnavailable) {
		return nil, err
	}
	// The registry cannot be asked. What is here can be served: in part where
	// it may come back, only as a whole where it refuses us.
	kept, recallErr := o.recall(repo, name)
	if recallErr != nil {
		return nil, err
	}
	image, openErr := o.image(kept)
	if openErr != nil {
		return nil, openErr
	}
	missing := absent(image.Image)
	if refused && missing > 0 {
		return nil, fmt.Errorf("%w; the cache lacks %s of the image", err, bytesString(missing))
	}
	o.log.Warn("serving from the cache alone", "image", name, "missing_bytes", missing, "cause", err)
	if b == nil {
		found(kept)
	}
	return image, nil
}

// openImage is an image in the cache, with what fetches for it.
type openImage struct {
	*blockmap.Image
	fetcher *fetcher.Bound
}

func (o *opener) image(b *blockImage) (*openImage, error) {
	f := o.fetcher.From(origin{b.repo})
	image, err := blockmap.NewImage(b.index, o.cache, f)
	return &openImage{image, f}, err
}

// resolve asks the registry for the manifest.
func (o *opener) resolve(ctx context.Context, repo *registry.Repo, name string) (*blockImage, error) {
	d, raw, err := findManifest(ctx, repo, o.platform)
	if err != nil {
		return nil, err
	}
	b := &blockImage{name: name, repo: repo, digest: d.Digest, size: int64(len(raw)), raw: raw}
	if b.manifest, err = flatten.ParseImage(raw); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

// load gets the index, from the cache if it can.
func (o *opener) load(ctx context.Context, b *blockImage) error {
	encoded, err := o.cache.Blob(digestOf(b.manifest.Index.Digest))
	if err != nil {
		if encoded, err = b.repo.Blob(ctx, b.manifest.Index); err != nil {
			return err
		}
		if err := o.cache.PutBlob(encoded); err != nil {
			return fmt.Errorf("keep the index of %s: %w", b.name, err)
		}
	} else if ok, err := b.repo.HasBlob(ctx, b.manifest.Layers[1]); err != nil {
		return err
	} else if !ok {
		o.log.Warn("the registry has lost a part of the image", "image", b.name, "blob", b.manifest.Layers[1].Digest.String())
	}
	if b.index, err = b.manifest.ParseIndex(encoded); err != nil {
		return fmt.Errorf("%s: %w", b.name, err)
	}
	// Now that all of it is here, the name means this image.
	ref, err := json.Marshal(remembered{b.name, b.digest})
	if err != nil {
		return err
	}
	if err := errors.Join(o.cache.PutBlob(b.raw), o.cache.PutRef(o.key(b.name), ref)); err != nil {
		return fmt.Errorf("keep the manifest of %s: %w", b.name, err)
	}
	return nil
}

// recall finds what resolve and load have kept.
func (o *opener) recall(repo *registry.Repo, name string) (*blockImage, error) {
	ref, err := o.cache.Ref(o.key(name))
	if err != nil {
		return nil, err
	}
	var r remembered
	if err := json.Unmarshal(ref, &r); err != nil {
		return nil, err
	}
	if len(r.Manifest.Hex) != 64 {
		return nil, fs.ErrNotExist
	}
	raw, err := o.cache.Blob(digestOf(r.Manifest))
	if err != nil {
		return nil, err
	}
	b := &blockImage{name: name, repo: repo, digest: r.Manifest, size: int64(len(raw)), recalled: true}
	if b.manifest, err = flatten.ParseImage(raw); err != nil {
		return nil, err
	}
	encoded, err := o.cache.Blob(digestOf(b.manifest.Index.Digest))
	if err != nil {
		return nil, err
	}
	b.index, err = b.manifest.ParseIndex(encoded)
	return b, err
}

func (o *opener) key(name string) string { return o.platform.String() + " " + name }

// absent is how much of an image is not in the cache.
func absent(m *blockmap.Image) (n int64) {
	for at := int64(0); at < m.Size(); {
		s := m.Status(blockmap.Extent{Start: at, End: m.Size()})
		if !s.Resident {
			n += s.Len()
		}
		at = s.End
	}
	return n
}

// origin is a repository as a fetcher sees it.
type origin struct{ repo *registry.Repo }

func (o origin) OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error) {
	return o.repo.OpenRange(ctx, hashOf(blob), off, n)
}

func (o origin) Ranges() int { return o.repo.Ranges() }

func (o origin) OpenRanges(ctx context.Context, blob blockmap.Digest, ranges []blockmap.Extent) (io.ReadCloser, error) {
	asked := make([]registry.Range, len(ranges))
	for i, r := range ranges {
		asked[i] = registry.Range{Off: r.Start, N: r.Len()}
	}
	return o.repo.OpenRanges(ctx, hashOf(blob), asked)
}

func hashOf(d blockmap.Digest) v1.Hash { return v1.Hash{Algorithm: "sha256", Hex: d.String()} }

// digestOf turns a hash into a Digest; one that is no SHA-256 becomes one that
// nothing has.
func digestOf(h v1.Hash) blockmap.Digest {
	d, err := blockmap.ParseDigest(h.Hex)
	if err != nil || h.Algorithm != "sha256" {
		return blockmap.Digest{}
	}
	return d
}
