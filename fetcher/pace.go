package fetcher

import "time"

// pace finds how many compressed bytes to have in flight that nobody waits for: as
// few as keep the line busy. With more each piece comes later, the one that is
// wanted first no less than the others, and so does what a reader demands.
//
// That is what the line carries in two round trips, or in a few hundredths of a
// second if these are shorter: a start does not notice such a delay, and
// servers are not as quick as their line. How much the line carries is what it
// has been seen to carry. Where it is more than that, the window is filled
// sooner than it was meant to be, and so grows.
type pace struct {
	most int64

	latency time.Duration // the shortest from a request to its answer; 0 before the first
	began   time.Time     // of the round; zero before its first bytes
	came    int64         // in the round
	speed   float64       // bytes a second
}

const (
	leastWindow = 1 << 20
	leastAhead  = 40 * time.Millisecond
	leastRound  = 20 * time.Millisecond // shorter ones say more of buffers than of the line
	decay       = 0.8                   // of the speed, in a round that is slower
)

func newPace(most int64) *pace { return &pace{most: most} }

// window is how much may be in flight.
func (p *pace) window() int64 {
	ahead := max(2*p.latency, leastAhead)
	return min(max(int64(p.speed*ahead.Seconds()), leastWindow), p.most)
}

// answered takes account of the time from a request to its answer.
func (p *pace) answered(after time.Duration) {
	if after > 0 && (p.latency == 0 || after < p.latency) {
		p.latency = after
	}
}

// resume begins a round anew, with the first bytes that come: nothing was in
// flight, and how long these take says nothing of how fast the line is.
func (p *pace) resume() { p.began, p.came = time.Time{}, 0 }

// landed takes account of bytes that have come.
func (p *pace) landed(bytes int64, now time.Time) {
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
