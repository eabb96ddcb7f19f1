package vhost

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/nbd/internal/inline"
)

// queue is a virtqueue. The goroutine of its connection sets it up, starts and stops it.
// While it runs, a goroutine of its own takes requests from the ring:
//
//	available ──take──▶ hit, small write: done here ──▶ batch ───────┐
//	              └───▶ miss, other: request ──done──▶ ready ──▶ publish ──▶ used ring
//
// It does hits and small writes itself, and publishes all that it has done in one pass
// together. If a write takes long, another goroutine goes on with the queue (takeover.go).
// Every other request is admitted, and waits for the device without this goroutine: a read
// of what is on the disk needs none, any other request gets one. The first that is done
// publishes all that are, until none is left.
//
// The used ring, and what is noted as in flight, belong to whoever holds mu.
type queue struct {
	c     *conn
	index int

	// What the front end has set. For the connection's goroutine.
	num     uint32
	addr    vringAddr
	base    uint16
	kick    *os.File
	enabled bool
	running bool // between start and stop

	// What it runs with. It changes only while the goroutine does not run, and with mu
	// held: a request that ends may look.
	ring     *ring
	mem      *memory
	inflight *inflight // nil: nobody asks for it after a crash

	// For one run: from start to stop.
	ctx    context.Context // of its requests
	cancel context.CancelCauseFunc
	tasks  sync.WaitGroup // requests that are not published

	// For one run of the goroutine: from launch to halt.
	taking   context.Context // ends when no more requests are to be taken
	stop1    context.CancelFunc
	ended    chan struct{}
	working  atomic.Int32 // requests that are not done
	resubmit []uint16     // heads to take before those of the available ring

	// The goroutine's own.
	at   uint16 // of the available ring: what is taken next
	took bool   // the head of cur is from the available ring, not from resubmit
	cur  *request
	view blockmap.View // of cur, while it is copied
	due  struct {
		ctx    context.Context // of the requests that begin now
		cancel context.CancelFunc
		made   time.Time
	}
	again    bool // the view of cur was damaged: cur is to begin
	batch    [batchLen]completion
	nbatch   int
	nbytes   int64 // copied for the batch
	nhits    int64
	inline   inline.Writes
	watchdog inline.Watchdog
	gather   gather
	lone     int // passes in a row that took one request, with none in flight
	scratch  []byte
	kicks    syscall.RawConn
	readFn   func(fd uintptr) bool
	parked   bool
	readErr  error
	event    [8]byte
	poll     [1]unix.PollFd
	barrier  atomic.Uint32

	mu struct {
		sync.Mutex
		ready     requestList // done, to be published
		busy      bool        // somebody publishes what is ready
		used      uint16      // idx of the used ring
		signalled uint16      // used, when it was last decided whether to interrupt
		flags     uint16      // of the used ring
		call      int         // eventfd that interrupts the guest, -1: it polls
		err       int         // eventfd that tells the front end of a broken ring, or -1
	}
}

// completion is an element of the used ring.
type completion struct {
	head    uint16
	written uint32
}

// A batch of this size is published. A larger one would hold up its first request.
const (
	batchLen   = 64
	batchBytes = 256 << 10
)

func newQueue(c *conn, index int) *queue {
	q := &queue{c: c, index: index}
	q.readFn = q.readKick
	q.gather.most, q.gather.mostGap = gatherTime, gatherGap
	q.watchdog.Patience, q.watchdog.TakeOver = stuckTime, q.takeOver
	q.mu.call, q.mu.err = -1, -1
	return q
}

// set does SET_VRING_NUM, SET_VRING_BASE and SET_VRING_ENABLE.
func (q *queue) set(id requestID, n uint32) error {
	if id == setVringEnable {
		if n > 1 {
			return fmt.Errorf("it has %d, want 0 or 1", n)
		}
		q.enabled = n == 1
		if !q.enabled {
			q.stop()
			return nil
		}
		return q.start()
	}
	if q.running {
		return fmt.Errorf("queue %d runs", q.index)
	}
	switch {
	case id == setVringBase && n > 1<<16-1:
		return fmt.Errorf("it has %d, of at most %d", n, 1<<16-1)
	case id == setVringBase:
		q.base = uint16(n)
	case n == 0 || n > maxQueueSize || bits.OnesCount32(n) != 1:
		return fmt.Errorf("queue %d has %d descriptors: want a power of two, of at most %d", q.index, n, maxQueueSize)
	default:
		q.num = n
	}
	return q.start()
}

