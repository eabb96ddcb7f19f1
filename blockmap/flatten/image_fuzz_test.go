package flatten

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// FuzzBlockImage does with a hostile index, in a manifest that names its streams, what
// inspect and verify do.
func FuzzBlockImage(f *testing.F) {
	images := []*blocktest.Image{blocktest.NewImage(f, 1, 50), blocktest.NewImage(f, 2, 200)}
	blobs := make(map[string][]byte)
	for _, m := range images {
		f.Add(m.Index.Encode(), "", false)
		f.Add(m.Index.Encode(), "", true)
		for d, b := range m.Blobs {
			blobs[d.String()] = b
		}
	}
	f.Add((&blockmap.Index{Blocks: 8}).Encode(), "AQ", false)
	f.Add((&blockmap.Index{Blocks: 8, Streams: make([]blockmap.Table, 1)}).Encode(), "AQAB", true)
	config, err := json.Marshal(v1.ConfigFile{RootFS: v1.RootFS{DiffIDs: []v1.Hash{hashOf(blockmap.Digest{1})}}})
	if err != nil {
		f.Fatal(err)
	}
	blobs[describe("", config).Digest.Hex] = config
	open := func(_ context.Context, d v1.Descriptor) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(blobs[d.Digest.Hex])), nil
	}
	f.Fuzz(func(t *testing.T, b []byte, guess string, overlay bool) {
		if len(b) >= 20 { // past the checksum
			b = bytes.Clone(b)
			binary.LittleEndian.PutUint32(b[12:], uint32(len(b)-20))
			sum := crc32.Checksum(b[:16], castagnoli)
			binary.LittleEndian.PutUint32(b[16:], crc32.Update(sum, castagnoli, b[20:]))
		}
		ix, err := blockmap.DecodeIndex(b)
		if err != nil {
			return
		}
		m := v1.Manifest{ArtifactType: ArtifactTypeImage, MediaType: mediaTypeManifest, Config: describe(mediaTypeConfig, config),
			Layers: []v1.Descriptor{describe(MediaTypeIndex, b)}, Annotations: map[string]string{AnnotationGuess: guess}}
		for i := range ix.Streams {
			s := Stream{Role: RoleLayer, DiffID: hashOf(blockmap.Digest{1}), Table: &ix.Streams[i]}
			switch {
			case i == 0:
				s.Role = RoleMetadata
			case overlay && i == len(ix.Streams)-1:
				s.Role = RoleOverlay
			}
			m.Layers = append(m.Layers, s.descriptor())
		}
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		image, err := ParseImage(raw)
		if err != nil {
			t.Fatalf("the manifest of an index that was accepted: %v", err)
		}
		if ix, err = image.ParseIndex(b); err != nil {
			t.Fatalf("the index of its own manifest: %v", err)
		}
		if l, err := image.Guess(ix.Blocks); err == nil {
			for _, e := range l {
				if err := e.Check(int64(ix.Blocks) * blockSize); err != nil {
					t.Fatal(err)
				}
			}
		}
		new(Reporter).Report(image, ix)
		policy, err := image.Policy()
		if err != nil {
			t.Fatal(err)
		}
		if Verify(t.Context(), image, ix, open, policy, t.TempDir()) == nil {
			t.Fatal("random data was taken for a file system")
		}
	})
}

// FuzzManifest asks a hostile manifest all that a reader asks one.
func FuzzManifest(f *testing.F) {
	for _, file := range []string{"image.v2.json", "overlay.v2.json"} {
		b, err := os.ReadFile(filepath.Join("testdata", file))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(bytes.ReplaceAll(b, []byte(`"layer"`), []byte(`"verity"`)))
		f.Add(bytes.ReplaceAll(b, []byte(`"vnd.thaw.role"`), []byte(`"x"`)))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := ParseImage(raw)
		if err != nil {
			return
		}
		overlay := false
		for i := range len(m.Layers) - 1 {
			overlay = overlay || m.Role(i) == RoleOverlay
			if id := m.DiffID(i); id != (v1.Hash{}) && len(id.Hex) != 64 {
				t.Errorf("stream %d has the diff ID %q", i, id)
			}
		}
		if i, ok := m.Metadata(); ok && m.Role(i) != RoleMetadata {
			t.Errorf("stream %d is not metadata", i)
		}
		if p, err := m.Policy(); err == nil && (p == WithOverlays) != overlay {
			t.Errorf("the policy is %v", p)
		}
	})
}
