package flatten

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Made-up layers: what archive/tar writes, what GNU tar writes, and blocks made
// by hand for what neither does.

var someTime = time.Unix(1_700_000_000, 123_456_789)

// line is one entry of a made-up layer; raw is in the place of all else.
type line struct {
	tar.Header
	body string
	raw  []byte
}

// with changes the header of a line.
func (l line) with(f func(h *tar.Header)) line {
	f(&l.Header)
	return l
}

func head(kind byte, name string, mode int64) tar.Header {
	return tar.Header{Typeflag: kind, Name: name, Mode: mode, ModTime: someTime, Format: tar.FormatPAX}
}

func reg(name, body string) line { return line{Header: head(tar.TypeReg, name, 0o644), body: body} }
func dir(name string) line       { return line{Header: head(tar.TypeDir, name+"/", 0o755)} }
func fifo(name string) line      { return line{Header: head(tar.TypeFifo, name, 0o600)} }
func whiteout(name string) line {
	return reg(filepath.Join(filepath.Dir(name), ".wh."+filepath.Base(name)), "")
}
func opaque(dir string) line        { return reg(filepath.Join(dir, ".wh..wh..opq"), "") }
func raw(blocks ...[]byte) line     { return line{raw: bytes.Join(blocks, nil)} }
func symlink(name, to string) line  { return linkOf(tar.TypeSymlink, name, to) }
func hardlink(name, to string) line { return linkOf(tar.TypeLink, name, to) }

func linkOf(kind byte, name, to string) line {
	l := line{Header: head(kind, name, 0o777)}
	l.Linkname = to
	return l
}

func device(kind byte, name string, major, minor int64) line {
	l := line{Header: head(kind, name, 0o660)}
	l.Devmajor, l.Devminor = major, minor
	return l
}

// headerBlock is a tar header made by hand: fields at their offsets, and the checksum.
func headerBlock(kind byte, name string, size int64, fields map[int]string) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x00", size))
	copy(b[136:], "14524770400\x00")
	b[156] = kind
	copy(b[257:], "ustar\x0000")
	for at, v := range fields {
		copy(b[at:], v)
	}
	if _, ok := fields[148]; !ok {
		copy(b[148:], "        ")
		sum := 0
		for _, c := range b {
			sum += int(c)
		}
		copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	}
	return b
}

// padded is the content of an entry in whole tar blocks.
func padded(s string) []byte {
	return append([]byte(s), make([]byte, (512-len(s)%512)%512)...)
}

// paxRecords is the content of a pax header.
func paxRecords(kv ...string) string {
	var b strings.Builder
	for i := 0; i < len(kv); i += 2 {
		rest := " " + kv[i] + "=" + kv[i+1] + "\n"
		n := len(rest)
		for n != len(rest)+len(fmt.Sprint(n)) {
			n = len(rest) + len(fmt.Sprint(n))
		}
		fmt.Fprint(&b, n, rest)
	}
	return b.String()
}

// tarball is the tar of a layer.
func tarball(t testing.TB, lines ...line) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, l := range lines {
		if l.raw != nil {
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			b.Write(l.raw)
			continue
		}
		if l.Size == 0 {
			l.Size = int64(len(l.body))
		}
		if err := w.WriteHeader(&l.Header); err != nil {
			t.Fatalf("%q: %v", l.Name, err)
		}
		if _, err := io.WriteString(w, l.body); err != nil {
			t.Fatalf("%q: %v", l.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// gnuTar is the tar that GNU tar makes of what setup has put in a directory.
func gnuTar(t testing.TB, setup func(dir string), args ...string) []byte {
	t.Helper()
	need(t, "tar")
	dir := t.TempDir()
	setup(dir)
	out, err := exec.Command("tar", append([]string{"-C", dir, "-cf", "-"}, args...)...).Output()
	if err != nil {
		t.Fatalf("tar: %v", err)
	}
	return out
}

// need skips the test where a program is missing or we are not root.
func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if p == "root" {
			if os.Getuid() != 0 {
				t.Skip("this needs root")
			}
		} else if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed", p)
		}
	}
}

