package blockmap_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// direct fetches in the simplest way: the scheduler's package tests the scheduler.
type direct struct {
	t      testing.TB
	origin *blocktest.Origin
	dec    *zstd.Decoder
	mu     sync.Mutex
	filled map[blockmap.Digest]int
	hold   bool // hold in memory what the disk does not accept
	leaves bool // bring the leaves that are needed and no others, as a bundle does
}

func (d *direct) Fetch(ctx context.Context, wants []blockmap.Want) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, w := range wants {
		if w.Here() || !d.leaves && w.Stream.FillLocal(w.Chunk) {
			continue
		}
		c := w.Table.Chunks[w.Chunk]
		body, err := d.origin.OpenRange(ctx, w.Table.Blob, c.Offset, int64(c.Stored))
		if err != nil {
			return err
		}
		b := make([]byte, c.Stored) // io.ReadAll allocates several times as much, which is slow with the race detector
		_, err = io.ReadFull(body, b)
		body.Close()
		if err == nil {
			b, err = d.dec.DecodeAll(b, nil)
		}
		if err == nil && d.leaves {
			err = d.fillLeaves(w, b)
		} else if err == nil {
			err = w.Stream.Fill(w.Chunk, b)
			if d.hold && err != nil && !errors.Is(err, blockmap.ErrDigest) {
				err = w.Stream.Hold(w.Chunk, b)
			}
		}
		if err != nil {
			return fmt.Errorf("chunk %d: %w", w.Chunk, err)
		}
		d.filled[c.Digest]++
	}
	return ctx.Err()
}

// fillLeaves stores the leaves that w needs, one by one, from the last to the first.
func (d *direct) fillLeaves(w blockmap.Want, content []byte) error {
	c := &w.Table.Chunks[w.Chunk]
	list, err := blockmap.NewLeafList(c, blockmap.LeafDigests(nil, content))
	if err != nil {
		return err
	}
	for i := c.Leaves() - 1; i >= 0; i-- {
		if !w.Needs().Has(i) || w.Stream.FillLeavesLocal(w.Chunk, list, blockmap.LeafRange(i, 1)) != 0 {
			continue
		}
		leaf := content[i*blockmap.LeafSize:][:c.LeafSize(i)]
		err := w.Stream.FillLeaves(w.Chunk, list, i, 1, leaf)
		if d.hold && err != nil && !errors.Is(err, blockmap.ErrDigest) {
			err = w.Stream.HoldLeaves(w.Chunk, list, i, 1, leaf)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *direct) Prefetch(wants []blockmap.Want) { _ = d.Fetch(context.Background(), wants) }

func newDirect(t testing.TB, o *blocktest.Origin) *direct {
	dec, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(dec.Close)
	return &direct{t: t, origin: o, dec: dec, filled: make(map[blockmap.Digest]int)}
}

func newCache(t testing.TB, dir string, o blockmap.CacheOptions) *blockmap.Cache {
	t.Helper()
	c, err := blockmap.OpenCache(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func newImage(t testing.TB, m *blocktest.Image, o *blocktest.Origin) *blockmap.Image {
	t.Helper()
	c := newCache(t, t.TempDir(), blockmap.CacheOptions{})
	image, err := blockmap.NewImage(m.Index, c, newDirect(t, o))
	if err != nil {
		t.Fatal(err)
	}
	return image
}

func TestImageConforms(t *testing.T) {
	m := blocktest.NewImage(t, 7, 3000)
	for name, leaves := range map[string]bool{"chunks": false, "leaves": true} {
		t.Run(name, func(t *testing.T) {
			blocktest.TestDevice(t, m.Content, func(t *testing.T) blockmap.Device {
				fetch := newDirect(t, blocktest.NewOrigin(m))
				fetch.leaves = leaves
				image, err := blockmap.NewImage(m.Index, newCache(t, t.TempDir(), blockmap.CacheOptions{}), fetch)
				must(t, err)
				return image
			})
		})
	}
}

// The same suite with room for a third of the image: chunks are fetched, evicted and
// fetched again during reads.
func TestImageConformsUnderEviction(t *testing.T) {
	for name, leaves := range map[string]bool{"chunks": false, "leaves": true} {
		t.Run(name, func(t *testing.T) { testUnderEviction(t, leaves) })
	}
}

func testUnderEviction(t *testing.T, leaves bool) {
	m := blocktest.NewImage(t, 8, 3000)
	var c *blockmap.Cache
	t.Run("", func(t *testing.T) {
		blocktest.TestDevice(t, m.Content, func(t *testing.T) blockmap.Device {
			c = newCache(t, t.TempDir(), blockmap.CacheOptions{Quota: 1 << 30})
			fetch := newDirect(t, blocktest.NewOrigin(m))
			fetch.leaves = leaves
			image, err := blockmap.NewImage(m.Index, c, fetch)
			if err != nil {
				t.Fatal(err)
			}
			return image
		})
	})
	c = newCache(t, t.TempDir(), blockmap.CacheOptions{Quota: int64(len(m.Content)) / 3})
	fetch := newDirect(t, blocktest.NewOrigin(m))
	fetch.leaves = leaves
	image, err := blockmap.NewImage(m.Index, c, fetch)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 3))
			for range 300 {
				e := blockmap.Range(rng.Int64N(image.Size()/4096-20)*4096, 4096*(1+rng.Int64N(20)))
				got, err := blocktest.Read(t.Context(), image, e)
				if err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
					t.Errorf("read %v: wrong bytes, or %v", e, err)
					return
				}
			}
		})
	}
	wg.Wait()
	if c.Evicted() == 0 {
		t.Error("nothing was evicted")
	}
	if c.Used() > int64(len(m.Content))/3 {
		t.Errorf("%d bytes are kept, %d are allowed", c.Used(), len(m.Content)/3)
	}
}

