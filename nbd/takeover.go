package nbd

import (
	"context"
	"errors"
	"time"

	"thaw/blockmap"
)

// The reader itself does a small WRITE, straight from its input buffer: no copy, no
// goroutine, no lock. Where the client waits for nothing else, it also loads what a READ
// asks for from the disk, and does a FLUSH. That takes microseconds as a rule, or what the
// disk takes. It can take seconds where the disk is busy, or where the rest of a block has to
// be fetched first, and no other request may wait for that. So a watchdog looks every
// millisecond whether the reader is still at the same request (package inline), and whether
// the client has sent something else meanwhile. If so, another goroutine takes over the
// reading, with a buffer of its own. The first one only finishes its request, as a task.
//
// A device that is slow once is likely to be slow again, so the next WRITEs take goroutines.

const (
	maxInline   = 64 << 10         // bytes of a WRITE that the reader does itself
	inlineTime  = time.Millisecond // it may take that long, and up to twice as long
	afterInline = 64               // WRITEs that take goroutines after a slow one
)

// errTakenOver ends a reader whose place another goroutine has taken. It owns nothing of
// the reader any more.
var errTakenOver = errors.New("another goroutine has taken over the reading")

// call is a context for requests that a reader does itself. It has no deadline, which would
// cost more than a write: a request that is taken over gets one.
type call struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
}

func newCall(ctx context.Context) *call {
	c := new(call)
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	return c
}

// beginInline begins the request r on the reader.
func (s *session) beginInline(r *request) (c *call, n uint64) {
	if s.call == nil {
		s.call = newCall(s.ctx)
	}
	s.stuckCost = inlineCost(r)
	s.behind.Store(s.begin < s.end || !s.hits.empty())
	c = s.call // which is another reader's, perhaps, as soon as the request has begun
	return c, s.watchdog.Begin()
}

// writeInline does the WRITE r on the reader.
func (s *session) writeInline(r *request) error {
	p, err := s.payload(int(r.length))
	if err != nil {
		return err
	}
	c, n := s.beginInline(r)
	return s.endInline(r, c, n, s.wdev.WriteAt(c.ctx, p, int64(r.offset)))
}

// flushInline does the FLUSH r on the reader.
func (s *session) flushInline(r *request) error {
	c, n := s.beginInline(r)
	return s.endInline(r, c, n, s.wdev.Flush(c.ctx))
}

// endInline ends a request without a payload for the client, which has ended with err.
func (s *session) endInline(r *request, c *call, n uint64, err error) error {
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
	t := s.takenOver(r, c)
	if err != nil {
		s.fail(s.ctx, t, err)
	}
	s.working.Add(-1)
	s.done(t)
	return errTakenOver
}

// takenOver makes a task of a request that was taken over.
func (s *session) takenOver(r *request, c *call) *task {
	c.cancel(nil)
	return &task{req: *r, at: -1, cost: inlineCost(r)}
}

// inlineCost is what a request on the reader counts for once it is a task. A WRITE keeps the
// whole input buffer that its bytes are in.
func inlineCost(r *request) int64 {
	switch r.cmd {
	case cmdFlush:
		return 0
	case cmdWrite:
		return inputWritable
	}
	return int64(r.length)
}

// loadAlone loads what the READ r asks for, for a client that waits for nothing else, on the
// reader. Any other thread would have to be woken, and to wake this one, which takes as long
// as a fast disk. If something else has arrived meanwhile, the client is not of depth 1.
func (s *session) loadAlone(ctx context.Context, r *request) (v blockmap.View, ok bool, err error) {
	c, n := s.beginInline(r)
	v, ok = s.dev.Load(c.ctx, blockmap.Range(int64(r.offset), int64(r.length)))
	if s.watchdog.End(n) {
		s.begin, s.end = 0, 0 // r was the last in s.in, and may have filled it
		if n, err := s.w.tryRead(s.in); err == nil && n > 0 {
			s.end = n
			s.lone = 0
		}
		return v, ok, nil
	}
	t := s.takenOver(r, c)
	if !ok || v.Pinned() > 0 {
		v.Release()
		s.c.counts.misses.Add(1)
		s.work(ctx, t)
		return blockmap.View{}, false, errTakenOver
	}
	s.c.counts.hits.Add(1)
	t.view = v
	s.working.Add(-1)
	s.done(t)
	return blockmap.View{}, false, errTakenOver
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

// takeOver starts another reader. The one so far is stuck in a request and owns nothing but
// that request and, for a WRITE, the buffer that it writes from.
func (s *session) takeOver() {
	stuck := s.call
	limit := time.AfterFunc(s.timeout, func() { stuck.cancel(context.DeadlineExceeded) })
	context.AfterFunc(stuck.ctx, func() { limit.Stop() })
	s.call = nil
	// The request is in flight from now on. It is not held up at a limit: that would hold up
	// the replies. The next ones are.
	s.client.acquireNow(s.stuckCost)
	s.working.Add(1)
	in := make([]byte, len(s.in))
	s.end = copy(in, s.in[s.begin:s.end])
	s.begin, s.in = 0, in
	s.goroutines, s.lone = afterInline, 0
	s.tasks.Go(func() {
		err := s.serve(s.ctx)
		if err == errTakenOver {
			return
		}
		if err != errDisc && !s.drains(err) {
			s.cancel(err) // which ends the request
		}
		s.ended <- err
	})
}
