package fetcher_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// mirrored is an origin with a mirror that is asked first.
type mirrored struct {
	mirror, origin *blocktest.Origin
}

func (m mirrored) OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error) {
	return m.mirror.OpenRange(ctx, blob, off, n)
}

func (m mirrored) OpenRangeElsewhere(ctx context.Context, blob blockmap.Digest, off, n int64, avoid string) (io.ReadCloser, error) {
	if avoid == m.origin.Name {
		return m.mirror.OpenRange(ctx, blob, off, n)
	}
	return m.origin.OpenRange(ctx, blob, off, n)
}

func newMirrored(m *blocktest.Image) mirrored {
	x := mirrored{blocktest.NewOrigin(m), blocktest.NewOrigin(m)}
	x.mirror.Name, x.origin.Name = "mirror", "origin"
	return x
}

// However slow the first request is, another source brings the chunk in a few seconds.
func TestSlowTryIsOvertaken(t *testing.T) {
	// At 100 KB/s the smaller chunks arrive in time.
	m := large(t, 30, 1<<20)
	for name, fault := range map[string]blocktest.Faults{
		"no answer":    {Mute: true},
		"no bytes":     {Hang: true},
		"1 B/s":        {Trickle: 1},
		"2 KB/s":       {Trickle: 2000},
		"100 KB/s":     {Trickle: 100_000},
		"wrong, later": {Trickle: 100_000, Flip: true},
	} {
		for _, others := range []string{"a mirror", "another image's origin"} {
			t.Run(name+", "+others, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, m, fetcher.Options{MaxRequest: 1})
					wants := w.wants(t)[1:]
					x := newMirrored(m)
					x.mirror.Set(fault)
					x.origin.Set(blocktest.Faults{Delay: 20 * time.Millisecond})
					var o fetcher.Origin = x
					if others != "a mirror" {
						o = x.mirror
					}
					bound := w.fetcher.From(o)
					var readers sync.WaitGroup
					for _, one := range apart(wants[:5]) {
						readers.Go(func() {
							began := time.Now()
							if err := bound.Fetch(t.Context(), one); err != nil || time.Since(began) > 5*time.Second {
								t.Errorf("it took %v: %v", time.Since(began), err)
							}
						})
					}
					synctest.Wait()
					for _, one := range apart(wants[:5]) {
						if others != "a mirror" {
							readers.Go(func() {
								if err := w.fetcher.From(x.origin).Fetch(t.Context(), one); err != nil {
									t.Error(err)
								}
							})
						}
					}
					readers.Wait()
					synctest.Wait()
					if n := x.mirror.Alive() + x.origin.Alive(); n != 0 {
						t.Errorf("%d requests continue", n)
					}
					if st := w.fetcher.Stats(); st.Overtaken < 4 || st.Extra < 4 || st.Cancelled < 4 || st.Failed != 0 || st.InFlight != 0 {
						t.Errorf("%+v", st)
					}
					if others != "a mirror" {
						return
					}
					// The client avoids the overtaken server for a while.
					began := time.Now()
					if err := bound.Fetch(t.Context(), wants[10:11]); err != nil {
						t.Error(err)
					}
					if took := time.Since(began); took > 100*time.Millisecond && !fault.Mute {
						t.Errorf("the next one took %v", took)
					}
				})
			})
		}
	}
}

// If there is only one origin and it does not answer a request, another request to it is
// made.
func TestOneOriginIsAskedAgain(t *testing.T) {
	m := blocktest.NewImage(t, 150, 2000)
	for name, fault := range map[string]blocktest.Faults{"no answer": {Mute: true, Left: 1}, "no bytes": {Hang: true, Left: 1}, "1 B/s": {Trickle: 1, Left: 1}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, m, fetcher.Options{})
				w.origin.Set(fault)
				began := time.Now()
				if err := w.fetcher.From(w.origin).Fetch(t.Context(), w.wants(t)[:1]); err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("it took %v", took)
				}
			})
		})
	}
}

