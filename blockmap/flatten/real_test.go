package flatten

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// realImage is one of the images that scripts/workloads makes.
func realImage(t testing.TB, name string) (src *Source, dir string) {
	t.Helper()
	images := os.Getenv("THAW_IMAGES")
	if images == "" {
		t.Skip("THAW_IMAGES does not name the directory of images that scripts/workloads makes")
	}
	dir = filepath.Join(images, name)
	if _, err := os.Stat(filepath.Join(dir, "index.json")); err != nil {
		t.Skipf("the image %s is not there: %v", name, err)
	}
	src = new(Source)
	var index v1.IndexManifest
	readJSON(t, filepath.Join(dir, "index.json"), &index)
	src.Manifest = index.Manifests[0]
	blob := func(d v1.Descriptor) string { return filepath.Join(dir, "blobs", "sha256", d.Digest.Hex) }
	var m v1.Manifest
	readJSON(t, blob(src.Manifest), &m)
	var err error
	if src.Config, err = os.ReadFile(blob(m.Config)); err != nil {
		t.Fatal(err)
	}
	for _, d := range m.Layers {
		src.Layers = append(src.Layers, Layer{Descriptor: d, Open: func(context.Context) (io.ReadCloser, error) {
			return os.Open(blob(d))
		}})
	}
	return src, dir
}

func readJSON(t testing.TB, path string, v any) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

// TestRealImage compares Debian with flask, in three layers, with what umoci
// makes of it.
func TestRealImage(t *testing.T) {
	need(t, "root", "umoci", "e2fsck", "mount")
	src, dir := realImage(t, "flask")
	if !alone(t) {
		return
	}
	dst := newTarget(t)
	o := testOptions
	o.Size = 1 << 30
	res := build(t, &testSource{Source: *src}, dst, o)
	device := assemble(t, res.Index, dst)
	fsck(t, device)
	checkFlaskGuess(t, res, dst, device)
	got := listing(t, mount(t, device))
	delete(got, "lost+found")
	bundle := filepath.Join(t.TempDir(), "bundle")
	run(t, "umoci", "unpack", "--image", dir+":latest", bundle)
	want := listing(t, filepath.Join(bundle, "rootfs"))
	if len(want) < 1000 {
		t.Fatalf("umoci has unpacked %d files", len(want))
	}
	compareTrees(t, "umoci", want, got, nil, nil)
	t.Logf("%d files", len(got))

	var content, stored int64
	for _, l := range res.Layers {
		content, stored = content+l.Content, stored+l.Stored
	}
	if res.IndexBytes*500 > content {
		t.Errorf("an index of %d bytes for %d bytes of content: more than 0.2 %%", res.IndexBytes, content)
	}
	t.Logf("content %d, stored %d, index %d bytes", content, stored, res.IndexBytes)
}
