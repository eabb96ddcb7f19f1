package main

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// saveArchive writes what `docker save` would.
func saveArchive(t testing.TB, path string, img v1.Image) {
	t.Helper()
	tag, err := name.NewTag("registry.example/app:v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(path, tag, img); err != nil {
		t.Fatal(err)
	}
}

// A layer that the target has is neither read nor sent; the same input gives
// the same bytes wherever it comes from and goes to.
func TestReuseAndDeterminism(t *testing.T) {
	t.Parallel()
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	base, one, two := layerOf(t, files(1, "base", 100)...), layerOf(t, files(2, "app", 20)...), layerOf(t, files(3, "app", 20)...)
	v1ref, v2ref := p.host()+"/team/app:v1", p.host()+"/team/app:v2"
	push(t, v1ref, imageOf(t, base, one))
	push(t, v2ref, imageOf(t, base, two))
	var first, second, archived, rebuilt built
	decode := func(out string, b *built) {
		t.Helper()
		if err := json.Unmarshal([]byte(out), b); err != nil {
			t.Fatal(err)
		}
	}
	decode(must(t, "build", "--json", v1ref), &first)
	baseBlob, err := base.Digest()
	if err != nil {
		t.Fatal(err)
	}
	p.take()
	decode(must(t, "build", "--json", v2ref), &second)
	if !second.Layers[0].Reused || second.Layers[1].Reused {
		t.Errorf("%+v", second.Layers)
	}
	for _, r := range p.take() {
		if strings.HasPrefix(r, "GET") && strings.Contains(r, baseBlob.Hex) {
			t.Errorf("the base layer was read: %s", r)
		}
	}
	decode(must(t, "build", "--json", v1ref), &rebuilt)
	uploads := 0
	for _, r := range p.take() {
		if strings.HasPrefix(r, "PATCH") || strings.HasPrefix(r, "PUT") && strings.Contains(r, "/blobs/") {
			uploads++
		}
	}
	if uploads != 0 {
		t.Errorf("building again sent %d blobs", uploads)
	}
	dir := t.TempDir()
	saveArchive(t, filepath.Join(dir, "a.tar"), imageOf(t, base, one))
	decode(must(t, "build", "--json", "--jobs", "1", "docker-archive:"+filepath.Join(dir, "a.tar"), "oci:"+dir+"/o:x"), &archived)
	if first.Digest != rebuilt.Digest {
		t.Errorf("built twice: %s and %s", first.Digest, rebuilt.Digest)
	}
	// The manifest names the source's, which an archive has another form of.
	// All but that is the same.
	one1, one2 := inspectJSON(t, v1ref), inspectJSON(t, "oci:"+dir+"/o:x")
	for i := range one1.Streams {
		if one1.Streams[i].Blob != one2.Streams[i].Blob {
			t.Errorf("stream %d is %s from a registry and %s from an archive", i, one1.Streams[i].Blob, one2.Streams[i].Blob)
		}
	}
	if in := inspectJSON(t, v2ref); in.Streams[1].Blob != one1.Streams[1].Blob {
		t.Error("the images do not share the stream of their base layer")
	}
}

func inspectJSON(t testing.TB, ref string) (in inspected) {
	t.Helper()
	if err := json.Unmarshal([]byte(must(t, "inspect", "--json", ref)), &in); err != nil {
		t.Fatal(err)
	}
	return in
}

// The index is small. The program that builds the image is one without the race detector,
// which would take a minute: this is about sizes.
func TestIndexIsSmall(t *testing.T) {
	images := os.Getenv("THAW_IMAGES")
	if images == "" {
		t.Skip("THAW_IMAGES does not name a directory with images by scripts/workloads")
	}
	need(t, "go")
	program := filepath.Join(t.TempDir(), "thaw")
	tool(t, "go", "build", "-race=false", "-o", program, ".")
	dst := "oci:" + filepath.Join(t.TempDir(), "o") + ":x"
	tool(t, program, "build", "oci:"+filepath.Join(images, "flask")+":latest", dst)
	tool(t, program, "verify", dst)
	if in := inspectJSON(t, dst); float64(in.IndexBytes) > 0.002*float64(in.Stored) {
		t.Errorf("an index of %d bytes for an image of %d", in.IndexBytes, in.Stored)
	}
}

