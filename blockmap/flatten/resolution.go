package flatten

import (
	"encoding/json"
	"fmt"
	"io/fs"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// Resolution records which block image a name led to. A cache keeps one under the
// name of each image that it has served, as JSON, so that a later start can do
// without the registry. The reader holds it to the same rules as an answer of the
// registry: see ParseResolution.
type Resolution struct {
	Name     string  // the reference, as the user gave it
	Manifest v1.Hash // of the block image
	Source   v1.Hash // of the image that the block image is beside; zero where the name led to the block image itself
	Top      v1.Hash // of the index that led there; zero where none did
}

// resolutionFormat is raised when the rules change by which a name leads to a
// block image: a name that was resolved by other rules is resolved again.
const resolutionFormat = 2

type resolutionJSON struct {
	Format   int     `json:"format"`
	Name     string  `json:"name"`
	Manifest v1.Hash `json:"manifest"`
	Source   v1.Hash `json:"source,omitzero"`
	Top      v1.Hash `json:"top,omitzero"`
}

// Encode is the inverse of ParseResolution.
func (r Resolution) Encode() ([]byte, error) {
	return json.Marshal(resolutionJSON{resolutionFormat, r.Name, r.Manifest, r.Source, r.Top})
}

// ParseResolution reads what a cache has kept under name. It fails with
// fs.ErrNotExist where that says nothing about name by today's rules. The caller
// checks that the block image is one of the source.
func ParseResolution(b []byte, name string) (Resolution, error) {
	var j resolutionJSON
	if err := json.Unmarshal(b, &j); err != nil {
		return Resolution{}, fmt.Errorf("parse the kept resolution of %s: %w", name, err)
	}
	if j.Format != resolutionFormat || j.Name != name || !isSHA256(j.Manifest) {
		return Resolution{}, fs.ErrNotExist
	}
	for _, h := range []v1.Hash{j.Source, j.Top} {
		if h != (v1.Hash{}) && !isSHA256(h) {
			return Resolution{}, fs.ErrNotExist
		}
	}
	return Resolution{j.Name, j.Manifest, j.Source, j.Top}, nil
}

func isSHA256(h v1.Hash) bool {
	_, err := blockmap.ParseDigest(h.Hex)
	return err == nil && h.Algorithm == "sha256"
}
