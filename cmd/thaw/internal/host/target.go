package host

import (
	"context"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap/flatten"
	"thaw/fetcher/registry"
)

// NewPlace is a repository with converted layers, or with the blobs of an image, as package
// flatten sees it.
func NewPlace(r *registry.Repo) flatten.Place { return place{r} }

// NewTarget is a repository that package flatten pushes to.
func NewTarget(r *registry.Repo) flatten.Target { return target{place{r}} }

type place struct{ *registry.Repo }

// HasBlob reads the blob of a layout as well, since no registry has checked it.
func (p place) HasBlob(ctx context.Context, d v1.Descriptor) (bool, error) { return p.Holds(ctx, d) }

// lookupTime bounds the look-up of a converted layer.
const lookupTime = 30 * time.Second

// Tagged looks up a converted layer, which only saves work: if the look-up fails,
// the layer is converted again. Some registries answer 401, 403 or 500 for a tag that
// they do not have.
func (p place) Tagged(ctx context.Context, tag string) ([]byte, error) {
	lctx, cancel := context.WithTimeout(ctx, lookupTime)
	defer cancel()
	raw, _, err := p.ReadManifest(lctx, p.Ref().WithTag(tag))
	if err != nil {
		return nil, ctx.Err()
	}
	return raw, nil
}

type target struct{ place }

func (t target) PushFile(ctx context.Context, d v1.Descriptor, path string, progress func(int64)) error {
	_, err := t.PushBlob(ctx, d, path, progress)
	return err
}

func (t target) PushBytes(ctx context.Context, d v1.Descriptor, b []byte) error {
	_, err := t.Repo.PushBytes(ctx, b, d.MediaType)
	return err
}

func (t target) Mount(ctx context.Context, d v1.Descriptor, from flatten.Place) (bool, error) {
	p, ok := from.(place)
	if !ok {
		return false, nil
	}
	return t.MountBlob(ctx, d, p.Repo)
}

func (t target) PushManifest(ctx context.Context, d v1.Descriptor, raw []byte, tag string) error {
	_, err := t.Repo.PushManifest(ctx, raw, d.MediaType, tag)
	return err
}
