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
// its layers are the index and the blobs of the index's streams, in the order of
// the index: a stream that two layers of the source image have in common is listed
// twice. AnnotationRole on a stream says what it holds (see Role), and
// AnnotationDiffID which layer of the source image it was made of. AnnotationGuess
// is a hint at what to fetch first, and need not be there.
//
// A converted layer is a manifest of ArtifactTypeLayer with the layer's TOC and
// its stream, under a tag that is made of what the conversion depends on. It
// keeps registries from collecting the blobs, and lets the next build find
// them.
const (
	ArtifactTypeImage = "application/vnd.thaw.image.v2"
	ArtifactTypeLayer = "application/vnd.thaw.layer.v2"

	MediaTypeIndex  types.MediaType = "application/vnd.thaw.index.v2"
	MediaTypeStream types.MediaType = "application/vnd.thaw.stream.v1+zstd"
	MediaTypeTOC    types.MediaType = "application/vnd.thaw.toc.v2+zstd"

	AnnotationRole   = "vnd.thaw.role"
	AnnotationDiffID = "vnd.thaw.diff-id"

	mediaTypeManifest = types.OCIManifestSchema1
	mediaTypeConfig   = types.OCIConfigJSON
	mediaTypeEmpty    = types.MediaType("application/vnd.oci.empty.v1+json")

	// layerVersion changes whenever the conversion of a layer gives other bytes.
	layerVersion = 2

	// maxIndex bounds the size of the index that a manifest may claim.
	maxIndex = 256 << 20
)

// ErrFormat1 means that a block image is of the first format, whose chunks have other
// digests.
var ErrFormat1 = fmt.Errorf("%w of format 2: it has format 1, which this thaw does not read: build the block image again with thaw build", ErrNotBlockImage)

// IsImage says whether a manifest of that artifact type is a block image, of this format
// or of an earlier one, which ParseImage refuses.
func IsImage(artifactType string) bool {
	return artifactType == ArtifactTypeImage || artifactType == artifactTypeFormat1
}

const artifactTypeFormat1 = "application/vnd.thaw.image.v1"

// ErrNotBlockImage means that a manifest is not that of a block image.
var ErrNotBlockImage = errors.New("not a thaw block image")

// Image is the manifest of a block image, checked.
type Image struct {
	v1.Manifest
	Index v1.Descriptor
}

// ParseImage reads the manifest of a block image. It fails with ErrNotBlockImage if the
// manifest is not that of a block image.
//
// A role that this version does not know does not make it fail: the index alone
// says what the device reads as, so a device of an image with such streams can be
// served. The stream counts as data: it is not prefetched, and Policy, which would
// have to know the rules for it, refuses the image.
func ParseImage(raw []byte) (*Image, error) {
	m := new(Image)
	if err := json.Unmarshal(raw, &m.Manifest); err != nil {
		return nil, fmt.Errorf("%w: its manifest cannot be read: %w", ErrNotBlockImage, err)
	}
	switch m.ArtifactType {
	case ArtifactTypeImage:
	case artifactTypeFormat1:
		return nil, ErrFormat1
	default:
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
		if id, ok := d.Annotations[AnnotationDiffID]; ok {
			if h, err := v1.NewHash(id); err != nil || h.Algorithm != "sha256" {
				return nil, fmt.Errorf("%w: a stream's diff ID is not a SHA-256 digest", blockmap.ErrCorrupt)
			}
		}
	}
	return m, nil
}

// ParseIndex reads the index of the image, and checks that its streams are the
// blobs of the manifest, in order: so whatever is kept or copied with the manifest
// is all of the image.
func (m *Image) ParseIndex(b []byte) (*blockmap.Index, error) {
	ix, err := blockmap.DecodeIndex(b)
	if err != nil {
		return nil, err
	}
	if n := len(m.Layers) - 1; len(ix.Streams) != n {
		return nil, fmt.Errorf("index: %w: it has %d streams, and the image has %d", blockmap.ErrCorrupt, len(ix.Streams), n)
	}
	for i := range ix.Streams {
		t := &ix.Streams[i]
		if d := &m.Layers[1+i]; d.Digest != hashOf(t.Blob) || d.Size != t.BlobSize {
			return nil, fmt.Errorf("index: %w: stream %d is not that of the image", blockmap.ErrCorrupt, i)
		}
	}
	return ix, nil
}

// Streams are the streams of the image, whose index is ix: what another image that
// has them too is assembled of.
func (m *Image) Streams(ix *blockmap.Index) []Stream {
	l := make([]Stream, len(ix.Streams))
	for i := range l {
		l[i] = Stream{Role: m.Role(i), DiffID: m.DiffID(i), Table: &ix.Streams[i]}
	}
	return l
}

// Role is what a stream of the index holds: RoleUnknown where the manifest says
// something that this version does not know, or nothing.
func (m *Image) Role(stream int) Role {
	switch r := Role(m.Layers[1+stream].Annotations[AnnotationRole]); r {
	case RoleMetadata, RoleLayer, RoleOverlay:
		return r
	}
	return RoleUnknown
}

// DiffID is the diff ID of the layer that a stream of the index was made of: the
// zero Hash where it was made of none.
func (m *Image) DiffID(stream int) v1.Hash {
	h, err := v1.NewHash(m.Layers[1+stream].Annotations[AnnotationDiffID])
	if err != nil {
		return v1.Hash{}
	}
	return h
}

// Metadata is the first stream of the index that holds metadata of a file system;
// ok is false if none does.
func (m *Image) Metadata() (stream int, ok bool) {
	for i := range len(m.Layers) - 1 {
		if m.Role(i) == RoleMetadata {
			return i, true
		}
	}
	return 0, false
}

// describe makes the descriptor of b.
func describe(t types.MediaType, b []byte) v1.Descriptor {
	h, size, err := v1.SHA256(bytes.NewReader(b))
	if err != nil {
		panic(err) // reading memory does not fail
	}
	return v1.Descriptor{MediaType: t, Size: size, Digest: h}
}

// digestOf turns a descriptor's hash into a Digest.
func digestOf(h v1.Hash) (blockmap.Digest, error) {
	if h.Algorithm != "sha256" {
		return blockmap.Digest{}, fmt.Errorf("%q is not a SHA-256 digest", h)
	}
	return blockmap.ParseDigest(h.Hex)
}

func hashOf(d blockmap.Digest) v1.Hash { return v1.Hash{Algorithm: "sha256", Hex: d.String()} }
