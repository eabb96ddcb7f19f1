package host

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// What is added later does not take the default export from the clients of a server of
// one image.
func TestDefaultDeviceStays(t *testing.T) {
	r := newRegistry(t)
	h := r.open(Options{})
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 50))
	defaults := func() string {
		t.Helper()
		d, release, err := h.Acquire(t.Context(), "", nil)
		if errors.Is(err, ErrNoDevice) {
			return ""
		}
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		return d.Name()
	}
	add := func(names ...string) (ids []string) {
		t.Helper()
		var specs []Spec
		for _, name := range names {
			specs = append(specs, Spec{Name: name, Image: image})
		}
		added, err := h.Add(t.Context(), specs...)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range added {
			ids = append(ids, d.ID())
		}
		return ids
	}
	remove := func(id string) {
		t.Helper()
		if err := h.Remove(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	is := func(want string) {
		t.Helper()
		if got := defaults(); got != want {
			t.Errorf("the default device is %q and not %q", got, want)
		}
	}
	is("")
	a := add("a")
	is("a")
	b := add("b")
	is("a")
	remove(a[0])
	is("b") // the only one
	c := add("c")
	is("")
	remove(b[0])
	is("c")
	remove(c[0])
	is("")
	two := add("d", "e")
	is("")
	remove(two[0])
	is("e")
}

// A device goes without force only where no client has it, and one conflict is told from
// a request that is wrong in itself.
func TestRemoveUnused(t *testing.T) {
	r := newRegistry(t)
	h := r.open(Options{})
	m := blocktest.NewImage(t, 1, 50)
	image := r.push("team/app:v1", m)
	added, err := h.Add(t.Context(), Spec{Name: "root", Image: image})
	if err != nil {
		t.Fatal(err)
	}
	var conflict ConflictError
	if _, err := h.Add(t.Context(), Spec{Name: "root", Image: image}); !errors.As(err, &conflict) || !errors.As(err, new(InvalidError)) {
		t.Errorf("add it again: %v", err)
	}
	d, release, err := h.Acquire(t.Context(), "root", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.RemoveUnused(t.Context(), d.ID()); !errors.As(err, &conflict) || errors.As(err, new(InvalidError)) {
		t.Errorf("remove a device that is in use: %v", err)
	}
	if in := d.Info(); in.State != Ready || !in.Permanent || in.Users != 1 {
		t.Errorf("%+v", in)
	}
	read(t, d.Block(), m, blockmap.Extent{End: 4096})
	release()
	if err := h.RemoveUnused(t.Context(), added[0].ID()); err != nil {
		t.Error(err)
	}
	if err := h.RemoveUnused(t.Context(), added[0].ID()); !errors.Is(err, ErrNoDevice) {
		t.Errorf("remove a removed device: %v", err)
	}
	// A device that a client has opened belongs to the client.
	d, release, err = h.Acquire(t.Context(), image, func(string) bool { return true })
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	for _, remove := range []func(context.Context, string) error{h.Remove, h.RemoveUnused} {
		if err := remove(t.Context(), d.ID()); !errors.As(err, &conflict) || d.Info().State != Ready {
			t.Errorf("remove a client's device: %v", err)
		}
	}
}

// A host that records to a file has one device, ever: another would overwrite the file.
func TestRecordOneDevice(t *testing.T) {
	r := newRegistry(t)
	file := filepath.Join(t.TempDir(), "trace")
	h := r.open(Options{Trace: TraceOptions{Record: file}})
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 50))
	added, err := h.Add(t.Context(), Spec{Name: image})
	if err != nil {
		t.Fatal(err)
	}
	refused := func() {
		t.Helper()
		var conflict ConflictError
		if _, err := h.Add(t.Context(), Spec{Name: "other", Image: image}); !errors.As(err, &conflict) || !strings.Contains(err.Error(), file) {
			t.Errorf("add another device: %v", err)
		}
	}
	refused()
	if err := h.Remove(t.Context(), added[0].ID()); err != nil {
		t.Error(err)
	}
	refused()
}

// The status has a cache directory that leads there from any working directory.
func TestStatusHasAnAbsoluteDirectory(t *testing.T) {
	r := newRegistry(t)
	dir := t.TempDir()
	t.Chdir(dir)
	if got := r.open(Options{Dir: "c"}).Status().Cache; got != filepath.Join(dir, "c") {
		t.Errorf("the cache is in %q", got)
	}
}

// The status counts devices as they describe themselves, and says what the host is at.
func TestStatus(t *testing.T) {
	r := newRegistry(t)
	m := blocktest.NewImage(t, 1, 300)
	h := r.open(Options{Quota: 1 << 30})
	if st := h.Status(); st.State != Starting || st.Devices != (DeviceCounts{}) || st.Quota != 1<<30 || st.Cache != h.dir || st.PID == 0 || st.Started.After(st.Time) {
		t.Errorf("%+v", st)
	}
	added, err := h.Add(t.Context(), Spec{Name: r.push("team/app:v1", m)})
	if err != nil {
		t.Fatal(err)
	}
	if in := added[0].Info(); in.Resident != 0 {
		t.Errorf("nothing was read: %+v", in)
	}
	read(t, added[0].Block(), m, blockmap.Extent{End: int64(len(m.Content))})
	if in := added[0].Info(); in.Resident != in.Content || in.Content == 0 {
		t.Errorf("all was read: %+v", in)
	}
	h.SetServing()
	if st := h.Status(); st.State != Serving || st.Devices != (DeviceCounts{Ready: 1, Complete: 1}) || st.Counts.Bytes == 0 || st.Rates.Fetched == 0 || st.Uptime <= 0 {
		t.Errorf("%+v", st)
	}
	d, release, err := h.Acquire(t.Context(), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	h.SetStopping()
	if _, err := h.Add(t.Context(), Spec{Name: "other", Image: d.Name()}); !errors.Is(err, ErrClosed) {
		t.Errorf("add while the host is stopping: %v", err)
	}
	read(t, d.Block(), m, blockmap.Extent{End: 4096})
	h.Stop(t.Context())
	if st := h.Status(); st.State != Stopping || st.Devices != (DeviceCounts{Closing: 1}) {
		t.Errorf("%+v", st)
	}
	release()
}
