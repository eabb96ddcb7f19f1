package fetcher_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// shared are the chunks with the content that all streams have.
func (w *world) shared(t *testing.T) (places []blockmap.Want) {
	t.Helper()
	for _, x := range w.wants(t) {
		if x.Chunk == len(x.Table.Chunks)-1 {
			places = append(places, x)
		}
	}
	return places
}

// Chunks of the same content are fetched by one request, whichever is demanded.
func TestOneContentOnce(t *testing.T) {
	m := blocktest.NewImage(t, 60, 600)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		w.origin.Set(blocktest.Faults{Delay: time.Second})
		places := w.shared(t)
		for _, x := range places {
			go func() {
				if d := w.fetch(t, x); d != time.Second {
					t.Errorf("a reader waited for %v", d)
				}
			}()
		}
		time.Sleep(time.Minute)
		if st := w.fetcher.Stats(); w.origin.Requests() != 1 || resident(places) != 3 || st.Local != 2 || st.Chunks != 1 {
			t.Errorf("%d requests, %+v", w.origin.Requests(), st)
		}
	})
}

// A demand for a chunk whose content is being prefetched for another chunk promotes that
// prefetch.
func TestDemandOfAPrefetchedContent(t *testing.T) {
	m := blocktest.NewImage(t, 61, 2000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1, MaxRequests: 2})
		w.origin.Set(blocktest.Faults{Delay: time.Second})
		places := w.shared(t)
		bound := w.fetcher.From(w.origin)
		first := len(places[0].Table.Chunks)
		bound.Prefetch(w.wants(t)[:first]) // the last chunk of stream 0
		synctest.Wait()
		if d := w.fetch(t, places[1]); d > 2*time.Second {
			t.Errorf("it waited for %v, behind prefetches", d)
		}
		if n := w.origin.Requests(); n > 4 {
			t.Errorf("%d requests went first", n)
		}
		time.Sleep(time.Minute)
		if n := w.origin.Requests(); n != first {
			t.Errorf("%d requests for %d chunks", n, first)
		}
	})
}

// When the original of several duplicates fails, the next one tries its own source.
func TestDuplicatesTryThemselves(t *testing.T) {
	m := blocktest.NewImage(t, 62, 600)
	gone := errors.New("gone for good")
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{Temporary: func(err error) bool { return !errors.Is(err, gone) }})
		good := blocktest.NewOrigin(m)
		w.origin.Set(blocktest.Faults{Err: gone, Delay: time.Second})
		places := w.shared(t)
		errs := make([]error, 3)
		done := make(chan bool)
		for i, o := range []*blocktest.Origin{w.origin, w.origin, good} {
			go func() {
				errs[i] = w.fetcher.From(o).Fetch(t.Context(), places[i:i+1])
				done <- true
			}()
			synctest.Wait()
		}
		for range places {
			<-done
		}
		if !errors.Is(errs[0], gone) || !errors.Is(errs[1], gone) || errs[2] != nil {
			t.Errorf("%v", errs)
		}
		if w.origin.Requests() != 2 || good.Requests() != 1 {
			t.Errorf("%d requests to the failing place, %d to the other", w.origin.Requests(), good.Requests())
		}
	})
}

// A reader that joins a fetch that has failed for long has all of RetryFor, and so has one
// that waits for a duplicate.
func TestEachReaderHasItsTime(t *testing.T) {
	m := blocktest.NewImage(t, 63, 600)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		w.origin.Set(blocktest.Faults{Err: blocktest.ErrInjected})
		bound := w.fetcher.From(w.origin)
		places := w.shared(t)
		bound.Prefetch(places[:1])
		time.Sleep(25 * time.Second)
		time.AfterFunc(10*time.Second, func() { w.origin.Set(blocktest.Faults{}) })
		w.fetch(t, places[0])

		w = newWorld(t, m, fetcher.Options{})
		w.origin.Set(blocktest.Faults{Err: blocktest.ErrInjected})
		bound = w.fetcher.From(w.origin)
		places = w.shared(t)
		first := make(chan error)
		go func() { first <- bound.Fetch(t.Context(), places[:1]) }()
		time.Sleep(28 * time.Second)
		time.AfterFunc(10*time.Second, func() { w.origin.Set(blocktest.Faults{}) })
		w.fetch(t, places[1])
		<-first
	})
}

