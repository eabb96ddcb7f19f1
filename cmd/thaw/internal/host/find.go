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

// Finder finds block images by name, and what is stored beside them. Its methods are
// safe for concurrent use once its fields are set.
type Finder struct {
	Client   *registry.Client
	Platform *v1.Platform // to choose from a multi-platform image
	Pins     Pins
	Log      *slog.Logger

	// ReadFile reads a trace file that the user names. If there is no such file, it
	// fails with an *fs.PathError whose Op is "open"; the name is then taken for an
	// image.
	ReadFile func(ctx context.Context, name string, most int64) ([]byte, error)
}

// Close closes the client.
func (f *Finder) Close() { f.Client.Close() }

// BlockImage is a block image that was found, with its index. It does not change
// afterwards.
type BlockImage struct {
	Name     string // the name by which it was found
	Repo     *registry.Repo
	Digest   v1.Hash // of its manifest
	Raw      []byte  // its manifest
	Manifest *flatten.Image
	Index    *blockmap.Index

	// How the name led to the image: top is the index on the way, source is the source
	// image that the block image is beside. Each is zero if there was none.
	top, source v1.Hash
}

// NewBlockImage makes a block image of a manifest and an index in memory, as a build
// leaves them.
func NewBlockImage(repo *registry.Repo, digest v1.Hash, raw []byte, index *blockmap.Index) (*BlockImage, error) {
	b := &BlockImage{Name: repo.Ref().String(), Repo: repo, Digest: digest, Raw: raw, Index: index}
	return b, b.parse()
}

// Reference names the block image itself, by its digest.
func (b *BlockImage) Reference() string { return b.Repo.Ref().WithDigest(b.Digest).String() }

// IndexDigest is the digest of b's index. A trace names its image by it.
func (b *BlockImage) IndexDigest() blockmap.Digest { return digestOf(b.Manifest.Index.Digest) }

// badImage is the error of a name that leads to an unusable image. The registry has
// answered, so the cached image is not served instead.
type badImage struct{ error }

func (e badImage) Unwrap() error { return e.error }

// errNoBlockImage says that an image has no block image beside it.
var errNoBlockImage = errors.New("it is not a block image, and has none beside it")

// maxCandidates bounds how many of the block images beside an image are examined,
// newest first: anybody who may push can put one there.
const maxCandidates = 16

// tagTimeout bounds the look-up of a block image by its tag, which need not exist.
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

// manifest finds the manifest of the block image that repo's reference names. That is
// the manifest at the reference, or the newest block image beside it that belongs to it.
func (f *Finder) manifest(ctx context.Context, repo *registry.Repo, name string) (*BlockImage, error) {
	img, err := repo.Resolve(ctx, f.Platform)
	if err != nil {
		return nil, err
	}
	b := &BlockImage{Name: name, Repo: repo, Digest: img.Digest, Raw: img.Raw}
	if img.Index != nil {
		b.top = img.Index.Digest
	}
	if flatten.IsImage(img.ArtifactType) {
		if err := b.parse(); err != nil {
			return nil, badImage{fmt.Errorf("%s: %w", name, err)}
		}
		return b, f.Pins.check(repo.Ref(), b.Digest)
	}
	b.source = img.Digest
	return b, f.beside(ctx, b, img)
}

// beside finds the block image beside img and fills in b. A pinned block image is taken
// whether or not the registry lists it.
func (f *Finder) beside(ctx context.Context, b *BlockImage, img *registry.Image) error {
	pin, pinned := f.Pins.Of(b.Repo.Ref())
	if pinned {
		// The pinned image is found without a list, and no list can hide it.
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
	var other v1.Hash // a block image of img that is not the pinned one
	take := func(d v1.Descriptor) (bool, error) {
		raw, err := b.Repo.Manifest(ctx, d)
		if registry.Temporary(err) || ctx.Err() != nil && err != nil {
			return false, err // an older block image would be the wrong answer
		}
		if err == nil {
			b.Raw, b.Digest = raw, d.Digest
			if err = b.parse(); err == nil {
				err = b.fits(img)
			}
		}
		switch {
		case err != nil:
			f.Log.Warn("passed over a block image that does not belong to the image", "image", b.Name, "manifest", d.Digest.String(), "err", err)
			return false, nil
		case pinned:
			other = d.Digest
			return false, nil
		}
		return true, nil
	}
	// Newest first, where the list keeps the order.
	candidates := slices.Clone(all[max(0, len(all)-maxCandidates):])
	slices.Reverse(candidates)
	for _, d := range candidates {
		if ok, err := take(d); ok || err != nil {
			return err
		}
		if other != (v1.Hash{}) {
			break // one is enough for the error
		}
	}
	// The list may have lost the entry: the block image has a tag of its own.
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
		return fmt.Errorf("%s: %w: %d candidates are listed, and none of those that thaw examined belongs to it; make one with: thaw build %s",
			b.Repo.Ref(), errNoBlockImage, len(all), b.Repo.Ref())
	}
	return fmt.Errorf("%s: %w; make one with: thaw build %s", b.Repo.Ref(), errNoBlockImage, b.Repo.Ref())
}

// takePinned fills in b with the pinned block image, if that belongs to img.
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

// parse reads b's manifest. It checks that each part has a SHA-256 digest, which all
// other code relies on.
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

// fits fails if b is not a block image of img. Anybody who may push can claim that it
// is: the subject and the config, which has the diff IDs, tie it to this very image.
func (b *BlockImage) fits(img *registry.Image) error {
	switch m := b.Manifest; {
	case m.Subject == nil || m.Subject.Digest != img.Digest:
		return fmt.Errorf("its subject is not %s", img.Digest)
	case m.Config.Digest != img.Manifest.Config.Digest:
		return fmt.Errorf("its config is %s, that of the image is %s", m.Config.Digest, img.Manifest.Config.Digest)
	}
	return nil
}

// isSHA256 reports whether h is a well-formed SHA-256 digest.
func isSHA256(h v1.Hash) bool {
	_, err := blockmap.ParseDigest(h.Hex)
	return err == nil && h.Algorithm == "sha256"
}

// digestOf converts a hash to a Digest. A hash that is not a SHA-256 becomes the zero
// Digest, which no content has.
func digestOf(h v1.Hash) blockmap.Digest {
	d, err := blockmap.ParseDigest(h.Hex)
	if err != nil || h.Algorithm != "sha256" {
		return blockmap.Digest{}
	}
	return d
}
