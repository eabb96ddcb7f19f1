package uring

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Queues are the two queues that a process shares with the kernel, and the memory they
// lie in. A [Ring] stands on them. So does whoever needs other operations than reads, as
// the commands of a driver are, or has a thread of its own. A Queues belongs to one
// goroutine at a time.
type Queues struct {
	fd       int
	timeouts bool // Enter may bound its wait

	sqMap, sqeMap  []byte
	sqHead, sqTail *uint32
	sqMask         uint32
	sqEntries      uint32
	sqArray        []uint32
	sqeShift       uintptr // log2 of the size of an entry
	cqHead, cqTail *uint32
	cqMask         uint32
	cqes           []Completion

	toSubmit uint32

	// For EnterFor. They are not on a stack, which moves.
	limit unix.Timespec
	arg   eventsArg
}

// Setup says how the kernel is to treat a ring.
type Setup struct {
	// Entries is the least number of entries of the submission queue. The completion
	// queue has twice as many.
	Entries int
	// OneThread says that one thread makes the ring and is the only one that enters
	// it. The kernel then finishes operations only when this thread waits for them,
	// and never interrupts it, as far as it can (from Linux 6.1 and 5.19 on).
	OneThread bool
	// Large makes entries of 128 bytes: the command that OpCommand carries may have 80
	// bytes instead of 16. Requires Linux 5.19.
	Large bool
}

// flags returns what to try, the best first.
func (s Setup) flags() []uint32 {
	var large uint32
	if s.Large {
		large = setupSQE128
	}
	if !s.OneThread {
		return []uint32{setupClamp | large}
	}
	flags := make([]uint32, len(setups))
	for i := range setups {
		flags[i] = setups[i] | large
	}
	return flags
}

// Open makes the queues. It fails with errors.ErrUnsupported where the kernel does not
// have io_uring as s wants it, or does not let this process use it.
func Open(s Setup) (*Queues, error) {
	q := &Queues{fd: -1, sqeShift: 6}
	if s.Large {
		q.sqeShift = 7
	}
	if err := q.open(s); err != nil {
		q.Close()
		return nil, err
	}
	return q, nil
}

func (q *Queues) open(s Setup) error {
	var p params
	tries := s.flags()
	for i, flags := range tries {
		p = params{flags: flags}
		fd, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(s.Entries), uintptr(unsafe.Pointer(&p)), 0)
		if e == 0 {
			q.fd = int(fd)
			break
		}
		if e == unix.EINVAL && i < len(tries)-1 {
			continue // an older kernel
		}
		if unsupported(e) {
			return fmt.Errorf("io_uring_setup: %w: %w", e, errors.ErrUnsupported)
		}
		return fmt.Errorf("io_uring_setup: %w", e)
	}
	if want := uint32(featSingleMmap | featNoDrop | featFastPoll); p.features&want != want {
		return fmt.Errorf("the io_uring of this kernel lacks features (it has %#x): %w", p.features, errors.ErrUnsupported)
	}
	q.timeouts = p.features&featExtArg != 0
	size := max(p.sq.array+p.sqEntries*4, p.cq.cqes+p.cqEntries*uint32(unsafe.Sizeof(Completion{})))
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	var err error
	if q.sqMap, err = unix.Mmap(q.fd, offSQRing, int(size), prot, flags); err != nil {
		return fmt.Errorf("map io_uring: %w", err)
	}
	if q.sqeMap, err = unix.Mmap(q.fd, offSQEs, int(p.sqEntries)<<q.sqeShift, prot, flags); err != nil {
		return fmt.Errorf("map io_uring: %w", err)
	}
	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&q.sqMap[off])) }
	q.sqHead, q.sqTail, q.sqMask, q.sqEntries = word(p.sq.head), word(p.sq.tail), *word(p.sq.mask), p.sqEntries
	q.cqHead, q.cqTail, q.cqMask = word(p.cq.head), word(p.cq.tail), *word(p.cq.mask)
	q.sqArray = unsafe.Slice(word(p.sq.array), p.sqEntries)
	q.cqes = unsafe.Slice((*Completion)(unsafe.Pointer(&q.sqMap[p.cq.cqes])), p.cqEntries)
	return nil
}

