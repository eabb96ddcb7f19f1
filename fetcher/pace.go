package fetcher

import (
	"math"
	"time"
)

// pace finds how many compressed bytes to have in flight that nobody waits for: as
// few as keep the line busy. With more each piece comes later, the one that is
// wanted first no less than the others, and so does what a reader demands.
//
// That is what the line carries in two round trips, or in a few hundredths of a
// second if these are shorter: a start does not notice such a delay, and
// servers are not as quick as their line. How much the line carries is what it
// has been seen to downloadBundle. Where it is more than that, the window is filled
// sooner than it was meant to be, and so grows.
type pace struct {
	most int64

	latency time.Duration // the shortest from a request to its answer; 0 before the first
	began   time.Time     // of the round; zero before its first bytes
	came    int64         // in the round
	quiet   time.Time     // until when bytes say nothing of the line
	speed   float64       // bytes a second; 0 before the first round
}

const (
	firstWindow = 1 << 20   // before the line is known
	leastWindow = 128 << 10 // on a slow line
	leastAhead  = 40 * time.Millisecond
	leastRound  = 20 * time.Millisecond // shorter ones say more of buffers than of the line
	decay       = 0.8                   // of the speed, in a round that is slower
)

func newPace(most int64) *pace { return &pace{most: most} }

// window is how much is to be on its way when more is asked for.
func (p *pace) window() int64 {
	if p.speed == 0 {
		return min(firstWindow, p.most)
	}
	return min(max(int64(p.speed*max(2*p.latency, leastAhead).Seconds()), leastWindow), p.most)
}

// wide is the window, but on a slow line as if it was a faster one: a registry
// answers a few large requests rather than many small ones.
func (p *pace) wide() int64 { return min(max(p.window(), firstWindow), p.most) }

// run is how much a request for neighbours has, several of which share the window.
func (p *pace) run() int64 { return min(p.wide()/2-min(p.wide(), firstWindow)/4, p.behind()) }

// ranges is how much a request for several ranges has.
func (p *pace) ranges() int64 { return min(p.wide(), p.behind()) }

// behind is how much may follow in a request that a reader may come to wait
// behind: what the line carries in a quarter of a second.
func (p *pace) behind() int64 {
	if p.speed == 0 {
		return math.MaxInt64
	}
	return max(int64(p.speed/4), firstWindow/4)
}

// nearSeq is how far from its turn a chunk may be fetched that nobody waits for,
// at leastWindow. It goes by the square of the window: on a link that is twice as
// fast a chunk out of its turn holds up others half as long, and a request that it
// saves is worth twice as many bytes.
const nearSeq = 8

// near is how far from its turn a chunk may be fetched.
func (p *pace) near() int64 {
	return max(nearSeq*p.wide()/firstWindow*p.wide()/firstWindow, 1)
}

// requests are in flight in any case, however large they are: each of them leaves
// the line idle for a round trip. Of requests for several ranges, which have as
// many bytes as the window, fewer do: with two the line has been seen idle for a
// seventh of the time, with three for a sixteenth; and each is in the way of what
// a reader demands. On a slow line a round trip is soon made up for.
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

// slowLink is the speed from which on it is worth while to have a second request
// in flight, in bytes a second.
const slowLink = 2 << 20

// roundTrip is how much the line carries in a round trip; none before that is
// known.
func (p *pace) roundTrip() int64 { return int64(p.speed * max(p.latency, leastRound).Seconds()) }

// answered takes account of the time from a request to its answer.
func (p *pace) answered(after time.Duration) {
	if after > 0 && (p.latency == 0 || after < p.latency) {
		p.latency = after
	}
}

// resume begins a round anew, with the first bytes that come: nothing was in
// fetch, and how long these take says nothing of how fast the line is.
func (p *pace) resume() { p.began, p.came = time.Time{}, 0 }

// paused begins a round anew when what lay in buffers has come.
func (p *pace) paused(now time.Time) {
	p.resume()
	p.quiet = now.Add(2 * leastRound)
}

// arrived takes account of bytes that have come.
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
