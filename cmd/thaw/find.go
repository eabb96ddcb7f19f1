package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
	"thaw/blockmap/flatten"
	"thaw/fetcher/registry"
)

// finder finds block images by name.
type finder struct {
	client   *registry.Client
	platform *v1.Platform
	pins     pins
	log      *slog.Logger
}

func (f *finder) close() { f.client.Close() }

// blockImage is a block image that was found, with its index.
type blockImage struct {
	name     string
	repo     *registry.Repo
	digest   v1.Hash
	size     int64  // of the manifest
	raw      []byte // the manifest
	manifest *flatten.Image
	index    *blockmap.Index

	// How the name led to it: by an index, or not; and to a source image that it
	// is beside, or to itself. What does not apply is zero.
	top, source v1.Hash
}

// at is a reference to the block image itself.
func (b *blockImage) at() string { return b.repo.Ref().WithDigest(b.digest).String() }

// indexDigest is that of b's index, by which traces know their image.
func (b *blockImage) indexDigest() blockmap.Digest { return digestOf(b.manifest.Index.Digest) }

// badImage is the error of an image that a name leads to, and that cannot be
// used. The registry has answered, so the cache is no way out.
type badImage struct{ error }

func (e badImage) Unwrap() error { return e.error }

// errNoBlockImage says that an image has no block image beside it.
var errNoBlockImage = errors.New("it is not a block image, and has none beside it")

// maxCandidates is how many of the block images beside an image are looked at,
// the last ones: anybody who may push can put one there.
const maxCandidates = 16

// tagTimeout bounds the look-up of a block image by its tag, for which there may
// be nothing to find.
const tagTimeout = 10 * time.Second

// find finds a block image and reads its index, without a cache.
func (f *finder) find(ctx context.Context, name string) (*blockImage, error) {
	ref, err := registry.ParseRef(name)
	if err != nil {
		return nil, usageError{err}
	}
	repo, err := f.client.Open(ref)
	if err != nil {
		return nil, err
	}
	b, err := f.manifest(ctx, repo, name)
	if err != nil {
		return nil, err
	}
	encoded, err := repo.Blob(ctx, b.manifest.Index)
	if err != nil {
		return nil, err
	}
	return b, b.parseIndex(encoded)
}

func (b *blockImage) parseIndex(encoded []byte) (err error) {
	if b.index, err = b.manifest.ParseIndex(encoded); err != nil {
		return badImage{fmt.Errorf("%s: %w", b.name, err)}
	}
	return nil
}

// manifest finds the manifest of the block image that repo's reference names:
// itself, or the last one beside it that is of it.
func (f *finder) manifest(ctx context.Context, repo *registry.Repo, name string) (*blockImage, error) {
	img, err := repo.Resolve(ctx, f.platform)
	if err != nil {
		return nil, err
	}
	b := &blockImage{name: name, repo: repo, digest: img.Digest, raw: img.Raw}
	if img.Index != nil {
		b.top = img.Index.Digest
	}
	if img.ArtifactType == flatten.ArtifactTypeImage {
		if err := b.parse(); err != nil {
			return nil, badImage{fmt.Errorf("%s: %w", name, err)}
		}
		return b, f.pins.check(repo.Ref(), b.digest)
	}
	b.source = img.Digest
	return b, f.beside(ctx, b, img)
}

