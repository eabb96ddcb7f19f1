package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"
)

// A build says what it predicts, and predicts nothing with --no-guess. Layers and
// index are the same either way.
func TestBuildGuess(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	ref := reg.addr + "/team/app:v1"
	const script = "#!/nowhere\n"
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "run", Mode: 0o755, Size: int64(len(script))}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, script); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img := imageOf(t, layerOf(t, files(1, "a", 3)...), layer)
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.Config.Cmd = []string{"/run"}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	push(t, ref, img)
	var with, again, without built
	for _, c := range []struct {
		b    *built
		args []string
	}{{&with, nil}, {&without, []string{"--no-guess"}}, {&again, nil}} {
		out := must(t, append([]string{"build", "--json", ref}, c.args...)...)
		if err := json.Unmarshal([]byte(out), c.b); err != nil {
			t.Fatal(err)
		}
	}
	if g := with.Guess; g.Files != 1 || g.Bytes == 0 || g.Chunks == 0 || g.Stored == 0 {
		t.Errorf("guessed %+v", g)
	}
	if without.Guess != (builtGuess{}) || without.Digest == with.Digest || without.IndexBytes != with.IndexBytes {
		t.Errorf("without a guess: %+v", without)
	}
	if again.Digest != with.Digest {
		t.Errorf("built again: %s, want %s", again.Digest, with.Digest)
	}
	if out := must(t, "build", ref); !strings.Contains(out, "startup reads 1 file:") {
		t.Errorf("printed:\n%s", out)
	}
	must(t, "verify", ref)
}

// The command at the end of a build serves what was built, wherever that came from
// and went to. It is typed into a shell.
func TestServeLine(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	img := imageOf(t, layerOf(t, files(1, "a", 3)...))
	other := imageOf(t, layerOf(t, files(2, "b", 3)...))
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ref := reg.addr + "/team/app:v1"
	push(t, ref, img)
	saveArchive(t, dir+"/saved.tar", img)
	copyLayout(t, dir+"/one", "v1", img)
	copyLayout(t, dir+"/untagged", "", img)
	copyLayout(t, dir+"/digest", "v1", img)
	copyLayout(t, dir+"/it's here", "v1", img)
	copyLayout(t, dir+"/packed", "v1", img)
	tool(t, "tar", "-C", dir+"/packed", "-cf", dir+"/packed.tar", ".")
	arm := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
		mutate.IndexAddendum{Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}})
	p, err := layout.Write(dir+"/several", empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendIndex(arm, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "v1"})); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string // of the words after "thaw serve"
	}{
		{[]string{"oci:" + dir + "/one"}, "oci:" + dir + "/one"},
		{[]string{"oci:" + dir + "/one"}, "oci:" + dir + "/one"}, // again
		{[]string{"oci:" + dir + "/one:v1"}, "oci:" + dir + "/one:v1"},
		{[]string{"oci:" + dir + "/untagged"}, "oci:" + dir + "/untagged"},
		{[]string{"oci:" + dir + "/digest@" + digest.String()}, "oci:" + dir + "/digest@" + digest.String()},
		{[]string{"oci:" + dir + "/it's here"}, "oci:" + dir + "/it's here"},
		{[]string{"oci:" + dir + "/one", "oci:" + dir + "/other:x"}, "oci:" + dir + "/other:x"},
		{[]string{"docker-archive:" + dir + "/saved.tar", "oci:" + dir + "/saved:x"}, "oci:" + dir + "/saved:x"},
		{[]string{"oci-archive:" + dir + "/packed.tar", reg.addr + "/team/packed:x"}, reg.addr + "/team/packed:x"},
		{[]string{"oci-archive:" + dir + "/packed.tar:v1", "oci:" + dir + "/packed:v1-thaw"}, "oci:" + dir + "/packed:v1-thaw"},
		{[]string{ref, "--plain-http", "other.example"}, ref + " --plain-http other.example"},
		{[]string{ref, reg.addr + "/team/app:v1-thaw"}, reg.addr + "/team/app:v1-thaw"},
		{[]string{reg.addr + "/team/app@" + digest.String()}, reg.addr + "/team/app@" + digest.String()},
		{[]string{"oci:" + dir + "/several", "--platform", "linux/amd64"}, ""},
		{[]string{"oci:" + dir + "/several", "--platform", "linux/s390x"}, "oci:" + dir + "/several --platform linux/s390x"},
	} {
		out := must(t, append([]string{"build", "--size", "64M"}, c.args...)...)
		words, digest := serveLineOf(t, out)
		if got := strings.Join(words, " "); c.want != "" && got != c.want {
			t.Errorf("build %q says to serve %s, want %s", c.args, got, c.want)
		}
		s := serving(t, append(words, "--listen", "unix:"+socket(t), "--cache", t.TempDir())...)
		if got := s.ready.Exports[0].Digest; got != digest {
			t.Errorf("build %q has made %s, and %q serves %s", c.args, digest, words, got)
		}
		s.kill()
	}
}

