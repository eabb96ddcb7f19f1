package nbd

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"thaw/blockmap"
)

// task is a request that cannot be answered at once. A goroutine does it, and the
// holder of the write side sends its reply.
type task struct {
	req  request
	cost int64  // bytes that it counts for while in flight
	pins int64  // bytes that it pins beyond that
	buf  []byte // the payload of a WRITE, pooled

	// The outcome.
	errno   errno
	why     string        // for a human, where errno is not 0
	at      int64         // the offset that failed, -1 where unknown
	view    blockmap.View // what a READ got: all of it, or what lies before at
	extents []extents     // of BLOCK_STATUS

	next *task // in a taskList
}

// appendTo adds t's reply to b, which takes over its view.
func (t *task) appendTo(b *batch, structured bool) {
	r := &t.req
	var d *read
	if t.view.Len() > 0 {
		d = b.slot()
		d.view, d.end = t.view, 0
		t.view = blockmap.View{}
	}
	switch {
	case t.errno != 0:
		if d != nil {
			b.chunks(r.cookie, r.offset, d.view.Segments(), 0, true)
		}
		b.fail(r.cookie, t.errno, t.why, t.at, structured)
	case r.cmd == cmdRead:
		b.data(r, d, structured)
	case r.cmd == cmdBlockStatus:
		b.status(r.cookie, t.extents)
	default:
		b.simple(r.cookie, 0)
	}
}

// taskList is a queue of tasks.
type taskList struct{ first, last *task }

func (l *taskList) push(t *task) {
	if l.first == nil {
		l.first = t
	} else {
		l.last.next = t
	}
	l.last = t
}

// join adds what is in o.
func (l *taskList) join(o taskList) {
	if l.first == nil {
		*l = o
	} else if o.first != nil {
		l.last.next, l.last = o.first, o.last
	}
}

// take cuts off tasks of about n bytes, at least one if there is any.
func (l *taskList) take(n int64) *task {
	first := l.first
	for t := first; t != nil; t = t.next {
		if n -= t.cost; n <= 0 || t.next == nil {
			l.first, t.next = t.next, nil
			break
		}
	}
	return first
}

// reserve waits until t is admitted. The connection reads nothing meanwhile, which
// slows the client down.
func (s *session) reserve(t *task) error {
	if s.client.TryAcquire(t.cost) {
		return nil
	}
	// Replies must not wait for the admission.
	if err := s.flush(); err != nil {
		return err
	}
	return s.client.Acquire(s.ctx, t.cost)
}

// launch waits until t is admitted, and starts it.
func (s *session) launch(ctx context.Context, t *task) error {
	if err := s.reserve(t); err != nil {
		return err
	}
	s.start(ctx, t)
	return nil
}

// asyncBytes bounds what is loaded without a goroutine: a larger READ goes through the
// device piece by piece, as blockmap.Read does it.
const asyncBytes = 4 << 20

// start does t, which is admitted. A READ of what is on the disk takes no goroutine: the
// replies to all that the disk has finished meanwhile are sent by one.
func (s *session) start(ctx context.Context, t *task) {
	s.working.Add(1)
	if t.req.cmd != cmdRead || t.req.length > asyncBytes {
		s.work(ctx, t)
		return
	}
	s.tasks.Add(1)
	e := blockmap.Range(int64(t.req.offset), int64(t.req.length))
	blockmap.LoadAsync(s.dev, e, func(v blockmap.View, ok bool) {
		defer s.tasks.Done()
		if !ok || v.Pinned() > 0 {
			v.Release()
			s.work(ctx, t)
			return
		}
		t.view = v
		s.working.Add(-1)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.mu.ready.push(t)
		if !s.mu.writing {
			s.mu.writing = true
			s.tasks.Go(func() {
				s.mu.Lock()
				defer s.mu.Unlock()
				s.write(nil)
			})
		}
	})
}

// work does t on a goroutine.
func (s *session) work(ctx context.Context, t *task) {
	s.tasks.Go(func() {
		s.do(ctx, t)
		s.working.Add(-1)
		pins := t.view.Pinned()
		extra := max(pins-t.cost, 0) // chunks are pinned whole
		if pins > 0 && !s.client.TryGrow(extra) {
			s.detachTask(t)
			pins, extra = 0, 0
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if pins > 0 && s.mu.stalled {
			s.mu.Unlock()
			s.detachTask(t)
			s.client.Release(0, extra)
			extra = 0
			s.mu.Lock()
		}
		t.pins = extra
		s.finished(t)
	})
}

// done sends the reply to t, which pins nothing, or leaves it to the holder of the write
// side.
func (s *session) done(t *task) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.finished(t)
}

