package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// slowly puts a slow line before a registry: delay says how long each request and each
// answer takes.
func slowly(to http.Handler, delay func() time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(delay())
		to.ServeHTTP(w, r)
		time.Sleep(delay())
	})
}

// Several independent programs, at different distances from the registry, add to a list
// at once. When they are done, the list has everything that they report as pushed. The lines
// take up to 1.5 s each way.
func TestReferrersOfSlowLines(t *testing.T) {
	upTo := func(d time.Duration) func() time.Duration {
		return func() time.Duration { return rand.N(d) }
	}
	always := func(d time.Duration) func() time.Duration {
		return func() time.Duration { return d }
	}
	for name, lines := range map[string][]func() time.Duration{
		"300 ms apart":     {always(0), always(150 * time.Millisecond)},
		"a second apart":   {always(50 * time.Millisecond), always(550 * time.Millisecond)},
		"random":           {upTo(1500 * time.Millisecond), upTo(1500 * time.Millisecond)},
		"random and fast":  {upTo(1500 * time.Millisecond), always(0), upTo(300 * time.Millisecond)},
		"slow and fast":    {always(1400 * time.Millisecond), always(0)},
		"slow, fast, slow": {always(1500 * time.Millisecond), always(0), always(900 * time.Millisecond)},
	} {
		for trial := range 4 {
			synctest.Test(t, func(t *testing.T) {
				ctx := t.Context()
				n, registry := newNetwork(t), registryHandler(false)
				n.serve("registry.test", registry)
				r := n.open("registry.test/app:v1", Options{})
				img, _ := pushImage(t, ctx, r, "v1", []byte("x"), amd64)
				if _, err := r.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
					t.Fatal(err)
				}
				var pushers sync.WaitGroup
				for i, delay := range lines {
					host := fmt.Sprintf("line-%d.test", i)
					n.serve(host, slowly(registry, delay))
					r := n.open(host+"/app:v1", Options{Settle: settleTime})
					pushers.Go(func() {
						raw, err := json.Marshal(artifact(img, "application/vnd.test", map[string]string{"n": fmt.Sprint(i)}))
						if err == nil {
							_, err = r.PushManifest(ctx, raw, types.OCIManifestSchema1, "")
						}
						if err != nil {
							t.Errorf("%s, trial %d: %v", name, trial, err)
						}
					})
				}
				pushers.Wait()
				found, err := r.Referrers(ctx, img, "application/vnd.test")
				if err != nil || len(found) != len(lines) {
					t.Errorf("%s, trial %d: %d referrers of %d, %v", name, trial, len(found), len(lines), err)
				}
			})
		}
	}
}

// A push without competition takes longer by the settle time. Several pushes of one
// process do not take several times that.
func TestReferrersTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		const settle = 500 * time.Millisecond
		var requests atomic.Int64
		n, registry := newNetwork(t), registryHandler(false)
		n.serve("registry.test", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			requests.Add(1)
			registry.ServeHTTP(w, r)
		}))
		r := n.open("registry.test/app:v1", Options{Settle: settle})
		img, _ := pushImage(t, ctx, r, "v1", []byte("x"), amd64)
		if _, err := r.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
			t.Fatal(err)
		}
		requests.Store(0)
		start := time.Now()
		push(t, ctx, r, "", artifact(img, "application/vnd.test", map[string]string{"n": "alone"}))
		if took := time.Since(start); took < settle || took > settle*118/100 {
			t.Errorf("one took %v", took)
		}
		if n := requests.Load(); n > 8 {
			t.Errorf("%d requests", n)
		}
		const many = 12
		start = time.Now()
		var wg sync.WaitGroup
		for i := range many {
			wg.Go(func() {
				raw, err := json.Marshal(artifact(img, "application/vnd.test", map[string]string{"n": fmt.Sprint(i)}))
				if err == nil {
					_, err = r.PushManifest(ctx, raw, types.OCIManifestSchema1, "")
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(start); took > 3*settle {
			t.Errorf("%d took %v", many, took)
		}
		found, err := r.Referrers(ctx, img, "application/vnd.test")
		if err != nil || len(found) != many+1 {
			t.Errorf("%d referrers, %v", len(found), err)
		}
		e := r.reader.(*remote).origin
		e.mu.Lock()
		defer e.mu.Unlock()
		if len(e.mu.referrers) != 0 {
			t.Error("something is left of the lists")
		}
	})
}

// One of several pushing programs goes away: the entries of the others are listed
// nevertheless.
func TestReferrersLeaderGoes(t *testing.T) {
	addr := memoryRegistry(t, false)
	r := openRepo(t, newClient(t, Options{Settle: 300 * time.Millisecond}), addr+"/app:v1")
	img, _ := pushImage(t, t.Context(), r, "v1", []byte("x"), amd64)
	if _, err := r.PushBytes(t.Context(), []byte("{}"), types.OCIEmptyJSON); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			ctx := t.Context()
			if i < 2 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 100*time.Millisecond)
				defer cancel()
			}
			raw, _ := json.Marshal(artifact(img, "application/vnd.test", map[string]string{"n": fmt.Sprint(i)}))
			if _, err := r.PushManifest(ctx, raw, types.OCIManifestSchema1, ""); (err == nil) != (i >= 2) {
				t.Errorf("%d: %v", i, err)
			}
		})
	}
	wg.Wait()
	found, err := r.Referrers(t.Context(), img, "application/vnd.test")
	if err != nil || len(found) < 2 {
		t.Errorf("%v, %v", found, err)
	}
}

