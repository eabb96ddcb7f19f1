package blockmap_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// An overlay over an image conforms, whether the cache leaves data in memory or not.
func TestOverlayOverImageConforms(t *testing.T) {
	m := blocktest.NewImage(t, 130, 120)
	for _, mode := range []blockmap.Mode{blockmap.Buffered, blockmap.Direct} {
		t.Run(string(mode), func(t *testing.T) {
			blocktest.TestWritableDevice(t, blocktest.Writable{
				Content: m.Content,
				Open: func(t *testing.T) blockmap.WritableDevice {
					c := newCache(t, t.TempDir(), blockmap.CacheOptions{Mode: mode})
					image, err := blockmap.NewImage(m.Index, c, newDirect(t, blocktest.NewOrigin(m)))
					must(t, err)
					return openOverlay(t, t.TempDir(), image, blockmap.OverlayOptions{})
				},
			})
		})
	}
}

// What is on the disk and not in memory is never viewed, and always loaded: of the overlay,
// of the image below it, and of both in one read.
func TestColdOverlay(t *testing.T) {
	m := blocktest.NewImage(t, 131, 1000)
	content := append([]byte(nil), m.Content...)
	rng := rand.New(rand.NewPCG(1, 131))
	type change struct {
		e blockmap.Extent
		p []byte // nil: zeros
	}
	var changes []change
	for range 40 {
		c := change{e: blockmap.Range(rng.Int64N(int64(len(content))-60_000), 1+rng.Int64N(60_000))}
		if clear(content[c.e.Start:c.e.End]); rng.IntN(3) > 0 {
			c.p = make([]byte, c.e.Len())
			for i := range c.p {
				c.p[i] = byte(rng.Uint32())
			}
			copy(content[c.e.Start:], c.p)
		}
		changes = append(changes, c)
	}
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			blocktest.TestCold(t, content, func(t *testing.T) blockmap.Device {
				cache := t.TempDir()
				_, image, _ := openCold(t, cache, m, blockmap.CacheOptions{Mode: w.mode}, w.threads)
				dir := t.TempDir()
				d := openOverlay(t, dir, image, blockmap.OverlayOptions{})
				for _, c := range changes {
					if c.p == nil {
						must(t, d.Zero(t.Context(), c.e, true))
					} else {
						must(t, d.WriteAt(t.Context(), c.p, c.e.Start))
					}
				}
				must(t, d.Close())
				forget(t, filepath.Join(dir, "data"))
				for _, path := range dataFiles(t, cache) {
					forget(t, path) // writes of parts of blocks have read it
				}
				return openOverlay(t, dir, image, blockmap.OverlayOptions{})
			})
		})
	}
}

// watched is a base that notes what is read of it.
type watched struct {
	blockmap.Device
	mu    sync.Mutex
	calls []string
}

func (w *watched) note(call string, e blockmap.Extent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls = append(w.calls, fmt.Sprint(call, " ", e.Start/4096, "-", (e.End+4095)/4096))
}

// take returns the calls since the last take.
func (w *watched) take() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	calls := fmt.Sprint(w.calls)
	w.calls = nil
	return calls
}

func (w *watched) View(e blockmap.Extent) (blockmap.View, bool) {
	w.note("view", e)
	return w.Device.View(e)
}

func (w *watched) Load(ctx context.Context, e blockmap.Extent) (blockmap.View, bool) {
	w.note("load", e)
	return w.Device.Load(ctx, e)
}

func (w *watched) Fault(ctx context.Context, e blockmap.Extent) error {
	w.note("fault", e)
	return w.Device.Fault(ctx, e)
}

func (w *watched) Prefetch(e blockmap.Extent) {
	w.note("prefetch", e)
	w.Device.Prefetch(e)
}

