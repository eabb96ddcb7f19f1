package fetcher_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// long is an image whose stream 1 has n chunks of 4 blocks, which lie on the
// device one behind the other from block 0 on.
func long(t *testing.T, n int) *blocktest.Image {
	return inOrder(t, n, 4*blockmap.BlockSize, func(i int, c []byte) {
		for j := range c {
			c[j] = byte(i + j*(i+7)>>5)
		}
	})
}

// noise is like long with chunks of 128 KiB that cannot be compressed.
func noise(t *testing.T, n int) *blocktest.Image {
	rng := rand.NewChaCha8([32]byte{byte(n)})
	return inOrder(t, n, 128<<10, func(_ int, c []byte) { rng.Read(c) })
}

func inOrder(t *testing.T, n, size int, fill func(i int, c []byte)) *blocktest.Image {
	t.Helper()
	m := &blocktest.Image{}
	var chunks [][]byte
	for i := range n {
		c := make([]byte, size)
		fill(i, c)
		chunks = append(chunks, c)
		m.Content = append(m.Content, c...)
	}
	meta, metaBlob := blocktest.Stream(t, [][]byte{make([]byte, blockmap.BlockSize)})
	table, blob := blocktest.Stream(t, chunks)
	blocks := uint32(len(m.Content) / blockmap.BlockSize)
	m.Index = &blockmap.Index{Blocks: blocks, Streams: []blockmap.Table{*meta, *table}}
	m.Blobs = map[blockmap.Digest][]byte{meta.Blob: metaBlob, table.Blob: blob}
	m.Index.Runs = []blockmap.Run{{Stream: 1, Count: blocks}}
	if err := m.Index.Seal(); err != nil {
		t.Fatal(err)
	}
	return m
}

// ahead demands chunks of stream 1 one after the other, each when the one before and what
// was prefetched with it are resident. It returns those that the reader waited for, and
// those that were fetched, whether or not a cache of this quota still has them.
func ahead(t *testing.T, m *blocktest.Image, quota int64, readAhead bool, demands []int) (waited, fetched []int) {
	return aheadOf(t, m, quota, readAhead, demands, 1)
}

// aheadOf is ahead with many readers, which demand the same chunks at the same time.
func aheadOf(t *testing.T, m *blocktest.Image, quota int64, readAhead bool, demands []int, readers int) (waited, fetched []int) {
	synctest.Test(t, func(t *testing.T) {
		cache, err := blockmap.OpenCache(t.TempDir(), blockmap.CacheOptions{Quota: quota, FS: threads{blockmap.OS}})
		if err != nil {
			t.Fatal(err)
		}
		defer cache.Close()
		f := fetcher.New(fetcher.Options{})
		defer f.Close()
		origin := blocktest.NewOrigin(m)
		origin.Set(blocktest.Faults{Delay: time.Second})
		b := f.From(origin)
		if readAhead {
			b.ReadAhead(quota / 8)
		}
		device, err := blockmap.NewImage(m.Index, cache, b)
		if err != nil {
			t.Fatal(err)
		}
		table := &m.Index.Streams[1]
		at := func(c int) blockmap.Extent {
			return blockmap.Range(int64(table.Chunks[c].Block)*blockmap.BlockSize, blockmap.BlockSize)
		}
		for _, c := range demands {
			e := at(c)
			if !device.Status(e).Resident {
				waited = append(waited, c)
			}
			var wg sync.WaitGroup
			for range readers {
				wg.Go(func() {
					if got, err := blocktest.Read(t.Context(), device, e); err != nil || !slices.Equal(got, m.Content[e.Start:e.End]) {
						t.Error("wrong bytes", err)
					}
				})
			}
			wg.Wait()
			time.Sleep(5 * time.Second)
		}
		asked := make(map[int64]int64)
		for a := range origin.Asked() {
			if a.Blob == table.Blob {
				asked[a.Off] = max(asked[a.Off], a.N)
			}
		}
		for off, n := range asked {
			for i, c := range table.Chunks {
				if off <= c.Offset && c.Offset < off+n {
					fetched = append(fetched, i)
				}
			}
		}
		slices.Sort(fetched)
		fetched = slices.Compact(fetched)
	})
	return waited, fetched
}

func sequence(from, to int) (s []int) {
	for i := from; i < to; i++ {
		s = append(s, i)
	}
	return s
}

// A reader in sequence waits at ever larger steps; each prediction begins where the last
// one ended.
func TestReadAheadInSequence(t *testing.T) {
	m := noise(t, 100)
	waited, fetched := ahead(t, m, 0, true, sequence(20, 60))
	if want := []int{20, 21, 24, 29, 38, 55}; !slices.Equal(waited, want) {
		t.Errorf("a reader in sequence waited for chunks %v, want %v", waited, want)
	}
	if want := sequence(20, 88); !slices.Equal(fetched, want) {
		t.Errorf("chunks %v were fetched, want %v", fetched, want)
	}
	if waited, fetched := ahead(t, m, 0, false, sequence(20, 60)); !slices.Equal(waited, sequence(20, 60)) || !slices.Equal(fetched, waited) {
		t.Errorf("without readahead it waited for %v, and %v was fetched", waited, fetched)
	}
}

// Scattered reads cause no prefetches.
func TestReadAheadOfScatteredReads(t *testing.T) {
	demands := []int{90, 10, 50, 70, 30, 0, 99}
	if _, fetched := ahead(t, noise(t, 100), 0, true, demands); !slices.Equal(fetched, slices.Sorted(slices.Values(demands))) {
		t.Errorf("chunks %v were fetched for %v", fetched, demands)
	}
}