// A reader waits for RetryFor at most, whatever the origin does.
func TestReadersTimeIsBounded(t *testing.T) {
	m := large(t, 30, 1<<20)
	for name, fault := range map[string]blocktest.Faults{
		"no answer": {Mute: true}, "no bytes": {Hang: true}, "1 B/s": {Trickle: 1}, "2 KB/s": {Trickle: 2000}, "errors": {Err: blocktest.ErrInjected},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, m, fetcher.Options{MaxRequests: 4, MaxRequest: 1})
				w.origin.Set(fault)
				bound := w.fetcher.From(w.origin)
				var readers sync.WaitGroup
				for _, one := range apart(w.wants(t)) { // some of them are queued all the time
					readers.Go(func() {
						began := time.Now()
						err := bound.Fetch(t.Context(), one)
						// At 2 KB/s the smallest chunks take little more than that.
						if took := time.Since(began); took > 34*time.Second {
							t.Errorf("after %v: %v", took, err)
						}
					})
				}
				readers.Wait()
				synctest.Wait()
				if n := w.origin.Alive(); n != 0 || w.fetcher.Stats().Failed < 15 {
					t.Errorf("%d requests continue, %+v", n, w.fetcher.Stats())
				}
				// The next read tries again.
				w.origin.Set(blocktest.Faults{})
				if err := bound.Fetch(t.Context(), w.wants(t)); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// On a link that is slow and busy no extra requests are made and no chunk is given up,
// however long it takes.
func TestSlowLinkIsWaitedFor(t *testing.T) {
	m := large(t, 60, 1<<20)
	synctest.Test(t, func(t *testing.T) {
		o := &far{wire: newWire(400e3, 20*time.Millisecond, 128<<10), ranges: 1}
		w, bound, wants := o.world(t, m)
		defer w.fetcher.Close()
		var readers sync.WaitGroup
		began := time.Now()
		for _, one := range apart(wants) {
			readers.Go(func() {
				if err := bound.Fetch(t.Context(), one); err != nil {
					t.Errorf("after %v: %v", time.Since(began), err)
				}
			})
		}
		readers.Wait()
		took, line := time.Since(began), time.Duration(float64(m.Index.Streams[1].BlobSize)/400e3*float64(time.Second))
		if took > line+line/5 {
			t.Errorf("it took %v, and the link's time is %v", took, line)
		}
	})
}

// Extra requests are bounded: a few at once, and a tenth of all.
func TestExtraRequestsAreBounded(t *testing.T) {
	m := blocktest.NewImage(t, 151, 8000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1})
		x := newMirrored(m)
		x.mirror.Set(blocktest.Faults{Mute: true})
		x.origin.Set(blocktest.Faults{Mute: true})
		bound := w.fetcher.From(x)
		var readers sync.WaitGroup
		for _, one := range apart(w.wants(t)) {
			readers.Go(func() { bound.Fetch(t.Context(), one) })
		}
		for range 60 {
			time.Sleep(time.Second)
			if n := x.origin.Alive(); n > 8 {
				t.Fatalf("%d extra requests at once", n)
			}
		}
		readers.Wait()
		if st := w.fetcher.Stats(); st.Extra > 16+st.Requests/10+8 || st.Extra == 0 {
			t.Errorf("%+v", st)
		}
	})
}

// No extra request is made for a prefetch.
func TestPrefetchIsNotAskedForTwice(t *testing.T) {
	m := blocktest.NewImage(t, 152, 1000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1})
		x := newMirrored(m)
		x.mirror.Set(blocktest.Faults{Mute: true})
		r := w.fetcher.From(x).Replay(t.Context(), w.wants(t), fetcher.ReplayOptions{})
		time.Sleep(10 * time.Second)
		if n := x.origin.Requests(); n != 0 {
			t.Errorf("%d extra requests", n)
		}
		// A reader of one of its chunks does not wait for long.
		if d := w.fetch(t, w.wants(t)[0]); d > 5*time.Second {
			t.Errorf("it took %v", d)
		}
		// The replay ends in bounded time, whatever hangs.
		if err := r.Wait(t.Context(), 1); err == nil {
			t.Error("the prefetched chunk has not arrived")
		}
		r.Stop()
	})
}

