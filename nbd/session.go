package nbd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"thaw/blockmap"
	"thaw/nbd/internal/inline"
)

// Sizes of a session.
const (
	inputReadOnly = 32 << 10  // requests only: a thousand of them
	inputWritable = 256 << 10 // requests and small payloads: 32 of 4 KiB, and some more

	// A WRITE longer than maxPayload is refused and its payload skipped, up to
	// this length. Beyond it the connection is dropped.
	maxSkipPayload = 2 * maxPayload

	maxBackground = 4                     // CACHE commands of one connection at a time
	cacheStep     = 4 << 20               // bytes that each prefetches at a time
	cachePoll     = 20 * time.Millisecond // how often it checks whether they are resident
	roundBytes    = 1 << 20               // of finished tasks that are sent in one round

	payloadTimeout = 5 * time.Second // for the rest of a payload once the server shuts down
	lingerTimeout  = 500 * time.Millisecond
)

// session is the transmission phase of a connection.
//
// Its reader (the connection's goroutine) takes all requests that have arrived with
// one read. It puts the replies to those that it can answer at once (hits) in a batch,
// and sends the batch in one write when the input is used up. It does small WRITEs itself,
// too, as long as they take no time: see takeover.go. Every other request
// becomes a task; their number is bounded. A task waits for the disk without a goroutine,
// and for anything else with one. A finished task is put on the ready list, and the
// goroutine that holds the write side sends its reply.
//
//	reader ──hit, small write──▶ batch ─┐
//	   └─────all else──▶ task ──done──▶ ready ──▶ holder ──writev──▶ client
//
// One goroutine at a time holds the write side, without a lock: the reader with its
// batch, or that of the first task that finds the write side free. The holder goes on until
// nothing is ready. A reader that finds the write side taken hands over its batch and
// waits until that was sent.
type session struct {
	c          *conn
	nc         net.Conn // c.nc, or TLS over it
	w          wire
	copied     bool // w is given no bytes of mappings
	log        *slog.Logger
	ctx        context.Context // of the connection
	cancel     context.CancelCauseFunc
	dev        blockmap.Device
	wdev       blockmap.WritableDevice // nil: read-only
	size       int64
	structured bool
	contexts   []metaContext
	timeout    time.Duration
	client     *Client // bounds what is in flight

	// The reader's own.
	in         []byte
	begin, end int   // the part of in that is not parsed
	hits       batch // replies to leave at the end of the input
	nhits      int64
	parsed     int  // requests
	goroutines int  // WRITEs to come that take goroutines
	refuse     bool // the server shuts down: no more requests
	lone       int  // reads in a row that brought one request and found none in flight
	idle       idle
	watchdog   inline.Watchdog
	stuckCost  int64       // of the request that the reader does itself, if it is taken over
	behind     atomic.Bool // something waits for its end: input that is not parsed, or replies
	call       *call       // bounds what the reader does itself, and is replaced when the reader is
	ended      chan error  // what ends the reading, from a goroutine that has taken it over

	// For the holder of the write side.
	late    batch  // for a task that holds it
	sending *batch // what is being written
	patient func() time.Duration

	working    atomic.Int32 // tasks that are not done
	background atomic.Int32
	tasks      sync.WaitGroup
	prefetches sync.WaitGroup

	mu struct {
		sync.Mutex
		changed sync.Cond // tells the reader that handed was written
		writing bool      // somebody holds the write side
		stalled bool      // and waits for a client that takes no replies
		ready   taskList  // finished, to be written
		handed  *batch    // the reader's, to be written
		wrote   time.Time // the end of the last write; see idle
		err     error     // of the write side, which writes no more
	}
}

// terms are what a handshake agrees on.
type terms struct {
	export     *Export
	structured bool
	contexts   []metaContext
}

