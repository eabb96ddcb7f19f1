package host

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher/zone"
)

// inZone are Options of a host that is alone in a zone.
func inZone(o Options) Options {
	o.Zone.Name, o.Zone.Listen = "test", "127.0.0.1:0"
	return o
}

// countingRegistry is a registry that counts what it is asked for.
type countingRegistry struct {
	*testRegistry
	requests atomic.Int64
	refuse   atomic.Bool
}

func newCountingRegistry(t testing.TB) *countingRegistry {
	t.Helper()
	r := &countingRegistry{testRegistry: newRegistry(t)}
	rp := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: r.host})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.requests.Add(1)
		if r.refuse.Load() {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		rp.ServeHTTP(w, req)
	}))
	t.Cleanup(s.Close)
	r.host = strings.TrimPrefix(s.URL, "http://")
	return r
}

// pushed stores an image, and returns its reference by digest.
func (r *testRegistry) pushed(name string, m *blocktest.Image) string {
	r.t.Helper()
	name = r.push(name, m)
	f := r.finder()
	defer f.Close()
	b, err := f.Find(r.t.Context(), name)
	if err != nil {
		r.t.Fatal(err)
	}
	return b.Reference()
}

// A peer has a host fetch chunks of an image that the host does not know, from the registry
// and into the cache. Then the host needs the registry no more for them.
func TestPeersReadThroughAHost(t *testing.T) {
	r := newCountingRegistry(t)
	m := blocktest.NewImage(t, 1, 600)
	image := r.pushed("team/app:v1", m)
	h := r.open(inZone(Options{Zone: ZoneOptions{Allow: Allow{r.host + "/**"}}}))
	table := &m.Index.Streams[0]
	s, release, err := h.zone.store.Stream(t.Context(), image, table.ID())
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if s.Stream().ID() != table.ID() || s.Stream().Has(0) {
		t.Errorf("stream %s", s.Stream().ID())
	}
	if _, ok := s.InFlight(0, 1); ok {
		t.Error("something is in flight")
	}
	if err := s.FetchOwned(t.Context(), 0, 3); err != nil {
		t.Fatal(err)
	}
	n := r.requests.Load()
	if err := s.FetchOwned(t.Context(), 0, 3); err != nil || r.requests.Load() != n {
		t.Errorf("chunks that are here: %v, %d requests", err, r.requests.Load()-n)
	}
	for i := range 4 {
		got := make([]byte, table.Chunks[i].Size())
		if !s.Stream().ReadChunk(i, got) || table.Chunks[i].Verify(got) != nil {
			t.Errorf("chunk %d is not in the cache", i)
		}
	}
	// Another peer: nothing is asked of the registry.
	again, leave, err := h.zone.store.Stream(t.Context(), image, table.ID())
	if err != nil || r.requests.Load() != n || again.Stream() != s.Stream() {
		t.Errorf("%v, %d requests", err, r.requests.Load()-n)
	}
	leave()
	if roots := h.cache.Roots(); len(roots) != 0 {
		t.Errorf("an image of peers has roots in the cache: %v", roots)
	}
	if _, _, err := h.zone.store.Stream(t.Context(), image, blockmap.Digest{1}); !errors.Is(err, zone.ErrAbsent) {
		t.Errorf("a stream that the image does not have: %v", err)
	}

	blob := m.Blobs[table.Blob]
	body, err := h.zone.store.Blob(t.Context(), image, table.Blob, 100, 1000)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if got, err := io.ReadAll(body); err != nil || !bytes.Equal(got, blob[100:1100]) {
		t.Errorf("%d bytes of a blob, %v", len(got), err)
	}
	if _, err := h.zone.store.Blob(t.Context(), image, blockmap.Digest{1}, 0, 10); !errors.Is(err, zone.ErrAbsent) {
		t.Errorf("a blob that does not exist: %v", err)
	}
	// The index is here by now, and comes from the cache.
	n = r.requests.Load()
	encoded := m.Index.Encode()
	index, err := h.zone.store.Blob(t.Context(), image, sha256.Sum256(encoded), 0, int64(len(encoded)))
	if err != nil {
		t.Fatal(err)
	}
	defer index.Close()
	if got, err := io.ReadAll(index); err != nil || !bytes.Equal(got, encoded) || r.requests.Load() != n {
		t.Errorf("%d bytes of the index, %v, %d requests", len(got), err, r.requests.Load()-n)
	}
	if _, err := h.zone.store.Blob(t.Context(), image, sha256.Sum256(encoded), 1, int64(len(encoded))); !errors.Is(err, zone.ErrAbsent) {
		t.Errorf("more than the index has: %v", err)
	}
}

