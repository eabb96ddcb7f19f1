package host

import (
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// completingRegistry is a registry that can be shut down, or refuse blobs.
type completingRegistry struct {
	*testRegistry
	server  *httptest.Server
	refuses atomic.Bool
	sent    atomic.Int64 // bytes of ranges of blobs
}

func newCompletingRegistry(t *testing.T) *completingRegistry {
	r := &completingRegistry{}
	all := ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithReferrersSupport(true))
	r.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.Header.Get("Range") == "" {
			all.ServeHTTP(w, q)
			return
		}
		if r.refuses.Load() {
			http.Error(w, "overloaded", http.StatusServiceUnavailable)
			return
		}
		all.ServeHTTP(&counted{w, &r.sent}, q)
	}))
	t.Cleanup(r.server.Close)
	r.testRegistry = &testRegistry{t, strings.TrimPrefix(r.server.URL, "http://")}
	return r
}

type counted struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n.Add(int64(n))
	return n, err
}

// fast makes the completions of a host try again at once.
func fast(h *Host) *Host {
	c := h.traces.completer
	c.recheck, c.firstTry, c.lastTry = 10*time.Millisecond, 10*time.Millisecond, 20*time.Millisecond
	return h
}

func add(t *testing.T, h *Host, name string) *Device {
	t.Helper()
	devices, err := h.Add(t.Context(), Spec{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return devices[0]
}

func whole(m *blocktest.Image) blockmap.Extent { return blockmap.Extent{End: int64(len(m.Content))} }

// After the start the rest of an image comes. Then the device works without its registry,
// and so does another server with the same cache, whether the image is named by a digest
// or by a tag.
func TestCompleteWithoutRegistry(t *testing.T) {
	r := newCompletingRegistry(t)
	m := blocktest.NewImage(t, 1, 3000)
	name := r.push("team/app:v1", m)
	dir := t.TempDir()
	h := fast(r.open(Options{Dir: dir, Complete: CompleteOptions{After: time.Millisecond}}))
	d := add(t, h, name)
	r.push("team/app:v1-other", m)
	digest := d.Info().Image
	other := add(t, h, name+"-other")
	await(t, "the image is complete", func() bool { return d.Info().Completion.State == completeDone })
	await(t, "the other one is complete", func() bool { return other.Info().Completion.State == completeDone })
	in := d.Info()
	if c := in.Completion; c.Missing != 0 || c.Stored != 0 || c.Error != "" {
		t.Errorf("%+v", c)
	}
	if st := h.Status(); st.Devices.Complete != 2 || st.Devices.Missing != 0 {
		t.Errorf("%+v", st.Devices)
	}
	// A chunk that is late on a busy machine is requested once more.
	if n, late := r.sent.Load(), h.Stats().Extra > 0; n > in.Stored && !late || n > 2*in.Stored {
		t.Errorf("%d bytes were sent for an image of %d", n, in.Stored)
	}
	r.server.Close()
	read(t, d.Block(), m, whole(m))
	h.Close()
	h = fast(r.open(Options{Dir: dir, Complete: CompleteOptions{After: time.Millisecond}}))
	h.traces.opener.patience = 10 * atMost // which nobody needs for a digest
	began := time.Now()
	byDigest := add(t, h, digest)
	if took := time.Since(began); took > 5*atMost {
		t.Errorf("the image was named by its digest, and opened after %v", took)
	}
	read(t, byDigest.Block(), m, whole(m))
	// In another repository the digest says nothing about who may read it.
	if _, err := h.Add(t.Context(), Spec{Name: strings.Replace(digest, "team/app", "team/other", 1)}); err == nil {
		t.Error("the image was opened as one of another repository")
	}
	byTag := add(t, h, name)
	read(t, byTag.Block(), m, whole(m))
	if c := byTag.Info().Completion; c.State != completeDone || c.Missing != 0 {
		t.Errorf("%+v", c)
	}
	if st := h.Stats(); st.Chunks != 0 || st.Failed != 0 {
		t.Errorf("%+v", st)
	}
}

// A completion that was interrupted goes on where it was.
func TestCompleteGoesOn(t *testing.T) {
	r := newCompletingRegistry(t)
	m := blocktest.NewImage(t, 2, 20000)
	name := r.push("team/app:v1", m)
	dir := t.TempDir()
	h := fast(r.open(Options{Dir: dir, Complete: CompleteOptions{After: time.Millisecond, Rate: 4 << 20}}))
	d := add(t, h, name)
	await(t, "a part of it is here", func() bool { return d.Info().Resident > 2<<20 })
	if c := d.Info().Completion; c.State == completeDone {
		t.Fatalf("it is complete: the rate was not kept")
	}
	h.Close()
	h = fast(r.open(Options{Dir: dir, Complete: CompleteOptions{After: time.Millisecond}}))
	d = add(t, h, name)
	await(t, "the image is complete", func() bool { return d.Info().Completion.State == completeDone })
	read(t, d.Block(), m, whole(m))
	// What was in flight when the first server ended may come again.
	if n, stored := r.sent.Load(), d.Info().Stored; n > stored+stored/4 {
		t.Errorf("%d bytes were sent for an image of %d", n, stored)
	}
}

// While the registry fails, completion tries again, and reads of what is here work.
func TestCompleteTriesAgain(t *testing.T) {
	r := newCompletingRegistry(t)
	m := blocktest.NewImage(t, 3, 1000)
	name := r.push("team/app:v1", m)
	dir := t.TempDir()
	h := r.open(Options{Dir: dir}) // which does not complete it
	read(t, add(t, h, name).Block(), m, blockmap.Range(0, 4096))
	h.Close()
	r.refuses.Store(true)
	h = fast(r.open(Options{Dir: dir, Complete: CompleteOptions{After: time.Millisecond}}))
	d := add(t, h, name)
	await(t, "completion has failed", func() bool {
		c := d.Info().Completion
		return c.State == completeRetrying && strings.Contains(c.Error, "503")
	})
	read(t, d.Block(), m, blockmap.Range(0, 4096))
	if st := h.Stats(); st.Failed != 0 {
		t.Errorf("%d chunks were given up", st.Failed)
	}
	if st := h.Status(); st.Devices.Complete != 0 || st.Devices.Missing == 0 {
		t.Errorf("%+v", st.Devices)
	}
	r.refuses.Store(false)
	await(t, "the image is complete", func() bool { return d.Info().Completion.State == completeDone })
}

// Completion begins only if the cache has room for the rest, and only if it is enabled.
func TestCompleteOnlyWithRoom(t *testing.T) {
	r := newCompletingRegistry(t)
	m := blocktest.NewImage(t, 4, 8000)
	name := r.push("team/app:v1", m)
	h := fast(r.open(Options{Quota: MinQuota, Complete: CompleteOptions{After: time.Millisecond}}))
	d := add(t, h, name)
	await(t, "there is no room", func() bool { return d.Info().Completion.State == completeNoRoom })
	off := add(t, r.open(Options{}), name)
	if c := off.Info().Completion; c.State != completeOff || c.Missing == 0 {
		t.Errorf("%+v", c)
	}
	late := add(t, r.open(Options{Complete: CompleteOptions{After: time.Hour}}), name)
	await(t, "the start has found no trace", func() bool { return late.Info().Prefetch.State == "none" })
	if c := late.Info().Completion; c.State != completeWaiting || c.Missing == 0 {
		t.Errorf("%+v", c)
	}
	if d.Info().Resident > 0 || h.Stats().Evicted > 0 {
		t.Errorf("%d bytes were fetched, %d evicted", d.Info().Resident, h.Stats().Evicted)
	}
}

// Clients that wait for the registry again and again put completion off.
func TestCompleteAfterQuiet(t *testing.T) {
	r := newCompletingRegistry(t)
	m := blocktest.NewImage(t, 5, 4000)
	h := fast(r.open(Options{Complete: CompleteOptions{After: 500 * time.Millisecond}}))
	name := r.push("team/app:v1", m)
	last := time.Now() // or earlier: the last demand was not before
	d := add(t, h, name)
	for at := int64(0); at < 90; at++ {
		time.Sleep(10 * time.Millisecond)
		e := blockmap.Range(at*160<<10, 4096)
		if s := d.Block().Status(e); s.Resident {
			continue
		}
		state := d.Info().Completion.State
		if since := time.Since(last); since < 500*time.Millisecond && state != completeWaiting {
			t.Fatalf("it is %s %v after the last demand", state, since)
		} else if since >= 500*time.Millisecond {
			break // on a busy machine
		}
		began := time.Now()
		read(t, d.Block(), m, e)
		if !d.image.fetcher.LastDemand().Before(began) { // or else it has come with others meanwhile
			last = began
		}
	}
	await(t, "the image is complete", func() bool { return d.Info().Completion.State == completeDone })
	if took := time.Since(last); took < 500*time.Millisecond {
		t.Errorf("it was complete %v after the last demand", took)
	}
}

// Images that are completed at the same time do not take the same room: one of them is
// completed, and nothing is evicted.
func TestCompleteSharesRoom(t *testing.T) {
	r := newCompletingRegistry(t)
	a, b := blocktest.NewImage(t, 6, 20000), blocktest.NewImage(t, 7, 20000)
	first, second := r.push("team/a:v1", a), r.push("team/b:v1", b)
	size := add(t, r.open(Options{}), first).Info().Completion.Missing
	h := fast(r.open(Options{Quota: size + size/2, Complete: CompleteOptions{After: time.Millisecond}}))
	devices := []*Device{add(t, h, first), add(t, h, second)}
	await(t, "one image is complete, and there is no room for the other", func() bool {
		x, y := devices[0].Info().Completion.State, devices[1].Info().Completion.State
		return x == completeDone && y == completeNoRoom || x == completeNoRoom && y == completeDone || h.Stats().Evicted > 0
	})
	if n := h.Stats().Evicted; n > 0 {
		t.Errorf("%d bytes were evicted", n)
	}
}
