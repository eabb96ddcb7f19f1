package fetcher

import "time"

// pace finds how many compressed bytes to have in flight that nobody waits for: as
// few as keep the line busy. With more each piece comes later, the one that is
// wanted first no less than the others, and so does what a reader demands.
//
// It starts low, and doubles as long as that brings bytes faster.
type pace struct {
	most, win int64
	began     time.Time // of the round: as many bytes as the window has; zero before the first
	came      int64     // in the round
	best      float64   // bytes a second
	flat      int       // rounds that were no faster
}

const (
	leastWindow = 1 << 20
	faster      = 1.2
	flatRounds  = 2
)

func newPace(most int64) *pace {
	return &pace{most: most, win: min(leastWindow, most)}
}

// window is how much may be in flight.
func (p *pace) window() int64 { return p.win }

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
	if p.came < p.win || !now.After(p.began) {
		return
	}
	speed := float64(p.came) / now.Sub(p.began).Seconds()
	p.began, p.came = now, 0
	if speed > faster*p.best {
		p.best = speed
		p.win = min(2*p.win, p.most)
		p.flat = 0
		return
	}
	// The last doubling won nothing.
	if p.flat++; p.flat == flatRounds {
		p.win = max(p.win/2, min(leastWindow, p.most))
	}
}
