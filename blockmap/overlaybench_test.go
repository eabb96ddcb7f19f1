package blockmap_test

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// BenchmarkOverlayView compares views of a resident image with those through an overlay:
// of blocks that were never changed, and of changed ones.
func BenchmarkOverlayView(b *testing.B) {
	m := blocktest.NewImage(b, 1, 20000)
	image := newImage(b, m, blocktest.NewOrigin(m))
	if _, err := blocktest.Read(b.Context(), image, blockmap.Range(0, image.Size())); err != nil {
		b.Fatal(err)
	}
	view := func(d blockmap.Device) func(b *testing.B) {
		return func(b *testing.B) {
			rng := rand.New(rand.NewPCG(1, 1))
			b.ReportAllocs()
			for b.Loop() {
				v, ok := d.View(blockmap.Range(rng.Int64N(d.Size()/4096)*4096, 4096))
				if !ok {
					b.Fatal("not resident")
				}
				v.Release()
			}
		}
	}
	d := openOverlay(b, b.TempDir(), image, blockmap.OverlayOptions{})
	b.Run("base", view(image))
	b.Run("unchanged", view(d))
	for at := int64(0); at < d.Size(); at += 1 << 20 {
		must(b, d.WriteAt(b.Context(), m.Content[at:min(at+1<<20, d.Size())], at))
	}
	b.Run("changed", view(d))
}

// BenchmarkOverlayWrite compares first and second writes of whole blocks, of parts of
// blocks, and of a plain sparse file. The writes are random, and of each block once.
func BenchmarkOverlayWrite(b *testing.B) {
	const blocks = 1 << 18
	base := blocktest.NewMemory(blocks * 4096)
	order := rand.New(rand.NewPCG(1, 1)).Perm(blocks)
	run := func(name string, n int, at int64, write func(b *testing.B) func(p []byte, off int64) error, twice bool) {
		b.Run(name, func(b *testing.B) {
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(i)
			}
			do := write(b)
			if twice {
				for i := range min(b.N, blocks) {
					must(b, do(p, int64(order[i])*4096+at))
				}
			}
			took := make([]time.Duration, b.N)
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				begin := time.Now()
				if err := do(p, int64(order[i%blocks])*4096+at); err != nil {
					b.Fatal(err)
				}
				took[i] = time.Since(begin)
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[b.N/2]), "p50-ns") // the mean has the writing back
		})
	}
	overlay := func(b *testing.B) func(p []byte, off int64) error {
		d := openOverlay(b, filepath.Join(b.TempDir(), "overlay"), base, blockmap.OverlayOptions{})
		return func(p []byte, off int64) error { return d.WriteAt(b.Context(), p, off) }
	}
	file := func(b *testing.B) func(p []byte, off int64) error {
		f, err := os.Create(filepath.Join(b.TempDir(), "file"))
		must(b, err)
		b.Cleanup(func() { f.Close() })
		must(b, f.Truncate(blocks*4096))
		return func(p []byte, off int64) error { _, err := f.WriteAt(p, off); return err }
	}
	run("file/first", 4096, 0, file, false)
	run("file/second", 4096, 0, file, true)
	run("whole/first", 4096, 0, overlay, false)
	run("whole/second", 4096, 0, overlay, true)
	run("part/first", 512, 1024, overlay, false)
	run("part/second", 512, 1024, overlay, true)
}

// BenchmarkOverlayFlush flushes after each 64 random writes of new blocks, and compares
// with a plain file.
func BenchmarkOverlayFlush(b *testing.B) {
	const blocks = 1 << 20
	base := blocktest.NewMemory(blocks * 4096)
	order := rand.New(rand.NewPCG(1, 1)).Perm(blocks)
	p := make([]byte, 4096)
	for _, each := range []int{1, 64} {
		name := map[int]string{1: "each", 64: "each64"}[each]
		b.Run("overlay/"+name, func(b *testing.B) {
			d := openOverlay(b, filepath.Join(b.TempDir(), "overlay"), base, blockmap.OverlayOptions{})
			for i := range b.N * each {
				must(b, d.WriteAt(b.Context(), p, int64(order[i%blocks])*4096))
				if i%each == each-1 {
					must(b, d.Flush(b.Context()))
				}
			}
		})
		b.Run("file/"+name, func(b *testing.B) {
			f, err := blockmap.OS.Open(filepath.Join(b.TempDir(), "file"), true)
			must(b, err)
			defer f.Close()
			must(b, f.Truncate(blocks*4096))
			for i := range b.N * each {
				_, err := f.WriteAt(p, int64(order[i%blocks])*4096)
				must(b, err)
				if i%each == each-1 {
					must(b, f.Sync())
				}
			}
		})
	}
}
