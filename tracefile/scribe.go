package tracefile

import (
	"time"

	"thaw/blockmap"
)

// scribe takes what a Recorder has in its buffer, and writes it.
type scribe struct {
	r     *Recorder
	out   *Writer
	join  joiner
	spare []event

	first time.Duration // when the first read came, since r.base; negative: none yet
	last  time.Duration // when the last touch came, since r.base
}

const (
	// gather is how long touches may wait in the buffer while it is not half
	// full, so that the recorder wakes twenty times a second at most.
	gather = 50 * time.Millisecond
	// flushEvery bounds what a crash can lose.
	flushEvery = time.Second
)

// run writes until the recording ends.
func (s *scribe) run() (End, error) {
	r := s.r
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	var gatherAt, flushAt time.Duration // since r.base; 0: not set
	for {
		now := time.Since(r.base)
		wait := time.Duration(-1)
		for _, at := range []time.Duration{gatherAt, flushAt, s.deadline(now)} {
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
		reached, err := s.drain()
		if err != nil {
			return End{}, err
		}
		switch {
		case reached != Unfinished:
			why = reached
		case why == Unfinished:
			why = s.over(now)
		}
		if why != Unfinished {
			return s.finish(why)
		}
		switch {
		case flushAt == 0 && s.pending():
			flushAt = now + flushEvery
		case flushAt > 0 && now >= flushAt:
			flushAt = 0
			if err := s.flush(); err != nil {
				return End{}, err
			}
		}
	}
}

// deadline is when the recording may be over for lack of touches, 0 for never.
func (s *scribe) deadline(now time.Duration) (at time.Duration) {
	if s.first < 0 {
		return 0
	}
	if s.r.o.For > 0 {
		at = s.first + s.r.o.For
	}
	if q := s.r.o.Quiet; q > 0 {
		quiet := s.active() + q
		if quiet <= now { // a fault waits: look again
			quiet = now + q
		}
		if at == 0 || quiet < at {
			at = quiet
		}
	}
	return at
}

// active is when the last touch came, or the last fault ended.
func (s *scribe) active() time.Duration {
	return max(s.last, time.Duration(s.r.faulted.Load()))
}

// over says whether the recording has reached an end by time.
func (s *scribe) over(now time.Duration) Reason {
	switch {
	case s.first < 0:
	case s.r.o.For > 0 && now >= s.first+s.r.o.For:
		return TimeUp
	case s.r.o.Quiet > 0 && s.r.waiting.Load() == 0 && now >= s.active()+s.r.o.Quiet:
		return WentQuiet
	}
	return Unfinished
}

// drain writes what is in the buffer, until an end that a touch has reached.
func (s *scribe) drain() (Reason, error) {
	r := s.r
	r.mu.Lock()
	events := r.mu.events
	r.mu.events = s.spare[:0]
	r.mu.Unlock()
	s.spare = events
	for _, x := range events {
		if s.first < 0 {
			s.first, s.last = x.at, x.at
		}
		// Those who touch at the same time come in any order.
		x.at = max(x.at, s.last)
		if limit := r.o.For; limit > 0 && x.at-s.first > limit {
			return TimeUp, nil
		}
		if x.at-s.first > maxTime {
			return TooLong, nil
		}
		s.last = x.at
		full, err := s.add(s.join.add(Touch{
			At: (x.at - s.first).Truncate(time.Microsecond), Block: x.block, Count: x.count, Miss: x.miss, Starts: 1,
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
func (s *scribe) add(touches []Touch) (full bool, err error) {
	for _, t := range touches {
		if err := s.out.Add(t); err == ErrFull {
			return true, nil
		} else if err != nil {
			return false, err
		}
	}
	return false, nil
}

func (s *scribe) pending() bool { return len(s.join.open) > 0 || len(s.out.body) > frameHeader }

func (s *scribe) flush() error {
	if _, err := s.add(s.join.flush()); err != nil {
		return err
	}
	return s.out.Flush()
}

func (s *scribe) finish(why Reason) (End, error) {
	s.r.over.Store(true)
	e := End{Why: why, Dropped: s.r.dropped.Load()}
	if s.first >= 0 {
		e.After = (time.Since(s.r.base) - s.first).Truncate(time.Microsecond)
	}
	if err := s.flush(); err != nil {
		return e, err
	}
	return e, s.out.Close(e)
}

// joiner merges touches that are neighbours on the device and close in time.
// Several readers take turns, so it keeps some runs open; a run takes no more
// than joinTime, during which even a fast link brings little: what order there
// was within it does not matter to a plan.
type joiner struct {
	open []Touch // in order of time
	out  []Touch
}

const (
	joinTime = 4 * time.Millisecond
	joinOpen = 16
)

// add takes t, and returns the touches that are complete, good until the next
// call.
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