// beside finds the block image beside img, and makes b it. A pinned one is taken
// whether or not it is listed.
func (f *finder) beside(ctx context.Context, b *blockImage, img *registry.Image) error {
	pin, pinned := f.pins.of(b.repo.Ref())
	if pinned {
		// No list is needed to find it, and none can hide it.
		switch d, err := b.repo.Lookup(ctx, b.repo.Ref().WithDigest(pin)); {
		case err == nil:
			return b.takePinned(ctx, img, d)
		case registry.Temporary(err) || ctx.Err() != nil:
			return err
		}
	}
	all, listErr := b.repo.Referrers(ctx, img.Descriptor, flatten.ArtifactTypeImage)
	if ctx.Err() != nil && listErr != nil {
		return listErr
	}
	var other v1.Hash // fits, and is not the pinned one
	take := func(d v1.Descriptor) (bool, error) {
		raw, err := b.repo.Manifest(ctx, d)
		if registry.Temporary(err) || ctx.Err() != nil && err != nil {
			return false, err // an older one is no answer
		}
		if err == nil {
			b.raw, b.digest = raw, d.Digest
			if err = b.parse(); err == nil {
				err = b.fits(img)
			}
		}
		switch {
		case err != nil:
			f.log.Warn("passed over a block image that is not one of the image", "image", b.name, "manifest", d.Digest.String(), "err", err)
			return false, nil
		case pinned:
			other = d.Digest
			return false, nil
		}
		return true, nil
	}
	// The one pushed last, where a list keeps the order.
	candidates := slices.Clone(all[max(0, len(all)-maxCandidates):])
	slices.Reverse(candidates)
	for _, d := range candidates {
		if ok, err := take(d); ok || err != nil {
			return err
		}
		if other != (v1.Hash{}) {
			break // one is enough to name
		}
	}
	// A list may have lost the entry.
	tagCtx, cancel := context.WithTimeout(ctx, tagTimeout)
	defer cancel()
	if d, err := b.repo.Lookup(tagCtx, b.repo.Ref().WithTag(flatten.ImageTag(img.Digest))); err == nil &&
		!slices.ContainsFunc(all, func(x v1.Descriptor) bool { return x.Digest == d.Digest }) {
		if ok, err := take(d); ok || err != nil {
			return err
		}
	}
	switch {
	case other != (v1.Hash{}):
		return f.pins.check(b.repo.Ref(), other)
	case listErr != nil:
		return listErr
	case len(all) > 0:
		return fmt.Errorf("%s: %w: %d candidates are listed, and none of those that were looked at is a block image of it; make one with: thaw build %s",
			b.repo.Ref(), errNoBlockImage, len(all), b.repo.Ref())
	}
	return fmt.Errorf("%s: %w; make one with: thaw build %s", b.repo.Ref(), errNoBlockImage, b.repo.Ref())
}

// takePinned makes b the block image that it is pinned to, if that is one of img.
func (b *blockImage) takePinned(ctx context.Context, img *registry.Image, d v1.Descriptor) error {
	raw, err := b.repo.Manifest(ctx, d)
	if err != nil {
		return err
	}
	b.raw, b.digest = raw, d.Digest
	if err = b.parse(); err == nil {
		err = b.fits(img)
	}
	if err != nil {
		return badImage{fmt.Errorf("the pinned %s is not a block image of %s: %w", d.Digest, b.repo.Ref(), err)}
	}
	return nil
}

// parse reads b's manifest, and checks what everything else relies on: each part
// has a SHA-256 digest.
func (b *blockImage) parse() (err error) {
	b.size = int64(len(b.raw))
	if b.manifest, err = flatten.ParseImage(b.raw); err != nil {
		return err
	}
	for _, d := range append([]v1.Descriptor{b.manifest.Config}, b.manifest.Layers...) {
		if !isSHA256(d.Digest) {
			return fmt.Errorf("%w: a part of it has the digest %q, which is not a SHA-256 digest", blockmap.ErrCorrupt, d.Digest)
		}
	}
	return nil
}

// fits says whether b is a block image of img. Whoever may push can claim so; the
// subject and the config, with its diff IDs, bind the claim to this very image.
func (b *blockImage) fits(img *registry.Image) error {
	switch m := b.manifest; {
	case m.Subject == nil || m.Subject.Digest != img.Digest:
		return fmt.Errorf("its subject is not %s", img.Digest)
	case m.Config.Digest != img.Manifest.Config.Digest:
		return fmt.Errorf("its config is %s, that of the image is %s", m.Config.Digest, img.Manifest.Config.Digest)
	}
	return nil
}

// isSHA256 says whether h is a well-formed SHA-256 digest.
func isSHA256(h v1.Hash) bool {
	_, err := blockmap.ParseDigest(h.Hex)
	return err == nil && h.Algorithm == "sha256"
}

// digestOf turns a hash into a Digest; one that is no SHA-256 becomes one that
// nothing has.
func digestOf(h v1.Hash) blockmap.Digest {
	d, err := blockmap.ParseDigest(h.Hex)
	if err != nil || h.Algorithm != "sha256" {
		return blockmap.Digest{}
	}
	return d
}
