package fetcher_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// image is one more image of a world, from an origin of its own.
type image struct {
	*world
	bound *fetcher.Bound
}

// with adds an image to a world, in its cache and with its fetcher.
func (w *world) with(t testing.TB, m *blocktest.Image) *image {
	t.Helper()
	o := blocktest.NewOrigin(m)
	x := &image{&world{Image: m, origin: o, cache: w.cache, fetcher: w.fetcher}, w.fetcher.From(o)}
	var err error
	if x.device, err = blockmap.NewImage(m.Index, w.cache, x.bound); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(x.device.Close)
	return x
}

// apart makes a list of each want.
func apart(wants []blockmap.Want) (each [][]blockmap.Want) {
	for i := range wants {
		each = append(each, wants[i:i+1])
	}
	return each
}

// However many origins hang, in whatever way, with demands and prefetches waiting for
// each: the next origin is served as if it were alone.
func TestOriginsThatHangHoldUpNobody(t *testing.T) {
	good := blocktest.NewImage(t, 100, 3000)
	var bad []*blocktest.Image
	for i := range 10 {
		bad = append(bad, blocktest.NewImage(t, uint64(101+i), 4000))
	}
	faults := map[string]blocktest.Faults{
		"no answer": {Mute: true}, "no bytes": {Hang: true}, "a byte a second": {Trickle: 1},
	}
	options := map[string]fetcher.Options{
		"":              {MaxRequest: 1},
		"in few bytes":  {MaxBytes: 8 << 20},
		"of 4 requests": {MaxRequests: 4, MaxRequest: 1},
	}
	for what, fault := range faults {
		for name, o := range options {
			if name != "" && what != "no answer" {
				continue // the bounds treat all kinds of hanging alike
			}
			for _, hogs := range []int{1, 3, 10} {
				for _, bundles := range []bool{false, true} {
					t.Run(fmt.Sprintf("%d, %s, bundles %v, %s", hogs, what, bundles, name), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) {
							w := newWorld(t, good, o)
							w.origin.Set(blocktest.Faults{Delay: 20 * time.Millisecond})
							ctx, cancel := context.WithCancel(t.Context())
							var readers sync.WaitGroup
							defer readers.Wait()
							defer cancel()
							for _, m := range bad[:hogs] {
								x := w.with(t, m)
								x.origin.Set(fault)
								wants := x.wants(t)
								for _, one := range apart(wants) {
									readers.Go(func() { x.bound.Fetch(ctx, one) })
								}
								var options fetcher.ReplayOptions
								if bundles {
									l := x.bundle(t, wants)
									l.let(100, nil)
									options.Bundle = &l.Bundle
								}
								r := x.bound.Replay(ctx, wants, options)
								readers.Go(func() { r.Wait(ctx, 1) })
							}
							time.Sleep(10 * time.Second)
							bound := w.fetcher.From(w.origin)
							wants := w.wants(t)
							third := len(wants) / 3
							// In sequence, many at once, and ahead.
							for _, one := range apart(wants[:20]) {
								began := time.Now()
								if err := bound.Fetch(t.Context(), one); err != nil || time.Since(began) > 25*time.Millisecond {
									t.Fatalf("a chunk took %v: %v", time.Since(began), err)
								}
							}
							began := time.Now()
							var many sync.WaitGroup
							for _, one := range apart(wants[20 : 2*third]) {
								many.Go(func() {
									if err := bound.Fetch(t.Context(), one); err != nil {
										t.Error(err)
									}
								})
							}
							many.Wait()
							if took := time.Since(began); took > 3*time.Second {
								t.Errorf("%d chunks at once took %v", 2*third-20, took)
							}
							began = time.Now()
							r := bound.Replay(t.Context(), wants[2*third:], fetcher.ReplayOptions{})
							checkDone(t, r)
							if took := time.Since(began); took > 3*time.Second {
								t.Errorf("%d chunks ahead took %v", len(wants)-2*third, took)
							}
						})
					})
				}
			}
		}
	}
}

// Beside k origins that hang the next one gets 1/(k+2) of the pool.
func TestSharesOfTheBounds(t *testing.T) {
	good := blocktest.NewImage(t, 120, 6000)
	var bad []*blocktest.Image
	for i := range 10 {
		bad = append(bad, blocktest.NewImage(t, uint64(121+i), 4000))
	}
	for _, hogs := range []int{0, 1, 3, 10} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, good, fetcher.Options{MaxRequest: 1, MaxRequests: 48})
			ctx, cancel := context.WithCancel(t.Context())
			var readers sync.WaitGroup
			hang := func(x *image, fault blocktest.Faults) {
				x.origin.Set(fault)
				for _, one := range apart(x.wants(t)) {
					readers.Go(func() { x.bound.Fetch(ctx, one) })
				}
				time.Sleep(5 * time.Second)
			}
			var origins []*blocktest.Origin
			for _, m := range append(bad[:hogs:hogs], good) {
				x := w.with(t, m)
				origins = append(origins, x.origin)
				hang(x, blocktest.Faults{Mute: true})
				all := 0
				for _, o := range origins {
					all += o.Alive()
				}
				fair := 2 * 48 / (len(origins) + 1)
				for i, o := range origins {
					if n := o.Alive() - 16; n > fair+1 { // 16 may be extra requests
						t.Errorf("hanging source %d of %d has %d requests, its fair share is %d", i, len(origins), n, fair)
					}
				}
				if n := x.origin.Alive(); n < fair-1 {
					t.Errorf("the last of %d sources has %d requests, its fair share is %d", len(origins), n, fair)
				}
				if all > 2*48+64 {
					t.Errorf("%d requests in all", all)
				}
			}
			cancel()
			readers.Wait()
		})
	}
}