// Many readers of the same chunks cause the prefetches of one, not more.
func TestReadAheadOfManyReaders(t *testing.T) {
	for name, demands := range map[string][]int{"scattered": {90, 10, 50, 70, 30, 0, 99}, "near": {100, 105, 104, 64, 67, 150}, "in sequence": sequence(20, 60)} {
		m := noise(t, 200)
		waited, fetched := ahead(t, m, 0, true, demands)
		if w, f := aheadOf(t, m, 0, true, demands, 20); !slices.Equal(w, waited) || !slices.Equal(f, fetched) {
			t.Errorf("%s: 20 readers waited for %v, one for %v; %v were fetched, for one %v", name, w, waited, f, fetched)
		}
	}
}

// Reads near each other prefetch the neighbours on both sides.
func TestReadAheadOfNeighbours(t *testing.T) {
	waited, fetched := ahead(t, noise(t, 200), 0, true, []int{100, 105, 104, 64, 67, 191, 199})
	if want := []int{100, 105, 64, 67, 191, 199}; !slices.Equal(waited, want) {
		t.Errorf("waited for %v, want %v", waited, want)
	}
	if want := []int{64, 66, 67, 68, 100, 104, 105, 106, 191, 198, 199}; !slices.Equal(fetched, want) {
		t.Errorf("chunks %v were fetched, want %v", fetched, want)
	}
	// Small chunks are cheaper than the wait for one: more of them come together.
	if waited, _ := ahead(t, long(t, 200), 0, true, []int{100, 105, 103, 112, 98}); !slices.Equal(waited, []int{100, 105}) {
		t.Errorf("of small chunks it waited for %v", waited)
	}
}

// Reads at random use few predictions, so readahead ends, also if the cache is too small
// to keep what is predicted. It begins again when the reader reads neighbours.
func TestReadAheadLearns(t *testing.T) {
	m := noise(t, 400)
	chunk := int64(m.Index.Streams[1].Chunks[0].Stored)
	for _, quota := range []int64{0, 16 << 20} {
		rng := rand.New(rand.NewPCG(1, uint64(quota)))
		waited, fetched := ahead(t, m, quota, true, rng.Perm(400)[:150])
		// The first credit, what was won by chance, and one of 128 demanded bytes.
		if more := int64(len(fetched) - len(waited)); more*chunk > 8<<20 {
			t.Errorf("with a quota of %d, %d chunks were fetched and not waited for; the reader waited for %d", quota, more, len(waited))
		}
	}
	// Bad ones until there is no credit, and then chunks with their neighbours.
	var bad, good []int
	rng := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		bad = append(bad, rng.IntN(400))
	}
	for range 2 {
		for i := 0; i < 392; i += 8 {
			good = append(good, i, i+2, i+1, i+3)
		}
	}
	waited, _ := ahead(t, m, 16<<20, true, append(bad, good...))
	beside := 0
	for _, c := range waited[len(waited)-100:] {
		beside += c % 2
	}
	if beside > 15 {
		t.Errorf("of the last 100 chunks that it waited for, %d were beside the one before", beside)
	}
}

// Readers in sequence get what the link carries, on a slow and on a fast one, alone and
// together, in requests of many chunks.
func TestReadersInSequenceFillTheLink(t *testing.T) {
	for _, c := range []struct {
		rate float64
		rtt  time.Duration
		size int
		n    int
	}{{25e6, 20 * time.Millisecond, 1 << 20, 100}, {25e6, 20 * time.Millisecond, 128 << 10, 400}, {250e6, 2 * time.Millisecond, 1 << 20, 200}, {125e6, 20 * time.Millisecond, 1 << 20, 200}} {
		m := large(t, c.n, c.size)
		for _, readers := range []int{1, 4} {
			t.Run(fmt.Sprintf("%.0f MB/s, chunks of %d, %d readers", c.rate/1e6, c.size, readers), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					o := &far{wire: newWire(c.rate, c.rtt, 4<<20), ranges: 1}
					w, bound, wants := o.world(t, m)
					bound.ReadAhead(0)
					began := time.Now()
					var wg sync.WaitGroup
					for i := range readers {
						wg.Go(func() {
							for _, x := range wants[i*len(wants)/readers : (i+1)*len(wants)/readers] {
								if x.Stream.Has(x.Chunk) {
									continue
								}
								if err := bound.Fetch(t.Context(), []blockmap.Want{x}); err != nil {
									t.Error(err)
								}
							}
						})
					}
					wg.Wait()
					took := time.Since(began)
					w.fetcher.Close()
					least := time.Duration(float64(m.Index.Streams[1].BlobSize) / c.rate * float64(time.Second))
					t.Logf("it took %v, the link's time is %v; %d requests for %d chunks", took, least, w.fetcher.Stats().Requests, len(wants))
					if took > least+least/10+8*c.rtt {
						t.Errorf("it took %v, the link's time is %v", took, least)
					}
				})
			})
		}
	}
}

// A prediction goes before what is listed, and a demand before both.
func TestPredictionsGoBeforeLists(t *testing.T) {
	m := noise(t, 300)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1, MaxRequests: 4})
		defer w.fetcher.Close()
		w.origin.Set(blocktest.Faults{Delay: time.Second})
		b := w.fetcher.From(w.origin)
		b.ReadAhead(0)
		wants := w.wants(t)[1:]
		r := b.Replay(t.Context(), wants[:100], fetcher.ReplayOptions{})
		defer r.Stop()
		synctest.Wait()
		for _, i := range []int{200, 204} { // its neighbours are predicted
			if err := b.Fetch(t.Context(), wants[i:i+1]); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(3 * time.Second)
		if x := wants[205]; !x.Stream.Has(x.Chunk) || r.Progress().DoneChunks > 50 {
			t.Errorf("the neighbour is resident: %v; of the list %d chunks are", x.Stream.Has(x.Chunk), r.Progress().DoneChunks)
		}
	})
}
