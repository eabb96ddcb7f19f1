package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// A faulty proxy is between a client and a registry. If fault is not nil, it handles a
// request itself, or reports that it has not.
type faulty struct {
	*httptest.Server
	fault    atomic.Pointer[func(http.ResponseWriter, *http.Request) bool]
	requests atomic.Int64
	conns    atomic.Int64
	forward  http.Handler // to the registry
}

func newFaulty(t *testing.T, to string) *faulty {
	t.Helper()
	f := new(faulty)
	transport := &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: to})
	proxy.Transport = transport
	proxy.ErrorLog = quiet
	f.forward = proxy
	f.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.requests.Add(1)
		if h := f.fault.Load(); h != nil && (*h)(w, r) {
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	f.Config.ErrorLog = quiet
	f.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			f.conns.Add(1)
		}
	}
	f.Start()
	t.Cleanup(func() { f.Close(); transport.CloseIdleConnections() })
	return f
}

func (f *faulty) set(h func(http.ResponseWriter, *http.Request) bool) {
	if h == nil {
		f.fault.Store(nil)
		return
	}
	f.fault.Store(&h)
}

func (f *faulty) host() string { return hostOf(f.Server) }

func isBlob(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/sha256:")
}

// cut sends the headers of the answer and n bytes of its body, and then resets or
// closes the connection.
func cut(w http.ResponseWriter, h http.Header, status int, body []byte, reset bool) {
	for k, v := range h {
		w.Header()[k] = v
	}
	w.WriteHeader(status)
	w.Write(body)
	rc := http.NewResponseController(w)
	rc.Flush()
	c, _, err := rc.Hijack()
	if err != nil {
		panic(err)
	}
	if t, ok := c.(*net.TCPConn); ok && reset {
		t.SetLinger(0)
	}
	c.Close()
}

// partly answers a range request of content like a server that stops early.
func partly(w http.ResponseWriter, r *http.Request, content []byte, part float64, reset bool) {
	var from, to int
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); err != nil {
		from, to = 0, len(content)-1
	}
	h := http.Header{"Content-Length": {fmt.Sprint(to - from + 1)}}
	status := http.StatusOK
	if r.Header.Get("Range") != "" {
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to, len(content)))
		status = http.StatusPartialContent
	}
	cut(w, h, status, content[from:from+int(part*float64(to-from+1))], reset)
}

// stalls are the limits of a client whose server is to hang. Others are patient: on a busy
// machine a server that works may be silent for a second.
var stalls = Options{StallTimeout: 200 * time.Millisecond, HeaderTimeout: 400 * time.Millisecond}

// faultyRepo is a repository with one image behind a faulty proxy.
func faultyRepo(t *testing.T, o Options) (*faulty, *Repo, v1.Descriptor, []byte) {
	t.Helper()
	f := newFaulty(t, memoryRegistry(t, true))
	if o.StallTimeout == 0 {
		o.StallTimeout = time.Minute
	}
	if o.HeaderTimeout == 0 {
		o.HeaderTimeout = time.Minute
	}
	r := openRepo(t, newClient(t, o), f.host()+"/app:v1")
	layer := noise(2<<20+3, 7)
	patient := r
	if o.StallTimeout < time.Minute || o.HeaderTimeout < time.Minute {
		patient = openRepo(t, newClient(t, Options{}), f.host()+"/app:v1")
	}
	_, l := pushImage(t, context.Background(), patient, "v1", layer, amd64)
	// The spare connections that the first one brings may come after it has been used.
	eventually(t, "spare connections", func() bool { return f.conns.Load() > spareConns })
	f.requests.Store(0)
	return f, r, l, layer
}

