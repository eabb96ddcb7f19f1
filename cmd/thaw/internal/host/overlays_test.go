package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/nbd"
)

func TestSplitClient(t *testing.T) {
	for name, want := range map[string]string{
		"registry.example/app:v1":          "registry.example/app:v1 -",
		"registry.example/app:v1~vm7":      "registry.example/app:v1 vm7",
		"app@sha256:00~a.b-c_D":            "app@sha256:00 a.b-c_D",
		"~x":                               " x",
		"oci:/srv/~x":                      "oci:/srv/ x",
		"a~b~c":                            "a~b c",
		"~":                                "refused",
		"app~":                             "refused",
		"app~..":                           "refused",
		"app~a/b":                          "refused",
		"app~a\x00b":                       "refused",
		"app~a\nb":                         "refused",
		"app~" + strings.Repeat("x", 128):  "app " + strings.Repeat("x", 128),
		"app~" + strings.Repeat("x", 129):  "refused",
		"app~" + strings.Repeat("x", 1e5):  "refused",
		"app~" + strings.Repeat("..", 1e3): "refused",
	} {
		device, client, ok, err := splitClient(name)
		got := device + " " + client
		switch {
		case err != nil:
			got = "refused"
		case !ok:
			got = device + " -"
		}
		if got != want {
			t.Errorf("%.50q: %.50q, want %.50q", name, got, want)
		}
	}
}

func TestOwns(t *testing.T) {
	c := nbd.ClientInfo{Names: []string{"host-7.example", "10.0.0.7", "machine"}}
	for name, want := range map[string]bool{
		"host-7.example": true, "HOST-7.example": true, "vm.host-7.example": true, "a.b.host-7.example": true,
		"10.0.0.7": true, "machine": true, "disk.machine": true,
		"example": false, "xhost-7.example": false, "host-7.example.org": false, "machine.x": false, "": false, "0.0.7": false,
	} {
		if got := owns(c, name); got != want {
			t.Errorf("%q: %v, want %v", name, got, want)
		}
	}
	if owns(nbd.ClientInfo{}, "x") {
		t.Error("a client without a certificate owns an overlay")
	}
}

