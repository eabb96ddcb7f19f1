package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"thaw/fetcher/registry"
	"thaw/scripts/rootinit/bootconfig"
)

// app is an image of three random layers.
func app(t *testing.T, config v1.Config) v1.Image {
	t.Helper()
	img, err := random.Image(1<<16, 3)
	if err == nil {
		img, err = mutate.ConfigFile(img, func() *v1.ConfigFile {
			c, err := img.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			c = c.DeepCopy()
			c.Architecture, c.OS, c.Config = "amd64", "linux", config
			return c
		}())
	}
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// make runs the command line, and returns the image that it has made.
func makeImage(t *testing.T, args ...string) registry.Ref {
	t.Helper()
	o, err := parse(append([]string{"--module", "../.."}, args...))
	if err != nil {
		t.Fatal(err)
	}
	made, err := run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// A requestLog counts what a registry is asked for.
type requestLog struct {
	mu   sync.Mutex
	gets []string
}

func (l *requestLog) serve(t *testing.T) (host string) {
	h := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			l.mu.Lock()
			l.gets = append(l.gets, r.URL.Path)
			l.mu.Unlock()
		}
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

var someConfig = v1.Config{Entrypoint: []string{"/app/run"}, Cmd: []string{"--port", "80"}, Env: []string{"A=b c"}, User: "www",
	WorkingDir: "/srv", StopSignal: "SIGQUIT", Labels: map[string]string{"kept": "yes"}}

// check compares an image with the one that it was made of.
func check(t *testing.T, old, made v1.Image) {
	t.Helper()
	if err := validate.Image(made); err != nil {
		t.Error(err)
	}
	was, err := old.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	is, err := made.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(is.Layers) != 4 || !reflect.DeepEqual(is.Layers[:3], was.Layers) {
		t.Errorf("layers %v, want %v and one more", is.Layers, was.Layers)
	}
	before, err := old.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	after, err := made.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(before.Config, after.Config) || !slices.Equal(after.RootFS.DiffIDs[:3], before.RootFS.DiffIDs) || len(after.History) != len(before.History)+1 {
		t.Errorf("config %+v, was %+v", after, before)
	}
}

func TestRegistry(t *testing.T) {
	for _, kind := range []types.MediaType{types.OCIManifestSchema1, types.DockerManifestSchema2} {
		var requests requestLog
		host := requests.serve(t)
		img := mutate.MediaType(app(t, someConfig), kind)
		if kind == types.OCIManifestSchema1 {
			img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
		}
		tag, err := name.NewTag(host + "/team/app:v1")
		if err == nil {
			err = remote.Write(tag, img)
		}
		if err != nil {
			t.Fatal(err)
		}
		requests.gets = nil
		made := makeImage(t, host+"/team/app:v1", host+"/team/app:vm")
		if !strings.HasPrefix(made.String(), host+"/team/app:vm@sha256:") {
			t.Errorf("made %s", made)
		}
		layers, err := img.Layers()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range layers {
			d, _ := l.Digest()
			for _, path := range requests.gets {
				if strings.Contains(path, d.String()) {
					t.Errorf("%s: a layer of the image was fetched", kind)
				}
			}
		}
		digest, err := name.NewDigest(host + "/team/app@" + made.Digest.String())
		if err != nil {
			t.Fatal(err)
		}
		got, err := remote.Image(digest)
		if err != nil {
			t.Fatal(err)
		}
		check(t, img, got)
		m, err := got.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		want := types.OCILayer
		if kind == types.DockerManifestSchema2 {
			want = types.DockerLayer
		}
		if m.MediaType != kind || m.Layers[3].MediaType != want {
			t.Errorf("manifest %s, layer %s", m.MediaType, m.Layers[3].MediaType)
		}
		old, _ := img.Digest()
		if kind == types.OCIManifestSchema1 && (m.Annotations["org.opencontainers.image.base.digest"] != old.String() ||
			m.Annotations["org.opencontainers.image.base.name"] != host+"/team/app:v1") {
			t.Errorf("annotations %v", m.Annotations)
		}
		// Another run makes the same image.
		if again := makeImage(t, host+"/team/app:v1", host+"/team/app:vm2"); again.Digest != made.Digest {
			t.Errorf("made %s, then %s", made.Digest, again.Digest)
		}
	}
}

// Blobs go from a layout to another one, and to a registry.
func TestLayout(t *testing.T) {
	dir := t.TempDir()
	img := app(t, someConfig)
	from, err := layout.Write(filepath.Join(dir, "a"), empty.Index)
	if err == nil {
		err = from.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "v1"}))
	}
	if err != nil {
		t.Fatal(err)
	}
	made := makeImage(t, "oci:"+dir+"/a:v1", "oci:"+dir+"/b:vm", "--hostname", "box")
	to, err := layout.FromPath(filepath.Join(dir, "b"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := to.Image(made.Digest)
	if err != nil {
		t.Fatal(err)
	}
	check(t, img, got)
	files := entries(t, got)
	var boot bootconfig.Config
	if err := json.Unmarshal([]byte(files[bootconfig.File].content), &boot); err != nil {
		t.Fatal(err)
	}
	want := bootconfig.Config{Args: []string{"/app/run", "--port", "80"}, Env: []string{"A=b c"}, User: "www", Dir: "/srv", Stop: "SIGQUIT", Hostname: "box"}
	if !reflect.DeepEqual(boot, want) {
		t.Errorf("%+v, want %+v", boot, want)
	}

	var requests requestLog
	host := requests.serve(t)
	makeImage(t, "oci:"+dir+"/a:v1", host+"/app:vm")
	ref, err := name.NewTag(host + "/app:vm")
	if err != nil {
		t.Fatal(err)
	}
	pushed, err := remote.Image(ref)
	if err != nil {
		t.Fatal(err)
	}
	check(t, img, pushed)
}

type file struct {
	tar.Header
	content string
}

// entries are the files of the topmost layer.
func entries(t *testing.T, img v1.Image) map[string]file {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	r, err := layers[len(layers)-1].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	return readTar(t, r)
}

func readTar(t *testing.T, r io.Reader) map[string]file {
	t.Helper()
	all := make(map[string]file)
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		all[h.Name] = file{*h, string(b)}
	}
}