func (q *queue) setAddr(a vringAddr) error {
	if q.running && a != q.addr {
		return fmt.Errorf("queue %d runs", q.index)
	}
	q.addr = a
	return q.start()
}

// setKick makes f what the driver kicks the queue by. Nil stops it.
func (q *queue) setKick(f *os.File) error {
	q.stop()
	if q.kick != nil {
		q.kick.Close()
	}
	q.kick = f
	return q.start()
}

// setCall takes over the eventfd that interrupts the guest.
func (q *queue) setCall(fd int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.mu.call >= 0 {
		unix.Close(q.mu.call)
	}
	q.mu.call = fd
	if fd >= 0 && q.running {
		notify(fd) // an interrupt may have been lost between the two
	}
}

// setErr takes over the eventfd that tells the front end of a broken ring.
func (q *queue) setErr(fd int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.mu.err >= 0 {
		unix.Close(q.mu.err)
	}
	q.mu.err = fd
}

// reset forgets what the front end has set. The queue does not run.
func (q *queue) reset() {
	_ = q.setKick(nil) // does not start without one
	q.setCall(-1)
	q.setErr(-1)
	q.num, q.addr, q.base, q.enabled = 0, vringAddr{}, 0, false
}

// start starts the queue if it has all that it needs and does not run yet.
func (q *queue) start() error {
	if q.running || !q.enabled || q.kick == nil || q.num == 0 || q.addr == (vringAddr{}) || q.c.mem == nil {
		return nil
	}
	r, err := newRing(q.c.mem, q.num, q.addr, q.c.features&featureEventIdx != 0)
	if err != nil {
		return fmt.Errorf("queue %d: %w", q.index, err)
	}
	var f *inflight
	if q.c.inflight != nil {
		if f, err = q.c.inflight.queue(q.index, q.num); err != nil {
			// QEMU gives each queue of virtio-mmio 1024 descriptors, and makes the
			// file for as many as queue-size says.
			q.c.srv.lines.small.Log(q.c.log, slog.LevelWarn, "requests in flight will be lost if this process dies: give the device of the virtual machine a larger queue-size",
				"queue", q.index, "err", err)
		}
	}
	q.resubmit = nil
	q.at = q.base
	var used uint16
	err = access(func() (err error) {
		used = r.usedIdx()
		if f != nil {
			// The base is what the front end believes. With what is in flight it
			// is known: all before it was taken.
			if q.resubmit, err = f.restore(used); err == nil {
				q.at = used + uint16(len(q.resubmit))
			}
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("queue %d: %w", q.index, err)
	}
	if n := len(q.resubmit); n > 0 {
		q.c.counts.resumed.Add(int64(n))
		q.c.srv.lines.resumed.Log(q.c.log, slog.LevelInfo, "doing requests again that were in flight when the queue stopped", "queue", q.index, "requests", n)
	}
	q.mu.Lock()
	q.ring, q.mem, q.inflight = r, q.c.mem, f
	q.mu.used, q.mu.signalled, q.mu.flags = used, used, usedNoNotify
	if r.eventIdx {
		q.mu.flags = 0 // means nothing then
	}
	if q.mu.call >= 0 {
		// An earlier connection may have ended between publishing and interrupting.
		notify(q.mu.call)
	}
	q.mu.Unlock()
	q.mem.retain()
	q.ctx, q.cancel = context.WithCancelCause(q.c.ctx)
	q.running = true
	return q.launch()
}

// launch begins to take requests.
func (q *queue) launch() error {
	kicks, err := q.kick.SyscallConn()
	if err == nil {
		err = q.kick.SetReadDeadline(time.Time{})
	}
	if err != nil {
		return fmt.Errorf("queue %d: %w", q.index, err)
	}
	q.kicks = kicks
	q.taking, q.stop1 = context.WithCancel(q.ctx)
	q.ended = make(chan struct{})
	if q.cur == nil {
		q.cur = new(request)
	}
	q.cur.q, q.cur.mem = q, q.mem
	q.due.ctx = nil
	go q.run()
	return nil
}

// halt ends the goroutine. Requests in flight go on.
func (q *queue) halt() {
	if !q.running {
		return
	}
	q.stop1()
	_ = q.kick.SetReadDeadline(longAgo)
	<-q.ended
	q.base = q.at
}

// move makes a queue that runs go on in the connection's new memory.
func (q *queue) move() error {
	if !q.running {
		return nil
	}
	q.halt()
	r, err := newRing(q.c.mem, q.num, q.addr, q.ring.eventIdx)
	if err != nil {
		return fmt.Errorf("queue %d: %w", q.index, err)
	}
	q.c.mem.retain()
	q.mu.Lock()
	old := q.mem
	q.ring, q.mem = r, q.c.mem
	q.mu.Unlock()
	old.release()
	return q.launch()
}

// stopTime is how long the front end waits for requests of a queue that it stops, where
// it does not keep what is in flight. Its virtual machine stands still meanwhile.
const stopTime = 5 * time.Second

// stop stops the queue. Nothing accesses the guest's memory for it afterwards. A request
// that is not done when it is cancelled stays in flight, and is done again after the next
// start. Where the front end keeps no file of such requests, it fails.
func (q *queue) stop() {
	if !q.running {
		return
	}
	if q.inflight == nil {
		// Most are done in time.
		defer time.AfterFunc(stopTime, func() { q.cancel(errStopped) }).Stop()
	} else {
		q.cancel(errStopped)
	}
	q.halt()
	q.tasks.Wait()
	q.cancel(errStopped)
	q.mu.Lock()
	mem := q.mem
	q.ring, q.mem, q.inflight = nil, nil, nil
	q.mu.Unlock()
	mem.release()
	q.running = false
}

// run takes requests until halt.
func (q *queue) run() {
	// For the guest's memory, and for what views show. pass recovers.
	debug.SetPanicOnFault(true)
	err := q.serve()
	if err == errTakenOver {
		return
	}
	defer close(q.ended)
	var fault *faultError
	switch {
	case err == nil, q.taking.Err() != nil:
	case errors.As(err, &fault):
		q.c.fail(fault)
	default:
		q.fail(err)
	}
}

// fail stops using a ring that makes no sense, and says so. The other queues go on. The guest
// resets the device, if it knows how to.
func (q *queue) fail(err error) {
	q.c.srv.lines.rings.Log(q.c.log, slog.LevelWarn, "stopped serving a queue of a virtual machine until it is set up anew",
		"queue", q.index, "err", err)
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.mu.err >= 0 {
		notify(q.mu.err)
	}
}

func (q *queue) serve() error {
	for {
		idle, err := q.pass()
		if err != nil {
			return err
		}
		if q.taking.Err() != nil {
			return access(q.leave)
		}
		if !idle {
			continue
		}
		q.parked = false
		if err := q.kicks.Read(q.readFn); err != nil {
			return err
		}
		if q.readErr != nil {
			return q.readErr
		}
		q.c.counts.kicks.Add(1)
	}
}

// leave publishes what is answered, and takes back a request that is to begin again: it was
// damaged in the pass during which the queue was halted. The next run may have other memory,
// or be one of a ring that was set up anew.
func (q *queue) leave() error {
	if q.again {
		q.again = false
		q.untake()
	}
	return q.flush()
}

// readKick is called until it is done. Between the calls the goroutine is parked.
func (q *queue) readKick(fd uintptr) (done bool) {
	ok, err := clearEvent(fd, &q.event)
	// Requests in flight need the processor that a thread which sleeps would keep.
	if !ok && err == nil && !q.parked && q.working.Load() == 0 && q.c.srv.waiters.enter() {
		q.poll[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
		t := unix.NsecToTimespec(int64(longestSleep))
		// An error is treated like a timeout: the goroutine is parked then.
		n, _ := unix.Ppoll(q.poll[:], &t, nil)
		q.c.srv.waiters.leave()
		if n > 0 {
			ok, err = clearEvent(fd, &q.event)
		}
	}
	q.readErr = err
	q.parked = !ok
	return ok || err != nil
}