// A list is written with all its content, including fields that thaw does not know.
func TestReferrersKept(t *testing.T) {
	ctx := t.Context()
	r := openRepo(t, newClient(t, Options{}), memoryRegistry(t, false)+"/app:v1")
	img, _ := pushImage(t, ctx, r, "v1", []byte("x"), amd64)
	if _, err := r.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
		t.Fatal(err)
	}
	foreign := push(t, ctx, r, "", artifact(img, "application/vnd.foreign", nil))
	entry := fmt.Sprintf(`{"mediaType":%q,"size":%d,"digest":%q,"odd":{"x":1}}`, foreign.MediaType, foreign.Size, foreign.Digest)
	raw := `{"schemaVersion":2,"mediaType":"` + string(types.OCIImageIndex) + `","manifests":[` + entry + `],"annotations":{"whose":"theirs"},"more":5}`
	if _, err := r.PushManifest(ctx, []byte(raw), types.OCIImageIndex, fallbackTag(img.Digest)); err != nil {
		t.Fatal(err)
	}
	push(t, ctx, r, "", artifact(img, "application/vnd.test", nil))
	got, _, err := r.reader.manifest(ctx, r.Ref().WithTag(fallbackTag(img.Digest)))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{entry, `"whose":"theirs"`, `"more":5`, "application/vnd.test"} {
		if !strings.Contains(string(got), want) {
			t.Errorf("%s is not in %s", want, got)
		}
	}
}