// serveLineOf are the words after "thaw serve" that a build has printed, and the
// digest of what it has built.
func serveLineOf(t testing.TB, out string) (words []string, digest string) {
	t.Helper()
	var line string
	for l := range strings.Lines(out) {
		if s, ok := strings.CutPrefix(l, "serve    thaw serve "); ok {
			line = strings.TrimSuffix(s, "\n")
		}
		if s, ok := strings.CutPrefix(l, "digest   "); ok {
			digest = strings.TrimSuffix(s, "\n")
		}
	}
	split := tool(t, "sh", "-c", `printf '%s\n' `+line)
	return strings.Split(strings.TrimSuffix(split, "\n"), "\n"), digest
}

// Where a name does not lead to what was built, the digest does: here another
// build has put its own beside the image meanwhile.
func TestServeLineByDigest(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, imageOf(t, layerOf(t, files(1, "a", 3)...)))
	must(t, "build", "--size", "64M", ref)
	// From then on the registry has lost the look-ups by name.
	p.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/sha256:") {
			p.set(func(w http.ResponseWriter, r *http.Request) bool {
				if strings.Contains(r.URL.Path, "/manifests/v1") {
					http.NotFound(w, r)
					return false
				}
				return true
			})
		}
		return true
	})
	words, digest := serveLineOf(t, must(t, "build", "--size", "32M", ref))
	if want := p.host() + "/team/app@" + digest; len(words) != 1 || words[0] != want {
		t.Errorf("%q, want %s", words, want)
	}
}

// A build that is interrupted says what the next one reuses, and that is so.
func TestInterruptedBuild(t *testing.T) {
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	img := imageOf(t, layerOf(t, files(1, "a", 3)...), layerOf(t, files(2, "b", 3)...))
	push(t, ref, img)
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	var digests []string
	for _, l := range layers {
		d, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, d.Hex)
	}
	interrupt := func(layer int) string {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var stderr syncBuffer
		p.set(func(w http.ResponseWriter, r *http.Request) bool {
			if layer == 0 && r.Method == http.MethodGet && strings.Contains(r.URL.Path, digests[1]) {
				<-r.Context().Done() // so that no layer is finished
				return false
			}
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, digests[layer]) {
				// The layers are read at the same time: the others are to be done.
				for end := time.Now().Add(atMost); strings.Count(stderr.String(), "stored as") < layer && time.Now().Before(end); {
					time.Sleep(time.Millisecond)
				}
				cancel()
				<-r.Context().Done()
				return false
			}
			return true
		})
		defer p.set(nil)
		if code := run(ctx, []string{"build", ref, "--jobs", "1", "--temp", t.TempDir()}, io.Discard, &stderr); code != exitError {
			t.Errorf("exit %d", code)
		}
		return stderr.String()
	}
	want := "thaw: interrupted: no layer was finished: the next build starts from the beginning\n"
	if got := interrupt(0); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	want = "thaw: interrupted: 1 of 2 layers is converted and pushed: the next build reuses it\n"
	if got := interrupt(1); !strings.HasSuffix(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	var b built
	if err := json.Unmarshal([]byte(must(t, "build", "--json", ref)), &b); err != nil {
		t.Fatal(err)
	}
	if !b.Layers[0].Reused || b.Layers[1].Reused {
		t.Errorf("the next build reused %+v", b.Layers)
	}
}

// A full directory of temporary files is named, with what to do, and what was in it
// is removed.
func TestFullTemp(t *testing.T) {
	temp := t.TempDir()
	if err := unix.Mount("tmpfs", temp, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("no tmpfs to fill: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(temp, unix.MNT_DETACH) })
	dir := t.TempDir()
	copyLayout(t, dir+"/l", "v1", imageOf(t, layerOf(t, files(1, "a", 20)...)))
	for _, byFlag := range []bool{true, false} {
		args := []string{"build", "oci:" + dir + "/l"}
		if byFlag {
			args = append(args, "--temp", temp)
		} else {
			t.Setenv("TMPDIR", temp)
		}
		_, stderr, code := thaw(t, args...)
		if code != exitError || !strings.Contains(stderr, temp+" is full: ") || strings.Count(stderr, "--temp") != 1 {
			t.Errorf("%q: exit %d:\n%s", args, code, stderr)
		}
		if left := filesIn(t, temp); len(left) > 0 {
			t.Errorf("it has left %q", left)
		}
	}
	// The temporary directory has nothing to do with it where the target is full.
	_, stderr, _ := thaw(t, "build", "oci:"+dir+"/l", "oci:"+temp+"/dst:x", "--temp", dir)
	if strings.Contains(stderr, "--temp") || !strings.Contains(stderr, "no space left") {
		t.Errorf("with a full target:\n%s", stderr)
	}
}