func readRange(ctx context.Context, r *Repo, h v1.Hash, off, n int64) ([]byte, error) {
	rc, err := r.OpenRange(ctx, digestOf(h), off, n)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

func TestRangeFaults(t *testing.T) {
	const off, n = 70_001, 300_000
	status := func(code int, h ...string) func(http.ResponseWriter, *http.Request, []byte) {
		return func(w http.ResponseWriter, r *http.Request, _ []byte) {
			for i := 0; i+1 < len(h); i += 2 {
				w.Header().Set(h[i], h[i+1])
			}
			w.WriteHeader(code)
		}
	}
	partial := func(span string, body func([]byte) []byte) func(http.ResponseWriter, *http.Request, []byte) {
		return func(w http.ResponseWriter, r *http.Request, content []byte) {
			w.Header().Set("Content-Range", span)
			w.WriteHeader(http.StatusPartialContent)
			w.Write(body(content))
		}
	}
	stall := func(after int) func(http.ResponseWriter, *http.Request, []byte) {
		return func(w http.ResponseWriter, r *http.Request, content []byte) {
			if after >= 0 {
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, len(content)))
				w.WriteHeader(http.StatusPartialContent)
				w.Write(content[off : off+after])
				http.NewResponseController(w).Flush()
			}
			<-r.Context().Done()
		}
	}
	for _, x := range []struct {
		name      string
		fault     func(w http.ResponseWriter, r *http.Request, content []byte)
		temporary bool
		is        error
	}{
		{"500", status(500), true, ErrUnavailable},
		{"502", status(502), true, ErrUnavailable},
		{"503", status(503, "Retry-After", "1"), true, ErrUnavailable},
		{"429", status(429, "Retry-After", "1"), true, ErrUnavailable},
		{"501", status(501), false, nil},
		{"404", status(404), false, ErrNotFound},
		{"403", status(403), false, ErrUnauthorized},
		{"401 without challenge", status(401), false, ErrUnauthorized},
		{"416", status(416), false, nil},
		{"204", status(204), false, nil},
		{"reset", func(w http.ResponseWriter, r *http.Request, c []byte) { partly(w, r, c, 0.5, true) }, true, nil},
		{"closed", func(w http.ResponseWriter, r *http.Request, c []byte) { partly(w, r, c, 0.5, false) }, true, io.ErrUnexpectedEOF},
		{"reset before the headers", func(w http.ResponseWriter, r *http.Request, _ []byte) { panic(http.ErrAbortHandler) }, true, ErrUnavailable},
		{"short and ended well", partial(fmt.Sprintf("bytes %d-%d/2097155", off, off+n-1),
			func(c []byte) []byte { return c[off : off+n-1] }), true, ErrTruncated},
		{"stalls before the headers", stall(-1), true, ErrUnavailable},
		{"stalls after the headers", stall(0), true, ErrUnavailable},
		{"stalls in the body", stall(n / 2), true, ErrUnavailable},
		{"another range", partial(fmt.Sprintf("bytes %d-%d/2097155", off+1, off+n), func(c []byte) []byte { return c[off+1 : off+n+1] }), true, nil},
		{"a shorter range", partial(fmt.Sprintf("bytes %d-%d/2097155", off, off+9), func(c []byte) []byte { return c[off : off+10] }), true, ErrUnavailable},
		{"no Content-Range", partial("", func(c []byte) []byte { return c[off : off+n] }), true, nil},
		{"200 that is too short", func(w http.ResponseWriter, r *http.Request, c []byte) {
			w.Header().Set("Content-Length", fmt.Sprint(off+1))
			w.Write(c[:off+1])
		}, false, nil},
		{"200 that breaks before the range", func(w http.ResponseWriter, r *http.Request, c []byte) {
			cut(w, http.Header{"Content-Length": {fmt.Sprint(len(c))}}, 200, c[:off/2], false)
		}, true, ErrTruncated},
		{"redirects without end", func(w http.ResponseWriter, r *http.Request, _ []byte) {
			http.Redirect(w, r, r.URL.String(), http.StatusTemporaryRedirect)
		}, false, nil},
		{"a redirect to nowhere", status(307), false, nil},
	} {
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			var o Options
			if strings.HasPrefix(x.name, "stalls") {
				o = stalls
			}
			f, r, l, layer := faultyRepo(t, o)
			f.set(func(w http.ResponseWriter, r *http.Request) bool {
				if isBlob(r) {
					x.fault(w, r, layer)
					return true
				}
				return false
			})
			start := time.Now()
			b, err := readRange(context.Background(), r, l.Digest, off, n)
			if err == nil {
				t.Fatalf("%d bytes and no error", len(b))
			}
			if Temporary(err) != x.temporary || x.is != nil && !errors.Is(err, x.is) {
				t.Errorf("temporary %v: %v", Temporary(err), err)
			}
			if want := time.Second; x.name == "429" && RetryAfter(err) != want {
				t.Errorf("retry after %v, want %v", RetryAfter(err), want)
			}
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("took %v", took)
			}
			// net/http itself repeats a request that a kept connection did not answer.
			// After a wrong range, the client requests the whole blob.
			most := int64(1)
			if strings.Contains(x.name, "ange") && !strings.Contains(x.name, "before") {
				most = 2
			}
			if got := f.requests.Load(); got > most && !strings.HasPrefix(x.name, "redirects") && x.name != "reset before the headers" {
				t.Errorf("%d requests: only the caller may retry", got)
			}
			if !bytes.Equal(b, layer[off:off+len(b)]) {
				t.Error("wrong bytes before the error")
			}
			f.set(nil)
			if RetryAfter(err) > 0 || o.StallTimeout > 0 {
				persist(t, r, l.Digest, layer, blockmap.Range(off, n))
			} else if b, err := readRange(context.Background(), r, l.Digest, off, n); err != nil || !bytes.Equal(b, layer[off:off+n]) {
				t.Errorf("after the fault has gone: %d bytes, %v", len(b), err)
			}
		})
	}
}

