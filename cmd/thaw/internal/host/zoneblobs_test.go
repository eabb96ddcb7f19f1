package host

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher/zone"
	"thaw/tracefile"
)

// meteredRegistry counts the bytes of each blob that it sends.
type meteredRegistry struct {
	*testRegistry
	mu    sync.Mutex
	bytes map[string]int64 // by digest; "" for all else
}

func newMeteredRegistry(t testing.TB) *meteredRegistry {
	t.Helper()
	r := &meteredRegistry{testRegistry: newRegistry(t), bytes: make(map[string]int64)}
	rp := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: r.host})
	rp.ModifyResponse = func(resp *http.Response) error {
		_, digest, _ := strings.Cut(resp.Request.URL.Path, "/blobs/sha256:")
		if strings.Contains(resp.Request.Header.Get("Range"), ",") {
			digest = "of several ranges" // the registry sends the first one, and hosts ask anew
		}
		resp.Body = &meteredBody{resp.Body, r, digest}
		return nil
	}
	s := httptest.NewServer(rp)
	t.Cleanup(s.Close)
	r.host = strings.TrimPrefix(s.URL, "http://")
	return r
}

type meteredBody struct {
	io.ReadCloser
	r      *meteredRegistry
	digest string
}

func (b *meteredBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.r.mu.Lock()
	defer b.r.mu.Unlock()
	b.r.bytes[b.digest] += int64(n)
	return n, err
}

// sent returns what was sent since it was called last.
func (r *meteredRegistry) sent() map[string]int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.bytes
	r.bytes = make(map[string]int64)
	return m
}

// members opens n hosts of a zone.
func (r *testRegistry) members(n int, o Options) (hosts []*Host) {
	r.t.Helper()
	r.t.Cleanup(func() { // after the hosts are closed
		await(r.t, "probes of members have ended", func() bool {
			stacks := make([]byte, 4<<20)
			return !bytes.Contains(stacks[:runtime.Stack(stacks, true)], []byte("memberlist."))
		})
	})
	for i := range n {
		o := inZone(o)
		o.Zone.Allow, o.Zone.Host = Allow{r.host + "/**"}, fmt.Sprintf("host-%d", i)
		for _, h := range hosts { // all of them, so that nobody waits for gossip
			o.Zone.Join = append(o.Zone.Join, h.zone.Addr())
		}
		hosts = append(hosts, r.open(o))
	}
	await(r.t, "they are members", func() bool {
		for _, h := range hosts {
			if z, err := h.Zone(r.t.Context(), false); err != nil || z.Members != n {
				return false
			}
		}
		return true
	})
	return hosts
}

// compressible makes an image of chunks of 256 KiB that compress well.
func compressible(t testing.TB, chunks int) *blocktest.Image {
	t.Helper()
	rng := rand.New(rand.NewPCG(1, 1))
	var content [][]byte
	for range chunks {
		p := make([]byte, 256<<10)
		for i := 0; i < len(p); i += 5 {
			p[i] = byte(rng.Uint32())
		}
		content = append(content, p)
	}
	table, blob := blocktest.Stream(t, content)
	m := &blocktest.Image{
		Index: &blockmap.Index{Blocks: table.Blocks(), Streams: []blockmap.Table{*table}, Runs: []blockmap.Run{{Count: table.Blocks()}}},
		Blobs: map[blockmap.Digest][]byte{table.Blob: blob}, Content: bytes.Join(content, nil),
	}
	if err := m.Index.Seal(); err != nil {
		t.Fatal(err)
	}
	return m
}

