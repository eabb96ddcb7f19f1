package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// A quirky registry takes uploads, and answers in one of the ways of real registries
// that the spec does not cover.
type quirky struct {
	*httptest.Server
	other *httptest.Server // where it redirects to

	post, patch, put int    // statuses; 0 for the usual ones
	redirect         int    // of each request of an upload, once
	away             bool   // to the other host, which wants a token of its own
	location         string // "", "relative", "absolute", "none"
	max              int    // bytes of a body; 0 is any
	tooLarge         int    // the status then
	silent           bool   // and without a word
	least            int    // OCI-Chunk-Min-Length
	onePatch         bool   // 416 for a second one
	loses            int    // this many bytes of the first piece
	noExpect         bool

	t       *testing.T
	mu      sync.Mutex
	uploads map[string][]byte
	blobs   map[string][]byte
	n       int
	lost    bool
	patches int
	leaked  []string // Authorization headers where they should not be
}

func newQuirky(t *testing.T, q *quirky) *quirky {
	q.t, q.uploads, q.blobs = t, make(map[string][]byte), make(map[string][]byte)
	q.Server = serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { q.answer(w, r, false) }))
	q.other = serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			if r.URL.Query().Get("scope") != "here:push" {
				t.Errorf("scope %q", r.URL.Query()["scope"])
			}
			fmt.Fprint(w, `{"token":"other"}`)
			return
		}
		switch r.Header.Get("Authorization") {
		case "Bearer other":
		default:
			q.mu.Lock()
			q.leaked = append(q.leaked, r.Header.Get("Authorization"))
			q.mu.Unlock()
			fallthrough
		case "":
			w.Header().Set("Www-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="s",scope="here:push"`, q.other.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		q.answer(w, r, true)
	}))
	return q
}

