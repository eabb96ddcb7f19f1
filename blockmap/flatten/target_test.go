package flatten

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
)

// dirTarget is a Target that keeps everything in a directory. It can fail, and
// remembers what was pushed.
type dirTarget struct {
	dir string

	// before is asked before a push of a thing; nil lets everything through.
	before func(what string, d v1.Descriptor) error
	// blind has HasBlob look at sizes alone.
	blind bool
	// tagged is asked before a tag is looked up.
	tagged func(tag string) error
	// ranged is asked before a part of a blob is read.
	ranged func(digest v1.Hash) error

	// mounts has blobs of other dirTargets mounted.
	mounts bool

	mu      sync.Mutex
	pushed  []v1.Descriptor // not those that were there
	mounted int
}

func newTarget(t testing.TB) *dirTarget {
	t.Helper()
	d := &dirTarget{dir: t.TempDir()}
	for _, sub := range []string{"blobs", "manifests", "tags"} {
		if err := os.Mkdir(filepath.Join(d.dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func (t *dirTarget) path(kind, name string) string { return filepath.Join(t.dir, kind, name) }

func (t *dirTarget) HasBlob(_ context.Context, d v1.Descriptor) (bool, error) {
	b, err := os.ReadFile(t.path("blobs", d.Digest.Hex))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && int64(len(b)) == d.Size && (t.blind || describe("", b).Digest == d.Digest), err
}

func (t *dirTarget) Blob(_ context.Context, d v1.Descriptor) ([]byte, error) {
	b, err := os.ReadFile(t.path("blobs", d.Digest.Hex))
	if err == nil && describe("", b).Digest != d.Digest {
		err = blockmap.ErrDigest
	}
	return b, err
}

func (t *dirTarget) PushFile(ctx context.Context, d v1.Descriptor, path string, progress func(int64)) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	progress(d.Size / 2)
	if err := t.push("file", "blobs", d, b); err != nil {
		return err
	}
	progress(d.Size)
	return os.Remove(path)
}

func (t *dirTarget) PushBytes(_ context.Context, d v1.Descriptor, b []byte) error {
	return t.push("bytes", "blobs", d, b)
}

func (t *dirTarget) Mount(_ context.Context, d v1.Descriptor, from Place) (bool, error) {
	if !t.mounts {
		return false, nil
	}
	b, err := os.ReadFile(from.(*dirTarget).path("blobs", d.Digest.Hex))
	if err != nil {
		return false, nil
	}
	t.mu.Lock()
	t.mounted++
	t.mu.Unlock()
	return true, os.WriteFile(t.path("blobs", d.Digest.Hex), b, 0o644)
}

func (t *dirTarget) OpenBlob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	return t.open(ctx, d)
}

func (t *dirTarget) String() string { return t.dir }

func (t *dirTarget) Tagged(_ context.Context, tag string) ([]byte, error) {
	if t.tagged != nil {
		if err := t.tagged(tag); err != nil {
			return nil, err
		}
	}
	digest, err := os.ReadFile(t.path("tags", tag))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return os.ReadFile(t.path("manifests", string(digest)))
}

func (t *dirTarget) PushManifest(_ context.Context, d v1.Descriptor, raw []byte, tag string) error {
	if err := t.push("manifest", "manifests", d, raw); err != nil || tag == "" {
		return err
	}
	return os.WriteFile(t.path("tags", tag), []byte(d.Digest.Hex), 0o644)
}

func (t *dirTarget) OpenRange(_ context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error) {
	digest := hashOf(blob)
	if t.ranged != nil {
		if err := t.ranged(digest); err != nil {
			return nil, err
		}
	}
	f, err := os.Open(t.path("blobs", digest.Hex))
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.NewSectionReader(f, off, n), f}, nil
}

func (t *dirTarget) push(what, kind string, d v1.Descriptor, b []byte) error {
	if got := describe("", b); got.Digest != d.Digest || got.Size != d.Size {
		return errors.New("the descriptor is not that of the bytes")
	}
	if t.before != nil {
		if err := t.before(what, d); err != nil {
			return err
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	path := t.path(kind, d.Digest.Hex)
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, b) {
		return nil
	}
	t.pushed = append(t.pushed, d)
	return os.WriteFile(path, b, 0o644)
}

// manifests are those of one type.
func (t *dirTarget) manifests(artifactType string) (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range t.pushed {
		if d.ArtifactType == artifactType {
			n++
		}
	}
	return n
}

// open is an Opener.
func (t *dirTarget) open(_ context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	b, err := os.ReadFile(t.path("blobs", d.Digest.Hex))
	if err != nil {
		return nil, err
	}
	if got := describe("", b); got.Digest != d.Digest || got.Size != d.Size {
		return io.NopCloser(io.MultiReader(bytes.NewReader(b), failing{blockmap.ErrDigest})), nil
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

var testOptions = Options{Size: 256 << 20, ChunkSize: DefaultChunkSize, Level: 1}

// build builds, verifies what was built and reads the index back as a server
// would.
func build(t testing.TB, src *testSource, dst *dirTarget, o Options) *Result {
	t.Helper()
	if o.TempDir == "" {
		o.TempDir = t.TempDir()
	}
	res, err := Build(t.Context(), &src.Source, dst, o)
	if err != nil {
		t.Fatal(err)
	}
	m, ix := readBack(t, res, dst)
	if err := Verify(t.Context(), m, ix, dst.open, FromLayers, ""); err != nil {
		t.Fatalf("verify: %v", err)
	}
	if left, err := os.ReadDir(o.TempDir); err != nil || len(left) > 0 {
		t.Fatalf("left in the temporary directory: %v, %v", left, err)
	}
	return res
}

func readBack(t testing.TB, res *Result, dst *dirTarget) (*Image, *blockmap.Index) {
	t.Helper()
	m, err := ParseImage(res.Raw)
	if err != nil {
		t.Fatal(err)
	}
	b, err := dst.Blob(t.Context(), m.Index)
	if err != nil {
		t.Fatal(err)
	}
	ix, err := m.ParseIndex(b)
	if err != nil {
		t.Fatal(err)
	}
	return m, ix
}

// assemble writes the device that an index describes to a sparse file.
func assemble(t testing.TB, ix *blockmap.Index, dst *dirTarget) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "device")
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := out.Truncate(int64(ix.Blocks) * blockSize); err != nil {
		t.Fatal(err)
	}
	streams := make([]*os.File, len(ix.Streams))
	for i := range ix.Streams {
		streams[i] = unpackStream(t, &ix.Streams[i], dst)
		defer streams[i].Close()
	}
	b := make([]byte, 1<<20)
	for _, r := range ix.Runs {
		in := io.NewSectionReader(streams[r.Stream], int64(r.Block)*blockSize, int64(r.Count)*blockSize)
		if _, err := io.CopyBuffer(struct{ io.Writer }{io.NewOffsetWriter(out, int64(r.Device)*blockSize)}, struct{ io.Reader }{in}, b); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// unpackStream decompresses a stream chunk by chunk, as the index says.
func unpackStream(t testing.TB, table *blockmap.Table, dst *dirTarget) *os.File {
	t.Helper()
	blob, err := os.ReadFile(dst.path("blobs", table.Blob.String()))
	if err != nil {
		t.Fatal(err)
	}
	dec, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	f, err := os.CreateTemp(t.TempDir(), "stream")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range table.Chunks {
		b, err := dec.DecodeAll(blob[c.Offset:c.Offset+int64(c.Stored)], nil)
		if err != nil || len(b) != c.Size() {
			t.Fatalf("chunk at block %d: %d bytes, %v; want %d", c.Block, len(b), err, c.Size())
		}
		if _, err := f.WriteAt(b, int64(c.Block)*blockSize); err != nil {
			t.Fatal(err)
		}
	}
	return f
}
