package flatten

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"thaw/blockmap/ext4"
)

// threeLayers are as different as their number.
func threeLayers(t testing.TB) *testSource {
	t.Helper()
	var tars [][]byte
	for i := range uint64(3) {
		tars = append(tars, tarball(t, reg(fmt.Sprint("f", i), noise(i, 300_000))))
	}
	return newSource(t, gzipped, tars...)
}

var errPush = errors.New("the registry is on fire")

// TestPushFails lets each push of a build fail once, and builds again: nothing
// is left that is taken for whole, and no layer that was is opened again.
func TestPushFails(t *testing.T) {
	o := testOptions
	o.Jobs, o.Tag = 1, "tag"
	src := threeLayers(t)
	whole := newTarget(t)
	want := build(t, src, whole, o).Manifest.Digest
	var pushes atomic.Int32
	count := newTarget(t)
	count.before = func(string, v1.Descriptor) error { pushes.Add(1); return nil }
	build(t, src, count, o)
	if pushes.Load() < 3*3+1+4 {
		t.Fatalf("%d pushes", pushes.Load())
	}
	for fail := range pushes.Load() {
		dst := newTarget(t)
		var n atomic.Int32
		dst.before = func(string, v1.Descriptor) error {
			if n.Add(1) == fail+1 {
				return errPush
			}
			return nil
		}
		if _, err := Build(t.Context(), &src.Source, dst, o); !errors.Is(err, errPush) {
			t.Fatalf("push %d: %v", fail, err)
		} else if done := dst.manifests(ArtifactTypeLayer); done < 3 && !slices.ContainsFunc([]int{0, 1, 2}, func(i int) bool {
			return strings.Contains(err.Error(), fmt.Sprintf("layer %d of 3 (%v)", i+1, src.Layers[i].Digest))
		}) {
			t.Errorf("push %d: the error names no layer: %v", fail, err)
		}
		if n := dst.manifests(ArtifactTypeImage); n != 0 {
			t.Errorf("push %d: a manifest is there", fail)
		}
		if raw, _ := dst.Tagged(t.Context(), "tag"); raw != nil {
			t.Errorf("push %d: the tag is there", fail)
		}
		done := int32(dst.manifests(ArtifactTypeLayer))
		dst.before = nil
		src.opened.Store(0)
		res := build(t, src, dst, o)
		if opened := src.opened.Load(); opened != 3-done {
			t.Errorf("push %d: %d layers were whole, and %d were opened again", fail, done, opened)
		}
		if res.Manifest.Digest != want {
			t.Errorf("push %d: the second build gives %v, want %v", fail, res.Manifest.Digest, want)
		}
	}
}

// TestReuse builds again, after this and that has happened to the target.
func TestReuse(t *testing.T) {
	o := testOptions
	o.Tag = "tag"
	src := threeLayers(t)
	blob := func(dst *dirTarget, res *Result, layer int) string {
		return dst.path("blobs", res.Index.Streams[layer+1].Blob.String())
	}
	tag := func(layer int) string {
		var c v1.ConfigFile
		if err := json.Unmarshal(src.Config, &c); err != nil {
			t.Fatal(err)
		}
		b := &builder{Options: o, diffIDs: c.RootFS.DiffIDs}
		return b.layerTag(layer)
	}
	// retag puts a conversion with another TOC in the place of layer 1's.
	retag := func(t *testing.T, dst *dirTarget, media, artifact string, change func(toc []byte) []byte) {
		raw, err := dst.Tagged(t.Context(), tag(1))
		if err != nil {
			t.Fatal(err)
		}
		var m v1.Manifest
		if err := json.Unmarshal(raw, &m); err != nil {
			t.Fatal(err)
		}
		toc, err := dst.Blob(t.Context(), m.Layers[0])
		if err != nil {
			t.Fatal(err)
		}
		toc = change(toc)
		m.Layers[0] = describe(m.Layers[0].MediaType, toc)
		m.ArtifactType = artifact
		if err := dst.PushBytes(t.Context(), m.Layers[0], toc); err != nil {
			t.Fatal(err)
		}
		if raw, err = json.Marshal(m); err != nil {
			t.Fatal(err)
		}
		if err := dst.PushManifest(t.Context(), describe("", raw), raw, tag(1)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name   string
		happen func(t *testing.T, dst *dirTarget, res *Result)
		opened int32
	}{
		{"nothing", func(*testing.T, *dirTarget, *Result) {}, 0},
		{"a stream is gone", func(t *testing.T, dst *dirTarget, res *Result) {
			if err := os.Remove(blob(dst, res, 1)); err != nil {
				t.Fatal(err)
			}
		}, 1},
		{"a stream is cut short", func(t *testing.T, dst *dirTarget, res *Result) {
			if err := os.Truncate(blob(dst, res, 2), 1000); err != nil {
				t.Fatal(err)
			}
			// A registry tells by the digest, and would not have it.
			if err := os.Remove(blob(dst, res, 2)); err != nil {
				t.Fatal(err)
			}
		}, 1},
		{"a tag is gone", func(t *testing.T, dst *dirTarget, res *Result) {
			if err := os.Remove(dst.path("tags", tag(0))); err != nil {
				t.Fatal(err)
			}
		}, 1},
		{"a tag names an image", func(t *testing.T, dst *dirTarget, res *Result) {
			retag(t, dst, "", ArtifactTypeImage, func(b []byte) []byte { return b })
		}, 1},
		{"a TOC is cut short", func(t *testing.T, dst *dirTarget, res *Result) {
			retag(t, dst, "", ArtifactTypeLayer, func(b []byte) []byte { return b[:len(b)/2] })
		}, 1},
		{"a TOC lies about where a file is", func(t *testing.T, dst *dirTarget, res *Result) {
			retag(t, dst, "", ArtifactTypeLayer, func([]byte) []byte {
				var w tocWriter
				e := regularEntry("f1", 1<<20)
				e.inode.Data[0].Block = 1 << 20
				w.add(e)
				b, err := w.close(&res.Index.Streams[2])
				if err != nil {
					t.Fatal(err)
				}
				return b
			})
		}, 1},
		{"a TOC is of another stream", func(t *testing.T, dst *dirTarget, res *Result) {
			retag(t, dst, "", ArtifactTypeLayer, func([]byte) []byte {
				b, err := new(tocWriter).close(&res.Index.Streams[1])
				if err != nil {
					t.Fatal(err)
				}
				return b
			})
		}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			dst := newTarget(t)
			first := build(t, src, dst, o)
			c.happen(t, dst, first)
			src.opened.Store(0)
			second := build(t, src, dst, o)
			if n := src.opened.Load(); n != c.opened {
				t.Errorf("%d layers were opened, want %d", n, c.opened)
			}
			if !bytes.Equal(first.Raw, second.Raw) {
				t.Error("the manifests differ")
			}
		})
	}
}