func (q *quirky) answer(w http.ResponseWriter, r *http.Request, there bool) {
	if !there {
		if _, p, ok := r.BasicAuth(); !ok || p != "secret" {
			w.Header().Set("Www-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
	}
	if q.noExpect && r.Header.Get("Expect") != "" {
		w.WriteHeader(http.StatusExpectationFailed)
		return
	}
	if q.max > 0 && r.ContentLength > int64(q.max) {
		w.WriteHeader(q.tooLarge)
		if !q.silent {
			io.WriteString(w, "<html>413 Request Entity Too Large</html>")
		}
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if q.redirect != 0 && r.URL.Query().Get("moved") == "" && (r.Method == "POST" || r.Method == "PATCH" || r.Method == "PUT") {
		u := *r.URL
		query := u.Query()
		query.Set("moved", "1")
		u.RawQuery = query.Encode()
		to := u.String()
		if q.away {
			to = q.other.URL + to
		}
		w.Header().Set("Location", to)
		w.WriteHeader(q.redirect)
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	status := func(code, usual int) {
		if code == 0 {
			code = usual
		}
		w.WriteHeader(code)
	}
	id := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	where := func(id string) {
		// With characters that must not be encoded again.
		query := "?_state=a%2Bb%3D%3D&odd=a;b&x=%zz"
		switch q.location {
		case "":
			w.Header().Set("Location", "/v2/app/blobs/uploads/"+id+query)
		case "relative":
			w.Header().Set("Location", id+query)
		case "absolute":
			w.Header().Set("Location", "http://"+r.Host+"/v2/app/blobs/uploads/"+id+query)
		case "none":
			w.Header().Set("Docker-Upload-UUID", id)
		}
	}
	if r.Method != "POST" && strings.Contains(r.URL.Path, "/uploads/") && q.location != "none" && !strings.Contains(r.URL.RawQuery, "a%2Bb%3D%3D") {
		q.t.Errorf("the query is %q", r.URL.RawQuery)
	}
	switch {
	case r.Method == "POST":
		q.n++
		id = fmt.Sprint("u", q.n)
		q.uploads[id] = nil
		if q.least > 0 {
			w.Header().Set("OCI-Chunk-Min-Length", fmt.Sprint(q.least))
		}
		where(id)
		status(q.post, 202)
	case r.Method == "DELETE":
		delete(q.uploads, id)
		w.WriteHeader(204)
	case r.Method == "GET" && strings.Contains(r.URL.Path, "/uploads/"):
		w.Header().Set("Range", fmt.Sprintf("0-%d", max(len(q.uploads[id])-1, 0)))
		w.WriteHeader(204)
	case r.Method == "PATCH":
		have, ok := q.uploads[id]
		if !ok {
			w.WriteHeader(404)
			return
		}
		q.patches++
		if s := r.Header.Get("Content-Range"); s != "" {
			var from, to int
			if _, err := fmt.Sscanf(s, "%d-%d", &from, &to); err != nil || to-from+1 != len(body) {
				q.t.Errorf("Content-Range %q of %d bytes", s, len(body))
			}
			if from != len(have) {
				w.Header().Set("Range", fmt.Sprintf("0-%d", len(have)-1))
				w.WriteHeader(416)
				return
			}
		}
		if q.onePatch && len(have) > 0 {
			w.WriteHeader(416)
			return
		}
		if q.loses > 0 && !q.lost {
			q.lost = true
			body = body[:len(body)-q.loses]
		}
		q.uploads[id] = append(have, body...)
		where(id)
		status(q.patch, 202)
	case r.Method == "PUT" && strings.Contains(r.URL.Path, "/uploads/"):
		have, ok := q.uploads[id]
		if !ok {
			w.WriteHeader(404)
			return
		}
		delete(q.uploads, id)
		whole := append(have, body...)
		digest := fmt.Sprintf("sha256:%x", sha256.Sum256(whole))
		if _, want, _ := strings.Cut(r.URL.RawQuery, "digest="); want != url.QueryEscape(digest) && !strings.HasPrefix(want, url.QueryEscape(digest)+"&") {
			w.WriteHeader(400)
			fmt.Fprintf(w, `{"errors":[{"code":"DIGEST_INVALID","message":"%d bytes"}]}`, len(whole))
			return
		}
		q.blobs[digest] = whole
		status(q.put, 201)
	case r.Method == "PUT":
		q.blobs[id] = body
		status(q.put, 201)
	default:
		b, ok := q.blobs[id]
		if !ok {
			w.WriteHeader(404)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}
}

// Uploads to registries as they are, with each quirk and with two at once. Small blobs,
// large blobs and manifests arrive, and credentials go only where they belong.
func TestUploadQuirks(t *testing.T) {
	quirks := map[string]func(*quirky){
		"none":             func(*quirky) {},
		"200":              func(q *quirky) { q.post, q.patch, q.put = 200, 200, 200 },
		"201":              func(q *quirky) { q.post, q.patch, q.put = 201, 201, 201 },
		"202":              func(q *quirky) { q.post, q.patch, q.put = 202, 202, 202 },
		"204":              func(q *quirky) { q.post, q.patch, q.put = 204, 204, 204 },
		"redirect 307":     func(q *quirky) { q.redirect = 307 },
		"redirect 308":     func(q *quirky) { q.redirect = 308 },
		"redirect 301":     func(q *quirky) { q.redirect = 301 },
		"redirect away":    func(q *quirky) { q.redirect, q.away = 307, true },
		"relative":         func(q *quirky) { q.location = "relative" },
		"absolute":         func(q *quirky) { q.location = "absolute" },
		"no location":      func(q *quirky) { q.location = "none" },
		"413":              func(q *quirky) { q.max, q.tooLarge = 900_000, 413 },
		"413 of little":    func(q *quirky) { q.max, q.tooLarge = 40_000, 413 },
		"413 in a word":    func(q *quirky) { q.max, q.tooLarge, q.silent = 900_000, 413, true },
		"400 for large":    func(q *quirky) { q.max, q.tooLarge = 900_000, 400 },
		"403 for large":    func(q *quirky) { q.max, q.tooLarge = 900_000, 403 },
		"502 for large":    func(q *quirky) { q.max, q.tooLarge, q.silent = 900_000, 502, true },
		"413, min length":  func(q *quirky) { q.max, q.tooLarge, q.least = 900_000, 413, 600_000 },
		"min length":       func(q *quirky) { q.least = 10 << 20 },
		"one PATCH":        func(q *quirky) { q.onePatch = true },
		"loses some":       func(q *quirky) { q.max, q.tooLarge, q.loses = 900_000, 413, 1000 },
		"no Expect":        func(q *quirky) { q.noExpect = true },
		"no Expect in 417": func(q *quirky) { q.noExpect, q.max, q.tooLarge = true, 900_000, 413 },
	}
	pairs := [][2]string{
		{"200", "relative"}, {"201", "no location"}, {"204", "redirect 307"}, {"redirect away", "absolute"}, {"redirect 308", "relative"},
		{"413", "relative"}, {"413", "redirect 307"}, {"413", "200"}, {"413", "no location"}, {"redirect away", "413"}, {"loses some", "absolute"},
		{"min length", "one PATCH"}, {"redirect away", "204"}, {"no Expect", "redirect away"}, {"413, min length", "201"},
	}
	for name := range quirks {
		pairs = append(pairs, [2]string{name, "none"})
	}
	for _, pair := range pairs {
		t.Run(pair[0]+", "+pair[1], func(t *testing.T) {
			t.Parallel()
			q := &quirky{}
			quirks[pair[0]](q)
			quirks[pair[1]](q)
			q = newQuirky(t, q)
			ctx := t.Context()
			c := newClient(t, Options{Credentials: func(_ context.Context, host, _ string) (Login, error) {
				if host == hostOf(q.Server) {
					return Login{Username: "alice", Password: "secret"}, nil
				}
				return Login{}, nil
			}})
			r := openRepo(t, c, hostOf(q.Server)+"/app:v1")
			if err := r.CheckPush(ctx); err != nil {
				t.Fatal(err)
			}
			for _, size := range []int{0, 10, 100_000, 3 << 20, 5<<20 + 1} {
				data := noise(size, uint64(size))
				var last atomic.Int64
				if _, err := r.PushBlob(ctx, describe(data, types.OCILayer), tempFile(t, data), last.Store); err != nil {
					t.Errorf("%d bytes: %v", size, err)
				}
				if b := q.blobs[hashOf(data).String()]; !bytes.Equal(b, data) {
					t.Errorf("%d bytes: there are %d", size, len(b))
				}
				if last.Load() != int64(size) && size > 0 {
					t.Errorf("%d bytes: progress says %d", size, last.Load())
				}
				if _, err := r.PushBytes(ctx, data[:size/2], types.OCILayer); err != nil {
					t.Errorf("%d bytes of memory: %v", size/2, err)
				}
			}
			raw := []byte(`{"schemaVersion":2,"mediaType":"` + string(types.OCIManifestSchema1) + `","config":{"mediaType":"a/b","size":0,"digest":"` + hashOf(nil).String() + `"},"layers":[]}`)
			if _, err := r.PushManifest(ctx, raw, types.OCIManifestSchema1, "v1"); err != nil {
				t.Error(err)
			}
			if len(q.leaked) > 0 {
				t.Errorf("the other host was shown %q", q.leaked)
			}
		})
	}
}

// The body of a request that was answered early may be read beside that of the next one. It
// does not set the progress back, and nothing does once the push has ended.
func TestProgressOfAnEarlierBody(t *testing.T) {
	var at []int64
	r := &reports{to: func(n int64) { at = append(at, n) }}
	u := &uploading{d: v1.Descriptor{Size: 100}, b: blob{data: make([]byte, 100)}, progress: r}
	open := func() io.ReadCloser {
		rc, err := u.body(100)()
		if err != nil {
			t.Fatal(err)
		}
		return rc
	}
	buf := make([]byte, 30)
	first := open()
	first.Read(buf)
	second := open()
	first.Read(buf)
	io.ReadAll(second)
	first.Read(buf)
	r.begin(nil)
	first.Read(buf)
	if want := []int64{30, 100}; !slices.Equal(at, want) {
		t.Errorf("progress %v, want %v", at, want)
	}
}

// The client does not retry forever at a registry that accepts no body.
func TestUploadRefused(t *testing.T) {
	q := newQuirky(t, &quirky{max: 100, tooLarge: 413})
	r := openRepo(t, newClient(t, Options{Credentials: fixed(Login{Username: "alice", Password: "secret"})}), hostOf(q.Server)+"/app:v1")
	_, err := r.PushBytes(t.Context(), noise(1<<20, 1), types.OCILayer)
	if err == nil || Temporary(err) || !strings.Contains(err.Error(), "raise the limit") {
		t.Errorf("%v", err)
	}
	if q.n > 8 {
		t.Errorf("%d uploads were begun", q.n)
	}
}

// Whatever a registry answers to HEAD, the answer to GET decides.
func TestHeadQuirks(t *testing.T) {
	data := noise(5000, 1)
	d := describe(data, types.OCILayer)
	empty := describe(nil, types.OCILayer)
	absent := describe([]byte("absent"), types.OCILayer)
	status := func(code int, h ...string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			for i := 0; i+1 < len(h); i += 2 {
				w.Header().Set(h[i], h[i+1])
			}
			w.WriteHeader(code)
		}
	}
	storage := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.Header.Get("Authorization") != "" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		serveContent(data)(w, r)
	}))
	gets := map[string]http.HandlerFunc{
		"ranges": func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, empty.Digest.Hex) {
				serveContent(nil)(w, r)
				return
			}
			serveContent(data)(w, r)
		},
		"no ranges": func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, empty.Digest.Hex) {
				return
			}
			w.Header().Set("Content-Length", "5000")
			w.Write(data)
		},
		"no length": func(w http.ResponseWriter, r *http.Request) {
			http.NewResponseController(w).Flush()
			if !strings.HasSuffix(r.URL.Path, empty.Digest.Hex) {
				w.Write(data)
			}
		},
		"no size": func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, empty.Digest.Hex) {
				w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
				return
			}
			w.Header().Set("Content-Range", "bytes 0-0/*")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(data[:1])
		},
		"no Content-Range": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusPartialContent)
			w.Write(data[:1])
		},
	}
	for head, h := range map[string]http.HandlerFunc{
		"405": status(405), "403": status(403), "401": status(401), "400": status(400), "501": status(501), "500": status(500), "length 0": status(200, "Content-Length", "0"),
		"no length":      func(w http.ResponseWriter, _ *http.Request) { w.Header()["Content-Length"] = nil; w.WriteHeader(200) },
		"a wrong length": status(200, "Content-Length", "77"), "signed for GET": status(307, "Location", storage.URL+"/x?m=GET"),
		"302 to nowhere": status(302), "204": status(204),
	} {
		for get, g := range gets {
			t.Run("HEAD "+head+", GET "+get, func(t *testing.T) {
				t.Parallel()
				s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					switch {
					case r.Method == http.MethodHead:
						h(w, r)
					case strings.HasSuffix(r.URL.Path, absent.Digest.Hex):
						w.WriteHeader(404)
					default:
						g(w, r)
					}
				}))
				r := openRepo(t, newClient(t, Options{Attempts: 2}), hostOf(s)+"/app:v1")
				for _, x := range []v1.Descriptor{d, empty} {
					has, err := r.HasBlob(t.Context(), x)
					if err != nil || !has {
						t.Errorf("%d bytes: %v, %v", x.Size, has, err)
					}
				}
				has, err := r.HasBlob(t.Context(), absent)
				// The client sends only a HEAD if the answer has a length.
				if has && head != "a wrong length" || err != nil && head != "a wrong length" {
					t.Errorf("absent: %v, %v", has, err)
				}
			})
		}
	}
}

