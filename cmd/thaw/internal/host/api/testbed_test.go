package api

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/blockmap/blocktest"
	"thaw/blockmap/flatten"
	"thaw/cmd/thaw/internal/host"
	"thaw/fetcher/registry"
)

func TestMain(m *testing.M) { blocktest.Main(m) }

// bed is a server of the API over a real socket, and a registry that can be slow.
type bed struct {
	t        testing.TB
	registry string // HOST:PORT
	dir      string
	host     *host.Host
	server   *Server
	client   *Client
	doc      *openapi3.T

	mu      sync.Mutex
	before  func(w http.ResponseWriter, r *http.Request) bool // false: it has answered
	answers map[string]bool                                   // METHOD PATH CODE that were checked
}

func newBed(t testing.TB, o host.Options) *bed {
	t.Helper()
	b := &bed{t: t, answers: make(map[string]bool)}
	reg := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithReferrersSupport(true))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.mu.Lock()
		before := b.before
		b.mu.Unlock()
		if before == nil || before(w, r) {
			reg.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(s.Close)
	b.registry = strings.TrimPrefix(s.URL, "http://")
	dir, err := os.MkdirTemp("", "thaw") // not TempDir: the path of a socket has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b.dir, o.Dir, o.Finder = dir, dir, b.finder()
	if b.host, err = host.Open(o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.host.Close)
	b.server = Start(t.Context(), b.host, dir, "v1.2.3", o.Finder.Log)
	t.Cleanup(func() { b.server.Stop(t.Context()) })
	b.client = NewClient(dir)
	t.Cleanup(b.client.Close)
	if b.doc, err = openapi3.NewLoader().LoadFromData(openAPI); err != nil {
		t.Fatal(err)
	}
	return b
}

// restart starts the server anew, with other bounds.
func (b *bed) restart(o bounds) {
	b.t.Helper()
	b.server.Stop(b.t.Context())
	b.server = newServer(b.host, "v1.2.3", b.log())
	b.server.bounds = o
	b.server.listen(b.t.Context(), b.dir)
}

func (b *bed) set(before func(w http.ResponseWriter, r *http.Request) bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.before = before
}

// silent has the registry accept requests and not answer, until the test ends.
func (b *bed) silent() {
	ended := make(chan struct{})
	b.t.Cleanup(sync.OnceFunc(func() { close(ended) }))
	b.set(func(_ http.ResponseWriter, r *http.Request) bool {
		select {
		case <-r.Context().Done():
		case <-ended:
		}
		return false
	})
}

func (b *bed) log() *slog.Logger { return slog.New(slog.NewTextHandler(b.t.Output(), nil)) }

func (b *bed) finder() *host.Finder {
	log := b.log()
	return &host.Finder{
		Client: registry.New(registry.Options{Log: log, Settle: time.Millisecond}), Log: log,
		Platform: &v1.Platform{OS: "linux", Architecture: "amd64"},
	}
}

// push stores a block image, and returns its name.
func (b *bed) push(name string, m *blocktest.Image) string {
	b.t.Helper()
	name = b.registry + "/" + name
	f := b.finder()
	defer f.Close()
	ref, err := registry.ParseRef(name)
	if err != nil {
		b.t.Fatal(err)
	}
	repo, err := f.Client.Open(ref)
	if err != nil {
		b.t.Fatal(err)
	}
	blob := func(p []byte, mediaType types.MediaType) v1.Descriptor {
		b.t.Helper()
		d, err := repo.PushBytes(b.t.Context(), p, mediaType)
		if err != nil {
			b.t.Fatal(err)
		}
		return d
	}
	manifest := v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: flatten.ArtifactTypeImage,
		Config: blob([]byte("{}"), types.OCIConfigJSON), Layers: []v1.Descriptor{blob(m.Index.Encode(), flatten.MediaTypeIndex)},
	}
	for i := range m.Index.Streams {
		d := blob(m.Blobs[m.Index.Streams[i].Blob], flatten.MediaTypeStream)
		d.Annotations = map[string]string{flatten.AnnotationRole: string(flatten.RoleOverlay)}
		manifest.Layers = append(manifest.Layers, d)
	}
	raw, err := json.Marshal(manifest)
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := repo.PushManifest(b.t.Context(), raw, types.OCIManifestSchema1, ref.Tag); err != nil {
		b.t.Fatal(err)
	}
	return name
}