// No blob is pushed twice at once: registries lose some of those.
func TestNoTwoPushesOfABlob(t *testing.T) {
	var tars [][]byte
	for i := range uint64(12) {
		tars = append(tars, tarball(t, reg(fmt.Sprint("f", i), noise(i, 3000))))
	}
	src := newSource(t, plain, tars...)
	dst := newTarget(t)
	var mu sync.Mutex
	under := make(map[v1.Hash]bool)
	dst.before = func(_ string, d v1.Descriptor) error {
		mu.Lock()
		twice := under[d.Digest]
		under[d.Digest] = true
		mu.Unlock()
		if twice {
			t.Errorf("%s is pushed twice at once", d.Digest)
		}
		runtime.Gosched()
		mu.Lock()
		delete(under, d.Digest)
		mu.Unlock()
		return nil
	}
	o := testOptions
	o.Jobs = 8
	for range 5 {
		if _, err := Build(t.Context(), &src.Source, dst, o); err != nil {
			t.Fatal(err)
		}
		dst.dir = newTarget(t).dir
	}
}

// refusing is a target that takes no tags of block images.
type refusing struct{ *dirTarget }

func (t refusing) PushManifest(ctx context.Context, d v1.Descriptor, raw []byte, tag string) error {
	if strings.HasPrefix(tag, "thaw-image-") {
		return errPush
	}
	return t.dirTarget.PushManifest(ctx, d, raw, tag)
}

// A tag that is one way of two to the image does not fail a build.
func TestImageTagIsRefused(t *testing.T) {
	src := threeLayers(t)
	want := build(t, src, newTarget(t), testOptions).Manifest.Digest
	dst := refusing{newTarget(t)}
	for range 2 {
		res, err := Build(t.Context(), &src.Source, dst, testOptions)
		if err != nil || res.Manifest.Digest != want {
			t.Fatal(err)
		}
	}
}

// A block image without a name has the tag that is made of its subject, and one
// with a name has no other; one that is not the pinned one is not pushed.
func TestImageTag(t *testing.T) {
	src := threeLayers(t)
	tag := ImageTag(src.Manifest.Digest)
	dst := newTarget(t)
	res := build(t, src, dst, testOptions)
	if raw, err := dst.Tagged(t.Context(), tag); err != nil || !bytes.Equal(raw, res.Raw) {
		t.Errorf("the tag %s: %v", tag, err)
	}
	dst = newTarget(t)
	o := testOptions
	o.Tag, o.Pin = "tag", res.Manifest.Digest.String()
	build(t, src, dst, o)
	if raw, _ := dst.Tagged(t.Context(), tag); raw != nil {
		t.Error("an image with a name has another tag")
	}
	dst = newTarget(t)
	o.Pin = "sha256:" + strings.Repeat("0", 64)
	if _, err := Build(t.Context(), &src.Source, dst, o); err == nil || !strings.Contains(err.Error(), "was pinned") {
		t.Errorf("another image than the pinned one: %v", err)
	}
	if n := dst.manifests(ArtifactTypeImage); n != 0 {
		t.Error("the manifest of another image than the pinned one is pushed")
	}
}

