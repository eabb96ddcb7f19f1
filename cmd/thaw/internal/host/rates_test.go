package host

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// Rates are averages over ten seconds, whichever caller asks for them and when.
func TestRates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n atomic.Int64
		m := startMeter(func() moved {
			v := n.Load()
			return moved{fetched: v, requests: v / 10, sent: 2 * v, reads: 3 * v}
		})
		defer m.stop()
		if r := m.rates(); r != (Rates{}) {
			t.Errorf("at the start: %+v", r)
		}
		pass := func(d time.Duration, perSecond int64) {
			for range d / (100 * time.Millisecond) {
				time.Sleep(100 * time.Millisecond)
				n.Add(perSecond / 10)
			}
			time.Sleep(time.Millisecond)
			synctest.Wait()
		}
		near := func(what string, got, want float64) {
			t.Helper()
			if got < want*0.98-1 || got > want*1.02+1 {
				t.Errorf("%s: %v instead of %v", what, got, want)
			}
		}
		pass(500*time.Millisecond, 1000)
		r := m.rates()
		near("seconds, after half a second", 100*r.Seconds, 50)
		near("fetched, after half a second", r.Fetched, 1000)
		pass(30*time.Second, 1000)
		r = m.rates()
		near("seconds", r.Seconds, 10)
		near("fetched", r.Fetched, 1000)
		near("requests", r.Requests, 100)
		near("sent", r.Sent, 2000)
		near("reads", r.Reads, 3000)
		pass(5*time.Second, 0)
		near("fetched, half of the time", m.rates().Fetched/100, 5)
		pass(6*time.Second, 0)
		if r := m.rates(); r.Fetched != 0 || r.Sent != 0 {
			t.Errorf("after silence: %+v", r)
		}
		if len(m.mu.samples) > 12 {
			t.Errorf("%d samples are kept", len(m.mu.samples))
		}
	})
}
