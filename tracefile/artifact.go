package tracefile

import (
	"bytes"
	"encoding/json"
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/blockmap"
)

// A trace or a bundle in a registry is an OCI image manifest of its artifact
// type. Its one layer is the file, its config is the empty one, and its subject is
// the block image that it belongs to. AnnotationLayer repeats the layer as
// "DIGEST SIZE": a list of referrers carries annotations, so a start that has the
// list needs no request for the manifest.
const (
	ArtifactTypeTrace  = "application/vnd.thaw.trace.v1"
	ArtifactTypeBundle = "application/vnd.thaw.bundle.v2"

	MediaTypeTrace  types.MediaType = "application/vnd.thaw.trace.v1"
	MediaTypeBundle types.MediaType = "application/vnd.thaw.bundle.v2+zstd"

	AnnotationLayer = "vnd.thaw.layer"
	// AnnotationAnew is "true" on a trace that replaces those that were stored before it:
	// the image's starts no longer read what these say.
	AnnotationAnew = "vnd.thaw.anew"

	// BundleTag is the tag of the last bundle that was stored in a repository. The first
	// start of a new image finds by it what the image before has read.
	BundleTag = "thaw-bundle"
)

// EmptyConfig is the config of an artifact, and EmptyConfigType its media type: the
// empty descriptor of the OCI image specification.
const (
	EmptyConfig                     = "{}"
	EmptyConfigType types.MediaType = "application/vnd.oci.empty.v1+json"
)

// ArtifactManifest is the manifest that stores layer, a trace or a bundle, beside
// the block image whose manifest is subject. anew sets AnnotationAnew.
func ArtifactManifest(artifactType string, layer, subject v1.Descriptor, anew bool) ([]byte, error) {
	digest, size, err := v1.SHA256(bytes.NewReader([]byte(EmptyConfig)))
	if err != nil {
		return nil, err
	}
	annotations := map[string]string{AnnotationLayer: fmt.Sprintf("%s %d", layer.Digest, layer.Size)}
	if anew {
		annotations[AnnotationAnew] = "true"
	}
	return json.Marshal(v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: artifactType,
		Config:      v1.Descriptor{MediaType: EmptyConfigType, Size: size, Digest: digest},
		Layers:      []v1.Descriptor{layer},
		Subject:     &v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: subject.Digest, Size: subject.Size},
		Annotations: annotations,
	})
}

// AnnotatedLayer reads the layer of an artifact from its descriptor in a list of
// referrers. ok is false where the list does not carry the annotation, or where the
// annotation is malformed: the manifest has the layer then.
func AnnotatedLayer(listed v1.Descriptor, mediaType types.MediaType) (layer v1.Descriptor, ok bool) {
	var hash string
	var size int64
	if n, _ := fmt.Sscanf(listed.Annotations[AnnotationLayer], "%s %d", &hash, &size); n != 2 || size <= 0 {
		return v1.Descriptor{}, false
	}
	h, err := v1.NewHash(hash)
	if err != nil || !isSHA256(h) {
		return v1.Descriptor{}, false
	}
	return v1.Descriptor{MediaType: mediaType, Digest: h, Size: size}, true
}

// ArtifactLayer reads the layer of an artifact from its manifest.
func ArtifactLayer(manifest []byte, mediaType types.MediaType) (v1.Descriptor, error) {
	var m v1.Manifest
	if err := json.Unmarshal(manifest, &m); err != nil {
		return v1.Descriptor{}, fmt.Errorf("parse the manifest of a %s: %w", mediaType, err)
	}
	if len(m.Layers) != 1 || m.Layers[0].MediaType != mediaType || m.Layers[0].Size <= 0 || !isSHA256(m.Layers[0].Digest) {
		return v1.Descriptor{}, fmt.Errorf("its manifest is not that of a %s", mediaType)
	}
	return m.Layers[0], nil
}

func isSHA256(h v1.Hash) bool {
	_, err := blockmap.ParseDigest(h.Hex)
	return err == nil && h.Algorithm == "sha256"
}
