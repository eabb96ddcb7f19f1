package nbd

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// pace takes the mode after which requests come sooner, and changes its mind
// when that changes.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var spinners atomic.Int32
		p := pace{spinners: &spinners}
		run := func(whenParked, whenSpinning time.Duration) (spins int) {
			for range 1000 {
				d := whenParked
				if p.begin() {
					spins++
					d = whenSpinning
					p.spun()
				}
				time.Sleep(d)
				p.end(true)
			}
			return spins
		}
		const us = time.Microsecond
		for _, test := range []struct {
			parked, spinning time.Duration
			min, max         int
		}{
			{30 * us, 10 * us, 900, 1000}, // idle processors
			{10 * us, 15 * us, 10, 500},   // busy ones
			{30 * us, 10 * us, 500, 1000}, // idle again
			{time.Second, us, 0, 100},     // a client with time
		} {
			if n := run(test.parked, test.spinning); n < test.min || n > test.max {
				t.Errorf("parked %v, spinning %v: %d of 1000 waits spin", test.parked, test.spinning, n)
			}
		}
		if n := spinners.Load(); n != 0 {
			t.Errorf("%d spinners left", n)
		}

		// Not for a client that has more than one request in flight.
		for range 1000 {
			p.end(false)
			if p.begin() {
				t.Fatal("spins for a deep queue")
			}
			p.end(true)
		}

		// No more than half the processors.
		run(30*us, 10*us)
		spinners.Store(1000)
		if p.begin() {
			t.Error("spins beside a thousand")
		}
		if n := spinners.Load(); n != 1000 {
			t.Errorf("%d spinners", n)
		}
	})
}