func TestContents(t *testing.T) {
	dir := t.TempDir()
	init := filepath.Join(dir, "init")
	if err := compile(t.Context(), "../..", "arm64", "", init); err != nil {
		t.Fatal(err)
	}
	program, err := static(init)
	if err != nil {
		t.Fatal(err) // it is static itself
	}
	c := contents{init: init, busybox: init}
	l, err := c.write(filepath.Join(dir, "layer"))
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(l.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := readTar(t, z)
	var got []string
	for name, h := range files {
		got = append(got, fmt.Sprintf("%s %c %o %s", name, h.Typeflag, h.Mode, h.Linkname))
		if h.Uid != 0 || h.Gid != 0 || h.ModTime.Unix() != 0 {
			t.Errorf("%s: owner %d:%d, time %v", name, h.Uid, h.Gid, h.ModTime)
		}
	}
	slices.Sort(got)
	want := []string{"bin/busybox 0 755 ", "dev/ 5 755 ", "etc/hosts 0 644 ", "etc/resolv.conf 0 644 ", "etc/thaw-init.json 0 644 ", "proc/ 5 555 ", "run/ 5 755 ",
		"sbin/halt 2 777 init", "sbin/init 0 755 ", "sbin/poweroff 2 777 init", "sbin/reboot 2 777 init", "sys/ 5 555 ", "tmp/ 5 1777 "}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if files["sbin/init"].content != string(program) || !strings.Contains(files["etc/hosts"].content, "127.0.0.1\tlocalhost\n") {
		t.Error("other contents")
	}
}

func TestBusyboxMustBeStatic(t *testing.T) {
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := static(sh); err == nil || !strings.Contains(err.Error(), "linked to libraries") {
		t.Errorf("%s: %v", sh, err)
	}
	if _, err := static("main_test.go"); err == nil || !strings.Contains(err.Error(), "no program") {
		t.Errorf("a text: %v", err)
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	add := func(tag string, img v1.Image) {
		if err := path.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": tag})); err != nil {
			t.Fatal(err)
		}
	}
	add("init", app(t, v1.Config{Cmd: []string{"/sbin/init"}}))
	add("artifact", mutate.ConfigMediaType(app(t, v1.Config{}), "application/vnd.example"))
	windows, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "windows", Architecture: "amd64"})
	if err != nil {
		t.Fatal(err)
	}
	add("windows", windows)
	strange, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: "no-such-processor"})
	if err != nil {
		t.Fatal(err)
	}
	add("strange", strange)
	for tag, want := range map[string]string{"init": errOwnInit.Error(), "artifact": "it is no container image", "windows": "it is an image for windows",
		"strange": "no-such-processor", "missing": "no image is tagged missing"} {
		o, err := parse([]string{"--module", "../..", "oci:" + dir + ":" + tag, "oci:" + dir + ":vm"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := run(t.Context(), o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", tag, err, want)
		}
	}
	for _, args := range [][]string{{}, {"oci:a:b"}, {"oci:a:b", "oci:c"}, {"oci:a:b", "oci-archive:c:d"}, {"oci:a:b", "oci:a:b"}, {"a", "oci:b:c", "d"},
		{"--platform", "windows/amd64", "oci:a:b", "oci:a:c"}, {"--nonsense", "oci:a:b", "oci:a:c"}, {"oci:a:b", "x@sha256:" + strings.Repeat("0", 64)}} {
		if _, err := parse(args); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
}

// What the program does not know stays.
func TestOtherFields(t *testing.T) {
	diff := v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("a", 64)}
	raw, err := addToConfig([]byte(`{"os":"linux","future":{"x":1},"rootfs":{"type":"layers","diff_ids":[],"more":2}}`), diff)
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"future":{"x":1},"os":"linux","rootfs":{"diff_ids":["` + diff.String() + `"],"more":2,"type":"layers"}}`; string(raw) != want {
		t.Errorf("%s, want %s", raw, want)
	}
	for _, bad := range []string{"", "[]", "{}", `{"rootfs":{"diff_ids":5}}`, `{"rootfs":{"diff_ids":[]},"history":7}`} {
		if _, err := addToConfig([]byte(bad), diff); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	old := &registry.Image{Descriptor: v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: diff},
		Raw: []byte(`{"schemaVersion":2,"subject":{},"future":true,"annotations":{"a":"b","org.opencontainers.image.base.name":"old"}}`)}
	if err := json.Unmarshal(old.Raw, &old.Manifest); err != nil {
		t.Fatal(err)
	}
	raw, err = addToManifest(old, v1.Descriptor{}, v1.Descriptor{}, registry.Ref{Layout: "x"})
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	if m["future"] != true || m["subject"] != nil || !reflect.DeepEqual(m["annotations"], map[string]any{"a": "b", "org.opencontainers.image.base.digest": diff.String()}) {
		t.Errorf("%s", raw)
	}
}

// A copy ends with the command.
func TestCancelled(t *testing.T) {
	dir := t.TempDir()
	path, err := layout.Write(filepath.Join(dir, "a"), empty.Index)
	if err == nil {
		err = path.AppendImage(app(t, v1.Config{}))
	}
	if err != nil {
		t.Fatal(err)
	}
	o, err := parse([]string{"--module", "../..", "oci:" + dir + "/a", "oci:" + dir + "/b:vm"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := run(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
