package fetcher

import (
	"testing"
	"time"
)

// line is a link of that speed in bytes a second, and the latency of a request.
type line struct {
	speed   float64
	latency time.Duration
}

// run has pieces of an eighth of the window arrive at the speed of the link, for some
// rounds, and returns the window after each.
func (l line) run(p *pace, now *time.Time, rounds int) (windows []int64) {
	for range rounds {
		for range 8 {
			n := p.window()
			// What is in flight takes a round trip, or the link's time for it.
			took := max(l.latency, time.Duration(float64(n)/l.speed*float64(time.Second)))
			*now = now.Add(took / 8)
			p.answered(l.latency)
			p.arrived(n/8, *now)
		}
		windows = append(windows, p.window())
	}
	return windows
}

// The window becomes what fills the link for two round trips, or for leastAhead, within
// its bounds, and follows a link that changes.
func TestPace(t *testing.T) {
	const most = 64 << 20
	for _, c := range []struct {
		line
		want int64
	}{
		{line{25e6, 20 * time.Millisecond}, 1 << 20}, // 200 Mbit/s
		{line{250e6, 2 * time.Millisecond}, 10e6},    // 2 Gbit/s, near
		{line{125e6, 100 * time.Millisecond}, 25e6},  // 1 Gbit/s, far
		{line{1e6, 500 * time.Millisecond}, 1 << 20}, // slow and far: the least
		{line{10e9, 50 * time.Millisecond}, most},    // fast and far: the most
		{line{100e6, 10 * time.Millisecond}, 4e6},    // a data centre
		{line{100e6, 100 * time.Microsecond}, 4e6},   // this host
	} {
		now := time.Now()
		p := newPace(most)
		if w := c.run(p, &now, 40); float64(w[39]) < 0.75*float64(c.want) || float64(w[39]) > 1.25*float64(c.want) {
			t.Errorf("%.0f MB/s, %v: windows %v, want %d", c.speed/1e6, c.latency, w, c.want)
		}
		slower := line{c.speed / 10, c.latency}
		if w := slower.run(p, &now, 40); float64(w[39]) > max(0.2*float64(c.want), leastWindow) && c.want < most {
			t.Errorf("%.0f MB/s after ten times that speed: windows %v", slower.speed/1e6, w)
		}
	}
	// All at one moment, like bytes from a buffer.
	p := newPace(most)
	now := time.Now()
	for range 100 {
		p.arrived(firstWindow, now)
	}
	if p.window() != firstWindow {
		t.Errorf("a window of %d without time passing", p.window())
	}
	if w := newPace(1000).window(); w != 1000 {
		t.Errorf("a window of %d, want at most 1000", w)
	}
}