// If the extra request fails, the first one goes on, and the other way round.
func TestOneOfSeveralTriesFails(t *testing.T) {
	m := blocktest.NewImage(t, 153, 1000)
	for name, fault := range map[string]blocktest.Faults{
		"error": {Err: blocktest.ErrInjected}, "wrong": {Flip: true}, "cut": {Cut: true}, "gone": {Err: errGone},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, m, fetcher.Options{Temporary: func(err error) bool { return !errors.Is(err, errGone) }})
				x := newMirrored(m)
				x.mirror.Set(blocktest.Faults{Delay: 6 * time.Second}) // it arrives late
				x.origin.Set(fault)
				began := time.Now()
				if err := w.fetcher.From(x).Fetch(t.Context(), w.wants(t)[:1]); err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took < 5*time.Second || took > 7*time.Second {
					t.Errorf("it took %v", took)
				}
				if st := w.fetcher.Stats(); st.Failed != 0 || st.Overtaken != 0 {
					t.Errorf("%+v", st)
				}
			})
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, m, fetcher.Options{Temporary: func(err error) bool { return !errors.Is(err, errGone) }})
				x := newMirrored(m)
				f := fault
				f.Delay = 3 * time.Second // while the extra request is in flight
				x.mirror.Set(f)
				x.origin.Set(blocktest.Faults{Delay: 2 * time.Second})
				began := time.Now()
				if err := w.fetcher.From(x).Fetch(t.Context(), w.wants(t)[:1]); err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("it took %v", took)
				}
			})
		})
	}
}

// A request whose demanded chunk an extra request has brought goes on for its other
// chunks.
func TestRestOfAnOvertakenRequest(t *testing.T) {
	m := long(t, 40)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		x := newMirrored(m)
		x.mirror.Set(blocktest.Faults{Delay: 10 * time.Second})
		bound, wants := w.fetcher.From(x), w.wants(t)[1:]
		r := bound.Replay(t.Context(), wants, fetcher.ReplayOptions{})
		synctest.Wait()
		began := time.Now()
		if err := bound.Fetch(t.Context(), wants[3:4]); err != nil || time.Since(began) > 3*time.Second {
			t.Errorf("it took %v: %v", time.Since(began), err)
		}
		checkDone(t, r)
		for a, n := range x.mirror.Asked() {
			if n != 1 {
				t.Errorf("%v was asked for %d times", a, n)
			}
		}
		if n := x.origin.Requests(); n != 1 {
			t.Errorf("%d extra requests", n)
		}
		if st := w.fetcher.Stats(); st.Chunks != int64(len(wants)) {
			t.Errorf("%d chunks were brought, of %d", st.Chunks, len(wants))
		}
	})
}

// A fetch ends when all its readers have left.
func TestReadersLeave(t *testing.T) {
	m := blocktest.NewImage(t, 160, 4000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1, MaxRequests: 8})
		w.origin.Set(blocktest.Faults{Mute: true})
		bound, wants := w.fetcher.From(w.origin), w.wants(t)
		ctx, cancel := context.WithCancel(t.Context())
		var readers sync.WaitGroup
		for range 3 { // readers of each
			for _, one := range apart(wants) {
				readers.Go(func() {
					if err := bound.Fetch(ctx, one); !errors.Is(err, context.Canceled) {
						t.Error(err)
					}
				})
			}
		}
		time.Sleep(time.Second)
		if n := w.origin.Alive(); n != 8 {
			t.Errorf("%d requests", n)
		}
		cancel()
		readers.Wait()
		synctest.Wait()
		if n := w.origin.Alive(); n != 0 {
			t.Errorf("%d requests continue", n)
		}
		if st := w.fetcher.Stats(); st.InFlight != 0 || st.Failed != 0 || st.Cancelled == 0 {
			t.Errorf("%+v", st)
		}
		// A reader that comes back starts anew.
		w.origin.Set(blocktest.Faults{Delay: time.Millisecond})
		if d := w.fetch(t, wants[0]); d > 2*time.Millisecond {
			t.Errorf("it took %v", d)
		}
	})
}

