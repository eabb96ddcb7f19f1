package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// A poisoned mirror gives wrong answers to every request that no digest verifies:
// another image under the tag; another referrer of a pinned image, by the API and by
// both tags; and blobs that the registry does not have.
func poisoned(t *testing.T, origin string) (m *faulty, bad v1.Descriptor, lookups *atomic.Int64) {
	t.Helper()
	m = newFaulty(t, memoryRegistry(t, false))
	ctx := t.Context()
	plain := newClient(t, Options{})
	real := openRepo(t, plain, origin+"/app:v1")
	img, err := real.Resolve(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	fake := openRepo(t, plain, m.host()+"/app:v1")
	pushImage(t, ctx, fake, "v1", []byte("poison"), amd64)
	if _, err := fake.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
		t.Fatal(err)
	}
	bad = push(t, ctx, fake, "", artifact(img.Descriptor, "application/vnd.test", nil))
	list, err := json.Marshal(v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{{
		MediaType: bad.MediaType, Size: bad.Size, Digest: bad.Digest, ArtifactType: "application/vnd.test"}}})
	if err != nil {
		t.Fatal(err)
	}
	lookups = new(atomic.Int64)
	m.set(func(w http.ResponseWriter, r *http.Request) bool {
		mutable := strings.Contains(r.URL.Path, "/referrers/") || r.Method == http.MethodHead ||
			strings.Contains(r.URL.Path, "/manifests/") && !strings.Contains(r.URL.Path, "/manifests/sha256:")
		if mutable {
			lookups.Add(1)
		}
		if strings.Contains(r.URL.Path, "/referrers/") || strings.Contains(r.URL.Path, "/manifests/sha256-") {
			w.Header().Set("Content-Type", string(types.OCIImageIndex))
			w.Write(list)
			return true
		}
		if r.Method == http.MethodHead {
			w.Header().Set("Content-Length", "4")
			return true
		}
		return false
	})
	return m, bad, lookups
}

// Answers that no digest verifies come from the origin, and never from an untrusted
// mirror, even if the origin has nothing or is down.
func TestTrust(t *testing.T) {
	ctx := t.Context()
	const kind = "application/vnd.test"
	setUp := func(t *testing.T, resolve bool) (origin, mirror *faulty, r *Repo, img, bad v1.Descriptor, lookups *atomic.Int64) {
		origin = newFaulty(t, memoryRegistry(t, true))
		img, _ = pushImage(t, ctx, openRepo(t, newClient(t, Options{}), origin.host()+"/app:v1"), "v1", []byte("real"), amd64)
		mirror, bad, lookups = poisoned(t, origin.host())
		c := newClient(t, Options{Attempts: 2, Mirrors: Mirrors{origin.host(): {{URL: mirror.URL, Resolve: resolve}}}})
		return origin, mirror, openRepo(t, c, origin.host()+"/app:v1"), img, bad, lookups
	}
	t.Run("bytes alone", func(t *testing.T) {
		origin, mirror, r, img, _, lookups := setUp(t, false)
		absent := describe([]byte("away"), types.OCILayer)
		for _, down := range []bool{false, true} {
			if down {
				origin.set(func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(503); return true })
			}
			got, err := r.Resolve(ctx, nil)
			if down && !errors.Is(err, ErrUnavailable) || !down && (err != nil || got.Digest != img.Digest) {
				t.Errorf("down %v: resolved %v, %v", down, got, err)
			}
			found, err := r.Referrers(ctx, img, kind)
			if len(found) > 0 || !down && err != nil {
				t.Errorf("down %v: referrers %v, %v", down, found, err)
			}
			if has, err := r.HasBlob(ctx, absent); has || !down && err != nil {
				t.Errorf("down %v: has a blob: %v, %v", down, has, err)
			}
			if _, err := r.Lookup(ctx, r.Ref().WithTag("thaw-layer-x")); err == nil {
				t.Errorf("down %v: a tag that is nowhere is found", down)
			}
		}
		if n := lookups.Load(); n != 0 {
			t.Errorf("the mirror was asked for %d things that no digest vouches for", n)
		}
		if mirror.requests.Load() < 1 {
			t.Error("the mirror was not asked for anything")
		}
	})
	t.Run("resolve", func(t *testing.T) {
		_, _, r, img, bad, lookups := setUp(t, true)
		if got, err := r.Resolve(ctx, nil); err != nil || got.Digest == img.Digest {
			t.Errorf("%v, %v: a mirror that is trusted is not asked", got, err)
		}
		found, err := r.Referrers(ctx, img, kind)
		if err != nil || len(found) != 1 || found[0].Digest != bad.Digest {
			t.Errorf("%v, %v", found, err)
		}
		before := lookups.Load()
		if has, err := r.HasBlob(ctx, describe([]byte("away"), types.OCILayer)); has || err != nil {
			t.Errorf("has a blob: %v, %v", has, err)
		}
		if lookups.Load() != before {
			t.Error("a mirror was asked whether the registry has a blob")
		}
	})
	t.Run("resolve, without an origin", func(t *testing.T) {
		origin, _, r, _, _, _ := setUp(t, true)
		origin.Close()
		if _, err := r.Resolve(ctx, nil); err != nil {
			t.Error(err)
		}
	})
}

