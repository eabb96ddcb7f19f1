package flatten

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Source is the image that a block image is built from.
type Source struct {
	Manifest v1.Descriptor // of the image manifest
	Config   []byte        // the image config, as it is
	Layers   []Layer       // from the lowest up
}

// Layer is one layer of a Source.
type Layer struct {
	v1.Descriptor
	// Open reads the layer as it is stored. Its reader fails, and does not end,
	// if the bytes are not those of the descriptor.
	Open func(ctx context.Context) (io.ReadCloser, error)
	// OpenFrom, if not nil, reads the layer from off. Its reader fails if these bytes and
	// those of before, of which there are off, are not those of the descriptor. A layer
	// without it is near: it is not kept in the temporary directory.
	OpenFrom func(ctx context.Context, off int64, before io.Reader) (io.ReadCloser, error)
}

// diffIDs are the digests of the layers' tars, which the config lists.
func diffIDs(src *Source) ([]v1.Hash, error) {
	var c v1.ConfigFile
	if err := json.Unmarshal(src.Config, &c); err != nil {
		return nil, fmt.Errorf("image config: %w", err)
	}
	if len(c.RootFS.DiffIDs) != len(src.Layers) {
		return nil, fmt.Errorf("the image has %d layers, but its config lists %d: it is damaged, or not a container image",
			len(src.Layers), len(c.RootFS.DiffIDs))
	}
	for _, d := range c.RootFS.DiffIDs {
		if _, err := digestOf(d); err != nil {
			return nil, fmt.Errorf("image config: diff ID: %w", err)
		}
	}
	return c.RootFS.DiffIDs, nil
}

// distinct is how many different layers there are.
func distinct(diffIDs []v1.Hash) int {
	seen := make(map[v1.Hash]bool)
	for _, id := range diffIDs {
		seen[id] = true
	}
	return len(seen)
}
