package fetcher_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

func TestMain(m *testing.M) { blocktest.Main(m) }

// world is an image on an origin, with an empty cache before it.
type world struct {
	*blocktest.Image
	origin  *blocktest.Origin
	cache   *blockmap.Cache
	fetcher *fetcher.Fetcher
	device  *blockmap.Image
}

func newWorld(t testing.TB, m *blocktest.Image, o fetcher.Options) *world {
	t.Helper()
	w := &world{Image: m, origin: blocktest.NewOrigin(m)}
	var err error
	if w.cache, err = blockmap.OpenCache(t.TempDir(), blockmap.CacheOptions{FS: threads{blockmap.OS}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.cache.Close(); err != nil {
			t.Error(err)
		}
	})
	w.fetcher = fetcher.New(o)
	t.Cleanup(w.fetcher.Close)
	if w.device, err = blockmap.NewImage(m.Index, w.cache, w.fetcher.From(w.origin)); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) read(ctx context.Context, e blockmap.Extent) error {
	got, err := blocktest.Read(ctx, w.device, e)
	if err == nil && !bytes.Equal(got, w.Content[e.Start:e.End]) {
		err = fmt.Errorf("wrong bytes in %v", e)
	}
	return err
}

// places are blocks of n different chunks.
func (w *world) places(t *testing.T, n int) (places []blockmap.Extent) {
	t.Helper()
	seen := make(map[blockmap.Digest]bool)
	for _, r := range w.Index.Runs {
		s := &w.Index.Streams[r.Stream]
		for b := uint32(0); b < r.Count && len(places) < n; b++ {
			if d := s.Chunks[s.Find(r.Block+b)].Digest; !seen[d] {
				seen[d] = true
				places = append(places, blockmap.Range(int64(r.Device+b)*blockmap.BlockSize, blockmap.BlockSize))
			}
		}
	}
	if len(places) < n {
		t.Fatalf("the image has only %d chunks", len(places))
	}
	return places
}

func (w *world) all() blockmap.Extent { return blockmap.Range(0, w.device.Size()) }

func TestConforms(t *testing.T) {
	m := blocktest.NewImage(t, 1, 3000)
	blocktest.TestDevice(t, m.Content, func(t *testing.T) blockmap.Device {
		return newWorld(t, m, fetcher.Options{}).device
	})
}

// An origin that fails now and then, in any way, only costs time.
func TestConformsOverABadOrigin(t *testing.T) {
	m := blocktest.NewImage(t, 2, 600)
	for name, f := range map[string]blocktest.Faults{
		"errors":  {Err: blocktest.ErrInjected, ErrEach: 3},
		"cut":     {Cut: true, Left: 5},
		"breaks":  {Break: blocktest.ErrInjected, Left: 5},
		"lies":    {Flip: true, Left: 3},
		"is slow": {Delay: time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			blocktest.TestDevice(t, m.Content, func(t *testing.T) blockmap.Device {
				w := newWorld(t, m, fetcher.Options{Backoff: time.Millisecond})
				w.origin.Set(f)
				return w.device
			})
		})
	}
}

