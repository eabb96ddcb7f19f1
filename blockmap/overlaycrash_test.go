package blockmap_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// errDead is what each operation of a machine fails with that has crashed.
var errDead = errors.New("the machine has crashed")

// machine is what an overlay lives on: it crashes, with its power or without.
type machine struct {
	t    testing.TB
	fsys *blocktest.FS
	dir  string
	boot byte
	base *blocktest.Memory
	ops  atomic.Int64 // of the file system so far
	last atomic.Int64 // the operation before which it crashes, if not 0
	what atomic.Pointer[string]
}

func newMachine(t testing.TB, base *blocktest.Memory) *machine {
	x := &machine{t: t, fsys: blocktest.NewFS(), dir: filepath.Join(t.TempDir(), "overlay"), boot: 1, base: base}
	x.fsys.LoseNames()
	x.fsys.Fail(x.step)
	return x
}

func (x *machine) step(op, path string) error {
	if n, last := x.ops.Add(1), x.last.Load(); last == 0 || n < last {
		return nil
	} else if n == last {
		what := op + " " + filepath.Base(path)
		x.what.Store(&what)
	}
	return errDead
}

// never is an operation that does not come.
const never = 1 << 40

// crashBefore has the machine crash before the n-th operation from now.
func (x *machine) crashBefore(n int64) {
	x.ops.Store(0)
	x.last.Store(n)
}

func (x *machine) crashed() bool { return x.last.Load() > 0 && x.ops.Load() >= x.last.Load() }

func (x *machine) open() (*blockmap.Overlay, error) {
	return blockmap.OpenOverlay(x.dir, x.base, blockmap.OverlayOptions{FS: x.fsys, Boot: blockmap.BootID{x.boot}})
}

// restart ends what runs on the machine, as a loss of power does, or the end of the
// process alone.
func (x *machine) restart(d *blockmap.Overlay, powerLost bool, rng *rand.Rand) {
	x.t.Helper()
	x.last.Store(1) // nothing reaches the disk any more
	if d != nil {
		_ = d.Close()
	}
	x.fsys.Kill()
	if powerLost {
		must(x.t, x.fsys.PowerCut(rng))
		x.boot++
	}
	x.last.Store(0)
	if d, err := blockmap.ReadOverlay(x.fsys, x.dir); err == nil && (d.InUse || d.Size != x.base.Size() || d.Levels < 1) {
		x.t.Fatalf("after a crash the directory says %+v", d)
	}
}

// sequence is what a device goes through until its machine crashes: writes of all kinds,
// flushes, freezes and merges.
func (x *machine) sequence(m *sectors, seed uint64, steps int) (d *blockmap.Overlay) {
	rng := rand.New(rand.NewPCG(seed, 115))
	d, err := x.open()
	if err != nil {
		if !x.crashed() {
			x.t.Fatal(err)
		}
		return nil
	}
	w := &writer{t: x.t, d: d, m: m, rng: rng}
	var frozen *blockmap.Frozen
	var merging sync.WaitGroup
	defer merging.Wait()
	ok := func(err error) bool {
		if err != nil && !x.crashed() {
			x.t.Fatal(err)
		}
		return err == nil
	}
	for range steps {
		switch k := rng.IntN(20); {
		case k < 3:
			if !ok(w.flush()) {
				return d
			}
		case k == 3 && frozen == nil:
			merging.Wait()
			f, err := d.Freeze(x.t.Context())
			if !ok(err) {
				return d
			}
			m.flush()
			frozen = f
		case k == 4 && frozen != nil:
			f := frozen
			frozen = nil
			merging.Go(func() { ok(f.Merge(x.t.Context())) })
			if rng.IntN(2) == 0 {
				merging.Wait()
			}
		default:
			if !ok(w.write()) {
				return d
			}
		}
	}
	merging.Wait()
	if !x.crashed() && x.last.Load() == never { // or the reads would count
		w.check("at the end of the sequence")
	}
	return d
}

// A crash at any point of a sequence leaves an overlay that opens. Each block is as the last
// flush has left it, or as a later write has; if the machine goes on, as the last write has.
func TestOverlayCrashesAnywhere(t *testing.T) {
	const steps = 50
	for _, powerLost := range []bool{true, false} {
		for seed := range uint64(2) {
			t.Run(fmt.Sprintf("power lost %v, seed %d", powerLost, seed), func(t *testing.T) {
				t.Parallel()
				base, stamps := stampedBase(70)
				x := newMachine(t, base)
				x.crashBefore(never)
				d := x.sequence(newSectors(stamps), seed, steps)
				total := x.ops.Load()
				must(t, d.Close())
				if total < 100 {
					t.Fatalf("%d operations: this tests too little", total)
				}
				rng := rand.New(rand.NewPCG(seed, 116))
				for n := int64(1); n <= total+5; n++ {
					x := newMachine(t, base)
					m := newSectors(stamps)
					x.crashBefore(n)
					d := x.sequence(m, seed, steps)
					for round := range 3 { // crash, go on, crash again
						at := "the end"
						if what := x.what.Load(); what != nil {
							at = *what
						}
						what := fmt.Sprintf("crash %d before operation %d, %s", round, n, at)
						x.restart(d, powerLost, rng)
						var err error
						if d, err = x.open(); err != nil {
							t.Fatalf("%s: %v", what, err)
						}
						m.crash(t, d, powerLost, what)
						w := &writer{t: t, d: d, m: m, rng: rng}
						for i := range 6 {
							if i == 2 {
								must(t, w.flush())
							}
							must(t, w.write())
						}
						w.check(what)
					}
					must(t, d.Close())
				}
			})
		}
	}
}
