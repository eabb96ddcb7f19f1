package vhost

import (
	"time"

	"golang.org/x/sys/unix"
)

// A driver that keeps several requests in flight adds them one by one, and a hit takes less
// time than that takes the driver. To answer each request at once costs the guest a kick
// and an interrupt for each, which are dear. So the goroutine of a queue whose driver is
// busy looks at the available ring for some moments longer before it publishes what it has
// answered and asks for a kick.
//
// It learns from the driver how many requests come and how far apart they are. Beyond that
// number it does not wait: a driver that has one request in flight waits for its answer.
//
// While it waits it yields its processor. The driver may need it, and so may any other program:
// then a wait takes longer than the times below, up to a slice of the kernel's scheduler.
const (
	gatherMax   = 32                     // answers that wait for others, at most
	gatherTime  = 100 * time.Microsecond // that a pass waits, at most
	gatherGap   = 50 * time.Microsecond  // that it waits for the next request, at most
	gatherGapLo = 5 * time.Microsecond   // and where requests are close together
	probeMin    = 64                     // passes until the number is looked for again
	probeMax    = 64 << 4
)

// gather is what the goroutine of a queue knows of its driver.
type gather struct {
	most, mostGap time.Duration // gatherTime and gatherGap; longer in tests

	expect int           // requests that come together
	gap    time.Duration // between two of them, on average

	probing int // passes until one waits for more than expect
	pause   int // passes between two of those

	// Of this pass.
	began  time.Time // of the first wait
	waited bool
}

// limit is for how many requests this pass waits.
func (g *gather) limit() int {
	if g.probing == 0 {
		return gatherMax
	}
	return g.expect
}

// ended notes that a pass took n requests.
func (g *gather) ended(n int) {
	if n == 0 {
		return
	}
	if g.probing--; g.probing < 0 {
		g.pause = min(max(2*g.pause, probeMin), probeMax)
		if n > g.expect {
			g.pause = probeMin
		}
		g.probing = g.pause
	}
	switch {
	case n > g.expect:
		g.expect = min(n, gatherMax)
	case g.waited: // in vain, at last
		g.expect -= (g.expect - n + 3) / 4
	}
	g.waited = false
}

// more waits for the driver to make another request available, if that is likely. The
// pass has taken n.
func (q *queue) more(n int) bool {
	g := &q.gather
	if q.nbatch == 0 || q.nbatch >= gatherMax || n >= g.limit() || q.working.Load() > 0 || !q.c.srv.waiters.enter() {
		return false
	}
	defer q.c.srv.waiters.leave()
	now := time.Now()
	if !g.waited {
		g.waited, g.began = true, now
	}
	gap := g.mostGap
	if g.probing > 0 {
		gap = min(gap, max(4*g.gap, gatherGapLo))
	}
	end := now.Add(min(gap, g.began.Add(g.most).Sub(now)))
	for at := now; at.Before(end); at = time.Now() {
		if q.ring.availIdx() != q.at {
			g.gap += (at.Sub(now) - g.gap) / 8
			return true
		}
		// The driver may need this processor.
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
	return false
}
