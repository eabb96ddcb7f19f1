package nbd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"thaw/blockmap"
)

// task is a request that cannot be answered at once. A goroutine does it, and
// whoever holds the write side sends its reply.
type task struct {
	req  request
	cost int64  // bytes it counts for while in flight
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
	var v *blockmap.View
	if t.view.Len() > 0 {
		v = b.view()
		*v, t.view = t.view, blockmap.View{}
	}
	switch {
	case t.errno != 0:
		if v != nil {
			b.chunks(r.cookie, r.offset, v.Segments(), 0, true)
		}
		b.fail(r.cookie, t.errno, t.why, t.at, structured)
	case r.cmd == cmdRead:
		b.data(r, v, structured)
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

// take cuts off tasks of some n bytes, at least one if there is any.
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

// reserve waits until there is room for t among the tasks in flight. The
// connection reads nothing meanwhile, which is what slows the client down.
func (s *session) reserve(t *task) error {
	s.mu.Lock()
	if !s.room(t) {
		// Replies must not wait for what may take long.
		s.mu.Unlock()
		if err := s.flush(); err != nil {
			return err
		}
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	for s.mu.err == nil && !s.room(t) {
		s.mu.changed.Wait()
	}
	if s.mu.err != nil {
		return s.mu.err
	}
	s.mu.tasks++
	s.mu.bytes += t.cost
	return nil
}

// room reports whether t fits beside the tasks in flight; s.mu is held.
func (s *session) room(t *task) bool {
	return s.mu.tasks == 0 || s.mu.tasks < s.maxTasks && s.mu.bytes+t.cost <= s.maxBytes
}

// release gives back what reserve has taken, for a task that is not started.
func (s *session) release(t *task) {
	s.mu.Lock()
	s.mu.tasks--
	s.mu.bytes -= t.cost
	s.mu.Unlock()
}

// launch makes room for t and starts it.
func (s *session) launch(ctx context.Context, t *task) error {
	if err := s.reserve(t); err != nil {
		return err
	}
	s.start(ctx, t)
	return nil
}

// start does t on a goroutine. There is room for it.
func (s *session) start(ctx context.Context, t *task) {
	s.wg.Go(func() {
		s.do(ctx, t)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.mu.ready.push(t)
		if !s.mu.writing {
			s.mu.writing = true
			s.write(nil)
		}
	})
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
		if t.view, err = view(ctx, s.dev, e); err != nil && s.structured && r.flags&cmdFlagDF == 0 {
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
	if err == nil {
		return
	}
	t.errno, t.why = errnoOf(err), strings.ToValidUTF8(err.Error(), "?")
	if t.errno == eInval && (r.cmd == cmdWrite || r.cmd == cmdWriteZeroes) {
		t.errno = eNoSpace // what the spec wants for a write beyond the end
	}
	if t.errno == eNoSpace && r.cmd == cmdRead {
		t.errno = eIO // the cache is full, not the device; readers know no ENOSPC
	}
	if r.cmd == cmdWriteZeroes && r.flags&cmdFlagFastZero != 0 && errors.Is(err, errors.ErrUnsupported) {
		t.errno = eNotSup
	}
	s.c.counts.errors.Add(1)
	if ctx.Err() == nil || errors.Is(err, context.DeadlineExceeded) {
		s.log.Warn("request failed", "command", r.cmd, "extent", e, "errno", uint32(t.errno), "err", err)
	}
}

// view waits for e to be resident and returns it.
func view(ctx context.Context, d blockmap.Device, e blockmap.Extent) (blockmap.View, error) {
	for n := 0; ; n++ {
		if v, ok := d.View(e); ok {
			return v, nil
		}
		if n > 2 {
			// Evicted again and again before we could look: the
			// cache is too small for what is asked of it.
			select {
			case <-time.After(time.Duration(n) * time.Millisecond):
			case <-ctx.Done():
				return blockmap.View{}, fmt.Errorf("read %v: %w", e, context.Cause(ctx))
			}
		}
		if err := d.Fault(ctx, e); err != nil {
			return blockmap.View{}, err
		}
	}
}

// prefix is what can be had of e although its Fault has failed: a view of what
// lies before the first byte that is missing, and where that is.
func (s *session) prefix(e blockmap.Extent) (blockmap.View, int64) {
	d, ok := s.dev.(statuser)
	if !ok {
		return blockmap.View{}, -1
	}
	at := e.Start
	for at < e.End {
		st := d.Status(blockmap.Extent{Start: at, End: e.End})
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
	v, ok := s.dev.View(blockmap.Extent{Start: e.Start, End: at})
	if !ok {
		return blockmap.View{}, e.Start
	}
	return v, at
}

// prefetch serves CACHE, which promises nothing: where the device has no way
// of its own, a bounded number of Faults in the background.
func (s *session) prefetch(ctx context.Context, e blockmap.Extent) {
	if d, ok := s.dev.(prefetcher); ok {
		d.Prefetch(e)
		return
	}
	if s.background.Add(1) > maxBackground {
		s.background.Add(-1)
		return
	}
	s.wg.Go(func() {
		defer s.background.Add(-1)
		ctx, cancel := context.WithTimeout(ctx, s.timeout)
		defer cancel()
		for e.Len() > 0 && ctx.Err() == nil {
			step := blockmap.Extent{Start: e.Start, End: min(e.End, e.Start+cacheStep)}
			if s.dev.Fault(ctx, step) != nil {
				return // whoever reads it will see why
			}
			e.Start = step.End
		}
	})
}