func run(t testing.TB, name string, args ...string) []byte {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%.4000s", name, err, out)
	}
	return out
}

// Ways to store a layer.

func plain(_ testing.TB, b []byte) []byte { return b }

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zstdded(t testing.TB, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(b, nil)
}

// inParts stores the first and the second half of a layer each for itself.
func inParts(store func(testing.TB, []byte) []byte) func(testing.TB, []byte) []byte {
	return func(t testing.TB, b []byte) []byte {
		t.Helper()
		return append(store(t, b[:len(b)/2]), store(t, b[len(b)/2:])...)
	}
}

// testSource is an image whose layers can be counted as they are opened.
type testSource struct {
	Source
	tars   [][]byte
	opened atomic.Int32
}

// newSource is the image of these tars, each stored by store.
func newSource(t testing.TB, store func(testing.TB, []byte) []byte, tars ...[]byte) *testSource {
	t.Helper()
	s := &testSource{tars: tars}
	config := v1.ConfigFile{Architecture: "amd64", OS: "linux", Created: v1.Time{Time: someTime}}
	config.RootFS.Type = "layers"
	manifest := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1}
	for _, plain := range tars {
		sum := sha256.Sum256(plain)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, hashOf(sum))
		stored := store(t, plain)
		d := describe(types.OCILayer, stored)
		manifest.Layers = append(manifest.Layers, d)
		s.Layers = append(s.Layers, Layer{Descriptor: d, Open: func(context.Context) (io.ReadCloser, error) {
			s.opened.Add(1)
			return io.NopCloser(bytes.NewReader(stored)), nil
		}})
	}
	var err error
	if s.Config, err = json.Marshal(config); err != nil {
		t.Fatal(err)
	}
	manifest.Config = describe(types.OCIConfigJSON, s.Config)
	b, err := json.Marshal(manifest)
	if err != nil {
		t.Fatal(err)
	}
	s.Manifest = describe(types.OCIManifestSchema1, b)
	return s
}

// inTurn has the look-up of each layer wait until all layers below it are in dst, or for
// a long time. Without it a build works on them at the same time.
func (s *testSource) inTurn(dst *dirTarget) {
	var c v1.ConfigFile
	if err := json.Unmarshal(s.Config, &c); err != nil {
		panic(err)
	}
	dst.tagged = func(tag string) error {
		i := slices.IndexFunc(c.RootFS.DiffIDs, func(id v1.Hash) bool { return strings.HasSuffix(tag, id.Hex) })
		for end := time.Now().Add(time.Minute); dst.manifests(ArtifactTypeLayer) < i && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		return nil
	}
}

// layout writes an OCI layout of the image, its layers gzipped, under the tag
// "image".
func (s *testSource) layout(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	put := func(media types.MediaType, b []byte) v1.Descriptor {
		d := describe(media, b)
		writeFile(t, filepath.Join(dir, "blobs", "sha256", d.Digest.Hex), b)
		return d
	}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1}
	for _, b := range s.tars {
		m.Layers = append(m.Layers, put(types.OCILayer, gzipped(t, b)))
	}
	m.Config = put(types.OCIConfigJSON, s.Config)
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	d := put(types.OCIManifestSchema1, b)
	d.Annotations = map[string]string{"org.opencontainers.image.ref.name": "image"}
	if b, err = json.Marshal(v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{d}}); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "index.json"), b)
	writeFile(t, filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`))
	return dir
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// pipe is what a program makes of b.
func pipe(t testing.TB, b []byte, name string, args ...string) []byte {
	t.Helper()
	need(t, name)
	cmd := exec.Command(name, args...)
	cmd.Stdin = bytes.NewReader(b)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return out
}