// A push continues, whatever the registry says about a blob that may exist.
func TestPushHeadRefused(t *testing.T) {
	for _, code := range []int{400, 401, 403, 405, 500, 501, 503} {
		f, r, _, _ := faultyRepo(t, Options{Attempts: 2})
		f.set(func(w http.ResponseWriter, r *http.Request) bool {
			refuse := r.Method == http.MethodHead || isBlob(r)
			if refuse {
				w.WriteHeader(code)
			}
			return refuse
		})
		data := noise(1000, uint64(code))
		if _, err := r.PushBytes(t.Context(), data, types.OCILayer); err != nil {
			t.Errorf("%d: %v", code, err)
		}
		f.set(nil)
		if b, err := r.Blob(t.Context(), describe(data, types.OCILayer)); err != nil || !bytes.Equal(b, data) {
			t.Errorf("%d: %v", code, err)
		}
	}
}

// Token services of real registries.
func TestTokenQuirks(t *testing.T) {
	layer := noise(1000, 1)
	token := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, s) }
	}
	redirect := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/token" {
				http.Redirect(w, r, "/token2?"+r.URL.RawQuery, code)
				return
			}
			if _, p, _ := r.BasicAuth(); p != "secret" || r.URL.Query().Get("scope") == "" {
				w.WriteHeader(401)
				return
			}
			io.WriteString(w, `{"token":"t"}`)
		}
	}
	var tries sync.Map
	for name, x := range map[string]struct {
		answer http.HandlerFunc
		want   error // nil: it works
	}{
		"plain":        {token(`{"token":"t"}`), nil},
		"access_token": {token(`{"access_token":"t"}`), nil},
		"both":         {token(`{"token":"t","access_token":"t","expires_in":300,"issued_at":"2026-01-02T03:04:05Z"}`), nil},
		"a string":     {token(`{"token":"t","expires_in":"300"}`), nil},
		"null":         {token(`{"token":"t","expires_in":null}`), nil},
		"a word":       {token(`{"token":"t","expires_in":"soon"}`), nil},
		"negative":     {token(`{"token":"t","expires_in":-5}`), nil},
		"not a number": {token(`{"token":"t","expires_in":"NaN"}`), nil},
		"endless":      {token(`{"token":"t","expires_in":1e300}`), nil},
		"an object":    {token(`{"token":"t","expires_in":{}}`), nil},
		"201":          {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(201); io.WriteString(w, `{"token":"t"}`) }, nil},
		"301":          {redirect(301), nil},
		"302":          {redirect(302), nil},
		"307":          {redirect(307), nil},
		"308":          {redirect(308), nil},
		"redirect to itself": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.String(), http.StatusTemporaryRedirect)
		}, errors.ErrUnsupported},
		"redirect to nowhere": {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(307) }, errors.ErrUnsupported},
		"429 twice": {func(w http.ResponseWriter, r *http.Request) {
			n, _ := tries.LoadOrStore(t, new(atomic.Int64))
			if n.(*atomic.Int64).Add(1) <= 2 {
				w.Header().Set("Retry-After", "0")
				w.WriteHeader(429)
				return
			}
			io.WriteString(w, `{"token":"t"}`)
		}, nil},
		"no token":               {token(`{}`), errors.ErrUnsupported},
		"a page":                 {token(`<html>`), errors.ErrUnsupported},
		"two lines":              {token(`{"token":"a\nb"}`), errors.ErrUnsupported},
		"refused":                {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) }, ErrUnauthorized},
		"a trickle":              {func(w http.ResponseWriter, r *http.Request) { trickle(w, r, nil, 200, []byte(`{"token":"`)) }, ErrUnavailable},
		"a trickle of a refusal": {func(w http.ResponseWriter, r *http.Request) { trickle(w, r, nil, 503, nil) }, ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tokens := serve(t, x.answer)
			s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Authorization") != "Bearer t" {
					w.Header().Set("Www-Authenticate", `Bearer realm="`+tokens.URL+`/token",service="s"`)
					w.WriteHeader(401)
					return
				}
				serveContent(layer)(w, r)
			}))
			o := Options{Credentials: fixed(Login{Username: "a", Password: "secret"}), HeaderTimeout: time.Minute, Attempts: 4}
			if strings.HasPrefix(name, "a trickle") {
				o.HeaderTimeout = 500 * time.Millisecond
			}
			r := openRepo(t, newClient(t, o), hostOf(s)+"/app:v1")
			d := describe(layer, types.OCILayer)
			start := time.Now()
			_, err := r.HasBlob(t.Context(), d)
			switch {
			case x.want == nil && err != nil, x.want != nil && err == nil, x.want == ErrUnauthorized && !errors.Is(err, ErrUnauthorized),
				x.want == ErrUnavailable && !Temporary(err):
				t.Errorf("%v", err)
			}
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

