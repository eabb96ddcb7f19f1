package registry

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

type entry struct {
	name string
	body []byte
	link string
}

func writeTar(t *testing.T, entries ...entry) string {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.body))}
		if e.link != "" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(path, buf.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func savedConfig(t *testing.T, layers ...[]byte) []byte {
	t.Helper()
	var ids []string
	for _, l := range layers {
		ids = append(ids, hashOf(l).String())
	}
	b, err := json.Marshal(map[string]any{"os": "linux", "architecture": "amd64", "rootfs": map[string]any{"type": "layers", "diff_ids": ids}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The formats of docker save before and after version 25: a directory for each layer,
// with links for repeated layers, and blobs by digest.
func TestArchive(t *testing.T) {
	ctx := context.Background()
	one, two := noise(100_000, 1), noise(5000, 2)
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	z.Write(two)
	z.Close()
	file := writeTar(t,
		entry{name: "aaaa/layer.tar", body: one},
		entry{name: "bbbb/layer.tar", body: zipped.Bytes()},
		entry{name: "cccc/layer.tar", link: "../aaaa/layer.tar"},
		entry{name: "config.json", body: savedConfig(t, one, two, one)},
		entry{name: "blobs/sha256/" + hashOf(two).Hex, body: two},
		entry{name: "blobs/sha256/c2", body: savedConfig(t, two)},
		entry{name: "manifest.json", body: []byte(`[
			{"Config":"config.json","RepoTags":["app:v1","registry.example/app:v1"],"Layers":["aaaa/layer.tar","bbbb/layer.tar","cccc/layer.tar"]},
			{"Config":"blobs/sha256/c2","RepoTags":null,"Layers":["blobs/sha256/` + hashOf(two).Hex + `"]},
			{"Config":"blobs/sha256/c2","RepoTags":["bad:v1"],"Layers":[]}]`)})
	c := newClient(t, Options{})
	var first v1.Hash
	for _, name := range []string{"app:v1", "docker.io/library/app:v1", "registry.example/app:v1"} {
		r := openRepo(t, c, "docker-archive:"+file+":"+name)
		img, err := r.Resolve(ctx, &amd64)
		if err != nil {
			t.Fatal(err)
		}
		if first == (v1.Hash{}) {
			first = img.Digest
		}
		if img.Digest != first || len(img.Manifest.Layers) != 3 {
			t.Errorf("%s: %s, want %s", name, img.Digest, first)
		}
		for i, want := range [][]byte{one, zipped.Bytes(), one} {
			l := img.Manifest.Layers[i]
			b, err := r.Blob(ctx, l)
			if err != nil || !bytes.Equal(b, want) || l.Digest != hashOf(want) {
				t.Errorf("layer %d: %d bytes, %v", i, len(b), err)
			}
			if b, err := readRange(ctx, r, l.Digest, 100, 200); err != nil || !bytes.Equal(b, want[100:300]) {
				t.Errorf("layer %d: range of %d bytes, %v", i, len(b), err)
			}
			if (l.MediaType == types.OCILayer) != (i == 1) {
				t.Errorf("layer %d is a %s", i, l.MediaType)
			}
		}
		if b, err := r.Blob(ctx, img.Manifest.Config); err != nil || hashOf(b) != img.Manifest.Config.Digest {
			t.Error(err)
		}
		if _, err := r.Manifest(ctx, img.Descriptor); err != nil {
			t.Error(err)
		}
		if has, err := r.HasBlob(ctx, img.Manifest.Layers[0]); err != nil || !has {
			t.Error(has, err)
		}
		if _, err := readRange(ctx, r, img.Manifest.Layers[0].Digest, 99_999, 2); err == nil {
			t.Error("read beyond the end of a layer")
		}
		if _, err := r.PushBytes(ctx, nil, "x/y"); !errors.Is(err, errReadOnly) {
			t.Error(err)
		}
		if err := r.CheckPush(ctx); !errors.Is(err, errReadOnly) {
			t.Error(err)
		}
	}
	for ref, want := range map[string]string{
		file:             "has 3 images, choose a name: app:v1, registry.example/app:v1",
		file + ":none":   "no image is named none, there are: app:v1",
		file + ":bad:v1": "the image has 0 layers and its config says 1",
		file + "x":       "not found",
		os.Args[0]:       "not a tar archive",
		writeTar(t):      "no manifest.json",
		writeTar(t, entry{name: "manifest.json", body: []byte("[]")}): "no image",
		writeTar(t, entry{name: "manifest.json", body: []byte("{")}):  "parse manifest.json",
		writeTar(t, entry{name: "manifest.json", link: "x"},
			entry{name: "x", link: "manifest.json"}): "lead nowhere",
		writeTar(t, entry{name: "manifest.json", body: []byte(`[{"Config":"c","Layers":[]}]`)}): `has no member "c"`,
		filepath.Dir(file):          "is not a regular file",
		tempFile(t, zipped.Bytes()): "not a tar archive",
	} {
		if _, err := openRepo(t, c, "docker-archive:"+ref).Resolve(ctx, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", ref, err, want)
		}
	}
}

// The reader of a layer reports that its diff ID is wrong.
func TestArchiveAltered(t *testing.T) {
	ctx := context.Background()
	layer := noise(1000, 1)
	file := writeTar(t, entry{name: "l.tar", body: noise(1000, 2)}, entry{name: "c.json", body: savedConfig(t, layer)},
		entry{name: "manifest.json", body: []byte(`[{"Config":"c.json","Layers":["l.tar"]}]`)})
	r := openRepo(t, newClient(t, Options{}), "docker-archive:"+file)
	img, err := r.Resolve(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Blob(ctx, img.Manifest.Layers[0]); !errors.Is(err, ErrDigest) {
		t.Errorf("%v", err)
	}
}

// skopeo writes the format too.
func TestArchiveSkopeo(t *testing.T) {
	ctx := context.Background()
	c := newClient(t, Options{})
	src := openRepo(t, c, "oci:"+t.TempDir()+"/l:v1")
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	w.WriteHeader(&tar.Header{Name: "hello", Mode: 0o644, Size: 5})
	w.Write([]byte("hello"))
	w.Close()
	pushImage(t, ctx, src, "v1", layer.Bytes(), amd64)
	file := t.TempDir() + "/a.tar"
	skopeo(t, "copy", "oci:"+src.Ref().Layout+":v1", "docker-archive:"+file+":registry.example/app:v1")
	for _, name := range []string{"", ":registry.example/app:v1"} {
		r := openRepo(t, c, "docker-archive:"+file+name)
		img, err := r.Resolve(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := r.Blob(ctx, img.Manifest.Layers[0]); err != nil || !bytes.Equal(b, layer.Bytes()) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
	}
}
