package flatten

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var l []string
	for _, e := range entries {
		l = append(l, e.Name())
	}
	return strings.Join(l, " ")
}

// TestLeftovers kills a build, and looks at what the next one removes: what the
// killed one left, and nothing that another living build or anybody else has.
func TestLeftovers(t *testing.T) {
	temp := t.TempDir()
	if os.Getenv(childVariable) != "" {
		holdTempDir(t, os.Getenv(childVariable))
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestLeftovers$")
	cmd.Env = append(os.Environ(), childVariable+"="+temp)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	line := make([]byte, len("held\n"))
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "held\n" {
		t.Fatalf("the other build: %q, %v", line, err)
	}
	others := []string{"elsewhere", "thaw-other-1", tempPrefix + "file"}
	writeFile(t, filepath.Join(temp, others[0], "f"), []byte("x"))
	writeFile(t, filepath.Join(temp, others[1], "f"), []byte("x"))
	writeFile(t, filepath.Join(temp, others[2]), []byte("x"))
	if err := os.Symlink("elsewhere", filepath.Join(temp, tempPrefix+"link")); err != nil {
		t.Fatal(err)
	}
	src := newSource(t, plain, tarball(t, reg("f", "x")))
	o := testOptions
	o.TempDir = temp
	living := ""
	src.Layers[0].Open = func(context.Context) (io.ReadCloser, error) {
		living = names(t, temp)
		return io.NopCloser(bytes.NewReader(src.tars[0])), nil
	}
	if _, err := Build(t.Context(), &src.Source, newTarget(t), o); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(living, tempPrefix); n != 4 { // two builds, the file and the link
		t.Errorf("beside a living build: %s", living)
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	if left := names(t, temp); strings.Count(left, tempPrefix) != 3 {
		t.Fatalf("the killed build has left %s", left)
	}
	if _, err := Build(t.Context(), &src.Source, newTarget(t), o); err != nil {
		t.Fatal(err)
	}
	if left := names(t, temp); left != "elsewhere thaw-other-1 thaw-streams-file thaw-streams-link" {
		t.Errorf("after the next build: %s", left)
	}
	for _, name := range others[:2] {
		if _, err := os.Stat(filepath.Join(temp, name, "f")); err != nil {
			t.Error(err)
		}
	}
}

// holdTempDir is a build that is under way until it is killed.
func holdTempDir(t *testing.T, parent string) {
	s, err := NewStreams(parent, DefaultChunkSize, 1)
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 4<<20)); err != nil {
		t.Fatal(err)
	}
	os.Stdout.WriteString("held\n")
	select {}
}

