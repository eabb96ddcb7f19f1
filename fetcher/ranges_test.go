package fetcher_test

import (
	"errors"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// scattered is every third chunk, in random order, so that few have neighbours.
func scattered(wants []blockmap.Want) (some []blockmap.Want) {
	for i := 0; i < len(wants); i += 3 {
		some = append(some, wants[i])
	}
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(some), func(i, j int) { some[i], some[j] = some[j], some[i] })
	return some
}

// fetchAll replays wants from an origin to their end.
func (w *world) fetchAll(t *testing.T, o fetcher.Origin, wants []blockmap.Want) {
	t.Helper()
	r := w.fetcher.From(o).Replay(t.Context(), wants, fetcher.ReplayOptions{})
	if err := r.Wait(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	r.Stop()
	if n := resident(wants); n != len(wants) {
		t.Errorf("%d of %d chunks are resident", n, len(wants))
	}
}

// If an origin gives several ranges in one answer, prefetches need fewer requests, and each
// chunk still comes once.
func TestRangesShareRequests(t *testing.T) {
	m := blocktest.NewImage(t, 80, 6000)
	synctest.Test(t, func(t *testing.T) {
		requests := make(map[int]int)
		for _, ranges := range []int{1, 16} {
			w := newWorld(t, m, fetcher.Options{})
			w.origin.GiveRanges(ranges)
			wants := scattered(w.wants(t))
			w.fetchAll(t, w.origin, wants)
			for a, n := range w.origin.Asked() {
				if n != 1 {
					t.Errorf("%v was asked for %d times", a, n)
				}
			}
			requests[ranges] = w.origin.Requests()
			if st := w.fetcher.Stats(); st.Requests != int64(requests[ranges]) || st.Retries != 0 {
				t.Errorf("%d requests: %+v", requests[ranges], st)
			}
			w.checkAll(t)
		}
		if requests[16] > requests[1]/2 {
			t.Errorf("%d requests for one range each, %d for several", requests[1], requests[16])
		}
	})
}

// A demand does not share a request with other ranges, whatever is queued.
func TestDemandSharesNoRanges(t *testing.T) {
	m := blocktest.NewImage(t, 81, 3000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequests: 2})
		w.origin.GiveRanges(16)
		w.origin.Set(blocktest.Faults{Delay: time.Second})
		wants := scattered(w.wants(t))
		last := wants[len(wants)-1]
		w.fetcher.From(w.origin).Prefetch(wants)
		synctest.Wait()
		if d := w.fetch(t, last); d > 2*time.Second {
			t.Errorf("a reader waited for %v", d)
		}
		c := last.Table.Chunks[last.Chunk]
		if n := w.origin.Asked()[blocktest.Asked{Blob: last.Table.Blob, Off: c.Offset, N: int64(c.Stored)}]; n != 1 {
			t.Errorf("the demanded chunk had no request of its own: %d", n)
		}
		time.Sleep(time.Hour)
		if n := resident(wants); n != len(wants) {
			t.Errorf("%d of %d chunks are resident", n, len(wants))
		}
	})
}

// forgetful is an origin that says that it gives several ranges, and then does not.
type forgetful struct{ *blocktest.Origin }

func (forgetful) Ranges() int { return 16 }

// Chunks that cannot be read as several ranges, or fail so, are read one by one.
func TestRangesFail(t *testing.T) {
	m := blocktest.NewImage(t, 82, 3000)
	for name, c := range map[string]struct {
		faults  blocktest.Faults
		forgets bool
	}{
		"not given": {forgets: true},
		"errors":    {faults: blocktest.Faults{Err: blocktest.ErrInjected, ErrEach: 2}},
		"cut":       {faults: blocktest.Faults{Cut: true, Left: 9}},
		"breaks":    {faults: blocktest.Faults{Break: blocktest.ErrInjected, Left: 9}},
		"lies":      {faults: blocktest.Faults{Flip: true, Left: 9}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, m, fetcher.Options{})
				var o fetcher.Origin = w.origin
				if c.forgets {
					o = forgetful{w.origin}
				} else {
					w.origin.GiveRanges(16)
				}
				w.origin.Set(c.faults)
				wants := scattered(w.wants(t))
				w.fetchAll(t, o, wants)
				w.checkAll(t)
				if st := w.stats(t); st.Failed != 0 || c.forgets != (st.Retries == 0) {
					t.Errorf("%+v", st)
				}
				if n := w.origin.Alive(); n != 0 {
					t.Errorf("%d bodies are open", n)
				}
			})
		})
	}
}

// Prefetches that were stopped are not asked for.
func TestRangesAreTakenBack(t *testing.T) {
	m := blocktest.NewImage(t, 83, 3000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequests: 2})
		w.origin.GiveRanges(16)
		w.origin.Set(blocktest.Faults{Delay: time.Second})
		wants := scattered(w.wants(t))
		r := w.fetcher.From(w.origin).Replay(t.Context(), wants, fetcher.ReplayOptions{})
		time.Sleep(1500 * time.Millisecond)
		asked := w.origin.Requests()
		r.Stop()
		time.Sleep(time.Hour)
		if n := w.origin.Requests(); n != asked || n == 0 {
			t.Errorf("%d requests when it was stopped, then %d", asked, n)
		}
		if err := r.Wait(t.Context(), 1); err == nil || errors.Is(err, blocktest.ErrInjected) {
			t.Error(err)
		}
	})
}
