package flatten_test

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/blockmap/flatten"
)

// repo is a repository of a registry over HTTP: a Target, and a fetcher of the
// chunks that an Image lacks.
type repo struct {
	url string

	mu      sync.Mutex
	uploads []string // digests of blobs that were sent
	fetched int      // chunks
}

func (r *repo) String() string { return r.url }

func newRepo(t testing.TB) *repo {
	t.Helper()
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithReferrersSupport(true)))
	t.Cleanup(s.Close)
	return &repo{url: s.URL + "/v2/team/app"}
}

func (r *repo) do(ctx context.Context, method, url, rng string, body []byte, want ...int) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if method == http.MethodPut && strings.Contains(url, "/manifests/") {
		req.Header.Set("Content-Type", string(types.OCIManifestSchema1))
	}
	if rng != "" {
		req.Header.Set("Range", rng)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(want, resp.StatusCode) {
		resp.Body.Close()
		return nil, fmt.Errorf("%s %s: %s", method, url, resp.Status)
	}
	return resp, nil
}

func (r *repo) HasBlob(ctx context.Context, d v1.Descriptor) (bool, error) {
	resp, err := r.do(ctx, http.MethodHead, r.url+"/blobs/"+d.Digest.String(), "", nil, 200, 404)
	if err != nil {
		return false, err
	}
	return resp.StatusCode == 200, resp.Body.Close()
}

func (r *repo) OpenBlob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	resp, err := r.do(ctx, http.MethodGet, r.url+"/blobs/"+d.Digest.String(), "", nil, 200)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

func (r *repo) Blob(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	body, err := r.OpenBlob(ctx, d)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body)
}

func (r *repo) OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error) {
	resp, err := r.do(ctx, http.MethodGet, r.url+"/blobs/"+"sha256:"+blob.String(), fmt.Sprintf("bytes=%d-%d", off, off+n-1), nil, 206)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

func (r *repo) PushBytes(ctx context.Context, d v1.Descriptor, b []byte) error {
	if has, err := r.HasBlob(ctx, d); has || err != nil {
		return err
	}
	r.mu.Lock()
	r.uploads = append(r.uploads, d.Digest.Hex)
	r.mu.Unlock()
	resp, err := r.do(ctx, http.MethodPost, r.url+"/blobs/uploads/?digest="+d.Digest.String(), "", b, 201)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func (r *repo) PushFile(ctx context.Context, d v1.Descriptor, path string, _ func(int64)) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return r.PushBytes(ctx, d, b)
}

func (r *repo) Mount(context.Context, v1.Descriptor, flatten.Place) (bool, error) { return false, nil }

func (r *repo) Tagged(ctx context.Context, tag string) ([]byte, error) {
	resp, err := r.do(ctx, http.MethodGet, r.url+"/manifests/"+tag, "", nil, 200, 404)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == 404 {
		return nil, nil
	}
	return io.ReadAll(resp.Body)
}

func (r *repo) PushManifest(ctx context.Context, d v1.Descriptor, raw []byte, tag string) error {
	resp, err := r.do(ctx, http.MethodPut, r.url+"/manifests/"+cmp.Or(tag, d.Digest.String()), "", raw, 201)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Fetch brings chunks as blockmap.NewImage wants it.
func (r *repo) Fetch(ctx context.Context, wants []blockmap.Want) error {
	dec, err := zstd.NewReader(nil)
	if err != nil {
		return err
	}
	defer dec.Close()
	for _, w := range wants {
		r.mu.Lock()
		r.fetched++
		r.mu.Unlock()
		c := &w.Table.Chunks[w.Chunk]
		body, err := r.OpenRange(ctx, w.Table.Blob, c.Offset, int64(c.Stored))
		if err != nil {
			return err
		}
		stored, err := io.ReadAll(body)
		body.Close()
		if err != nil {
			return err
		}
		content, err := dec.DecodeAll(stored, nil)
		if err != nil {
			return err
		}
		if err := w.Stream.Fill(w.Chunk, content); err != nil {
			return err
		}
	}
	return nil
}

func (r *repo) Prefetch([]blockmap.Want) {}

// image reads an image back by its tag, as a server does.
func (r *repo) image(t testing.TB, tag string) (*flatten.Image, *blockmap.Index) {
	t.Helper()
	raw, err := r.Tagged(t.Context(), tag)
	if err != nil {
		t.Fatal(err)
	}
	m, err := flatten.ParseImage(raw)
	if err != nil {
		t.Fatal(err)
	}
	b, err := r.Blob(t.Context(), m.Index)
	if err != nil {
		t.Fatal(err)
	}
	ix, err := m.ParseIndex(b)
	if err != nil {
		t.Fatal(err)
	}
	return m, ix
}

// serve opens the device of an image.
func (r *repo) serve(t testing.TB, ix *blockmap.Index) *blockmap.Image {
	t.Helper()
	cache, err := blockmap.OpenCache(t.TempDir(), blockmap.CacheOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := blockmap.NewImage(ix, cache, r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close(); cache.Close() })
	return m
}

func (r *repo) verify(t *testing.T, m *flatten.Image, ix *blockmap.Index, p flatten.Policy) error {
	t.Helper()
	return flatten.Verify(t.Context(), m, ix, r.OpenBlob, p, t.TempDir())
}

// built pushes a block image of two layers under the tag base.
func (r *repo) built(t testing.TB) *flatten.Result {
	t.Helper()
	src := &flatten.Source{}
	var config v1.ConfigFile
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 2 {
		var layer bytes.Buffer
		w := tar.NewWriter(&layer)
		for j := range 20 {
			content := make([]byte, 50_000+j)
			for k := range content {
				content[k] = byte(rng.Uint32())
			}
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("f%d-%d", i, j), Mode: 0o644, Size: int64(len(content))}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(content); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		b := layer.Bytes()
		h := v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", sha256.Sum256(b))}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, h)
		src.Layers = append(src.Layers, flatten.Layer{Descriptor: v1.Descriptor{MediaType: types.OCIUncompressedLayer, Digest: h, Size: int64(len(b))},
			Open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }})
	}
	var err error
	if src.Config, err = json.Marshal(config); err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1})
	if err != nil {
		t.Fatal(err)
	}
	src.Manifest = v1.Descriptor{MediaType: types.OCIManifestSchema1, Size: int64(len(raw)), Digest: v1.Hash{Algorithm: "sha256", Hex: fmt.Sprintf("%x", sha256.Sum256(raw))}}
	res, err := flatten.Build(t.Context(), src, r, flatten.Options{Size: 64 << 20, ChunkSize: 64 << 10, Level: 1, TempDir: t.TempDir(), Tag: "base"})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// written is an overlay: blocks of a device that were written, nil for those that