// Each chunk is fetched once, however many readers wait for it.
func TestEachChunkOnce(t *testing.T) {
	m := blocktest.NewImage(t, 3, 2000)
	w := newWorld(t, m, fetcher.Options{MaxRequest: 1}) // one chunk per request, to count them
	w.origin.Set(blocktest.Faults{Delay: time.Millisecond})
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for range 40 {
				at := rng.Int64N(w.device.Size() - 100_000)
				if err := w.read(t.Context(), blockmap.Range(at, 1+rng.Int64N(100_000))); err != nil {
					t.Error(err)
				}
			}
			if err := w.read(t.Context(), w.all()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for a, n := range w.origin.Asked() {
		if n != 1 {
			t.Errorf("%d bytes at %d of blob %.8s were requested %d times", a.N, a.Off, a.Blob, n)
		}
	}
	if st := w.stats(t); st.Local == 0 || st.Chunks != int64(len(w.origin.Asked())) {
		t.Errorf("%+v", st)
	}
}

// Neighbours share requests.
func TestNeighbours(t *testing.T) {
	m := blocktest.NewImage(t, 4, 2000)
	w := newWorld(t, m, fetcher.Options{})
	if err := w.read(t.Context(), w.all()); err != nil {
		t.Fatal(err)
	}
	// Three streams; the chunk that they share splits two of them off their
	// last chunk, which is that one.
	if n := w.origin.Requests(); n > 6 {
		t.Errorf("%d requests for three streams", n)
	}
	for a := range w.origin.Asked() {
		if a.N > 4<<20+1<<18 {
			t.Errorf("a request of %d bytes", a.N)
		}
	}
}

// 32 chunks are in flight at once.
func TestInFlight(t *testing.T) {
	m := blocktest.NewImage(t, 5, 6000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1})
		w.origin.Set(blocktest.Faults{Delay: time.Second})
		var wg sync.WaitGroup
		for _, e := range w.places(t, 32) {
			wg.Go(func() {
				if err := w.read(t.Context(), e); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := w.origin.Most(); n != 32 {
			t.Errorf("at most %d requests were in flight", n)
		}
	})
}

// Bytes in flight are bounded, and a chunk larger than the bound still comes.
func TestBound(t *testing.T) {
	m := blocktest.NewImage(t, 6, 3000)
	synctest.Test(t, func(t *testing.T) {
		for _, o := range []fetcher.Options{{MaxBytes: 1}, {MaxRequests: 1}} {
			o.MaxRequest = 1
			w := newWorld(t, m, o)
			if err := w.read(t.Context(), w.all()); err != nil {
				t.Fatal(err)
			}
			if n := w.origin.Most(); n != 1 {
				t.Errorf("%+v: %d requests at once", o, n)
			}
		}
	})
}

// A demand does not wait behind prefetches, and promotes a prefetch of the same chunk.
func TestDemandBeforePrefetch(t *testing.T) {
	m := blocktest.NewImage(t, 7, 4000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1, MaxRequests: 4})
		w.origin.Set(blocktest.Faults{Delay: 3 * time.Millisecond})
		w.device.Prefetch(w.all())
		// The last chunks of the device are the last in the queue.
		e := blockmap.Range(w.device.Size()-600<<10, 4096)
		if err := w.read(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		if n, all := w.origin.Requests(), len(m.Index.Streams[0].Chunks)*3; n > all/4 {
			t.Errorf("%d requests of some %d came before the demanded one", n, all)
		}
		if err := w.read(t.Context(), w.all()); err != nil {
			t.Fatal(err)
		}
		for a, n := range w.origin.Asked() {
			if n != 1 {
				t.Errorf("%v was asked for %d times", a, n)
			}
		}
	})
}

// A reader that gives up leaves the fetch to the others.
func TestFirstReaderLeaves(t *testing.T) {
	m := blocktest.NewImage(t, 8, 300)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		w.origin.Set(blocktest.Faults{Delay: 50 * time.Millisecond})
		e := w.places(t, 3)[2]
		ctx, cancel := context.WithCancel(t.Context())
		first, second := make(chan error), make(chan error)
		go func() { first <- w.device.Fault(ctx, e) }()
		go func() { second <- w.read(t.Context(), e) }()
		synctest.Wait()
		cancel()
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Errorf("the reader that gave up got %v", err)
		}
		if err := <-second; err != nil {
			t.Error(err)
		}
		if n := w.origin.Requests(); n != 1 {
			t.Errorf("%d requests", n)
		}
	})
}

// Bytes that stay wrong are an error, and never data. The next reader tries again.
func TestGivesUp(t *testing.T) {
	m := blocktest.NewImage(t, 9, 300)
	permanent := errors.New("gone for good")
	for name, c := range map[string]struct {
		faults blocktest.Faults
		want   error
		most   int
	}{
		"wrong":     {blocktest.Faults{Flip: true}, blockmap.ErrDigest, 4},
		"cut":       {blocktest.Faults{Cut: true}, io.ErrUnexpectedEOF, 100},
		"fails":     {blocktest.Faults{Err: blocktest.ErrInjected}, blocktest.ErrInjected, 100},
		"permanent": {blocktest.Faults{Err: permanent}, permanent, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, m, fetcher.Options{
					Backoff: time.Millisecond, RetryFor: 100 * time.Millisecond,
					Temporary: func(err error) bool { return !errors.Is(err, permanent) },
				})
				w.origin.Set(c.faults)
				e := w.places(t, 3)[2]
				err := w.read(t.Context(), e)
				if !errors.Is(err, c.want) {
					t.Errorf("got %v, want %v", err, c.want)
				}
				if n := w.origin.Requests(); n > c.most || c.most > 1 && n < 2 {
					t.Errorf("%d requests", n)
				}
				if st := w.fetcher.Stats(); st.Failed != 1 {
					t.Errorf("%+v", st)
				}
				w.origin.Set(blocktest.Faults{})
				if err := w.read(t.Context(), e); err != nil {
					t.Errorf("when the origin works again: %v", err)
				}
			})
		})
	}
}

// Only the wrong chunk of a request is asked for again.
func TestPartOfABatch(t *testing.T) {
	m := blocktest.NewImage(t, 10, 1000)
	w := newWorld(t, m, fetcher.Options{Backoff: time.Millisecond})
	w.origin.Set(blocktest.Faults{Flip: true, Left: 1})
	if err := w.read(t.Context(), w.all()); err != nil {
		t.Fatal(err)
	}
	if st := w.stats(t); st.Wrong != 1 || st.Retries != 1 {
		t.Errorf("%+v", st)
	}
}

