package blockmap_test

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// A frozen overlay conforms to what every device must do, while writes go on above it.
func TestFrozenConforms(t *testing.T) {
	content := overlayContent(100)
	base := newBase(content)
	d := openOverlay(t, t.TempDir(), base, blockmap.OverlayOptions{})
	rng := rand.New(rand.NewPCG(1, 123))
	fill := func(p []byte) {
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
	}
	part := content[20*4096+100 : 40*4096+5]
	fill(part)
	must(t, d.WriteAt(t.Context(), part, 20*4096+100))
	clear(content[50*4096 : 60*4096])
	must(t, d.Discard(t.Context(), blockmap.Range(50*4096, 10*4096)))
	f, err := d.Freeze(t.Context())
	must(t, err)
	stop := make(chan struct{})
	var writing sync.WaitGroup
	writing.Go(func() {
		p := make([]byte, 100*4096)
		fill(p)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := errors.Join(d.WriteAt(context.Background(), p, 0), d.Discard(context.Background(), blockmap.Range(0, 50*4096)), d.Flush(context.Background())); err != nil {
				t.Error(err)
				return
			}
		}
	})
	t.Run("Device", func(t *testing.T) {
		blocktest.TestDevice(t, content, func(t *testing.T) blockmap.Device {
			base.Evict(blockmap.Range(0, base.Size()))
			return f
		})
	})
	close(stop)
	writing.Wait()
	if _, err := d.Freeze(t.Context()); !errors.Is(err, blockmap.ErrFrozen) {
		t.Errorf("a second freeze: %v", err)
	}
	must(t, f.Merge(t.Context()))
	must(t, f.Merge(t.Context())) // it was merged
	if left, _ := filepath.Glob("*.1"); len(left) > 0 {
		t.Errorf("left after a merge: %v", left)
	}
}

// digestOf is a hash of what a device shows.
func digestOf(ctx context.Context, d blockmap.Device) (uint64, error) {
	b, err := blocktest.Read(ctx, d, blockmap.Range(0, d.Size()))
	return maphash.Bytes(hashSeed, b), err
}

var hashSeed = maphash.MakeSeed()

// Writers, readers, flushes, freezes and merges go on at once, and the machine crashes in
// between. Each writer has sectors of its own, which share blocks with those of others.
func TestOverlayEverythingAtOnce(t *testing.T) {
	const blocks, writers = 200, 4
	base, stamps := stampedBase(blocks)
	for seed := range uint64(4) {
		powerLost := seed%2 == 0
		x := newMachine(t, base)
		rng := rand.New(rand.NewPCG(seed, 124))
		models := make([]*sectors, writers)
		for i := range models {
			models[i] = newSectors(stamps)
		}
		var d *blockmap.Overlay
		for round := range 6 {
			var err error
			d, err = x.open()
			must(t, err)
			if round > 0 {
				what := fmt.Sprintf("seed %d, round %d", seed, round)
				for i, m := range models {
					m.crashOf(t, d, powerLost, what, i, writers)
				}
			}
			x.crashBefore(int64(300 + rng.IntN(2500)))
			var all sync.WaitGroup
			var over atomic.Bool
			for i, m := range models {
				all.Go(func() {
					defer over.Store(true)
					writeOwn(t, d, m, i, writers, rand.New(rand.NewPCG(seed*100+uint64(round), uint64(i))), x.crashed)
				})
			}
			all.Go(func() {
				for !over.Load() {
					f, err := d.Freeze(t.Context())
					if err != nil {
						if !x.crashed() {
							t.Error(err)
						}
						return
					}
					first, err := digestOf(t.Context(), f)
					for range 3 {
						again, e := digestOf(t.Context(), f)
						if err = errors.Join(err, e); err == nil && again != first {
							t.Error("what is frozen has changed")
						}
					}
					if err := errors.Join(err, f.Merge(t.Context())); err != nil {
						if !x.crashed() {
							t.Error(err)
						}
						return
					}
				}
			})
			all.Wait()
			if t.Failed() {
				return
			}
			x.restart(d, powerLost, rng)
		}
	}
}

