package host

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/nbd"
	"thaw/nbd/vhost"
)

// keptDir is a cache directory for several hosts, one after the other.
func keptDir(t *testing.T) string { return filepath.Join(shortDir(t), "cache") }

// killed ends a host as a kill does, as far as its files tell: they are as they were before.
func killed(t *testing.T, h *Host) {
	t.Helper()
	away := h.dir + ".killed"
	if err := errors.Join(os.MkdirAll(away, 0o700), os.CopyFS(filepath.Join(away, ephemeralDir), os.DirFS(filepath.Join(h.dir, ephemeralDir)))); err != nil {
		t.Fatal(err)
	}
	state, err := os.ReadFile(filepath.Join(h.dir, stateName))
	if err != nil {
		t.Fatal(err)
	}
	h.Close()
	if err := os.WriteFile(filepath.Join(h.dir, stateName), state, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, k := range mustRead(t, h.dir).Devices {
		if k.Ephemeral == "" {
			continue
		}
		dir := filepath.Join(h.dir, ephemeralDir, k.Ephemeral)
		if _, err := os.Stat(dir); err != nil { // the copy is of other files, and not believed
			if err := os.Rename(filepath.Join(away, ephemeralDir, k.Ephemeral), dir); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func mustRead(t *testing.T, dir string) saved {
	t.Helper()
	s, bad, err := readState(dir)
	if err != nil || len(bad) > 0 {
		t.Fatalf("%v, %v", bad, err)
	}
	return s
}

func ephemerals(t *testing.T, dir string) []string {
	t.Helper()
	return strings.Fields(names(t, filepath.Join(dir, ephemeralDir)))
}

// What clients had written to devices that they named waits a minute for them, and what was
// before a reboot waits for nobody. Devices that were added stay.
func TestKeptOverlaysAreForgotten(t *testing.T) {
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 20))
	o := Options{Dir: keptDir(t), Overlay: OverlayOptions{Ephemeral: true}}
	any := func(string) bool { return true }
	h := r.open(o)
	h.Recover()
	if _, err := h.Add(t.Context(), Spec{Name: "added", Image: image, Keep: true}, Spec{Name: "flags", Image: image}); err != nil {
		t.Fatal(err)
	}
	_, release, err := h.Acquire(t.Context(), image+"~vm", any)
	if err != nil {
		t.Fatal(err)
	}
	by := func(s saved) (list []string) {
		for _, k := range s.Devices {
			list = append(list, string(k.By)+" "+strings.TrimPrefix(k.Name, image))
			if k.Ephemeral == "" || k.Boot != bootText() || !k.Writable {
				t.Errorf("%+v", k)
			}
		}
		slices.Sort(list)
		return list
	}
	if got := by(mustRead(t, o.Dir)); !slices.Equal(got, []string{"api added", "client ~vm", "flags flags"}) {
		t.Errorf("%q", got)
	}
	release()
	killed(t, h)
	if n := ephemerals(t, o.Dir); len(n) != 3 {
		t.Fatalf("%q", n)
	}

	// A host without ephemeral overlays, and one that has them.
	plain := o
	plain.Overlay = OverlayOptions{}
	h = patient(r.open(plain))
	h.Recover()
	if err := h.RestoreDevices(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := len(h.Devices()); n != 0 {
		t.Errorf("%d devices", n)
	}
	h.SetServing()
	h.forgetClients()
	h.Close()
	if got := by(mustRead(t, o.Dir)); !slices.Equal(got, []string{"api added", "flags flags"}) {
		t.Errorf("after a minute: %q", got)
	}
	if n := ephemerals(t, o.Dir); len(n) != 2 {
		t.Errorf("after a minute: %q", n)
	}

	// After a reboot.
	state, err := os.ReadFile(filepath.Join(o.Dir, stateName))
	if err != nil {
		t.Fatal(err)
	}
	boot := strings.ReplaceAll(string(state), bootText(), "00000000-0000-0000-0000-000000000000")
	if err := os.WriteFile(filepath.Join(o.Dir, stateName), []byte(boot), 0o600); err != nil {
		t.Fatal(err)
	}
	h = patient(r.open(o))
	h.Recover()
	if n := ephemerals(t, o.Dir); len(n) != 0 {
		t.Errorf("after a reboot: %q", n)
	}
	if err := h.RestoreDevices(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := h.Devices(); len(d) != 1 || d[0].Name() != "added" || d[0].Overlay() == nil || !d[0].Info().Permanent {
		t.Errorf("%+v", d)
	}
	h.Close()
	if got := mustRead(t, o.Dir).Devices; len(got) != 1 || got[0].Name != "added" || got[0].Ephemeral != "" || !got[0].Writable {
		t.Errorf("%+v", got)
	}
}

// A host that stops keeps the overlays of devices that clients have open, and no others. A
// device below those of clients has none that counts.
func TestKeptAtTheEnd(t *testing.T) {
	r := newRegistry(t)
	m := blocktest.NewImage(t, 1, 20)
	image := r.push("team/app:v1", m)
	o := Options{Dir: keptDir(t), Overlay: OverlayOptions{Ephemeral: true}}
	any := func(string) bool { return true }
	h := r.open(o)
	h.Recover()
	if _, err := h.Add(t.Context(), Spec{Name: "idle", Image: image, Keep: true}, Spec{Name: image}); err != nil {
		t.Fatal(err)
	}
	busy, release, err := h.Acquire(t.Context(), image+"~busy", any)
	if err != nil {
		t.Fatal(err)
	}
	_, leave, err := h.Acquire(t.Context(), image+"~gone", any)
	if err != nil {
		t.Fatal(err)
	}
	leave()
	written := bytes.Repeat([]byte{9}, 10000)
	if err := busy.Overlay().WriteAt(t.Context(), written, 5000); err != nil {
		t.Fatal(err)
	}
	h.SetStopping() // and then the transports end their connections
	release()
	if err := h.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.Close()
	for _, k := range mustRead(t, o.Dir).Devices {
		if (k.Ephemeral != "") != (k.Name == image+"~busy") || k.Name != image+"~busy" && k.Name != "idle" {
			t.Errorf("%+v", k)
		}
	}
	if n := ephemerals(t, o.Dir); len(n) != 1 {
		t.Errorf("%q", n)
	}
	// A host that does not look leaves all as it is.
	r.open(Options{Dir: o.Dir}).Close()
	if n := len(mustRead(t, o.Dir).Devices); n != 2 {
		t.Errorf("%d devices", n)
	}

	h = r.open(o)
	h.Recover()
	again, release, err := h.Acquire(t.Context(), image+"~busy", any)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(written))
	if err := blockmap.ReadInto(t.Context(), again.Block(), blockmap.Range(5000, 10000), got); err != nil || !bytes.Equal(got, written) {
		t.Errorf("the client reads other bytes: %v", err)
	}
	release()
}

// The default export is the same one again, whatever the order in which devices are open. A
// device that is removed while it cannot be opened is gone at once, and so is its overlay.
func TestRestoreDefault(t *testing.T) {
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 20))
	dir, cache := shortDir(t), keptDir(t)
	server := new(vhost.Server)
	o := Options{Dir: cache, Sockets: SocketOptions{Dir: dir, Server: server}, Overlay: OverlayOptions{Ephemeral: true}}
	h := r.open(o)
	h.Recover()
	for _, name := range []string{"first", "second", "third"} {
		if _, err := h.Add(t.Context(), Spec{Name: name, Image: image, Keep: true}); err != nil {
			t.Fatal(err)
		}
	}
	s := mustRead(t, cache)
	if len(s.Devices) != 3 || !s.Devices[0].Default || s.Devices[1].Default || s.Devices[0].Socket != filepath.Join(dir, "first.sock") {
		t.Fatalf("%+v", s.Devices)
	}
	killed(t, h)
	s.Devices[0], s.Devices[2] = s.Devices[2], s.Devices[0]
	for i := range s.Devices {
		if s.Devices[i].Name == "second" {
			s.Devices[i].Base = "127.0.0.1:1/app@" + testDigest
		}
	}
	// The overlays are copies, which nobody believes: but for the second device, whose image
	// cannot be had, begin anew.
	for i := range s.Devices {
		if s.Devices[i].Name != "second" {
			s.Devices[i].Ephemeral, s.Devices[i].Boot = "", ""
		}
	}
	if err := writeState(cache, s, true); err != nil {
		t.Fatal(err)
	}
	h = patient(r.open(o))
	server.Exports = NewExports(h, nil, nil, false)
	h.Recover()
	if err := h.RestoreDevices(t.Context()); err != nil {
		t.Fatal(err)
	}
	d, release, err := h.Acquire(t.Context(), "", nil)
	if err != nil || d.Name() != "first" {
		t.Errorf("the default is %v, %v", d, err)
	} else {
		release()
	}
	var second *Device
	for _, d := range h.Devices() {
		if d.Name() == "second" {
			second = d
		}
	}
	await(t, "it cannot be opened", func() bool { return second.Info().Error != "" })
	if in := second.Info(); in.State != Opening || in.Socket != "" {
		t.Errorf("%+v", in)
	}
	if _, _, err := NewExports(h, nil, nil, false).Open(t.Context(), "second", nbd.ClientInfo{}); err == nil || !strings.Contains(err.Error(), "is not open yet") {
		t.Errorf("a client opens it: %v", err)
	}
	if names := names(t, dir); names != "first.sock third.sock" {
		t.Errorf("%s", names)
	}
	if err := h.RemoveUnused(t.Context(), second.ID()); err != nil {
		t.Error(err)
	}
	for _, k := range mustRead(t, cache).Devices {
		if k.Name == "second" {
			t.Errorf("%+v", k)
		}
	}
	if n := ephemerals(t, cache); len(n) != 2 {
		t.Errorf("%q", n)
	}
	h.Close()
}

// The overlay of a device of the last host is in the state file before the device is open,
// also a new one, and its socket before the device has it.
func TestKeptBeforeItIsOpen(t *testing.T) {
	h := newRegistry(t).open(Options{})
	last := &savedDevice{Name: "vm", Image: "app:v1", Base: "app@" + testDigest, By: byAPI, Writable: true, Socket: "/run/vm.sock"}
	d := &Device{of: h.devices, spec: Spec{Name: "vm", Image: "app:v1", saved: last}, ready: make(chan struct{}), permanent: true, keep: true}
	h.devices.mu.Lock()
	defer h.devices.mu.Unlock()
	h.devices.mu.named[d.key()] = d
	defer delete(h.devices.mu.named, d.key())
	if k, ok := d.savedLocked(); !ok || k != *last {
		t.Errorf("%+v, %t", k, ok)
	}
	d.ephemeral, d.reference = "NEWOVERLAYNEWOVERLAY", "other@"+testDigest
	if k, ok := d.savedLocked(); !ok || k.Ephemeral != d.ephemeral || k.Base != d.reference || k.Boot != bootText() || k.Socket != last.Socket || k.By != byAPI || !k.Writable {
		t.Errorf("%+v, %t", k, ok)
	}
}
