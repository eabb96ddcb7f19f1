package registry

import (
	"encoding/json"
	"errors"
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// parseIndex reads the manifests that an index, a list of referrers or a
// layout's index.json lists. One entry that thaw cannot use must not hide the
// others, so each is read by itself, and those without a usable descriptor are
// left out: a digest by another algorithm than SHA-256, a negative size, fields
// of the wrong type. A list that is null or missing is empty. Only what is not a
// JSON object with a list is an error.
func parseIndex(raw []byte) ([]v1.Descriptor, error) {
	entries, err := indexEntries(raw)
	if err != nil {
		return nil, err
	}
	var list []v1.Descriptor
	for _, e := range entries {
		if d, ok := parseEntry(e); ok {
			list = append(list, d)
		}
	}
	return list, nil
}

// indexEntries are the entries of an index, byte by byte, so that a program that rewrites the
// index can keep those that it cannot read.
func indexEntries(raw []byte) ([]json.RawMessage, error) {
	var index *struct {
		Manifests []json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &index); err != nil {
		return nil, fmt.Errorf("parse index: %w", err)
	}
	if index == nil {
		return nil, errors.New("parse index: it is null")
	}
	return index.Manifests, nil
}

// parseEntry reads a descriptor. Fields that only describe the manifest (annotations, URLs,
// embedded data) are dropped if they cannot be read. Fields that identify it (digest, size,
// types, platform) must be readable.
func parseEntry(raw json.RawMessage) (v1.Descriptor, bool) {
	var e *struct {
		MediaType    types.MediaType `json:"mediaType"`
		Size         int64           `json:"size"`
		Digest       string          `json:"digest"`
		Annotations  json.RawMessage `json:"annotations"`
		URLs         json.RawMessage `json:"urls"`
		Data         json.RawMessage `json:"data"`
		Platform     *v1.Platform    `json:"platform"`
		ArtifactType string          `json:"artifactType"`
	}
	if json.Unmarshal(raw, &e) != nil || e == nil || e.Size < 0 {
		return v1.Descriptor{}, false
	}
	digest, err := v1.NewHash(e.Digest)
	if err != nil || digest.Algorithm != "sha256" {
		return v1.Descriptor{}, false
	}
	d := v1.Descriptor{MediaType: e.MediaType, Size: e.Size, Digest: digest, Platform: e.Platform, ArtifactType: e.ArtifactType}
	var annotations map[string]json.RawMessage
	if json.Unmarshal(e.Annotations, &annotations) == nil && len(annotations) > 0 {
		d.Annotations = make(map[string]string)
		for k, v := range annotations {
			var s string
			if json.Unmarshal(v, &s) == nil {
				d.Annotations[k] = s
			}
		}
	}
	if json.Unmarshal(e.URLs, &d.URLs) != nil {
		d.URLs = nil
	}
	if json.Unmarshal(e.Data, &d.Data) != nil {
		d.Data = nil
	}
	return d, true
}