// writeOwn writes the sectors that are those of writer i, and checks them, until the machine
// crashes.
func writeOwn(t *testing.T, d *blockmap.Overlay, m *sectors, i, writers int, rng *rand.Rand, crashed func() bool) {
	ctx := context.Background()
	for {
		at := rng.IntN(len(m.now)/writers)*writers + i
		e := blockmap.Range(int64(at)*sectorSize, sectorSize)
		var err error
		switch rng.IntN(10) {
		case 0:
			if err = d.Flush(ctx); err == nil {
				m.flush()
			}
		case 1:
			err = d.Zero(ctx, e, true)
			m.write(at, 1, 0, err != nil)
		case 2, 3:
			p, e := blocktest.Read(ctx, d, e)
			if err = e; err == nil {
				if s, ok := stampOf(p); !ok || s != m.now[at][0] {
					t.Errorf("sector %d has the stamp %d (torn: %v), want %d", at, s, !ok, m.now[at])
					return
				}
			}
		default:
			s := stamps.Add(1)
			err = d.WriteAt(ctx, stamped(s, 1), e.Start)
			m.write(at, 1, s, err != nil)
		}
		if err != nil {
			if !crashed() {
				t.Error(err)
			}
			return
		}
	}
}

// crashOf is crash for the sectors of writer i.
func (m *sectors) crashOf(t testing.TB, d blockmap.Device, powerLost bool, what string, i, writers int) {
	t.Helper()
	for at := i; at < len(m.now); at += writers {
		if powerLost {
			m.now[at] = m.since[at]
		}
		m.now[at] = m.check(t, d, at, 1, what)
		if powerLost {
			m.since[at] = m.now[at]
		} else {
			m.since[at] = append(m.since[at][:len(m.since[at]):len(m.since[at])], m.now[at]...)
		}
	}
}

