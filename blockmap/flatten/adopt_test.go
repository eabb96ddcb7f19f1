package flatten

import (
	"bytes"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// A build takes conversions from another place, mounted or copied, and leaves them in
// the target. What is damaged there, or is not what it says, is converted again.
func TestReuseOfPlaces(t *testing.T) {
	src := threeLayers(t)
	o := testOptions
	o.Tag = "tag"
	place := newTarget(t)
	want := build(t, src, place, o)
	stream := func(i int) string { return place.path("blobs", want.Index.Streams[1+i].Blob.String()) }
	tag := func(i int) string {
		b := newBuilder(&src.Source, place, o)
		var err error
		if b.diffIDs, err = diffIDs(&src.Source); err != nil {
			t.Fatal(err)
		}
		return place.path("tags", b.layerTag(i))
	}
	for _, c := range []struct {
		name   string
		mounts bool
		happen func() (undo func())
		opened int32
	}{
		{name: "copied", happen: func() func() { return func() {} }},
		{name: "mounted", mounts: true, happen: func() func() { return func() {} }},
		{name: "a stream is gone", happen: func() func() { return without(t, stream(1), nil) }, opened: 1},
		{name: "a stream is altered", happen: func() func() {
			return without(t, stream(0), func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
		}, opened: 1},
		{name: "a tag leads to the conversion of another layer", mounts: true, happen: func() func() {
			other, err := os.ReadFile(tag(0))
			if err != nil {
				t.Fatal(err)
			}
			return without(t, tag(2), func([]byte) []byte { return other })
		}, opened: 1},
		{name: "a tag leads to another layer's TOC", mounts: true, happen: func() func() {
			digest, err := os.ReadFile(tag(0))
			if err != nil {
				t.Fatal(err)
			}
			return without(t, place.path("manifests", string(digest)), func(raw []byte) []byte {
				var m v1.Manifest
				if err := json.Unmarshal(raw, &m); err != nil {
					t.Fatal(err)
				}
				toc, err := place.Blob(t.Context(), m.Layers[0])
				if err != nil {
					t.Fatal(err)
				}
				m.Layers[0] = describe(MediaTypeTOC, toc[:len(toc)/2])
				if err := place.PushBytes(t.Context(), m.Layers[0], toc[:len(toc)/2]); err != nil {
					t.Fatal(err)
				}
				raw, err = json.Marshal(m)
				if err != nil {
					t.Fatal(err)
				}
				return raw
			})
		}, opened: 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			defer c.happen()()
			dst := newTarget(t)
			dst.mounts = c.mounts
			o := o
			o.Reuse = []Place{newTarget(t), place}
			src.opened.Store(0)
			res := build(t, src, dst, o)
			if n := src.opened.Load(); n != c.opened || !bytes.Equal(res.Raw, want.Raw) {
				t.Errorf("%d layers were converted, want %d; the same image: %v", n, c.opened, bytes.Equal(res.Raw, want.Raw))
			}
			if c.mounts != (dst.mounted > 0) {
				t.Errorf("%d blobs were mounted", dst.mounted)
			}
			if reused := slices.IndexFunc(res.Layers, func(l LayerResult) bool { return l.Reused }); c.opened < 3 && reused < 0 {
				t.Error("no layer counts as reused")
			}
			// From then on the target has them itself.
			src.opened.Store(0)
			o.Reuse = nil
			if build(t, src, dst, o); src.opened.Load() != 0 {
				t.Errorf("the next build converts %d layers", src.opened.Load())
			}
		})
	}
}

// without changes a file, or removes it, until undo.
func without(t *testing.T, path string, change func([]byte) []byte) (undo func()) {
	t.Helper()
	was, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if change == nil {
		err = os.Remove(path)
	} else {
		err = os.WriteFile(path, change(bytes.Clone(was)), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.WriteFile(path, was, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// A place that holds a forged conversion of a layer, from which no image can be put
// together, does not fail a build, and the target keeps a right one.
func TestPlaceThatLies(t *testing.T) {
	src := threeLayers(t)
	o := testOptions
	o.Tag = "tag"
	place := newTarget(t)
	want := build(t, src, place, o)
	b := newBuilder(&src.Source, place, o)
	var err error
	if b.diffIDs, err = diffIDs(&src.Source); err != nil {
		t.Fatal(err)
	}
	raw, err := place.Tagged(t.Context(), b.layerTag(1))
	if err != nil {
		t.Fatal(err)
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	var w tocWriter
	w.add(&entry{kind: kindHardLink, name: "a", link: strings.Repeat("b", 10)})
	toc, err := w.close(&want.Index.Streams[2])
	if err != nil {
		t.Fatal(err)
	}
	m.Layers[0] = describe(MediaTypeTOC, toc)
	if err := place.PushBytes(t.Context(), m.Layers[0], toc); err != nil {
		t.Fatal(err)
	}
	if err := b.push(t.Context(), &m, b.layerTag(1)); err != nil {
		t.Fatal(err)
	}
	dst := newTarget(t)
	o.Reuse = []Place{place}
	if res := build(t, src, dst, o); !bytes.Equal(res.Raw, want.Raw) {
		t.Error("another image")
	}
	src.opened.Store(0)
	if res := build(t, src, dst, o); !bytes.Equal(res.Raw, want.Raw) || src.opened.Load() != 0 {
		t.Errorf("the target has not got the right conversion: %d layers were converted again", src.opened.Load())
	}
}