func TestRangeIgnored(t *testing.T) {
	var log lockedBuffer
	f, r, l, layer := faultyRepo(t, Options{Log: log.logger()})
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		r.Header.Del("Range")
		return false
	})
	for _, off := range []int64{0, 1, 1 << 20} {
		if b, err := readRange(context.Background(), r, l.Digest, off, 5000); err != nil || !bytes.Equal(b, layer[off:off+5000]) {
			t.Errorf("at %d: %d bytes, %v", off, len(b), err)
		}
	}
	if n := strings.Count(log.String(), "ignores range"); n != 1 {
		t.Errorf("logged %d times: %s", n, log.String())
	}
}

func TestRangeCancel(t *testing.T) {
	f, r, l, _ := faultyRepo(t, Options{StallTimeout: time.Minute, HeaderTimeout: time.Minute})
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		if isBlob(r) {
			<-r.Context().Done()
		}
		return isBlob(r)
	})
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_, err := readRange(ctx, r, l.Digest, 0, 10)
	if !errors.Is(err, context.DeadlineExceeded) || Temporary(err) {
		t.Errorf("%v", err)
	}
}

// Many ranges at once: each connection serves several of them.
func TestRangeConnections(t *testing.T) {
	f, r, l, layer := faultyRepo(t, Options{IdleConns: 32, drain: time.Minute})
	f.conns.Store(0)
	var wg sync.WaitGroup
	for w := range 32 {
		wg.Go(func() {
			for i := range 20 {
				off := int64((w*20 + i) * 3001)
				if b, err := readRange(context.Background(), r, l.Digest, off, 3001); err != nil || !bytes.Equal(b, layer[off:off+3001]) {
					t.Errorf("at %d: %d bytes, %v", off, len(b), err)
				}
			}
		})
	}
	wg.Wait()
	if n := f.conns.Load(); n > 40 {
		t.Errorf("%d connections for 32 readers", n)
	}
	s := r.client.Stats()
	if len(s) != 1 || s[0].Requests < 640 || s[0].Bytes < 640*3001 || len(s[0].Errors) > 1 {
		t.Errorf("stats: %+v", s)
	}
}