// The number of overlays in a directory is bounded, and so is that of clients.
func TestOverlaysAreBounded(t *testing.T) {
	r := newRegistry(t)
	name := r.push("team/app:v1", blocktest.NewImage(t, 1, 100))
	each := t.TempDir()
	for i := range maxOverlays - 1 {
		if err := os.Mkdir(filepath.Join(each, fmt.Sprint("old", i)), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	h := r.open(Options{Overlay: OverlayOptions{Each: each}})
	if _, err := h.Add(t.Context(), Spec{Name: name}); err != nil {
		t.Fatal(err)
	}
	_, release, err := h.Acquire(t.Context(), name+"~last", nil)
	if err != nil {
		t.Fatal(err)
	}
	release()
	if _, _, err := h.Acquire(t.Context(), name+"~more", nil); !errors.As(err, new(ConflictError)) {
		t.Errorf("one overlay too many: %v", err)
	}
	if _, err := os.Stat(filepath.Join(each, "more")); err == nil {
		t.Error("it was made")
	}

	h = r.open(Options{Overlay: OverlayOptions{Ephemeral: true}})
	if _, err := h.Add(t.Context(), Spec{Name: name}); err != nil {
		t.Fatal(err)
	}
	h.devices.mu.Lock()
	for range maxClients {
		h.devices.mu.all = append(h.devices.mu.all, &Device{client: "x", closed: closedChannel, ready: closedChannel, err: errors.New("made up")})
	}
	h.devices.mu.Unlock()
	if _, _, err := h.Acquire(t.Context(), name+"~more", nil); !errors.As(err, new(ConflictError)) {
		t.Errorf("one client too many: %v", err)
	}
	h.devices.mu.Lock()
	h.devices.mu.all = h.devices.mu.all[:1]
	h.devices.mu.Unlock()
}

var closedChannel = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// An ephemeral overlay waits for its client for a while, and goes then. Stop does not wait.
func TestEphemeralOverlayLingers(t *testing.T) {
	r := newRegistry(t)
	m := blocktest.NewImage(t, 1, 100)
	name := r.push("team/app:v1", m)
	h := r.open(Options{Overlay: OverlayOptions{Ephemeral: true}})
	added, err := h.Add(t.Context(), Spec{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	write := func(d *Device, b byte) {
		t.Helper()
		if err := d.Overlay().WriteAt(t.Context(), []byte{b}, 7); err != nil {
			t.Fatal(err)
		}
	}
	get := func(d *Device) byte {
		t.Helper()
		p := make([]byte, 1)
		if err := blockmap.ReadInto(t.Context(), d.Block(), blockmap.Range(7, 1), p); err != nil {
			t.Fatal(err)
		}
		return p[0]
	}
	acquire := func(client string) (*Device, func()) {
		t.Helper()
		d, release, err := h.Acquire(t.Context(), name+"~"+client, nil)
		if err != nil {
			t.Fatal(err)
		}
		return d, release
	}
	other := m.Content[7] + 1
	first, release := acquire("a")
	again, releaseAgain, err := h.Acquire(t.Context(), "~a", nil)
	if err != nil || again != first {
		t.Fatalf("another connection of the client gets another device: %v", err)
	}
	write(first, other)
	release()
	releaseAgain()
	d, release := acquire("a")
	if d != first || get(d) != other {
		t.Error("a client that connects again does not find its changes")
	}
	if get(added[0]) != m.Content[7] {
		t.Error("the image's own overlay has a client's changes")
	}
	h.devices.mu.Lock()
	h.devices.linger = time.Millisecond
	h.devices.mu.Unlock()
	release()
	await(t, "the overlay goes", func() bool { return h.Device(first.ID()) == nil })
	d, release = acquire("a")
	if get(d) != m.Content[7] {
		t.Error("changes that are gone are back")
	}
	h.devices.mu.Lock()
	h.devices.linger = time.Hour
	h.devices.mu.Unlock()
	write(d, other)
	release()
	if h.Device(d.ID()) == nil {
		t.Error("the overlay does not wait for its client")
	}
	if err := h.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if left := h.Devices(); len(left) > 0 {
		t.Errorf("%d devices are left", len(left))
	}
}

// An overlay that cannot be made durable at the end is an error.
func TestStopSaysWhatIsLost(t *testing.T) {
	r := newRegistry(t)
	name := r.push("team/app:v1", blocktest.NewImage(t, 1, 100))
	dir := filepath.Join(t.TempDir(), "overlay")
	h := r.open(Options{Overlay: OverlayOptions{Dir: dir}})
	added, err := h.Add(t.Context(), Spec{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Add(t.Context(), Spec{Name: "two", Image: name}); !errors.As(err, new(ConflictError)) {
		t.Errorf("a second device over one overlay: %v", err)
	}
	d := added[0]
	if err := d.Overlay().WriteAt(context.Background(), make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if in := d.Info(); in.Overlay == nil || in.Overlay.Data != 4096 || in.Overlay.Directory != dir {
		t.Errorf("%+v", in.Overlay)
	}
	if st := h.Stats(); st.Overlays != 1 || st.Changed != 4096 || st.OverlaySpace == 0 || st.Poisoned != 0 {
		t.Errorf("%+v", st)
	}
	if err := h.Stop(t.Context()); err != nil {
		t.Errorf("an overlay in order: %v", err)
	}
	if info, err := blockmap.ReadOverlay(blockmap.OS, dir); err != nil || info.InUse || info.Data != 4096 {
		t.Errorf("after Stop: %+v, %v", info, err)
	}

	h = r.open(Options{Overlay: OverlayOptions{Dir: filepath.Join(t.TempDir(), "overlay")}})
	disk := blocktest.NewFS()
	h.overlays.fs = disk
	if added, err = h.Add(t.Context(), Spec{Name: name}); err != nil {
		t.Fatal(err)
	}
	if err := added[0].Overlay().WriteAt(context.Background(), make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	disk.Fail(func(op, path string) error {
		if op == "sync" {
			return syscall.EIO
		}
		return nil
	})
	if err := added[0].Overlay().Flush(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("flush: %v", err)
	}
	if in := added[0].Info(); in.Overlay.Error == "" || h.Stats().Poisoned != 1 {
		t.Errorf("%+v", in.Overlay)
	}
	if err := h.Stop(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("stop: %v", err)
	}
}
