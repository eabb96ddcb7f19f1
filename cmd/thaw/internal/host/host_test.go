package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/blockmap/flatten"
	"thaw/fetcher"
	"thaw/fetcher/registry"
	"thaw/nbd"
)

func TestMain(m *testing.M) { blocktest.Main(m) }

// testRegistry is a registry with block images.
type testRegistry struct {
	t    testing.TB
	host string
}

func newRegistry(t testing.TB) *testRegistry {
	t.Helper()
	s := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithReferrersSupport(true)))
	t.Cleanup(s.Close)
	return &testRegistry{t, strings.TrimPrefix(s.URL, "http://")}
}

func (r *testRegistry) finder() *Finder {
	log := slog.New(slog.NewTextHandler(r.t.Output(), nil))
	return &Finder{
		Client: registry.New(registry.Options{Log: log, Settle: time.Millisecond}), Log: log,
		Platform: &v1.Platform{OS: "linux", Architecture: "amd64"},
		ReadFile: func(_ context.Context, name string, _ int64) ([]byte, error) { return os.ReadFile(name) },
	}
}

// push stores a block image, and returns its name.
func (r *testRegistry) push(name string, m *blocktest.Image) string {
	r.t.Helper()
	name = r.host + "/" + name
	f := r.finder()
	defer f.Close()
	ref, err := registry.ParseRef(name)
	if err != nil {
		r.t.Fatal(err)
	}
	repo, err := f.Client.Open(ref)
	if err != nil {
		r.t.Fatal(err)
	}
	blob := func(b []byte, mediaType types.MediaType) v1.Descriptor {
		r.t.Helper()
		d, err := repo.PushBytes(r.t.Context(), b, mediaType)
		if err != nil {
			r.t.Fatal(err)
		}
		return d
	}
	manifest := v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: flatten.ArtifactTypeImage,
		Config: blob([]byte("{}"), types.OCIConfigJSON), Layers: []v1.Descriptor{blob(m.Index.Encode(), flatten.MediaTypeIndex)},
	}
	for i := range m.Index.Streams {
		manifest.Layers = append(manifest.Layers, blob(m.Blobs[m.Index.Streams[i].Blob], flatten.MediaTypeStream))
	}
	raw, err := json.Marshal(manifest)
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := repo.PushManifest(r.t.Context(), raw, types.OCIManifestSchema1, ref.Tag); err != nil {
		r.t.Fatal(err)
	}
	return name
}

// open opens a host, which is closed with the test.
func (r *testRegistry) open(o Options) *Host {
	r.t.Helper()
	o.Finder = r.finder()
	if o.Dir == "" {
		// Not TempDir: the path of a socket has at most 107 bytes.
		dir, err := os.MkdirTemp("", "thaw")
		if err != nil {
			r.t.Fatal(err)
		}
		r.t.Cleanup(func() { os.RemoveAll(dir) })
		o.Dir = dir
	}
	h, err := Open(o)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(h.Close)
	return h
}

// read compares a part of a device with what it is to be.
func read(t testing.TB, d blockmap.Device, m *blocktest.Image, e blockmap.Extent) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), atMost)
	defer cancel()
	got := make([]byte, e.Len())
	if err := blockmap.ReadInto(ctx, d, e, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, m.Content[e.Start:e.End]) {
		t.Errorf("bytes %v are wrong", e)
	}
}

// atMost bounds what a test waits for: a machine may be slow and busy, and a test that hangs ends.
const atMost = time.Minute

// await waits until ok.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(atMost); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, atMost)
		}
	}
}

// calm returns when no request is under way. A reader has its bytes a moment before the fetcher
// has counted their chunk.
func calm(t testing.TB, h *Host) {
	t.Helper()
	await(t, "no request is under way", func() bool { return h.Stats().InFlight == 0 })
}

// patient has the host wait for registries however slow this machine is: by default it goes on
// without an answer after two seconds.
func patient(h *Host) *Host {
	h.traces.opener.patience = atMost
	return h
}

