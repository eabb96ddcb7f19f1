package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
)

func TestParseMirrors(t *testing.T) {
	got, err := ParseMirrors(strings.NewReader(`
# comment
registry.example:5000  https://a.example,resolve http://10.0.0.7:5000/   # two
docker.io	https://cache.example/hub/x
registry.example:5000 http://[::1]:80/,resolve
`))
	want := Mirrors{
		"registry.example:5000": {{"https://a.example", true}, {"http://10.0.0.7:5000", false}, {"http://[::1]:80", true}},
		"index.docker.io":       {{"https://cache.example/hub/x", false}},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	for _, x := range []struct{ in, want string }{
		{"registry.example", "line 1: registry.example has no mirror"},
		{"\nhttps://registry.example https://a", "line 2"},
		{"r.example a.example", "must begin with http"},
		{"r.example ftp://a.example", "must begin with http"},
		{"r.example https://u:p@a.example", "credentials"},
		{"r.example https://a.example/?x=1", "prefix"},
		{"r.example https://a.example/UPPER", "cannot begin"},
		{"r.example https://a.example/../x", "cannot begin"},
		{"r.example https://", "not a host"},
		{"r.example https://a.example,trust", "the only mark of a mirror is resolve"},
		{"r.example https://a.example,resolve,resolve", "the only mark of a mirror is resolve"},
		{"r.example https://a.example,", "the only mark of a mirror is resolve"},
		{"r.example ,resolve", "must begin with http"},
		{"r.example" + strings.Repeat(" https://a.example", 17), "more than 16"},
		{strings.Repeat("x", 100_000), "hosts file"},
	} {
		if _, err := ParseMirrors(strings.NewReader(x.in)); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%.40q: %v, want %q", x.in, err, x.want)
		}
	}
}

func FuzzParseMirrors(f *testing.F) {
	f.Add("registry.example:5000 https://a.example http://10.0.0.7:5000/p # x\n")
	f.Add("docker.io https://cache.example/hub/x\n\n#")
	f.Fuzz(func(t *testing.T, s string) {
		m, err := ParseMirrors(strings.NewReader(s))
		if err != nil {
			return
		}
		c := New(Options{Mirrors: m})
		defer c.Close()
		for host := range m {
			// A registry whose host is in no image's name is never asked.
			ref, err := ParseRef(host + "/app:v1")
			if err != nil {
				continue
			}
			if _, err := c.Open(ref); err != nil {
				t.Errorf("%q: %v", s, err)
			}
		}
	})
}

