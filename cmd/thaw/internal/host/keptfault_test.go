package host

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/nbd/attach"
)

// A device that was added waits for its overlay, if that is missing when the next host
// starts: its filesystem may be mounted later. Its guest never finds the disk as it was
// before its changes.
func TestRestoreWaitsForTheOverlay(t *testing.T) {
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 20))
	each := filepath.Join(t.TempDir(), "vms")
	o := Options{Dir: keptDir(t), Overlay: OverlayOptions{Each: each}}
	h := r.open(o)
	h.Recover()
	added, err := h.Add(t.Context(), Spec{Name: image + "~vm", Image: image + "~vm", Keep: true})
	if err != nil {
		t.Fatal(err)
	}
	written := bytes.Repeat([]byte{9}, 10000)
	if err := added[0].Overlay().WriteAt(t.Context(), written, 5000); err != nil {
		t.Fatal(err)
	}
	h.Close()
	dir, away := filepath.Join(each, "vm"), filepath.Join(each, "..", "away")
	for _, left := range []string{"nothing", "an empty directory"} {
		if err := os.Rename(dir, away); err != nil {
			t.Fatal(err)
		}
		if left != "nothing" {
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		h = patient(r.open(o))
		h.Recover()
		if err := h.RestoreDevices(t.Context()); err != nil {
			t.Fatal(err)
		}
		d := h.devices.byName(image + "~vm")
		if d == nil {
			t.Fatal("there is no such device")
		}
		if in := d.Info(); in.State != Opening || !strings.Contains(in.Error, "there is no overlay") || !strings.Contains(in.Error, dir) {
			t.Errorf("with %s in its place: %s %q", left, in.State, in.Error)
		}
		_ = os.RemoveAll(dir)
		if err := os.Rename(away, dir); err != nil {
			t.Fatal(err)
		}
		await(t, "the device is open", func() bool { return d.Info().State == Ready })
		got := make([]byte, len(written))
		if err := blockmap.ReadInto(t.Context(), d.Block(), blockmap.Range(5000, 10000), got); err != nil || !bytes.Equal(got, written) {
			t.Errorf("it reads other bytes: %v", err)
		}
		h.Close()
	}
}

// A node whose overlay is missing when its server was killed waits for it, too: a filesystem
// is mounted on it.
func TestRecoverWaitsForTheOverlay(t *testing.T) {
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 20))
	h := r.open(Options{})
	d, release, err := h.acquireImage(t.Context(), image)
	if err != nil {
		t.Fatal(err)
	}
	reference := d.image.of.Reference()
	release()
	dir, path := filepath.Join(t.TempDir(), "overlay"), filepath.Join(t.TempDir(), "node")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	x := h.nodes
	x.mu.Lock()
	n := x.add(&node{
		state: NodeRecovering, image: reference, spec: NodeSpec{Image: image, Overlay: dir},
		kept: attach.State{Driver: attach.UBLK, Path: path, Boot: bootText()},
	})
	x.mu.Unlock()
	defer x.drop(n)
	if err := x.tryRecover(n); !errors.Is(err, blockmap.ErrNoOverlay) || !passing(err) {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a new overlay is in its place")
	}
}