// TestFullDisk builds with a temporary directory of one MiB.
func TestFullDisk(t *testing.T) {
	need(t, "root", "mount")
	temp := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", temp)
	t.Cleanup(func() { run(t, "umount", temp) })
	src := newSource(t, plain, tarball(t, reg("small", "x")), tarball(t, reg("large", noise(1, 3<<20))))
	dst := newTarget(t)
	src.inTurn(dst)
	o := testOptions
	o.TempDir, o.Jobs = temp, 1
	_, err := Build(t.Context(), &src.Source, dst, o)
	if !errors.Is(err, unix.ENOSPC) || strings.Count(err.Error(), "no space left") != 1 || !strings.Contains(err.Error(), "layer 2 of 2") || !strings.Contains(err.Error(), temp) {
		t.Errorf("error %v", err)
	}
	if dst.manifests(ArtifactTypeLayer) != 1 || dst.manifests(ArtifactTypeImage) != 0 {
		t.Errorf("in the target: %v", dst.pushed)
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
		t.Errorf("left on the full disk: %v, %v", left, err)
	}
	o.TempDir = filepath.Join(temp, "nowhere")
	if _, err := Build(t.Context(), &src.Source, dst, o); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a temporary directory that is not there: %v", err)
	}
}

// TestCancel ends builds at each read of a layer.
func TestCancel(t *testing.T) {
	tarred := tarball(t, reg("a", noise(1, 1<<20)), reg("b", noise(2, 1<<20)))
	for after := range 4 {
		ctx, cancel := context.WithCancelCause(t.Context())
		src := newSource(t, plain, tarred)
		src.Layers[0].Open = func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(io.MultiReader(bytes.NewReader(tarred[:after<<19]), cancelling{cancel}, bytes.NewReader(tarred[after<<19:]))), nil
		}
		dst := newTarget(t)
		o := testOptions
		o.TempDir = t.TempDir()
		if _, err := Build(ctx, &src.Source, dst, o); !errors.Is(err, errPush) {
			t.Errorf("error %v, want the cause", err)
		}
		if len(dst.pushed) > 0 {
			t.Errorf("pushed: %v", dst.pushed)
		}
		if left, err := os.ReadDir(o.TempDir); err != nil || len(left) > 0 {
			t.Errorf("left in the temporary directory: %v, %v", left, err)
		}
	}
}

type cancelling struct{ cancel context.CancelCauseFunc }

func (c cancelling) Read([]byte) (int, error) {
	c.cancel(errPush)
	return 0, io.EOF
}