// newSession makes a session of c over nc, which is c.nc or TLS over it.
func newSession(c *conn, nc net.Conn, t terms, log *slog.Logger, cancel context.CancelCauseFunc) *session {
	s := &session{
		c:          c,
		nc:         nc,
		log:        log,
		cancel:     cancel,
		dev:        t.export.Device,
		wdev:       t.export.writable(),
		size:       t.export.Device.Size(),
		structured: t.structured,
		contexts:   t.contexts,
		timeout:    cmp.Or(c.srv.FaultTimeout, DefaultFaultTimeout),
		ended:      make(chan error, 1),
		client: c.srv.Admission.Client(Limits{
			Requests: cmp.Or(c.srv.MaxWaiters, DefaultMaxWaiters),
			Bytes:    cmp.Or(c.srv.MaxInFlightBytes, DefaultMaxInFlightBytes),
		}),
	}
	s.w, s.copied = newWire(nc, c.srv.WriteTimeout, &c.srv.clients, s.stall)
	s.patient = s.patience
	s.idle.limit = c.srv.IdleTimeout
	s.in = make([]byte, inputReadOnly)
	if s.wdev != nil {
		s.in = make([]byte, inputWritable)
	}
	s.mu.changed.L = &s.mu
	return s
}

// errDisc ends a session after DISC, errIdle after IdleTimeout.
var (
	errDisc = errors.New("disconnected by the client")
	errIdle = errors.New("the client was idle for too long")
)

// run serves requests. It returns nil when the client has sent DISC or the server has
// shut down, io.EOF when the client hangs up without DISC, which is common, errIdle
// when the client is idle for too long, and any other error when the connection
// breaks. When it returns, all its goroutines have ended and all views are released.
func (s *session) run(ctx context.Context) error {
	s.ctx = ctx
	s.idle.begin(s)
	s.watchdog.Patience, s.watchdog.TakeOver = inlineTime, s.takeOver
	s.watchdog.Waits = func() bool { return s.behind.Load() || s.w.waiting() }
	err := s.serve(ctx)
	if err == errTakenOver {
		err = <-s.ended
	}
	switch {
	case err == errDisc:
		s.finish()
		err = nil
	case s.drains(err):
		err = s.drain(ctx)
	}
	s.cancel(err)
	s.tasks.Wait()
	s.watchdog.Stop()
	if s.call != nil {
		s.call.cancel(nil)
	}
	s.prefetches.Wait()
	s.hits.reset()
	s.mu.Lock()
	if errors.Is(err, net.ErrClosed) {
		err = cmp.Or(s.mu.err, err) // why the writer closed it
	}
	s.mu.Unlock()
	if s.nc != s.c.nc {
		s.nc.Close() // TLS says goodbye
	}
	return err
}

// drains reports whether the reading has ended with err because the server shuts down.
func (s *session) drains(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) && s.c.draining()
}

// serve reads and answers requests until there is a reason to stop. It begins with what
// is in s.in.
func (s *session) serve(ctx context.Context) error {
	quiet := false // nothing was in flight when the last read returned
	for {
		before := s.parsed
		if err := s.parse(ctx); err != nil {
			return err
		}
		if quiet && s.parsed-before == 1 && s.end == 0 {
			s.lone++
		} else {
			s.lone = 0
		}
		if err := s.flush(); err != nil {
			return err
		}
		if s.refuse {
			return os.ErrDeadlineExceeded // met by readPayload
		}
		s.w.brought(s.parsed - before)
		n, err := s.read(s.in[s.end:])
		if err != nil {
			return err
		}
		s.end += n
		quiet = s.working.Load() == 0 && !s.copied
	}
}

// parse handles the requests that are complete in s.in and keeps the rest.
func (s *session) parse(ctx context.Context) error {
	for s.end-s.begin >= requestLen {
		r, ok := parseRequest(s.in[s.begin:])
		if !ok {
			s.flush()
			return fmt.Errorf("bad request magic %#x", s.in[s.begin:s.begin+4])
		}
		s.begin += requestLen
		s.parsed++
		if err := s.handle(ctx, &r); err != nil {
			if err != errTakenOver {
				s.flush()
			}
			return err
		}
	}
	s.end = copy(s.in, s.in[s.begin:s.end])
	s.begin = 0
	return nil
}