// Peers can have a host open only what it opens for them.
func TestWhatPeersMayOpen(t *testing.T) {
	r := newCountingRegistry(t)
	m := blocktest.NewImage(t, 1, 300)
	name := r.push("team/app:v1", m)
	image := r.pushed("team/app:v1", m)
	secret := r.pushed("secret/app:v1", m)
	digest := image[strings.Index(image, "@"):]
	stream := m.Index.Streams[0].ID()
	for what, c := range map[string]struct {
		o        Options
		start    bool // the host opens the image itself
		ok       []string
		absent   []string
		restarts bool
	}{
		"nothing is known":     {Options{}, false, nil, []string{image, secret}, false},
		"of its own registry":  {Options{}, true, []string{image, secret}, []string{"registry.example/team/app" + digest}, true},
		"--zone-allow":         {Options{Zone: ZoneOptions{Allow: Allow{r.host + "/team/*"}}}, true, []string{image}, []string{secret}, true},
		"--allow":              {Options{Zone: ZoneOptions{Clients: Allow{r.host + "/secret/*"}}}, false, []string{secret}, []string{image}, false},
		"--allow, and another": {Options{Zone: ZoneOptions{Clients: Allow{r.host + "/secret/*"}, Allow: Allow{r.host + "/team/*"}}}, false, []string{image}, []string{secret}, false},
	} {
		h := r.open(inZone(c.o))
		if c.start {
			if _, err := h.Add(t.Context(), Spec{Name: name}); err != nil {
				t.Fatal(err)
			}
		}
		check := func(h *Host) {
			t.Helper()
			for _, x := range c.ok {
				_, release, err := h.zone.store.Stream(t.Context(), x, stream)
				if err != nil {
					t.Errorf("%s: %s: %v", what, x, err)
					continue
				}
				release()
			}
			n := r.requests.Load()
			for _, x := range append(c.absent,
				name, r.host+"/team/app:v1"+digest, "oci:/etc"+digest, "oci-archive:/x.tar"+digest, "", digest, r.host+"/../etc"+digest, r.host+"/team/app@sha512:"+strings.Repeat("a", 128)) {
				if _, _, err := h.zone.store.Stream(t.Context(), x, stream); !errors.Is(err, zone.ErrAbsent) {
					t.Errorf("%s: %s is opened: %v", what, x, err)
				}
				if _, err := h.zone.store.Blob(t.Context(), x, m.Index.Streams[0].Blob, 0, 10); !errors.Is(err, zone.ErrAbsent) {
					t.Errorf("%s: a blob of %s is read: %v", what, x, err)
				}
			}
			if r.requests.Load() != n {
				t.Errorf("%s: the registry was asked for what peers may not open", what)
			}
		}
		check(h)
		if c.restarts { // the cache remembers
			h.Close()
			o := inZone(c.o)
			o.Dir = h.dir
			check(r.open(o))
		}
	}
}

