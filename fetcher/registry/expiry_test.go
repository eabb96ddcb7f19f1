package registry

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var signedAt = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)

func policy(s string) string {
	return strings.NewReplacer("+", "-", "=", "_", "/", "~").Replace(base64.StdEncoding.EncodeToString([]byte(s)))
}

// What signed URLs say about their end.
func TestExpiry(t *testing.T) {
	unix := fmt.Sprint(signedAt.Add(10 * time.Minute).Unix())
	for name, x := range map[string]struct {
		query string
		want  time.Duration // from signedAt; 0 for unknown
	}{
		"S3, version 4":             {"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20261126T115000Z&X-Amz-Expires=1200&X-Amz-Signature=0", 10 * time.Minute},
		"S3, lower case":            {"x-amz-date=20261126T120000Z&x-amz-expires=600", 10 * time.Minute},
		"Google, version 4":         {"X-Goog-Date=20261126T120000Z&X-Goog-Expires=600&X-Goog-Signature=0", 10 * time.Minute},
		"OSS, version 4":            {"x-oss-date=20261126T120000Z&x-oss-expires=600", 10 * time.Minute},
		"S3, version 2":             {"AWSAccessKeyId=A&Expires=" + unix + "&Signature=0", 10 * time.Minute},
		"Google, version 2":         {"GoogleAccessId=A&Expires=" + unix + "&Signature=0", 10 * time.Minute},
		"CloudFront":                {"Expires=" + unix + "&Signature=0&Key-Pair-Id=A", 10 * time.Minute},
		"CloudFront, custom policy": {"Policy=" + policy(`{"Statement":[{"Resource":"x","Condition":{"DateLessThan":{"AWS:EpochTime":`+unix+`}}}]}`) + "&Signature=0&Key-Pair-Id=A", 10 * time.Minute},
		"Azure":                     {"sv=2024-01-01&sr=b&st=2026-11-26T11:00:00Z&se=2026-11-26T12%3A10%3A00Z&sig=0", 10 * time.Minute},
		"Azure, minutes":            {"se=2026-11-26T12:10Z&sig=0", 10 * time.Minute},
		"Azure, a day":              {"se=2026-11-27&sig=0", 12 * time.Hour},
		"Tencent":                   {"q-sign-algorithm=sha1&q-sign-time=1;" + unix + "&q-signature=0", 0}, // a semicolon separates nothing
		"Tencent, encoded":          {"q-sign-algorithm=sha1&q-sign-time=1%3B" + unix + "&q-signature=0", 10 * time.Minute},
		"the earlier of two":        {"X-Amz-Date=20261126T120000Z&X-Amz-Expires=6000&Expires=" + unix + "&Signature=0", 10 * time.Minute},
		"expired":                   {"X-Amz-Date=20261126T110000Z&X-Amz-Expires=600", -50 * time.Minute},
		"for years":                 {"Expires=9999999999&Signature=0", maxLife},
		"not signed":                {"expires=" + unix, 0},
		"nothing":                   {"", 0},
		"Docker Hub":                {"verify=" + unix + "-0", 0}, // when it was signed, not until when
		"no date":                   {"X-Amz-Expires=600", 0},
		"no number":                 {"X-Amz-Date=20261126T120000Z&X-Amz-Expires=ten", 0},
		"a negative number":         {"X-Amz-Date=20261126T120000Z&X-Amz-Expires=-600", 0},
		"too large":                 {"Expires=99999999999999999999&Signature=0", 0},
		"a policy that is none":     {"Policy=%21%21&Signature=0", 0},
		"an empty policy":           {"Policy=" + policy(`{"Statement":[]}`), 0},
	} {
		got, known := lifeOf(&url.URL{RawQuery: x.query}, signedAt)
		want := x.want - min(max(x.want, 0)/10, expiryMargin)
		if known != (x.want != 0) || got != want {
			t.Errorf("%s: %v, %v; want %v", name, got, known, want)
		}
	}
}

func FuzzExpiry(f *testing.F) {
	f.Add("X-Amz-Date=20261126T120000Z&X-Amz-Expires=600")
	f.Add("Policy=" + policy(`{"Statement":[{"Condition":{"DateLessThan":{"AWS:EpochTime":1}}}]}`))
	f.Add("se=2026-11-27&sig=0&q-sign-time=1%3B2")
	f.Fuzz(func(t *testing.T, query string) {
		life, known := lifeOf(&url.URL{RawQuery: query}, signedAt)
		if life > maxLife || !known && life != 0 {
			t.Errorf("%q: %v, %v", query, life, known)
		}
	})
}

