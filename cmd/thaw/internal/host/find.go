package host

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

// Finder finds block images by name, and what is stored beside them. Its methods may
// be called at once; its fields are not changed meanwhile.
type Finder struct {
	Client   *registry.Client
	Platform *v1.Platform // to choose from a multi-platform image
	Pins     Pins
	Log      *slog.Logger

	// ReadFile reads a trace file that the user names. It fails with an
	// *fs.PathError whose Op is "open" where there is no such file: the name is
	// one of an image then.
	ReadFile func(ctx context.Context, name string, most int64) ([]byte, error)
}

// Close ends what f's client still has under way.
func (f *Finder) Close() { f.Client.Close() }

// BlockImage is a block image that was found, with its index. It is not changed once
// it has been found.
type BlockImage struct {
	Name     string // by which it was found
	Repo     *registry.Repo
	Digest   v1.Hash // of its manifest
	Raw      []byte  // its manifest
	Manifest *flatten.Image
	Index    *blockmap.Index

	// How the name led to it: by an index, or not; and to a source image that it
	// is beside, or to itself. What does not apply is zero.
	top, source v1.Hash
}

// NewBlockImage is the block image of a manifest and an index that are at hand, as
// after a build.
func NewBlockImage(repo *registry.Repo, digest v1.Hash, raw []byte, index *blockmap.Index) (*BlockImage, error) {
	b := &BlockImage{Name: repo.Ref().String(), Repo: repo, Digest: digest, Raw: raw, Index: index}
	return b, b.parse()
}

// Reference names the block image itself, by its digest.
func (b *BlockImage) Reference() string { return b.Repo.Ref().WithDigest(b.Digest).String() }

// IndexDigest is that of b's index, by which traces know their image.
func (b *BlockImage) IndexDigest() blockmap.Digest { return digestOf(b.Manifest.Index.Digest) }

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

// Find finds a block image and reads its index, without a cache.
func (f *Finder) Find(ctx context.Context, name string) (*BlockImage, error) {
	ref, err := registry.ParseRef(name)
	if err != nil {
		return nil, InvalidError{err}
	}
	repo, err := f.Client.Open(ref)
	if err != nil {
		return nil, err
	}
	b, err := f.manifest(ctx, repo, name)
	if err != nil {
		return nil, err
	}
	encoded, err := repo.Blob(ctx, b.Manifest.Index)
	if err != nil {
		return nil, err
	}
	return b, b.parseIndex(encoded)
}

func (b *BlockImage) parseIndex(encoded []byte) (err error) {
	if b.Index, err = b.Manifest.ParseIndex(encoded); err != nil {
		return badImage{fmt.Errorf("%s: %w", b.Name, err)}
	}
	return nil
}

// manifest finds the manifest of the block image that repo's reference names:
// itself, or the last one beside it that is of it.
func (f *Finder) manifest(ctx context.Context, repo *registry.Repo, name string) (*BlockImage, error) {
	img, err := repo.Resolve(ctx, f.Platform)
	if err != nil {
		return nil, err
	}
	b := &BlockImage{Name: name, Repo: repo, Digest: img.Digest, Raw: img.Raw}
	if img.Index != nil {
		b.top = img.Index.Digest
	}
	if img.ArtifactType == flatten.ArtifactTypeImage {
		if err := b.parse(); err != nil {
			return nil, badImage{fmt.Errorf("%s: %w", name, err)}
		}
		return b, f.Pins.check(repo.Ref(), b.Digest)
	}
	b.source = img.Digest
	return b, f.beside(ctx, b, img)
}