// Mirrors change at run time, also for open repositories.
func TestSetMirrors(t *testing.T) {
	ctx := t.Context()
	origin := newFaulty(t, memoryRegistry(t, true))
	one, two := newFaulty(t, origin.host()), newFaulty(t, origin.host())
	c := newClient(t, Options{Mirrors: Mirrors{origin.host(): {{URL: one.URL}}}})
	r := openRepo(t, c, origin.host()+"/app:v1")
	layer := noise(10_000, 1)
	_, l := pushImage(t, ctx, r, "v1", layer, amd64)
	read := func(want *faulty) {
		t.Helper()
		rc, err := r.OpenRange(ctx, digestOf(l.Digest), 5, 100)
		if err != nil {
			t.Fatal(err)
		}
		defer rc.Close()
		b := make([]byte, 100)
		if _, err := rc.Read(b[:]); err != nil || !bytes.HasPrefix(layer[5:], b[:1]) {
			t.Error(err)
		}
		if s := rc.(*Body).Source(); s != want.URL {
			t.Errorf("from %s, want %s", s, want.URL)
		}
	}
	read(one)
	c.SetMirrors(Mirrors{origin.host(): {{URL: "no URL"}, {URL: two.URL}}})
	read(two)
	c.SetMirrors(nil)
	read(origin)
}

// A list of referrers is only a claim. The client looks up missing fields in the
// manifest. A manifest with another subject does not count, whatever config type the
// list gives. One unreadable entry hides no other entry.
func TestReferrersUntyped(t *testing.T) {
	ctx := t.Context()
	f := newFaulty(t, memoryRegistry(t, true))
	r := openRepo(t, newClient(t, Options{}), f.host()+"/app:v1")
	img, _ := pushImage(t, ctx, r, "v1", []byte("x"), amd64)
	other, _ := pushImage(t, ctx, r, "v2", []byte("y"), amd64)
	if _, err := r.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
		t.Fatal(err)
	}
	ours := push(t, ctx, r, "", artifact(img, "application/vnd.test", map[string]string{"k": "v"}))
	theirs := push(t, ctx, r, "", artifact(other, "application/vnd.test", nil))
	for _, kind := range []string{"", string(types.OCIConfigJSON), string(types.DockerConfigJSON), string(types.OCIEmptyJSON), "application/vnd.x.config.v1+json"} {
		entry := func(d v1.Descriptor) string {
			d.ArtifactType = kind
			b, _ := json.Marshal(d)
			return string(b)
		}
		f.set(func(w http.ResponseWriter, req *http.Request) bool {
			if !strings.Contains(req.URL.Path, "/referrers/") {
				return false
			}
			w.Header().Set("Content-Type", "application/json")
			w.Write([]byte(`{"manifests":[{"mediaType":"x/y","size":1,"digest":"sha512:` + strings.Repeat("a", 128) + `"},` + entry(theirs) + "," + entry(ours) + `,7]}`))
			return true
		})
		found, err := r.Referrers(ctx, img, "application/vnd.test")
		if err != nil || len(found) != 1 || found[0].Digest != ours.Digest || found[0].Annotations["k"] != "v" {
			t.Errorf("%q: %v, %v", kind, found, err)
		}
	}
	// A manifest that is unavailable now is not the same as no manifest.
	f.set(func(w http.ResponseWriter, req *http.Request) bool {
		if strings.Contains(req.URL.Path, "/referrers/") {
			b, _ := json.Marshal(v1.IndexManifest{Manifests: []v1.Descriptor{{MediaType: ours.MediaType, Digest: ours.Digest, Size: ours.Size}}})
			w.Write(b)
			return true
		}
		w.WriteHeader(503)
		return true
	})
	if found, err := r.Referrers(ctx, img, "application/vnd.test"); !Temporary(err) {
		t.Errorf("%v, %v", found, err)
	}
}

// The log names a server that asks for a pause, once per pause.
func TestRetryAfterLogged(t *testing.T) {
	var log lockedBuffer
	f, r, l, _ := faultyRepo(t, Options{Log: log.logger()})
	var n atomic.Int64
	f.set(func(w http.ResponseWriter, _ *http.Request) bool {
		if n.Add(1) > 2 {
			return false
		}
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(429)
		return true
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if has, err := r.HasBlob(ctx, l); err != nil || !has {
		t.Errorf("%v, %v", has, err)
	}
	s := log.String()
	if c := strings.Count(s, "host="+f.host()); c < 1 || c > 2 || !strings.Contains(s, "level=INFO") || !strings.Contains(s, "seconds=1") {
		t.Errorf("logged %d times: %s", c, s)
	}
}
