package nbd

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// The reader itself does a small WRITE, straight from its input buffer: no copy, no
// goroutine, no lock. That takes microseconds as a rule. It can take seconds where the disk
// is busy, or where the rest of a block has to be fetched first, and no other request may
// wait for that. So a watchdog looks every millisecond whether the reader is still at the
// same write. If it is, another goroutine takes over the reading, with a buffer of its own.
// The first one only finishes its write, as a task.
//
// A device that is slow once is likely to be slow again, so the next writes take goroutines.

const (
	maxInline   = 64 << 10         // bytes of a WRITE that the reader does itself
	inlineTime  = time.Millisecond // it may take that long, and up to twice as long
	afterInline = 64               // WRITEs that take goroutines after a slow one
)

// errTakenOver ends a reader whose place another goroutine has taken. It owns nothing of
// the reader any more.
var errTakenOver = errors.New("another goroutine has taken over the reading")

// watchdog finds out that a reader is stuck in a write.
type watchdog struct {
	// count goes up when a reader begins a write, and when it ends one: it is odd
	// meanwhile. Whoever raises it at the end owns the reading: the reader, or the
	// watchdog.
	count atomic.Uint64
	armed atomic.Bool // a look is to come

	// call bounds the writes of the reader. It is replaced when the reader is.
	call *call

	mu struct {
		sync.Mutex // held during a look
		timer      *time.Timer
		seen       uint64 // count at the last look
		over       bool
	}
}

// call is a context for writes of a reader. It has no deadline, which would cost more than
// a write: a write that is taken over gets one.
type call struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
}

func newCall(ctx context.Context) *call {
	c := new(call)
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	return c
}

// writeInline does the WRITE r on the reader.
func (s *session) writeInline(r *request) error {
	p, err := s.payload(int(r.length))
	if err != nil {
		return err
	}
	w := &s.watchdog
	if w.call == nil {
		w.call = newCall(s.ctx)
	}
	c := w.call
	n := w.count.Add(1)
	if !w.armed.Load() {
		w.arm(s)
	}
	err = s.wdev.WriteAt(c.ctx, p, int64(r.offset))
	if w.count.CompareAndSwap(n, n+1) {
		if err != nil {
			t := &task{req: *r, at: -1}
			s.fail(s.ctx, t, err)
			t.appendTo(&s.hits, s.structured)
		} else {
			s.hits.simple(r.cookie, 0)
		}
		return s.more()
	}
	t := &task{req: *r, at: -1, cost: maxInline}
	if err != nil {
		s.fail(s.ctx, t, err)
	}
	c.cancel(nil)
	s.working.Add(-1)
	s.done(t)
	return errTakenOver
}

// payload returns the next n bytes of the input, at most maxInline, where they lie. They
// are valid until the next read.
func (s *session) payload(n int) ([]byte, error) {
	if s.end-s.begin < n {
		if err := s.flush(); err != nil { // no reply may wait for the client's payload
			return nil, err
		}
		if s.begin+n > len(s.in) {
			s.end = copy(s.in, s.in[s.begin:s.end])
			s.begin = 0
		}
		for s.end-s.begin < n {
			m, err := s.readPayload(s.in[s.end:])
			if err != nil {
				return nil, err
			}
			s.end += m
		}
	}
	p := s.in[s.begin : s.begin+n]
	s.begin += n
	return p, nil
}

// arm sets the watchdog on the reader, which has begun a write.
func (w *watchdog) arm(s *session) {
	if !w.armed.CompareAndSwap(false, true) {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mu.timer == nil {
		w.mu.timer = time.AfterFunc(inlineTime, func() { w.look(s) })
	} else {
		w.mu.timer.Reset(inlineTime)
	}
}

// look takes over the reading if the reader is at the same write as at the last look. It
// looks again as long as there are writes.
func (w *watchdog) look(s *session) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := w.count.Load()
	switch {
	case w.mu.over:
		return
	case n != w.mu.seen:
	case n%2 == 1:
		if w.count.CompareAndSwap(n, n+1) {
			s.takeOver()
		}
	default: // no write since the last look
		w.armed.Store(false)
		// A write that begins now arms the watchdog. One that has begun before may have
		// seen it armed.
		if w.count.Load() == n || !w.armed.CompareAndSwap(false, true) {
			return
		}
	}
	w.mu.seen = n
	w.mu.timer.Reset(inlineTime)
}

// stop ends the watchdog. No reader is left.
func (w *watchdog) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.over = true
	if w.mu.timer != nil {
		w.mu.timer.Stop()
	}
	if w.call != nil {
		w.call.cancel(nil)
	}
}

// takeOver starts another reader. The one so far is stuck in a write and owns nothing but
// that write and the buffer that it writes from.
func (s *session) takeOver() {
	w := &s.watchdog
	stuck := w.call
	limit := time.AfterFunc(s.timeout, func() { stuck.cancel(context.DeadlineExceeded) })
	context.AfterFunc(stuck.ctx, func() { limit.Stop() })
	w.call = nil
	// The write is in flight from now on. It is not held up at a limit: that would hold up
	// the replies. The next ones are.
	s.client.acquireNow(maxInline)
	s.working.Add(1)
	in := make([]byte, len(s.in))
	s.end = copy(in, s.in[s.begin:s.end])
	s.begin, s.in = 0, in
	s.goroutines = afterInline
	s.tasks.Go(func() {
		err := s.serve(s.ctx)
		if err == errTakenOver {
			return
		}
		if err != errDisc && !s.drains(err) {
			s.cancel(err) // which ends the write
		}
		s.ended <- err
	})
}