// Close frees the queues. The kernel cancels what is in flight, in its own time.
func (q *Queues) Close() {
	if q.sqMap != nil {
		_ = unix.Munmap(q.sqMap)
	}
	if q.sqeMap != nil {
		_ = unix.Munmap(q.sqeMap)
	}
	if q.fd >= 0 {
		_ = unix.Close(q.fd)
	}
	q.fd, q.sqMap, q.sqeMap = -1, nil, nil
}

// Entries is how many submissions fit in the queue.
func (q *Queues) Entries() int { return int(q.sqEntries) }

// Next returns a cleared entry, which the next Enter submits, or nil where the queue is
// full. It is valid until the next call of Next or Enter.
func (q *Queues) Next() *Entry {
	tail := *q.sqTail // nobody else writes it
	if tail-atomic.LoadUint32(q.sqHead) == q.sqEntries {
		return nil
	}
	i := tail & q.sqMask
	at := unsafe.Pointer(&q.sqeMap[uintptr(i)<<q.sqeShift])
	clear(unsafe.Slice((*byte)(at), 1<<q.sqeShift))
	q.sqArray[i] = i
	// The kernel looks at the entry in Enter, on this thread: it may be filled in after
	// it was added.
	atomic.StoreUint32(q.sqTail, tail+1)
	q.toSubmit++
	return (*Entry)(at)
}

// errMisuse is what io_uring_enter fails with only where this program is wrong.
var errMisuse = errors.New("io_uring_enter")

// Enter submits the entries, and waits until something is finished if wait is true. It
// may return earlier; Reap says what is finished.
func (q *Queues) Enter(wait bool) error {
	n := uintptr(0)
	if wait {
		n = 1
	}
	return q.enter(n, enterGetEvents, 0, 0)
}

// EnterFor is Enter with wait, for at most d. Requires Linux 5.11: without it EnterFor
// fails with errors.ErrUnsupported.
func (q *Queues) EnterFor(d time.Duration) error {
	if !q.timeouts {
		return fmt.Errorf("wait for an io_uring with a timeout: %w", errors.ErrUnsupported)
	}
	q.limit = unix.NsecToTimespec(max(int64(d), 0))
	q.arg.ts = uint64(uintptr(unsafe.Pointer(&q.limit)))
	return q.enter(1, enterGetEvents|enterExtArg, uintptr(unsafe.Pointer(&q.arg)), unsafe.Sizeof(q.arg))
}

func (q *Queues) enter(wait, flags, arg, size uintptr) error {
	for {
		n, _, e := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(q.fd), uintptr(q.toSubmit), wait, flags, arg, size)
		if e == 0 {
			q.toSubmit -= uint32(n)
			return nil
		}
		switch e {
		case unix.EINTR, unix.ETIME:
			return nil
		case unix.EAGAIN, unix.EBUSY:
			// The kernel lacks memory for requests, or the completion queue is to be
			// emptied first.
			if q.finished() {
				return nil
			}
			runtime.Gosched()
		default:
			return fmt.Errorf("%w: %w", errMisuse, e)
		}
	}
}

func (q *Queues) finished() bool { return atomic.LoadUint32(q.cqTail) != *q.cqHead }

// Reap takes the next completion; ok is false where there is none.
func (q *Queues) Reap() (c Completion, ok bool) {
	head := *q.cqHead
	if head == atomic.LoadUint32(q.cqTail) {
		return c, false
	}
	c = q.cqes[head&q.cqMask]
	atomic.StoreUint32(q.cqHead, head+1)
	return c, true
}
