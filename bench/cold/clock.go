package main

import (
	"sync"
	"time"

	"thaw/bench"
)

// clock times one start, and samples what the link carries meanwhile.
type clock struct {
	w      *wires
	began  time.Time
	before bench.LinkStats
	marks  []mark
	end    time.Duration
	used   bench.LinkStats // from start to stop

	down []int64 // bytes received so far, every step
	quit chan struct{}
	wg   sync.WaitGroup
}

// mark is an event, and its time since the start.
type mark struct {
	name string
	at   time.Duration
}

// The names of marks.
const (
	ready    = "ready"    // the server has printed its ready line
	mounted  = "mounted"  // the filesystem is mounted
	pulled   = "pulled"   // the image is downloaded
	unpacked = "unpacked" // its files are written
)

// step is the time between two samples.
const step = 5 * time.Millisecond

// start starts the clock. What the link carried before is not counted.
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

// sample records the bytes for all steps until now. The ticker may have skipped
// some.
func (c *clock) sample() {
	n := c.w.stats().Down - c.before.Down
	for due := int(time.Since(c.began) / step); len(c.down) < due; {
		c.down = append(c.down, n)
	}
}

// sofar returns the time since the start.
func (c *clock) sofar() time.Duration { return time.Since(c.began) }

func (c *clock) mark(name string) { c.marks = append(c.marks, mark{name, c.sofar()}) }

// stop stops the clock at a time since the start.
func (c *clock) stop(took time.Duration) {
	c.end = took
	c.used = c.w.stats().Sub(c.before)
	c.abandon()
}

// abandon ends the sampling. It may be called again.
func (c *clock) abandon() {
	if c.quit != nil {
		close(c.quit)
		c.wg.Wait()
		c.quit = nil
	}
}

// measures returns the times and what the link carried, for the recorder.
func (c *clock) measures() []bench.Measure {
	ms := []bench.Measure{{Value: float64(c.end), Unit: bench.Wall}}
	for _, m := range c.marks {
		ms = append(ms, bench.Measure{Value: float64(m.at), Unit: m.name + "-ns"})
	}
	return append(ms, bench.Measure{Value: float64(c.used.Requests), Unit: requests}, bench.Measure{Value: float64(c.used.Down), Unit: wireBytes},
		bench.Measure{Value: float64(c.used.Up), Unit: "up-B"}, bench.Measure{Value: float64(c.used.Connections), Unit: "connections"})
}
