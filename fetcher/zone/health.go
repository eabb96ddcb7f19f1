package zone

import (
	"math/rand/v2"
	"slices"
	"time"
)

// health is what a Router knows about one peer. It does no locking.
type health struct {
	active int       // requests in flight
	signed int       // of these, those that have given a sign of life
	asked  time.Time // when the oldest of the others was sent, about
	sign   time.Time // the last first sign of a request

	fails   int       // failures in a row
	absents int       // answers in a row that it has nothing
	slow    int       // requests in a row for which another source was quicker
	rest    time.Time // it is not asked before this, after failures
	spare   time.Time // it is not asked before this, because it said so
	wrong   int       // answers with wrong bytes, in all
	shun    time.Time // it is not asked before this, after wrong bytes
	trial   time.Time // after failures, one request finds out whether it works; until then, no other does
	silent  bool      // the last failure was that it gave no sign of life
	doubted time.Time // when it last sent wrong bytes that it could not verify
	doubts  int       // how often in a row, with less than shunFirst in between
	doubt   int64     // in all

	served, bytes, failed, busy int64
	latency                     latencies
}

const (
	restFirst, restMost   = 500 * time.Millisecond, 2 * time.Minute // after a failure; twice as long with each
	restLeast             = 100 * time.Millisecond                  // of what is drawn at random from that
	silentRest            = 2 * time.Second                         // at least, after silence; a sign of life ends it
	refusedRest           = 30 * time.Second                        // at least, after a refusal: a person must act
	shunFirst, shunMost   = 10 * time.Minute, 24 * time.Hour        // after wrong bytes; four times as long with each
	spareFirst, spareMost = 250 * time.Millisecond, 15 * time.Second
	trialFor              = 5 * time.Second
	maxAbsents            = 16 // an owner that never has anything is of no use
	maxSlow               = 3  // requests in a row that were overtaken
	maxDoubts             = 4  // wrong pieces until a peer is distrusted
)

// usable reports whether the peer may be asked. After a failure it may be asked by one
// request at a time until one is answered; usable counts that request.
func (h *health) usable(now time.Time) bool {
	if now.Before(h.shun) || now.Before(h.rest) || now.Before(h.spare) {
		return false
	}
	if h.fails > 0 {
		if now.Before(h.trial) {
			return false
		}
		h.trial = now.Add(trialFor)
	}
	return true
}

// ended records the outcome of a request, and reports whether a rest begins because the
// peer could not be reached. rng draws the pauses.
func (h *health) ended(o Outcome, now time.Time, rng *rand.Rand) (unreached bool) {
	switch o.Result {
	case Served:
		h.served++
		h.bytes += o.Bytes
		h.fails, h.absents, h.slow, h.trial = 0, 0, 0, time.Time{}
		h.latency.add(o.Took)
	case Busy:
		h.busy++
		h.fails, h.slow, h.trial = 0, 0, time.Time{} // it works
		if len(o.Holders) == 0 {
			// All requests are too many for it, and not only those for one run.
			d := min(max(o.RetryAfter, spareFirst), spareMost)
			h.spare = later(h.spare, now.Add(d/2+rand64(rng, d/2)))
		}
	case Absent:
		h.fails, h.slow, h.trial = 0, 0, time.Time{}
		if h.absents++; h.absents >= maxAbsents {
			h.absents = 0
			h.rests(now, 0, rng)
		}
	case Slow:
		// In a trial once is enough.
		if h.slow++; h.slow >= maxSlow || h.fails > 0 {
			h.slow = 0
			h.rests(now, 0, rng)
		}
	case Late, Broken:
		if o.Result == Late && o.Bytes == 0 { // silence, also if it has given signs before
			unreached = h.rests(now, silentRest, rng)
			h.silent = h.silent || unreached
			return unreached
		}
		return h.rests(now, 0, rng) && o.Silent
	case Refused:
		h.rests(now, refusedRest, rng)
	case Wrong:
		h.failed++
		h.wrong++
		h.shun = later(h.shun, now.Add(min(shunFirst<<min(2*(h.wrong-1), 20), shunMost)))
	case Cancelled:
		h.trial = time.Time{} // another request is the trial
	}
	return false
}

// rests begins a rest after a failure, and reports whether it does. Requests that were in
// flight together fail together, once.
func (h *health) rests(now time.Time, least time.Duration, rng *rand.Rand) bool {
	h.failed++
	h.trial = time.Time{}
	if now.Before(h.rest) {
		return false
	}
	h.fails++
	h.silent = false
	d := min(restFirst<<min(h.fails-1, 16), restMost)
	h.rest = now.Add(max(least, restLeast) + rand64(rng, d))
	return true
}

// revived ends the rest of a peer that was silent for too long, and works.
func (h *health) revived() {
	if h.silent {
		h.silent, h.fails, h.rest, h.trial = false, 0, time.Time{}, time.Time{}
	}
}

// mistaken records wrong bytes that the peer could not verify.
func (h *health) mistaken(now time.Time, rng *rand.Rand) {
	if now.Sub(h.doubted) >= shunFirst {
		h.doubts = 0
	}
	h.doubted = now
	h.doubt++
	if h.doubts++; h.doubts >= maxDoubts {
		h.doubts = 0
		h.ended(Outcome{Result: Wrong}, now, rng)
		return
	}
	h.rests(now, 0, rng)
}

func rand64(rng *rand.Rand, d time.Duration) time.Duration {
	return time.Duration(rng.Int64N(int64(d) + 1))
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// State says how a peer is treated.
type State string

const (
	Working    State = "working"
	Resting    State = "resting"    // after failures
	Spared     State = "spared"     // because it is busy
	Distrusted State = "distrusted" // after wrong bytes
)

// state returns how the peer is treated, and until when.
func (h *health) state(now time.Time) (State, time.Time) {
	switch {
	case now.Before(h.shun):
		return Distrusted, h.shun
	case now.Before(h.rest):
		return Resting, h.rest
	case now.Before(h.spare):
		return Spared, h.spare
	}
	return Working, time.Time{}
}

// latencies are how long the last requests took.
type latencies struct {
	last [32]uint32 // in microseconds, as a ring
	n    int
	high time.Duration // their 95th percentile; 0 before there are enough
}

const leastSamples = 8

func (l *latencies) add(took time.Duration) {
	l.last[l.n%len(l.last)] = uint32(min(max(took.Microseconds(), 1), 1<<31))
	l.n++
	if l.n < leastSamples {
		return
	}
	sorted := l.last
	s := sorted[:min(l.n, len(sorted))]
	slices.Sort(s)
	l.high = time.Duration(s[(len(s)*95+99)/100-1]) * time.Microsecond
}