// A peer that names what does not exist cannot have a host ask the registry again and again.
// What the host has open goes on being served.
func TestMissesOfPeersAreBounded(t *testing.T) {
	r := newCountingRegistry(t)
	m := blocktest.NewImage(t, 1, 300)
	image := r.pushed("team/app:v1", m)
	stream := m.Index.Streams[0].ID()
	for what, ask := range map[string]func(*zoneStore, blockmap.Digest) error{
		"images": func(s *zoneStore, d blockmap.Digest) error {
			_, _, err := s.Stream(t.Context(), image[:strings.Index(image, "@")]+"@sha256:"+d.String(), stream)
			return err
		},
		"blobs": func(s *zoneStore, d blockmap.Digest) error {
			_, err := s.Blob(t.Context(), image, d, 0, 10)
			return err
		},
	} {
		h := r.open(inZone(Options{Zone: ZoneOptions{Allow: Allow{r.host + "/**"}}}))
		s := h.zone.store
		_, release, err := s.Stream(t.Context(), image, stream)
		if err != nil {
			t.Fatal(err)
		}
		release()
		began, before := time.Now(), r.requests.Load()
		for i := range 5 * missBurst {
			if err := ask(s, sha256.Sum256(fmt.Append(nil, what, i))); !errors.Is(err, zone.ErrAbsent) {
				t.Fatalf("%s: %d: %v", what, i, err)
			}
		}
		most := 2 * (missBurst + int64(time.Since(began)/missEvery) + 1) // with a token of the registry
		if n := r.requests.Load() - before; n < missBurst || n > most {
			t.Errorf("%s: %d requests for what does not exist, at most %d", what, n, most)
		}
		if _, release, err = s.Stream(t.Context(), image, stream); err != nil {
			t.Errorf("%s: an image that is open: %v", what, err)
		} else {
			release()
		}
	}
}

// What peers have a host open is bounded, opened once, and closed when nobody asks for it.
func TestImagesOfPeersAreBounded(t *testing.T) {
	r := newCountingRegistry(t)
	m := blocktest.NewImage(t, 1, 300)
	stream := m.Index.Streams[0].ID()
	h := r.open(inZone(Options{Zone: ZoneOptions{Allow: Allow{r.host + "/**"}}}))
	s := h.zone.store
	count := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.mu.images)
	}
	image := r.pushed("team/app:v1", m)
	n := r.requests.Load()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			_, release, err := s.Stream(t.Context(), image, stream)
			if err != nil {
				t.Error(err)
				return
			}
			release()
			release() // once more does nothing
		})
	}
	wg.Wait()
	if asked := r.requests.Load() - n; asked > 3 || count() != 1 {
		t.Errorf("%d requests for one image, %d open", asked, count())
	}
	// The same image by many names.
	digest := image[strings.Index(image, "@"):]
	for i := range maxPeerImages + 10 {
		r.push(fmt.Sprintf("many/app%d:v1", i), m)
		_, release, err := s.Stream(t.Context(), fmt.Sprintf("%s/many/app%d%s", r.host, i, digest), stream)
		if err != nil {
			t.Fatal(err)
		}
		release()
	}
	if count() != maxPeerImages {
		t.Errorf("%d images are open", count())
	}
	// Those in use stay.
	var leave []func()
	for i := range maxPeerImages {
		_, release, err := s.Stream(t.Context(), fmt.Sprintf("%s/many/app%d%s", r.host, i, digest), stream)
		if err != nil {
			t.Fatal(err)
		}
		leave = append(leave, release)
	}
	if _, _, err := s.Stream(t.Context(), image, stream); !errors.Is(err, zone.ErrAbsent) {
		t.Errorf("one more than the most: %v", err)
	}
	s.expire(time.Now().Add(time.Hour))
	if count() != maxPeerImages {
		t.Errorf("%d images in use are open", count())
	}
	for _, f := range leave {
		f()
	}
	s.expire(time.Now().Add(time.Hour))
	if count() != 0 || s.mu.bytes != 0 {
		t.Errorf("%d images with %d bytes are open", count(), s.mu.bytes)
	}

	// A registry that refuses is not asked by each peer again.
	r.refuse.Store(true)
	n = r.requests.Load()
	other := r.host + "/team/none@sha256:" + strings.Repeat("ab", 32)
	began := time.Now()
	for range 10 {
		if _, _, err := s.Stream(t.Context(), other, stream); err == nil {
			t.Error("it is opened")
		}
	}
	if asked := r.requests.Load() - n; asked > 3*(1+int64(time.Since(began)/peerErrorKept)) {
		t.Errorf("%d requests for an image that cannot be opened", asked)
	}
	// A peer that leaves does not wait.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := s.Stream(gone, strings.Replace(other, "team/none", "team/other", 1), stream); err == nil {
		t.Error("it is opened")
	}
}