// TestTempDirOfOthers leaves the directory of another user alone.
func TestTempDirOfOthers(t *testing.T) {
	need(t, "root")
	temp := t.TempDir()
	path := filepath.Join(temp, tempPrefix+"1")
	if err := os.Mkdir(path, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	removeLeftovers(temp, tempPrefix, nil)
	if names(t, temp) == "" {
		t.Error("it is gone")
	}
}

// TestKept keeps the streams of a build on disk until the guess is made: within a
// bound, and only while there is room.
func TestKept(t *testing.T) {
	s, err := NewStreams(t.TempDir(), MinChunkSize, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	finished := func(content string) *StreamFile {
		w, err := s.Create(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
		f, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	small, large := finished(noise(1, 3*blockSize)), finished(noise(2, 9*blockSize))
	s.temp.keep(small.Table.Blob, small.file)
	if names(t, s.temp.path) == "" {
		t.Error("the other stream has lost its file")
	}
	large.file.size = maxKept // as if
	s.temp.keep(large.Table.Blob, large.file)
	if names(t, s.temp.path) != "" {
		t.Errorf("a kept stream has a name: %s", names(t, s.temp.path))
	}
	if s.temp.read(large.Table.Blob, 0, 10) != nil {
		t.Error("more is kept than is allowed")
	}
	if b := s.temp.read(small.Table.Blob, 0, int64(small.Table.Chunks[0].Stored)); b == nil {
		t.Error("the small stream was given up for the large one")
	}
	for _, x := range [][2]int64{{-1, 10}, {0, -1}, {0, small.Table.BlobSize + 1}, {small.Table.BlobSize, 1}, {1 << 62, 1 << 62}} {
		if s.temp.read(small.Table.Blob, x[0], x[1]) != nil {
			t.Errorf("bytes %v of a stream of %d", x, small.Table.BlobSize)
		}
	}
	if !s.temp.release() || s.temp.release() || s.temp.read(small.Table.Blob, 0, 1) != nil {
		t.Error("it is kept after it was given up")
	}
}

// TestKeptMakesRoom builds on a disk that has room for one stream at a time: what
// is kept for the guess gives way to the next layer.
func TestKeptMakesRoom(t *testing.T) {
	need(t, "root", "mount")
	temp := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", temp)
	t.Cleanup(func() { run(t, "umount", temp) })
	var tars [][]byte
	for i := range uint64(3) {
		tars = append(tars, tarball(t, reg("f", noise(i, 2<<20))))
	}
	src := newSource(t, plain, tars...)
	o := testOptions
	o.TempDir, o.Jobs = temp, 1
	if _, err := Build(t.Context(), &src.Source, newTarget(t), o); err != nil {
		t.Error(err)
	}
	if left := names(t, temp); left != "" {
		t.Errorf("left: %s", left)
	}
}

// panicking panics where it is read.
type panicking struct{}

func (panicking) Read([]byte) (int, error) { panic("the reader panics") }

// TestPanics lets workers of a build panic: it ends as by an error, the uploads of
// others are cancelled, and nothing is left.
func TestPanics(t *testing.T) {
	for name, plant := range map[string]func(src *testSource, dst *dirTarget){
		"reading a layer": func(src *testSource, _ *dirTarget) {
			src.Layers[1].Open = func(context.Context) (io.ReadCloser, error) {
				return io.NopCloser(io.MultiReader(bytes.NewReader(src.tars[1][:100_000]), panicking{})), nil
			}
		},
		"opening a layer": func(src *testSource, _ *dirTarget) {
			src.Layers[1].Open = func(context.Context) (io.ReadCloser, error) { panic("the layer panics") }
		},
		"pushing": func(src *testSource, dst *dirTarget) {
			dst.before = func(what string, d v1.Descriptor) error {
				if what == "file" && d.Annotations == nil {
					panic("the target panics")
				}
				return nil
			}
		},
	} {
		src, dst := threeLayers(t), newTarget(t)
		plant(src, dst)
		o := testOptions
		o.TempDir, o.Jobs = t.TempDir(), 3
		_, err := Build(t.Context(), &src.Source, dst, o)
		if err == nil || !strings.Contains(err.Error(), "panics") || !strings.Contains(err.Error(), "goroutine") {
			t.Errorf("%s: %v", name, err)
		}
		if left := names(t, o.TempDir); left != "" || dst.manifests(ArtifactTypeImage) > 0 {
			t.Errorf("%s: left: %s", name, left)
		}
	}
	// In the compressor, which has the bytes.
	c, err := newCompressor(MinChunkSize, 1, 2)
	if err != nil {
		t.Fatal(err)
	}
	c.frames.New = func() any { panic("the compressor panics") }
	s := newStreamWriter(t.Context(), c, io.Discard)
	_, err = s.Write(make([]byte, 10*MinChunkSize))
	if _, err = s.finish(err); err == nil || !strings.Contains(err.Error(), "panics") {
		t.Errorf("compressing: %v", err)
	}
	if n := len(c.slots) + len(c.unwritten); n != 0 {
		t.Errorf("%d slots are still taken", n)
	}
}

// TestUnfinished ends builds after each layer, and looks at what the error says of
// the next one.
func TestUnfinished(t *testing.T) {
	for kept, says := range []string{"starts from the beginning", "1 of 3 layers is", "2 of 3 layers are", "all layers are"} {
		src, dst := threeLayers(t), newTarget(t)
		ctx, cancel := context.WithCancel(t.Context())
		dst.before = func(what string, d v1.Descriptor) error {
			if dst.manifests(ArtifactTypeLayer) == kept {
				cancel()
				return ctx.Err()
			}
			return nil
		}
		o := testOptions
		o.Jobs = 1
		_, err := Build(ctx, &src.Source, dst, o)
		cancel()
		var u *Unfinished
		if !errors.As(err, &u) || !errors.Is(err, context.Canceled) {
			t.Fatalf("%d layers: %v", kept, err)
		}
		if u.Kept != kept || u.Layers != 3 || (u.Stored > 0) != (kept > 0) || !strings.Contains(u.Reuse(), says) {
			t.Errorf("%d layers: %+v: %s", kept, u, u.Reuse())
		}
		dst.before = nil
		src.opened.Store(0)
		build(t, src, dst, o)
		if opened := src.opened.Load(); int(opened) != 3-kept {
			t.Errorf("%d layers were to be reused, and %d were read again", kept, opened)
		}
	}
}

// TestStreamWriter ends streams within blocks and by Abort.
func TestStreamWriter(t *testing.T) {
	s, err := NewStreams(t.TempDir(), MinChunkSize, 1)
	if err != nil {
		t.Fatal(err)
	}
	w, err := s.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, noise(1, blockSize+1))
	if _, err := w.Close(); err == nil || !strings.Contains(err.Error(), "within a block") {
		t.Errorf("a stream of a block and a byte: %v", err)
	}
	if w, err = s.Create(t.Context()); err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, noise(1, 5*blockSize))
	w.Abort()
	if left := names(t, s.temp.path); left != "" {
		t.Errorf("left: %s", left)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(s.temp.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory: %v", err)
	}
}