// read as zeros.
type written map[uint32][]byte

// overlaid makes by hand what a maker of images makes with this package: a stream of the
// written blocks in device order, laid over the runs of the base image, and a new image of
// the streams of the base and this one. flatten.Commit would leave out what is equal.
func overlaid(ctx context.Context, t *testing.T, dst *repo, base *flatten.Image, ix *blockmap.Index, subject v1.Descriptor, w written, tag string) (*flatten.Assembled, *blockmap.Index) {
	t.Helper()
	streams, err := flatten.NewStreams(t.TempDir(), 64<<10, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer streams.Close()
	s, err := streams.Create(ctx)
	if err != nil {
		t.Fatal(err)
	}
	number := uint32(len(ix.Streams))
	var blocks []uint32
	for b := range w {
		blocks = append(blocks, b)
	}
	slices.Sort(blocks)
	var over []blockmap.Run
	for _, b := range blocks {
		if w[b] == nil {
			continue
		}
		over = append(over, blockmap.Run{Device: b, Stream: number, Block: s.Blocks(), Count: 1})
		if _, err := s.Write(w[b]); err != nil {
			t.Fatal(err)
		}
	}
	// A block of the base is on the device unless it was written.
	for _, r := range ix.Runs {
		for i := range r.Count {
			if _, ok := w[r.Device+i]; !ok {
				over = append(over, blockmap.Run{Device: r.Device + i, Stream: r.Stream, Block: r.Block + i, Count: 1})
			}
		}
	}
	f, err := s.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Push(ctx, dst, func(int64) {}); err != nil {
		t.Fatal(err)
	}
	all := append(base.Streams(ix), flatten.Stream{Role: flatten.RoleOverlay, Table: f.Table})
	committed, err := flatten.NewIndex(ix.Blocks, over, all)
	if err != nil {
		t.Fatal(err)
	}
	config, err := dst.Blob(ctx, base.Config)
	if err != nil {
		t.Fatal(err)
	}
	guess, err := base.Guess(ix.Blocks)
	if err != nil {
		t.Fatal(err)
	}
	a, err := flatten.Assemble(ctx, dst, all, committed, subject, flatten.AssembleOptions{Config: config, Guess: guess, Tag: tag})
	if err != nil {
		t.Fatal(err)
	}
	return a, committed
}

func filled(b byte) []byte { return bytes.Repeat([]byte{b}, blockmap.BlockSize) }

// TestAssembleOverlay puts written blocks on top of a built image, twice, and reads the
// images back: they share the streams of the base, and nothing else is uploaded.
func TestAssembleOverlay(t *testing.T) {
	ctx, dst := t.Context(), newRepo(t)
	res := dst.built(t)
	base, ix := dst.image(t, "base")
	before := dst.serve(t, ix)
	want, err := blocktest.Read(ctx, before, blockmap.Range(0, before.Size()))
	if err != nil {
		t.Fatal(err)
	}
	// In the middle of contents, in two runs, where nothing was, and to zeros. (The
	// metadata is left alone: what is committed here is still a filesystem.)
	var data []blockmap.Run
	for _, r := range ix.Runs {
		if base.Role(int(r.Stream)) == flatten.RoleLayer {
			data = append(data, r)
		}
	}
	first, last := data[0], data[len(data)-1]
	w := written{
		first.Device: filled(1), first.Device + 7: filled(2), first.Device + 8: filled(3),
		last.Device + last.Count - 1: nil, ix.Blocks - 1: filled(4), first.Device + 20: nil,
	}
	dst.uploads = nil
	a, _ := overlaid(ctx, t, dst, base, ix, res.Manifest, w, "committed")
	if n := len(dst.uploads); n != 2 {
		t.Errorf("%d blobs were uploaded, and the overlay and the index were to be: %v", n, dst.uploads)
	}
	m, cix := dst.image(t, "committed")
	overlay := len(cix.Streams) - 1
	if got := cix.Streams[overlay].Blob.String(); !slices.Contains(dst.uploads, got) {
		t.Errorf("the overlay %s is not among the uploads %v", got, dst.uploads)
	}
	for i := range ix.Streams {
		if cix.Streams[i].Blob != ix.Streams[i].Blob || m.Role(i) != base.Role(i) || m.DiffID(i) != base.DiffID(i) {
			t.Errorf("stream %d is not that of the base", i)
		}
	}
	if m.Role(overlay) != flatten.RoleOverlay || m.Subject.Digest != res.Manifest.Digest {
		t.Errorf("role %q, subject %v", m.Role(overlay), m.Subject)
	}
	after := slices.Clone(want)
	for b, content := range w {
		at := after[int(b)*blockmap.BlockSize:][:blockmap.BlockSize]
		clear(at)
		copy(at, content)
	}
	device := dst.serve(t, cix)
	got, err := blocktest.Read(ctx, device, blockmap.Range(0, device.Size()))
	if err != nil || !bytes.Equal(got, after) {
		t.Fatalf("the committed device reads differently: %v", err)
	}
	// The registry lists the image by its subject.
	resp, err := dst.do(ctx, http.MethodGet, dst.url+"/referrers/"+res.Manifest.Digest.String(), "", nil, 200)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if list, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(list), a.Manifest.Digest.String()) {
		t.Errorf("the list of referrers lacks the image: %v\n%s", err, list)
	}
	// Each image is verified by the policy of its roles, and by no other.
	if p, err := m.Policy(); err != nil || p != flatten.WithOverlays {
		t.Errorf("the policy is %v, %v", p, err)
	}
	if err := dst.verify(t, m, cix, flatten.WithOverlays); err != nil {
		t.Error(err)
	}
	if err := dst.verify(t, m, cix, flatten.FromLayers); !errors.Is(err, blockmap.ErrCorrupt) {
		t.Errorf("an image with an overlay passes as one of layers: %v", err)
	}
	if p, err := base.Policy(); err != nil || p != flatten.FromLayers {
		t.Errorf("the policy of the base is %v, %v", p, err)
	}
	if err := dst.verify(t, base, ix, flatten.WithOverlays); !errors.Is(err, blockmap.ErrCorrupt) {
		t.Errorf("an image without an overlay passes as one with: %v", err)
	}

	// On top of that, with the same bytes in other places.
	overlaid(ctx, t, dst, m, cix, a.Manifest, written{first.Device + 30: filled(1), first.Device + 41: filled(2), first.Device + 42: filled(3), ix.Blocks - 2: filled(4)}, "again")
	m, cix = dst.image(t, "again")
	if len(cix.Streams) != len(ix.Streams)+2 || cix.Streams[overlay].Blob != cix.Streams[overlay+1].Blob {
		t.Errorf("%d streams", len(cix.Streams))
	}
	if err := dst.verify(t, m, cix, flatten.WithOverlays); err != nil {
		t.Error(err)
	}
	for i, b := range []uint32{first.Device + 30, first.Device + 41, first.Device + 42, ix.Blocks - 2} {
		copy(after[int(b)*blockmap.BlockSize:], filled(byte(i+1)))
	}
	device = dst.serve(t, cix)
	if got, err := blocktest.Read(ctx, device, blockmap.Range(0, device.Size())); err != nil || !bytes.Equal(got, after) {
		t.Errorf("the device that was committed again reads differently: %v", err)
	}
}