// TestDamagedConversion damages each part of each kept conversion in each way: the
// build goes on, gives the same image, and leaves nothing that is damaged.
func TestDamagedConversion(t *testing.T) {
	o := testOptions
	o.Tag = "tag"
	src := threeLayers(t)
	whole := newTarget(t)
	want := build(t, src, whole, o)
	type part struct{ kind, name string }
	var parts []part
	for _, kind := range []string{"blobs", "manifests", "tags"} {
		files, err := os.ReadDir(whole.path(kind, ""))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			parts = append(parts, part{kind, f.Name()})
		}
	}
	if len(parts) < 3*4+4 {
		t.Fatalf("%d parts", len(parts))
	}
	for way, damage := range map[string]func(b []byte) []byte{
		"gone":        func([]byte) []byte { return nil },
		"empty":       func([]byte) []byte { return []byte{} },
		"half":        func(b []byte) []byte { return b[:len(b)/2] },
		"a byte more": func(b []byte) []byte { return append(b, 0) },
		"altered":     func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"zeros":       func(b []byte) []byte { clear(b); return b },
		"another":     func([]byte) []byte { return []byte(`{"schemaVersion":2,"manifests":[]}`) },
	} {
		for _, p := range parts {
			if p.kind == "tags" && way != "gone" {
				continue // a registry's tag names a manifest or is not there
			}
			dst := newTarget(t)
			if err := os.CopyFS(filepath.Join(dst.dir, "copy"), os.DirFS(whole.dir)); err != nil {
				t.Fatal(err)
			}
			dst.dir = filepath.Join(dst.dir, "copy")
			file := dst.path(p.kind, p.name)
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if b = damage(b); b == nil {
				err = os.Remove(file)
			} else {
				err = os.WriteFile(file, b, 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
			res := build(t, src, dst, o) // and verifies
			if !bytes.Equal(res.Raw, want.Raw) {
				t.Errorf("%s of %s is %s: another image", p.name, p.kind, way)
			}
			for _, p := range parts {
				good, err := os.ReadFile(whole.path(p.kind, p.name))
				if err != nil {
					t.Fatal(err)
				}
				if got, err := os.ReadFile(dst.path(p.kind, p.name)); err != nil || !bytes.Equal(got, good) {
					t.Errorf("%s of %s, damaged as %s, is still not what it was: %v", p.name, p.kind, way, err)
				}
			}
		}
	}
}

// TestLookupFails has the target say all sorts of things to whoever looks for a
// conversion.
func TestLookupFails(t *testing.T) {
	src := threeLayers(t)
	dst := newTarget(t)
	want := build(t, src, dst, testOptions)
	for _, err := range []error{errors.New("401 unauthorized"), errors.New("500"), context.DeadlineExceeded, io.ErrUnexpectedEOF} {
		dst.tagged = func(string) error { return err }
		src.opened.Store(0)
		if res := build(t, src, dst, testOptions); !bytes.Equal(res.Raw, want.Raw) || src.opened.Load() != 3 {
			t.Errorf("%v: %d layers were opened", err, src.opened.Load())
		}
	}
	// But whoever gives up is heard.
	ctx, cancel := context.WithCancelCause(t.Context())
	dst.tagged = func(string) error { cancel(errPush); return ctx.Err() }
	o := testOptions
	o.TempDir = t.TempDir()
	if _, err := Build(ctx, &src.Source, dst, o); !errors.Is(err, errPush) {
		t.Errorf("%v", err)
	}
}

// TestConversionThatLies has conversions whose checksums are right, and from which
// no image can be put together.
func TestConversionThatLies(t *testing.T) {
	o := testOptions
	o.Tag = "tag"
	src := threeLayers(t)
	for name, entries := range map[string][]*entry{
		"a hard link to nothing":      {{kind: kindHardLink, name: "a", link: "b"}},
		"an attribute without room":   {{name: "a", inode: &ext4.Inode{Mode: modeFifo, Xattrs: []ext4.Xattr{{Name: "user.x", Value: make([]byte, 9000)}}}}},
		"a name that is too long":     {{name: strings.Repeat("x", 300), inode: &ext4.Inode{Mode: modeFifo}}},
		"the root is no directory":    {{name: "", inode: &ext4.Inode{Mode: modeFifo}}},
		"directories without an end":  {entryOf(strings.TrimSuffix(strings.Repeat("x/", 2040), "/"), modeDir), {name: "l", inode: &ext4.Inode{Mode: modeSymlink, Target: strings.Repeat("x/", 2040)}}, entryOf("l/"+strings.Repeat("y/", 100)+"z", modeDir)},
		"a device that Linux has not": {{name: "d", inode: &ext4.Inode{Mode: modeChar, Major: 1 << 20}}},
	} {
		dst := newTarget(t)
		want := build(t, src, dst, o)
		b := newBuilder(&src.Source, dst, o)
		var err error
		if b.diffIDs, err = diffIDs(&src.Source); err != nil {
			t.Fatal(err)
		}
		raw, err := dst.Tagged(t.Context(), b.layerTag(1))
		if err != nil {
			t.Fatal(err)
		}
		var m v1.Manifest
		if err := json.Unmarshal(raw, &m); err != nil {
			t.Fatal(err)
		}
		var w tocWriter
		for _, e := range entries {
			w.add(e)
		}
		toc, err := w.close(&want.Index.Streams[2])
		if err != nil {
			t.Fatal(err)
		}
		m.Layers[0] = describe(MediaTypeTOC, toc)
		if err := dst.PushBytes(t.Context(), m.Layers[0], toc); err != nil {
			t.Fatal(err)
		}
		if err := b.push(t.Context(), &m, b.layerTag(1)); err != nil {
			t.Fatal(err)
		}
		if res := build(t, src, dst, o); !bytes.Equal(res.Raw, want.Raw) {
			t.Errorf("%s: another image", name)
		}
		src.opened.Store(0)
		if res := build(t, src, dst, o); !bytes.Equal(res.Raw, want.Raw) || src.opened.Load() != 0 {
			t.Errorf("%s: the conversion was not replaced", name)
		}
		// Where tags are immutable it cannot be, which costs time and no image.
		if err := b.push(t.Context(), &m, b.layerTag(1)); err != nil {
			t.Fatal(err)
		}
		dst.before = func(what string, d v1.Descriptor) error {
			if d.ArtifactType == ArtifactTypeLayer {
				return errPush
			}
			return nil
		}
		if res := build(t, src, dst, o); !bytes.Equal(res.Raw, want.Raw) {
			t.Errorf("%s: another image", name)
		}
	}
}