// Devices come and go while a host runs, each described and counted.
func TestDevicesAtRunTime(t *testing.T) {
	r := newRegistry(t)
	one, two := blocktest.NewImage(t, 1, 300), blocktest.NewImage(t, 2, 500)
	a, b := r.push("team/one:v1", one), r.push("team/two:v1", two)
	server := &nbd.Server{}
	h := r.open(Options{NBD: server})
	added, err := h.Add(t.Context(), Spec{Name: a}, Spec{Name: "root", Image: b})
	if err != nil {
		t.Fatal(err)
	}
	for i, m := range []*blocktest.Image{one, two} {
		read(t, added[i].Block(), m, blockmap.Extent{End: int64(len(m.Content))})
		in := added[i].Info()
		var stored int64
		for _, blob := range m.Blobs {
			stored += int64(len(blob))
		}
		if in.State != Ready || !in.Permanent || in.Users != 0 || in.Size != int64(len(m.Content)) || in.Stored != stored || in.Content == 0 ||
			!strings.HasPrefix(in.Digest, "sha256:") || !strings.HasSuffix(in.Image, "@"+in.Digest) || in.Recording != nil || in.Prefetch == nil {
			t.Errorf("%+v", in)
		}
	}
	if in := added[1].Info(); in.Name != "root" {
		t.Errorf("%+v", in)
	}
	calm(t, h)
	st := h.Stats()
	if st.Devices != 2 || st.Chunks == 0 || st.Cached == 0 || st.Goroutines == 0 || st.NBD == nil {
		t.Errorf("%+v", st)
	}

	// Removed while it has a user: no other client gets it, and it is closed when that
	// user leaves.
	d, release, err := h.Acquire(t.Context(), "root", nil)
	if err != nil || d != added[1] {
		t.Fatalf("%v, %v", d, err)
	}
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := h.Remove(short, d.ID()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("remove a device that is in use: %v", err)
	}
	if in := d.Info(); in.State != Closing || in.Users != 1 || in.Permanent {
		t.Errorf("%+v", in)
	}
	if _, _, err := h.Acquire(t.Context(), "root", nil); !errors.Is(err, ErrNoDevice) {
		t.Errorf("acquire a device that is removed: %v", err)
	}
	read(t, d.Block(), two, blockmap.Extent{End: 4096})
	release()
	await(t, "the device is closed", func() bool { return h.Device(d.ID()) == nil })
	if err := h.Remove(t.Context(), d.ID()); !errors.Is(err, ErrNoDevice) {
		t.Errorf("remove a removed device: %v", err)
	}
	// It is added again with another ID.
	again, err := h.Add(t.Context(), Spec{Name: "root", Image: b})
	if err != nil || again[0].ID() == d.ID() {
		t.Fatalf("%v, %v", again, err)
	}
	read(t, again[0].Block(), two, blockmap.Extent{End: 4096})
	if err := h.Remove(t.Context(), again[0].ID()); err != nil {
		t.Error(err)
	}

	if _, err := h.Add(t.Context(), Spec{Name: r.host + "/team/none:v1"}); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("add a missing image: %v", err)
	}
	var invalid InvalidError
	if _, err := h.Add(t.Context(), Spec{Name: "not a name"}); !errors.As(err, &invalid) {
		t.Errorf("add an invalid name: %v", err)
	}
}

// A cache of the least size serves requests of any size from chunks of the largest
// size; a smaller one is refused. It fetches no chunk twice for one window of 4 MiB, as
// which transports read.
func TestLeastCacheSize(t *testing.T) {
	r := newRegistry(t)
	m := &blocktest.Image{Index: new(blockmap.Index), Blobs: make(map[blockmap.Digest][]byte)}
	const chunk, chunks = blockmap.MaxChunkBlocks * blockmap.BlockSize, 12
	rng := rand.NewChaCha8([32]byte{1})
	for range 2 { // the first stream is that of the metadata
		var parts [][]byte
		for range chunks / 2 {
			p := make([]byte, chunk)
			rng.Read(p)
			parts = append(parts, p)
		}
		table, blob := blocktest.Stream(t, parts)
		stream := uint32(len(m.Index.Streams))
		m.Index.Streams = append(m.Index.Streams, *table)
		m.Index.Runs = append(m.Index.Runs, blockmap.Run{Device: uint32(len(m.Content) / blockmap.BlockSize), Stream: stream, Count: table.Blocks()})
		m.Blobs[table.Blob] = blob
		m.Content = append(m.Content, bytes.Join(parts, nil)...)
	}
	m.Index.Blocks = uint32(len(m.Content) / blockmap.BlockSize)
	if err := m.Index.Seal(); err != nil {
		t.Fatal(err)
	}
	h := r.open(Options{Quota: MinQuota})
	added, err := h.Add(t.Context(), Spec{Name: r.push("team/app:v1", m)})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []blockmap.Extent{blockmap.Range(chunk-4096, 8192), blockmap.Range(9<<20, 4<<20), blockmap.Range(1<<20, 32<<20)} {
		before := h.Stats().Chunks
		ctx, cancel := context.WithTimeout(t.Context(), atMost)
		v, err := blockmap.Read(ctx, added[0].Block(), e)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, e.Len())
		if err := v.CopyTo(got); err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
			t.Errorf("bytes %v are wrong: %v", e, err)
		}
		v.Release()
		calm(t, h)
		if n, most := h.Stats().Chunks-before, (e.End-1)/chunk-e.Start/chunk+1; n > most && e.Len() <= 4<<20 {
			t.Errorf("%d chunks were fetched for one request of %d", n, most)
		}
	}
	if used := h.Stats().Cached; used > MinQuota {
		t.Errorf("%d bytes are in the cache", used)
	}
	for _, quota := range []int64{1, MinQuota - 1, -1} {
		var invalid InvalidError
		if _, err := Open(Options{Finder: r.finder(), Dir: t.TempDir(), Quota: quota}); !errors.As(err, &invalid) || !strings.Contains(err.Error(), "the least size is 16M") {
			t.Errorf("a quota of %d: %v", quota, err)
		}
	}
}

