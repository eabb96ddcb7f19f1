package main

import (
	"sync"
	"time"

	"thaw/bench"
)

// clock times one start, and watches the link meanwhile.
type clock struct {
	w      *wires
	began  time.Time
	before bench.LinkStats
	marks  []mark
	end    time.Duration
	used   bench.LinkStats // between the beginning and the end

	down []int64 // bytes that had come, every step
	quit chan struct{}
	wg   sync.WaitGroup
}

// mark is when something happened, since the beginning.
type mark struct {
	name string
	at   time.Duration
}

// The names of marks.
const (
	ready    = "ready"    // the server says so
	mounted  = "mounted"  // the filesystem is
	pulled   = "pulled"   // the image is here
	unpacked = "unpacked" // and its files are
)

// step is how often the link is looked at.
const step = 5 * time.Millisecond

// start is the beginning: what was done before is not counted.
func (c *clock) start() {
	c.quit = make(chan struct{})
	c.before = c.w.stats()
	c.began = time.Now()
	c.wg.Go(func() {
		t := time.NewTicker(step)
		defer t.Stop()
		for {
			select {
			case <-c.quit:
				return
			case <-t.C:
				c.sample()
			}
		}
	})
}

// sample fills in all steps until now, of which the ticker may have left some
// out.
func (c *clock) sample() {
	n := c.w.stats().Down - c.before.Down
	for due := int(time.Since(c.began) / step); len(c.down) < due; {
		c.down = append(c.down, n)
	}
}

// sofar is the time since the beginning.
func (c *clock) sofar() time.Duration { return time.Since(c.began) }

func (c *clock) mark(name string) { c.marks = append(c.marks, mark{name, c.sofar()}) }

// stop is the end of a start that took so long.
func (c *clock) stop(took time.Duration) {
	c.end = took
	c.used = c.w.stats().Sub(c.before)
	c.abandon()
}

// abandon ends the watching, if it has not ended.
func (c *clock) abandon() {
	if c.quit != nil {
		close(c.quit)
		c.wg.Wait()
		c.quit = nil
	}
}

// measures are for the recorder.
func (c *clock) measures() []bench.Measure {
	ms := []bench.Measure{{Value: float64(c.end), Unit: bench.Wall}}
	for _, m := range c.marks {
		ms = append(ms, bench.Measure{Value: float64(m.at), Unit: m.name + "-ns"})
	}
	return append(ms, bench.Measure{Value: float64(c.used.Requests), Unit: requests}, bench.Measure{Value: float64(c.used.Down), Unit: wireBytes},
		bench.Measure{Value: float64(c.used.Up), Unit: "up-B"}, bench.Measure{Value: float64(c.used.Connections), Unit: "connections"})
}