// A token service that redirects to another host cannot choose that a password goes
// there.
func TestTokenRedirectLeaks(t *testing.T) {
	var leaked atomic.Int64
	elsewhere := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.ParseForm()
		if r.Header.Get("Authorization") != "" || r.PostForm.Get("refresh_token") != "" {
			leaked.Add(1)
		}
		io.WriteString(w, `{"token":"t"}`)
	}))
	tokens := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, elsewhere.URL+"/token?"+r.URL.RawQuery, http.StatusTemporaryRedirect)
	}))
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer t" {
			w.Header().Set("Www-Authenticate", `Bearer realm="`+tokens.URL+`/token"`)
			w.WriteHeader(401)
			return
		}
		serveContent([]byte("x"))(w, r)
	}))
	for _, l := range []Login{{Username: "a", Password: "b"}, {Username: "a", IdentityToken: "c"}} {
		r := openRepo(t, newClient(t, Options{Attempts: 1, Credentials: fixed(l)}), hostOf(s)+"/app:v1")
		_, err := r.HasBlob(t.Context(), describe([]byte("x"), types.OCILayer))
		if (err == nil) != (l.IdentityToken == "") {
			t.Errorf("%+v: %v", l, err)
		}
	}
	if leaked.Load() > 0 {
		t.Error("the client sent credentials to another host")
	}
}

