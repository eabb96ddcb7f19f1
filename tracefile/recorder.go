package tracefile

import (
	"context"
	"io"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"thaw/blockmap"
)

// Options say when a recording ends by itself, and what it may take until then.
// Of the ends that are given the first one counts; without any, only Stop ends
// it (or MaxSize).
type Options struct {
	For   time.Duration // this long after the first read
	Bytes int64         // when so much of the device has been touched
	// Quiet ends it when no block was touched for the first time in so long.
	// Reads of what was touched before do not count, since nothing is
	// written for them; a fault that still waits does.
	Quiet time.Duration

	// Buffer is how many touches may wait to be written; 8192 if zero, which
	// takes 400 KiB. What does not fit is dropped and counted.
	Buffer int
}

const (
	defaultBuffer = 8192

	// gather is how long touches may wait in the buffer while it is not half
	// full, so that the recorder wakes twenty times a second at most.
	gather = 50 * time.Millisecond
	// flushEvery bounds what a crash can lose.
	flushEvery = time.Second
)

// Recorder is a blockmap.Device that writes down which blocks of another one
// are read, the first time that they are.
//
// A read of blocks that were touched before costs a look at a bitmap that is
// then only read. A first touch sets their bits and puts a record in a buffer,
// under a lock that nobody holds for longer than that. A goroutine takes them
// from there, merges and writes them; however long the writer takes, no read
// waits for it.
//
// A read that misses is View, Fault and View again: the first of them touches
// the blocks, and they are a miss.
//
// It takes no writes: the blocks of a trace are those of the image, so the
// recorder of a writable device belongs below the overlay.
type Recorder struct {
	dev     blockmap.Device
	touched []uint64 // one bit a block
	size    int64
	base    time.Time
	o       Options

	// What follows is written to; what is above is only read, and stays in
	// the caches of all processors.
	_ [64]byte

	over    atomic.Bool // nothing more is taken
	waiting atomic.Int64
	faulted atomic.Int64 // when a Fault ended last, in nanoseconds since base
	dropped atomic.Uint64
	ranges  atomic.Int64
	blocks  atomic.Int64

	mu struct {
		sync.Mutex
		events []event
	}

	stopOnce sync.Once
	stop     chan struct{}
	kick     chan struct{} // the buffer is no longer empty, or is half full
	done     chan struct{}
	end      End // like err: good once done is closed
	err      error
}

// event is a run of blocks on its way to the writer.
type event struct {
	at           time.Duration // since base
	block, count uint32
	miss         bool
}

// NewRecorder starts a recording of what is read of dev, the device of the image
// with that index, to w. It must be stopped.
func NewRecorder(dev blockmap.Device, index blockmap.Digest, w io.Writer, o Options) *Recorder {
	if o.Buffer <= 0 {
		o.Buffer = defaultBuffer
	}
	blocks := uint32(dev.Size() / blockmap.BlockSize)
	r := &Recorder{
		dev: dev, size: dev.Size(), base: time.Now(), o: o,
		touched: make([]uint64, (int64(blocks)+63)/64),
		stop:    make(chan struct{}), kick: make(chan struct{}, 1), done: make(chan struct{}),
	}
	r.mu.events = make([]event, 0, o.Buffer)
	s := &scribe{r: r, first: -1, spare: make([]event, 0, o.Buffer)}
	go func() {
		defer close(r.done)
		if s.out, r.err = NewWriter(w, Header{Index: index, Blocks: blocks, Starts: 1}); r.err == nil {
			r.end, r.err = s.run()
		}
		r.over.Store(true)
	}()
	return r
}

// Size implements blockmap.Device.
func (r *Recorder) Size() int64 { return r.size }

// View implements blockmap.Device.
func (r *Recorder) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	// Nothing wrong comes of an extent that is none: what this look says of
	// it, touch and the device find out.
	first, last := uint64(e.Start)/blockmap.BlockSize, uint64(e.End-1)/blockmap.BlockSize
	if w := first / 64; w == last/64 && w < uint64(len(r.touched)) {
		mask := uint64(2)<<(last%64) - uint64(1)<<(first%64)
		if atomic.LoadUint64(&r.touched[w])&mask == mask {
			return r.dev.View(e)
		}
	}
	v, ok = r.dev.View(e)
	r.touch(e, !ok)
	return v, ok
}