// handle answers r or makes a task of it. An error ends the session.
func (s *session) handle(ctx context.Context, r *request) error {
	if r.cmd == cmdRead && s.check(r) == 0 { // the hit path
		e := blockmap.Range(int64(r.offset), int64(r.length))
		d, ok := s.hits.slot(), r.length == 0
		if !ok {
			if d.view, ok = s.dev.View(e); !ok && s.alone() {
				s.hits.dropSlot()
				v, loaded, err := s.loadAlone(ctx, r)
				if err != nil {
					return err
				}
				d = s.hits.slot()
				d.view, ok = v, loaded
			}
		}
		if ok {
			s.hits.data(r, d, s.structured)
			s.nhits++
			if s.hits.full() {
				return s.flush()
			}
			return nil
		}
		s.hits.dropSlot()
		s.c.counts.misses.Add(1)
		return s.launch(ctx, &task{req: *r, cost: int64(r.length)})
	}
	if r.cmd == cmdDisc {
		return errDisc
	}

	s.c.counts.others.Add(1)
	if e := s.check(r); e != 0 {
		if r.cmd == cmdWrite {
			if r.length > maxSkipPayload {
				return fmt.Errorf("a WRITE has %d bytes, of at most %d", r.length, maxPayload)
			}
			if err := s.skip(int(r.length)); err != nil {
				return err
			}
		}
		s.c.counts.errors.Add(1)
		s.hits.fail(r.cookie, e, e.String(), -1, s.structured)
		return s.more()
	}
	if r.cmd == cmdWrite && r.length <= maxInline && r.flags&cmdFlagFUA == 0 {
		if s.goroutines == 0 {
			return s.writeInline(r)
		}
		s.goroutines--
	}
	t := &task{req: *r}
	switch r.cmd {
	case cmdWrite:
		t.cost = int64(r.length)
		if err := s.reserve(t); err != nil {
			return err
		}
		t.buf = s.c.srv.bufs.get(int(r.length))
		s.idle.before = 1
		err := s.take(t.buf)
		s.idle.before = 0
		if err != nil {
			s.c.srv.bufs.put(t.buf)
			s.client.Release(1, t.cost)
			return err
		}
		s.start(ctx, t)
		return nil
	case cmdCache:
		s.prefetch(ctx, blockmap.Range(int64(r.offset), int64(r.length)))
		s.hits.simple(r.cookie, 0)
		return s.more()
	case cmdFlush:
		if s.wdev == nil {
			s.hits.simple(r.cookie, 0) // nothing was written
			return s.more()
		}
		if s.alone() && s.hits.empty() {
			return s.flushInline(r)
		}
	case cmdBlockStatus:
		// At most one extent a block, in each context.
		t.cost = min(int64(r.length)/blockmap.BlockSize+2, maxExtents) * 8 * int64(len(s.contexts))
	}
	return s.launch(ctx, t)
}

// alone reports whether a client of depth 1 waits for the request at hand.
func (s *session) alone() bool {
	return s.lone >= loneReads && s.begin == s.end && s.working.Load() == 0
}

// more writes the batch when it is full of replies.
func (s *session) more() error {
	if len(s.hits.bufs) >= 2*batchReplies || s.hits.full() {
		return s.flush()
	}
	return nil
}

// take reads len(p) bytes of payload, first from what is here.
func (s *session) take(p []byte) error {
	n := copy(p, s.in[s.begin:s.end])
	s.begin += n
	if n == len(p) {
		return nil
	}
	if err := s.flush(); err != nil { // no reply may wait for the client's payload
		return err
	}
	for n < len(p) {
		m, err := s.readPayload(p[n:])
		if err != nil {
			return err
		}
		n += m
	}
	return nil
}

// skip reads past n bytes of payload.
func (s *session) skip(n int) error {
	have := min(n, s.end-s.begin)
	s.begin += have
	n -= have
	if n == 0 {
		return nil
	}
	// All of s.in is used up, so it can take what is skipped.
	s.begin, s.end = 0, 0
	if err := s.flush(); err != nil {
		return err
	}
	for n > 0 {
		m, err := s.readPayload(s.in[:min(n, len(s.in))])
		if err != nil {
			return err
		}
		n -= m
	}
	return nil
}