func TestMirrors(t *testing.T) {
	ctx := context.Background()
	origin := newFaulty(t, dockerRegistry(t, ""))
	mirror := newFaulty(t, memoryRegistry(t, true))
	plain := newClient(t, Options{})
	layer := noise(300_000, 1)
	var image = openRepo(t, plain, origin.host()+"/app:v1")
	img, l := pushImage(t, ctx, image, "v1", layer, amd64)
	other, _ := pushImage(t, ctx, image, "only", []byte("only at the origin"), amd64)
	pushImage(t, ctx, openRepo(t, plain, mirror.host()+"/cache/app:v1"), "v1", layer, amd64)
	mirrors := Mirrors{origin.host(): {{URL: "http://" + freeAddr(t)}, {URL: mirror.URL + "/cache"}}}

	open := func(t *testing.T) *Repo {
		origin.set(nil)
		mirror.set(nil)
		origin.requests.Store(0)
		mirror.requests.Store(0)
		return openRepo(t, newClient(t, Options{Mirrors: mirrors, leastLate: time.Minute, leastRest: time.Minute}), origin.host()+"/app:v1")
	}
	check := func(t *testing.T, r *Repo, n int) {
		t.Helper()
		for i := range n {
			if b, err := readRange(ctx, r, l.Digest, int64(i), 1000); err != nil || !bytes.Equal(b, layer[i:i+1000]) {
				t.Fatalf("%d bytes, %v", len(b), err)
			}
		}
	}
	asked := func(t *testing.T, wantMirror, wantOrigin int64) {
		t.Helper()
		if m, o := mirror.requests.Swap(0), origin.requests.Swap(0); m != wantMirror || o != wantOrigin {
			t.Errorf("the mirror was asked %d times, the origin %d; want %d and %d", m, o, wantMirror, wantOrigin)
		}
	}
	fail := func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(500); return true }

	t.Run("first", func(t *testing.T) {
		r := open(t)
		if got, err := r.Resolve(ctx, nil); err != nil || got.Digest != img.Digest {
			t.Fatal(err)
		}
		check(t, r, 5)
		if b, err := r.Blob(ctx, l); err != nil || !bytes.Equal(b, layer) {
			t.Error(err)
		}
		asked(t, 6, 1) // what the tag leads to the origin says
		s := r.client.Stats()
		if len(s) != 3 || s[1].MirrorOf != origin.host() || s[1].Requests != 6 || s[1].Bytes < int64(len(layer))+5000 ||
			s[0].Errors[0] == 0 || !s[0].Resting || s[1].Resting || s[2].Requests != 1 {
			t.Errorf("%+v", s)
		}
	})
	t.Run("what it has not got", func(t *testing.T) {
		r := open(t)
		d, err := r.Lookup(ctx, r.Ref().WithDigest(other.Digest))
		if err != nil || d.Digest != other.Digest {
			t.Fatal(err)
		}
		asked(t, 1, 1)
		// The client does not ask it for the same blob again, but for all others.
		if _, err := r.Manifest(ctx, d); err != nil {
			t.Error(err)
		}
		asked(t, 0, 1)
		check(t, r, 1)
		asked(t, 1, 0)
	})
	t.Run("it fails", func(t *testing.T) {
		r := open(t)
		mirror.set(fail)
		check(t, r, 5)
		asked(t, 1, 5)
	})
	t.Run("the origin fails too", func(t *testing.T) {
		r := open(t)
		mirror.set(fail)
		check(t, r, 1)
		mirror.set(nil)
		origin.set(fail)
		check(t, r, 2) // the mirror was not asked before, and is now
		asked(t, 3, 3)
	})
	t.Run("it breaks off", func(t *testing.T) {
		r := open(t)
		mirror.set(func(w http.ResponseWriter, req *http.Request) bool {
			if isBlob(req) {
				partly(w, req, layer, 0.5, true)
			}
			return isBlob(req)
		})
		if _, err := readRange(ctx, r, l.Digest, 0, 1000); !Temporary(err) {
			t.Errorf("%v", err)
		}
		check(t, r, 3)
		asked(t, 1, 3)
	})
	t.Run("it sends wrong bytes", func(t *testing.T) {
		r := open(t)
		rc, err := r.OpenRange(ctx, digestOf(l.Digest), 0, 1000)
		if err != nil {
			t.Fatal(err)
		}
		if s := rc.(*Body).Source(); s != mirror.URL {
			t.Errorf("source %q", s)
		}
		rc.(*Body).Distrust()
		rc.Close()
		asked(t, 1, 0)
		check(t, r, 3)
		asked(t, 0, 3)
		// Not even if there is no other source.
		origin.set(fail)
		if _, err := readRange(ctx, r, l.Digest, 0, 10); !errors.Is(err, ErrUnavailable) {
			t.Errorf("%v", err)
		}
		asked(t, 0, 1)
	})
	t.Run("wrong manifests and blobs", func(t *testing.T) {
		r := open(t)
		mirror.set(func(w http.ResponseWriter, req *http.Request) bool {
			if isBlob(req) {
				w.Write(bytes.Repeat([]byte("x"), len(layer)))
			} else {
				fmt.Fprint(w, `{"schemaVersion":2,"config":{},"layers":[]}`)
			}
			return true
		})
		if b, err := r.Blob(ctx, l); err != nil || !bytes.Equal(b, layer) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
		r = openRepo(t, newClient(t, Options{Mirrors: mirrors}), origin.host()+"/app:v1")
		if _, err := r.Manifest(ctx, img); err != nil {
			t.Error(err)
		}
	})
	t.Run("referrers and pushes", func(t *testing.T) {
		r := open(t)
		if _, err := r.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
			t.Fatal(err)
		}
		a := push(t, ctx, r, "", artifact(img, "application/vnd.test", nil))
		if n := mirror.requests.Load(); n != 0 {
			t.Errorf("the mirror was asked %d times for a push", n)
		}
		// The mirror has the API and knows no referrers; the client does not believe
		// it.
		found, err := r.Referrers(ctx, img, "application/vnd.test")
		if err != nil || len(found) != 1 || found[0].Digest != a.Digest {
			t.Errorf("%v, %v", found, err)
		}
	})
	t.Run("credentials", func(t *testing.T) {
		origin.set(nil)
		mirror.set(nil)
		s := newTokenServer(t, "one", time.Minute)
		var hosts atomic.Int64
		c := newClient(t, Options{Mirrors: Mirrors{origin.host(): {{URL: s.registry.URL + "/team"}}},
			Credentials: func(_ context.Context, registry, repository string) (Login, error) {
				if registry != hostOf(s.registry) || repository != "team/app" {
					t.Errorf("credentials for %s/%s", registry, repository)
				}
				hosts.Add(1)
				return Login{}, nil
			}})
		// The mirror refuses; the origin allows anonymous reads.
		r := openRepo(t, c, origin.host()+"/app:v1")
		check(t, r, 3)
		if hosts.Load() != 1 {
			t.Errorf("asked %d times", hosts.Load())
		}
	})
}

// The client avoids a mirror for longer each time, but not forever.
func TestMirrorRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const step = 10 * time.Millisecond
		s := &source{name: "m", mirrorOf: "r", log: new(lockedBuffer).logger()}
		rest := func() time.Duration {
			start := time.Now()
			for s.resting(time.Now()) {
				time.Sleep(step)
			}
			return time.Since(start)
		}
		lengths := make(map[time.Duration]bool)
		for i := range 12 {
			for range 10 { // those under way at once count once
				s.failed(0, ErrUnavailable)
			}
			want := min(restAfterFailure<<i, maxRestAfterFailure)
			d := rest()
			if d < want/2 || d > want+step {
				t.Errorf("failure %d: rested for %v, want up to %v", i, d, want)
			}
			lengths[d] = true
		}
		if len(lengths) < 10 {
			t.Errorf("mirrors that failed together are asked together: %v", lengths)
		}
		s.succeeded()
		s.failed(0, ErrUnavailable)
		if d := rest(); d > time.Second+step {
			t.Errorf("after a success: %v", d)
		}
		s.failed(5*time.Minute, ErrUnavailable)
		if d := rest(); d != 5*time.Minute {
			t.Errorf("as asked for: %v", d)
		}
		for want := restAfterWrong; want <= maxRestAfterWrong; want *= 2 {
			s.distrust()
			s.succeeded()
			if d := rest(); d != want {
				t.Errorf("wrong bytes: %v, want %v", d, want)
			}
		}
	})
}
