package main

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
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

func TestMain(m *testing.M) {
	if os.Geteuid() == 0 {
		if code, done, err := bench.Isolate(context.Background()); done || err != nil {
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
			os.Exit(code)
		}
	}
	os.Exit(m.Run())
}

// testImage makes a layout of a static program that prints what it finds in a
// file of the layer below.
func testImage(t *testing.T) bench.Workload {
	t.Helper()
	dir := t.TempDir()
	src := filepath.Join(dir, "run.go")
	err := os.WriteFile(src, []byte(`package main

import "os"

func main() {
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

func testBenchmark(t *testing.T, out io.Writer, needs ...bench.Program) *benchmark {
	t.Helper()
	if err := bench.Need(needs...); err != nil {
		t.Skip(err)
	}
	// Not t.TempDir: the path of a socket has at most 107 bytes.
	dir, err := os.MkdirTemp("", "thaw-bench-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &benchmark{
		options: options{rounds: 2, size: "64M", sizes: "64K,128K", rtt: 2 * time.Millisecond, mbits: 1000, readAhead: 128},
		dir:     dir, rec: bench.NewRecorder(out), out: out, verified: make(map[string]bool),
	}
	if b.thaw, err = bench.BuildThaw(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestAgainst(t *testing.T) {
	var out bytes.Buffer
	b := testBenchmark(t, &out, umoci, mke2fs)
	if err := b.against(t.Context(), []bench.Workload{testImage(t)}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"BenchmarkBuild/image=small/tool=thaw 1 ", "BenchmarkBuild/image=small/tool=umoci-unpack+mke2fs 1 ", "\n| small |"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, out.String())
		}
	}
	leftNothing(t, b)
}

func TestChunkSizes(t *testing.T) {
	var out bytes.Buffer
	b := testBenchmark(t, &out, nbdfuse, fuse3, losetup, registry)
	m := testImage(t)
	if err := b.chunkSizes(t.Context(), []bench.Workload{m}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"BenchmarkChunks/image=small/chunk=64K 1 ", "BenchmarkStart/image=small/chunk=128K/origin=link 1 ", "\n| all   |"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, out.String())
		}
	}
	link, local := startName(m, "64K", "link"), startName(m, "64K", "layout")
	if got := b.rec.Median(link, fetched); got <= 0 || got > b.rec.Median(link, wire) {
		t.Errorf("%v bytes fetched, %v on the link", got, b.rec.Median(link, wire))
	}
	if got := b.rec.Median(local, requests); got <= 0 {
		t.Errorf("%v requests", got)
	}
	leftNothing(t, b)
}

// A program that answers something else fails the benchmark, which cleans up.
func TestWrongAnswer(t *testing.T) {
	b := testBenchmark(t, io.Discard, nbdfuse, fuse3, losetup, registry)
	m := testImage(t)
	m.Answer = "something else"
	err := b.chunkSizes(t.Context(), []bench.Workload{m})
	if err == nil || !strings.Contains(err.Error(), `printed "hello"`) {
		t.Errorf("error %v", err)
	}
	leftNothing(t, b)
}

// leftNothing fails the test if there is more left than the program, mounts
// and loop devices among it.
func leftNothing(t *testing.T, b *benchmark) {
	t.Helper()
	entries, err := os.ReadDir(b.dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "thaw" {
		t.Errorf("left in %s: %v, %v", b.dir, entries, err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), b.dir) {
		t.Errorf("left mounted: %s, %v", mounts, err)
	}
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range backing {
		// One that is gone meanwhile was somebody else's.
		if file, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(file), b.dir) {
			t.Errorf("left attached: %s from %s", f, file)
		}
	}
}
