package flatten

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// distant makes the only layer of src one that can be read from an offset, and that is cut
// off after some bytes unless that is negative. It returns where the last read began.
func (s *testSource) distant(stored []byte, cut int) *int64 {
	from := new(int64)
	open := func(off int64, before []byte) (io.ReadCloser, error) {
		*from = off
		r := io.Reader(bytes.NewReader(stored[off:]))
		if cut >= 0 {
			r = io.MultiReader(bytes.NewReader(stored[off:cut]), failing{errPush})
		} else if !bytes.Equal(before, stored[:off]) {
			r = io.MultiReader(bytes.NewReader(stored[off:len(stored)-1]), failing{blockmap.ErrDigest})
		}
		return io.NopCloser(r), nil
	}
	s.Layers[0].Open = func(context.Context) (io.ReadCloser, error) { return open(0, nil) }
	s.Layers[0].OpenFrom = func(_ context.Context, off int64, before io.Reader) (io.ReadCloser, error) {
		b, err := io.ReadAll(before)
		if err != nil || int64(len(b)) != off {
			return nil, fmt.Errorf("%d of %d bytes: %w", len(b), off, err)
		}
		return open(off, b)
	}
	return from
}

// A build goes on with what an earlier one has read or converted of a large layer, and
// begins again where that is damaged.
func TestResume(t *testing.T) {
	tarred := tarball(t, reg("f", noise(1, 20<<20)))
	src := newSource(t, plain, tarred)
	size := int64(len(tarred))
	whole := newTarget(t)
	o := testOptions
	o.Tag = "tag"
	want := build(t, src, whole, o)
	change := func(prefix string, f func(b []byte) []byte) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			found, err := filepath.Glob(filepath.Join(dir, tempPrefix+"*", prefix+"*"))
			if err != nil || len(found) != 1 {
				t.Fatalf("kept: %q, %v", found, err)
			}
			b, err := os.ReadFile(found[0])
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(found[0], f(b), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	nothing := func(*testing.T, string) {}
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	old := func(t *testing.T, dir string) {
		found, err := filepath.Glob(filepath.Join(dir, tempPrefix+"*", "*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			if err := os.Chtimes(f, time.Time{}, time.Now().Add(-resumeFor-time.Minute)); err != nil {
				t.Fatal(err)
			}
		}
	}
	const cut = 17 << 20
	for _, c := range []struct {
		name   string
		pushed bool // the first build fails when it pushes, and else when it reads
		happen func(t *testing.T, dir string)
		from   int64 // where the layer is read from then, -1: it is not
	}{
		{"cut off", false, nothing, cut},
		{"what was read is damaged", false, change(partPrefix, flip), 0},
		{"what was read is empty", false, change(partPrefix, func([]byte) []byte { return nil }), 0},
		{"more was read than there is", false, change(partPrefix, func(b []byte) []byte { return append(b, make([]byte, 10<<20)...) }), 0},
		{"what was read is old", false, old, 0},
		{"not pushed", true, nothing, -1},
		{"the stream is damaged", true, change(streamPrefix, flip), 0},
		{"the stream is cut short", true, change(streamPrefix, func(b []byte) []byte { return b[:100] }), 0},
		{"the TOC is damaged", true, change(tocPrefix, flip), 0},
		{"the TOC is empty", true, change(tocPrefix, func([]byte) []byte { return nil }), 0},
		{"the conversion is old", true, old, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := o
			o.TempDir = t.TempDir()
			dst := newTarget(t)
			if c.pushed {
				src.distant(tarred, -1)
				dst.before = func(what string, _ v1.Descriptor) error {
					if what == "file" {
						return errPush
					}
					return nil
				}
			} else {
				src.distant(tarred, cut)
			}
			_, err := Build(t.Context(), &src.Source, dst, o)
			u, ok := errors.AsType[*Unfinished](err)
			if !errors.Is(err, errPush) || !ok || !strings.Contains(u.Reuse(), o.TempDir) {
				t.Fatalf("%v", err)
			}
			c.happen(t, o.TempDir)
			from := src.distant(tarred, -1)
			*from = -1
			dst.before = nil
			if res := build(t, src, dst, o); !bytes.Equal(res.Raw, want.Raw) {
				t.Error("another image")
			}
			if *from != c.from {
				t.Errorf("the layer is read from byte %d on, want %d of %d", *from, c.from, size)
			}
		})
	}
}

// What a build keeps of layers gives way to its streams.
func TestPartsMakeRoom(t *testing.T) {
	need(t, "root", "mount")
	temp := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", temp)
	t.Cleanup(func() { unix.Unmount(temp, unix.MNT_DETACH) })
	tarred := tarball(t, reg("f", noise(1, 20<<20)))
	src := newSource(t, plain, tarred)
	src.distant(tarred, -1)
	o := testOptions
	o.TempDir = temp
	build(t, src, newTarget(t), o)
}

// Whatever writes a stream makes room for it, io.Copy too.
func TestCopyMakesRoom(t *testing.T) {
	need(t, "root", "mount")
	temp := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", temp)
	t.Cleanup(func() { unix.Unmount(temp, unix.MNT_DETACH) })
	d, err := newTempDir(temp)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Remove()
	writeFile(t, filepath.Join(d.path, partPrefix+"other"), make([]byte, 2<<20))
	f, err := d.create()
	if err != nil {
		t.Fatal(err)
	}
	defer f.discard()
	want := []byte(noise(1, 2<<20))
	if n, err := io.Copy(f, struct{ io.Reader }{bytes.NewReader(want)}); err != nil || f.size != n {
		t.Errorf("%d bytes were copied, %d are counted: %v", n, f.size, err)
	}
	if got, err := os.ReadFile(f.Name()); err != nil || !bytes.Equal(got, want) {
		t.Errorf("wrong bytes, or %v", err)
	}
}