// The bytes of a view stay, however much is evicted meanwhile.
func TestViewPins(t *testing.T) {
	m := blocktest.NewImage(t, 9, 3000)
	c := newCache(t, t.TempDir(), blockmap.CacheOptions{Quota: int64(len(m.Content)) / 4})
	image, err := blockmap.NewImage(m.Index, c, newDirect(t, blocktest.NewOrigin(m)))
	if err != nil {
		t.Fatal(err)
	}
	held := blockmap.Range(8192, 64<<10)
	if err := image.Fault(t.Context(), held); err != nil {
		t.Fatal(err)
	}
	v, ok := image.View(held)
	if !ok {
		t.Fatal("not resident after a fault")
	}
	defer v.Release()
	for at := int64(0); at < image.Size(); at += 1 << 18 {
		if _, err := blocktest.Read(t.Context(), image, blockmap.Range(at, min(1<<18, image.Size()-at))); err != nil {
			t.Fatal(err)
		}
	}
	if c.Evicted() == 0 {
		t.Fatal("nothing was evicted")
	}
	got := make([]byte, v.Len())
	if err := v.CopyTo(got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, m.Content[held.Start:held.End]) {
		t.Error("the bytes of a view have changed")
	}
}

// A read of more than a few MiB is a copy: it pins nothing, and its holes stay holes. A
// view shows the bytes in place.
func TestReadOfWindows(t *testing.T) {
	m := blocktest.NewImage(t, 12, 3000)
	image := newImage(t, m, blocktest.NewOrigin(m))
	for _, e := range []blockmap.Extent{{Start: 0, End: image.Size()}, {Start: 1000, End: image.Size() - 77}} {
		v, err := blockmap.Read(t.Context(), image, e)
		if err != nil {
			t.Fatal(err)
		}
		holes := 0
		for _, s := range v.Segments() {
			if s.Zero {
				holes++
			}
		}
		got := make([]byte, v.Len())
		if err := v.CopyTo(got); err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
			t.Errorf("read %v: wrong bytes, or %v", e, err)
		}
		if v.Pinned() != 0 || holes == 0 {
			t.Errorf("read %v: %d bytes are pinned, %d holes", e, v.Pinned(), holes)
		}
		v.Release()
	}
	v, ok := image.View(blockmap.Range(0, 1<<20))
	if !ok || v.Pinned() == 0 {
		t.Errorf("a view of what is in memory (%v) pins %d bytes", ok, v.Pinned())
	}
	v.Release()
	for _, e := range []blockmap.Extent{{Start: -1, End: 1}, {Start: 0, End: 1 << 40}, {Start: 5, End: 4}} {
		if _, err := blockmap.Read(t.Context(), image, e); !errors.Is(err, blockmap.ErrOutOfRange) {
			t.Errorf("read %v: %v", e, err)
		}
	}
}

func TestViewAllocatesNothing(t *testing.T) {
	m := blocktest.NewImage(t, 10, 2000)
	image := newImage(t, m, blocktest.NewOrigin(m))
	if _, err := blocktest.Read(t.Context(), image, blockmap.Range(0, image.Size())); err != nil {
		t.Fatal(err)
	}
	at := int64(0)
	if n := testing.AllocsPerRun(1000, func() {
		v, ok := image.View(blockmap.Range(at, 4096))
		if !ok {
			t.Fatal("not resident")
		}
		v.Release()
		at = (at + 4096*37) % (image.Size() - 4096)
	}); n != 0 {
		t.Errorf("a view allocates %v times", n)
	}
}

// A chunk that is in two streams is fetched once.
func TestFillLocal(t *testing.T) {
	m := blocktest.NewImage(t, 11, 1000)
	c := newCache(t, t.TempDir(), blockmap.CacheOptions{})
	f := newDirect(t, blocktest.NewOrigin(m))
	image, err := blockmap.NewImage(m.Index, c, f)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := blocktest.Read(t.Context(), image, blockmap.Range(0, image.Size())); err != nil {
		t.Fatal(err)
	}
	for d, n := range f.filled {
		if n != 1 {
			t.Errorf("chunk %v was fetched %d times", d, n)
		}
	}
	if len(f.filled) >= len(m.Index.Streams[0].Chunks)+len(m.Index.Streams[1].Chunks)+len(m.Index.Streams[2].Chunks) {
		t.Error("the streams have no chunk in common: this tests nothing")
	}
}
