package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/blockmap"
	"thaw/blockmap/flatten"
	"thaw/fetcher/registry"
)

// buildOf builds, and says what came of it.
func buildOf(t testing.TB, args ...string) (b built) {
	t.Helper()
	if err := json.Unmarshal([]byte(must(t, append([]string{"build", "--json", "--size", "64M"}, args...)...)), &b); err != nil {
		t.Fatal(err)
	}
	return b
}

// withDigest is a reference in the same repository.
func withDigest(ref, digest string) string {
	return ref[:strings.LastIndexByte(ref, ':')] + "@" + digest
}

// putManifest puts a manifest into a registry as it is.
func putManifest(t testing.TB, ref, key string, mediaType types.MediaType, raw []byte) v1.Descriptor {
	t.Helper()
	host, rest, _ := strings.Cut(ref, "/")
	repository := rest[:strings.LastIndexByte(rest, ':')]
	d := v1.Descriptor{MediaType: mediaType, Digest: sha256Of(t, raw), Size: int64(len(raw))}
	if key == "" {
		key = d.Digest.String()
	}
	req, err := http.NewRequestWithContext(t.Context(), "PUT", "http://"+host+"/v2/"+repository+"/manifests/"+key, bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", string(mediaType))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatalf("PUT %s: %s", key, resp.Status)
	}
	return d
}

func sha256Of(t testing.TB, b []byte) v1.Hash {
	t.Helper()
	h, _, err := v1.SHA256(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// list has the registry behind the proxy say that all are referrers of subject.
func (p *proxy) list(t testing.TB, subject v1.Hash, all ...v1.Descriptor) {
	t.Helper()
	if all == nil {
		all = []v1.Descriptor{}
	}
	raw, err := json.Marshal(v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: all})
	if err != nil {
		t.Fatal(err)
	}
	p.set(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/manifests/sha256-"+subject.Hex) { // what lists them without the API
			http.NotFound(w, r)
			return false
		}
		if !strings.HasSuffix(r.URL.Path, "/referrers/"+subject.String()) {
			return true
		}
		w.Header().Set("Content-Type", string(types.OCIImageIndex))
		w.Write(raw)
		return false
	})
}

// manifestOf is the manifest of the block image that a name leads to.
func manifestOf(t testing.TB, ref string) (m v1.Manifest, d v1.Descriptor) {
	t.Helper()
	b, err := finderOf(t).Find(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b.Raw, &m); err != nil {
		t.Fatal(err)
	}
	return m, v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: b.Digest, Size: int64(len(b.Raw)), ArtifactType: flatten.ArtifactTypeImage}
}

// A block image is taken beside a source image only if it is one of that very
// image: what else says so is passed over, wherever it stands, and by whatever it
// is found.
func TestBlockImageOfAnother(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref, evil := p.host()+"/team/app:v1", p.host()+"/team/app:evil"
	push(t, ref, imageOf(t, layerOf(t, files(1, "good", 5)...)))
	push(t, evil, imageOf(t, layerOf(t, files(2, "evil", 5)...)))
	good := buildOf(t, ref)
	bad := buildOf(t, evil)
	mine, mineD := manifestOf(t, ref)
	other, otherD := manifestOf(t, evil)
	otherD.ArtifactType = flatten.ArtifactTypeImage
	if mineD.Digest.String() != good.Digest || otherD.Digest.String() != bad.Digest {
		t.Fatal("the builds are not found")
	}
	// forge gives a block image another subject and config.
	forge := func(m v1.Manifest, subject *v1.Descriptor, config v1.Descriptor) v1.Descriptor {
		t.Helper()
		m.Subject, m.Config = subject, config
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		d := putManifest(t, ref, "", types.OCIManifestSchema1, raw)
		d.ArtifactType = flatten.ArtifactTypeImage
		return d
	}
	subject := mine.Subject.Digest
	claims := map[string]v1.Descriptor{
		"another subject":    otherD,
		"another config":     forge(other, mine.Subject, other.Config),
		"no subject":         forge(other, nil, mine.Config),
		"a manifest of none": {MediaType: types.OCIManifestSchema1, Digest: subject, Size: mine.Subject.Size, ArtifactType: flatten.ArtifactTypeImage},
		"one that is not there": {MediaType: types.OCIManifestSchema1, Digest: v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("a", 64)}, Size: 100,
			ArtifactType: flatten.ArtifactTypeImage},
	}
	for what, claim := range claims {
		p.list(t, subject, mineD, claim)
		out, stderr, code := thaw(t, "inspect", "--json", ref)
		if code != exitOK || !strings.Contains(out, good.Digest) || !strings.Contains(stderr, "passed over") {
			t.Errorf("%s: exit %d\n%s%s", what, code, out, stderr)
		}
		// Not even where there is nothing else.
		putManifest(t, ref, flatten.ImageTag(subject), types.OCIManifestSchema1, rawOf(t, ref, otherD))
		p.list(t, subject, claim)
		out, stderr, code = thaw(t, "inspect", ref)
		if code != exitError || !strings.Contains(stderr, "make one with: thaw build "+ref) {
			t.Errorf("%s alone: exit %d\n%s%s", what, code, out, stderr)
		}
		s := launch(t, nil, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir())
		if s.isReady() {
			t.Errorf("%s alone is served", what)
		}
		putManifest(t, ref, flatten.ImageTag(subject), types.OCIManifestSchema1, rawOf(t, ref, mineD))
	}
	// A flood of claims is not gone through, and hides nothing that has a tag.
	var flood []v1.Descriptor
	for i := range 200 {
		d := claims["one that is not there"]
		d.Digest = sha256Of(t, []byte{byte(i)})
		flood = append(flood, d)
	}
	p.list(t, subject, flood...)
	if out, stderr, code := thaw(t, "inspect", "--json", ref); code != exitOK || !strings.Contains(out, good.Digest) || strings.Count(stderr, "passed over") > 16 {
		t.Errorf("exit %d\n%s%s", code, out, stderr)
	}
}