// A reader does not wait for what is read ahead, and does not fail with it.
func TestReadAheadCostsNothing(t *testing.T) {
	m := long(t, 60)
	gone := errors.New("gone for good")
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{Temporary: func(err error) bool { return !errors.Is(err, gone) }})
		bound := w.fetcher.From(w.origin)
		bound.ReadAhead(0)
		chunks := w.wants(t)[1:]
		get := func(i int) error { return bound.Fetch(t.Context(), chunks[i:i+1]) }
		if err := get(20); err != nil {
			t.Fatal(err)
		}
		// The neighbours of the next chunk are in flight, and fail.
		w.origin.Set(blocktest.Faults{Err: gone, Delay: time.Second})
		bound.Prefetch(chunks[22:24])
		synctest.Wait()
		w.origin.Set(blocktest.Faults{})
		began := time.Now()
		if err := get(21); err != nil || time.Since(began) > 100*time.Millisecond {
			t.Errorf("it took %v: %v", time.Since(began), err)
		}
		time.Sleep(time.Minute)
	})
}

// A list with resident, failing and repeated chunks.
func TestReplayOfAnything(t *testing.T) {
	m := blocktest.NewImage(t, 64, 1500)
	gone := errors.New("gone for good")
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1, Temporary: func(err error) bool { return !errors.Is(err, gone) }})
		bound := w.fetcher.From(w.origin)
		wants := w.wants(t)
		if err := bound.Fetch(t.Context(), wants[:5]); err != nil {
			t.Fatal(err)
		}
		list := slices.Concat(wants[:10], wants[3:5])
		w.origin.Set(blocktest.Faults{Err: gone, Left: 2})
		r := bound.Replay(t.Context(), list, fetcher.ReplayOptions{})
		err := r.Wait(t.Context(), 1)
		p := r.Progress()
		if !errors.Is(err, gone) || p.Chunks != 12 || p.DoneChunks != 10 || p.Failed != 2 || !errors.Is(p.Err, gone) {
			t.Errorf("%v, %+v", err, p)
		}
		if n := resident(wants[:10]); n != 8 {
			t.Errorf("%d of 8 chunks are resident", n)
		}
		before := w.origin.Requests()
		r = bound.Replay(t.Context(), slices.Concat(wants[5:15], list, wants[5:15]), fetcher.ReplayOptions{})
		checkDone(t, r)
		if n := w.origin.Requests() - before; n != 7 {
			t.Errorf("%d requests for 7 chunks", n)
		}
		r = bound.Replay(t.Context(), nil, fetcher.ReplayOptions{})
		checkDone(t, r)
		r = bound.Replay(t.Context(), nil, fetcher.ReplayOptions{Bundle: &fetcher.Bundle{}})
		checkDone(t, r)
	})
}

// Wait fails when the replay was stopped.
func TestReplayWaitAfterStop(t *testing.T) {
	m := blocktest.NewImage(t, 65, 600)
	w := newWorld(t, m, fetcher.Options{})
	w.origin.Set(blocktest.Faults{Hang: true})
	r := w.fetcher.From(w.origin).Replay(t.Context(), w.wants(t), fetcher.ReplayOptions{})
	r.Stop()
	if err := r.Wait(t.Context(), 1); err == nil || strings.Contains(err.Error(), "%!") {
		t.Errorf("%v", err)
	}
	if err := r.Wait(t.Context(), 0); err != nil {
		t.Errorf("Wait for nothing: %v", err)
	}
	w.origin.Set(blocktest.Faults{})
}

// A chunk that a small cache has evicted again counts as prefetched.
func TestReplayInASmallCache(t *testing.T) {
	m := blocktest.NewImage(t, 66, 2000)
	cache, err := blockmap.OpenCache(t.TempDir(), blockmap.CacheOptions{Quota: 400_000, FS: threads{blockmap.OS}}) // room for one chunk or two
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	w := &world{Image: m, origin: blocktest.NewOrigin(m), cache: cache, fetcher: fetcher.New(fetcher.Options{MaxRequest: 1, MaxRequests: 1})}
	defer w.fetcher.Close()
	wants := w.wants(t)
	r := w.fetcher.From(w.origin).Replay(t.Context(), wants, fetcher.ReplayOptions{})
	defer r.Stop()
	if err := r.Wait(t.Context(), 1); err != nil {
		t.Errorf("%v, %+v", err, r.Progress())
	}
}
