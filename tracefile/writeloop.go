package tracefile

import (
	"time"

	"thaw/blockmap"
)

// writeLoop writes the events that a Recorder buffers. It decides when the recording
// ends.
type writeLoop struct {
	r     *Recorder
	out   *Writer
	join  joiner
	spare []event

	first time.Duration // when the first read came, since r.base; negative: none yet
	last  time.Duration // when the last touch came, since r.base
}

const (
	// gather is how long touches may wait in a buffer that is less than half
	// full, so that the loop wakes at most twenty times a second.
	gather = 50 * time.Millisecond
	// flushEvery bounds how much of a recording a crash can lose.
	flushEvery = time.Second
)

// run writes until the recording ends.
func (w *writeLoop) run() (End, error) {
	r := w.r
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	var gatherAt, flushAt time.Duration // since r.base; 0: not set
	for {
		now := time.Since(r.base)
		wait := time.Duration(-1)
		for _, at := range []time.Duration{gatherAt, flushAt, w.deadline(now)} {
			if at > 0 && (wait < 0 || at-now < wait) {
				wait = max(at-now, 0)
			}
		}
		var tick <-chan time.Time
		if wait >= 0 {
			timer.Reset(wait)
			tick = timer.C
		}
		why := Unfinished
		select {
		case <-r.stop:
			why = Stopped
		case <-r.kick:
			r.mu.Lock()
			urgent := len(r.mu.events) >= r.o.Buffer/2
			r.mu.Unlock()
			if !urgent {
				if gatherAt == 0 {
					gatherAt = time.Since(r.base) + gather
				}
				continue
			}
		case <-tick:
		}
		now = time.Since(r.base)
		gatherAt = 0
		reached, err := w.drain()
		if err != nil {
			return End{}, err
		}
		switch {
		case reached != Unfinished:
			why = reached
		case why == Unfinished:
			why = w.over(now)
		}
		if why != Unfinished {
			return w.finish(why)
		}
		switch {
		case flushAt == 0 && w.pending():
			flushAt = now + flushEvery
		case flushAt > 0 && now >= flushAt:
			flushAt = 0
			if err := w.flush(); err != nil {
				return End{}, err
			}
		}
	}
}

// deadline is the next time at which the recording may end without a touch, 0 for
// never.
func (w *writeLoop) deadline(now time.Duration) (at time.Duration) {
	if w.first < 0 {
		return 0
	}
	if w.r.o.For > 0 {
		at = w.first + w.r.o.For
	}
	if q := w.r.o.Quiet; q > 0 {
		quiet := w.active() + q
		if quiet <= now { // a fault waits: look again
			quiet = now + q
		}
		if at == 0 || quiet < at {
			at = quiet
		}
	}
	return at
}

// active is when the last touch came or the last Fault ended, whichever is later.
func (w *writeLoop) active() time.Duration {
	return max(w.last, time.Duration(w.r.faulted.Load()))
}

// over returns why the recording ends now by time, or Unfinished.
func (w *writeLoop) over(now time.Duration) Reason {
	switch {
	case w.first < 0:
	case w.r.o.For > 0 && now >= w.first+w.r.o.For:
		return TimeUp
	case w.r.o.Quiet > 0 && w.r.waiting.Load() == 0 && now >= w.active()+w.r.o.Quiet:
		return WentQuiet
	}
	return Unfinished
}

// drain writes the buffered events, up to one that ends the recording.
func (w *writeLoop) drain() (Reason, error) {
	r := w.r
	r.mu.Lock()
	events := r.mu.events
	r.mu.events = w.spare[:0]
	r.mu.Unlock()
	w.spare = events
	for _, x := range events {
		if w.first < 0 {
			w.first, w.last = x.at, x.at
		}
		// Readers that touch blocks at the same time append in any order.
		x.at = max(x.at, w.last)
		if limit := r.o.For; limit > 0 && x.at-w.first > limit {
			return TimeUp, nil
		}
		if x.at-w.first > maxTime {
			return TooLong, nil
		}
		w.last = x.at
		full, err := w.add(w.join.add(Touch{
			At: (x.at - w.first).Truncate(time.Microsecond), Block: x.block, Count: x.count, Miss: x.miss, Starts: 1,
		}))
		if err != nil || full {
			return TooLong, err
		}
		r.ranges.Add(1)
		if n := r.blocks.Add(int64(x.count)); r.o.Bytes > 0 && n*blockmap.BlockSize >= r.o.Bytes {
			return Enough, nil
		}
	}
	return Unfinished, nil
}

// add writes touches; full says that the file takes no more.
func (w *writeLoop) add(touches []Touch) (full bool, err error) {
	for _, t := range touches {
		if err := w.out.Add(t); err == ErrFull {
			return true, nil
		} else if err != nil {
			return false, err
		}
	}
	return false, nil
}

func (w *writeLoop) pending() bool { return len(w.join.open) > 0 || len(w.out.body) > frameHeader }

func (w *writeLoop) flush() error {
	if _, err := w.add(w.join.flush()); err != nil {
		return err
	}
	return w.out.Flush()
}

func (w *writeLoop) finish(why Reason) (End, error) {
	w.r.over.Store(true)
	e := End{Why: why, Dropped: w.r.dropped.Load()}
	if w.first >= 0 {
		e.After = (time.Since(w.r.base) - w.first).Truncate(time.Microsecond)
	}
	if err := w.flush(); err != nil {
		return e, err
	}
	return e, w.out.Close(e)
}

// joiner merges touches that are neighbours on the device and close in time. Several
// readers take turns, so it keeps several runs open. A run spans at most joinTime.
// Even a fast link brings little in that time, so the order within a run does not
// matter to a plan.
type joiner struct {
	open []Touch // in order of time
	out  []Touch
}

const (
	joinTime = 4 * time.Millisecond
	joinOpen = 16
)

// add takes t, and returns the touches that are complete. They are valid until the
// next call.
func (j *joiner) add(t Touch) []Touch {
	j.out = j.out[:0]
	for len(j.open) > 0 && t.At-j.open[0].At > joinTime {
		j.pop()
	}
	for i := range j.open {
		o := &j.open[i]
		if o.Miss != t.Miss {
			continue
		}
		if o.end() == uint64(t.Block) {
			o.Count += t.Count
			return j.out
		}
		if t.end() == uint64(o.Block) {
			o.Block, o.Count = t.Block, o.Count+t.Count
			return j.out
		}
	}
	if len(j.open) == joinOpen {
		j.pop()
	}
	j.open = append(j.open, t)
	return j.out
}

// flush returns all that is open.
func (j *joiner) flush() []Touch {
	j.out = append(j.out[:0], j.open...)
	j.open = j.open[:0]
	return j.out
}

func (j *joiner) pop() {
	j.out = append(j.out, j.open[0])
	j.open = append(j.open[:0], j.open[1:]...)
}
