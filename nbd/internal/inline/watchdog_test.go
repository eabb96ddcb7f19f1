package inline

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A request that takes long is taken over: after one to two times the patience where something
// waits for it, when something begins to wait, and after maxLooks at last.
func TestWatchdog(t *testing.T) {
	const patience = time.Millisecond
	for name, c := range map[string]struct {
		takes, waits time.Duration // from the begin of the request; waits <0: never
		from, to     time.Duration // when it is taken over; to 0: never
	}{
		"a short one":               {takes: patience / 2, waits: 0},
		"a long one":                {takes: time.Hour, waits: 0, from: patience, to: 2 * patience},
		"nobody waits":              {takes: 20 * patience, waits: -1},
		"somebody begins to wait":   {takes: time.Hour, waits: 20 * patience, from: 20 * patience, to: 21 * patience},
		"nobody waits, for so long": {takes: time.Hour, waits: -1, from: maxLooks * patience, to: (maxLooks + 1) * patience},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var began time.Time
				var taken atomic.Int64
				w := &Watchdog{Patience: patience, TakeOver: func() { taken.Store(int64(time.Since(began))) }}
				w.Waits = func() bool { return c.waits >= 0 && time.Since(began) >= c.waits }
				for range 10 { // short ones before it
					n := w.Begin()
					time.Sleep(patience / 7)
					if !w.End(n) {
						t.Fatal("a short request was taken over")
					}
				}
				began = time.Now()
				n := w.Begin()
				time.Sleep(c.takes)
				mine := w.End(n)
				at := time.Duration(taken.Load())
				if mine != (c.to == 0) || at < c.from || at > c.to {
					t.Errorf("it was taken over after %v: want %v to %v; End says %v", at, c.from, c.to, mine)
				}
				w.Stop()
			})
		})
	}
}

// Without requests, a watchdog has no timer; with requests again, it looks again.
func TestWatchdogRests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var taken atomic.Int64
		w := &Watchdog{Patience: time.Millisecond, TakeOver: func() { taken.Add(1) }}
		for round := range 3 {
			if !w.End(w.Begin()) {
				t.Fatal("a short request was taken over")
			}
			time.Sleep(time.Second)
			if w.armed.Load() {
				t.Error("it looks although there are no requests")
			}
			n := w.Begin()
			time.Sleep(time.Second)
			if got := taken.Load(); w.End(n) || got != int64(round)+1 {
				t.Errorf("round %d: %d requests were taken over", round, got)
			}
		}
		w.Stop()
		n := w.Begin()
		time.Sleep(time.Second)
		if !w.End(n) {
			t.Error("a request was taken over after Stop")
		}
	})
}

// End returns after TakeOver, which has counted the request as one in flight by then: whoever
// calls End is about to count it as ended.
func TestWatchdogEndsAfterTakeOver(t *testing.T) {
	began, ended := make(chan struct{}), make(chan struct{})
	w := &Watchdog{Patience: time.Millisecond}
	w.TakeOver = func() {
		close(began)
		select {
		case <-ended:
			t.Error("End has returned, and TakeOver has not")
		case <-time.After(50 * time.Millisecond):
		}
	}
	n := w.Begin()
	<-began
	if w.End(n) {
		t.Error("the request was not taken over")
	}
	close(ended)
	w.Stop()
}

// Exactly one of End and TakeOver has each request.
func TestWatchdogRace(t *testing.T) {
	var taken, ended atomic.Int64
	w := &Watchdog{Patience: 10 * time.Microsecond, TakeOver: func() { taken.Add(1) }}
	const requests = 3000
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range requests {
			n := w.Begin()
			time.Sleep(time.Duration(i%40) * time.Microsecond)
			if w.End(n) {
				ended.Add(1)
			}
		}
	})
	wg.Wait()
	w.Stop()
	if taken.Load()+ended.Load() != requests {
		t.Errorf("%d requests were taken over and %d ended, of %d", taken.Load(), ended.Load(), requests)
	}
	if taken.Load() == 0 || ended.Load() == 0 {
		t.Errorf("%d requests were taken over and %d ended: this tests nothing", taken.Load(), ended.Load())
	}
}
