package nbd

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"thaw/blockmap"
)

// task is a request that cannot be answered at once. A goroutine does it, and
// whoever holds the write side sends its reply.
type task struct {
	req  request
	cost int64  // bytes it counts for while in flight
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
		pins := t.view.Pinned() // more than t.cost as a rule
		s.mu.Lock()
		defer s.mu.Unlock()
		for pins > 0 && (s.mu.stalled || s.mu.bytes+pins-t.cost > s.maxBytes) {
			s.mu.Unlock()
			s.detachTask(t)
			pins = 0
			s.mu.Lock()
		}
		t.pins = max(pins-t.cost, 0)
		s.mu.bytes += t.pins
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
		if t.view, err = s.readDevice(ctx, e); err != nil && s.structured && r.flags&cmdFlagDF == 0 {
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
	t.errno, t.why = errnoOf(err), strings.ToValidUTF8(err.Error(), "?")
	switch {
	case r.cmd == cmdRead:
		t.errno, t.why = readErrno(err)
	case t.errno == eInval && (r.cmd == cmdWrite || r.cmd == cmdWriteZeroes):
		t.errno = eNoSpace // what the spec wants for a write beyond the end
	case r.cmd == cmdWriteZeroes && r.flags&cmdFlagFastZero != 0 && errors.Is(err, errors.ErrUnsupported):
		t.errno = eNotSup
	}
	s.c.counts.errors.Add(1)
	if ctx.Err() == nil || errors.Is(err, context.DeadlineExceeded) {
		s.c.srv.lines.requests.log(s.log, slog.LevelWarn, "request failed", "command", r.cmd,
			"extent", blockmap.Range(int64(r.offset), int64(r.length)), "errno", uint32(t.errno), "err", err)
	}
}

// readErrno is how a READ fails with err.
func readErrno(err error) (errno, string) {
	e := errnoOf(err)
	if e == eNoSpace {
		e = eIO // the cache is full, not the device; readers know no ENOSPC
	}
	return e, strings.ToValidUTF8(err.Error(), "?")
}

// readWindow is how much of a large read is fetched and copied at a time. As a whole
// it may be larger than the cache, which evicts its beginning before its end has
// come then, and it is fetched again and again. A miss of this size waits for the
// network; the copy is not what it waits for.
const readWindow = 4 << 20

// readDevice returns a view of e once all of it is there.
func (s *session) readDevice(ctx context.Context, e blockmap.Extent) (all blockmap.View, err error) {
	if e.Len() <= readWindow {
		return blockmap.Read(ctx, s.dev, e)
	}
	for e.Len() > 0 {
		w := blockmap.Extent{Start: e.Start, End: min(e.End, e.Start+readWindow)}
		v, err := blockmap.Read(ctx, s.dev, w)
		if err != nil {
			return blockmap.View{}, err
		}
		own, _, err := copyView(&v, w.Start, func(e blockmap.Extent, p []byte) error { return s.readAgain(ctx, e, p) })
		v.Release()
		if err != nil {
			return blockmap.View{}, err
		}
		for i := range own.Segments() {
			if g := &own.Segments()[i]; g.Zero {
				all.AppendZeros(int64(len(g.Bytes)))
			} else {
				all.Append(g.Bytes, nil, 0)
			}
		}
		e.Start = w.End
	}
	return all, nil
}

// prefix is what can be had of e although it cannot be read: a copy of what lies
// before the first byte that is missing, and where that is.
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
	defer v.Release()
	own, at, _ := copyView(&v, e.Start, func(blockmap.Extent, []byte) error { return blockmap.ErrDamaged })
	return own, at
}

// prefetch serves CACHE, which promises nothing, for a bounded number of commands
// at a time. Each goes on step by step, since what is asked for and not yet here
// takes room in the device's queues.
func (s *session) prefetch(ctx context.Context, e blockmap.Extent) {
	if s.background.Add(1) > maxBackground {
		s.background.Add(-1)
		return
	}
	s.wg.Go(func() {
		defer s.background.Add(-1)
		for e.Len() > 0 && ctx.Err() == nil {
			step := blockmap.Extent{Start: e.Start, End: min(e.End, e.Start+cacheStep)}
			if !s.prefetchStep(ctx, step) {
				return // whoever reads it will see why
			}
			e.Start = step.End
		}
	})
}

// prefetchStep brings e, and reports whether it is there.
func (s *session) prefetchStep(ctx context.Context, e blockmap.Extent) bool {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	p, ok := s.dev.(prefetcher)
	st, can := s.dev.(statuser)
	if !ok || !can {
		return s.dev.Fault(ctx, e) == nil
	}
	p.Prefetch(e)
	// A prefetch does not say when it is done.
	tick := time.NewTicker(cachePoll)
	defer tick.Stop()
	for !resident(st, e) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// resident reports whether all of e can be read without fetching.
func resident(d statuser, e blockmap.Extent) bool {
	for e.Len() > 0 {
		st := d.Status(e)
		if !st.Resident && !st.Zero || st.End <= e.Start {
			return false
		}
		e.Start = st.End
	}
	return true
}