// A location is used until its signature expires, by the clock of the storage, and is then
// asked for again before the storage refuses it. A refusal costs one more request to the
// registry, and is no error of the registry's.
func TestLocationExpires(t *testing.T) {
	const life = 30 * time.Second
	layer := noise(1<<20, 4)
	for name, skew := range map[string]time.Duration{"same clock": 0, "a clock that is ahead": time.Hour, "a clock that is behind": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var asked, refused atomic.Int64
				var revoked atomic.Bool
				n := newNetwork(t)
				n.serve("storage.test", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					q := r.URL.Query()
					var expires int64
					fmt.Sscan(q.Get("Expires"), &expires)
					w.Header().Set("Date", time.Now().Add(skew).UTC().Format(http.TimeFormat))
					if time.Now().Add(skew).Unix() >= expires || revoked.Swap(false) {
						refused.Add(1)
						w.WriteHeader(http.StatusForbidden)
						return
					}
					serveContent(layer)(w, r)
				}))
				n.serve("registry.test", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					asked.Add(1)
					to := fmt.Sprintf("http://storage.test/x?Signature=0&Expires=%d", time.Now().Add(skew+life).Unix())
					http.Redirect(w, r, to, http.StatusTemporaryRedirect)
				}))
				r := n.open("registry.test/app:v1", Options{})
				h := hashOf(layer)
				start := time.Now()
				reads := 0
				for ; asked.Load() < 3; reads++ {
					if b, err := readRange(t.Context(), r, h, int64(reads), 1000); err != nil || !bytes.Equal(b, layer[reads:reads+1000]) {
						t.Fatalf("%d bytes, %v", len(b), err)
					}
					if time.Since(start) > 3*life {
						t.Fatalf("the registry was asked %d times", asked.Load())
					}
					time.Sleep(200 * time.Millisecond)
				}
				if n := refused.Load(); n != 0 {
					t.Errorf("the storage refused %d of %d requests", n, reads)
				}
				if reads < 200 {
					t.Errorf("only %d reads", reads)
				}
				// The storage refuses a location before its end.
				before := asked.Load()
				revoked.Store(true)
				if b, err := readRange(t.Context(), r, h, 5, 1000); err != nil || !bytes.Equal(b, layer[5:1005]) {
					t.Fatal(err)
				}
				if n := asked.Load() - before; n > 1 {
					t.Errorf("the registry was asked %d times", n)
				}
				if s := r.client.Stats(); len(s) != 1 || s[0].Errors[403] != 0 || r.LastFailure(start) != nil {
					t.Errorf("%+v, %v", s, r.LastFailure(start))
				}
			})
		})
	}
}

// Storage that refuses a fresh location too: the registry is asked once more, not for ever.
func TestLocationRefused(t *testing.T) {
	layer := noise(1<<20, 4)
	var refuse atomic.Bool
	var refused atomic.Int64
	storage := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if refuse.Load() {
			refused.Add(1)
			w.WriteHeader(http.StatusForbidden)
			return
		}
		serveContent(layer)(w, r)
	}))
	f, r, _, _ := faultyRepo(t, Options{})
	f.set(asBlob(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, storage.URL+"/x?s="+fmt.Sprint(f.requests.Load()), http.StatusFound)
	}))
	if _, err := readRange(t.Context(), r, hashOf(layer), 5, 1000); err != nil {
		t.Fatal(err)
	}
	refuse.Store(true)
	if _, err := readRange(t.Context(), r, hashOf(layer), 5, 1000); statusOf(err) != http.StatusForbidden {
		t.Errorf("%v", err)
	}
	if f.requests.Load() != 2 || refused.Load() != 2 {
		t.Errorf("%d requests to the registry, %d refusals", f.requests.Load(), refused.Load())
	}
	refuse.Store(false)
	if _, err := readRange(t.Context(), r, hashOf(layer), 5, 1000); err != nil {
		t.Error(err)
	}
	// A URL that is too long to keep is used once.
	f.set(asBlob(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, storage.URL+"/x?s="+strings.Repeat("a", maxLocation), http.StatusFound)
	}))
	other := noise(1<<20, 4)
	m := r.reader.(*remote)
	m.origin.forget(hashOf(other))
	f.requests.Store(0)
	for range 3 {
		if _, err := readRange(t.Context(), r, hashOf(other), 5, 1000); err != nil {
			t.Error(err)
		}
	}
	if n := f.requests.Load(); n != 3 || m.origin.state(hashOf(other)).location != nil {
		t.Errorf("%d requests", n)
	}
}