// A host that a registry redirects to gets only its own credentials, and only if it
// asks for them by a challenge.
func TestForeignHost(t *testing.T) {
	layer := noise(100_000, 3)
	var seen sync.Map
	note := func(what string, r *http.Request) {
		if a := r.Header.Get("Authorization"); a != "" {
			seen.Store(what+" "+a, true)
		}
	}
	storage := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		note("storage", r)
		serveContent(layer)(w, r)
	}))
	second := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		note("second", r)
		if _, p, _ := r.BasicAuth(); p != "two" {
			w.Header().Set("Www-Authenticate", `Basic realm="second"`)
			w.WriteHeader(401)
			return
		}
		if strings.HasPrefix(r.URL.Path, "/stored/") {
			http.Redirect(w, r, storage.URL+"/x", http.StatusTemporaryRedirect)
			return
		}
		serveContent(layer)(w, r)
	}))
	first := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		note("first", r)
		if _, p, _ := r.BasicAuth(); p != "one" {
			w.Header().Set("Www-Authenticate", `Basic realm="first"`)
			w.WriteHeader(401)
			return
		}
		path := "/blob"
		if strings.Contains(r.URL.Path, "/stored/") {
			path = "/stored/blob"
		}
		http.Redirect(w, r, second.URL+path, http.StatusTemporaryRedirect)
	}))
	c := newClient(t, Options{Credentials: func(_ context.Context, host, _ string) (Login, error) {
		switch host {
		case hostOf(first):
			return Login{Username: "a", Password: "one"}, nil
		case hostOf(second):
			return Login{Username: "b", Password: "two"}, nil
		}
		return Login{Username: "c", Password: "three"}, nil
	}})
	for _, name := range []string{"app", "stored/app"} {
		r := openRepo(t, c, hostOf(first)+"/"+name)
		for i := range 3 {
			if b, err := readRange(t.Context(), r, hashOf(layer), int64(i), 1000); err != nil || !bytes.Equal(b, layer[i:i+1000]) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	want := map[string]bool{
		"first Basic " + base64.StdEncoding.EncodeToString([]byte("a:one")):  true,
		"second Basic " + base64.StdEncoding.EncodeToString([]byte("b:two")): true,
	}
	seen.Range(func(k, _ any) bool {
		if !want[k.(string)] {
			t.Errorf("seen: %s", k)
		}
		return true
	})
}

// If no host requires credentials, unreadable credentials cause one warning per host.
// If a host requires them, they are the reason in the error.
func TestBrokenCredentials(t *testing.T) {
	broken := errors.New("exec: docker-credential-nowhere: not found")
	var log lockedBuffer
	fail := func(context.Context, string, string) (Login, error) { return Login{}, broken }
	s := newTokenServer(t, "", time.Minute) // whose password is the empty one: anybody
	layer := noise(1000, 1)
	plain := openRepo(t, newClient(t, Options{}), hostOf(s.registry)+"/team/app:v1")
	_, l := pushImage(t, t.Context(), plain, "v1", layer, amd64)
	r := openRepo(t, newClient(t, Options{Log: log.logger(), Credentials: fail}), hostOf(s.registry)+"/team/app:v1")
	for range 3 {
		if b, err := readRange(t.Context(), r, l.Digest, 0, 100); err != nil || !bytes.Equal(b, layer[:100]) {
			t.Error(err)
		}
		s.mu.Lock()
		clear(s.valid) // so that they are asked for again
		s.mu.Unlock()
	}
	if n := strings.Count(log.String(), "cannot read the credentials"); n != 1 {
		t.Errorf("warned %d times: %s", n, log.String())
	}
	// The service refuses no client; the registry does.
	var granted atomic.Bool
	tokens := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{"token":"nobody"}`) }))
	private := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if granted.Load() {
			w.WriteHeader(403)
			return
		}
		w.Header().Set("Www-Authenticate", `Bearer realm="`+tokens.URL+`/token"`)
		w.WriteHeader(401)
	}))
	for _, forbid := range []bool{false, true} {
		r := openRepo(t, newClient(t, Options{Credentials: fail}), hostOf(private)+"/app:v1")
		for range 2 {
			if err := r.CheckAccess(t.Context()); !errors.Is(err, ErrUnauthorized) || !errors.Is(err, broken) {
				t.Errorf("%v", err)
			}
			granted.Store(forbid)
		}
		granted.Store(false)
	}
	// A credential helper that hangs delays callers only for a bounded time, and not
	// every caller starts another one.
	var calls atomic.Int64
	end := make(chan struct{})
	t.Cleanup(func() { close(end) })
	hangs := func(context.Context, string, string) (Login, error) {
		calls.Add(1)
		<-end
		return Login{}, nil
	}
	r = openRepo(t, newClient(t, Options{HeaderTimeout: time.Second, Credentials: hangs}), hostOf(s.registry)+"/team/app:v1")
	for range 3 {
		if _, err := readRange(t.Context(), r, l.Digest, 0, 100); err != nil {
			t.Error(err)
		}
		s.mu.Lock()
		clear(s.valid)
		s.mu.Unlock()
	}
	if n := calls.Load(); n != 1 {
		t.Errorf("%d calls", n)
	}
}

// The registry refuses a manifest. If its tag already leads to that manifest, the push
// succeeds. If the tag leads elsewhere, or the registry refuses the type of the
// manifest, the error gives the remedy.
func TestManifestRefused(t *testing.T) {
	ctx := t.Context()
	for _, code := range []int{400, 403, 405, 409, 412} {
		f, r, _, _ := faultyRepo(t, Options{})
		img, err := r.Resolve(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		f.set(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut {
				w.WriteHeader(code)
			}
			return r.Method == http.MethodPut
		})
		if d, err := r.PushManifest(ctx, img.Raw, img.MediaType, "v1"); err != nil || d.Digest != img.Digest {
			t.Errorf("%d: the same again: %v", code, err)
		}
		other := []byte(strings.Replace(string(img.Raw), `"schemaVersion":2`, `"schemaVersion":2,"annotations":{"a":"b"}`, 1))
		if _, err := r.PushManifest(ctx, other, img.MediaType, "v1"); !errors.Is(err, ErrTagTaken) || !strings.Contains(err.Error(), img.Digest.String()) {
			t.Errorf("%d: another: %v", code, err)
		}
		if _, err := r.PushManifest(ctx, other, img.MediaType, "v2"); err == nil || errors.Is(err, ErrTagTaken) {
			t.Errorf("%d: a new tag: %v", code, err)
		}
	}
	refuse := func(code int, body string) error {
		f, r, _, _ := faultyRepo(t, Options{})
		img, _ := r.Resolve(ctx, nil)
		f.set(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPut {
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(code)
				io.WriteString(w, body)
			}
			return r.Method == http.MethodPut
		})
		raw, _ := json.Marshal(artifact(img.Descriptor, "application/vnd.test.x", nil))
		_, err := r.PushManifest(ctx, raw, types.OCIManifestSchema1, "")
		return err
	}
	for _, x := range []struct {
		code       int
		body, want string
	}{
		{400, `{"errors":[{"code":"MANIFEST_INVALID","message":"manifest invalid","detail":"unknown media type: application/vnd.oci.empty.v1+json"}]}`, "the media type application/vnd.oci.empty.v1+json"},
		{400, `{"errors":[{"code":"MANIFEST_INVALID","detail":{"type":"application/vnd.test.x"}}]}`, "the media type application/vnd.test.x"},
		{400, `{"errors":[{"code":"MANIFEST_INVALID","message":"unknown field subject"}]}`, "manifests with a subject"},
		{415, ``, "artifact type application/vnd.test.x"},
		{422, `<html>`, "artifact type application/vnd.test.x"},
	} {
		err := refuse(x.code, x.body)
		if err == nil || !strings.Contains(err.Error(), x.want) || !strings.Contains(err.Error(), "push to another registry or to oci:DIR") {
			t.Errorf("%d %s: %v", x.code, x.body, err)
		}
	}
}

// Ranges as real servers give them: the bytes are right for every answer.
func TestRangeQuirks(t *testing.T) {
	for name, x := range map[string]struct {
		whole   bool // ranges are given up
		label   string
		partial func(h http.Header, from, to, size int) (int, int)
	}{
		"lower case": {partial: func(h http.Header, a, z, n int) (int, int) {
			h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", a, z, n))
			return a, z
		}},
		"upper case": {partial: func(h http.Header, a, z, n int) (int, int) {
			h.Set("Content-Range", fmt.Sprintf("BYTES %d-%d/%d", a, z, n))
			return a, z
		}},
		"no size": {partial: func(h http.Header, a, z, n int) (int, int) {
			h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/*", a, z))
			return a, z
		}},
		"rounded up": {partial: func(h http.Header, a, z, n int) (int, int) {
			a, z = a&^4095, min(z|4095, n-1)
			h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", a, z, n))
			return a, z
		}},
		"no header":     {partial: func(h http.Header, a, z, n int) (int, int) { return a, z }},
		"nothing known": {whole: true, partial: func(h http.Header, a, z, n int) (int, int) { h.Set("Content-Range", "bytes */*"); return a, z }},
		"only the size": {whole: true, partial: func(h http.Header, a, z, n int) (int, int) {
			h.Set("Content-Range", fmt.Sprintf("bytes */%d", n))
			return a, z
		}},
		"another": {whole: true, partial: func(h http.Header, a, z, n int) (int, int) {
			h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", a+1, z+1, n))
			return a + 1, z + 1
		}},
		"from the start": {whole: true, partial: func(h http.Header, a, z, n int) (int, int) {
			h.Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", z-a, n))
			return 0, z - a
		}},
		"shorter": {whole: true, partial: func(h http.Header, a, z, n int) (int, int) {
			h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", a, z-1, n))
			return a, z - 1
		}},
		"another unit": {whole: true, partial: func(h http.Header, a, z, n int) (int, int) {
			h.Set("Content-Range", fmt.Sprintf("blocks %d-%d/%d", a, z, n))
			return a, z
		}},
		"false encoding": {label: "gzip", partial: func(h http.Header, a, z, n int) (int, int) {
			h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", a, z, n))
			return a, z
		}},
		"false encodings": {label: "aws-chunked, zstd", partial: func(h http.Header, a, z, n int) (int, int) {
			h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", a, z, n))
			return a, z
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, r, l, layer := faultyRepo(t, Options{})
			var ranged atomic.Int64
			f.set(asBlob(func(w http.ResponseWriter, r *http.Request) {
				if x.label != "" {
					w.Header().Set("Content-Encoding", x.label)
				}
				var a, z int
				if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &a, &z); err != nil {
					w.Header().Set("Content-Length", strconv.Itoa(len(layer)))
					w.Write(layer)
					return
				}
				ranged.Add(1)
				a, z = x.partial(w.Header(), a, z, len(layer))
				w.Header().Set("Content-Length", strconv.Itoa(z-a+1))
				w.WriteHeader(http.StatusPartialContent)
				w.Write(layer[a : z+1])
			}))
			for _, off := range []int64{1, 5000, 1 << 20} {
				if b, err := readRange(t.Context(), r, l.Digest, off, 3000); err != nil || !bytes.Equal(b, layer[off:off+3000]) {
					t.Errorf("%d bytes at %d, %v", len(b), off, err)
				}
			}
			if b, err := r.Blob(t.Context(), l); err != nil || !bytes.Equal(b, layer) {
				t.Errorf("%d bytes, %v", len(b), err)
			}
			if n := ranged.Load(); x.whole && n != 1 || !x.whole && n != 3 {
				t.Errorf("%d range requests", n)
			}
		})
	}
}

// A range without a Content-Range is trusted until a digest proves it wrong.
func TestRangeGuessed(t *testing.T) {
	f, r, l, layer := faultyRepo(t, Options{})
	f.set(asBlob(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Range") != "" {
			w.Header().Set("Content-Length", "100")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(layer[:100]) // always the first
			return
		}
		w.Write(layer)
	}))
	rc, err := r.OpenRange(t.Context(), digestOf(l.Digest), 5000, 100)
	if err != nil {
		t.Fatal(err)
	}
	rc.(*Body).Distrust()
	rc.Close()
	if b, err := readRange(t.Context(), r, l.Digest, 5000, 100); err != nil || !bytes.Equal(b, layer[5000:5100]) {
		t.Errorf("%v", err)
	}
}

// A layer that the registry does not have comes from the layer's URLs: verified,
// without credentials, through a few redirects.
func TestForeignLayer(t *testing.T) {
	ctx := t.Context()
	layer := noise(300_000, 5)
	var requests, leaked atomic.Int64
	var fault atomic.Pointer[http.HandlerFunc]
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if r.Header.Get("Authorization") != "" {
			leaked.Add(1)
		}
		if h := fault.Load(); h != nil {
			(*h)(w, r)
			return
		}
		switch r.URL.Path {
		case "/moved":
			http.Redirect(w, r, "/layer", http.StatusFound)
		case "/loop":
			http.Redirect(w, r, "/loop", http.StatusFound)
		case "/layer":
			serveContent(layer)(w, r)
		case "/wrong":
			serveContent(noise(len(layer), 6))(w, r)
		case "/private":
			w.Header().Set("Www-Authenticate", `Basic realm="x"`)
			w.WriteHeader(401)
		default:
			w.WriteHeader(404)
		}
	}))
	// The URLs of a layout must be on other machines, so the name of one leads to the server.
	away := newClient(t, Options{Attempts: 2})
	away.transport.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, hostOf(s))
	}
	places := map[string]*Repo{
		"registry": openRepo(t, newClient(t, Options{Attempts: 2, Credentials: fixed(Login{Username: "a", Password: "b"})}), memoryRegistry(t, true)+"/app"),
		"layout":   openRepo(t, away, "oci:"+t.TempDir()),
	}
	for place, r := range places {
		for _, x := range []struct {
			urls []string
			ok   bool
		}{
			{[]string{s.URL + "/layer"}, true},
			{[]string{s.URL + "/moved"}, true},
			{[]string{"ftp://x/y", "::", "", s.URL + "/away", s.URL + "/private", s.URL + "/loop", strings.Replace(s.URL, "//", "//u:p@", 1) + "/layer"}, true},
			{[]string{s.URL + "/loop"}, false},
			{[]string{s.URL + "/private"}, false},
			{[]string{s.URL + "/away"}, false},
			{[]string{s.URL + "/wrong"}, false},
			{[]string{"file:///etc/passwd"}, false},
			{nil, false},
		} {
			d := describe(layer, types.DockerForeignLayer)
			for _, u := range x.urls {
				if place == "layout" {
					u = strings.Replace(u, hostOf(s), "layers.example", 1)
				}
				d.URLs = append(d.URLs, u)
			}
			b, err := r.Blob(ctx, d)
			if (err == nil) != x.ok || x.ok && !bytes.Equal(b, layer) {
				t.Errorf("%s: %v: %d bytes, %v", place, x.urls, len(b), err)
			}
			if !x.ok && strings.HasSuffix(fmt.Sprint(x.urls), "/away]") && !errors.Is(err, ErrNotFound) {
				t.Errorf("%s: %v", place, err)
			}
		}
	}
	// Neither a layout nor a registry on another machine leads thaw to services of this one.
	before := requests.Load()
	empty := memoryRegistry(t, true)
	outside := newClient(t, Options{Attempts: 1, Insecure: []string{"*"}})
	outside.transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if strings.HasPrefix(addr, "registry.example") {
			return new(net.Dialer).DialContext(ctx, network, empty)
		}
		return outside.dialer.dial(ctx, network, addr)
	}
	for place, r := range map[string]*Repo{
		"registry": openRepo(t, outside, "registry.example/app"),
		"layout":   openRepo(t, newClient(t, Options{Attempts: 1}), "oci:"+t.TempDir()),
	} {
		d := describe(layer, types.DockerForeignLayer)
		d.URLs = []string{s.URL + "/layer"}
		if _, err := r.Blob(ctx, d); !errors.Is(err, errInside) || requests.Load() != before {
			t.Errorf("%s: %v, %d requests", place, err, requests.Load()-before)
		}
	}
	// The download breaks and resumes at the same place.
	var n atomic.Int64
	breaks := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1) == 1 {
			partly(w, r, layer, 0.5, true)
			return
		}
		serveContent(layer)(w, r)
	})
	fault.Store(&breaks)
	d := describe(layer, types.DockerForeignLayer)
	d.URLs = []string{s.URL + "/layer"}
	if b, err := places["registry"].Blob(ctx, d); err != nil || !bytes.Equal(b, layer) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if leaked.Load() > 0 || requests.Load() == 0 {
		t.Errorf("%d of %d requests had credentials", leaked.Load(), requests.Load())
	}
}

func FuzzToken(f *testing.F) {
	f.Add([]byte(`{"token":"t","expires_in":"300"}`))
	f.Add([]byte(`{"access_token":"t","expires_in":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		now := time.Now()
		got, err := readToken(b, now)
		if err == nil && (!strings.HasPrefix(got.header, "Bearer ") || strings.ContainsAny(got.header[7:], "\r\n ") || got.renew.Before(now)) {
			t.Errorf("%q: %+v", b, got)
		}
	})
}

func FuzzUploadRange(f *testing.F) {
	f.Add("0-99")
	f.Add("bytes=0-0")
	f.Fuzz(func(t *testing.T, s string) {
		if n, ok := uploadRange(&http.Response{Header: http.Header{"Range": {s}}}); ok && n < 0 {
			t.Errorf("%q: %d", s, n)
		}
	})
}