// What hosts read when they start an image at once leaves the registry once: the index, the
// trace, the bundle with its head, and the chunks. Chunks travel compressed from there on.
func TestBlobsLeaveTheRegistryOnce(t *testing.T) {
	const n = 4
	for _, bundled := range []bool{false, true} {
		t.Run(map[bool]string{false: "trace", true: "bundle"}[bundled], func(t *testing.T) {
			r := newMeteredRegistry(t)
			m := compressible(t, 40)
			name := r.push("team/app:v1", m)
			f := r.finder()
			defer f.Close()
			b, err := f.Find(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			trace := &tracefile.Trace{
				Header:  tracefile.Header{Index: b.IndexDigest(), Blocks: m.Index.Blocks, Starts: 1},
				Touches: []tracefile.Touch{{Count: m.Index.Blocks}},
			}
			var file bytes.Buffer
			if err := trace.Write(&file); err != nil {
				t.Fatal(err)
			}
			d, err := b.PushTrace(t.Context(), file.Bytes(), false)
			if err != nil {
				t.Fatal(err)
			}
			stored := map[string]v1.Descriptor{"index": b.Manifest.Index}
			if stored["trace"], err = storedLayer(t.Context(), b.Repo, d, tracefile.MediaTypeTrace); err != nil {
				t.Fatal(err)
			}
			if bundled {
				if _, err := b.Pack(t.Context(), []*tracefile.Trace{trace}, PackOptions{Temp: t.TempDir()}); err != nil {
					t.Fatal(err)
				}
				beside, err := b.Beside(t.Context())
				if err != nil || len(beside.Bundles) != 1 {
					t.Fatalf("%d bundles, %v", len(beside.Bundles), err)
				}
				delete(stored, "trace") // the bundle has what it lists
				if stored["bundle"], err = storedLayer(t.Context(), b.Repo, beside.Bundles[0], tracefile.MediaTypeBundle); err != nil {
					t.Fatal(err)
				}
			}
			hosts := r.members(n, Options{Trace: TraceOptions{Use: []string{Auto}}})
			r.sent()
			var starts sync.WaitGroup
			for _, h := range hosts {
				starts.Go(func() {
					d, err := h.Add(t.Context(), Spec{Name: name})
					if err != nil {
						t.Error(err)
						return
					}
					await(t, "the trace is replayed", func() bool { p := d[0].whose().start.prefetchInfo(); return p.State == "ended" })
					got := make([]byte, len(m.Content))
					ctx, cancel := context.WithTimeout(t.Context(), atMost)
					defer cancel()
					if err := blockmap.ReadInto(ctx, d[0].Block(), blockmap.Extent{End: int64(len(got))}, got); err != nil || !bytes.Equal(got, m.Content) {
						t.Errorf("%s: wrong bytes, %v", h.zone.Name(), err)
					}
				})
			}
			starts.Wait()
			late := int64(0) // on a machine that is busy, hosts ask the registry after a while
			for _, h := range hosts {
				st := h.fetcher.Stats()
				late += st.PassedOver + st.Extra
			}
			sent := r.sent()
			var all, streams int64
			for digest, bytes := range sent {
				all += bytes
				t.Logf("%.12s: %d bytes", digest, bytes)
			}
			for what, d := range stored {
				if got := sent[d.Digest.Hex]; got < d.Size || got > d.Size && late == 0 || got >= n*d.Size {
					t.Errorf("the registry has sent %d bytes of the %s, which has %d; %d requests were late", got, what, d.Size, late)
				}
			}
			for blob, b := range m.Blobs {
				got := sent[blob.String()]
				if streams += got; got > int64(len(b)) && late == 0 || got >= n*int64(len(b)) {
					t.Errorf("the registry has sent %d bytes of stream %.12s, which has %d; %d requests were late", got, blob, len(b), late)
				}
			}
			if bundled {
				return
			}
			// What a host has fetched went out compressed.
			var peers, compressed int64
			for _, h := range hosts {
				z, err := h.Zone(t.Context(), false)
				if err != nil {
					t.Fatal(err)
				}
				peers, compressed = peers+z.Received, compressed+z.ReceivedStored
				if z.Kept == 0 || z.Kept > zone.StoredMemory {
					t.Errorf("%s keeps %d bytes", z.Name, z.Kept)
				}
			}
			t.Logf("registry %d bytes, of chunks %d; peers %d, of which %d compressed", all, streams, peers, compressed)
			if compressed < peers*9/10 {
				t.Errorf("of %d bytes from peers, %d came compressed", peers, compressed)
			}
		})
	}
}
