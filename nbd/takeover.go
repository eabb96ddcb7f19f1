package nbd

import (
	"context"
	"errors"
	"time"
)

// The reader itself does a small WRITE, straight from its input buffer: no copy, no
// goroutine, no lock. That takes microseconds as a rule. It can take seconds where the disk
// is busy, or where the rest of a block has to be fetched first, and no other request may
// wait for that. So a watchdog looks every millisecond whether the reader is still at the
// same write (package inline). If it is, another goroutine takes over the reading, with a
// buffer of its own. The first one only finishes its write, as a task.
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
	if s.call == nil {
		s.call = newCall(s.ctx)
	}
	c := s.call
	n := s.watchdog.Begin()
	err = s.wdev.WriteAt(c.ctx, p, int64(r.offset))
	if s.watchdog.End(n) {
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

// takeOver starts another reader. The one so far is stuck in a write and owns nothing but
// that write and the buffer that it writes from.
func (s *session) takeOver() {
	stuck := s.call
	limit := time.AfterFunc(s.timeout, func() { stuck.cancel(context.DeadlineExceeded) })
	context.AfterFunc(stuck.ctx, func() { limit.Stop() })
	s.call = nil
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