// A whole blob is read to its end in spite of any number of breaks. It never ends
// without an error if it is not the right blob.
func TestOpenBlobFaults(t *testing.T) {
	ctx := context.Background()
	t.Run("breaks", func(t *testing.T) {
		f, r, l, layer := faultyRepo(t, Options{})
		var n atomic.Int64
		f.set(func(w http.ResponseWriter, req *http.Request) bool {
			if !isBlob(req) {
				return false
			}
			switch n.Add(1) % 4 {
			case 1:
				partly(w, req, layer, 0.3, true)
			case 2:
				w.WriteHeader(503)
			case 3:
				partly(w, req, layer, 0.3, false)
			default:
				partly(w, req, layer, 0, true)
			}
			return true
		})
		rc, err := r.OpenBlob(ctx, l)
		if err != nil {
			t.Fatal(err)
		}
		defer rc.Close()
		// The rest gets smaller with each break; stop breaking at the end.
		head := make([]byte, len(layer)*3/4)
		if _, err := io.ReadFull(rc, head); err != nil {
			t.Fatal(err)
		}
		f.set(nil)
		tail, err := io.ReadAll(rc)
		if err != nil || !bytes.Equal(append(head, tail...), layer) {
			t.Errorf("%d bytes, %v", len(head)+len(tail), err)
		}
		if n.Load() < 7 {
			t.Errorf("only %d requests were faulty", n.Load())
		}
	})
	t.Run("for ever", func(t *testing.T) {
		f, r, l, layer := faultyRepo(t, Options{})
		f.set(func(w http.ResponseWriter, req *http.Request) bool {
			if isBlob(req) && req.Header.Get("Range") == "" {
				partly(w, req, layer, 0.3, true)
				return true
			}
			if isBlob(req) {
				w.WriteHeader(500)
			}
			return isBlob(req)
		})
		b, err := r.Blob(ctx, l)
		if !errors.Is(err, ErrUnavailable) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
	})
	t.Run("altered", func(t *testing.T) {
		f, r, l, layer := faultyRepo(t, Options{})
		bad := bytes.Clone(layer)
		bad[len(bad)-1]++
		f.set(func(w http.ResponseWriter, req *http.Request) bool {
			if isBlob(req) {
				w.Write(bad)
			}
			return isBlob(req)
		})
		rc, err := r.OpenBlob(ctx, l)
		if err != nil {
			t.Fatal(err)
		}
		defer rc.Close()
		if _, err := io.Copy(io.Discard, rc); !errors.Is(err, ErrDigest) || Temporary(err) {
			t.Errorf("%v", err)
		}
		if s := r.client.Stats(); s[0].Wrong != 1 {
			t.Errorf("%+v", s)
		}
		if _, err := rc.Read(make([]byte, 1)); !errors.Is(err, ErrDigest) {
			t.Errorf("the next read: %v", err)
		}
	})
	t.Run("truncated at the registry", func(t *testing.T) {
		f, r, l, layer := faultyRepo(t, Options{})
		f.set(func(w http.ResponseWriter, req *http.Request) bool {
			if isBlob(req) {
				http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(layer[:len(layer)/2]))
			}
			return isBlob(req)
		})
		if _, err := r.Blob(ctx, l); err == nil || Temporary(err) {
			t.Errorf("%v", err)
		}
	})
	t.Run("stalls", func(t *testing.T) {
		f, r, l, layer := faultyRepo(t, Options{StallTimeout: time.Second})
		var stalled atomic.Bool
		f.set(func(w http.ResponseWriter, req *http.Request) bool {
			if !isBlob(req) || stalled.Swap(true) {
				return false
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(layer)))
			w.Write(layer[:100_000])
			http.NewResponseController(w).Flush()
			<-req.Context().Done()
			return true
		})
		if b, err := r.Blob(ctx, l); err != nil || !bytes.Equal(b, layer) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
	})
}