// The base is asked for what the overlay does not have, and for nothing else: so a recorder
// below an overlay records what is read of the image.
func TestOverlayAsksTheBase(t *testing.T) {
	memory, _ := stampedBase(100)
	base := &watched{Device: memory}
	d := openOverlay(t, t.TempDir(), base, blockmap.OverlayOptions{})
	ctx := t.Context()
	must(t, d.WriteAt(ctx, stamped(1, 8*4), 10*4096))
	must(t, d.Zero(ctx, blockmap.Range(20*4096, 4*4096), true))
	must(t, d.Zero(ctx, blockmap.Range(24*4096, 4*4096), false))
	must(t, d.Discard(ctx, blockmap.Range(30*4096, 4*4096)))
	must(t, d.WriteAt(ctx, stamped(2, 1), 31*4096)) // of a zeroed block
	must(t, d.WriteAt(ctx, stamped(3, 1), 11*4096)) // of a changed block
	for _, e := range []blockmap.Extent{blockmap.Range(10*4096, 4*4096), blockmap.Range(20*4096, 8*4096), blockmap.Range(30*4096+5, 3*4096)} {
		_, err := blocktest.Read(ctx, d, e)
		must(t, err)
		must(t, d.Fault(ctx, e))
		d.Prefetch(e)
		if !blockmap.Resident(d, e) {
			t.Errorf("%v was written, and has to be fetched", e)
		}
	}
	if calls := base.take(); calls != "[]" {
		t.Errorf("writes and reads of what was written ask the base: %s", calls)
	}
	must(t, d.WriteAt(ctx, stamped(4, 1), 50*4096+512))
	if calls := base.take(); calls != "[load 50-51 fault 50-51 view 50-51]" {
		t.Errorf("a write to a part of a block asks the base: %s", calls)
	}
	e := blockmap.Range(8*4096, 24*4096)
	d.Prefetch(e)
	if calls := base.take(); calls != "[prefetch 8-10 prefetch 14-20 prefetch 28-30]" {
		t.Errorf("a prefetch asks the base: %s", calls)
	}
	memory.Evict(blockmap.Range(0, memory.Size()))
	must(t, d.Fault(ctx, blockmap.Range(8*4096, 4*4096)))
	if calls := base.take(); calls != "[fault 8-10]" {
		t.Errorf("a fault asks the base: %s", calls)
	}
	if st := d.Status(blockmap.Range(8*4096, 4*4096)); st.Len() != 2*4096 || !st.Resident {
		t.Errorf("the status is %+v", st)
	}
	// The failure of the base is that of a write to a part of a block.
	memory.OnFault = func(context.Context, blockmap.Extent) error { return errDead }
	for what, err := range map[string]error{"part": d.WriteAt(ctx, stamped(5, 1), 60*4096), "zero": d.Zero(ctx, blockmap.Range(60*4096, 100), true)} {
		if err == nil {
			t.Errorf("%s of a block that cannot be fetched was written", what)
		}
	}
	must(t, d.WriteAt(ctx, stamped(6, 8), 60*4096)) // whole blocks need nothing of it
}

func TestOverlayViewAllocatesNothing(t *testing.T) {
	m := blocktest.NewImage(t, 10, 2000)
	image := newImage(t, m, blocktest.NewOrigin(m))
	must(t, image.Fault(t.Context(), blockmap.Range(0, image.Size())))
	d := openOverlay(t, t.TempDir(), image, blockmap.OverlayOptions{})
	must(t, d.WriteAt(t.Context(), make([]byte, d.Size()/2&^4095), 0))
	must(t, d.Discard(t.Context(), blockmap.Range(40960, 40960)))
	at := int64(0)
	if n := testing.AllocsPerRun(1000, func() {
		v, ok := d.View(blockmap.Range(at, 8192))
		if !ok {
			t.Fatal("not resident")
		}
		v.Release()
		at = (at + 4096*37) % (d.Size() - 8192)
	}); n != 0 {
		t.Errorf("a view allocates %v times", n)
	}
	p := make([]byte, 4096)
	if n := testing.AllocsPerRun(1000, func() {
		must(t, d.WriteAt(t.Context(), p, at))
		at = (at + 4096*37) % (d.Size() - 8192) &^ 4095
	}); n >= 1 {
		t.Errorf("a write allocates %v times", n)
	}
}