// Clients of the NBD server open what is allowed, share it, and list what is open;
// what a client has open ends with it.
func TestExports(t *testing.T) {
	r := newRegistry(t)
	m := blocktest.NewImage(t, 1, 200)
	a, b, secret := r.push("team/a:v1", m), r.push("team/b:v1", m), r.push("other/c:v1", m)
	h := r.open(Options{})
	if _, err := h.Add(t.Context(), Spec{Name: b}); err != nil {
		t.Fatal(err)
	}
	x := NewExports(h, Allow{r.host + "/team/*"}, []string{"host"}, false)
	us := nbd.ClientInfo{Names: []string{"host"}}
	if _, _, err := x.Open(t.Context(), a, nbd.ClientInfo{}); !errors.Is(err, nbd.ErrDenied) {
		t.Errorf("a client without a name: %v", err)
	}
	for _, name := range []string{secret, r.host + "/team/none:v1", "nonsense of a name"} {
		if _, _, err := x.Open(t.Context(), name, us); !errors.Is(err, nbd.ErrUnknownExport) {
			t.Errorf("%s: %v", name, err)
		}
	}
	e, release, err := x.Open(t.Context(), a, us)
	if err != nil {
		t.Fatal(err)
	}
	if same, releaseToo, err := x.Open(t.Context(), a, us); err != nil || same.Device != e.Device {
		t.Errorf("a second client of one image has another device: %v", err)
	} else {
		releaseToo()
	}
	read(t, e.Device, m, blockmap.Extent{End: 1 << 16})
	if byDefault, releaseToo, err := x.Open(t.Context(), "", us); err != nil || byDefault.Name != b {
		t.Errorf("the default export is %+v, %v", byDefault, err)
	} else {
		releaseToo()
	}
	list := func() (names []string) {
		all, err := x.List(t.Context(), us)
		if err != nil {
			t.Error(err)
		}
		for _, e := range all {
			names = append(names, e.Name)
		}
		return names
	}
	if got := list(); len(got) != 2 || got[0] != b || got[1] != a {
		t.Errorf("the list is %v", got)
	}
	release()
	if got := list(); len(got) != 1 || got[0] != b {
		t.Errorf("after the client has left, the list is %v", got)
	}
	h.Close()
	if _, _, err := x.Open(t.Context(), a, us); !errors.Is(err, nbd.ErrServerClosed) {
		t.Errorf("open when the host has stopped: %v", err)
	}
}