// What is wrong is said in a sentence that tells what to do, and the exit code
// tells a wrong command line from a failure.
func TestSentences(t *testing.T) {
	t.Parallel()
	reg := startRegistry(t, "", t.TempDir(), "")
	plain := reg.addr + "/team/plain:v1"
	push(t, plain, imageOf(t, layerOf(t, files(1, "a", 3)...)))
	built := reg.addr + "/team/built:v1"
	push(t, built, imageOf(t, layerOf(t, files(1, "a", 3)...)))
	must(t, "build", built)
	dir := t.TempDir()
	locked := filepath.Join(dir, "locked")
	sock := socket(t)
	serving(t, built, "--listen", "unix:"+sock, "--cache", locked)
	other := filepath.Join(dir, "hosts")
	if err := os.WriteFile(other, []byte("registry.example\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	procs := runtime.GOMAXPROCS(0)
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"serve", plain, "--cache", dir + "/c"}, 1, "make one with: thaw build " + plain},
		{[]string{"inspect", plain}, 1, "make one with: thaw build " + plain},
		{[]string{"build", reg.addr + "/team/none:v1"}, 1, "not found"},
		{[]string{"serve", reg.addr + "/team/none:v1", "--cache", dir + "/c"}, 1, "not found"},
		{[]string{"inspect", "oci:" + dir + "/nowhere:x"}, 1, "not found"},
		{[]string{"build", "127.0.0.1:1/team/app:v1"}, 1, "not available"},
		{[]string{"build", "docker-archive:" + dir + "/none.tar", "oci:" + dir + "/o:x"}, 1, "none.tar"},
		{[]string{"build", "docker-archive:" + other, "oci:" + dir + "/o:x"}, 1, "hosts"},
		{[]string{"serve", built, "--cache", locked, "--listen", "unix:" + dir + "/s"}, 1, "in use by another process; give this server a --cache of its own"},
		{[]string{"serve", built, "--cache", dir + "/c", "--listen", "unix:" + sock}, 1, "in use by another program"},
		{[]string{"serve", built, "--cache", dir + "/c", "--listen", "tcp:0.0.0.0:0"}, 2, "--allow-plaintext"},
		{[]string{"serve", built, "--cache", dir + "/c", "--listen", "udp:1"}, 1, "want unix:PATH or tcp:HOST:PORT"},
		{[]string{"serve", built, "--cache", "/proc/none"}, 1, "/proc/none"},
		{[]string{"serve", built, "--overlay", dir + "/o1", "--ephemeral"}, 2, "exclude each other"},
		{[]string{"serve", built, "--overlay-size", "1G"}, 2, "--overlay-size limits an overlay: add --overlay DIR"},
		{[]string{"serve", built, built, "--overlay", dir + "/o1"}, 2, "serve one IMAGE without --allow, or pass --overlay-each DIR"},
		{[]string{"serve", built, "--allow", "**", "--overlay", dir + "/o1"}, 2, "serve one IMAGE without --allow, or pass --overlay-each DIR"},
		{[]string{"serve", built, "--cache", dir + "/c", "--overlay-each", "/proc/none"}, 1, "/proc/none"},
		{[]string{"serve"}, 2, "name an image to serve"},
		{[]string{"build"}, 2, "build takes SRC [DST]; the number of arguments given is 0"},
		{[]string{"trace", "push", "x"}, 2, "trace push takes IMAGE FILE; the number of arguments given is 1"},
		{[]string{"trace", "stop", "x"}, 2, "trace stop takes no arguments"},
		{[]string{"build", plain, "oci-archive:" + dir + "/o:x"}, 2, "archives cannot be written: give a registry reference"},
		{[]string{"build", plain, reg.addr + "/team/x@sha256:" + strings.Repeat("0", 64)}, 2, "give a tag"},
		{[]string{"build", plain, "oci:" + dir + "/o"}, 2, "needs a tag"},
		{[]string{"build", "docker-archive:x.tar"}, 2, "archives cannot be written: give a DST"},
		{[]string{"build", plain, "--chunk-size", "100K"}, 2, "power of two"},
		{[]string{"build", plain, "--size", "many"}, 2, "a size is a number"},
		{[]string{"build", plain, "--level", "99"}, 2, "1 to 22"},
		{[]string{"build", plain, "--platform", "linux"}, 2, "OS/ARCH"},
		{[]string{"build", "Not A Name"}, 2, "Not A Name"},
		{[]string{"inspect", plain, "--log-format", "xml"}, 2, "text or json"},
		{[]string{"inspect", plain, "--hosts", other}, 1, "line 1"},
		{[]string{"melt"}, 2, "melt"},
		{[]string{"inspect", plain, "--nothing"}, 2, "--nothing"},
	} {
		_, stderr, code := thaw(t, c.args...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("thaw %s: exit %d, want %d and %q:\n%s", strings.Join(c.args, " "), code, c.code, c.want, stderr)
		}
		if strings.Contains(stderr, "goroutine") || strings.Contains(stderr, "0x") {
			t.Errorf("thaw %s: not a sentence:\n%s", strings.Join(c.args, " "), stderr)
		}
	}
	if now := runtime.GOMAXPROCS(0); now != procs {
		t.Errorf("GOMAXPROCS was %d and is %d", procs, now)
	}
}

// A build that fails leaves no manifest; the next one takes what is complete.
func TestBuildFails(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, imageOf(t, layerOf(t, files(1, "base", 50)...), layerOf(t, files(2, "app", 10)...)))
	refuse := func(status int, match func(r *http.Request) bool) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if match(r) {
				http.Error(w, "no", status)
				return false
			}
			return true
		}
	}
	// In this order: each gets further than the one before.
	for _, c := range []struct {
		what   string
		before func(http.ResponseWriter, *http.Request) bool
	}{
		{"reading layers", refuse(http.StatusGone, func(r *http.Request) bool {
			return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
		})},
		{"pushing blobs", refuse(http.StatusForbidden, func(r *http.Request) bool {
			return r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/blobs/")
		})},
		{"pushing the manifest", refuse(http.StatusForbidden, func(r *http.Request) bool {
			return r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/sha256")
		})},
	} {
		p.set(c.before)
		if _, stderr, code := thaw(t, "build", ref); code != exitError || !strings.Contains(stderr, "app") {
			t.Errorf("%s fails: exit %d\n%s", c.what, code, stderr)
		}
		p.set(nil)
		if _, stderr, _ := thaw(t, "inspect", ref); !strings.Contains(stderr, "make one with") {
			t.Errorf("after %s failed there is a block image:\n%s", c.what, stderr)
		}
	}
	must(t, "build", ref)
	must(t, "verify", ref)
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if out := must(t, "completion", shell); !strings.Contains(out, "thaw") {
			t.Errorf("%s: %q", shell, out)
		}
	}
}

// Every verb has a help with an example in it.
func TestHelp(t *testing.T) {
	for _, verb := range []string{"build", "serve", "inspect", "verify"} {
		if out := must(t, verb, "--help"); !strings.Contains(out, "Examples:\n  thaw "+verb) {
			t.Errorf("%s:\n%s", verb, out)
		}
	}
	if out := must(t, "--help"); !strings.Contains(out, "Exit codes") {
		t.Error(out)
	}
}