func (b *bed) add(name, image string) host.DeviceInfo {
	b.t.Helper()
	d, err := b.client.AddDevice(b.t.Context(), host.Spec{Name: name, Image: image})
	if err != nil {
		b.t.Fatal(err)
	}
	return d
}

// dial connects to the socket.
func (b *bed) dial() net.Conn {
	b.t.Helper()
	c, err := net.Dial("unix", filepath.Join(b.dir, socketName))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return c
}

// do sends a request of any kind, and checks the answer against openapi.yaml.
func (b *bed) do(method, path, body string) (code int, answer string, header http.Header) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), method, "http://thaw"+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	resp, err := b.client.http.Do(req)
	if err != nil {
		b.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	b.check(req, resp, got)
	return resp.StatusCode, string(got), resp.Header
}

// check holds an answer against openapi.yaml.
func (b *bed) check(req *http.Request, resp *http.Response, body []byte) {
	b.t.Helper()
	path := req.URL.Path
	for _, of := range []string{"/v1/devices/", "/v1/nodes/"} {
		if rest, ok := strings.CutPrefix(path, of); ok && rest != "" && !strings.Contains(req.URL.EscapedPath()[len(of):], "/") {
			path = of + "{id}"
		}
	}
	if id, what, ok := strings.Cut(strings.TrimPrefix(path, "/v1/devices/"), "/"); ok && what == "commit" && id != "" {
		path = "/v1/devices/{id}/commit"
	}
	what := fmt.Sprintf("%s %s %d", req.Method, path, resp.StatusCode)
	item := b.doc.Paths.Value(path)
	if item == nil || item.GetOperation(req.Method) == nil {
		var f Failed
		if json.Unmarshal(body, &f) != nil || f.Error == "" || resp.StatusCode != 404 && resp.StatusCode != 405 {
			b.t.Errorf("%s: it is not in openapi.yaml: %s", what, body)
		}
		return
	}
	want := item.GetOperation(req.Method).Responses.Value(fmt.Sprint(resp.StatusCode))
	if want == nil {
		b.t.Errorf("%s: the code is not in openapi.yaml: %s", what, body)
		return
	}
	b.mu.Lock()
	b.answers[what] = true
	b.mu.Unlock()
	for name := range want.Value.Headers {
		if v := resp.Header.Get(name); v == "" && name != "Retry-After" {
			b.t.Errorf("%s: it has no %s", what, name)
		} else if schema := want.Value.Headers[name].Value.Schema.Value; schema.Type.Is("string") {
			if err := b.doc.ValidateSchemaJSON(schema, v); err != nil {
				b.t.Errorf("%s: %s: %v", what, name, err)
			}
		}
	}
	kind := resp.Header.Get("Content-Type")
	if len(want.Value.Content) == 0 {
		if len(body) > 0 {
			b.t.Errorf("%s: a body: %q", what, body)
		}
		return
	}
	media := want.Value.Content[kind]
	if media == nil {
		b.t.Errorf("%s: its type is %q", what, kind)
		return
	}
	var v any = string(body)
	if kind == "application/json" {
		d := json.NewDecoder(bytes.NewReader(body))
		if err := d.Decode(&v); err != nil {
			b.t.Errorf("%s: %q: %v", what, body, err)
			return
		}
	}
	if err := b.doc.ValidateSchemaJSON(media.Schema.Value, v); err != nil {
		b.t.Errorf("%s: %s\n%v", what, body, err)
	}
}

// atMost bounds what a test waits for: a machine may be slow and busy, and a test that hangs ends.
const atMost = time.Minute

// await waits until ok.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(atMost); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, atMost)
		}
	}
}
