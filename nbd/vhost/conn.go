package vhost

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
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/nbd"
)

// maxQueues is how many queues a message can name.
const maxQueues = 256

// conn is a front end's connection: the device of one virtual machine. One goroutine
// reads and answers its messages, and starts and stops its queues, each of which has a
// goroutine of its own.
type conn struct {
	srv    *Server
	nc     *net.UnixConn
	at     *endpoint
	log    *slog.Logger
	counts counts
	ctx    context.Context // ends with the connection
	cancel context.CancelCauseFunc

	// What it serves.
	dev    blockmap.Device
	wdev   blockmap.WritableDevice // nil: read-only
	size   int64
	id     [idLen]byte
	client *nbd.Client // bounds what is in flight

	// What the front end has set. For the connection's goroutine.
	features uint64
	protocol uint64
	mem      *memory
	inflight *inflightFile
	queues   []*queue

	mu struct {
		sync.Mutex
		drain bool // the server shuts down
	}
}

// counts are the connection's share of Stats.
type counts struct {
	hits, misses, others, errors, read, resumed, kicks, interrupts, repaired atomic.Int64
}

func (n *counts) load() Stats {
	return Stats{
		Hits:       n.hits.Load(),
		Misses:     n.misses.Load(),
		Others:     n.others.Load(),
		Errors:     n.errors.Load(),
		Read:       n.read.Load(),
		Resumed:    n.resumed.Load(),
		Kicks:      n.kicks.Load(),
		Interrupts: n.interrupts.Load(),
		Repaired:   n.repaired.Load(),
	}
}

func newConn(s *Server, nc *net.UnixConn, at *endpoint) *conn {
	return &conn{srv: s, nc: nc, at: at, log: s.log().With("export", at.export)}
}

// Reasons for the end of a connection.
var (
	errDrained = errors.New("the server has shut down")
	// errStopped cancels the requests of a queue that is stopped. They stay in flight.
	errStopped = errors.New("the queue was stopped")
)

// serve carries the connection from its first message to its end.
func (c *conn) serve(ctx context.Context) {
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	defer c.cancel(nil)
	defer c.nc.Close()
	e, release, err := c.srv.open(c.ctx, c.at.export)
	if err != nil {
		if !errors.Is(context.Cause(ctx), ErrServerClosed) {
			c.srv.lines.refused.Log(c.log, slog.LevelWarn, "cannot serve the export to a virtual machine", "err", err)
		}
		return
	}
	defer release()
	c.use(e)
	defer c.close()
	c.log.Debug("virtual machine connected", "read_only", c.wdev == nil)
	err = c.run()
	if cause := context.Cause(c.ctx); cause != nil {
		err = cause // why a queue, or the server, has ended it
	}
	st := c.counts.load()
	log := c.log.With("hits", st.Hits, "misses", st.Misses, "others", st.Others, "errors", st.Errors)
	switch {
	case errors.Is(err, ErrServerClosed), errors.Is(err, errDrained), gone(err):
		log.Debug("virtual machine disconnected", "err", err)
	default:
		c.srv.lines.ends.Log(log, slog.LevelWarn, "connection of a virtual machine fails", "err", err)
	}
}

// use makes c serve e.
func (c *conn) use(e *nbd.Export) {
	c.dev, c.wdev, c.size, c.id = e.Device, writable(e), e.Device.Size(), deviceID(e.Name)
	c.client = c.srv.Admission.Client(nbd.Limits{
		Requests: cmp.Or(c.srv.MaxWaiters, DefaultMaxWaiters),
		Bytes:    cmp.Or(c.srv.MaxInFlightBytes, DefaultMaxInFlightBytes),
	})
	c.queues = make([]*queue, c.srv.queues())
	for i := range c.queues {
		c.queues[i] = newQueue(c, i)
	}
}

// run answers messages until there is a reason to stop.
func (c *conn) run() error {
	wait := time.Now().Add(c.srv.openTimeout())
	for {
		c.setReadDeadline(wait)
		m, err := receive(c.nc)
		if err != nil {
			switch {
			case !errors.Is(err, os.ErrDeadlineExceeded):
			case c.draining():
				return c.finish()
			case !wait.IsZero():
				err = fmt.Errorf("the front end has sent nothing within %v", c.srv.openTimeout())
			}
			return err
		}
		wait = time.Time{}
		err = c.handle(&m)
		m.close()
		if err != nil {
			return fmt.Errorf("%v: %w", m.id, err)
		}
	}
}