// Fetches that have no room delay no other fetch: demands go before prefetches of the same
// source, whatever the order of the requests for them.
func TestDemandBehindAPrefetchThatHangs(t *testing.T) {
	m := blocktest.NewImage(t, 135, 4000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1, MaxRequests: 8})
		bound, wants := w.fetcher.From(w.origin), w.wants(t)
		ahead := make(map[int64]bool)
		for _, x := range wants[:60] {
			ahead[x.Table.Chunks[x.Chunk].Offset] = true
		}
		w.origin.Set(blocktest.Faults{Mute: true, Only: func(a blocktest.Asked) bool { return a.Blob == wants[0].Table.Blob && ahead[a.Off] }})
		r := bound.Replay(t.Context(), wants[:60], fetcher.ReplayOptions{})
		defer r.Stop()
		time.Sleep(time.Second)
		for _, one := range apart(wants[70:90]) {
			began := time.Now()
			if err := bound.Fetch(t.Context(), one); err != nil || time.Since(began) > time.Millisecond {
				t.Fatalf("a chunk took %v: %v", time.Since(began), err)
			}
		}
	})
}

// hungDisk is a disk on which writes to some files hang.
type hungDisk struct {
	blockmap.FS
	hangs   func(path string) bool
	armed   atomic.Bool
	release chan struct{}
}

type hungFile struct {
	blockmap.File
	disk *hungDisk
}

func (d *hungDisk) Open(path string, create bool) (blockmap.File, error) {
	f, err := d.FS.Open(path, create)
	if err == nil && d.hangs(path) {
		f = &hungFile{f, d}
	}
	return f, err
}

func (f *hungFile) WriteAt(p []byte, off int64) (int, error) {
	if f.disk.armed.Load() {
		<-f.disk.release
	}
	return f.File.WriteAt(p, off)
}

// A large chunk that has no room beside requests that hang does not delay the small ones
// behind it, and gets its turn.
func TestLargeChunkAtTheHead(t *testing.T) {
	small, largest := long(t, 60), large(t, 3, 1<<20)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, small, fetcher.Options{MaxRequest: 1, MaxBytes: 3 << 20})
		both := blocktest.NewOrigin(small)
		for d, b := range largest.Blobs {
			both.Add(d, b)
		}
		bound := w.fetcher.From(both)
		x := w.with(t, largest)
		big, wants := x.wants(t)[1:], w.wants(t)[1:]
		hangs := big[0].Table.Chunks[0]
		both.Set(blocktest.Faults{Mute: true, Only: func(a blocktest.Asked) bool { return a.Blob == big[0].Table.Blob && a.Off == hangs.Offset }})
		ctx, cancel := context.WithCancel(t.Context())
		var readers sync.WaitGroup
		for _, one := range [][]blockmap.Want{big[:1], big[1:2], big[2:3]} {
			readers.Go(func() { bound.Fetch(ctx, one) })
			synctest.Wait()
		}
		for _, one := range apart(wants[:8]) {
			began := time.Now()
			if err := bound.Fetch(t.Context(), one); err != nil || time.Since(began) > time.Millisecond {
				t.Errorf("a small chunk took %v: %v", time.Since(began), err)
			}
		}
		cancel()
		readers.Wait()
		if err := bound.Fetch(t.Context(), big[1:]); err != nil {
			t.Error(err)
		}
	})
}

