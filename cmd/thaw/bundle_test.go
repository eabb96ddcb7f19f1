package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/cmd/thaw/internal/host"
	"thaw/tracefile"
)

// finderOf finds images as the program does.
func finderOf(t testing.TB) *host.Finder {
	t.Helper()
	f, err := (&app{stderr: io.Discard, logFormat: "text", platform: "linux/amd64"}).access(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f
}

// blockImageOf finds a block image as the program does, and what is beside it.
func blockImageOf(t testing.TB, ref string) (*host.BlockImage, host.Beside) {
	t.Helper()
	b, err := finderOf(t).Find(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	found, err := b.Beside(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return b, found
}

// bundleOf is the last bundle beside an image.
func bundleOf(t testing.TB, ref string) v1.Descriptor {
	t.Helper()
	_, found := blockImageOf(t, ref)
	if len(found.Bundles) == 0 {
		t.Fatal("there is no bundle")
	}
	layer, ok := tracefile.AnnotatedLayer(found.Bundles[len(found.Bundles)-1], tracefile.MediaTypeBundle)
	if !ok {
		t.Fatal("the list of referrers does not carry the annotation of the bundle")
	}
	return layer
}

// readWide reads the first 24 MiB of an export, where the files are.
const readWide = "read 0 24M"

func qemuRead(t testing.TB, uri string, commands ...string) {
	t.Helper()
	args := []string{"-r", "-f", "raw"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	tool(t, "qemu-io", append(args, uri)...)
}

// bundled is an image in a registry behind a proxy, with a trace and a bundle of
// all that it has beside it.
func bundled(t *testing.T, pack bool) (p *proxy, reg *registryProcess, ref, trace string) {
	t.Helper()
	need(t, "qemu-io", "nbdcopy")
	made := bundledStorage(t)
	storage := t.TempDir()
	of := "plain"
	if pack {
		of = "packed"
	}
	if err := os.CopyFS(storage, os.DirFS(filepath.Join(made, of))); err != nil {
		t.Fatal(err)
	}
	reg = startRegistry(t, "", storage, "")
	p = startProxy(t, reg.addr)
	return p, reg, p.host() + "/team/app:v1", filepath.Join(made, "trace")
}

// bundledImage is where bundledStorage has made its directories.
var bundledImage struct {
	sync.Mutex
	dir string
}

// bundledStorage makes what bundled is about, once: "plain" is the storage of a registry
// with an image and its trace, "packed" has their bundle too, and "trace" is that trace.
func bundledStorage(t *testing.T) string {
	t.Helper()
	bundledImage.Lock()
	defer bundledImage.Unlock()
	if bundledImage.dir != "" {
		return bundledImage.dir
	}
	dir, storage := t.TempDir(), t.TempDir()
	reg := startRegistry(t, "", storage, "")
	ref := reg.addr + "/team/app:v1"
	push(t, ref, imageOf(t, layerOf(t, append(files(1, "base", 60), file{name: "big", data: random(3, 16<<20)})...)))
	must(t, "build", "--size", "32M", "--chunk-size", "128K", ref)
	trace := filepath.Join(dir, "trace")
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--record", trace, "--fetch-ahead", "none")
	qemuRead(t, s.uri(), readWide)
	s.term()
	must(t, "trace", "push", ref, trace)
	if err := os.CopyFS(filepath.Join(dir, "plain"), os.DirFS(storage)); err != nil {
		t.Fatal(err)
	}
	must(t, "trace", "pack", ref)
	reg.stop()
	if err := os.CopyFS(filepath.Join(dir, "packed"), os.DirFS(storage)); err != nil {
		t.Fatal(err)
	}
	kept, err := os.MkdirTemp("", "thaw-bundled")
	if err != nil {
		t.Fatal(err)
	}
	bundledImage.dir = kept
	if err := os.CopyFS(kept, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return kept
}

// ranges are the requests for parts of a blob, or of all but that one.
func ranges(seen []string, blob v1.Hash, but bool) (n []string) {
	for _, r := range seen {
		if strings.HasPrefix(r, "GET") && strings.Contains(r, "bytes=") && strings.Contains(r, blob.String()) != but {
			n = append(n, r)
		}
	}
	return n
}

// lines counts the lines of a log that have a word in them.
func (s *server) lines(word string) int { return strings.Count(s.stderr.String(), word) }

// wholeDevice reads an export from beginning to end and compares it.
func wholeDevice(t testing.TB, uri, want string) {
	t.Helper()
	got, err := os.ReadFile(device(t, uri))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(want)
	if err != nil || !bytes.Equal(got, b) {
		t.Errorf("the device has other bytes (%v)", err)
	}
}

// A start with a bundle is one request, and reads cost nothing more; wherever the
// bundle was made from.
func TestBundleStart(t *testing.T) {
	t.Parallel()
	p, _, ref, trace := bundled(t, false)
	if _, stderr, code := thaw(t, "trace", "pack", ref, "--json", filepath.Join(t.TempDir(), "none")); code != exitError {
		t.Errorf("exit %d, %s", code, stderr)
	}
	for _, from := range [][]string{nil, {trace}} {
		var out packed
		if err := json.Unmarshal([]byte(must(t, append([]string{"trace", "pack", "--json", ref}, from...)...)), &out); err != nil {
			t.Fatal(err)
		}
		layer := bundleOf(t, ref)
		if out.Type != "packed" || out.Bytes != layer.Size || out.Chunks < 20 || out.Leaves < out.Chunks || out.Head <= 0 || out.Starts != 1 {
			t.Errorf("%+v", out)
		}
		p.take()
		s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", "auto", "--prefetch-wait", "100")
		if !s.said("bundle_leaves") {
			t.Errorf("it does not say that it has a bundle:\n%s", s.stderr.String())
		}
		qemuRead(t, s.uri(), readWide)
		seen := p.take()
		if n := ranges(seen, layer.Digest, false); len(n) != 1 {
			t.Errorf("%d requests for the bundle: %v", len(n), n)
		}
		if n := ranges(seen, layer.Digest, true); len(n) > 0 {
			t.Errorf("requests beside the bundle: %v", n)
		}
		if sum, code := s.term(); code != exitOK || !s.said(`"replayed"`) || sum["failed_chunks"].(float64) != 0 {
			t.Errorf("exit %d, %v", code, sum)
		}
	}
	// Another version of the image with nothing but a bundle has no trace to give.
	other := p.host() + "/team/app:v2"
	push(t, other, imageOf(t, layerOf(t, files(5, "other", 10)...)))
	must(t, "build", "--size", "32M", other)
	s := serving(t, other, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", ref)
	if !s.said("a trace of another version is used") {
		t.Errorf("%s", s.stderr.String())
	}
	s.term()
	s = serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", other)
	if !s.said("a trace cannot be used") {
		t.Errorf("it does not say that %s has no traces:\n%s", other, s.stderr.String())
	}
	s.term()
}

// All of it with a directory instead of a registry.
func TestBundleInALayout(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	dir := t.TempDir()
	saveArchive(t, dir+"/src.tar", sample(t))
	image := "oci:" + dir + "/dst:x"
	must(t, "build", "--size", "64M", "docker-archive:"+dir+"/src.tar", image)
	if _, stderr, code := thaw(t, "trace", "pack", image); code != exitError || !strings.Contains(stderr, "--trace-push") {
		t.Errorf("packed without traces: exit %d, %s", code, stderr)
	}
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", dir+"/c1", "--trace", "auto", "--trace-push", "--fetch-ahead", "none", "--record-quiet", "1h")
	qemuRead(t, s.uri(), readWide)
	s.stopTrace()
	if !s.said("stored the recording beside its image") {
		t.Fatalf("%s", s.stderr.String())
	}
	s.term()
	must(t, "trace", "pack", image)
	s = serving(t, image, "--listen", "unix:"+socket(t), "--cache", dir+"/c2", "--trace", "auto", "--prefetch-wait", "100")
	qemuRead(t, s.uri(), readWide)
	if sum, code := s.term(); code != exitOK || !s.said("bundle_leaves") || sum["requests"].(float64) != 1 {
		t.Errorf("exit %d, %v\n%s", code, sum, s.stderr.String())
	}
}

// What lies beside an image can be anything: each thing that is of no use costs
// a line in the log, and the start goes on.
func TestBadBundles(t *testing.T) {
	t.Parallel()
	p, _, ref, _ := bundled(t, true)
	b, found := blockImageOf(t, ref)
	layer := bundleOf(t, ref)
	blob, err := b.Repo.Blob(t.Context(), layer)
	if err != nil {
		t.Fatal(err)
	}
	head, err := tracefile.ReadBundle(bytes.NewReader(blob))
	if err != nil {
		t.Fatal(err)
	}
	// put stores a manifest as given, with a blob if there is one.
	put := func(blob []byte, layer *v1.Descriptor, annotation string) {
		t.Helper()
		config, err := b.Repo.PushBytes(t.Context(), []byte("{}"), "application/vnd.oci.empty.v1+json")
		if err != nil {
			t.Fatal(err)
		}
		m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: tracefile.ArtifactTypeBundle, Config: config,
			Layers:      []v1.Descriptor{},
			Subject:     &v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: b.Digest, Size: int64(len(b.Raw))},
			Annotations: map[string]string{"n": fmt.Sprint(time.Now().UnixNano())}}
		if blob != nil {
			d, err := b.Repo.PushBytes(t.Context(), blob, tracefile.MediaTypeBundle)
			if err != nil {
				t.Fatal(err)
			}
			layer = &d
			if annotation == "" {
				annotation = fmt.Sprintf("%s %d", d.Digest, d.Size)
			}
		}
		if layer != nil {
			m.Layers = append(m.Layers, *layer)
		}
		if annotation != "" {
			m.Annotations[tracefile.AnnotationLayer] = annotation
		}
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.Repo.PushManifest(t.Context(), raw, types.OCIManifestSchema1, ""); err != nil {
			t.Fatal(err)
		}
	}
	// The names of chunks in another order than their content: a lie that only the
	// digests show.
	lie := &tracefile.Bundle{Chunks: slices.Clone(head.Chunks), Frames: head.Frames}
	for i := 1; i < len(lie.Chunks); i++ {
		if a, b := &lie.Chunks[i-1], &lie.Chunks[i]; a.Blocks == b.Blocks && (a.List == nil) == (b.List == nil) {
			*a, *b = *b, *a
		}
	}
	foreign := &tracefile.Bundle{
		Chunks: []tracefile.BundleChunk{{Digest: [32]byte{1}, Blocks: 1}},
		Frames: []tracefile.Frame{{Stored: 10, Parts: []tracefile.Part{{Count: 1}}}},
	}
	put(append(lie.Head(), blob[len(head.Head()):]...), nil, "")
	bad := []func(){
		func() { put(append(foreign.Head(), make([]byte, 10)...), nil, "") },
		func() { put(blob[:len(blob)/2], nil, "") },
		func() { put([]byte("no bundle at all, and no frame of any kind"), nil, "") },
		func() { put(blob, nil, fmt.Sprintf("%s %d", layer.Digest, layer.Size+1000)) },
		func() { put(blob, nil, fmt.Sprintf("%s %d", layer.Digest, layer.Size-1000)) },
		func() { put(nil, nil, fmt.Sprintf("sha256:%064d 1000", 7)) },
		func() { put(nil, nil, "nonsense") },
	}
	for _, f := range bad {
		f()
	}
	if _, now := blockImageOf(t, ref); len(now.Bundles) != min(8, len(bad)+2) || len(found.Bundles) != 1 {
		t.Fatalf("%d bundles are beside the image", len(now.Bundles))
	}
	want := func() string {
		s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--fetch-ahead", "none")
		defer s.term()
		return device(t, s.uri())
	}()
	p.take()
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", "auto", "--prefetch-wait", "100")
	before := len(p.take())
	qemuRead(t, s.uri(), readWide)
	if n := ranges(p.take(), v1.Hash{Hex: "none"}, true); len(n) > 0 {
		t.Errorf("after %d requests ahead a read made %v", before, n)
	}
	wholeDevice(t, s.uri(), want)
	if sum, code := s.term(); code != exitOK || sum["wrong_chunks"].(float64) < 1 || sum["failed_chunks"].(float64) != 0 {
		t.Errorf("exit %d, %v", code, sum)
	}
	if n := s.lines("a bundle cannot be used"); n != len(bad) {
		t.Errorf("%d lines for %d bad bundles:\n%s", n, len(bad), s.stderr.String())
	}
	if s.lines("the bundle download failed") != 1 || s.lines("replaying a trace") != 1 {
		t.Errorf("of the bundle that lies it says:\n%s", s.stderr.String())
	}
}

// cut makes the proxy end the bodies of a blob after so many bytes, with the
// connection, so many times.
func (p *proxy) cut(backend string, blob v1.Hash, after int64, times *atomic.Int64) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, blob.String()) || times.Add(-1) < 0 {
			return true
		}
		req, _ := http.NewRequestWithContext(r.Context(), r.Method, "http://"+backend+r.URL.Path, nil)
		req.Header = r.Header.Clone()
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return false
		}
		defer resp.Body.Close()
		for k, v := range resp.Header {
			w.Header()[k] = v
		}
		w.WriteHeader(resp.StatusCode)
		io.CopyN(w, resp.Body, after)
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
}

// A bundle that breaks off is gone on with.
func TestBundleBreaksOff(t *testing.T) {
	p, reg, ref, _ := bundled(t, true)
	layer := bundleOf(t, ref)
	var times atomic.Int64
	times.Store(2)
	p.set(p.cut(reg.addr, layer.Digest, layer.Size/3, &times))
	p.take()
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", "auto", "--prefetch-wait", "100")
	qemuRead(t, s.uri(), readWide)
	seen := p.take()
	if n := ranges(seen, layer.Digest, false); len(n) != 3 || strings.Contains(n[1], "bytes=0-") || n[1] == n[2] {
		t.Errorf("the bundle was asked for like this: %v", n)
	}
	if n := ranges(seen, layer.Digest, true); len(n) > 0 {
		t.Errorf("requests beside the bundle: %v", n)
	}
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
}

// A registry that dies within a bundle, for good: what has come is there, the
// rest is an I/O error for who reads it, and no more than that.
func TestRegistryDiesWithinABundle(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for the retries to end")
	}
	t.Parallel()
	p, reg, ref, _ := bundled(t, true)
	layer := bundleOf(t, ref)
	var times atomic.Int64
	times.Store(1)
	var dead atomic.Bool
	cut := p.cut(reg.addr, layer.Digest, layer.Size/2, &times)
	p.set(func(w http.ResponseWriter, r *http.Request) bool {
		if dead.Load() {
			panic(http.ErrAbortHandler)
		}
		if strings.Contains(r.URL.Path, layer.Digest.String()) {
			defer dead.Store(true)
		}
		return cut(w, r)
	})
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", "auto")
	if !s.said("the bundle download failed") {
		t.Errorf("it does not say that the bundle is lost:\n%s", s.stderr.String())
	}
	qemuRead(t, s.uri(), "read 0 64k") // what comes first
	began := time.Now()
	out, err := exec.Command("qemu-io", "-r", "-f", "raw", "-c", readWide, s.uri()).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "Input/output error") || time.Since(began) > 5*time.Minute {
		t.Errorf("reading what has not come took %v: %v\n%s", time.Since(began), err, out)
	}
	qemuRead(t, s.uri(), "read 0 64k")
	dead.Store(false)
	qemuRead(t, s.uri(), readWide)
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
}

