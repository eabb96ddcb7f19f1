package flatten

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

var update = flag.Bool("update", false, "write the frozen bytes in testdata anew")

// frozen compares b with the bytes of a file that only a new version of its format changes.
func frozen(t *testing.T, file string, b []byte) []byte {
	t.Helper()
	if *update {
		if err := os.WriteFile(filepath.Join("testdata", file), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, b) {
		t.Errorf("%s has changed:\n%q\nwant\n%q", file, b, want)
	}
	return want
}

// frozenTable is a stream of n chunks of a block.
func frozenTable(blob byte, n uint32) *blockmap.Table {
	t := &blockmap.Table{Blob: blockmap.Digest{blob}, BlobSize: int64(n)*100 + 17}
	for i := range n {
		t.Chunks = append(t.Chunks, blockmap.Chunk{Digest: blockmap.Digest{blob, byte(i)}, Offset: int64(i) * 100, Stored: 100, Block: i, Count: 1})
	}
	return t
}

// TestFrozenManifests assembles images of streams that do not exist, and holds
// their manifests to frozen ones, byte by byte.
func TestFrozenManifests(t *testing.T) {
	subject := v1.Descriptor{MediaType: types.OCIManifestSchema1, Size: 1234, Digest: hashOf(blockmap.Digest{9})}
	layered := []Stream{
		{Role: RoleMetadata, Table: frozenTable(1, 3)},
		{Role: RoleLayer, DiffID: hashOf(blockmap.Digest{7}), Table: frozenTable(2, 2)},
		{Role: RoleLayer, DiffID: hashOf(blockmap.Digest{8}), Table: frozenTable(2, 2)},
	}
	for _, c := range []struct {
		file    string
		streams []Stream
		runs    []blockmap.Run
		guess   []blockmap.Extent
	}{
		{"image.v2.json", layered, []blockmap.Run{{Device: 0, Count: 3}, {Device: 3, Stream: 1, Count: 2}, {Device: 5, Stream: 2, Block: 1, Count: 1}},
			[]blockmap.Extent{blockmap.Range(4*blockSize, blockSize), blockmap.Range(0, 2*blockSize)}},
		{"overlay.v2.json", append(layered[:3:3], Stream{Role: RoleOverlay, Table: frozenTable(4, 1)}),
			[]blockmap.Run{{Device: 0, Count: 3}, {Device: 3, Stream: 1, Count: 1}, {Device: 4, Stream: 3, Count: 1}, {Device: 5, Stream: 2, Block: 1, Count: 1}}, nil},
	} {
		ix, err := NewIndex(100, c.runs, c.streams)
		if err != nil {
			t.Fatal(err)
		}
		dst := newTarget(t)
		a, err := Assemble(t.Context(), dst, c.streams, ix, subject, AssembleOptions{Config: []byte("{}"), Guess: c.guess})
		if err != nil {
			t.Fatal(err)
		}
		m, err := ParseImage(frozen(t, c.file, a.Raw))
		if err != nil {
			t.Fatalf("%s: %v", c.file, err)
		}
		if raw, err := json.Marshal(&m.Manifest); err != nil || !bytes.Equal(raw, a.Raw) {
			t.Errorf("%s is written again as %s, %v", c.file, raw, err)
		}
		if ix, err = m.ParseIndex(ix.Encode()); err != nil {
			t.Fatal(err)
		}
		for i, s := range m.Streams(ix) {
			if want := c.streams[i]; s.Role != want.Role || s.DiffID != want.DiffID || s.Table.Blob != want.Table.Blob {
				t.Errorf("%s: stream %d is read as %+v", c.file, i, s)
			}
		}
		if l, err := m.Guess(ix.Blocks); err != nil || len(l) != len(c.guess) {
			t.Errorf("%s: the guess is %v, %v", c.file, l, err)
		}
		if i, ok := m.Metadata(); i != 0 || !ok {
			t.Errorf("%s: the metadata is stream %d, %v", c.file, i, ok)
		}
		// Not the index of the same streams in another order, nor of fewer.
		for name, streams := range map[string][]Stream{"another order": append([]Stream{c.streams[1], c.streams[0]}, c.streams[2:]...), "fewer": c.streams[:2]} {
			other, err := NewIndex(100, nil, streams)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := m.ParseIndex(other.Encode()); err == nil {
				t.Errorf("%s: an index of %s streams is taken", c.file, name)
			}
			if _, err := Assemble(t.Context(), dst, c.streams, other, subject, AssembleOptions{}); err == nil {
				t.Errorf("%s: assembled with an index of %s streams", c.file, name)
			}
		}
	}
	ix, err := NewIndex(100, nil, []Stream{{Table: frozenTable(1, 1)}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Assemble(t.Context(), newTarget(t), []Stream{{Table: frozenTable(1, 1)}}, ix, subject, AssembleOptions{}); err == nil || !strings.Contains(err.Error(), "no role") {
		t.Errorf("a stream without a role: %v", err)
	}
	raw, err := os.ReadFile(filepath.Join("testdata", "image.v2.json"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseImage(bytes.Replace(raw, []byte("sha256:07"), []byte("\x1b[2Jsha256:07"), 1)); err == nil {
		t.Error("a diff ID that is no digest is taken")
	}
	// The manifest of a block image of format 1 says what to do.
	for _, c := range []struct {
		artifactType string
		image        bool
		want         error
	}{
		{"application/vnd.thaw.image.v1", true, ErrFormat1}, {ArtifactTypeImage, true, nil}, {"", false, ErrNotBlockImage}, {ArtifactTypeLayer, false, ErrNotBlockImage},
	} {
		_, err := ParseImage(bytes.ReplaceAll(raw, []byte(ArtifactTypeImage), []byte(c.artifactType)))
		if !errors.Is(err, c.want) || IsImage(c.artifactType) != c.image {
			t.Errorf("an image of the type %q: %v, %v", c.artifactType, err, IsImage(c.artifactType))
		}
	}
	if s := ErrFormat1.Error(); !errors.Is(ErrFormat1, ErrNotBlockImage) || !strings.Contains(s, "thaw build") {
		t.Errorf("the error does not say what to do: %s", s)
	}
}

// TestFrozenTOC reads the frozen TOC of a layer, and writes it again to the same
// bytes. How zstd compresses them is up to the library.
func TestFrozenTOC(t *testing.T) {
	file := regularEntry("dir/file", 3*blockSize)
	file.inode.Data = []ext4.Run{{FileBlock: 0, Block: 0, Count: 1}, {FileBlock: 2, Block: 1, Count: 1}}
	file.inode.UID, file.inode.Mtime = 1000, ext4.Time{Sec: -5, Nsec: 999_999_999}
	file.inode.Xattrs = []ext4.Xattr{{Name: "user.a", Value: []byte("v")}}
	var w tocWriter
	entries := []*entry{
		entryOf("dir", modeDir), file, {kind: kindHardLink, name: "hard", link: "dir/file"}, {kind: kindWhiteout, name: "gone"}, {kind: kindOpaque, name: "dir"},
		{name: "sym", link: "dir", inode: &ext4.Inode{Mode: modeSymlink | 0o777, Target: "dir"}}, {name: "null", inode: &ext4.Inode{Mode: modeChar, Major: 1, Minor: 3}},
	}
	for _, e := range entries {
		w.add(e)
	}
	table := frozenTable(1, 2)
	blob, err := w.close(table)
	if err != nil {
		t.Fatal(err)
	}
	dec, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	written, err := dec.DecodeAll(blob, nil)
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(filepath.Join("testdata", "toc.v2.zst"), blob, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	kept, err := os.ReadFile(filepath.Join("testdata", "toc.v2.zst"))
	if err != nil {
		t.Fatal(err)
	}
	if want, err := dec.DecodeAll(kept, nil); err != nil || !bytes.Equal(written, want) {
		t.Errorf("the TOC has changed: %v\n%q\nwant\n%q", err, written, want)
	}
	r, err := openTOC(kept, table.BlobSize)
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	var again tocWriter
	for range entries {
		e, err := r.read()
		if err != nil {
			t.Fatal(err)
		}
		again.add(e)
	}
	if blob, err = again.close(&r.table); err != nil {
		t.Fatal(err)
	}
	if b, err := dec.DecodeAll(blob, nil); err != nil || !bytes.Equal(b, written) {
		t.Errorf("it is written again as %q, %v", b, err)
	}
}