// Whatever support a registry has for the referrers API and the fallback tag, a pushed
// artifact is found, or the push reports that it is not.
func TestReferrersOdd(t *testing.T) {
	type fault = func(w http.ResponseWriter, r *http.Request) bool
	status := func(code int, h ...string) fault {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			for i := 0; i+1 < len(h); i += 2 {
				w.Header().Set(h[i], h[i+1])
			}
			w.WriteHeader(code)
			return true
		}
	}
	says := func(contentType, body string) fault {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Type", contentType)
			fmt.Fprint(w, body)
			return true
		}
	}
	const index = string(types.OCIImageIndex)
	apis := map[string]fault{
		"real": nil, "404": status(404), "400": status(400), "401": status(401), "403": status(403), "405": status(405), "406": status(406),
		"500": status(500), "501": status(501), "503": status(503), "404 page": func(w http.ResponseWriter, r *http.Request) bool { http.NotFound(w, r); return true },
		"302 to a login": status(302, "Location", "/login"), "302 to nowhere": status(302), "to itself": func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
			return true
		},
		"a page": says("text/html", "<html>"), "nothing": says(index, ""), "nothing, as JSON": says("application/json", "{}"),
		"an error by 200": says("application/json", `{"errors":[{"code":"UNSUPPORTED"}]}`),
		"no manifests":    says(index, `{"schemaVersion":2,"manifests":[]}`), "null manifests": says(index, `{"schemaVersion":2,"manifests":null}`),
		"a list": says("application/json", `[]`), "sha512": says(index, `{"manifests":[{"mediaType":"a/b","size":1,"digest":"sha512:`+strings.Repeat("a", 128)+`"}]}`),
		"401 with a challenge": status(401, "Www-Authenticate", `Bearer realm="http://127.0.0.1:1/token",service="x"`),
		"401 Basic":            status(401, "Www-Authenticate", `Basic realm="x"`),
	}
	for api, answer := range apis {
		for tag, tags := range map[string]func(img v1.Descriptor) fault{
			"real": func(v1.Descriptor) fault { return nil },
			"gives the image": func(img v1.Descriptor) fault {
				return func(w http.ResponseWriter, r *http.Request) bool {
					r.URL.Path = strings.Replace(r.URL.Path, "/sha256-", "/sha256:", 1)
					return r.Method != http.MethodGet && status(201)(w, r)
				}
			},
			"refused": func(v1.Descriptor) fault {
				return func(w http.ResponseWriter, r *http.Request) bool {
					return r.Method == http.MethodPut && status(400)(w, r)
				}
			},
			"missing is 403": func(v1.Descriptor) fault {
				var there atomic.Bool
				return func(w http.ResponseWriter, r *http.Request) bool {
					if r.Method == http.MethodPut {
						there.Store(true)
					}
					return !there.Load() && status(403)(w, r)
				}
			},
			"missing is 401": func(v1.Descriptor) fault {
				var there atomic.Bool
				return func(w http.ResponseWriter, r *http.Request) bool {
					if r.Method == http.MethodPut {
						there.Store(true)
					}
					return !there.Load() && status(401)(w, r)
				}
			},
			"missing is 500": func(v1.Descriptor) fault {
				var there atomic.Bool
				return func(w http.ResponseWriter, r *http.Request) bool {
					if r.Method == http.MethodPut {
						there.Store(true)
					}
					return !there.Load() && status(500)(w, r)
				}
			},
			"accepted and forgotten": func(v1.Descriptor) fault {
				return func(w http.ResponseWriter, r *http.Request) bool {
					return r.Method == http.MethodPut && status(201)(w, r)
				}
			},
			"a page": func(v1.Descriptor) fault {
				return func(w http.ResponseWriter, r *http.Request) bool {
					return r.Method == http.MethodGet && says("text/html", "<html>")(w, r)
				}
			},
		} {
			t.Run(api+", tag "+tag, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					ctx := t.Context()
					n, registry := newNetwork(t), registryHandler(api == "real")
					var odd atomic.Pointer[fault]
					n.serve("registry.test", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						if f := odd.Load(); f == nil || !(*f)(w, r) {
							registry.ServeHTTP(w, r)
						}
					}))
					r := n.open("registry.test/app:v1", Options{Settle: 20 * time.Millisecond, Attempts: 3})
					img, _ := pushImage(t, ctx, r, "v1", []byte("x"), amd64)
					if _, err := r.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
						t.Fatal(err)
					}
					list := tags(img)
					absent := map[string]int{"missing is 401": 401, "missing is 403": 403, "missing is 500": 500}[tag]
					all := fault(func(w http.ResponseWriter, r *http.Request) bool {
						switch {
						case strings.Contains(r.URL.Path, "/referrers/") && answer != nil:
							return answer(w, r)
						case strings.Contains(r.URL.Path, "/manifests/sha256-") && list != nil:
							return list(w, r)
						case strings.Contains(r.URL.Path, "/manifests/absent-") && absent != 0:
							return status(absent)(w, r)
						}
						return false
					})
					odd.Store(&all)
					if found, err := r.Referrers(ctx, img, "application/vnd.test"); err != nil || len(found) != 0 {
						t.Errorf("before any was pushed: %v, %v", found, err)
					}
					for i := range 2 {
						a := push(t, ctx, r, "", artifact(img, "application/vnd.test", map[string]string{"n": fmt.Sprint(i)}))
						found, err := r.Referrers(ctx, img, "application/vnd.test")
						if err != nil || len(found) != i+1 || !slices.ContainsFunc(found, func(d v1.Descriptor) bool { return d.Digest == a.Digest }) {
							t.Errorf("after %d: %v, %v", i+1, found, err)
						}
					}
				})
			})
		}
	}
}

// If no list can be kept, the push reports that, and returns the pushed descriptor.
func TestReferrersUnlisted(t *testing.T) {
	ctx := t.Context()
	f := newFaulty(t, memoryRegistry(t, false))
	r := openRepo(t, newClient(t, Options{Settle: 50 * time.Millisecond, Attempts: 2}), f.host()+"/app:v1")
	img, _ := pushImage(t, ctx, r, "v1", []byte("x"), amd64)
	if _, err := r.PushBytes(ctx, []byte("{}"), types.OCIEmptyJSON); err != nil {
		t.Fatal(err)
	}
	for name, code := range map[string]int{"forbidden": 403, "failing": 500, "accepted": 201} {
		f.set(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "sha256-") {
				w.WriteHeader(code)
				return true
			}
			return false
		})
		raw, err := json.Marshal(artifact(img, "application/vnd.test", map[string]string{"n": name}))
		if err != nil {
			t.Fatal(err)
		}
		d, err := r.PushManifest(ctx, raw, types.OCIManifestSchema1, "")
		if !errors.Is(err, ErrUnlisted) || d.Digest != hashOf(raw) {
			t.Errorf("%s: %v, %v", name, d, err)
		}
		if _, err := r.Manifest(ctx, d); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