// A reader that leaves takes nothing from those that stay: other readers, a replay, a
// duplicate, other chunks of the request.
func TestOneReaderLeaves(t *testing.T) {
	m := blocktest.NewImage(t, 161, 1500)
	l := long(t, 40)
	leave := func(t *testing.T, m *blocktest.Image, also func(w *world, b *fetcher.Bound, first blockmap.Want) func() error, first func(w *world) []blockmap.Want) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, m, fetcher.Options{})
			w.origin.Set(blocktest.Faults{Delay: 3 * time.Second})
			bound := w.fetcher.From(w.origin)
			wants := first(w)
			ctx, cancel := context.WithCancel(t.Context())
			left := make(chan error)
			go func() { left <- bound.Fetch(ctx, wants) }()
			synctest.Wait()
			stay := make(chan error)
			wait := also(w, bound, wants[0])
			go func() { stay <- wait() }()
			time.Sleep(time.Second)
			cancel()
			if err := <-left; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			began := time.Now()
			if err := <-stay; err != nil || time.Since(began) > 2100*time.Millisecond {
				t.Errorf("the reader that stayed waited for %v more: %v", time.Since(began), err)
			}
			synctest.Wait()
			if n := w.origin.Requests(); n != 1 || w.origin.Alive() != 0 {
				t.Errorf("%d requests, %d continue", n, w.origin.Alive())
			}
		})
	}
	shared := func(w *world) []blockmap.Want { return w.shared(t)[:1] }
	t.Run("another reader", func(t *testing.T) {
		leave(t, m, func(w *world, b *fetcher.Bound, x blockmap.Want) func() error {
			return func() error { return b.Fetch(context.Background(), []blockmap.Want{x}) }
		}, shared)
	})
	t.Run("the same content", func(t *testing.T) {
		leave(t, m, func(w *world, b *fetcher.Bound, x blockmap.Want) func() error {
			return func() error { return b.Fetch(context.Background(), w.shared(t)[1:]) }
		}, shared)
	})
	t.Run("a replay", func(t *testing.T) {
		leave(t, m, func(w *world, b *fetcher.Bound, x blockmap.Want) func() error {
			r := b.Replay(context.Background(), []blockmap.Want{x}, fetcher.ReplayOptions{})
			return func() error { defer r.Stop(); return r.Wait(context.Background(), 1) }
		}, shared)
	})
	t.Run("the same request", func(t *testing.T) {
		leave(t, l, func(w *world, b *fetcher.Bound, x blockmap.Want) func() error {
			return func() error { return b.Fetch(context.Background(), w.wants(t)[5:6]) }
		}, func(w *world) []blockmap.Want { return w.wants(t)[1:20] })
	})
}

// When all readers of a content have left, its request ends, whichever leaves first.
func TestReadersOfDuplicatesLeave(t *testing.T) {
	m := blocktest.NewImage(t, 162, 600)
	for _, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 2, 0}} {
		t.Run(fmt.Sprint(order), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, m, fetcher.Options{})
				w.origin.Set(blocktest.Faults{Hang: true})
				bound, places := w.fetcher.From(w.origin), w.shared(t)
				var cancels []context.CancelFunc
				var readers sync.WaitGroup
				for i := range places {
					ctx, cancel := context.WithCancel(t.Context())
					cancels = append(cancels, cancel)
					readers.Go(func() { bound.Fetch(ctx, places[i:i+1]) })
					synctest.Wait()
				}
				for i, n := range order {
					if alive := w.origin.Alive(); alive != 1 {
						t.Errorf("%d requests before %d left", alive, i)
					}
					cancels[n]()
					synctest.Wait()
				}
				readers.Wait()
				if n := w.origin.Alive(); n != 0 || w.origin.Requests() != 1 {
					t.Errorf("%d requests of %d continue", n, w.origin.Requests())
				}
				w.origin.Set(blocktest.Faults{})
				w.fetch(t, places[1])
			})
		})
	}
}

// Readers that come and go while everything hangs leave nothing behind.
func TestComingAndGoing(t *testing.T) {
	m := blocktest.NewImage(t, 163, 2000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequests: 4})
		w.origin.Set(blocktest.Faults{Mute: true})
		bound, wants := w.fetcher.From(w.origin), w.wants(t)
		l := w.bundle(t, wants[:20])
		l.let(l.ends[2], nil)
		ctx, stop := context.WithCancel(t.Context())
		r := bound.Replay(ctx, wants, fetcher.ReplayOptions{Bundle: &l.Bundle})
		for i := range 2000 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i%7)*100*time.Millisecond)
			bound.Fetch(ctx, wants[i*13%len(wants):][:1])
			cancel()
		}
		if n := w.fetcher.Queued(bound); n > 200 {
			t.Errorf("%d are queued", n)
		}
		stop()
		r.Stop()
		time.Sleep(2 * time.Second)
		if n, fetches := w.fetcher.Queued(bound), w.fetcher.Fetches(); fetches != 0 || w.origin.Alive() != 0 {
			t.Errorf("%d are queued, %d in flight, %d requests continue", n, fetches, w.origin.Alive())
		}
		w.origin.Set(blocktest.Faults{})
		if err := bound.Fetch(t.Context(), wants); err != nil {
			t.Error(err)
		}
	})
}