// A closed overlay leaves no goroutine and no file behind.
func TestOverlayLeavesNothing(t *testing.T) {
	base, _ := stampedBase(100)
	before := runtime.NumGoroutine()
	for i := range 20 {
		var d *blockmap.Overlay
		var err error
		if dir := t.TempDir(); i%2 == 0 {
			d, err = blockmap.OpenOverlay(dir, base, blockmap.OverlayOptions{})
		} else {
			d, err = blockmap.OpenEphemeral(dir, base, blockmap.OverlayOptions{})
		}
		must(t, err)
		must(t, d.WriteAt(t.Context(), stamped(1, 80), 0))
		f, err := d.Freeze(t.Context())
		must(t, err)
		must(t, d.WriteAt(t.Context(), stamped(2, 700), 512))
		go func() { _ = f.Merge(context.Background()) }()
		_, err = blocktest.Read(t.Context(), d, blockmap.Range(0, d.Size()))
		must(t, err)
		must(t, d.Flush(t.Context()))
		must(t, d.Close())
	}
	eventually(t, "goroutines are left", func() bool { return runtime.NumGoroutine() <= before })
}

// An ephemeral overlay leaves its directory empty, freezes and merges, and gives the space
// of discarded blocks back at once.
func TestEphemeral(t *testing.T) {
	base, stamps := stampedBase(300)
	dir := t.TempDir()
	d, err := blockmap.OpenEphemeral(dir, base, blockmap.OverlayOptions{})
	must(t, err)
	defer d.Close()
	w := &writer{t: t, d: d, m: newSectors(stamps), rng: rand.New(rand.NewPCG(1, 132))}
	for range 3 {
		for range 50 {
			must(t, w.write())
		}
		f, err := d.Freeze(t.Context())
		must(t, err)
		first, err := digestOf(t.Context(), f)
		must(t, err)
		for range 50 {
			must(t, w.write())
		}
		if again, err := digestOf(t.Context(), f); err != nil || again != first {
			t.Errorf("what is frozen has changed, or %v", err)
		}
		w.check("frozen")
		must(t, f.Merge(t.Context()))
		w.check("merged")
	}
	must(t, d.Flush(t.Context()))
	if st := d.Stats(); st.Syncs != 0 {
		t.Errorf("%d syncs", st.Syncs)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) > 0 {
		t.Errorf("the directory has %v, %v", left, err)
	}
	must(t, d.WriteAt(t.Context(), make([]byte, d.Size()), 0))
	before := d.Stats()
	must(t, d.Discard(t.Context(), blockmap.Range(0, d.Size())))
	if st := d.Stats(); st.Space > before.Space-d.Size()*9/10 || st.Data != 0 || st.Zero != d.Size() {
		t.Errorf("%+v after a discard of all, %+v before", st, before)
	}
}

// A device of no blocks, and one of a block, have overlays.
func TestSmallOverlays(t *testing.T) {
	for _, blocks := range []int{0, 1, 31, 32, 33} {
		base, stamps := stampedBase(blocks)
		dir := t.TempDir()
		for range 2 {
			d := openOverlay(t, dir, base, blockmap.OverlayOptions{})
			m := newSectors(stamps)
			if blocks > 0 {
				must(t, d.WriteAt(t.Context(), stamped(1, 8*blocks-1), 0))
				m.write(0, 8*blocks-1, 1, false)
			}
			f, err := d.Freeze(t.Context())
			must(t, err)
			must(t, d.Discard(t.Context(), blockmap.Range(0, d.Size())))
			m.write(0, 8*blocks, 0, false)
			must(t, f.Merge(t.Context()))
			m.check(t, d, 0, len(m.now), "a small device")
			must(t, d.Close())
		}
	}
}
