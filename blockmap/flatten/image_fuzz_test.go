package flatten

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"hash/crc32"
	"io"
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
		f.Add(m.Index.Encode(), "")
		for d, b := range m.Blobs {
			blobs[d.String()] = b
		}
	}
	f.Add((&blockmap.Index{Blocks: 8}).Encode(), "AQ")
	f.Add((&blockmap.Index{Blocks: 8, Streams: make([]blockmap.Table, 1)}).Encode(), "AQAB")
	open := func(_ context.Context, d v1.Descriptor) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(blobs[d.Digest.Hex])), nil
	}
	f.Fuzz(func(t *testing.T, b []byte, guess string) {
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
		m := v1.Manifest{ArtifactType: ArtifactTypeImage, MediaType: mediaTypeManifest, Config: describe(mediaTypeConfig, []byte("{}")),
			Layers: []v1.Descriptor{describe(MediaTypeIndex, b)}, Annotations: map[string]string{AnnotationGuess: guess}}
		for i := range ix.Streams {
			m.Layers = append(m.Layers, describeBlob(&ix.Streams[i]))
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
		if Verify(t.Context(), image, ix, open, FromLayers, t.TempDir()) == nil {
			t.Fatal("random data was taken for a file system")
		}
	})
}
