package fetcher

import (
	"math"
	"time"
)

// pace finds the window of a source: how many compressed bytes of prefetches to have in
// flight. It should be the least that keeps the link busy, for with more every chunk
// comes later, demanded ones included.
//
// The window is what the link carries in two round trips, or in leastAhead if these are
// shorter: a start does not notice such a delay, and servers are slower than their link.
// The speed of the link is the highest that was seen lately. On a faster link the window
// is filled sooner than it should be, so the speed that is seen, and the window, grow.
type pace struct {
	most int64

	latency time.Duration // the shortest time from a request to its answer; 0 before the first
	began   time.Time     // when the round began; zero before its first bytes
	came    int64         // bytes in the round
	quiet   time.Time     // until when bytes say nothing about the link
	speed   float64       // bytes a second; 0 before the first round
}

const (
	firstWindow = 1 << 20   // before the speed is known
	leastWindow = 128 << 10 // on a slow link
	leastAhead  = 40 * time.Millisecond
	leastRound  = 20 * time.Millisecond // shorter ones say more about buffers than about the link
	decay       = 0.8                   // of the speed, after a slower round
)

func newPace(most int64) *pace { return &pace{most: most} }

// window is how many bytes of prefetches to have in flight.
func (p *pace) window() int64 {
	if p.speed == 0 {
		return min(firstWindow, p.most)
	}
	return min(max(int64(p.speed*max(2*p.latency, leastAhead).Seconds()), leastWindow), p.most)
}

// wide is the window, but at least firstWindow: on a slow link too, a few large requests
// cost a registry less than many small ones.
func (p *pace) wide() int64 { return min(max(p.window(), firstWindow), p.most) }

// run is how many bytes a request for neighbours may have. Several share the window.
func (p *pace) run() int64 { return min(p.wide()/2-min(p.wide(), firstWindow)/4, p.behind()) }

// ranges is how many bytes a request for several ranges may have.
func (p *pace) ranges() int64 { return min(p.wide(), p.behind()) }

// behind is how many bytes of a request a later demand may have to wait for: what the
// link carries in a quarter of a second.
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

// near is how far from its turn a prefetched chunk may be fetched.
func (p *pace) near() int64 {
	return max(nearSeq*p.wide()/firstWindow*p.wide()/firstWindow, 1)
}

// requests is how many requests for prefetches to have in flight, however large they are,
// since the link is idle for a round trip after each. Requests for several ranges have as
// many bytes as the window, and each delays demands, so there are fewer: with two the
// link was seen idle for a seventh of the time, with three for a sixteenth. On a slow
// link a round trip is short beside the time that the bytes take.
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

// slowLink is the speed in bytes a second for each of which one more request pays.
const slowLink = 2 << 20

// roundTrip is how many bytes the link carries in a round trip; 0 before that is known.
func (p *pace) roundTrip() int64 { return int64(p.speed * max(p.latency, leastRound).Seconds()) }

// answered notes the time from a request to its answer.
func (p *pace) answered(after time.Duration) {
	if after > 0 && (p.latency == 0 || after < p.latency) {
		p.latency = after
	}
}

// resume has the next bytes begin a new round: nothing was in flight, and how long those
// bytes took says nothing about the speed of the link.
func (p *pace) resume() { p.began, p.came = time.Time{}, 0 }

// paused begins a new round once the bytes that lay in buffers have come.
func (p *pace) paused(now time.Time) {
	p.resume()
	p.quiet = now.Add(2 * leastRound)
}

// arrived notes bytes that have come.
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
