package registry

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Whatever a server answers, its connection serves the next request, unless too many bytes
// are left on it.
func TestConnectionsReused(t *testing.T) {
	const off, n, times = 70_000, 5000, 30
	read := func(r *Repo, l v1.Descriptor) error {
		_, err := readRange(context.Background(), r, l.Digest, off, n)
		return err
	}
	resolve := func(r *Repo, _ v1.Descriptor) error {
		_, err := r.Lookup(context.Background(), r.Ref())
		return err
	}
	page := func(status int, length int) func(http.ResponseWriter, *http.Request, []byte) {
		return func(w http.ResponseWriter, _ *http.Request, _ []byte) {
			w.Header().Set("Content-Type", "text/html")
			w.WriteHeader(status)
			io.WriteString(w, strings.Repeat("x", length))
		}
	}
	for name, x := range map[string]struct {
		answer func(w http.ResponseWriter, r *http.Request, layer []byte)
		do     func(r *Repo, l v1.Descriptor) error
		fails  bool
	}{
		"a range": {answer: func(w http.ResponseWriter, r *http.Request, layer []byte) { serveContent(layer)(w, r) }, do: read},
		"a range in pieces of unknown length": {answer: func(w http.ResponseWriter, r *http.Request, layer []byte) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, len(layer)))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(layer[off : off+n-1])
			http.NewResponseController(w).Flush()
			w.Write(layer[off+n-1 : off+n])
			http.NewResponseController(w).Flush()
		}, do: read},
		"a wider range": {answer: func(w http.ResponseWriter, r *http.Request, layer []byte) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off-10, off+n+9999, len(layer)))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(layer[off-10 : off+n+10000])
		}, do: read},
		"404 with a page": {answer: page(404, 5000), do: read, fails: true},
		"403 with a page": {answer: page(403, 5000), do: read, fails: true},
		"416":             {answer: page(416, 100), do: read, fails: true},
		"500 with a page": {answer: page(500, 5000), do: read, fails: true},
		"503 with a page": {answer: page(503, 5000), do: read, fails: true},
		"401 with a challenge": {answer: func(w http.ResponseWriter, r *http.Request, layer []byte) {
			if _, p, _ := r.BasicAuth(); p != "right" {
				w.Header().Set("Www-Authenticate", `Basic realm="x"`)
				page(401, 2000)(w, r, layer)
				return
			}
			serveContent(layer)(w, r)
		}, do: func(r *Repo, l v1.Descriptor) error {
			r.reader.(*remote).origin.auth = &authorizer{client: r.client, root: r.reader.(*remote).origin.root} // as for the first time
			return read(r, l)
		}},
		"a redirect with a page": {answer: func(w http.ResponseWriter, r *http.Request, layer []byte) {
			if !r.URL.Query().Has("here") {
				w.Header().Set("Location", r.URL.Path+"?here")
				page(307, 3000)(w, r, layer)
				return
			}
			serveContent(layer)(w, r)
		}, do: read},
		"a manifest in pieces of unknown length": {answer: func(w http.ResponseWriter, _ *http.Request, _ []byte) {
			io.WriteString(w, `{"schemaVersion":2,"config":{},`)
			http.NewResponseController(w).Flush()
			io.WriteString(w, `"layers":[]}`)
		}, do: resolve},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, r, l, layer := faultyRepo(t, Options{drain: time.Minute,
				Credentials: fixed(Login{Username: "a", Password: "right"})})
			f.set(func(w http.ResponseWriter, r *http.Request) bool { x.answer(w, r, layer); return true })
			r.client.transport.CloseIdleConnections()
			f.conns.Store(0)
			for range times {
				err := x.do(r, l)
				if err != nil != x.fails {
					t.Fatal(err)
				}
				if d := RetryAfter(err); d > 0 {
					time.Sleep(d) // as told, not as a proof
				}
			}
			if got := f.conns.Load(); got > 1 {
				t.Errorf("%d connections for %d requests one after the other", got, times)
			}
		})
	}
}

// A body that is given up costs its connection, and no bytes.
func TestConnectionsGivenUp(t *testing.T) {
	_, r, l, _ := faultyRepo(t, Options{})
	rc, err := r.OpenRange(t.Context(), digestOf(l.Digest), 0, l.Size)
	if err != nil {
		t.Fatal(err)
	}
	rc.Close()
	if s := r.client.Stats(); s[0].Bytes > l.Size/2 {
		t.Errorf("%d of %d bytes were read", s[0].Bytes, l.Size)
	}
}