// finished is done for a caller that holds s.mu.
func (s *session) finished(t *task) {
	s.mu.ready.push(t)
	if !s.mu.writing {
		s.mu.writing = true
		s.write(nil)
	}
}

func (s *session) do(ctx context.Context, t *task) {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	r := &t.req
	e := blockmap.Range(int64(r.offset), int64(r.length))
	t.at = -1
	var err error
	switch r.cmd {
	case cmdRead:
		if t.view, err = blockmap.Read(ctx, s.dev, e); err != nil && s.structured && r.flags&cmdFlagDF == 0 {
			t.view, t.at = s.prefix(e)
		}
	case cmdWrite:
		err = s.wdev.WriteAt(ctx, t.buf, e.Start)
		s.c.srv.bufs.put(t.buf)
		t.buf = nil
	case cmdTrim:
		err = s.wdev.Discard(ctx, e)
	case cmdWriteZeroes:
		err = s.wdev.Zero(ctx, e, r.flags&cmdFlagNoHole == 0)
	case cmdFlush:
		err = s.wdev.Flush(ctx)
	case cmdBlockStatus:
		limit := maxExtents
		if r.flags&cmdFlagReqOne != 0 {
			limit = 1
		}
		t.extents = blockStatus(ctx, s.dev, e, s.contexts, limit)
	}
	if err == nil && r.flags&cmdFlagFUA != 0 && (r.cmd == cmdWrite || r.cmd == cmdTrim || r.cmd == cmdWriteZeroes) {
		err = s.wdev.Flush(ctx)
	}
	if err != nil {
		s.fail(ctx, t, err)
	}
}

// fail makes err the outcome of t.
func (s *session) fail(ctx context.Context, t *task, err error) {
	r := &t.req
	t.errno, t.why = wireErrno(Errno(r.op(), err)), strings.ToValidUTF8(err.Error(), "?")
	if r.cmd == cmdWriteZeroes && r.flags&cmdFlagFastZero != 0 && errors.Is(err, errors.ErrUnsupported) {
		t.errno = eNotSup
	}
	s.c.counts.errors.Add(1)
	if ctx.Err() == nil || errors.Is(err, context.DeadlineExceeded) {
		s.c.srv.lines.requests.Log(s.log, slog.LevelWarn, "request failed", "command", r.cmd,
			"extent", blockmap.Range(int64(r.offset), int64(r.length)), "errno", uint32(t.errno), "err", err)
	}
}

// prefix returns a copy of the resident part of e before its first absent byte, and
// where that byte is: what a failed READ can still deliver.
func (s *session) prefix(e blockmap.Extent) (blockmap.View, int64) {
	at := e.Start
	for at < e.End {
		st := s.dev.Status(blockmap.Extent{Start: at, End: e.End})
		if !st.Resident && !st.Zero || st.End <= at {
			break
		}
		at = min(st.End, e.End)
	}
	if at == e.End {
		return blockmap.View{}, -1
	}
	if at == e.Start {
		return blockmap.View{}, at
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.timeout) // the request's own may have ended
	defer cancel()
	v, ok := s.dev.Load(ctx, blockmap.Extent{Start: e.Start, End: at})
	if !ok {
		return blockmap.View{}, e.Start
	}
	defer v.Release()
	own, at, _ := copyView(&v, e.Start, func(blockmap.Extent, []byte) error { return blockmap.ErrDamaged })
	return own, at
}

// prefetch serves CACHE, which promises nothing. It drops commands beyond a bounded
// number. Each command prefetches step by step, so that it takes little room in the
// device's queues.
func (s *session) prefetch(ctx context.Context, e blockmap.Extent) {
	if s.background.Add(1) > maxBackground {
		s.background.Add(-1)
		return
	}
	s.prefetches.Go(func() {
		defer s.background.Add(-1)
		for e.Len() > 0 && ctx.Err() == nil {
			step := blockmap.Extent{Start: e.Start, End: min(e.End, e.Start+cacheStep)}
			if !s.prefetchStep(ctx, step) {
				return // a later read reports the cause
			}
			e.Start = step.End
		}
	})
}

// prefetchStep prefetches e, and reports whether it is resident.
func (s *session) prefetchStep(ctx context.Context, e blockmap.Extent) bool {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	s.dev.Prefetch(e)
	// A prefetch does not report when it is done.
	tick := time.NewTicker(cachePoll)
	defer tick.Stop()
	for !blockmap.Resident(s.dev, e) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
	return true
}