// readPayload reads some of a payload. A shutdown gives the client payloadTimeout to
// send the rest.
func (s *session) readPayload(p []byte) (int, error) {
	n, err := s.read(p)
	if err == io.EOF {
		return 0, io.ErrUnexpectedEOF
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && s.c.draining() && !s.refuse {
		s.refuse = true
		s.nc.SetReadDeadline(time.Now().Add(payloadTimeout))
		return s.readPayload(p)
	}
	return n, err
}

// read reads from the client, for as long as it may idle.
func (s *session) read(p []byte) (int, error) {
	for {
		n, err := s.w.read(p)
		if s.idle.limit == 0 {
			return n, err
		}
		again, err := s.idle.read(s, err)
		if !again {
			return n, err
		}
	}
}

// flush writes the batch, with the tasks that are ready, and returns when it was
// sent.
func (s *session) flush() error {
	if s.hits.empty() {
		return nil
	}
	if s.nhits > 0 {
		s.c.counts.hits.Add(s.nhits)
		s.nhits = 0
	}
	s.mu.Lock()
	if s.mu.stalled && len(s.hits.reads) > 0 {
		// A client that does not take its replies pins nothing.
		s.mu.Unlock()
		_ = s.detach(&s.hits, 0)
		s.mu.Lock()
	}
	if s.mu.writing {
		s.hits.handed = true
		s.mu.handed = &s.hits
		for s.hits.handed {
			s.mu.changed.Wait()
		}
	} else {
		s.mu.writing = true
		s.write(&s.hits)
	}
	err := s.mu.err
	s.mu.Unlock()
	return err
}

// write holds the write side: it writes b, if any, and then what is ready or handed
// over, until nothing is left. The caller holds s.mu and has set writing; s.mu is held
// again when write returns.
func (s *session) write(b *batch) {
	for {
		if b == nil {
			b = &s.late
			if s.mu.handed != nil {
				b, s.mu.handed = s.mu.handed, nil
			}
		}
		tasks := s.mu.ready.take(roundBytes)
		err := s.mu.err
		s.mu.Unlock()

		for t := tasks; t != nil; t = t.next {
			t.appendTo(b, s.structured)
		}
		if err == nil {
			err = s.send(b)
		}
		b.reset()

		s.mu.Lock()
		s.mu.stalled = false
		if s.idle.limit > 0 {
			s.mu.wrote = time.Now()
		}
		if err != nil && s.mu.err == nil {
			s.mu.err = err
			s.cancel(err)
			s.c.nc.Close() // the reader has nothing to wait for
		}
		b.handed = false
		if tasks != nil {
			n, bytes := 0, int64(0)
			for t := tasks; t != nil; t = t.next {
				n, bytes = n+1, bytes+t.cost+t.pins
			}
			s.client.Release(n, bytes)
		}
		s.mu.changed.Signal()
		if s.mu.ready.first == nil && s.mu.handed == nil {
			s.mu.writing = false
			return
		}
		b = nil
	}
}

// send writes b. Where its bytes cannot be read, or the client does not take them,
// it goes on with copies: see detach.go.
func (s *session) send(b *batch) error {
	if s.copied {
		if !b.detached() {
			_ = s.detach(b, 0)
		}
		n, err := s.w.writev(b.bufs, nil)
		s.c.counts.sent.Add(int64(n))
		return err
	}
	s.sending = b
	// A batch without views can stall, too: replies with views may wait behind it.
	// After a stall only WriteTimeout ends the wait.
	patience := s.patient
	for {
		n, err := s.w.writev(b.bufs, patience)
		s.c.counts.sent.Add(int64(n))
		if patience == nil || !errors.Is(err, errFault) && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			s.stall()
			patience = nil
		}
		if err := s.detach(b, n); err != nil {
			return err
		}
	}
}

// finish waits until all tasks are answered.
func (s *session) finish() {
	s.flush()
	s.tasks.Wait()
}

// drain ends the session for a server that shuts down. It answers requests that have
// arrived with ESHUTDOWN and those in flight as usual. The client then sees the end of
// the stream, behind all replies.
func (s *session) drain(ctx context.Context) error {
	s.refuse = true
	s.nc.SetReadDeadline(time.Time{})
	for range 2 { // again for requests that arrive during finish
		for {
			n, err := s.w.tryRead(s.in[s.end:])
			if err != nil || n == 0 {
				break
			}
			s.end += n
			if err := s.parse(ctx); err != nil {
				s.finish()
				return nil
			}
			if err := s.flush(); err != nil {
				return err
			}
		}
		s.finish()
	}
	// Closing a socket with unread bytes discards replies that its peer has not
	// read yet. So the server reads the rest, for up to lingerTimeout.
	if cw, ok := s.nc.(interface{ CloseWrite() error }); ok && cw.CloseWrite() == nil {
		s.nc.SetReadDeadline(time.Now().Add(lingerTimeout))
		for {
			if _, err := s.w.read(s.in); err != nil {
				break
			}
		}
	}
	return nil
}
