package flatten

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/blockmap"
)

// The types of a block image's parts in a registry.
//
// A block image is an OCI image manifest of ArtifactTypeImage. Its config is
// that of the source image, its subject the manifest of the source image, and
// its layers are, in this order: the index, stream 0, and the streams of the
// layers, which carry the annotation AnnotationDiffID. AnnotationGuess is a hint
// at what to fetch first, and need not be there.
//
// A converted layer is a manifest of ArtifactTypeLayer with the layer's TOC and
// its stream, under a tag that is made of what the conversion depends on. It
// keeps registries from collecting the blobs, and lets the next build find
// them.
const (
	ArtifactTypeImage = "application/vnd.thaw.image.v1"
	ArtifactTypeLayer = "application/vnd.thaw.layer.v1"

	MediaTypeIndex  types.MediaType = "application/vnd.thaw.index.v1"
	MediaTypeStream types.MediaType = "application/vnd.thaw.stream.v1+zstd"
	MediaTypeTOC    types.MediaType = "application/vnd.thaw.toc.v1+zstd"

	AnnotationDiffID = "vnd.thaw.diff-id"

	mediaTypeManifest = types.OCIManifestSchema1
	mediaTypeConfig   = types.OCIConfigJSON
	mediaTypeEmpty    = types.MediaType("application/vnd.oci.empty.v1+json")

	// layerVersion changes whenever the same layer would give other bytes.
	layerVersion = 1

	// maxIndex bounds what a manifest may say of its index.
	maxIndex = 256 << 20
)

// ErrNotBlockImage says that a manifest is that of something else.
var ErrNotBlockImage = errors.New("not a thaw block image")

// Image is the manifest of a block image, checked.
type Image struct {
	v1.Manifest
	Index v1.Descriptor
}

// ParseImage reads the manifest of a block image. It fails with
// ErrNotBlockImage where it is another thing's.
func ParseImage(raw []byte) (*Image, error) {
	m := new(Image)
	if err := json.Unmarshal(raw, &m.Manifest); err != nil {
		return nil, fmt.Errorf("%w: its manifest cannot be read: %w", ErrNotBlockImage, err)
	}
	if m.ArtifactType != ArtifactTypeImage {
		return nil, ErrNotBlockImage
	}
	if len(m.Layers) < 2 || m.Layers[0].MediaType != MediaTypeIndex {
		return nil, fmt.Errorf("%w: its manifest has no index", blockmap.ErrCorrupt)
	}
	m.Index = m.Layers[0]
	if m.Index.Size < 0 || m.Index.Size > maxIndex {
		return nil, fmt.Errorf("%w: an index of %d bytes", blockmap.ErrCorrupt, m.Index.Size)
	}
	for _, d := range m.Layers[1:] {
		if d.MediaType != MediaTypeStream {
			return nil, fmt.Errorf("a part of the block image has the unknown type %q: it may be of a later version of thaw", d.MediaType)
		}
	}
	return m, nil
}

// ParseIndex reads the index of the image, and checks that every stream of it
// is a blob of the manifest: so whatever is kept or copied with the manifest is
// all of the image.
func (m *Image) ParseIndex(b []byte) (*blockmap.Index, error) {
	ix, err := blockmap.DecodeIndex(b)
	if err != nil {
		return nil, err
	}
	sizes := make(map[v1.Hash]int64)
	for _, d := range m.Layers[1:] {
		sizes[d.Digest] = d.Size
	}
	for i := range ix.Streams {
		t := &ix.Streams[i]
		if size, ok := sizes[hashOf(t.Blob)]; !ok || size != t.BlobSize {
			return nil, fmt.Errorf("index: %w: stream %d is not a blob of the image", blockmap.ErrCorrupt, i)
		}
	}
	return ix, nil
}

// describe makes the descriptor of b.
func describe(t types.MediaType, b []byte) v1.Descriptor {
	h, size, err := v1.SHA256(bytes.NewReader(b))
	if err != nil {
		panic(err) // reading memory does not fail
	}
	return v1.Descriptor{MediaType: t, Size: size, Digest: h}
}

func streamDescriptor(t *blockmap.Table, diffID v1.Hash) *v1.Descriptor {
	d := &v1.Descriptor{MediaType: MediaTypeStream, Size: t.BlobSize, Digest: hashOf(t.Blob)}
	if diffID != (v1.Hash{}) {
		d.Annotations = map[string]string{AnnotationDiffID: diffID.String()}
	}
	return d
}
