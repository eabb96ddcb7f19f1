package flatten

import (
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// Policy says what must hold for the layout of a block image, beyond that every
// byte is the one that its digest promises.
type Policy uint8

const (
	// FromLayers is the policy of an image that Build has made: stream 0 holds the
	// metadata of an ext4 filesystem, each other stream the files of one layer. On
	// the device, all of the metadata lies in order. The blocks of a layer are as far
	// apart as they are in their stream, with gaps for those that no file has, and the
	// layers lie in order. The filesystem is sound.
	FromLayers Policy = iota
	// WithOverlays is the policy of an image that was built from layers and then
	// written to: behind the streams of FromLayers come overlays. The blocks of an
	// overlay lie on the device in their own order; what no overlay covers is in
	// the order of FromLayers, with gaps where zeros were written. The filesystem,
	// which another system has written by now, is sound.
	WithOverlays
)

func (p Policy) String() string {
	if p == WithOverlays {
		return "layers and overlays"
	}
	return "layers"
}

// Policy is the policy that the roles of the image's streams ask for. It fails for
// an image with a stream whose role is unknown.
func (m *Image) Policy() (Policy, error) {
	p := FromLayers
	for i := range len(m.Layers) - 1 {
		switch m.Role(i) {
		case RoleOverlay:
			p = WithOverlays
		case RoleUnknown:
			role := m.Layers[1+i].Annotations[AnnotationRole]
			if role == "" {
				return 0, fmt.Errorf("stream %d has no role: build the image again with this version of thaw", i)
			}
			return 0, fmt.Errorf("stream %d has the unknown role %s: it may be of a later version of thaw", i, quoted(role))
		}
	}
	return p, nil
}

// check holds the roles of the streams and the map of the device to the policy.
// The filesystem does not know what its files are to contain, so nothing else
// would find two runs that have changed places.
func (p Policy) check(m *Image, ix *blockmap.Index) error {
	overlays := len(ix.Streams)
	for i := range ix.Streams {
		role := m.Role(i)
		want := RoleLayer
		switch {
		case i == 0:
			want = RoleMetadata
		case p == WithOverlays && (role == RoleOverlay || i > overlays):
			want, overlays = RoleOverlay, min(i, overlays)
		}
		if role != want {
			return fmt.Errorf("stream %d has the role %q, where %q belongs", i, role, want)
		}
		if id := m.DiffID(i); (role == RoleLayer) != (id != v1.Hash{}) {
			return fmt.Errorf("stream %d has the role %q and the diff ID %q", i, role, id)
		}
	}
	if p == WithOverlays && overlays == len(ix.Streams) {
		return fmt.Errorf("the image has no overlay")
	}
	return checkRuns(ix, overlays)
}

// checkRuns holds the map of the device to its order. Streams from number overlays
// on are overlays; without any, all of the metadata is there.
func checkRuns(ix *blockmap.Index, overlays int) error {
	whole := overlays == len(ix.Streams)
	next := make([]uint32, len(ix.Streams)) // behind the last run of the metadata and of each overlay
	var last *blockmap.Run                  // of contents of files
	for i := range ix.Runs {
		r := &ix.Runs[i]
		switch {
		case r.Stream == 0 && r.Block > next[0] && whole:
			return fmt.Errorf("block %d of the metadata is at block %d of the device, where block %d belongs", r.Block, r.Device, next[0])
		case r.Stream == 0 || int(r.Stream) >= overlays:
			if r.Block < next[r.Stream] {
				return fmt.Errorf("block %d of stream %d is at block %d of the device, behind block %d of it", r.Block, r.Stream, r.Device, next[r.Stream]-1)
			}
			next[r.Stream] = r.Block + r.Count
			continue
		case last == nil:
		case r.Stream < last.Stream || r.Stream == last.Stream && r.Block < last.Block+last.Count:
			return fmt.Errorf("block %d of stream %d is at block %d of the device, behind block %d of stream %d",
				r.Block, r.Stream, r.Device, last.Block+last.Count-1, last.Stream)
		case r.Stream == last.Stream && r.Device-last.Device != r.Block-last.Block:
			return fmt.Errorf("blocks %d and %d of stream %d are at blocks %d and %d of the device, which are not as far apart",
				last.Block, r.Block, r.Stream, last.Device, r.Device)
		}
		last = r
	}
	if n := ix.Streams[0].Blocks(); next[0] != n && whole {
		return fmt.Errorf("%d of %d blocks of metadata are on the device", next[0], n)
	}
	return nil
}

// metadata reports whether blocks of the filesystem itself can lie in a stream.
func (p Policy) metadata(m *Image, stream int) bool {
	r := m.Role(stream)
	return r == RoleMetadata || p == WithOverlays && r == RoleOverlay
}
