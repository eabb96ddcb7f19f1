package benchtest

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/bench"
)

// Image returns an OCI layout with a static program that prints the beginning of
// a file in the layer below. With an argument, the program runs for an hour.
func Image(t *testing.T) bench.Workload {
	t.Helper()
	dir := t.TempDir()
	src := filepath.Join(dir, "run.go")
	err := os.WriteFile(src, []byte(`package main

import (
	"os"
	"time"
)

func main() {
	if len(os.Args) > 1 {
		time.Sleep(time.Hour)
	}
	b, err := os.ReadFile("/data")
	if err != nil {
		panic(err)
	}
	if err := os.WriteFile("/tmp/x", nil, 0o600); err != nil {
		panic(err)
	}
	os.Stdout.Write(b[:5])
}
`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "run"), src)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if _, err := bench.Run(build); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(filepath.Join(dir, "run"))
	if err != nil {
		t.Fatal(err)
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, entries := range [][]struct {
		name string
		data []byte
	}{
		{{"proc/", nil}, {"dev/", nil}, {"tmp/", nil}, {"data", append([]byte("hello"), make([]byte, 1<<20)...)}},
		{{"app/", nil}, {"app/run", program}},
	} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, e := range entries {
			h := &tar.Header{Name: e.name, Mode: 0o755, Size: int64(len(e.data)), ModTime: time.Unix(1.7e9, 0), Typeflag: tar.TypeReg}
			if strings.HasSuffix(e.name, "/") {
				h.Typeflag = tar.TypeDir
			}
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(e.data); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil },
			tarball.WithMediaType(types.OCILayer))
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, l); err != nil {
			t.Fatal(err)
		}
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.OS, c.Architecture = "linux", "amd64"
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	oci := filepath.Join(dir, "small")
	p, err := layout.Write(oci, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	err = p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "latest"}))
	if err != nil {
		t.Fatal(err)
	}
	return bench.Workload{Name: "small", Dir: oci, Answer: "hello"}
}
