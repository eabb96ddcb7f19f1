package nbd

import (
	"runtime"
	"sync/atomic"
	"time"
)

// pace decides how a socket waits for a client that sends its requests one at a
// time: parked, which frees the processor, or spinning for a moment, which
// saves two wake-ups. Where processors are idle, waking one costs more than the
// client takes to ask again, and spinning wins by a third; where they are busy
// the client may be waiting for the very processor that spins. So both are
// measured, and the one after which the next request has come sooner is taken.
type pace struct {
	spinners *atomic.Int32 // of the server, at most half the processors

	lone    int              // reads in a row that had to wait and brought one request
	mean    [2]time.Duration // of the waits, by mode; 0: never tried
	waits   int
	mode    waitMode // of the wait at hand
	began   time.Time
	waiting bool
}

type waitMode int

const (
	parked waitMode = iota
	spinning
)

const (
	loneReads = 16                     // so many in a row are a client of depth 1
	spinTime  = 20 * time.Microsecond  // what a spin lasts at most
	spinWorth = 100 * time.Microsecond // waits longer than this are not worth a spin
	tryOther  = 32                     // one wait in so many is in the mode that seems worse
)

// begin starts a wait and reports whether to spin. The caller calls spun when
// it has, and end when the wait is over.
func (p *pace) begin() (spin bool) {
	p.waiting = true
	if p.lone < loneReads {
		return false // requests gather while we sleep, and are answered together
	}
	p.began = time.Now()
	p.waits++
	p.mode = parked
	if p.mean[parked] == 0 || p.mean[parked] > spinWorth {
		return false
	}
	if p.mean[spinning] < min(p.mean[parked], spinTime) { // most spins end with a request
		p.mode = spinning
	}
	if p.waits%tryOther == 0 {
		p.mode = 1 - p.mode
	}
	if p.mode == spinning && int(p.spinners.Add(1)) > runtime.GOMAXPROCS(0)/2 {
		p.spinners.Add(-1)
		p.mode = parked
	}
	return p.mode == spinning
}

// more reports whether the spin may go on.
func (p *pace) more() bool { return time.Since(p.began) < spinTime }

func (p *pace) spun() { p.spinners.Add(-1) }

// end notes how long the wait has been, if there was one, and whether it was
// for a request that came alone.
func (p *pace) end(alone bool) {
	if !p.waiting || !alone {
		p.waiting, p.lone = false, 0
		return
	}
	p.waiting = false
	if p.lone < loneReads {
		p.lone++
		return
	}
	wait := min(time.Since(p.began), 10*spinWorth) // a pause says nothing more
	if m := &p.mean[p.mode]; *m == 0 {
		*m = max(wait, 1)
	} else {
		*m += (wait - *m) / 8
	}
}
