package flatten

import (
	"context"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"testing"

	"thaw/blockmap"
)

// changesOf is a Changed of a list.
type changesOf struct {
	blockmap.Device
	list []blockmap.Change
}

func (c changesOf) Changes() iter.Seq[blockmap.Change] { return slices.Values(c.list) }

// The changes of two levels are those of a model with a state for each block, also where
// nobody reads them to the end.
func TestChangesOfTwoLevels(t *testing.T) {
	const blocks = 40
	rng := rand.New(rand.NewPCG(3, 4))
	list := func(states *[blocks]int) (l []blockmap.Change) {
		for b := 0; b < blocks; {
			n := min(1+rng.IntN(6), blocks-b)
			if kind := rng.IntN(3); kind > 0 {
				l = append(l, blockmap.Change{Extent: blockmap.Range(int64(b), int64(n)), Zero: kind == 2})
				for i := range n {
					states[b+i] = kind
				}
			}
			b += n
		}
		return l
	}
	for range 2000 {
		var want, got [blocks]int
		lower := changesOf{list: list(&want)}
		upper := changesOf{list: list(&want)}
		end := int64(0)
		all := over{upper, lower}.Changes()
		for x := range all {
			if x.Start < end || x.Len() <= 0 {
				t.Fatalf("%v follows byte %d", x, end)
			}
			end = x.End
			for b := x.Start; b < x.End; b++ {
				got[b] = 1
				if x.Zero {
					got[b] = 2
				}
			}
		}
		if got != want {
			t.Fatalf("%v over %v: %v, want %v", upper.list, lower.list, got, want)
		}
		for range all {
			break
		}
	}
}

// What is left of a range is what a model with a bit for each block says.
func TestSubtract(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for range 2000 {
		var want, got [60]bool
		var gone []blockRange
		for b := uint32(0); b < 50; {
			n := 1 + rng.Uint32N(5)
			if rng.IntN(2) == 0 {
				gone = append(gone, blockRange{b, n})
			}
			b += n
		}
		rest := gone
		for b := uint32(0); b < 50; {
			n := 1 + rng.Uint32N(10)
			for i := b; i < b+n; i++ {
				want[i] = !slices.ContainsFunc(gone, func(g blockRange) bool { return i >= g.start && i < g.start+g.count })
			}
			rest = subtract(blockRange{b, n}, rest, func(p blockRange) {
				for i := p.start; i < p.start+p.count; i++ {
					got[i] = true
				}
			})
			b += n
		}
		if got != want {
			t.Fatalf("without %v: %v, want %v", gone, got, want)
		}
	}
}

// The guess of a base is carried over, but for what was written.
func TestGuessOfACommit(t *testing.T) {
	e := func(start, count int64) blockmap.Extent { return blockmap.Range(start*blockSize, count*blockSize) }
	base := new(Image)
	base.Annotations = map[string]string{AnnotationGuess: guessOf([]blockmap.Extent{e(50, 10), e(5, 3), e(20, 1)}).encode()}
	d := &delta{base: CommitBase{Index: &blockmap.Index{Blocks: 100}}, replaced: []blockRange{{0, 6}, {20, 1}, {52, 2}}}
	got, err := d.guess(base)
	if want := []blockmap.Extent{e(50, 2), e(54, 6), e(6, 2)}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	base.Annotations[AnnotationGuess] = "!"
	if _, err := d.guess(base); err == nil {
		t.Error("a guess that cannot be read is no error")
	}
}

// An estimate by a sample is near to what a commit stores.
func TestEstimate(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	const size = 32 << 20
	device := &linesOf{rng.Uint64()}
	ix := &blockmap.Index{Blocks: size / blockSize}
	ix.Streams = []blockmap.Table{{}}
	if err := ix.Seal(); err != nil {
		t.Fatal(err)
	}
	var list []blockmap.Change
	for at := int64(0); at < size; { // runs of all lengths, some of zeros
		n := int64(1+rng.IntN(1<<rng.IntN(12))) * blockSize
		n = min(n, size-at)
		if rng.IntN(4) > 0 {
			list = append(list, blockmap.Change{Extent: blockmap.Range(at, n), Zero: rng.IntN(8) == 0})
		}
		at += n
	}
	base := CommitBase{Index: ix, Device: zeroDevice(size)}
	all, err := EstimateCommit(t.Context(), changesOf{device, list}, base, true)
	if err != nil || !all.Exact {
		t.Fatal(all, err)
	}
	some, err := EstimateCommit(t.Context(), changesOf{device, list}, base, false)
	if err != nil || some.Exact || some.Changed != all.Changed {
		t.Fatal(some, err)
	}
	if r := float64(some.Stored) / float64(all.Stored); r < 0.8 || r > 1.25 {
		t.Errorf("a sample says %d bytes, and it is %d", some.Stored, all.Stored)
	}
	if r := float64(some.Content) / float64(all.Content); r < 0.8 || r > 1.25 {
		t.Errorf("a sample says %d bytes of content, and it is %d", some.Content, all.Content)
	}
}

// linesOf is a device of made-up lines, and zeroDevice one of nothing.
type linesOf struct{ seed uint64 }
type zeroDevice int64

func (d *linesOf) Size() int64 { return 32 << 20 }
func (d *linesOf) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	return d.Load(context.Background(), e)
}
func (d *linesOf) Load(_ context.Context, e blockmap.Extent) (v blockmap.View, ok bool) {
	p := make([]byte, 0, e.Len()+100)
	rng := rand.New(rand.NewPCG(d.seed, uint64(e.Start)))
	for len(p) < int(e.Len()) {
		p = fmt.Appendf(p, "%d: request of %d took %d us\n", e.Start, rng.Uint32(), rng.Uint32N(1000))
	}
	v.Append(p[:e.Len()], nil, 0)
	return v, true
}
func (d *linesOf) Fault(context.Context, blockmap.Extent) error { return nil }
func (d *linesOf) Status(e blockmap.Extent) blockmap.Status {
	return blockmap.Status{Extent: e, Resident: true}
}
func (d *linesOf) Prefetch(blockmap.Extent) {}

func (d zeroDevice) Size() int64 { return int64(d) }
func (d zeroDevice) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	v.AppendZeros(e.Len())
	return v, true
}
func (d zeroDevice) Load(_ context.Context, e blockmap.Extent) (blockmap.View, bool) {
	return d.View(e)
}
func (d zeroDevice) Fault(context.Context, blockmap.Extent) error { return nil }
func (d zeroDevice) Status(e blockmap.Extent) blockmap.Status {
	return blockmap.Status{Extent: e, Zero: true, Resident: true}
}
func (d zeroDevice) Prefetch(blockmap.Extent) {}