// A disk that hangs under one image delays no other: neither the decoders nor the tokens
// are all taken.
func TestDiskThatHangsUnderOneImage(t *testing.T) {
	bad, good := blocktest.NewImage(t, 140, 4000), blocktest.NewImage(t, 141, 3000)
	disk := &hungDisk{FS: blockmap.OS, release: make(chan struct{})}
	var streams []string
	for i := range bad.Index.Streams {
		streams = append(streams, bad.Index.Streams[i].ID().String())
	}
	disk.hangs = func(path string) bool {
		return strings.HasSuffix(path, "data") && slices.ContainsFunc(streams, func(id string) bool { return strings.Contains(path, id) })
	}
	cache, err := blockmap.OpenCache(t.TempDir(), blockmap.CacheOptions{FS: disk})
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	w := &world{Image: good, origin: blocktest.NewOrigin(good), cache: cache, fetcher: fetcher.New(fetcher.Options{Decoders: 2})}
	defer w.fetcher.Close()
	hung := w.with(t, bad)
	ctx, cancel := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	defer readers.Wait()
	defer cancel()
	defer close(disk.release)
	disk.armed.Store(true)
	wants := hung.wants(t)
	r := hung.bound.Replay(ctx, wants, fetcher.ReplayOptions{})
	readers.Go(r.Stop)
	for _, one := range apart(wants[:40]) {
		readers.Go(func() { hung.bound.Fetch(ctx, one) })
	}
	settled(t, "chunks have come that cannot be written", func() bool { return hung.origin.Requests() > 0 })
	bound, ours := w.fetcher.From(w.origin), w.wants(t)
	half := len(ours) / 2
	within, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	if err := bound.Fetch(within, ours[:half]); err != nil {
		t.Error("demand: ", err)
	}
	ahead := bound.Replay(within, ours[half:], fetcher.ReplayOptions{})
	if err := ahead.Wait(within, 1); err != nil {
		t.Error("ahead: ", err)
	}
	ahead.Stop()
}

// Two images share a stream, and the origin of the first hangs: a reader of the second gets
// its chunks from the second's origin in a few seconds.
func TestSharedWithAnOriginThatHangs(t *testing.T) {
	m := blocktest.NewImage(t, 145, 2000)
	for _, ahead := range []bool{false, true} {
		t.Run(fmt.Sprintf("ahead %v", ahead), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, m, fetcher.Options{MaxRequest: 1, MaxRequests: 8})
				w.origin.Set(blocktest.Faults{Mute: true})
				wants := w.wants(t)
				first := w.fetcher.From(w.origin)
				if ahead {
					r := first.Replay(t.Context(), wants, fetcher.ReplayOptions{})
					defer r.Stop()
				} else {
					ctx, cancel := context.WithCancel(t.Context())
					var readers sync.WaitGroup
					defer readers.Wait()
					defer cancel()
					for _, one := range apart(wants) {
						readers.Go(func() { first.Fetch(ctx, one) })
					}
				}
				synctest.Wait()
				second := w.fetcher.From(blocktest.NewOrigin(m))
				began := time.Now()
				if err := second.Fetch(t.Context(), wants[:20]); err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > 8*time.Second {
					t.Errorf("20 chunks took %v", took)
				}
				r := second.Replay(t.Context(), wants, fetcher.ReplayOptions{})
				checkDone(t, r)
				if took := time.Since(began); took > 25*time.Second {
					t.Errorf("all took %v", took)
				}
			})
		})
	}
}

// So does a reader of another stream with the same content.
func TestContentSharedWithAnOriginThatHangs(t *testing.T) {
	m := blocktest.NewImage(t, 146, 600)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		w.origin.Set(blocktest.Faults{Mute: true})
		places := w.shared(t)
		first := make(chan error)
		go func() { first <- w.fetcher.From(w.origin).Fetch(t.Context(), places[:1]) }()
		synctest.Wait()
		began := time.Now()
		if err := w.fetcher.From(blocktest.NewOrigin(m)).Fetch(t.Context(), places[1:2]); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("it took %v", took)
		}
		// The first reader has a copy.
		if err := <-first; err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("the first reader waited for %v", took)
		}
		synctest.Wait()
		if n := w.origin.Alive(); n != 0 {
			t.Errorf("%d requests continue", n)
		}
	})
}

// Hints are bounded.
func TestHintsAreBounded(t *testing.T) {
	m := long(t, 1000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1})
		w.origin.Set(blocktest.Faults{Delay: time.Millisecond})
		bound, wants := w.fetcher.From(w.origin), w.wants(t)
		bound.Prefetch(wants)
		bound.Prefetch(wants[500:])
		if st := w.fetcher.Stats(); st.Dropped != int64(len(wants)-256+len(wants)-500) {
			t.Errorf("%+v", st)
		}
		time.Sleep(time.Minute)
		if n := resident(wants); n != 256 {
			t.Errorf("%d chunks are resident", n)
		}
		bound.Prefetch(wants)
		time.Sleep(time.Minute)
		if n := resident(wants); n != 512 {
			t.Errorf("%d chunks are resident", n)
		}
		// After Close it wants no more of them.
		w.origin.Set(blocktest.Faults{Delay: time.Second})
		before := w.origin.Requests()
		bound.Prefetch(wants)
		synctest.Wait()
		bound.Close()
		time.Sleep(time.Minute)
		if n := w.origin.Requests() - before; n > 40 {
			t.Errorf("%d requests after it was closed", n)
		}
	})
}

var errGone = errors.New("gone for good")
