package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/blockmap/blocktest"
)

func TestMain(m *testing.M) { blocktest.Main(m) }

// dockerRegistry runs docker-registry on a free port of loopback until the test ends,
// and returns its address.
func dockerRegistry(t testing.TB, extra string) string {
	t.Helper()
	bin, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Skip("docker-registry is not installed")
	}
	dir := t.TempDir()
	addr := freeAddr(t)
	config := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"+
		"storage: {filesystem: {rootdirectory: %q}}\nhttp: {addr: %q, secret: test}\n%s", filepath.Join(dir, "data"), addr, extra)
	path := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd := exec.Command(bin, "serve", path)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() && out.Len() > 0 {
			t.Logf("docker-registry: %s", out.String())
		}
	})
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			return addr
		} else if time.Now().After(end) {
			t.Fatalf("docker-registry does not listen: %v", err)
		}
	}
}

// freeAddr is an address where nobody listens. It is one of the many of loopback, so that no
// other program takes the port before the test uses it, be it as the source of a connection.
func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", 16+rand.IntN(200), rand.IntN(256), 1+rand.IntN(254)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// memoryRegistry runs the registry of go-containerregistry, with or without the
// referrers API.
func memoryRegistry(t testing.TB, referrers bool) string {
	t.Helper()
	return hostOf(serve(t, registryHandler(referrers)))
}

func serve(t testing.TB, h http.Handler) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s
}

func hostOf(s *httptest.Server) string { return strings.TrimPrefix(s.URL, "http://") }

func newClient(t testing.TB, o Options) *Client {
	t.Helper()
	if o.backoff == 0 {
		o.backoff = 2 * time.Millisecond
	}
	if o.Settle == 0 {
		o.Settle = 200 * time.Millisecond // a push fails after settleLimit times that
	}
	c := New(o)
	t.Cleanup(c.Close)
	return c
}

func openRepo(t testing.TB, c *Client, ref string) *Repo {
	t.Helper()
	r, err := ParseRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	repo, err := c.Open(r)
	if err != nil {
		t.Fatal(err)
	}
	return repo
}

// media are all media that can be written to: a reference without a tag for each.
func media(t *testing.T, run func(t *testing.T, place string)) {
	t.Run("docker-registry", func(t *testing.T) { run(t, dockerRegistry(t, "")+"/team/app") })
	t.Run("memory", func(t *testing.T) { run(t, memoryRegistry(t, false)+"/team/app") })
	t.Run("memory-referrers", func(t *testing.T) { run(t, memoryRegistry(t, true)+"/team/app") })
	t.Run("layout", func(t *testing.T) { run(t, "oci:"+t.TempDir()+"/new/layout") })
}

// noise returns n bytes that do not compress and are the same each time.
func noise(n int, seed uint64) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(b)
	return b
}

func describe(b []byte, t types.MediaType) v1.Descriptor {
	return v1.Descriptor{MediaType: t, Size: int64(len(b)), Digest: hashOf(b)}
}

func tempFile(t testing.TB, b []byte) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "blob")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// pushImage pushes an image of one layer, and returns its descriptor and layer.
func pushImage(t testing.TB, ctx context.Context, r *Repo, tag string, layer []byte, p v1.Platform) (v1.Descriptor, v1.Descriptor) {
	t.Helper()
	l := describe(layer, types.OCIUncompressedLayer)
	if _, err := r.PushBlob(ctx, l, tempFile(t, layer), nil); err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(map[string]any{"os": p.OS, "architecture": p.Architecture, "config": map[string]any{},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{l.Digest.String()}}})
	if err != nil {
		t.Fatal(err)
	}
	c, err := r.PushBytes(ctx, config, types.OCIConfigJSON)
	if err != nil {
		t.Fatal(err)
	}
	return push(t, ctx, r, tag, v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: c, Layers: []v1.Descriptor{l}}), l
}

func push(t testing.TB, ctx context.Context, r *Repo, tag string, m v1.Manifest) v1.Descriptor {
	t.Helper()
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	d, err := r.PushManifest(ctx, raw, m.MediaType, tag)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// artifact returns the manifest of an artifact about subject. The repository must have
// its config.
func artifact(subject v1.Descriptor, kind string, annotations map[string]string) v1.Manifest {
	empty := describe([]byte("{}"), types.OCIEmptyJSON)
	return v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: kind, Config: empty,
		Layers: []v1.Descriptor{empty}, Subject: &subject, Annotations: annotations}
}