// An overlay that a client is about to open again is not forgotten, however long the
// registry takes.
func TestForgetNothingInUse(t *testing.T) {
	r := newRegistry(t)
	var hold atomic.Pointer[chan struct{}]
	asked := make(chan struct{}, 100)
	proxy := &httputil.ReverseProxy{Rewrite: func(q *httputil.ProxyRequest) { q.SetURL(&url.URL{Scheme: "http", Host: r.host}) }}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if c := hold.Load(); c != nil {
			asked <- struct{}{}
			select {
			case <-*c:
			case <-q.Context().Done():
			}
		}
		proxy.ServeHTTP(w, q)
	}))
	t.Cleanup(s.Close)
	slow := &testRegistry{t, strings.TrimPrefix(s.URL, "http://")}
	image := slow.push("team/app:v1", blocktest.NewImage(t, 1, 20))
	o := Options{Dir: keptDir(t), Overlay: OverlayOptions{Ephemeral: true}}
	any := func(string) bool { return true }
	h := slow.open(o)
	h.Recover()
	d, release, err := h.Acquire(t.Context(), image+"~vm", any)
	if err != nil {
		t.Fatal(err)
	}
	written := bytes.Repeat([]byte{9}, 10000)
	if err := d.Overlay().WriteAt(t.Context(), written, 5000); err != nil {
		t.Fatal(err)
	}
	h.SetStopping()
	release()
	killed(t, h)
	if n := ephemerals(t, o.Dir); len(n) != 1 {
		t.Fatalf("%q", n)
	}
	// The manifest is not in the cache any more, so the registry is asked for it.
	for _, name := range []string{"roots", "small", "streams"} {
		if err := os.RemoveAll(filepath.Join(o.Dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	h = slow.open(o)
	h.Recover()
	h.SetServing()
	open := make(chan struct{})
	hold.Store(&open)
	type result struct {
		d       *Device
		release func()
		err     error
	}
	opened := make(chan result, 1)
	go func() {
		d, release, err := h.Acquire(t.Context(), image+"~vm", any)
		opened <- result{d, release, err}
	}()
	<-asked
	h.forgetClients()
	if n := ephemerals(t, o.Dir); len(n) != 1 {
		t.Errorf("the overlay is removed while its client waits for the registry: %q", n)
	}
	if n := len(mustRead(t, o.Dir).Devices); n != 1 {
		t.Errorf("the state file has %d devices", n)
	}
	hold.Store(nil)
	close(open)
	x := <-opened
	if x.err != nil {
		t.Fatal(x.err)
	}
	defer x.release()
	got := make([]byte, len(written))
	if err := blockmap.ReadInto(t.Context(), x.d.Block(), blockmap.Range(5000, 10000), got); err != nil || !bytes.Equal(got, written) {
		t.Errorf("the client finds its disk as it was before its changes: %v", err)
	}
}

// A host that serves no ephemeral devices forgets nobody's: their clients cannot connect to
// it.
func TestForgetOnlyOwnClients(t *testing.T) {
	r := newRegistry(t)
	for _, ephemeral := range []bool{false, true} {
		h := r.open(Options{Overlay: OverlayOptions{Ephemeral: ephemeral}})
		h.kept.mu.Lock()
		h.kept.mu.found = []savedDevice{{Name: "app~vm", By: byClient}}
		h.kept.mu.Unlock()
		h.SetServing()
		h.kept.mu.Lock()
		if waits := h.kept.mu.timer != nil; waits != ephemeral {
			t.Errorf("ephemeral %t: it forgets the device after a minute: %t", ephemeral, waits)
		}
		h.kept.mu.Unlock()
		h.Close()
	}
}

// The overlays that a state file of a later version names are there for the server that can
// read it.
func TestUnreadableStateLosesNothing(t *testing.T) {
	r := newRegistry(t)
	dir := keptDir(t)
	overlay := filepath.Join(dir, ephemeralDir, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
	if err := os.MkdirAll(overlay, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, stateName), []byte(`{"version": 3, "disks": []}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second host finds no state file
		h := r.open(Options{Dir: dir})
		h.Recover()
		h.Close()
		if _, err := os.Stat(overlay); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(dir, stateName+".damaged")); err != nil {
		t.Fatal(err)
	}
	h := r.open(Options{Dir: dir})
	h.Recover()
	if n := ephemerals(t, dir); len(n) != 0 {
		t.Errorf("once the file is removed: %q", n)
	}
}

// A state file takes little more memory than it has bytes.
func TestParseStateIsBounded(t *testing.T) {
	for _, field := range []string{"nodes", "devices"} {
		// A part of what a file may have: with -race, all of it takes ten seconds.
		text := fmt.Appendf(nil, `{"version": 2, %q: [{}%s]}`, field, strings.Repeat(",{}", maxStateFile/16/3))
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _, err := parseState(text)
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; err == nil || n > 8*uint64(len(text)) {
			t.Errorf("%s: %d MiB for a file of %d MiB: %v", field, n>>20, len(text)>>20, err)
		}
	}
}

// Devices of images in directories of any name are kept. Where the state file cannot have a
// name or a path as it is, the device is not opened: the next host would not find its changes.
func TestKeptNames(t *testing.T) {
	r := newRegistry(t)
	m := blocktest.NewImage(t, 1, 20)
	for _, c := range []struct {
		dir  string
		kept bool
	}{{"a b", true}, {"\u00ad\u202e\ufffd", true}, {"a\xffb", false}} {
		image := (&testRegistry{t, "oci:" + t.TempDir()}).push(c.dir+":v1", m)
		o := Options{Dir: keptDir(t), Overlay: OverlayOptions{Ephemeral: true}}
		h := r.open(o)
		h.Recover()
		d, err := h.Add(t.Context(), Spec{Name: image})
		if c.kept != (err == nil) {
			t.Errorf("%q: %v", c.dir, err)
		}
		if err != nil {
			if !strings.Contains(err.Error(), "UTF-8") {
				t.Errorf("%q: %v", c.dir, err)
			}
			continue
		}
		if s := mustRead(t, o.Dir); len(s.Devices) != 1 || s.Devices[0].Name != d[0].Name() {
			t.Errorf("%q: %+v", c.dir, s.Devices)
		}
		h.Close()
	}
	// A directory of overlays.
	image := r.push("team/app:v1", m)
	h := r.open(Options{Overlay: OverlayOptions{Each: filepath.Join(t.TempDir(), "a\xffb")}})
	h.Recover()
	if _, err := h.Add(t.Context(), Spec{Name: image + "~vm", Keep: true}); err == nil || !strings.Contains(err.Error(), "UTF-8") {
		t.Errorf("%v", err)
	}
}

// The state file is written once for all who wait for it.
func TestOneWritingServesAll(t *testing.T) {
	r := newRegistry(t)
	h := r.open(Options{Dir: keptDir(t), Overlay: OverlayOptions{Ephemeral: true}})
	h.Recover()
	if _, err := h.Add(t.Context(), Spec{Name: "app", Image: r.push("team/app:v1", blocktest.NewImage(t, 1, 20))}); err != nil {
		t.Fatal(err)
	}
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, h.dir, unix.IN_MOVED_TO); err != nil {
		t.Fatal(err)
	}
	const callers = 200
	var wg sync.WaitGroup
	h.kept.writing.Lock()
	for range callers {
		wg.Go(func() {
			if err := h.saveState(); err != nil {
				t.Error(err)
			}
		})
	}
	stacks := make([]byte, 4<<20)
	await(t, "all wait", func() bool {
		return bytes.Count(stacks[:runtime.Stack(stacks, true)], []byte("host.(*Host).saveState(")) == callers
	})
	h.kept.writing.Unlock()
	wg.Wait()
	events := make([]byte, 1<<20)
	n, err := unix.Read(watch, events)
	if err != nil {
		t.Fatal(err)
	}
	if written := bytes.Count(events[:n], []byte(stateName+"\x00")); written == 0 || written > 5 {
		t.Errorf("%d callers have the file written %d times", callers, written)
	}
	if s := mustRead(t, h.dir); len(s.Devices) != 1 {
		t.Errorf("%+v", s)
	}
}

// A host that stops removes the ephemeral overlays that nobody has open. So nobody can open
// them any more, and write what the next host does not have.
func TestNoUseOfWhatIsForgotten(t *testing.T) {
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 20))
	any := func(string) bool { return true }
	h := r.open(Options{Dir: keptDir(t), Overlay: OverlayOptions{Ephemeral: true}})
	h.Recover()
	if _, err := h.Add(t.Context(), Spec{Name: "idle", Image: image, Keep: true}, Spec{Name: "busy", Image: image, Keep: true}); err != nil {
		t.Fatal(err)
	}
	_, leave, err := h.Acquire(t.Context(), image+"~gone", any)
	if err != nil {
		t.Fatal(err)
	}
	leave()
	_, release, err := h.Acquire(t.Context(), "busy", nil)
	if err != nil {
		t.Fatal(err)
	}
	h.SetStopping()
	for _, name := range []string{"idle", image + "~gone"} {
		if _, release, err := h.Acquire(t.Context(), name, any); !errors.Is(err, ErrClosed) {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				release()
			}
		}
	}
	if _, again, err := h.Acquire(t.Context(), "busy", nil); err != nil { // another connection of the same client
		t.Error(err)
	} else {
		again()
	}
	release()
}

// A device that there cannot be in this host, for another reason than that its name is taken,
// stays in the state file: here, the host has as many devices of clients as it takes.
func TestRestoreLeavesWhatItCannotOpen(t *testing.T) {
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 20))
	o := Options{Dir: keptDir(t), Overlay: OverlayOptions{Each: filepath.Join(t.TempDir(), "vms")}}
	h := r.open(o)
	h.Recover()
	if _, err := h.Add(t.Context(), Spec{Name: image + "~vm", Image: image + "~vm", Keep: true}); err != nil {
		t.Fatal(err)
	}
	h.Close()
	h = r.open(o)
	h.Recover()
	t.Cleanup(func() { // before the host is closed
		h.devices.mu.Lock()
		defer h.devices.mu.Unlock()
		h.devices.mu.all = nil
	})
	h.devices.mu.Lock()
	for range maxClients {
		h.devices.mu.all = append(h.devices.mu.all, &Device{of: h.devices, client: "other", spec: Spec{Name: "other"}})
	}
	h.devices.mu.Unlock()
	if err := h.RestoreDevices(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.kept.mu.Lock()
	defer h.kept.mu.Unlock()
	if n := len(h.kept.mu.found); n != 1 {
		t.Errorf("%d devices wait for another server", n)
	}
}
