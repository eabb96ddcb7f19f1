package registry

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// archive is what `docker save` and `podman save` write: a tar with a
// manifest.json that names the config and layers of images.
//
// It has no OCI manifest, so one is made, of the layers as they are in the archive. They are
// not compressed again, so the manifest is always the same, and a layer is read in place.
// Since version 25, Docker writes an OCI layout into the same archive; an archive with only
// that is read as a layout.
type archive struct {
	tar *tarFile
	oci view

	mu struct {
		sync.Mutex
		blobs  map[v1.Hash]string        // the members that hold them
		raw    map[v1.Hash][]byte        // manifests made here
		layers map[string]*v1.Descriptor // of compressed members
	}
}

func newArchive(t *tarFile) *archive {
	a := &archive{tar: t, oci: view{t}}
	a.mu.blobs, a.mu.raw = make(map[v1.Hash]string), make(map[v1.Hash][]byte)
	a.mu.layers = make(map[string]*v1.Descriptor)
	return a
}

const savedManifest = "manifest.json"

// savedImage is an entry of manifest.json.
type savedImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// maxLayers bounds the layers of an image in an archive; Docker has 127 at most.
const maxLayers = 4096

func (a *archive) manifest(ctx context.Context, ref Ref) ([]byte, string, error) {
	if _, err := a.tar.walk(ctx); err != nil {
		return nil, "", err
	}
	if ref.Digest != (v1.Hash{}) {
		a.mu.Lock()
		raw := a.mu.raw[ref.Digest]
		a.mu.Unlock()
		if raw == nil {
			return a.oci.manifest(ctx, ref)
		}
		return raw, string(types.OCIManifestSchema1), nil
	}
	if !a.tar.has(savedManifest) {
		if a.tar.has(indexFile) {
			return a.oci.manifest(ctx, ref)
		}
		return nil, "", fmt.Errorf("%s is not an image archive: it has no %s", a.tar, savedManifest)
	}
	b, err := a.tar.read(ctx, savedManifest, maxManifest)
	if err != nil {
		return nil, "", err
	}
	var images []savedImage
	if err := json.Unmarshal(b, &images); err != nil {
		return nil, "", fmt.Errorf("parse %s: %w", savedManifest, err)
	}
	img, err := choose(images, ref.Tag)
	if err != nil {
		return nil, "", err
	}
	raw, err := a.make(ctx, img)
	return raw, string(types.OCIManifestSchema1), err
}

func choose(images []savedImage, name string) (savedImage, error) {
	var names []string
	full := fullName(name)
	for _, img := range images {
		for _, t := range img.RepoTags {
			if name != "" && (t == name || fullName(t) == full) {
				return img, nil
			}
			names = append(names, t)
		}
	}
	switch {
	case name != "":
		return savedImage{}, fmt.Errorf("%w: no image is named %s, there are: %s", ErrNotFound, name, joined(names))
	case len(images) == 0:
		return savedImage{}, fmt.Errorf("%w: the archive has no image", ErrNotFound)
	case len(images) > 1 && !same(images):
		return savedImage{}, fmt.Errorf("the archive has %d images, choose a name: %s", len(images), joined(names))
	}
	return images[0], nil
}

// same says whether all entries are the same image under different names.
func same(images []savedImage) bool {
	for _, img := range images[1:] {
		if img.Config != images[0].Config || !slices.Equal(img.Layers, images[0].Layers) {
			return false
		}
	}
	return true
}

// fullName is a name with its registry and tag, so that different spellings compare equal.
func fullName(s string) string {
	r, err := parseRegistry(s)
	if err != nil {
		return s
	}
	return r.String()
}

// make makes the manifest of an image and remembers which members are its blobs.
func (a *archive) make(ctx context.Context, img savedImage) ([]byte, error) {
	config, err := a.tar.read(ctx, img.Config, maxManifest)
	if err != nil {
		return nil, err
	}
	var c v1.ConfigFile
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, fmt.Errorf("parse config: %w", err)
	}
	if len(c.RootFS.DiffIDs) != len(img.Layers) {
		return nil, fmt.Errorf("the image has %d layers and its config says %d", len(img.Layers), len(c.RootFS.DiffIDs))
	}
	if len(img.Layers) > maxLayers {
		return nil, fmt.Errorf("the image has %d layers, and %d are allowed", len(img.Layers), maxLayers)
	}
	blobs := make(map[v1.Hash]string)
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Layers: []v1.Descriptor{},
		Config: v1.Descriptor{MediaType: types.OCIConfigJSON, Size: int64(len(config)), Digest: hashOf(config)}}
	blobs[m.Config.Digest] = img.Config
	for i, name := range img.Layers {
		d, err := a.layer(ctx, name, c.RootFS.DiffIDs[i])
		if err != nil {
			return nil, fmt.Errorf("layer %.200q: %w", name, err)
		}
		blobs[d.Digest] = name
		m.Layers = append(m.Layers, d)
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for h, at := range blobs {
		a.mu.blobs[h] = at
	}
	a.mu.raw[hashOf(raw)] = raw
	return raw, nil
}

// layer describes a layer. The digest of a plain one is its diff ID, which the reader
// verifies; that of a compressed one is computed, once.
func (a *archive) layer(ctx context.Context, name string, diffID v1.Hash) (v1.Descriptor, error) {
	a.mu.Lock()
	known := a.mu.layers[name]
	a.mu.Unlock()
	if known != nil {
		return *known, nil
	}
	size, err := a.tar.size(ctx, name)
	if err != nil {
		return v1.Descriptor{}, err
	}
	d := v1.Descriptor{MediaType: types.OCIUncompressedLayer, Size: size, Digest: diffID}
	b, err := a.tar.open(ctx, name, 0, size, true)
	if err != nil {
		return d, err
	}
	defer b.Close()
	r := bufio.NewReaderSize(b, 256<<10)
	head, err := r.Peek(tarBlock)
	if err != nil && err != io.EOF {
		return d, err
	}
	switch {
	case isTar(head):
		return d, nil
	case len(head) >= 2 && head[0] == 0x1f && head[1] == 0x8b:
		d.MediaType = types.OCILayer
	case len(head) >= 4 && string(head[:4]) == "\x28\xb5\x2f\xfd":
		d.MediaType = types.OCILayerZStd
	default:
		return d, nil
	}
	s := newSum()
	if _, err := io.Copy(s, ctxReader{ctx, r}); err != nil {
		return d, err
	}
	d.Digest = s.hash()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.mu.layers[name] = &d
	return d, nil
}

// blob is the name of the member that holds a blob.
func (a *archive) blob(h v1.Hash) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if name, ok := a.mu.blobs[h]; ok {
		return name
	}
	return blobName(h)
}

func (a *archive) open(ctx context.Context, digest v1.Hash, off, n int64, whole bool) (*Body, error) {
	return a.tar.open(ctx, a.blob(digest), off, n, whole)
}

func (a *archive) stat(ctx context.Context, digest v1.Hash) (int64, error) {
	return a.tar.size(ctx, a.blob(digest))
}

func (a *archive) referrers(ctx context.Context, subject v1.Descriptor, types []string) ([]v1.Descriptor, error) {
	if _, err := a.tar.walk(ctx); err != nil {
		return nil, err
	}
	if !a.tar.has(indexFile) {
		return nil, nil // it has no place for them
	}
	found, err := a.oci.referrers(ctx, subject, types)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	return found, err
}
