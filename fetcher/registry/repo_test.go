package registry

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

var amd64 = v1.Platform{OS: "linux", Architecture: "amd64"}

// A Repo behaves in the same way for every medium.
func TestMedia(t *testing.T) {
	media(t, func(t *testing.T, place string) {
		ctx := context.Background()
		c := newClient(t, Options{})
		r := openRepo(t, c, place+":v1")
		layer := noise(3<<20+17, 1) // more than goes in one request
		img, l := pushImage(t, ctx, r, "v1", layer, amd64)

		got, err := r.Resolve(ctx, &amd64)
		if err != nil {
			t.Fatal(err)
		}
		if got.Digest != img.Digest || got.Manifest.Layers[0].Digest != l.Digest || hashOf(got.Raw) != img.Digest || got.Index != nil {
			t.Errorf("resolved %+v, want %s", got, img.Digest)
		}
		if got, err := openRepo(t, c, place+"@"+img.Digest.String()).Resolve(ctx, nil); err != nil || got.Digest != img.Digest {
			t.Errorf("by digest: %v, %v", got, err)
		}
		if err := r.CheckAccess(ctx); err != nil {
			t.Error(err)
		}
		if err := r.CheckPush(ctx); err != nil {
			t.Error(err)
		}

		t.Run("blobs", func(t *testing.T) {
			for _, d := range []v1.Descriptor{l, got.Manifest.Config} {
				if has, err := r.HasBlob(ctx, d); err != nil || !has {
					t.Errorf("has %s: %v, %v", d.Digest, has, err)
				}
				b, err := r.Blob(ctx, d)
				if err != nil || hashOf(b) != d.Digest {
					t.Errorf("blob %s: %d bytes, %v", d.Digest, len(b), err)
				}
			}
			if sent, err := r.PushBlob(ctx, l, "/nonexistent", nil); err != nil || sent {
				t.Errorf("an existing blob was sent again: %v, %v", sent, err)
			}
			absent := describe([]byte("absent"), types.OCILayer)
			if has, err := r.HasBlob(ctx, absent); err != nil || has {
				t.Errorf("has an absent blob: %v, %v", has, err)
			}
			if _, err := r.OpenBlob(ctx, absent); !errors.Is(err, ErrNotFound) || Temporary(err) {
				t.Errorf("open of an absent blob: %v", err)
			}
			if _, err := r.OpenRange(ctx, digestOf(absent.Digest), 0, 1); !errors.Is(err, ErrNotFound) {
				t.Errorf("range of an absent blob: %v", err)
			}
			short := l
			short.Size--
			if _, err := r.Blob(ctx, short); err == nil {
				t.Error("a descriptor with the wrong size is believed")
			}
			empty, err := r.PushBytes(ctx, nil, types.OCILayer)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := r.Blob(ctx, empty); err != nil || len(b) != 0 {
				t.Errorf("empty blob: %q, %v", b, err)
			}
		})
		t.Run("ranges", func(t *testing.T) {
			size := int64(len(layer))
			for _, x := range []struct{ off, n int64 }{{0, 1}, {0, size}, {1, 4096}, {size - 1, 1}, {1 << 20, 1 << 20}, {5, 0}} {
				rc, err := r.OpenRange(ctx, digestOf(l.Digest), x.off, x.n)
				if err != nil {
					t.Errorf("%+v: %v", x, err)
					continue
				}
				b, err := io.ReadAll(rc)
				rc.Close()
				if err != nil || !bytes.Equal(b, layer[x.off:x.off+x.n]) {
					t.Errorf("%+v: %d bytes, %v", x, len(b), err)
				}
			}
			for _, x := range []struct{ off, n int64 }{{size, 1}, {size - 1, 2}, {size + 10, 5}, {-1, 2}, {0, -1}, {1, 1<<63 - 1}} {
				rc, err := r.OpenRange(ctx, digestOf(l.Digest), x.off, x.n)
				if err == nil {
					_, err = io.ReadAll(rc)
					rc.Close()
				}
				if err == nil {
					t.Errorf("%+v: read beyond the end", x)
				}
			}
		})
		t.Run("tags", func(t *testing.T) {
			raw, err := r.Manifest(ctx, img)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.PushManifest(ctx, raw, img.MediaType, "v2"); err != nil {
				t.Fatal(err)
			}
			for _, tag := range []string{"v1", "v2"} {
				if d, err := r.Lookup(ctx, r.Ref().WithTag(tag)); err != nil || d.Digest != img.Digest {
					t.Errorf("%s: %v, %v", tag, d, err)
				}
			}
			if _, err := r.Lookup(ctx, r.Ref().WithTag("v3")); !errors.Is(err, ErrNotFound) {
				t.Errorf("absent tag: %v", err)
			}
			other, _ := pushImage(t, ctx, r, "v2", []byte("other"), amd64)
			if d, err := r.Lookup(ctx, r.Ref().WithTag("v2")); err != nil || d.Digest != other.Digest {
				t.Errorf("moved tag: %v, %v", d, err)
			}
			if d, err := r.Lookup(ctx, r.Ref().WithTag("v1")); err != nil || d.Digest != img.Digest {
				t.Errorf("other tag: %v, %v", d, err)
			}
		})
		t.Run("referrers", func(t *testing.T) {
			if _, err := r.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
				t.Fatal(err)
			}
			if found, err := r.Referrers(ctx, img); err != nil || len(found) != 0 {
				t.Fatalf("before any was pushed: %v, %v", found, err)
			}
			a := push(t, ctx, r, "", artifact(img, "application/vnd.test.a", map[string]string{"k": "v"}))
			b := push(t, ctx, r, "", artifact(img, "application/vnd.test.b", nil))
			push(t, ctx, r, "", artifact(img, "application/vnd.test.a", map[string]string{"k": "v"})) // again
			all, err := r.Referrers(ctx, img)
			if err != nil || len(all) != 2 {
				t.Fatalf("%v, %v", all, err)
			}
			found, err := r.Referrers(ctx, img, "application/vnd.test.a")
			if err != nil || len(found) != 1 {
				t.Fatalf("%v, %v", found, err)
			}
			if d := found[0]; d.Digest != a.Digest || d.Size != a.Size || d.ArtifactType != "application/vnd.test.a" || d.MediaType != a.MediaType {
				t.Errorf("%+v", d)
			}
			if found[0].Annotations["k"] != "v" {
				t.Errorf("annotations: %v", found[0].Annotations)
			}
			if !slices.ContainsFunc(all, func(d v1.Descriptor) bool { return d.Digest == b.Digest }) {
				t.Errorf("%s is not among %v", b.Digest, all)
			}
			if _, err := r.Manifest(ctx, found[0]); err != nil {
				t.Error(err)
			}
		})
	})
}