// Two exports of one image and two clients at once bring each chunk once.
func TestTwoExportsOfOneImage(t *testing.T) {
	for _, pack := range []bool{false, true} {
		t.Run(fmt.Sprintf("bundle %v", pack), func(t *testing.T) {
			p, _, ref, _ := bundled(t, pack)
			var layer v1.Descriptor
			if pack {
				layer = bundleOf(t, ref)
			}
			b, _ := blockImageOf(t, ref)
			again := strings.TrimSuffix(ref, ":v1") + "@" + b.Digest.String()
			p.take()
			s := serving(t, ref, again, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", "auto")
			errs := make(chan error, 2)
			for _, e := range s.ready.Exports {
				go func() {
					out, err := exec.Command("qemu-io", "-r", "-f", "raw", "-c", readWide, e.URI).CombinedOutput()
					if err != nil {
						err = fmt.Errorf("%w: %s", err, out)
					}
					errs <- err
				}()
			}
			for range s.ready.Exports {
				if err := <-errs; err != nil {
					t.Error(err)
				}
			}
			sum, _ := s.term()
			seen := make(map[string]bool)
			for _, r := range ranges(p.take(), layer.Digest, true) {
				if seen[r] {
					t.Errorf("asked for twice: %s", r)
				}
				seen[r] = true
			}
			if got, all := sum["fetched_bytes"].(float64), sum["images_stored_bytes"].(float64); got > all*1.1 && !pack || got > all*1.9 {
				// What is far away in the bundle comes with it and alone.
				t.Errorf("%v bytes were fetched, the image has %v", got, all)
			}
		})
	}
}

// An export that a client has opened stops fetching ahead when its last client
// goes.
func TestAllowedExportStopsReplaying(t *testing.T) {
	t.Parallel()
	p, _, ref, _ := bundled(t, true)
	s := serving(t, "--allow", p.host()+"/**", "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", "auto", "--prefetch-rate", "1M")
	uri := "nbd+unix:///" + ref + "?socket=" + strings.TrimPrefix(s.ready.Listen[0], "unix:")
	replaying := func(n int) { // a client that stays until the start is replayed
		t.Helper()
		stay := exec.Command("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", "-c", "sleep 600000", uri)
		if err := startWithUs(stay); err != nil {
			t.Fatal(err)
		}
		until(t, "a trace is replayed", func() bool { return s.lines(`"replaying a trace"`) == n })
		stay.Process.Kill()
		stay.Wait()
	}
	replaying(1)
	if !s.said(`"replayed"`) {
		t.Fatalf("it does not say that it has stopped:\n%s", s.stderr.String())
	}
	for line := range strings.Lines(s.stderr.String()) {
		var m struct {
			Msg        string `json:"msg"`
			Chunks, Of int
		}
		if json.Unmarshal([]byte(line), &m) == nil && m.Msg == "replayed" && (m.Chunks >= m.Of || m.Of == 0) {
			t.Errorf("it went on: %s", line)
		}
	}
	counts := func() host.Stats {
		return decoded[shownStatus](t, must(t, "status", "--json", "--cache", s.cache())).Counts
	}
	until(t, "no request is under way", func() bool { return counts().InFlight == 0 })
	was := counts().Requests
	time.Sleep(300 * time.Millisecond) // in which it would make some
	if n := counts().Requests - was; n > 0 {
		t.Errorf("%d requests with nobody there", n)
	}
	replaying(2) // and once more
	// Who leaves at once leaves nothing to complain about.
	p.set(func(w http.ResponseWriter, r *http.Request) bool { time.Sleep(300 * time.Millisecond); return true })
	qemuRead(t, uri, "read 0 4k")
	if n := s.lines(`"WARN"`); n > 0 {
		t.Errorf("%d warnings:\n%s", n, s.stderr.String())
	}
	if _, code := s.term(); code != exitOK || s.lines(`"replaying a trace"`) > 3 { // it may have been there for long enough
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
}

// Without its registry an image that is here is served without waiting for word of
// its traces; and a trace that was cut is used as far as it goes.
func TestTracesWithoutARegistry(t *testing.T) {
	p, reg, ref, trace := bundled(t, false)
	file, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	cut := filepath.Join(t.TempDir(), "cut")
	if err := os.WriteFile(cut, file[:len(file)-3], 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, "trace", "push", ref, cut)
	cache := t.TempDir()
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache, "--trace", "auto", "--prefetch-wait", "100")
	if !s.said("replaying a trace") || !s.said("ends early") || s.lines("ends early") != 1 {
		t.Errorf("%s", s.stderr.String())
	}
	qemuRead(t, s.uri(), readWide)
	s.term()
	reg.stop()
	p.set(func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) })
	var alone time.Duration // what a start without traces takes on this machine
	for _, args := range [][]string{nil, {"--trace", "auto"}, {"--trace", "auto", "--prefetch-wait", "100"}} {
		began := time.Now()
		s = serving(t, append(args, ref, "--listen", "unix:"+socket(t), "--cache", cache)...)
		took := time.Since(began)
		if args == nil {
			alone = took
		} else if took > 8*time.Second+4*alone {
			t.Errorf("it was ready after %v, and without traces after %v", took, alone)
		}
		qemuRead(t, s.uri(), readWide)
		if _, code := s.term(); code != exitOK {
			t.Errorf("exit %d\n%s", code, s.stderr.String())
		}
	}
}
