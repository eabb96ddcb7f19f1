package uring

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Read is one read of a file. It belongs to the ring from Submit until Done.
type Read struct {
	FD  int
	Buf []byte // must not be empty, nor lie on a stack
	Off int64

	// Done is called once, on the ring's thread, and must not block. N is the number
	// of bytes read: all of Buf unless the file ends before, or Err is set.
	Done func(*Read)
	N    int
	Err  error

	next *Read
}

// Ring is an io_uring with its thread.
type Ring struct {
	wake int // an eventfd

	// sleeping says that the thread waits in the kernel, or is about to, and that
	// whoever submits must wake it.
	sleeping atomic.Bool
	mu       struct {
		sync.Mutex
		first, last *Read
		closed      bool
	}
	ended chan struct{}

	// The thread's own.
	q       *Queues
	reads   []*Read  // in flight, by slot: the kernel writes to their buffers
	free    []uint32 // slots
	waiting *Read    // taken from the queue, for want of a slot
	armed   bool     // a read of wake is in flight
	woken   *[8]byte
}

// wakeSlot is the userData of the read of the eventfd.
const wakeSlot = ^uint64(0)

// New makes a ring for that many reads in flight. It fails with errors.ErrUnsupported
// where the kernel does not have io_uring, or does not let this process use it.
func New(depth int) (*Ring, error) {
	r := &Ring{wake: -1, ended: make(chan struct{}), woken: new([8]byte)}
	made := make(chan error)
	go func() {
		// The ring belongs to the thread that makes it. The thread ends with this
		// goroutine, which does not unlock it.
		runtime.LockOSThread()
		defer close(r.ended)
		err := r.open(depth)
		if err != nil {
			r.free = nil
			r.release()
		}
		made <- err
		if err == nil {
			r.run()
			r.release()
		}
	}()
	if err := <-made; err != nil {
		<-r.ended
		return nil, err
	}
	return r, nil
}

// Submit begins read. After Close it fails with os.ErrClosed.
func (r *Ring) Submit(read *Read) {
	read.next, read.N, read.Err = nil, 0, nil
	r.mu.Lock()
	if r.mu.closed {
		r.mu.Unlock()
		read.Err = os.ErrClosed
		read.Done(read)
		return
	}
	if r.mu.last == nil {
		r.mu.first = read
	} else {
		r.mu.last.next = read
	}
	r.mu.last = read
	r.rouse()
	r.mu.Unlock()
}

// Close waits until all reads are done, and frees the ring. Nobody submits any more.
func (r *Ring) Close() {
	r.mu.Lock()
	r.mu.closed = true
	r.rouse()
	r.mu.Unlock()
	<-r.ended
}

// rouse wakes the thread if it sleeps. r.mu is held: a thread that has seen that the ring is
// closed may close the eventfd, because nobody is about to write to it any more. Its number
// could be that of another file by then.
func (r *Ring) rouse() {
	if r.sleeping.Load() && r.sleeping.CompareAndSwap(true, false) {
		one := [8]byte{0: 1}
		for {
			// The counter of the eventfd is far from full, so this does not block.
			_, _, e := unix.RawSyscall(unix.SYS_WRITE, uintptr(r.wake), uintptr(unsafe.Pointer(&one)), 8)
			if e != unix.EINTR {
				return
			}
		}
	}
}

// take empties the queue.
func (r *Ring) take() (first *Read, closed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	first = r.mu.first
	r.mu.first, r.mu.last = nil, nil
	return first, r.mu.closed
}

// run is the thread.
func (r *Ring) run() {
	for {
		if !r.armed {
			r.put(r.wake, r.woken[:], 0, wakeSlot)
			r.armed = true
		}
		r.pass()
		r.sleeping.Store(true)
		closed := r.pass() // what comes after this look at the queue wakes the thread
		idle := len(r.free) == len(r.reads)
		if closed && idle {
			return
		}
		if err := r.q.Enter(true); err != nil {
			panic(err) // only misuse
		}
		r.sleeping.Store(false)
		r.reap()
	}
}

// pass gives the kernel what is queued, as far as there are slots.
func (r *Ring) pass() (closed bool) {
	list, closed := r.take()
	if r.waiting == nil {
		r.waiting = list
	} else if list != nil {
		last := r.waiting
		for last.next != nil {
			last = last.next
		}
		last.next = list
	}
	for r.waiting != nil && len(r.free) > 0 {
		read := r.waiting
		r.waiting, read.next = read.next, nil
		r.start(read)
	}
	return closed
}

// start puts what is left of read in a slot.
func (r *Ring) start(read *Read) {
	slot := r.free[len(r.free)-1]
	r.free = r.free[:len(r.free)-1]
	r.reads[slot] = read
	r.put(read.FD, read.Buf[read.N:], read.Off+int64(read.N), uint64(slot))
}

// put adds a read to the submission queue. There is room: it has an entry for every
// slot, and one for the eventfd.
func (r *Ring) put(fd int, buf []byte, off int64, data uint64) {
	e := r.q.Next()
	e.Op, e.FD, e.Off, e.UserData = OpRead, int32(fd), uint64(off), data
	e.Addr, e.Len = uint64(uintptr(unsafe.Pointer(&buf[0]))), uint32(min(len(buf), 1<<30))
}

// reap handles what is finished.
func (r *Ring) reap() {
	for {
		c, ok := r.q.Reap()
		if !ok {
			return
		}
		if c.UserData == wakeSlot {
			r.armed = false
			continue
		}
		slot := uint32(c.UserData)
		read := r.reads[slot]
		r.reads[slot] = nil
		r.free = append(r.free, slot)
		switch {
		case c.Result > 0:
			read.N += int(c.Result)
			if read.N < len(read.Buf) {
				r.start(read) // the rest, or the end of the file
				continue
			}
		case c.Result == -int32(unix.EINTR) || c.Result == -int32(unix.EAGAIN):
			r.start(read)
			continue
		case c.Result < 0:
			read.Err = unix.Errno(-c.Result)
		}
		read.Done(read)
	}
}

// open makes the ring on this thread.
func (r *Ring) open(depth int) (err error) {
	if r.q, err = Open(Setup{Entries: depth + 1, OneThread: true}); err != nil {
		return err
	}
	if r.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	n := min(uint32(depth), uint32(r.q.Entries()-1))
	r.reads = make([]*Read, n)
	for i := range n {
		r.free = append(r.free, i)
	}
	return nil
}

// release frees what open has made.
func (r *Ring) release() {
	if r.q != nil {
		r.q.Close()
	}
	if r.wake >= 0 {
		_ = unix.Close(r.wake)
	}
}