// One round of syncs serves all who wait for it, and where nothing was written there is
// none.
func TestFlushesShareSyncs(t *testing.T) {
	base, _ := stampedBase(70)
	fsys := blocktest.NewFS()
	d := openOverlay(t, t.TempDir(), base, blockmap.OverlayOptions{FS: fsys})
	must(t, d.WriteAt(t.Context(), stamped(1, 8), 0))
	must(t, d.Flush(t.Context()))
	before := d.Stats()
	must(t, d.Flush(t.Context()))
	if st := d.Stats(); st.Syncs != before.Syncs || st.Flushes != before.Flushes+1 {
		t.Errorf("a flush of nothing: %+v after %+v", st, before)
	}
	// The first sync waits until all flushes have begun.
	const flushers = 16
	begun := make(chan struct{})
	var waits atomic.Bool
	fsys.Fail(func(op, _ string) error {
		if op == "sync" && !waits.Swap(true) {
			<-begun
		}
		return nil
	})
	var all sync.WaitGroup
	must(t, d.WriteAt(t.Context(), stamped(2, 8*flushers), 4096))
	for range flushers {
		all.Go(func() {
			if err := d.Flush(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "the flushes have not begun", func() bool { return d.Stats().Flushes >= before.Flushes+1+flushers })
	close(begun)
	all.Wait()
	if n := d.Stats().Syncs - before.Syncs; n > 4 {
		t.Errorf("%d flushes cost %d syncs, want two of each file at most", flushers, n)
	}
	// An overwrite of what is durable syncs the data alone.
	before = d.Stats()
	must(t, d.WriteAt(t.Context(), stamped(3, 8), 0))
	must(t, d.Flush(t.Context()))
	if n := d.Stats().Syncs - before.Syncs; n != 1 {
		t.Errorf("%d syncs after an overwrite", n)
	}
	// A flush whose caller has gone is not lost for others.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	must(t, d.WriteAt(t.Context(), stamped(4, 8), 0))
	if err := d.Flush(ctx); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	must(t, d.Flush(t.Context()))
}

// A merge that the disk has no room for, or whose caller goes, is gone on with later.
func TestMergeGoesOn(t *testing.T) {
	base, stamps := stampedBase(300)
	x := newMachine(t, base)
	d, err := x.open()
	must(t, err)
	w := &writer{t: t, d: d, m: newSectors(stamps), rng: rand.New(rand.NewPCG(1, 125))}
	for range 3 {
		for range 100 {
			must(t, w.write())
		}
		f, err := d.Freeze(t.Context())
		must(t, err)
		for range 100 {
			must(t, w.write())
		}
		x.fsys.Fail(func(op, path string) error {
			if op == "write" && filepath.Base(path) == "data" {
				return blocktest.ErrDiskFull
			}
			return nil
		})
		if err := f.Merge(t.Context()); !errors.Is(err, blockmap.ErrNoSpace) {
			t.Fatalf("a merge on a full disk: %v", err)
		}
		w.check("with two levels on a full disk")
		x.fsys.Fail(nil)
		for range 20 {
			must(t, w.write())
		}
		w.check("with two levels")
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if err := f.Merge(gone); err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		must(t, f.Merge(t.Context()))
		w.check("after a merge")
		if _, err := os.Stat(filepath.Join(x.dir, "map.1")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the upper level after a merge: %v", err)
		}
	}
	must(t, d.Close())
}

// An overlay that is closed between a freeze and its merge has both levels when it is
// opened, and merges them. The views that are held meanwhile stay.
func TestClosedWhileFrozen(t *testing.T) {
	base, stamps := stampedBase(300)
	dir := t.TempDir()
	d := openOverlay(t, dir, base, blockmap.OverlayOptions{})
	w := &writer{t: t, d: d, m: newSectors(stamps), rng: rand.New(rand.NewPCG(1, 126))}
	for round := range 4 {
		for range 60 {
			must(t, w.write())
		}
		_, err := w.d.Freeze(t.Context())
		must(t, err)
		for range 60 {
			must(t, w.write())
		}
		must(t, w.d.Close())
		for what, err := range map[string]error{"write": w.d.WriteAt(t.Context(), stamped(1, 8), 0), "flush": w.d.Flush(t.Context()), "zero": w.d.Zero(t.Context(), blockmap.Range(0, 4096), false), "close": w.d.Close()} {
			if !errors.Is(err, blockmap.ErrClosed) && (what != "close" || err != nil) {
				t.Errorf("%s after the end: %v", what, err)
			}
		}
		if _, err := w.d.Freeze(t.Context()); !errors.Is(err, blockmap.ErrClosed) {
			t.Errorf("freeze after the end: %v", err)
		}
		w.d = openOverlay(t, dir, base, blockmap.OverlayOptions{})
		if round%2 == 0 {
			f, err := w.d.Freeze(t.Context()) // waits for the merge
			must(t, err)
			w.check("after a restart")
			must(t, f.Merge(t.Context()))
		}
		w.check("after a restart")
	}
	must(t, w.d.Close())
}

// A view that is held over a merge shows what it has shown.
func TestViewHeldOverMerge(t *testing.T) {
	base, _ := stampedBase(70)
	d := openOverlay(t, t.TempDir(), base, blockmap.OverlayOptions{})
	f, err := d.Freeze(t.Context())
	must(t, err)
	e := blockmap.Range(0, 8*4096)
	must(t, d.WriteAt(t.Context(), stamped(5, 64), 0))
	v, ok := d.View(e)
	if !ok {
		t.Fatal("what was just written cannot be viewed")
	}
	must(t, f.Merge(t.Context()))
	must(t, d.Discard(t.Context(), e))
	must(t, d.Flush(t.Context()))
	p := make([]byte, e.Len())
	must(t, v.CopyTo(p))
	for i := range 64 {
		if s, ok := stampOf(p[i*sectorSize:][:sectorSize]); !ok || s != 5 {
			t.Fatalf("sector %d of a view of what was merged has the stamp %d", i, s)
		}
	}
	v.Release()
	must(t, d.Flush(t.Context()))
	must(t, d.Close())
}

// pausingFS pauses one read of a whole block of a data file, after the disk has answered.
type pausingFS struct {
	blockmap.FS
	name           string // of the data file
	off            int64
	paused, goesOn chan struct{}
	armed          atomic.Bool
}

type pausingFile struct {
	blockmap.File
	fs *pausingFS
}

func (p *pausingFS) Open(path string, create bool) (blockmap.File, error) {
	f, err := p.FS.Open(path, create)
	if err == nil && filepath.Base(path) == p.name {
		f = &pausingFile{f, p}
	}
	return f, err
}

func (f *pausingFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	if off == f.fs.off && f.fs.armed.Swap(false) {
		close(f.fs.paused)
		<-f.fs.goesOn
	}
	return n, err
}

// A write to a part of a block has read the rest of it from a frozen level. Before it goes
// on, the level is merged, written to, and frozen again: the rest is read once more.
func TestPartWriteOverTwoFreezes(t *testing.T) {
	base, stamps := stampedBase(70)
	fsys := &pausingFS{FS: blockmap.OS, name: "data", off: 5 * 4096, paused: make(chan struct{}), goesOn: make(chan struct{})}
	d := openOverlay(t, t.TempDir(), base, blockmap.OverlayOptions{FS: fsys})
	m := newSectors(stamps)
	ctx := t.Context()
	must(t, d.WriteAt(ctx, stamped(1, 8), 5*4096))
	m.write(5*8, 8, 1, false)
	f, err := d.Freeze(ctx)
	must(t, err)
	fsys.armed.Store(true)
	written := make(chan error)
	go func() { written <- d.WriteAt(context.Background(), stamped(2, 1), 5*4096+sectorSize) }()
	m.write(5*8+1, 1, 2, false)
	select {
	case <-fsys.paused:
	case <-time.After(time.Minute):
		t.Fatal("the write does not read the rest of its block")
	}
	must(t, f.Merge(ctx))
	must(t, d.WriteAt(ctx, stamped(3, 1), 5*4096+2*sectorSize))
	m.write(5*8+2, 1, 3, false)
	f, err = d.Freeze(ctx)
	must(t, err)
	close(fsys.goesOn)
	must(t, <-written)
	m.check(t, d, 0, len(m.now), "after a write over two freezes")
	must(t, f.Merge(ctx))
	m.check(t, d, 0, len(m.now), "after its merge")
}

// stuckBase is a base of which a fault of the first block does not end before goesOn.
type stuckBase struct {
	*blocktest.Memory
	asked, goesOn chan struct{}
	once          sync.Once
}

func (s *stuckBase) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	if s.absent(e) {
		return blockmap.View{}, false
	}
	return s.Memory.View(e)
}

func (s *stuckBase) Load(ctx context.Context, e blockmap.Extent) (v blockmap.View, ok bool) {
	if s.absent(e) {
		return blockmap.View{}, false
	}
	return s.Memory.Load(ctx, e)
}

func (s *stuckBase) absent(e blockmap.Extent) bool {
	select {
	case <-s.goesOn:
		return false
	default:
		return e.Start < blockmap.BlockSize
	}
}

func (s *stuckBase) Fault(ctx context.Context, e blockmap.Extent) error {
	if s.absent(e) {
		s.once.Do(func() { close(s.asked) })
		<-s.goesOn
	}
	return s.Memory.Fault(ctx, e)
}

// A write to parts of two blocks waits for the first one's rest from the base. Meanwhile
// the level that has the second one's is merged and goes: its rest is found where it went.
func TestPartWriteOverMerge(t *testing.T) {
	memory, stamps := stampedBase(300)
	base := &stuckBase{Memory: memory, asked: make(chan struct{}), goesOn: make(chan struct{})}
	fsys := &pausingFS{FS: blockmap.OS, name: "data.1", off: 4096, paused: make(chan struct{}), goesOn: make(chan struct{})}
	d := openOverlay(t, t.TempDir(), base, blockmap.OverlayOptions{FS: fsys})
	m := newSectors(stamps)
	ctx := t.Context()
	f, err := d.Freeze(ctx)
	must(t, err)
	must(t, d.WriteAt(ctx, stamped(1, 8), 4096))
	m.write(8, 8, 1, false)
	fsys.armed.Store(true)
	merged, written := make(chan error, 1), make(chan error, 1)
	go func() { merged <- f.Merge(context.Background()) }()
	await(t, fsys.paused)
	go func() { written <- d.WriteAt(context.Background(), stamped(2, 2), 4096-sectorSize) }()
	m.write(7, 2, 2, false)
	await(t, base.asked)
	close(fsys.goesOn)
	must(t, <-merged)
	close(base.goesOn)
	must(t, <-written)
	m.check(t, d, 0, len(m.now), "after a write over a merge")
}

func await(t *testing.T, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(time.Minute):
		t.Fatal("what is awaited does not come")
	}
}

// A freeze that the disk has no room for leaves nothing behind: there can be another one.
func TestFreezeOnAFullDisk(t *testing.T) {
	base, stamps := stampedBase(70)
	x := newMachine(t, base)
	d, err := x.open()
	must(t, err)
	w := &writer{t: t, d: d, m: newSectors(stamps), rng: rand.New(rand.NewPCG(1, 127))}
	for range 20 {
		must(t, w.write())
	}
	x.fsys.Fail(func(op, path string) error {
		if op == "write" && filepath.Base(path) == "map.new" { // the name with which the map was made
			return blocktest.ErrDiskFull
		}
		return nil
	})
	if _, err := d.Freeze(t.Context()); !errors.Is(err, blockmap.ErrNoSpace) {
		t.Fatalf("a freeze on a full disk: %v", err)
	}
	must(t, w.write())
	x.fsys.Fail(x.step)
	must(t, w.write())
	f, err := d.Freeze(t.Context())
	must(t, err)
	w.check("after a freeze that has failed")
	must(t, f.Merge(t.Context()))
	w.check("after a merge")
	must(t, d.Close())
}
