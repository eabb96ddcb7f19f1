package flatten

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	manyFiles = 500_000
	// peakMemory is what a build takes at most, of whatever image.
	peakMemory = 512 << 20
	// memoryLimit is that of the garbage collector in thaw build.
	memoryLimit = 384 << 20

	childVariable = "THAW_FLATTEN_CHILD"
)

// writeMany writes the tar of a layer with many small files.
func writeMany(w io.Writer) error {
	b := bufio.NewWriterSize(w, 1<<20)
	tw := tar.NewWriter(b)
	body := []byte(noise(1, 600))
	for i := range manyFiles {
		h := tar.Header{Typeflag: tar.TypeReg, Mode: 0o644, Uid: i % 7, ModTime: time.Unix(1_700_000_000+int64(i), 0), Format: tar.FormatUSTAR}
		h.Name = fmt.Sprintf("usr/lib/some-package-%d/module-%d/file-%d.py", i/2000, i/50%40, i)
		h.Size = int64(i % len(body))
		if err := tw.WriteHeader(&h); err != nil {
			return err
		}
		copy(body, fmt.Sprint(i))
		if _, err := tw.Write(body[:h.Size]); err != nil {
			return err
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	return b.Flush()
}

// manyFilesSource is an image that is made as it is read, of one layer.
func manyFilesSource(t testing.TB) *Source {
	t.Helper()
	h := sha256.New()
	if err := writeMany(h); err != nil {
		t.Fatal(err)
	}
	var c v1.ConfigFile
	c.RootFS.DiffIDs = []v1.Hash{hashOf([32]byte(h.Sum(nil)))}
	config, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return &Source{Config: config, Manifest: describe(types.OCIManifestSchema1, nil), Layers: []Layer{{
		Descriptor: describe(types.OCILayer, nil),
		Open: func(context.Context) (io.ReadCloser, error) {
			r, w := io.Pipe()
			go func() { w.CloseWithError(writeMany(w)) }()
			return r, nil
		},
	}}}
}

// peak is the most memory that this process has had.
func peak(t testing.TB) (bytes int64) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skipf("no /proc: %v", err)
	}
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	if _, err := fmt.Sscan(rest, &bytes); err != nil {
		t.Fatal(err)
	}
	return bytes << 10
}

// alone runs a test in a process of its own and without the race detector, which
// takes memory and time of its own. It returns true in that process.
func alone(t *testing.T) bool {
	t.Helper()
	if os.Getenv(childVariable) != "" {
		return true
	}
	need(t, "go")
	binary := filepath.Join(t.TempDir(), "flatten.test")
	run(t, "go", "test", "-c", "-race=false", "-o", binary, ".")
	cmd := exec.Command(binary, "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), childVariable+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
	return false
}

// TestPeakMemory builds an image of 500,000 files.
func TestPeakMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("builds an image of 500,000 files")
	}
	if alone(t) {
		buildMany(t)
	}
}

func buildMany(t testing.TB) {
	src := manyFilesSource(t)
	debug.SetMemoryLimit(memoryLimit)
	began := time.Now()
	res, err := Build(t.Context(), src, discard{}, Options{Size: DefaultSize, ChunkSize: DefaultChunkSize, Level: DefaultLevel, TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	n := peak(t)
	t.Logf("%d files, %d MiB of content, index %d bytes: %d MiB at the peak, %.1f s",
		manyFiles, res.Layers[0].Content>>20, res.IndexBytes, n>>20, time.Since(began).Seconds())
	if n > peakMemory {
		t.Errorf("%d MiB of memory at the peak, and %d MiB are allowed", n>>20, peakMemory>>20)
	}
}

// BenchmarkManyFiles builds an image of 500,000 files in one layer.
func BenchmarkManyFiles(b *testing.B) {
	src := manyFilesSource(b)
	debug.SetMemoryLimit(memoryLimit)
	for b.Loop() {
		if _, err := Build(b.Context(), src, discard{}, Options{
			Size: DefaultSize, ChunkSize: DefaultChunkSize, Level: DefaultLevel, TempDir: b.TempDir(),
		}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(manyFiles)*float64(b.N)/b.Elapsed().Seconds(), "files/s")
	b.ReportMetric(float64(peak(b)), "peak-B")
}