func rawOf(t testing.TB, ref string, d v1.Descriptor) []byte {
	t.Helper()
	r, err := registry.ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := finderOf(t).Client.Open(r)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := repo.Manifest(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// What the list of referrers has lost is found by the tag, in a registry and in a
// layout; and where a registry wants no such tag the list does.
func TestLostReferrer(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, imageOf(t, layerOf(t, files(1, "a", 5)...)))
	b := buildOf(t, ref)
	m, _ := manifestOf(t, ref)
	p.list(t, m.Subject.Digest)
	if in := inspectJSON(t, ref); in.Digest != b.Digest {
		t.Errorf("found %s, built %s", in.Digest, b.Digest)
	}
	must(t, "verify", ref)
	p.set(nil)
	// Whatever is said of the tag, an image without block image has none.
	push(t, p.host()+"/team/plain:v1", imageOf(t, layerOf(t, files(2, "a", 5)...)))
	for _, status := range []int{http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusBadRequest} {
		p.set(func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "thaw-image-") {
				http.Error(w, "no", status)
				return false
			}
			return true
		})
		if _, stderr, code := thaw(t, "inspect", p.host()+"/team/plain:v1"); code != exitError || !strings.Contains(stderr, "make one with") {
			t.Errorf("%d: exit %d\n%s", status, code, stderr)
		}
		out, stderr, code := thaw(t, "build", ref)
		if code != exitOK || !strings.Contains(stderr, "no tag of its own") {
			t.Errorf("%d: exit %d\n%s%s", status, code, out, stderr)
		}
		if in := inspectJSON(t, ref); in.Subject != m.Subject.Digest.String() {
			t.Errorf("%d: %+v", status, in)
		}
	}

	dir := t.TempDir()
	layout := "oci:" + filepath.Join(dir, "o") + ":x"
	saveArchive(t, filepath.Join(dir, "a.tar"), imageOf(t, layerOf(t, files(1, "a", 5)...)))
	copyLayout(t, filepath.Join(dir, "o"), "x", imageOf(t, layerOf(t, files(1, "a", 5)...)))
	b = buildOf(t, layout)
	index := filepath.Join(dir, "o", "index.json")
	raw, err := os.ReadFile(index)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(raw, []byte("thaw-image-")) {
		t.Errorf("the layout has no tag of the block image:\n%s", raw)
	}
	if in := inspectJSON(t, layout); in.Digest != b.Digest {
		t.Errorf("found %s, built %s", in.Digest, b.Digest)
	}
	if _, stderr, _ := thaw(t, "inspect", "oci:"+filepath.Join(dir, "o")+":none"); strings.Contains(stderr, "thaw-image") || strings.Contains(stderr, "thaw-layer") {
		t.Errorf("people see tags that are not for them:\n%s", stderr)
	}
}

