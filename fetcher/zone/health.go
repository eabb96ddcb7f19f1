package zone

import (
	"math/rand/v2"
	"slices"
	"time"
)

// health is what a Router knows about one peer. It does no locking.
type health struct {
	active int // requests in flight

	fails   int       // failures in a row
	absents int       // answers in a row that it has nothing
	slow    int       // requests in a row for which another source was quicker
	rest    time.Time // it is not asked before this, after failures
	spare   time.Time // it is not asked before this, because it said so
	wrong   int       // answers with wrong bytes, in all
	shun    time.Time // it is not asked before this, after wrong bytes
	trial   time.Time // after failures, one request finds out whether it works; until then, no other does

	served, bytes, failed, busy int64
	latency                     latencies
}

const (
	restFirst, restMost   = 500 * time.Millisecond, 2 * time.Minute // after a failure; twice as long with each
	restLeast             = 100 * time.Millisecond                  // of what is drawn at random from that
	refusedRest           = 30 * time.Second                        // at least, after a refusal: a person must act
	shunFirst, shunMost   = 10 * time.Minute, 24 * time.Hour        // after wrong bytes; four times as long with each
	spareFirst, spareMost = 250 * time.Millisecond, 15 * time.Second
	trialFor              = 5 * time.Second
	maxAbsents            = 16 // an owner that never has anything is of no use
	maxSlow               = 3  // requests in a row that were overtaken
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

// ended records the outcome of a request. rng draws the pauses.
func (h *health) ended(o Outcome, now time.Time, rng *rand.Rand) {
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
			h.fail(now, 0, rng)
		}
	case Slow:
		// In a trial once is enough.
		if h.slow++; h.slow >= maxSlow || h.fails > 0 {
			h.slow = 0
			h.fail(now, 0, rng)
		}
	case Late, Broken:
		h.fail(now, 0, rng)
	case Refused:
		h.fail(now, refusedRest, rng)
	case Wrong:
		h.failed++
		h.wrong++
		h.shun = later(h.shun, now.Add(min(shunFirst<<min(2*(h.wrong-1), 20), shunMost)))
	case Cancelled:
		h.trial = time.Time{} // another request is the trial
	}
}

// fail begins a rest. Requests that were in flight together fail together, once.
func (h *health) fail(now time.Time, least time.Duration, rng *rand.Rand) {
	h.failed++
	h.trial = time.Time{}
	if now.Before(h.rest) {
		return
	}
	h.fails++
	d := min(restFirst<<min(h.fails-1, 16), restMost)
	h.rest = now.Add(max(least, restLeast) + rand64(rng, d))
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