func TestResolveFaults(t *testing.T) {
	ctx := context.Background()
	f, r, _, _ := faultyRepo(t, Options{})
	manifest := func(answer func(http.ResponseWriter, int64)) {
		var n atomic.Int64
		f.set(func(w http.ResponseWriter, req *http.Request) bool {
			if !strings.Contains(req.URL.Path, "/manifests/") {
				return false
			}
			answer(w, n.Add(1))
			return true
		})
	}
	want, err := r.Resolve(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	f.set(func(w http.ResponseWriter, req *http.Request) bool {
		if f.requests.Load()%3 == 0 {
			return false
		}
		w.WriteHeader(http.StatusBadGateway)
		return true
	})
	if got, err := r.Resolve(ctx, nil); err != nil || got.Digest != want.Digest {
		t.Errorf("after two failures: %v", err)
	}
	for name, answer := range map[string]func(http.ResponseWriter, int64){
		"500":        func(w http.ResponseWriter, _ int64) { w.WriteHeader(500) },
		"wrong":      func(w http.ResponseWriter, _ int64) { w.Write([]byte(`{"schemaVersion":2}`)) },
		"no JSON":    func(w http.ResponseWriter, _ int64) { w.Write([]byte("<html>")) },
		"huge":       func(w http.ResponseWriter, _ int64) { io.Copy(w, io.LimitReader(zeros{}, maxManifest+2)) },
		"huge, said": func(w http.ResponseWriter, _ int64) { w.Header().Set("Content-Length", "99999999999") },
		"lying": func(w http.ResponseWriter, _ int64) {
			w.Header().Set("Docker-Content-Digest", want.Digest.String())
			w.Write([]byte(`{"schemaVersion":2,"config":{},"layers":[]}`))
		},
		"both": func(w http.ResponseWriter, _ int64) {
			w.Write([]byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[],"manifests":[]}`))
		},
		"schema 1": func(w http.ResponseWriter, _ int64) {
			w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v1+prettyjws")
			w.Write([]byte(`{"schemaVersion":1}`))
		},
	} {
		manifest(answer)
		_, err := r.Resolve(ctx, nil)
		if err == nil || !strings.HasPrefix(err.Error(), "resolve "+f.host()+"/app:v1: ") {
			t.Errorf("%s: %v", name, err)
		}
		if Temporary(err) != (name == "500") && name != "huge, said" {
			t.Errorf("%s: temporary is %v: %v", name, Temporary(err), err)
		}
		if _, err := openRepo(t, r.client, f.host()+"/app@"+want.Digest.String()).Resolve(ctx, nil); err == nil {
			t.Errorf("%s: resolved by digest", name)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// A push survives temporary errors, and does not trust a digest in an answer.
func TestPushFaults(t *testing.T) {
	ctx := context.Background()
	f, r, _, _ := faultyRepo(t, Options{Attempts: 20})
	for _, size := range []int{1000, 3 << 20} {
		data := noise(size, uint64(size))
		d := describe(data, "application/octet-stream")
		var n atomic.Int64
		f.set(func(w http.ResponseWriter, req *http.Request) bool {
			switch i := n.Add(1); {
			case i > 12, i%3 == 0:
				return false
			case i%3 == 1:
				w.WriteHeader(503)
			default:
				panic(http.ErrAbortHandler)
			}
			return true
		})
		var last atomic.Int64
		if sent, err := r.PushBlob(ctx, d, tempFile(t, data), last.Store); err != nil || !sent {
			t.Errorf("%d bytes: %v, %v", size, sent, err)
		}
		if last.Load() != d.Size {
			t.Errorf("progress ended at %d of %d", last.Load(), d.Size)
		}
		f.set(nil)
		if b, err := r.Blob(ctx, d); err != nil || !bytes.Equal(b, data) {
			t.Errorf("%d bytes: read back %d, %v", size, len(b), err)
		}
	}
	t.Run("the answer is lost", func(t *testing.T) {
		data := noise(2000, 9)
		d := describe(data, "application/octet-stream")
		var lost atomic.Bool
		f.set(func(w http.ResponseWriter, req *http.Request) bool {
			if req.Method != http.MethodPut || lost.Swap(true) {
				return false
			}
			req.RequestURI, req.URL.Scheme, req.URL.Host = "", "http", f.host()
			req.Close = true
			resp, err := http.DefaultTransport.RoundTrip(req) // through the proxy again
			if err != nil || resp.StatusCode != http.StatusCreated {
				t.Errorf("%v, %v", resp, err)
			}
			resp.Body.Close()
			panic(http.ErrAbortHandler)
		})
		defer f.set(nil)
		if _, err := r.PushBlob(ctx, d, tempFile(t, data), nil); err != nil {
			t.Error(err)
		}
	})
	t.Run("wrong digest", func(t *testing.T) {
		d := describe([]byte("aaaa"), "application/octet-stream")
		if _, err := r.PushBlob(ctx, d, tempFile(t, []byte("bbbb")), nil); err == nil || Temporary(err) {
			t.Errorf("%v", err)
		}
		if has, err := r.HasBlob(ctx, d); has || err != nil {
			t.Errorf("%v, %v", has, err)
		}
	})
	t.Run("wrong size", func(t *testing.T) {
		d := describe([]byte("aaaaa"), "application/octet-stream")
		if _, err := r.PushBlob(ctx, d, tempFile(t, []byte("bbbb")), nil); err == nil || Temporary(err) {
			t.Errorf("%v", err)
		}
	})
	t.Run("stalled", func(t *testing.T) {
		f, r, _, _ := faultyRepo(t, Options{Attempts: 2, StallTimeout: stalls.StallTimeout})
		end := make(chan struct{})
		defer close(end)
		f.set(func(w http.ResponseWriter, req *http.Request) bool {
			if req.Method == http.MethodPatch {
				<-end // without reading, so that it is not known when the client goes
				return true
			}
			return false
		})
		data := noise(16<<20, 3) // more than the sockets take
		_, err := r.PushBlob(ctx, describe(data, "x/y"), tempFile(t, data), nil)
		if !errors.Is(err, ErrUnavailable) {
			t.Errorf("%v", err)
		}
	})
}

// The client follows a redirect to object storage without credentials, remembers it,
// and drops it when the storage no longer answers.
func TestRedirect(t *testing.T) {
	ctx := context.Background()
	var leaked, stored, signature atomic.Int64
	signature.Store(1)
	layer := noise(1<<20, 4)
	storage := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		stored.Add(1)
		if r.Header.Get("Authorization") != "" || r.Header.Get("Cookie") != "" {
			leaked.Add(1)
		}
		if r.URL.Query().Get("sig") != fmt.Sprint(signature.Load()) {
			http.Error(w, "expired", http.StatusForbidden)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(layer))
	}))
	f := newFaulty(t, dockerRegistry(t, "auth: {htpasswd: {realm: test, path: "+htpasswd(t, "secret")+"}}"))
	c := newClient(t, Options{Credentials: fixed(Login{Username: "alice", Password: "secret"})})
	r := openRepo(t, c, f.host()+"/app:v1")
	_, l := pushImage(t, ctx, r, "v1", layer, amd64)
	f.requests.Store(0)
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		if isBlob(r) && r.Header.Get("Authorization") != "" {
			http.Redirect(w, r, fmt.Sprintf("%s/bucket/x?sig=%d", storage.URL, signature.Load()), http.StatusTemporaryRedirect)
			return true
		}
		return false
	})
	check := func(n int) {
		t.Helper()
		for i := range n {
			if b, err := readRange(ctx, r, l.Digest, int64(i*1000), 1000); err != nil || !bytes.Equal(b, layer[i*1000:i*1000+1000]) {
				t.Fatalf("%d: %v", i, err)
			}
		}
	}
	check(10)
	if n := f.requests.Load(); n != 1 {
		t.Errorf("the registry was asked %d times, want 1", n)
	}
	signature.Add(1)
	check(10)
	if n := f.requests.Load(); n != 2 {
		t.Errorf("the registry was asked %d times after the signature had expired, want 2", n)
	}
	// The storage goes away: one read fails, then the client asks the registry again.
	storage.Close()
	f.set(nil)
	if _, err := readRange(ctx, r, l.Digest, 0, 1000); !Temporary(err) || strings.Contains(err.Error(), "sig=") {
		t.Errorf("%v", err)
	}
	check(3)
	if leaked.Load() != 0 || stored.Load() == 0 {
		t.Errorf("credentials were sent to the storage %d times of %d", leaked.Load(), stored.Load())
	}
}

// Over TLS: HTTP/2, an untrusted certificate, plain HTTP where it is not allowed, and a
// redirect from HTTPS to HTTP.
func TestTLS(t *testing.T) {
	ctx := context.Background()
	layer := noise(100_000, 5)
	var proto atomic.Int64
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		proto.Store(int64(r.ProtoMajor))
		if strings.HasSuffix(r.URL.Path, strings.Repeat("0", 64)) {
			http.Redirect(w, r, "http://storage.example/x?sig=secret", http.StatusTemporaryRedirect)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(layer))
	}))
	s.EnableHTTP2 = true
	s.Config.ErrorLog = quiet
	s.StartTLS()
	t.Cleanup(s.Close)
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(s.URL, "https://"))
	// "example.com" is in the certificate; the dialer knows its address.
	dial := func(c *Client) *Client {
		c.transport.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, "127.0.0.1:"+port)
		}
		return c
	}
	trusting := s.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	trusting.NextProtos = nil
	good := openRepo(t, dial(newClient(t, Options{TLS: trusting})), "example.com/app")
	if b, err := readRange(ctx, good, hashOf(layer), 10, 1000); err != nil || !bytes.Equal(b, layer[10:1010]) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if proto.Load() != 2 {
		t.Errorf("HTTP/%d", proto.Load())
	}
	h := v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("0", 64)}
	if _, err := readRange(ctx, good, h, 0, 1); err == nil || !strings.Contains(err.Error(), "plain HTTP") || strings.Contains(err.Error(), "secret") {
		t.Errorf("redirect to plain HTTP: %v", err)
	}
	distrusting := openRepo(t, dial(newClient(t, Options{})), "example.com/app")
	if _, err := readRange(ctx, distrusting, hashOf(layer), 10, 1000); err == nil || Temporary(err) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("%v", err)
	}
	_, port, _ = net.SplitHostPort(memoryRegistry(t, false))
	plain := openRepo(t, dial(newClient(t, Options{})), "example.com/app")
	if _, err := readRange(ctx, plain, hashOf(layer), 10, 1000); err == nil || Temporary(err) || !strings.Contains(err.Error(), "plain HTTP") {
		t.Errorf("%v", err)
	}
	insecure := openRepo(t, dial(newClient(t, Options{Insecure: []string{"example.com"}})), "example.com/app")
	if _, err := readRange(ctx, insecure, hashOf(layer), 10, 1000); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
}

// LastFailure returns what the registry has answered while a call is still being retried.
func TestLastFailure(t *testing.T) {
	f, r, _, _ := faultyRepo(t, Options{backoff: time.Hour})
	if err := r.LastFailure(time.Time{}); err != nil {
		t.Errorf("before any request has failed: %v", err)
	}
	began := time.Now()
	f.set(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(http.StatusInternalServerError)
		io.WriteString(w, "the disk is on fire")
		return true
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	resolved := make(chan error, 1)
	go func() {
		_, err := r.Resolve(ctx, nil)
		resolved <- err
	}()
	for deadline := time.Now().Add(time.Minute); r.LastFailure(began) == nil && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if err := r.LastFailure(began); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "500") || !strings.Contains(err.Error(), "the disk is on fire") {
		t.Errorf("%v", err)
	}
	if err := r.LastFailure(time.Now().Add(time.Second)); err != nil {
		t.Errorf("a failure before that time: %v", err)
	}
	cancel()
	if err := <-resolved; err == nil {
		t.Error("the image was found")
	}
	dir := openRepo(t, newClient(t, Options{}), "oci:"+t.TempDir())
	if _, err := dir.Resolve(t.Context(), nil); err == nil || dir.LastFailure(time.Time{}) != nil {
		t.Errorf("a layout: %v", dir.LastFailure(time.Time{}))
	}
}
