package fetcher

import (
	"math"
	"time"
)

// pace finds the window of a source: how many compressed bytes of prefetches to have in
// flight. The window should be the smallest that keeps the link busy, because a larger
// one delays every chunk, including demanded ones.
//
// The window is what the link carries in two round trips, or in leastAhead if these are
// shorter: a start does not notice such a delay, and servers are slower than their
// link. The speed of the link is the highest that pace has recently measured. On a
// faster link the window is filled sooner than it should be, so the measured speed and
// the window grow.
type pace struct {
	most int64

	latency time.Duration // the shortest time from a request to its answer; 0 before the first
	began   time.Time     // when the round began; zero before its first bytes
	came    int64         // bytes that arrived in the round
	quiet   time.Time     // until when bytes say nothing about the link
	speed   float64       // bytes per second; 0 before the first round
}

const (
	firstWindow = 1 << 20   // before the speed is known
	leastWindow = 128 << 10 // on a slow link
	leastAhead  = 40 * time.Millisecond
	leastRound  = 20 * time.Millisecond // shorter ones say more about buffers than about the link
	decay       = 0.8                   // of the speed, after a slower round
)

func newPace(most int64) *pace { return &pace{most: most} }

// window returns how many bytes of prefetches to have in flight.
func (p *pace) window() int64 {
	if p.speed == 0 {
		return min(firstWindow, p.most)
	}
	return min(max(int64(p.speed*max(2*p.latency, leastAhead).Seconds()), leastWindow), p.most)
}

// wide returns the window, but at least firstWindow: on a slow link too, a few large
// requests cost a registry less than many small ones.
func (p *pace) wide() int64 { return min(max(p.window(), firstWindow), p.most) }

// run returns how many bytes a request for neighbours may have. Several such requests
// share the window.
func (p *pace) run() int64 { return min(p.wide()/2-min(p.wide(), firstWindow)/4, p.behind()) }

// ranges returns how many bytes a request for several ranges may have.
func (p *pace) ranges() int64 { return min(p.wide(), p.behind()) }

// behind returns how many bytes of a request a later demand may have to wait for: what
// the link carries in a quarter of a second.
func (p *pace) behind() int64 {
	if p.speed == 0 {
		return math.MaxInt64
	}
	return max(int64(p.speed/4), firstWindow/4)
}

// nearSeq is how far from its turn a prefetched chunk may be fetched, with firstWindow. It
// grows with the square of the window: on a link that is twice as fast, a chunk out of
// its turn delays others half as long, and a request that it saves is worth twice as
// many bytes.
const nearSeq = 8

// near returns how far from its turn a prefetched chunk may be fetched.
func (p *pace) near() int64 {
	return max(nearSeq*p.wide()/firstWindow*p.wide()/firstWindow, 1)
}

// requests returns how many requests for prefetches to have in flight, regardless of
// their size, because the link is idle for a round trip after each. Requests for
// several ranges have as many bytes as the window, and each delays demands, so there
// are fewer: in measurements with two the link was idle for a seventh of the time, with
// three for a sixteenth. On a slow link a round trip is short compared with the time
// that the bytes take.
func (p *pace) requests(ranges bool) int {
	n := 5
	if ranges {
		n = 3
	}
	if p.speed > 0 {
		n = min(n, max(int(p.speed/slowLink), 1))
	}
	return n
}

// slowLink is a speed in bytes per second. One more request pays for each multiple of
// it.
const slowLink = 2 << 20

// roundTrip returns how many bytes the link carries in a round trip; 0 until that is
// known.
func (p *pace) roundTrip() int64 { return int64(p.speed * max(p.latency, leastRound).Seconds()) }

// answered records the time from a request to its answer.
func (p *pace) answered(after time.Duration) {
	if after > 0 && (p.latency == 0 || after < p.latency) {
		p.latency = after
	}
}

// resume makes the next bytes begin a new round: nothing was in flight, and the time
// that those bytes took says nothing about the speed of the link.
func (p *pace) resume() { p.began, p.came = time.Time{}, 0 }

// paused begins a new round once the bytes that were in buffers have arrived.
func (p *pace) paused(now time.Time) {
	p.resume()
	p.quiet = now.Add(2 * leastRound)
}

// arrived records bytes that have arrived.
func (p *pace) arrived(bytes int64, now time.Time) {
	if now.Before(p.quiet) {
		return
	}
	if p.began.IsZero() {
		p.began = now
		return
	}
	p.came += bytes
	took := now.Sub(p.began)
	if p.came < p.window() || took < leastRound {
		return
	}
	p.speed = max(float64(p.came)/took.Seconds(), decay*p.speed)
	p.began, p.came = now, 0
}