// A block image is a reference by its digest, which build and ready print; and a
// pin holds for every verb.
func TestPin(t *testing.T) {
	t.Parallel()
	reg := startRegistry(t, "", t.TempDir(), "")
	ref := reg.addr + "/team/app:v1"
	push(t, ref, imageOf(t, layerOf(t, files(1, "a", 5)...)))
	old := buildOf(t, ref, "--chunk-size", "64K")
	now := buildOf(t, ref)
	if old.Digest == now.Digest {
		t.Fatal("both builds give one image")
	}
	cache := t.TempDir()
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache)
	if e := s.ready.Exports[0]; e.Digest != now.Digest || e.Image != withDigest(ref, now.Digest) {
		t.Errorf("ready says %+v, built is %s", e, now.Digest)
	}
	s.term()
	none := "sha256:" + strings.Repeat("0", 64)
	s = serving(t, withDigest(ref, now.Digest), "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--pin", now.Digest)
	s.term()
	// The one that was built before is taken where it is pinned, whatever the cache
	// knows.
	for _, c := range []string{cache, t.TempDir()} {
		s = serving(t, ref, "--listen", "unix:"+socket(t), "--cache", c, "--pin", ref+"="+old.Digest)
		if got := s.ready.Exports[0].Digest; got != old.Digest {
			t.Errorf("%s is served, %s is pinned", got, old.Digest)
		}
		s.term()
		s = launch(t, nil, ref, "--listen", "unix:"+socket(t), "--cache", c, "--pin", none)
		if s.isReady() {
			t.Fatal("another image than the pinned one is served")
		}
		if <-s.done; !s.said("is pinned") {
			t.Errorf("it does not say why:\n%s", s.stderr.String())
		}
	}
	trace := filepath.Join(t.TempDir(), "t")
	s = serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--record", trace)
	qemuRead(t, s.uri(), "read 0 1M")
	s.term()
	for _, args := range [][]string{
		{"inspect", ref}, {"verify", ref}, {"trace", "push", ref, trace}, {"trace", "pack", ref, trace},
		{"trace", "show", trace, "--image", ref}, {"trace", "plot", trace, "--image", ref, "-o", trace + ".svg"},
	} {
		must(t, append(args, "--pin", now.Digest)...)
		if _, stderr, code := thaw(t, append(args, "--pin", none)...); code != exitError || !strings.Contains(stderr, none+" is pinned") {
			t.Errorf("%v: exit %d\n%s", args, code, stderr)
		}
	}
	must(t, "build", "--size", "64M", ref, "--pin", now.Digest)
	if _, stderr, code := thaw(t, "build", "--size", "64M", ref, "--pin", none); code != exitError || !strings.Contains(stderr, "was pinned") {
		t.Errorf("build: exit %d\n%s", code, stderr)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"inspect", ref, "--pin", "sha256:12"}, "64 hexadecimal digits"},
		{[]string{"inspect", ref, "--pin", "sha512:" + strings.Repeat("0", 128)}, "64 hexadecimal digits"},
		{[]string{"inspect", ref, ref + "2", "--pin", none}, "name the image"},
		{[]string{"inspect", ref, "--pin", ref + "2=" + none}, "not one of the images"},
		{[]string{"inspect", ref, "--pin", none, "--pin", now.Digest}, "pinned to both"},
		{[]string{"serve", "--allow", "**", "--pin", none}, "name the image"},
		{[]string{"trace", "show", trace, "--pin", none}, "--image"},
	} {
		if _, stderr, code := thaw(t, c.args...); code != exitUsage || !strings.Contains(stderr, c.want) {
			t.Errorf("%v: exit %d, want %q\n%s", c.args, code, c.want, stderr)
		}
	}
}

// A pinned block image is found without any list or tag that leads to it, whoever
// else claims to be one; and a pin holds however the name is written.
func TestPinNeedsNoList(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, imageOf(t, layerOf(t, files(1, "a", 5)...)))
	old := buildOf(t, ref, "--chunk-size", "64K")
	now := buildOf(t, ref)
	m, d := manifestOf(t, ref)
	p.list(t, m.Subject.Digest, d)
	var out inspected
	if err := json.Unmarshal([]byte(must(t, "inspect", "--json", "--pin", old.Digest, ref)), &out); err != nil || out.Digest != old.Digest {
		t.Errorf("%v: %s is found, %s is pinned", err, out.Digest, old.Digest)
	}
	// What is pinned must be of the image all the same.
	evil := p.host() + "/team/app:evil"
	push(t, evil, imageOf(t, layerOf(t, files(2, "evil", 5)...)))
	buildOf(t, evil)
	other, _ := manifestOf(t, evil)
	m.Config = other.Config
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, pin := range []string{putManifest(t, ref, "", types.OCIManifestSchema1, raw).Digest.String(), m.Subject.Digest.String()} {
		_, stderr, code := thaw(t, "inspect", "--pin", pin, ref)
		if code != exitError || !strings.Contains(stderr, "the pinned "+pin+" is not a block image of "+ref) {
			t.Errorf("exit %d\n%s", code, stderr)
		}
	}

	dir := t.TempDir()
	layout := filepath.Join(dir, "o")
	copyLayout(t, layout, "x", imageOf(t, layerOf(t, files(1, "a", 5)...)))
	b := buildOf(t, "oci:"+layout+":x")
	if err := os.Symlink(layout, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	none := "sha256:" + strings.Repeat("0", 64)
	s := serving(t, "--allow", "oci:"+dir+"/**", "--allow", p.host()+"/**", "--pin", "oci:"+dir+"/link:x="+none, "--pin", ref+"="+now.Digest,
		"--listen", "unix:"+socket(t), "--cache", t.TempDir())
	for name, want := range map[string]bool{
		"oci:" + layout + ":x":                false,
		"oci:" + dir + "//./o:x":              false,
		"oci:" + dir + "/link:x":              false,
		"oci:" + layout + "@" + b.Digest:      true, // another name
		ref:                                   true,
		ref + "@" + m.Subject.Digest.String(): true,
		ref + "@" + old.Digest:                false,
	} {
		read := exec.Command("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", "nbd+unix:///"+name+"?socket="+strings.TrimPrefix(s.ready.Listen[0], "unix:"))
		if err := startWithUs(read); err != nil {
			t.Fatal(err)
		}
		if err := read.Wait(); (err == nil) != want {
			t.Errorf("%s: %v, want %v\n%s", name, err, want, s.stderr.String())
		}
	}
}