// Two hosts in one process: what one has started comes to the other by the zone.
func TestTwoHosts(t *testing.T) {
	r := newCountingRegistry(t)
	m := blocktest.NewImage(t, 1, 2000)
	name := r.push("team/app:v1", m)
	allow := Allow{r.host + "/**"}
	a := r.open(inZone(Options{Zone: ZoneOptions{Allow: allow, Host: "a"}}))
	b := r.open(inZone(Options{Zone: ZoneOptions{Allow: allow, Host: "b", Join: []string{a.zone.Addr()}}}))
	await(t, "they are members", func() bool {
		x, _ := a.Zone(t.Context(), false)
		y, _ := b.Zone(t.Context(), false)
		return x.Members == 2 && y.Members == 2
	})
	var stored int64
	for _, blob := range m.Blobs {
		stored += int64(len(blob))
	}
	for _, h := range []*Host{a, b} {
		d, err := h.Add(t.Context(), Spec{Name: name})
		if err != nil {
			t.Fatal(err)
		}
		read(t, d[0].Block(), m, blockmap.Extent{End: int64(len(m.Content))})
	}
	// What was sent is counted after it has arrived, and a busy peer may answer too late.
	var x, y ZoneStatus
	await(t, "both have sent and received, and answer", func() bool {
		var err, err2 error
		x, err = a.Zone(t.Context(), true)
		y, err2 = b.Zone(t.Context(), true)
		if err != nil || err2 != nil || len(x.Peers) != 1 {
			t.Fatalf("%+v, %v\n%+v, %v", x, err, y, err2)
		}
		return x.Received > 0 && y.Received > 0 && x.Sent > 0 && y.Sent > 0 && x.Peers[0].Health != nil
	})
	// Each byte once, and the index and what the fetcher reads with its neighbours. What a peer
	// is late with comes from the registry as well.
	late := int64(0)
	for _, h := range []*Host{a, b} {
		st := h.fetcher.Stats()
		late += st.PassedOver + st.Extra
	}
	if sum := x.Registry + y.Registry; sum > stored*105/100 && late == 0 || sum >= 2*stored {
		t.Errorf("%d bytes came from the registry, which has %d; %d requests were late", sum, stored, late)
	}
	if _, err := r.open(Options{}).Zone(t.Context(), false); !errors.Is(err, ErrNoZone) {
		t.Errorf("a host in no zone: %v", err)
	}
}

// A zone that cannot be opened is an error, and leaves nothing behind.
func TestZoneThatCannotBeOpened(t *testing.T) {
	r := newRegistry(t)
	dir := t.TempDir()
	for _, z := range []ZoneOptions{
		{Name: "test", Listen: "0.0.0.0:0"}, {Name: "test"}, {Name: "a b", Listen: "127.0.0.1:0"}, {Listen: "127.0.0.1:0"},
		{Name: "test", Listen: "127.0.0.1:0", Secret: dir + "/none"}, {Name: "test", Listen: "127.0.0.1:0", Cert: "c", Key: "k", CA: "a", Secret: dir + "/none"},
		{Name: "test", Listen: "127.0.0.1:0", Join: []string{"dns:"}},
	} {
		h, err := Open(Options{Finder: r.finder(), Dir: dir + "/cache", Zone: z})
		if err == nil && z.Name != "" {
			t.Errorf("%+v: it is open", z)
		}
		if err == nil {
			h.Close()
		}
	}
	// Secrets are read again when they change.
	path := dir + "/secret"
	if err := os.WriteFile(path, []byte("the first secret of it\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h := r.open(inZone(Options{Zone: ZoneOptions{Secret: path}}))
	if err := os.WriteFile(path, []byte("the second secret of it\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.RefreshZone(true)
	if h.zone == nil || len(h.zone.files) != 1 {
		t.Errorf("%+v", h.zone)
	}
}
