package zone_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
	"thaw/fetcher/zone"
)

// hosts is a zone of hosts in this process that read one image, each with a cache, a
// fetcher and an HTTP server of its own. They share a registry.
type hosts struct {
	*blocktest.Image
	all    []*host
	addr   sync.Map // of each host, by name
	run    int      // chunks of a run
	bounds bounds
	blob   []byte // of a bundle
	blobOf blockmap.Digest
}

// host is one of them.
type host struct {
	of      *hosts
	name    string
	origin  *blocktest.Origin // the registry, as this host sees it
	cache   *blockmap.Cache
	fetcher *fetcher.Fetcher
	router  *zone.Router
	grants  *zone.Grants
	bound   *fetcher.Bound
	device  *blockmap.Image
	server  *httptest.Server
	pieces  sync.Map // offset to *pieceOnce
	judged  sync.Map // offset to bool

	// instead, if it is set, answers requests instead of the host.
	instead  atomic.Pointer[http.HandlerFunc]
	requests sync.Map // the paths and queries that were asked for
	asked    atomic.Int64
}

const imageName = "registry.example/app@sha256:1234"

// patient are bounds on time that no peer that works exceeds, however busy the machine of
// the test is; impatient are those of tests with peers that hang.
var (
	patient   = bounds{30 * time.Second, 60 * time.Second, 30 * time.Second, 30 * time.Second, time.Minute}
	impatient = bounds{500 * time.Millisecond, 3 * time.Second, 500 * time.Millisecond, 500 * time.Millisecond, 0}
)

type bounds struct{ firstSign, answer, stall, hedge, onlySigns time.Duration }

func newHosts(t *testing.T, m *blocktest.Image, n int, o fetcher.Options) *hosts {
	t.Helper()
	return newHostsWith(t, m, n, zone.RunChunks, patient, o)
}

func newHostsWith(t *testing.T, m *blocktest.Image, n, run int, b bounds, o fetcher.Options) *hosts {
	t.Helper()
	o.RetryFor = 3 * time.Minute
	z := &hosts{Image: m, run: run, bounds: b}
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("host-%d", i))
	}
	for _, name := range names {
		z.all = append(z.all, z.add(t, name, names, o))
	}
	return z
}