// What the cache says of a name is held to the rules for what a registry says.
func TestRecallIsHeldToTheRules(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref, evil := p.host()+"/team/app:v1", p.host()+"/team/app:evil"
	push(t, ref, imageOf(t, layerOf(t, files(1, "good", 5)...)))
	push(t, evil, imageOf(t, layerOf(t, files(2, "evil", 5)...)))
	good, bad := buildOf(t, ref), buildOf(t, evil)
	m, _ := manifestOf(t, ref)
	n, _ := manifestOf(t, evil)
	pinned := withDigest(ref, m.Subject.Digest.String())
	cache := t.TempDir()
	s := serving(t, pinned, evil, "--listen", "unix:"+socket(t), "--cache", cache)
	s.term()
	p.set(func(w http.ResponseWriter, r *http.Request) bool { // gone
		http.NotFound(w, r)
		return false
	})
	start := func() *server { return launch(t, nil, pinned, "--listen", "unix:"+socket(t), "--cache", cache) }
	if s := start(); !s.isReady() || s.ready.Exports[0].Digest != good.Digest {
		t.Fatalf("what is known is not served:\n%s", s.stderr.String())
	} else {
		s.term()
	}
	goodHash, err := v1.NewHash(good.Digest)
	if err != nil {
		t.Fatal(err)
	}
	badHash, err := v1.NewHash(bad.Digest)
	if err != nil {
		t.Fatal(err)
	}
	resolution := func(r flatten.Resolution) []byte {
		t.Helper()
		kept, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		return kept
	}
	format := func(kept map[string]any) []byte {
		t.Helper()
		b, err := json.Marshal(kept)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for what, kept := range map[string][]byte{
		"another image":                resolution(flatten.Resolution{Name: pinned, Manifest: badHash, Source: n.Subject.Digest}),
		"another image as its own":     resolution(flatten.Resolution{Name: pinned, Manifest: badHash, Source: m.Subject.Digest}),
		"another image of no source":   resolution(flatten.Resolution{Name: pinned, Manifest: badHash}),
		"what older rules have let in": format(map[string]any{"name": pinned, "manifest": good.Digest}),
		"another name":                 resolution(flatten.Resolution{Name: evil, Manifest: goodHash, Source: m.Subject.Digest}),
		"half a digest":                format(map[string]any{"format": 2, "name": pinned, "manifest": "sha256:12"}),
		"another algorithm":            format(map[string]any{"format": 2, "name": pinned, "manifest": "sha512:" + strings.Repeat("0", 128)}),
		"no digest":                    format(map[string]any{"format": 2, "name": pinned}),
		"no JSON":                      []byte("nonsense"),
	} {
		c, err := blockmap.OpenCache(cache, blockmap.CacheOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.PutRef("linux/amd64 "+pinned, kept); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if s := start(); s.isReady() {
			t.Errorf("%s: it is served: %+v", what, s.ready)
		} else if <-s.done; s.cmd.ProcessState.ExitCode() != exitError || !s.said("not found") {
			t.Errorf("%s: exit %d\n%s", what, s.cmd.ProcessState.ExitCode(), s.stderr.String())
		}
	}
}

// patience is how long a start waits for a registry that does not answer, as the help
// of serve says.
const patience = 2 * time.Second

// slowly is how long a start may take that waits for such a registry, if one that waits for nothing
// takes quick on this machine.
func slowly(quick time.Duration) time.Duration { return patience + 3*time.Second + 4*quick }