// A start without a trace is recorded, which the device tells; the recording ends when
// it is asked to, and is the trace of the next start.
func TestRecordingAndPrefetch(t *testing.T) {
	r := newRegistry(t)
	m := blocktest.NewImage(t, 1, 400)
	name := r.push("team/app:v1", m)
	h := r.open(Options{Trace: TraceOptions{Use: []string{Auto}, Push: true}})
	added, err := h.Add(t.Context(), Spec{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	h.SetServing()
	await(t, "nothing to prefetch is found", func() bool { return added[0].Info().Prefetch.State == "none" })
	read(t, added[0].Block(), m, blockmap.Extent{Start: 0, End: 1 << 20})
	if in := added[0].Info().Recording; in == nil || in.State != "recording" || !strings.Contains(in.File, "traces") {
		t.Errorf("%+v", in)
	}
	h.traces.packing.stop() // or the next host finds a bundle instead of the trace
	if !added[0].StopRecording(t.Context()) || added[0].StopRecording(t.Context()) || h.StopRecordings(t.Context()) != 0 {
		t.Error("the recording does not end once")
	}
	await(t, "the recording is stored", func() bool { return added[0].Info().Recording.State == "stored" })
	if in := added[0].Info().Recording; in.Bytes != 1<<20 || in.Dropped != 0 {
		t.Errorf("%+v", in)
	}
	if err := h.Remove(t.Context(), added[0].ID()); err != nil {
		t.Fatal(err)
	}

	// The next host prefetches the recorded reads.
	next := patient(r.open(Options{Trace: TraceOptions{Use: []string{Auto}}}))
	if added, err = next.Add(t.Context(), Spec{Name: name}); err != nil {
		t.Fatal(err)
	}
	added[0].AwaitPrefetch(t.Context(), 1)
	p := added[0].Info().Prefetch
	if p.Source != "trace" || p.Chunks == 0 || p.DoneChunks != p.Chunks || p.DoneBytes != p.Bytes || p.Failed != 0 {
		t.Errorf("%+v", p)
	}
	if v, ok := added[0].Block().View(blockmap.Extent{Start: 0, End: 1 << 20}); !ok {
		t.Error("the chunks of the trace are not resident")
	} else {
		v.Release()
	}
	if in := added[0].Info(); in.Recording != nil {
		t.Errorf("a start with a trace is recorded: %+v", in.Recording)
	}
}

// A host may be asked for anything at once.
func TestAtOnce(t *testing.T) {
	r := newRegistry(t)
	m := blocktest.NewImage(t, 1, 100)
	var names []string
	for i := range 4 {
		names = append(names, r.push(fmt.Sprintf("team/app:v%d", i), m))
	}
	h := r.open(Options{Trace: TraceOptions{Use: []string{Auto}, Ahead: Ahead{Metadata: true, Readahead: true, Program: true}}})
	h.SetServing()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 10 {
				switch name := names[(i+n)%len(names)]; i % 4 {
				case 0:
					if added, err := h.Add(t.Context(), Spec{Name: name}); err == nil {
						if err := h.Remove(t.Context(), added[0].ID()); err != nil {
							t.Error(err)
						}
					} else if !errors.As(err, new(InvalidError)) {
						t.Error(err)
					}
				case 1:
					h.StopRecordings(t.Context())
					h.Stats()
				case 2:
					for _, d := range h.Devices() {
						d.Info()
						d.Block()
					}
				default:
					d, release, err := h.Acquire(t.Context(), name, func(string) bool { return true })
					if err != nil {
						t.Error(err)
						continue
					}
					read(t, d.Block(), m, blockmap.Extent{End: 8192})
					release()
				}
			}
		})
	}
	wg.Wait()
	h.Stop(t.Context())
	if left := h.Devices(); len(left) != 0 {
		t.Errorf("%d devices are left", len(left))
	}
}

// What the control API answers has stable fields.
func TestFrozenJSON(t *testing.T) {
	began := time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.UTC)
	for file, v := range map[string]any{
		"status.json": Status{
			State: Serving, Version: "v1", PID: 1, Time: began.Add(time.Minute), Started: began, Uptime: 60,
			Cache: "/var/cache/thaw", Mode: blockmap.Direct, Quota: 2, Devices: DeviceCounts{1, 2, 3, 4, 5, 6}, Rates: Rates{10, 1.5, 2, 3, 4},
			Counts: Stats{
				Stats:  fetcher.Stats{Requests: 1, Bytes: 2, Chunks: 3},
				Cached: 4, Held: 5, Evicted: 6, Damaged: 7, OpenStreams: 8, Devices: 9, Goroutines: 10, Memory: 11,
				Overlays: 12, Changed: 13, OverlaySpace: 14, Poisoned: 15,
				NBD: &NBDStats{1, 2, 3, 4, 5, 6, 7, 8},
			},
		},
		"device.json": DeviceInfo{
			ID: "1", Name: "root", Image: "registry.example/team/app@sha256:12", Digest: "sha256:12", State: Ready, Permanent: true, Users: 1,
			Size: 2, Stored: 3, Content: 5, Resident: 4, Completion: &CompletionInfo{State: completeRetrying, Missing: 1, Stored: 2, Error: "no"},
			Prefetch:  &PrefetchInfo{"running", "bundle", 1, 2, 3, 4, 5, 6.5, &BundleInfo{10, 9, 8, 7, 6, true}, &UseInfo{4, 3, 2, 1}},
			Recording: &RecordingInfo{recordingNow, "/var/cache/thaw/traces/x.trace", 1, 2, 3},
			Overlay:   &OverlayInfo{"/var/lib/vm7", 1, 2, 3, 4, 5, 6, "sync the data of overlay /var/lib/vm7: input/output error"},
			Commit:    &CommitInfo{"registry.example/team/app:vm7", 1, 2, 3, 4, 5, 6},
		},
		"opening.json": DeviceInfo{ID: "2", Name: "app", Image: "registry.example/team/app:v1", State: Opening},
	} {
		got, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(filepath.Join("testdata", file))
		if err != nil || !bytes.Equal(append(got, '\n'), want) {
			t.Errorf("%s: %v, has changed to\n%s", file, err, got)
		}
	}
}