// TestAssembleOfMetadata writes what a mounted filesystem writes, a superblock and a
// directory in the overlay: the check reads them there.
func TestAssembleOfMetadata(t *testing.T) {
	ctx, dst := t.Context(), newRepo(t)
	res := dst.built(t)
	base, ix := dst.image(t, "base")
	device := dst.serve(t, ix)
	read := func(b uint32) []byte {
		p, err := blocktest.Read(ctx, device, blockmap.Range(int64(b)*blockmap.BlockSize, blockmap.BlockSize))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	meta := ix.Runs[0]
	same := written{}
	for i := range min(meta.Count, 40) {
		same[meta.Device+i] = read(meta.Device + i)
	}
	overlaid(ctx, t, dst, base, ix, res.Manifest, same, "same")
	m, cix := dst.image(t, "same")
	if err := dst.verify(t, m, cix, flatten.WithOverlays); err != nil {
		t.Errorf("the same metadata, in an overlay: %v", err)
	}
	bad := written{0: read(0)}
	bad[0][1024+4] ^= 1 // the number of blocks
	overlaid(ctx, t, dst, base, ix, res.Manifest, bad, "bad")
	m, cix = dst.image(t, "bad")
	if err := dst.verify(t, m, cix, flatten.WithOverlays); err == nil || !strings.Contains(err.Error(), "ext4") {
		t.Errorf("a damaged superblock in an overlay: %v", err)
	}
}

// TestPolicyWithOverlays plants faults in a committed image.
func TestPolicyWithOverlays(t *testing.T) {
	ctx, dst := t.Context(), newRepo(t)
	res := dst.built(t)
	base, ix := dst.image(t, "base")
	data := ix.Runs[len(ix.Runs)-1]
	overlaid(ctx, t, dst, base, ix, res.Manifest, written{data.Device + 2: filled(1), data.Device + 4: filled(2)}, "committed")
	role := func(m *flatten.Image, stream int, role string) {
		m.Layers[1+stream].Annotations[flatten.AnnotationRole] = role
	}
	for name, plant := range map[string]func(m *flatten.Image, ix *blockmap.Index){
		"blocks of the overlay that have changed places": func(_ *flatten.Image, ix *blockmap.Index) {
			n := len(ix.Runs)
			over := uint32(len(ix.Streams) - 1)
			var two []int
			for i := range n {
				if ix.Runs[i].Stream == over {
					two = append(two, i)
				}
			}
			a, b := &ix.Runs[two[0]], &ix.Runs[two[1]]
			a.Block, b.Block = b.Block, a.Block
		},
		"contents that have changed places": func(_ *flatten.Image, ix *blockmap.Index) {
			n := len(ix.Runs)
			a, b := &ix.Runs[n-1], &ix.Runs[n-3] // behind and before the last written block
			a.Block, b.Block, a.Count, b.Count = b.Block, a.Block, 1, 1
		},
		"metadata that is not first":  func(m *flatten.Image, _ *blockmap.Index) { role(m, 0, "layer"); role(m, 1, "metadata") },
		"an overlay among the layers": func(m *flatten.Image, _ *blockmap.Index) { role(m, 1, "overlay") },
		"two streams of metadata":     func(m *flatten.Image, _ *blockmap.Index) { role(m, 1, "metadata") },
		"a role of a later version":   func(m *flatten.Image, _ *blockmap.Index) { role(m, 1, "verity") },
		"a layer without a diff ID":   func(m *flatten.Image, _ *blockmap.Index) { delete(m.Layers[2].Annotations, flatten.AnnotationDiffID) },
		"an overlay with a diff ID": func(m *flatten.Image, ix *blockmap.Index) {
			m.Layers[len(ix.Streams)].Annotations[flatten.AnnotationDiffID] = res.Layers[0].DiffID.String()
		},
		"fewer streams than the index": func(m *flatten.Image, _ *blockmap.Index) { m.Layers = m.Layers[:2] },
		"metadata behind the file data": func(_ *flatten.Image, ix *blockmap.Index) {
			ix.Runs[len(ix.Runs)-1] = blockmap.Run{Device: ix.Blocks - 1, Count: 1}
		},
	} {
		m, ix := dst.image(t, "committed")
		plant(m, ix)
		if err := dst.verify(t, m, ix, flatten.WithOverlays); !errors.Is(err, blockmap.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What a reader does not know is served as data, and is refused by Policy.
	m, _ := dst.image(t, "committed")
	role(m, 1, "verity")
	if m.Role(1) != flatten.RoleUnknown {
		t.Errorf("the role is %q", m.Role(1))
	}
	if _, err := m.Policy(); err == nil || !strings.Contains(err.Error(), `"verity"`) || !strings.Contains(err.Error(), "later version") {
		t.Errorf("the policy for an unknown role: %v", err)
	}
	delete(m.Layers[2].Annotations, flatten.AnnotationRole)
	if _, err := m.Policy(); err == nil || !strings.Contains(err.Error(), "build the image again") {
		t.Errorf("the policy for no role: %v", err)
	}
}
