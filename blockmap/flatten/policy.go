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
	// the device, all of the metadata lies in order; behind it lie the contents of
	// the files without a gap, in the order of the streams. The filesystem is
	// sound.
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
// on are overlays; without any, there are no gaps.
func checkRuns(ix *blockmap.Index, overlays int) error {
	gaps := overlays < len(ix.Streams)
	next := make([]uint32, len(ix.Streams)) // behind the last run of each overlay
	var meta uint32                         // blocks of metadata so far
	var last *blockmap.Run                  // of contents of files
	for i := range ix.Runs {
		r := &ix.Runs[i]
		switch {
		case int(r.Stream) >= overlays:
			if r.Block < next[r.Stream] {
				return fmt.Errorf("block %d of stream %d is at block %d of the device, behind block %d of it", r.Block, r.Stream, r.Device, next[r.Stream]-1)
			}
			next[r.Stream] = r.Block + r.Count
			continue
		case r.Stream == 0 && last != nil:
			return fmt.Errorf("metadata at block %d of the device, behind contents of files", r.Device)
		case r.Stream == 0 && (r.Block < meta || r.Block > meta && !gaps):
			return fmt.Errorf("block %d of the metadata is at block %d of the device, where block %d belongs", r.Block, r.Device, meta)
		case r.Stream == 0:
			meta = r.Block + r.Count
			continue
		case last == nil:
		case r.Device != last.Device+last.Count && !gaps:
			return fmt.Errorf("a gap in the contents of files at block %d of the device", last.Device+last.Count)
		case r.Stream < last.Stream || r.Stream == last.Stream && r.Block < last.Block+last.Count:
			return fmt.Errorf("block %d of stream %d is at block %d of the device, behind block %d of stream %d",
				r.Block, r.Stream, r.Device, last.Block+last.Count-1, last.Stream)
		}
		last = r
	}
	if n := ix.Streams[0].Blocks(); meta != n && !gaps {
		return fmt.Errorf("%d of %d blocks of metadata are on the device", meta, n)
	}
	return nil
}

// metadata reports whether blocks of the filesystem itself can lie in a stream.
func (p Policy) metadata(m *Image, stream int) bool {
	r := m.Role(stream)
	return r == RoleMetadata || p == WithOverlays && r == RoleOverlay
}