// handle does what a message asks for, and answers it. An error ends the connection.
func (c *conn) handle(m *message) error {
	var out []byte
	switch m.id {
	case getFeatures:
		out = u64(features(c.wdev != nil))
	case getProtocolFeatures:
		out = u64(protocolOffered)
	case getQueueNum:
		out = u64(uint64(len(c.queues)))
	case getConfig:
		return reply(c.nc, m.id, m.getConfig(config(c.size, len(c.queues), c.wdev != nil)))
	case getVringBase:
		base, err := c.stopQueue(m)
		if err != nil {
			return err
		}
		out = base
	case getInflightFD:
		return c.makeInflight(m)
	default:
		failed, err := c.set(m)
		if err != nil || c.protocol&protocolReplyAck == 0 || m.flags&flagNeedReply == 0 {
			return err
		}
		if failed {
			return reply(c.nc, m.id, u64(1))
		}
		return reply(c.nc, m.id, u64(0))
	}
	return reply(c.nc, m.id, out)
}

// set does a message that has no answer of its own. failed is for one that could not be
// done and changes nothing.
func (c *conn) set(m *message) (failed bool, err error) {
	switch m.id {
	case setFeatures:
		n, err := m.u64()
		if err != nil {
			return false, err
		}
		return false, c.setFeatures(n)
	case setProtocolFeatures:
		n, err := m.u64()
		if err != nil {
			return false, err
		}
		if n&^protocolOffered != 0 {
			return false, fmt.Errorf("it has features %#x, which were not offered", n&^protocolOffered)
		}
		c.protocol = n
	case setOwner:
		return false, m.size(0)
	case setMemTable:
		return false, c.setMemory(m)
	case setVringNum, setVringBase, setVringEnable:
		index, n, err := m.vringState()
		if err != nil {
			return false, err
		}
		q, err := c.queue(index)
		if err != nil {
			return false, err
		}
		return false, q.set(m.id, n)
	case setVringAddr:
		index, a, err := m.vringAddr()
		if err != nil {
			return false, err
		}
		q, err := c.queue(index)
		if err != nil {
			return false, err
		}
		return false, q.setAddr(a)
	case setVringKick, setVringCall, setVringErr:
		index, fd, err := m.vringFD()
		if err != nil {
			return false, err
		}
		return false, c.setFD(m.id, index, fd)
	case setConfig:
		// The guest may write to no field: see features.
		return true, nil
	case setInflightFD:
		return false, c.setInflight(m)
	case resetOwner: // to be ignored, or to disable all rings
		return false, c.disable()
	case resetDevice:
		c.reset()
	default:
		return false, errors.New("it is unknown, or belongs to a feature that was not offered")
	}
	return false, nil
}

func (c *conn) setFeatures(f uint64) error {
	if err := checkFeatures(f); err != nil {
		return err
	}
	if f == c.features {
		return nil
	}
	for _, q := range c.queues {
		if q.running {
			return fmt.Errorf("the features change from %#x to %#x while queue %d runs", c.features, f, q.index)
		}
		// Without the protocol features a ring is always enabled ("Ring states").
		q.enabled = q.enabled || f&featureProtocol == 0
	}
	c.features = f
	return c.startQueues()
}

// writethrough reports whether each write is to be durable when it is complete: the
// driver does not flush (section 5.2.6.2).
func (c *conn) writethrough() bool { return c.features&featureFlush == 0 }

// setMemory replaces the guest's memory. Queues go on in the new one. Requests in flight
// end in the old one, which is the same memory but for what was added or removed.
func (c *conn) setMemory(m *message) error {
	mem, err := parseMemTable(m, cmp.Or(c.srv.MaxMemory, DefaultMaxMemory))
	if err != nil {
		return err
	}
	if err := mem.count(c.at); err != nil {
		mem.release()
		return err
	}
	old := c.mem
	c.mem = mem
	for _, q := range c.queues {
		if err := q.move(); err != nil {
			return err
		}
	}
	if old != nil {
		old.release()
	}
	return c.startQueues()
}

func (c *conn) queue(index uint32) (*queue, error) {
	if index >= uint32(len(c.queues)) {
		return nil, fmt.Errorf("it is for queue %d, of %d", index, len(c.queues))
	}
	return c.queues[index], nil
}