// Pauses between retries grow, and are as long as the origin asks for.
func TestBackoff(t *testing.T) {
	m := blocktest.NewImage(t, 11, 300)
	for name, c := range map[string]struct {
		after    time.Duration
		min, max time.Duration
	}{
		"doubling":    {0, 10 * time.Second, 31 * time.Second},
		"retry after": {7 * time.Second, 20 * time.Second, 31 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, m, fetcher.Options{RetryAfter: func(error) time.Duration { return c.after }})
				w.origin.Set(blocktest.Faults{Err: blocktest.ErrInjected})
				began := time.Now()
				err := w.read(t.Context(), w.places(t, 3)[2])
				if !errors.Is(err, blocktest.ErrInjected) {
					t.Error(err)
				}
				took := time.Since(began)
				if took < c.min || took > c.max {
					t.Errorf("it gave up after %v", took)
				}
				if n := w.origin.Requests(); n < 3 || n > 80 {
					t.Errorf("%d requests in %v", n, took)
				}
			})
		})
	}
}

// A pause has any length up to its limit, so that readers that failed together do not return
// together.
func TestBackoffJitter(t *testing.T) {
	m := blocktest.NewImage(t, 11, 3000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{Backoff: time.Second})
		short, long := 0, 0
		for _, e := range w.places(t, 40) {
			w.origin.Set(blocktest.Faults{Err: blocktest.ErrInjected, Left: 1})
			began := time.Now()
			if err := w.read(t.Context(), e); err != nil {
				t.Fatal(err)
			}
			took := time.Since(began)
			switch {
			case took > time.Second:
				t.Errorf("a pause of %v", took)
			case took < time.Second/4:
				short++
			case took > 3*time.Second/4:
				long++
			}
		}
		if short == 0 || long == 0 {
			t.Errorf("of 40 pauses %d were short and %d long", short, long)
		}
	})
}

// Close ends requests that hang, and readers get ErrClosed.
func TestClose(t *testing.T) {
	m := blocktest.NewImage(t, 12, 1000)
	w := newWorld(t, m, fetcher.Options{MaxRequest: 1, MaxRequests: 3})
	w.origin.Set(blocktest.Faults{Hang: true})
	var wg sync.WaitGroup
	for _, e := range w.places(t, 8) {
		wg.Go(func() {
			if err := w.device.Fault(t.Context(), e); !errors.Is(err, blockmap.ErrClosed) {
				t.Errorf("a reader got %v", err)
			}
		})
	}
	settled(t, "three requests hang", func() bool { return w.origin.Alive() >= 3 })
	w.fetcher.Close()
	wg.Wait()
	if n := w.origin.Alive(); n != 0 {
		t.Errorf("%d bodies were left open", n)
	}
	if err := w.device.Fault(t.Context(), w.all()); !errors.Is(err, blockmap.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// Two images that share a stream fetch it once, from the origin that answers.
func TestTwoOrigins(t *testing.T) {
	m := blocktest.NewImage(t, 13, 500)
	w := newWorld(t, m, fetcher.Options{Backoff: time.Millisecond, RetryFor: time.Minute})
	good := blocktest.NewOrigin(m)
	other, err := blockmap.NewImage(m.Index, w.cache, w.fetcher.From(good))
	if err != nil {
		t.Fatal(err)
	}
	w.origin.Set(blocktest.Faults{Err: blocktest.ErrInjected, Delay: 20 * time.Millisecond})
	e := w.places(t, 3)[2]
	first := make(chan error)
	go func() { first <- w.read(t.Context(), e) }()
	settled(t, "the origin that fails is asked", func() bool { return w.origin.Requests() > 0 })
	if err := other.Fault(t.Context(), e); err != nil {
		t.Error(err)
	}
	if err := <-first; err != nil {
		t.Errorf("the reader whose origin fails: %v", err)
	}
	if n := good.Requests(); n != 1 {
		t.Errorf("%d requests at the origin that works", n)
	}
}

func BenchmarkFetch(b *testing.B) {
	m := blocktest.NewImage(b, 14, 20000)
	for b.Loop() {
		b.StopTimer()
		w := newWorld(b, m, fetcher.Options{})
		b.StartTimer()
		b.SetBytes(w.device.Size())
		if err := w.device.Fault(b.Context(), w.all()); err != nil {
			b.Fatal(err)
		}
	}
}

// threads has the cache read its disk with threads. In a synctest bubble, the thread of an
// io_uring would wait in the kernel for ever, and time would stand still.
type threads struct{ blockmap.FS }

type threadsFile struct{ blockmap.File }

func (f threads) Open(path string, create bool) (blockmap.File, error) {
	file, err := f.FS.Open(path, create)
	if err != nil {
		return nil, err
	}
	return threadsFile{file}, nil
}

func (threadsFile) Descriptor() int { return -1 }
