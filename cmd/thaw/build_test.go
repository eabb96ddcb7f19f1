package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// A build says what it has guessed, and does without a guess when it is told to:
// layers and index are the same either way.
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
	if out := must(t, "build", ref); !strings.Contains(out, "a start reads 1 file:") {
		t.Errorf("printed:\n%s", out)
	}
	must(t, "verify", ref)
}
