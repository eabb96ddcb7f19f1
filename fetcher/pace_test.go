package fetcher

import (
	"testing"
	"time"
)

// run lets rounds of the window's bytes land at a speed, and returns the windows
// after each.
func (p *pace) run(now *time.Time, rounds int, speed func(window int64) float64) (windows []int64) {
	for range rounds {
		n := p.window()
		*now = now.Add(time.Duration(float64(n) / speed(n) * float64(time.Second)))
		for left, step := n, max(n/4, 1); left > 0; left -= step {
			p.landed(min(left, step), *now)
		}
		windows = append(windows, p.window())
	}
	return windows
}

// The window doubles while that brings bytes faster, takes the last doubling back
// when it did not, and keeps within its bounds.
func TestPace(t *testing.T) {
	const most = 16 << 20
	now := time.Now()
	latency := func(window int64) float64 { return float64(window) / 0.1 }     // 100 ms, whatever is asked for
	line := func(window int64) float64 { return min(latency(window), 50<<20) } // 50 MiB/s: 5 MiB fill it
	flat := func(int64) float64 { return 10 << 20 }

	p := newPace(most)
	if w := p.run(&now, 7, latency); w[1] != 2<<20 || w[4] != most || w[6] != most/2 && w[6] != most {
		t.Errorf("where more in flight is always faster: %v", w)
	}
	p = newPace(most)
	w := p.run(&now, 12, line)
	if last := w[len(w)-1]; last < 4<<20 || last > 8<<20 {
		t.Errorf("on a line that 5 MiB fill: %v", w)
	}
	p = newPace(most)
	if w := p.run(&now, 12, flat); w[len(w)-1] != leastWindow {
		t.Errorf("where it never gets faster: %v", w)
	}
	// It gets better again.
	if w := p.run(&now, 1, func(int64) float64 { return 40 << 20 }); w[0] != 2*leastWindow {
		t.Errorf("where it has become faster: %v", w)
	}
	for _, most := range []int64{1, 100, leastWindow - 1, leastWindow, 3 * leastWindow} {
		p := newPace(most)
		for _, speed := range []func(int64) float64{latency, flat, line} {
			for _, w := range append(p.run(&now, 8, speed), p.window()) {
				if w < min(most, leastWindow) || w > most {
					t.Errorf("a window of %d where %d is the most", w, most)
				}
			}
		}
	}
	// All at one point in time, as what was here already is.
	p = newPace(most)
	for range 100 {
		p.landed(leastWindow, now)
	}
	if p.window() != leastWindow {
		t.Errorf("a window of %d without time passing", p.window())
	}
}