func (z *hosts) add(t *testing.T, name string, members []string, o fetcher.Options) *host {
	h := &host{of: z, name: name, origin: blocktest.NewOrigin(z.Image), grants: zone.NewGrants(zone.GrantOptions{})}
	var err error
	if h.cache, err = blockmap.OpenCache(t.TempDir(), blockmap.CacheOptions{}); err != nil {
		t.Fatal(err)
	}
	h.fetcher = fetcher.New(o)
	h.router = zone.NewRouter(name, zone.RouterOptions{Zone: "blue", HedgeFloor: z.bounds.hedge, HedgeMost: z.bounds.hedge,
		SignFloor: z.bounds.firstSign, SignMost: z.bounds.firstSign, OnlySigns: z.bounds.onlySigns})
	h.router.SetMembers(members)
	client := zone.NewClient(zone.ClientOptions{
		Self: name, Zone: "blue", Dial: 30 * time.Second, FirstSign: z.bounds.firstSign, Answer: z.bounds.answer, Stall: z.bounds.stall, Body: 2 * time.Minute,
		Address: func(peer string) (string, bool) {
			addr, ok := z.addr.Load(peer)
			if !ok {
				return "", false
			}
			return addr.(string), true
		},
	})
	peers := zone.NewPeers(h.router, client)
	h.bound = h.fetcher.FromNear(h.origin, fetcher.Nearby{
		RunChunks: z.run, PieceBytes: zone.PieceBytes,
		Route:  func(of blockmap.Digest, number uint32) fetcher.Route { return peers.Route(imageName, of, number) },
		Piece:  h.piece,
		Judged: func(_ blockmap.Digest, off int64, right bool) { h.judged.Store(off, right) },
	})
	if h.device, err = blockmap.NewImage(z.Index, h.cache, h.bound); err != nil {
		t.Fatal(err)
	}
	h.server = httptest.NewServer(http.HandlerFunc(h.serve))
	z.addr.Store(name, h.server.Listener.Addr().String())
	t.Cleanup(func() {
		h.fetcher.Close()
		client.Close()
		h.server.CloseClientConnections()
		h.server.Close()
		if err := h.cache.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

func (h *host) serve(w http.ResponseWriter, r *http.Request) {
	h.asked.Add(1)
	h.requests.Store(r.URL.String(), true)
	if instead := h.instead.Load(); instead != nil {
		(*instead)(w, r)
		return
	}
	h.answer(w, r)
}

// answer answers a peer as the zone's server does.
func (h *host) answer(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	owner := q.Get("origin") == "1"
	var digest string
	if n, _ := fmt.Sscanf(strings.ReplaceAll(r.URL.Path, "/", " "), " v1 blobs %s", &digest); n == 1 {
		h.servePiece(w, r, owner)
		return
	}
	var first, last int
	if _, err := fmt.Sscanf(strings.ReplaceAll(r.URL.Path, "/", " "), " v1 streams %s chunks %d-%d", &digest, &first, &last); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var wants []blockmap.Want
	size := 0
	for i := range h.of.Index.Streams {
		table := &h.of.Index.Streams[i]
		s, err := h.cache.Stream(table)
		if err != nil {
			panic(err)
		}
		if s.ID().String() != digest {
			continue
		}
		for c := first; c <= last; c++ {
			wants = append(wants, blockmap.Want{Stream: s, Table: table, Chunk: c})
			size += table.Chunks[c].Size()
		}
	}
	if len(wants) == 0 || first/h.of.run != last/h.of.run {
		http.Error(w, "no such chunks", http.StatusBadRequest)
		return
	}
	run := zone.Run{Of: wants[0].Stream.ID(), Number: uint32(first / h.of.run)}
	serve, holders := h.grants.Ask(run, q.Get("from"), time.Now())
	if !serve {
		w.Header().Set("Retry-After", "1")
		w.Header().Set("Thaw-Holders", strings.Join(holders, ","))
		http.Error(w, "busy", http.StatusServiceUnavailable)
		return
	}
	ok := false
	defer func() { h.grants.Done(run, q.Get("from"), ok, time.Now()) }()
	begun := false
	for _, x := range wants {
		if err := h.wait(w, begun, func() error {
			if x.Stream.Has(x.Chunk) {
				return nil
			}
			if owner || h.router.Owns(run) {
				return h.bound.FetchOwned(r.Context(), []blockmap.Want{x})
			}
			wait, ok := h.fetcher.InFlight(x.Stream, x.Chunk, x.Chunk)
			if !ok {
				return errors.New("not here")
			}
			ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
			defer cancel()
			return wait(ctx)
		}); err != nil {
			if begun {
				panic(http.ErrAbortHandler)
			}
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		p := make([]byte, x.Table.Chunks[x.Chunk].Size())
		if !x.Stream.ReadChunk(x.Chunk, p) {
			panic(http.ErrAbortHandler)
		}
		if !begun {
			w.Header().Set("Content-Length", fmt.Sprint(size))
			begun = true
		}
		w.Write(p)
		w.(http.Flusher).Flush()
	}
	ok = true
}

// wait does something that may take long, and tells the peer meanwhile that it lives.
func (h *host) wait(w http.ResponseWriter, begun bool, do func() error) error {
	done := make(chan error, 1)
	go func() { done <- do() }()
	for {
		select {
		case err := <-done:
			return err
		case <-time.After(100 * time.Millisecond):
			if !begun {
				w.WriteHeader(http.StatusProcessing)
			}
		}
	}
}

// pieceOnce is a piece that is fetched once.
type pieceOnce struct {
	once sync.Once
	p    []byte
	from string
	err  error
}

// piece is the cache of pieces.
func (h *host) piece(ctx context.Context, _ blockmap.Digest, off, n int64, owned bool, fetch fetcher.FetchPiece) ([]byte, string, error) {
	var k any = off
	if owned {
		k = fmt.Sprint("owned ", off)
	}
	x, _ := h.pieces.LoadOrStore(k, new(pieceOnce))
	p := x.(*pieceOnce)
	p.once.Do(func() { p.p, p.from, p.err = fetch(ctx) })
	return p.p, p.from, p.err
}

func (h *host) servePiece(w http.ResponseWriter, r *http.Request, owner bool) {
	var digest string
	var off, end int64
	fmt.Sscanf(strings.ReplaceAll(r.URL.Path, "/", " "), " v1 blobs %s %d-%d", &digest, &off, &end)
	if !owner {
		http.Error(w, "not here", http.StatusNotFound)
		return
	}
	x, _ := h.pieces.LoadOrStore(fmt.Sprint("owned ", off), new(pieceOnce))
	p := x.(*pieceOnce)
	if h.wait(w, false, func() error {
		p.once.Do(func() {
			body, err := h.origin.OpenRange(context.Background(), h.of.blobOf, off, end-off)
			if err != nil {
				p.err = err
				return
			}
			defer body.Close()
			p.p, p.err = io.ReadAll(body)
		})
		return p.err
	}) != nil || int64(len(p.p)) != end-off {
		http.Error(w, "the registry failed", http.StatusBadGateway)
		return
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(p.p)))
	w.Write(p.p)
}

// wants is every chunk of the image, as the host's cache has it.
func (h *host) wants(t testing.TB) (wants []blockmap.Want) {
	t.Helper()
	for i := range h.of.Index.Streams {
		table := &h.of.Index.Streams[i]
		s, err := h.cache.Stream(table)
		if err != nil {
			t.Fatal(err)
		}
		for c := range table.Chunks {
			wants = append(wants, blockmap.Want{Stream: s, Table: table, Chunk: c})
		}
	}
	return wants
}

// read reads all of the device, and checks it.
func (h *host) read(ctx context.Context) error {
	const step = 128 << 10
	for at := int64(0); at < h.device.Size(); at += step {
		e := blockmap.Extent{Start: at, End: min(at+step, h.device.Size())}
		got, err := blocktest.Read(ctx, h.device, e)
		if err != nil {
			return fmt.Errorf("%s: %w", h.name, err)
		}
		if !bytes.Equal(got, h.of.Content[e.Start:e.End]) {
			return fmt.Errorf("%s: wrong bytes in %v", h.name, e)
		}
	}
	return nil
}

// stats returns the counts of a host when it has no request in flight any more. A reader goes on
// as soon as a chunk is resident, and the fetch is counted a moment later.
func (h *host) stats(t testing.TB) fetcher.Stats {
	t.Helper()
	for end := time.Now().Add(time.Minute); h.fetcher.Stats().InFlight > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: requests are in flight after a minute", h.name)
		}
	}
	return h.fetcher.Stats()
}

// registryBytes is what all hosts have read from the registry, and how much of that was
// read before by another one.
func (z *hosts) registryBytes() (all, again int64) {
	seen := make(map[int64]bool)
	for _, h := range z.all {
		for a, n := range h.origin.Asked() {
			all += int64(n) * a.N
			again += int64(n-1) * a.N
			// Ranges of several chunks, by their bytes.
			for off := a.Off; off < a.Off+a.N; off++ {
				k := int64(a.Blob[0])<<40 | off
				if seen[k] {
					again++
				}
				seen[k] = true
			}
		}
	}
	return all, again
}

// Hosts that read the same image at once read it from the registry once. Duplicates among
// streams may come twice, as their streams have different owners.
func TestRegistryIsReadOnce(t *testing.T) {
	z := newHosts(t, blocktest.NewImage(t, 1, 3000), 5, fetcher.Options{})
	var readers sync.WaitGroup
	for _, h := range z.all {
		readers.Go(func() {
			if err := h.read(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	readers.Wait()
	all, again := z.registryBytes()
	if again > all/20 {
		t.Errorf("%d of %d bytes were read again", again, all)
	}
	for _, h := range z.all {
		if st := h.stats(t); st.ZoneChunks == 0 || st.Chunks == 0 || st.Failed != 0 || st.ZoneBytes == 0 || st.ZoneRequests == 0 || st.Wrong != 0 {
			t.Errorf("%s: %+v", h.name, st)
		}
	}
}

// A prefetch, and the completion of an image, go through the zone as well.
func TestPrefetchThroughTheZone(t *testing.T) {
	for _, how := range []string{"replay", "complete"} {
		t.Run(how, func(t *testing.T) {
			z := newHosts(t, blocktest.NewImage(t, 2, 3000), 4, fetcher.Options{})
			var readers sync.WaitGroup
			for _, h := range z.all {
				readers.Go(func() {
					var err error
					if how == "replay" {
						err = h.bound.Replay(t.Context(), h.wants(t), fetcher.ReplayOptions{}).Wait(t.Context(), 1)
					} else {
						err = h.bound.Complete(t.Context(), h.wants(t), fetcher.CompleteOptions{})
					}
					if err != nil {
						t.Error(err)
					}
				})
			}
			readers.Wait()
			all, again := z.registryBytes()
			if again > all/20 {
				t.Errorf("%d of %d bytes were read again", again, all)
			}
			for _, h := range z.all {
				st := h.stats(t)
				if st.ZoneChunks < 20 || st.Failed != 0 {
					t.Errorf("%s: %+v", h.name, st)
				}
			}
		})
	}
}

// No request is for chunks of more than one run.
func TestRequestsDoNotCrossRuns(t *testing.T) {
	z := newHostsWith(t, blocktest.NewImage(t, 3, 3000), 3, 4, patient, fetcher.Options{})
	if err := z.all[0].bound.Replay(t.Context(), z.all[0].wants(t), fetcher.ReplayOptions{}).Wait(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	several := 0
	for _, h := range z.all[1:] {
		h.requests.Range(func(url, _ any) bool {
			var digest string
			var first, last int
			path, _, _ := strings.Cut(url.(string), "?")
			if _, err := fmt.Sscanf(strings.ReplaceAll(path, "/", " "), " v1 streams %s chunks %d-%d", &digest, &first, &last); err != nil {
				t.Error(url)
			}
			if first > last || first/z.run != last/z.run {
				t.Errorf("chunks %d to %d", first, last)
			}
			if last > first {
				several++
			}
			return true
		})
	}
	if several == 0 {
		t.Error("no request was for several chunks")
	}
}

// Whatever a peer does, readers get the right bytes, without an error, and soon.
func TestBadPeers(t *testing.T) {
	answers := map[string]func(*hosts, http.ResponseWriter, *http.Request){
		"lies": func(z *hosts, w http.ResponseWriter, r *http.Request) {
			n := z.length(r)
			w.Header().Set("Content-Length", fmt.Sprint(n))
			w.Write(make([]byte, n))
		},
		"stalls": func(_ *hosts, w http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"never gets ready": func(_ *hosts, w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				w.WriteHeader(http.StatusProcessing)
				select {
				case <-time.After(50 * time.Millisecond):
				case <-r.Context().Done():
				}
			}
		},
		"trickles": func(z *hosts, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(z.length(r)))
			for n := z.length(r) - 1; n > 0 && r.Context().Err() == nil; n-- {
				w.Write([]byte{0})
				w.(http.Flusher).Flush()
				select {
				case <-time.After(20 * time.Millisecond):
				case <-r.Context().Done():
				}
			}
		},
		"breaks off": func(z *hosts, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(z.length(r)))
			w.Write(make([]byte, 10))
			panic(http.ErrAbortHandler)
		},
		"sends too much": func(_ *hosts, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000000000000")
		},
		"fails": func(_ *hosts, w http.ResponseWriter, r *http.Request) {
			http.Error(w, "broken", http.StatusInternalServerError)
		},
		"refuses":     func(_ *hosts, w http.ResponseWriter, r *http.Request) { http.Error(w, "no", http.StatusForbidden) },
		"has nothing": func(_ *hosts, w http.ResponseWriter, r *http.Request) { http.Error(w, "no", http.StatusNotFound) },
		"is busy": func(_ *hosts, w http.ResponseWriter, r *http.Request) {
			http.Error(w, "no", http.StatusServiceUnavailable)
		},
		"refers to others": func(_ *hosts, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Thaw-Holders", "host-0,host-1,host-2,host-3,evil.example")
			w.WriteHeader(http.StatusServiceUnavailable)
		},
	}
	for name, answer := range answers {
		for _, bad := range []int{1, 3} {
			t.Run(fmt.Sprintf("%s, %d of 4", name, bad), func(t *testing.T) {
				t.Parallel()
				b := impatient
				if name == "lies" {
					b = patient // each liar is to be found out, and none is late
				}
				z := newHostsWith(t, blocktest.NewImage(t, 4, 500), 4, zone.RunChunks, b, fetcher.Options{})
				instead := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { answer(z, w, r) })
				for _, h := range z.all[4-bad:] {
					h.instead.Store(&instead)
				}
				var readers sync.WaitGroup
				began := time.Now()
				for _, h := range z.all {
					readers.Go(func() {
						if err := h.read(t.Context()); err != nil {
							t.Error(err)
						}
					})
				}
				readers.Wait()
				if took := time.Since(began); took > 2*time.Minute {
					t.Errorf("it took %v", took)
				}
				for _, h := range z.all {
					if st := h.stats(t); st.Failed != 0 {
						t.Errorf("%+v", st)
					}
				}
				if name != "lies" {
					return
				}
				for _, p := range z.all[0].router.Peers(time.Now()) {
					liar := p.Name >= z.all[4-bad].name
					if liar != (p.State == zone.Distrusted) {
						t.Errorf("%+v", p)
					}
				}
			})
		}
	}
}

// length is how many bytes a request asks for.
func (z *hosts) length(r *http.Request) (n int) {
	var digest string
	var first, last int
	fmt.Sscanf(strings.ReplaceAll(r.URL.Path, "/", " "), " v1 streams %s chunks %d-%d", &digest, &first, &last)
	for i := range z.Index.Streams {
		table := &z.Index.Streams[i]
		if s, err := z.all[0].cache.Stream(table); err == nil && s.ID().String() == digest {
			for c := first; c <= last; c++ {
				n += table.Chunks[c].Size()
			}
		}
	}
	return n
}

// Hosts whose lists of members differ, so that each takes another for the owner, do not
// wait for each other.
func TestHostsThatDisagree(t *testing.T) {
	z := newHosts(t, blocktest.NewImage(t, 5, 1500), 3, fetcher.Options{})
	for i, h := range z.all {
		h.router.SetMembers([]string{z.all[(i+1)%3].name}) // the next one owns everything
	}
	var readers sync.WaitGroup
	began := time.Now()
	for _, h := range z.all {
		readers.Go(func() {
			if err := h.read(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	readers.Wait()
	if took := time.Since(began); took > 25*time.Second { // a host that waits for another one takes longer
		t.Errorf("it took %v", took)
	}
}

// A peer that is gone is passed over.
func TestDeadPeer(t *testing.T) {
	z := newHosts(t, blocktest.NewImage(t, 6, 1500), 3, fetcher.Options{})
	z.all[2].server.CloseClientConnections()
	z.all[2].server.Close()
	began := time.Now()
	if err := z.all[0].read(t.Context()); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 25*time.Second {
		t.Errorf("it took %v", took)
	}
	if st := z.all[0].stats(t); st.PassedOver == 0 {
		t.Errorf("%+v", st)
	}
	// It leaves, and nothing is passed over any more.
	before := z.all[1].fetcher.Stats().PassedOver
	z.all[1].router.SetMembers([]string{"host-0", "host-1"})
	if err := z.all[1].read(t.Context()); err != nil || z.all[1].fetcher.Stats().PassedOver != before {
		t.Errorf("%v, %+v", err, z.all[1].fetcher.Stats())
	}
}

// bundle makes a bundle of all chunks of the image, which lies in a blob behind a head.
func (z *hosts) bundle(t testing.TB, h *host) *fetcher.Bundle {
	t.Helper()
	const head = 1000
	b := new(fetcher.Bundle)
	blob := bytes.Repeat([]byte{7}, head)
	at := make(map[blockmap.Digest]int)
	for _, x := range h.wants(t) {
		c := &x.Table.Chunks[x.Chunk]
		i, ok := at[c.Digest]
		if !ok {
			i = len(b.Frames)
			at[c.Digest] = i
			b.Frames = append(b.Frames, fetcher.Frame{Stored: int64(c.Stored), Parts: []fetcher.Part{{Count: c.Leaves(), Size: c.Size()}}})
			blob = append(blob, z.Blobs[x.Table.Blob][c.Offset:][:c.Stored]...)
		}
		b.Frames[i].Parts[0].Wants = append(b.Frames[i].Parts[0].Wants, x)
	}
	if z.blob == nil {
		z.blob, z.blobOf = blob, sha256.Sum256(blob)
	}
	h.origin.Add(z.blobOf, z.blob)
	b.Open = func(ctx context.Context, off int64) (io.ReadCloser, error) {
		return h.bound.OpenBlob(ctx, z.blobOf, int64(len(z.blob)), head+off)
	}
	return b
}

// replayBundles has all hosts download the bundle, and waits until all of it is resident.
func (z *hosts) replayBundles(t *testing.T) {
	t.Helper()
	bundles := make(map[*host]*fetcher.Bundle)
	for _, h := range z.all {
		bundles[h] = z.bundle(t, h)
	}
	var readers sync.WaitGroup
	for h, b := range bundles {
		readers.Go(func() {
			if err := h.bound.Replay(t.Context(), h.wants(t), fetcher.ReplayOptions{Bundle: b}).Wait(t.Context(), 1); err != nil {
				t.Error(err)
			}
			if err := h.read(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	readers.Wait()
}

// bundleBytes is what the registry was asked for of the bundle.
func (z *hosts) bundleBytes() (n int64) {
	for _, h := range z.all {
		for a, times := range h.origin.Asked() {
			if a.Blob == z.blobOf {
				n += a.N * int64(times)
			}
		}
	}
	return n
}

// A bundle is read from the registry once, by pieces, however many hosts download it.
func TestBundleThroughTheZone(t *testing.T) {
	z := newHosts(t, blocktest.NewImage(t, 8, 6000), 4, fetcher.Options{})
	z.replayBundles(t)
	if n, size := z.bundleBytes(), int64(len(z.blob)); n > size+size/100 {
		t.Errorf("%d bytes of a bundle of %d", n, size)
	}
	for _, h := range z.all {
		st := h.stats(t)
		if st.Leaves == 0 || st.Chunks+st.ZoneChunks != 0 || st.ZoneBytes < int64(len(z.blob))/2 || st.Wrong != 0 {
			t.Errorf("%s: %+v", h.name, st)
		}
	}
}

// A peer that sends wrong pieces is found out, and nobody else is blamed. Peers that fail
// otherwise are passed over, piece by piece.
func TestBundleFromBadPeers(t *testing.T) {
	for name, answer := range map[string]func(*hosts, http.ResponseWriter, int64){
		"lies": func(_ *hosts, w http.ResponseWriter, n int64) {
			w.Header().Set("Content-Length", fmt.Sprint(n))
			w.Write(bytes.Repeat([]byte{9}, int(n)))
		},
		"fails": func(_ *hosts, w http.ResponseWriter, n int64) { http.Error(w, "no", http.StatusInternalServerError) },
		"short": func(_ *hosts, w http.ResponseWriter, n int64) {
			w.Header().Set("Content-Length", fmt.Sprint(n))
			w.Write(make([]byte, n/2))
			panic(http.ErrAbortHandler)
		},
	} {
		t.Run(name, func(t *testing.T) {
			z := newHosts(t, blocktest.NewImage(t, 9, 6000), 4, fetcher.Options{})
			bad := z.all[3]
			instead := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				var digest string
				var off, end int64
				if n, _ := fmt.Sscanf(strings.ReplaceAll(r.URL.Path, "/", " "), " v1 blobs %s %d-%d", &digest, &off, &end); n != 3 {
					bad.answer(w, r)
					return
				}
				answer(z, w, end-off)
			})
			bad.instead.Store(&instead)
			z.replayBundles(t)
			for _, h := range z.all[:3] {
				if st := h.stats(t); st.Failed != 0 || st.Leaves == 0 {
					t.Errorf("%+v", st)
				}
				for _, p := range h.router.Peers(time.Now()) {
					if (p.Wrong > 0) != (name == "lies" && p.Name == bad.name) {
						t.Errorf("%s: %+v", h.name, p)
					}
				}
			}
		})
	}
}

// Where the bundle itself is wrong, no peer is blamed for it.
func TestWrongBundle(t *testing.T) {
	z := newHosts(t, blocktest.NewImage(t, 10, 3000), 3, fetcher.Options{})
	z.bundle(t, z.all[0])
	for i := range 20 {
		z.blob[len(z.blob)/2+i] ^= 5
	}
	z.replayBundles(t)
	for _, h := range z.all {
		for _, p := range h.router.Peers(time.Now()) {
			if p.State != zone.Working || p.Wrong > 0 {
				t.Errorf("%+v", p)
			}
		}
	}
}

// A blob whose digest the caller knows: who has sent wrong pieces of it is distrusted.
func TestBlob(t *testing.T) {
	z := newHosts(t, blocktest.NewImage(t, 11, 3000), 2, fetcher.Options{})
	for _, h := range z.all {
		z.bundle(t, h)
	}
	read := func(h *host) (*fetcher.BlobReader, []byte) {
		rc, err := h.bound.OpenBlob(t.Context(), z.blobOf, int64(len(z.blob)), 0)
		if err != nil {
			t.Fatal(err)
		}
		p, err := io.ReadAll(rc)
		if err != nil {
			t.Fatal(err)
		}
		rc.Close()
		return rc.(*fetcher.BlobReader), p
	}
	blob, p := read(z.all[0])
	if !bytes.Equal(p, z.blob) {
		t.Fatal("wrong bytes")
	}
	blob.Verified()
	z.all[0].judged.Range(func(off, right any) bool {
		if right != true {
			t.Errorf("the piece at %d is judged to be wrong", off)
		}
		return true
	})
	blob.Distrust()
	if p := z.all[0].router.Peers(time.Now()); p[0].Wrong == 0 || p[0].State == zone.Working {
		t.Errorf("%+v", p)
	}
	// A reader that is closed in the middle ends what is in flight.
	ctx, cancel := context.WithCancel(t.Context())
	rc, err := z.all[1].bound.OpenBlob(ctx, z.blobOf, int64(len(z.blob)), 0)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.ReadAll(rc); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	rc.Close()
}

// A request of a peer that takes this host for the owner is answered from the registry,
// even if this host waits for another peer to bring the same chunk.
func TestFetchOwned(t *testing.T) {
	z := newHosts(t, blocktest.NewImage(t, 12, 3000), 2, fetcher.Options{})
	h := z.all[0]
	h.router.SetMembers([]string{"host-1"})
	asked := make(chan bool, 1000)
	hangs := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- true
		for r.Context().Err() == nil {
			w.WriteHeader(http.StatusProcessing)
			select {
			case <-time.After(50 * time.Millisecond):
			case <-r.Context().Done():
			}
		}
	})
	z.all[1].instead.Store(&hangs)
	wants := h.wants(t)[:1]
	first := make(chan error)
	go func() { first <- h.bound.Fetch(t.Context(), wants) }()
	<-asked
	if wait, ok := h.fetcher.InFlight(wants[0].Stream, wants[0].Chunk, wants[0].Chunk); !ok {
		t.Error("it is not in flight")
	} else {
		defer func() {
			if err := wait(t.Context()); err != nil {
				t.Error(err)
			}
		}()
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("waited: %v", err)
		}
	}
	if _, ok := h.fetcher.InFlight(wants[0].Stream, 0, 1); ok {
		t.Error("a chunk that nobody has asked for is in flight")
	}
	began := time.Now()
	if err := h.bound.FetchOwned(t.Context(), wants); err != nil {
		t.Fatal(err)
	}
	if err := <-first; err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 25*time.Second { // the peer hangs for longer
		t.Errorf("it took %v", took)
	}
	if n := h.origin.Requests(); n != 1 {
		t.Errorf("%d requests to the registry", n)
	}
}

// A host that the registry does not answer gets what its peers have.
func TestRegistryFails(t *testing.T) {
	for _, err := range []error{blocktest.ErrInjected, errGone} {
		z := newHosts(t, blocktest.NewImage(t, 13, 1500), 3, fetcher.Options{
			Backoff: time.Millisecond, Temporary: func(err error) bool { return !errors.Is(err, errGone) },
		})
		for _, h := range z.all[1:] {
			h.router.SetMembers([]string{"host-1", "host-2"}) // host-0 has nothing yet
			if err := h.read(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		z.all[0].origin.Set(blocktest.Faults{Err: err})
		if err := z.all[0].read(t.Context()); err != nil {
			t.Errorf("%v: %v", err, err)
		}
	}
}

var errGone = errors.New("gone for good")

// A piece of a bundle is waited for while its owner says that it waits for the registry, and
// nobody else asks the registry for it.
func TestPieceOfAnOwnerThatWaits(t *testing.T) {
	b := patient
	b.hedge = 2 * time.Second // signs come ten times a second
	z := newHostsWith(t, blocktest.NewImage(t, 14, 3000), 3, zone.RunChunks, b, fetcher.Options{})
	for _, h := range z.all {
		z.bundle(t, h)
		h.origin.Set(blocktest.Faults{Delay: 3 * time.Second, Only: func(a blocktest.Asked) bool { return a.Blob == z.blobOf }})
	}
	rc, err := z.all[0].bound.OpenBlob(t.Context(), z.blobOf, int64(len(z.blob)), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	if p, err := io.ReadAll(rc); err != nil || !bytes.Equal(p, z.blob) {
		t.Errorf("%d bytes, %v", len(p), err)
	}
	if n := z.bundleBytes(); n != int64(len(z.blob)) {
		t.Errorf("%d bytes from the registry, of %d", n, len(z.blob))
	}
}

// The registry sends wrong bytes once, to one host. That host and those to which it has
// passed them on get the right ones, nobody is distrusted, and the bundle is not given up.
func TestRegistrySendsAWrongPiece(t *testing.T) {
	for i := range 3 {
		z := newHosts(t, blocktest.NewImage(t, 15, 3000), 3, fetcher.Options{})
		for _, h := range z.all {
			z.bundle(t, h)
		}
		z.all[i].origin.Set(blocktest.Faults{Flip: true, Left: 1, Only: func(a blocktest.Asked) bool { return a.Blob == z.blobOf }})
		z.replayBundles(t)
		wrong := int64(0)
		for _, h := range z.all {
			for _, p := range h.router.Peers(time.Now()) {
				if p.State == zone.Distrusted {
					t.Errorf("%s: %+v", h.name, p)
				}
			}
			st := h.stats(t)
			if wrong += st.Wrong; st.Chunks+st.ZoneChunks != 0 || st.Failed != 0 {
				t.Errorf("%s: %+v", h.name, st)
			}
		}
		if asked := z.all[i].origin.Requests(); asked > 0 && wrong == 0 {
			t.Error("nobody has seen the wrong bytes")
		}
	}
}