// beside finds the block image beside img, and makes b it. A pinned one is taken
// whether or not it is listed.
func (f *Finder) beside(ctx context.Context, b *BlockImage, img *registry.Image) error {
	pin, pinned := f.Pins.Of(b.Repo.Ref())
	if pinned {
		// No list is needed to find it, and none can hide it.
		switch d, err := b.Repo.Lookup(ctx, b.Repo.Ref().WithDigest(pin)); {
		case err == nil:
			return b.takePinned(ctx, img, d)
		case registry.Temporary(err) || ctx.Err() != nil:
			return err
		}
	}
	all, listErr := b.Repo.Referrers(ctx, img.Descriptor, flatten.ArtifactTypeImage)
	if ctx.Err() != nil && listErr != nil {
		return listErr
	}
	var other v1.Hash // fits, and is not the pinned one
	take := func(d v1.Descriptor) (bool, error) {
		raw, err := b.Repo.Manifest(ctx, d)
		if registry.Temporary(err) || ctx.Err() != nil && err != nil {
			return false, err // an older one is no answer
		}
		if err == nil {
			b.Raw, b.Digest = raw, d.Digest
			if err = b.parse(); err == nil {
				err = b.fits(img)
			}
		}
		switch {
		case err != nil:
			f.Log.Warn("passed over a block image that is not one of the image", "image", b.Name, "manifest", d.Digest.String(), "err", err)
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
	if d, err := b.Repo.Lookup(tagCtx, b.Repo.Ref().WithTag(flatten.ImageTag(img.Digest))); err == nil &&
		!slices.ContainsFunc(all, func(x v1.Descriptor) bool { return x.Digest == d.Digest }) {
		if ok, err := take(d); ok || err != nil {
			return err
		}
	}
	switch {
	case other != (v1.Hash{}):
		return f.Pins.check(b.Repo.Ref(), other)
	case listErr != nil:
		return listErr
	case len(all) > 0:
		return fmt.Errorf("%s: %w: %d candidates are listed, and none of those that were looked at is a block image of it; make one with: thaw build %s",
			b.Repo.Ref(), errNoBlockImage, len(all), b.Repo.Ref())
	}
	return fmt.Errorf("%s: %w; make one with: thaw build %s", b.Repo.Ref(), errNoBlockImage, b.Repo.Ref())
}

// takePinned makes b the block image that it is pinned to, if that is one of img.
func (b *BlockImage) takePinned(ctx context.Context, img *registry.Image, d v1.Descriptor) error {
	raw, err := b.Repo.Manifest(ctx, d)
	if err != nil {
		return err
	}
	b.Raw, b.Digest = raw, d.Digest
	if err = b.parse(); err == nil {
		err = b.fits(img)
	}
	if err != nil {
		return badImage{fmt.Errorf("the pinned %s is not a block image of %s: %w", d.Digest, b.Repo.Ref(), err)}
	}
	return nil
}

// parse reads b's manifest, and checks what everything else relies on: each part
// has a SHA-256 digest.
func (b *BlockImage) parse() (err error) {
	if b.Manifest, err = flatten.ParseImage(b.Raw); err != nil {
		return err
	}
	for _, d := range append([]v1.Descriptor{b.Manifest.Config}, b.Manifest.Layers...) {
		if !isSHA256(d.Digest) {
			return fmt.Errorf("%w: a part of it has the digest %q, which is not a SHA-256 digest", blockmap.ErrCorrupt, d.Digest)
		}
	}
	return nil
}

// fits says whether b is a block image of img. Whoever may push can claim so; the
// subject and the config, with its diff IDs, bind the claim to this very image.
func (b *BlockImage) fits(img *registry.Image) error {
	switch m := b.Manifest; {
	case m.Subject == nil || m.Subject.Digest != img.Digest:
		return fmt.Errorf("its subject is not %s", img.Digest)
	case m.Config.Digest != img.Manifest.Config.Digest:
		return fmt.Errorf("its config is %s, that of the image is %s", m.Config.Digest, img.Manifest.Config.Digest)
	}
	return nil
}

func hashOf(d blockmap.Digest) v1.Hash { return v1.Hash{Algorithm: "sha256", Hex: d.String()} }

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