// Fault implements blockmap.Device.
func (r *Recorder) Fault(ctx context.Context, e blockmap.Extent) error {
	r.touch(e, true)
	r.waiting.Add(1)
	defer func() {
		r.faulted.Store(int64(time.Since(r.base)))
		r.waiting.Add(-1)
	}()
	return r.dev.Fault(ctx, e)
}

type statuser interface {
	Status(e blockmap.Extent) blockmap.Status
}

type prefetcher interface {
	Prefetch(e blockmap.Extent)
}

// Device is the recorder with those of the methods Status and Prefetch that the
// device which it records has: what a transport is to be given. Neither touches
// a block.
func (r *Recorder) Device() blockmap.Device {
	s, tells := r.dev.(statuser)
	p, prefetches := r.dev.(prefetcher)
	switch {
	case tells && prefetches:
		return &struct {
			*Recorder
			statuser
			prefetcher
		}{r, s, p}
	case tells:
		return &struct {
			*Recorder
			statuser
		}{r, s}
	case prefetches:
		return &struct {
			*Recorder
			prefetcher
		}{r, p}
	}
	return r
}

// Stop ends the recording, if it has not ended by itself, and waits until it is
// written. It fails with the first error of the writer. Reads go on as before.
func (r *Recorder) Stop() error {
	r.stopOnce.Do(func() { close(r.stop) })
	<-r.done
	return r.err
}

// Done is closed when the recording has ended and is written. Stop then returns
// at once.
func (r *Recorder) Done() <-chan struct{} { return r.done }

// End says how the recording ended, once it has.
func (r *Recorder) End() End {
	<-r.done
	return r.end
}

// Stats counts what a Recorder has done so far.
type Stats struct {
	Ranges  int64 // taken from the buffer, before neighbours were merged
	Bytes   int64 // in these
	Dropped int64 // bytes that were touched, and did not fit in the buffer
}

// Stats returns the counts so far.
func (r *Recorder) Stats() Stats {
	return Stats{
		Ranges: r.ranges.Load(), Bytes: r.blocks.Load() * blockmap.BlockSize,
		Dropped: int64(r.dropped.Load()) * blockmap.BlockSize,
	}
}

// touch marks e as touched, and puts in the buffer what was not.
func (r *Recorder) touch(e blockmap.Extent, miss bool) {
	if e.Check(r.size) != nil || e.Len() == 0 {
		return
	}
	first, last := uint32(e.Start/blockmap.BlockSize), uint32((e.End-1)/blockmap.BlockSize)
	var run event // of fresh blocks, which may go on in the next word
	for w := first / 64; w <= last/64; w++ {
		mask := ^uint64(0)
		if w == first/64 {
			mask <<= first % 64
		}
		if w == last/64 {
			mask &= ^uint64(0) >> (63 - last%64)
		}
		if atomic.LoadUint64(&r.touched[w])&mask == mask {
			continue
		}
		fresh := mask &^ atomic.OrUint64(&r.touched[w], mask)
		for fresh != 0 {
			bit := uint32(bits.TrailingZeros64(fresh))
			n := uint32(bits.TrailingZeros64(^(fresh >> bit)))
			fresh &^= ^uint64(0) >> (64 - n) << bit
			if block := w*64 + bit; run.count > 0 && run.block+run.count == block {
				run.count += n
			} else {
				r.put(run)
				run = event{time.Since(r.base), block, n, miss}
			}
		}
	}
	r.put(run)
}

// put hands x to the scribe, or drops it.
func (r *Recorder) put(x event) {
	if x.count == 0 || r.over.Load() {
		return
	}
	r.mu.Lock()
	n := len(r.mu.events)
	full := n == cap(r.mu.events)
	if !full {
		r.mu.events = append(r.mu.events, x)
	}
	r.mu.Unlock()
	if full {
		r.dropped.Add(uint64(x.count))
		return
	}
	if n == 0 || n+1 == r.o.Buffer/2 {
		select {
		case r.kick <- struct{}{}:
		default: // it is awake already
		}
	}
}

// scribe takes what a Recorder has in its buffer, and writes it.
type scribe struct {
	r     *Recorder
	out   *Writer
	join  joiner
	spare []event

	first time.Duration // when the first read came, since r.base; negative: none yet
	last  time.Duration // when the last touch came, since r.base
}

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