// startQueues starts each queue that has all that it needs.
func (c *conn) startQueues() error {
	for _, q := range c.queues {
		if err := q.start(); err != nil {
			return err
		}
	}
	return nil
}

// setFD gives a queue the descriptor fd, or takes the one that it has where fd is -1.
func (c *conn) setFD(id requestID, index uint32, fd int) error {
	q, err := c.queue(index)
	if err == nil && fd >= 0 {
		err = checkEventFD(fd)
	}
	if err == nil && fd < 0 && id == setVringKick {
		err = errors.New("it has no descriptor, which asks for polling: queues are not polled")
	}
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return err
	}
	switch id {
	case setVringCall:
		q.setCall(fd)
	case setVringErr:
		q.setErr(fd)
	case setVringKick:
		f, err := newKick(fd)
		if err != nil {
			return err
		}
		return q.setKick(f)
	}
	return nil
}

// stopQueue stops the queue of a GET_VRING_BASE, and returns the reply.
func (c *conn) stopQueue(m *message) ([]byte, error) {
	index, _, err := m.vringState()
	if err != nil {
		return nil, err
	}
	q, err := c.queue(index)
	if err != nil {
		return nil, err
	}
	q.stop()
	if err := q.setKick(nil); err != nil {
		return nil, err
	}
	return u64(uint64(index) | uint64(q.base)<<32), nil
}

// makeInflight answers GET_INFLIGHT_FD.
func (c *conn) makeInflight(m *message) error {
	a, err := m.inflight()
	if err != nil {
		return err
	}
	if int(a.queues) > len(c.queues) {
		return fmt.Errorf("it is for %d queues, of at most %d", a.queues, len(c.queues))
	}
	fd, size, err := makeInflight(a)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	a.size, a.off = size, 0
	out := a.payload()
	return reply(c.nc, m.id, append(out, make([]byte, len(m.payload)-len(out))...), fd)
}

func (c *conn) setInflight(m *message) error {
	a, err := m.inflight()
	if err != nil {
		return err
	}
	fd, err := m.takeFD()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, q := range c.queues {
		if q.running {
			return fmt.Errorf("queue %d runs", q.index)
		}
	}
	f, err := mapInflight(fd, a, len(c.queues))
	if err != nil {
		return err
	}
	c.dropInflight()
	c.inflight = f
	return nil
}

// dropInflight forgets what is in flight. No queue runs.
func (c *conn) dropInflight() {
	if c.inflight != nil {
		c.inflight.unmap()
		c.inflight = nil
	}
}

// disable stops and disables all queues.
func (c *conn) disable() error {
	for _, q := range c.queues {
		if err := q.set(setVringEnable, 0); err != nil {
			return err
		}
	}
	return nil
}

// reset makes the device as it was before the first message, but for the features of the
// protocol.
func (c *conn) reset() {
	for _, q := range c.queues {
		q.stop()
		q.reset()
	}
	c.dropInflight()
	c.features = 0
}

// finish completes what is in flight, for a server that shuts down.
func (c *conn) finish() error {
	for _, q := range c.queues {
		q.halt()
	}
	for _, q := range c.queues {
		q.tasks.Wait()
	}
	return errDrained
}

// close ends all that the connection has. Requests that are not done stay in flight.
func (c *conn) close() {
	c.cancel(io.EOF)
	for _, q := range c.queues {
		q.stop()
		q.reset()
	}
	c.dropInflight()
	if c.mem != nil {
		c.mem.release()
	}
}

// fail ends the connection from another goroutine.
func (c *conn) fail(err error) {
	c.cancel(err)
	c.nc.Close()
}

// setReadDeadline bounds the wait for the next message; the zero time does not. Once the
// server shuts down, the wait ends at once.
func (c *conn) setReadDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.drain {
		t = longAgo
	}
	_ = c.nc.SetReadDeadline(t)
}

// Drain makes the connection complete its requests and end.
func (c *conn) Drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.drain = true
	_ = c.nc.SetReadDeadline(longAgo)
}

// Abort closes the connection.
func (c *conn) Abort() { c.nc.Close() }

func (c *conn) draining() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.drain
}

// longAgo as a deadline ends every wait.
var longAgo = time.Unix(1, 0)

// gone reports whether err means only that the front end has gone.
func gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}
