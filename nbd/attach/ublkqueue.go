package attach

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/uring"
	"thaw/nbd"
)

// ublkQueue is one queue of a device, with its thread.
//
// The kernel lends a request to the thread that has fetched its tag, and only this thread
// may commit it. So the thread does nothing that waits: it copies the bytes of a hit to
// the request and commits it, does small writes, and gives everything else away. Who is
// done with a request puts it on a list, and wakes the thread by an eventfd, unless it was
// woken already.
// One system call submits all commits and waits for the next requests.
type ublkQueue struct {
	d     *ublkDevice
	id    uint16
	depth int
	ring  *uring.Queues
	descs []byte // the requests, by tag, written by the kernel

	event    int    // wakes the thread
	eventBuf []byte // mapped: the kernel writes to it
	alive    int    // tags that the kernel or this process has

	inline       inlineWrites
	hits, misses atomic.Int64

	mu struct {
		sync.Mutex
		done  []ublkDone
		woken bool
		quit  bool // the thread is to end, whatever the kernel has of it
	}
	spare []ublkDone
}

// ublkDone is a request that was given away and is done.
type ublkDone struct {
	tag    uint16
	result int32
}

const ublkWake = ^uint64(0) // the UserData of the read of the eventfd

// run is the thread. It tells ready when all tags are fetched, or why not.
func (q *ublkQueue) run(ready chan<- error) {
	runtime.LockOSThread() // never unlocked: the tags belong to this thread, which ends with the queue
	err := q.open()
	ready <- err
	if err == nil {
		err = q.loop()
		if err != nil {
			q.d.n.serving.log.Error("a queue of ublk has failed; requests wait until the node is recovered", "node", q.d.n.state.Path, "queue", q.id, "err", err)
		}
	}
	q.close()
}

func (q *ublkQueue) open() (err error) {
	q.event = -1
	if q.ring, err = uring.Open(uring.Setup{Entries: q.depth + 1, OneThread: true}); err != nil {
		return err
	}
	page := os.Getpagesize()
	size := (q.depth*ublkDescLen + page - 1) &^ (page - 1)
	stride := (ublkMaxDepth*ublkDescLen + page - 1) &^ (page - 1)
	if q.descs, err = unix.Mmap(int(q.d.file.Fd()), int64(q.id)*int64(stride), size, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return fmt.Errorf("map the requests of queue %d: %w", q.id, err)
	}
	if q.event, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	if q.eventBuf, err = unix.Mmap(-1, 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE); err != nil {
		return fmt.Errorf("map a page: %w", err)
	}
	for tag := range q.depth {
		if err := q.push(ublkFetch, uint16(tag), 0); err != nil {
			return err
		}
	}
	q.alive = q.depth
	if err := q.arm(); err != nil {
		return err
	}
	return q.ring.Enter(false)
}

// close frees what open has made. The kernel takes the requests back that the thread
// still has.
func (q *ublkQueue) close() {
	if q.ring != nil {
		q.ring.Close()
	}
	if q.descs != nil {
		_ = unix.Munmap(q.descs)
	}
	if q.eventBuf != nil {
		_ = unix.Munmap(q.eventBuf)
	}
	q.mu.Lock() // whoever wakes the thread has it: nobody is about to write to the eventfd
	defer q.mu.Unlock()
	if q.event >= 0 {
		_ = unix.Close(q.event)
		q.event = -1
	}
}

// entry is the next entry of the ring.
func (q *ublkQueue) entry() (*uring.Entry, error) {
	e := q.ring.Next()
	if e == nil {
		if err := q.ring.Enter(false); err != nil {
			return nil, err
		}
		if e = q.ring.Next(); e == nil {
			return nil, errors.New("the kernel takes no more commands")
		}
	}
	return e, nil
}

// push adds a command for a tag.
func (q *ublkQueue) push(op uint32, tag uint16, result int32) error {
	e, err := q.entry()
	if err != nil {
		return err
	}
	e.Op, e.FD, e.Off, e.UserData = uring.OpCommand, int32(q.d.file.Fd()), uint64(op), uint64(tag)
	binary.NativeEndian.PutUint16(e.Command[0:], q.id)
	binary.NativeEndian.PutUint16(e.Command[2:], tag)
	binary.NativeEndian.PutUint32(e.Command[4:], uint32(result))
	return nil
}

// arm reads the eventfd, once.
func (q *ublkQueue) arm() error {
	e, err := q.entry()
	if err != nil {
		return err
	}
	e.Op, e.FD, e.UserData = uring.OpRead, int32(q.event), ublkWake
	e.Addr, e.Len = uint64(uintptr(unsafe.Pointer(&q.eventBuf[0]))), 8
	return nil
}

// loop serves until the kernel has taken all tags back.
func (q *ublkQueue) loop() error {
	for q.alive > 0 {
		if err := q.ring.Enter(true); err != nil {
			return err
		}
		for {
			c, ok := q.ring.Reap()
			if !ok {
				break
			}
			var err error
			switch {
			case c.UserData == ublkWake:
				var quit bool
				if quit, err = q.commit(); quit {
					return nil
				}
				if err == nil {
					err = q.arm()
				}
			case c.Result != 0:
				// ENODEV: the device stops. Any other error ends the tag as well.
				q.alive--
				if c.Result != -int32(unix.ENODEV) {
					q.d.n.serving.log.Warn("ublk refuses a command", "node", q.d.n.state.Path, "queue", q.id, "tag", c.UserData, "err", unix.Errno(-c.Result))
				}
			case c.UserData >= uint64(q.depth):
				return fmt.Errorf("the kernel has finished a command for tag %d of %d", c.UserData, q.depth)
			default:
				err = q.start(uint16(c.UserData))
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// commit commits what is done. quit says that the thread is to end.
func (q *ublkQueue) commit() (quit bool, err error) {
	q.mu.Lock()
	done := q.mu.done
	q.mu.done, q.mu.woken = q.spare[:0], false
	quit = q.mu.quit
	q.mu.Unlock()
	q.spare = done
	for _, r := range done {
		if err := q.push(ublkCommit, r.tag, r.result); err != nil {
			return quit, err
		}
	}
	return quit, nil
}

// quit ends the thread. The kernel takes back what it has of the queue.
func (q *ublkQueue) quit() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.mu.quit = true
	q.wake()
}

// finish is called on any thread when a request that was given away is done.
func (q *ublkQueue) finish(tag uint16, result int32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.mu.done = append(q.mu.done, ublkDone{tag, result})
	q.wake()
}

// wake wakes the thread. q.mu is held.
func (q *ublkQueue) wake() {
	if q.mu.woken || q.event < 0 {
		return
	}
	q.mu.woken = true
	one := [8]byte{0: 1}
	for {
		// The counter of the eventfd is far from full, so this does not block.
		_, _, e := unix.RawSyscall(unix.SYS_WRITE, uintptr(q.event), uintptr(unsafe.Pointer(&one)), 8)
		if e != unix.EINTR {
			return
		}
	}
}

// ublkRequest is a request as the kernel describes it.
type ublkRequest struct {
	tag   uint16
	op    uint8
	flags uint32
	e     blockmap.Extent
}

// parseUBLK reads a descriptor. ok is false where it does not lie within a device of size
// bytes.
func parseUBLK(desc []byte, tag uint16, size int64) (r ublkRequest, ok bool) {
	r.tag = tag
	r.flags = binary.NativeEndian.Uint32(desc)
	r.op = uint8(r.flags)
	if r.op == ublkFlush {
		return r, true // it has no range, and the fields say anything
	}
	sectors := int64(binary.NativeEndian.Uint32(desc[4:]))
	first := binary.NativeEndian.Uint64(desc[8:])
	if first > uint64(size>>ublkSector) {
		return r, false
	}
	r.e = blockmap.Range(int64(first)<<ublkSector, sectors<<ublkSector)
	if r.e.Check(size) != nil {
		return r, false
	}
	return r, (r.op != ublkRead && r.op != ublkWrite) || r.e.Len() <= ublkMaxIO
}

// start begins a request: it answers a hit, and gives everything else away.
func (q *ublkQueue) start(tag uint16) error {
	s := q.d.n.serving
	r, ok := parseUBLK(q.descs[int(tag)*ublkDescLen:], tag, s.size)
	if !ok {
		return q.push(ublkCommit, tag, result(0, s.fail(nbd.OpOther, r.e, blockmap.ErrOutOfRange)))
	}
	if r.op == ublkWrite && s.wdev != nil && r.flags&ublkIOFUA == 0 && q.inline.Take(r.e) {
		return q.push(ublkCommit, tag, q.write(&r))
	}
	if r.op != ublkRead {
		q.d.work.Go(func() { q.finish(tag, q.do(r)) })
		return nil
	}
	if v, ok := s.dev.View(r.e); ok { // the hit path
		err := q.copyOut(&r, &v)
		v.Release()
		if err == nil {
			q.hits.Add(1)
			return q.push(ublkCommit, tag, int32(r.e.Len()))
		}
		q.d.work.Go(func() { q.finish(tag, q.repair(&r)) })
		return nil
	}
	q.misses.Add(1)
	if !s.client.TryAcquire(r.e.Len()) {
		q.d.work.Go(func() { q.finish(tag, q.read(&r)) })
		return nil
	}
	q.d.work.Add(1)
	blockmap.LoadAsync(s.dev, r.e, func(v blockmap.View, ok bool) {
		defer q.d.work.Done()
		s.client.Release(1, r.e.Len())
		if ok {
			err := q.copyOut(&r, &v)
			v.Release()
			if err == nil {
				q.finish(tag, int32(r.e.Len()))
				return
			}
		}
		q.d.work.Go(func() { q.finish(tag, q.read(&r)) })
	})
	return nil
}

// errCopy: the kernel does not take the bytes of a request, because it has taken the
// request back.
var errCopy = errors.New("ublk: cannot copy the bytes of a request")

// bytesAt is where byte i of a request is in the device's file.
func (q *ublkQueue) bytesAt(tag uint16, i int64) int64 {
	return ublkBytesOff + int64(q.id)<<ublkQueueShft + int64(tag)<<ublkTagShift + i
}

// copyOut copies a view to a request. It fails with blockmap.ErrDamaged where the bytes of
// the view cannot be read.
func (q *ublkQueue) copyOut(r *ublkRequest, v *blockmap.View) error {
	var at int64
	for i := range v.Segments() {
		g := &v.Segments()[i]
		for p := g.Bytes; len(p) > 0; {
			n, err := unix.Pwrite(int(q.d.file.Fd()), p, q.bytesAt(r.tag, at))
			switch {
			case err == unix.EINTR:
				continue
			case err == unix.EFAULT:
				g.Damaged()
				return blockmap.ErrDamaged
			case err != nil:
				return fmt.Errorf("%w: %w", errCopy, err)
			case n == 0:
				// Nothing of it could be read, or nothing is to be copied.
				if blockmap.CopyMapped(make([]byte, 1), p[:1]) != nil {
					g.Damaged()
					return blockmap.ErrDamaged
				}
				return errCopy
			}
			p, at = p[n:], at+int64(n)
		}
	}
	return nil
}

// copyIn copies the bytes of a request to p.
func (q *ublkQueue) copyIn(r *ublkRequest, p []byte) error {
	var at int64
	for len(p) > 0 {
		n, err := unix.Pread(int(q.d.file.Fd()), p, q.bytesAt(r.tag, at))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return fmt.Errorf("%w: %w", errCopy, err)
		case n == 0:
			return errCopy
		}
		p, at = p[n:], at+int64(n)
	}
	return nil
}

// result is what a request is committed with: the number of its bytes, or an errno.
func result(n int64, errno syscall.Errno) int32 {
	if errno != 0 {
		return -int32(errno)
	}
	return int32(n)
}

// read does a read that has to wait.
func (q *ublkQueue) read(r *ublkRequest) int32 {
	v, errno := q.d.n.serving.read(r.e)
	if errno != 0 {
		return -int32(errno)
	}
	err := q.copyOut(r, &v)
	v.Release()
	if err != nil {
		return q.repair(r)
	}
	return int32(r.e.Len())
}

// repair does a read again whose bytes could not be read where they lay.
func (q *ublkQueue) repair(r *ublkRequest) int32 {
	buf := q.d.buffers.get(r.e.Len())
	defer q.d.buffers.put(buf)
	p := (*buf)[:r.e.Len()]
	if errno := q.d.n.serving.readAgain(r.e, p); errno != 0 {
		return -int32(errno)
	}
	var v blockmap.View
	v.Append(p, nil, 0)
	if err := q.copyOut(r, &v); err != nil {
		return result(0, q.d.n.serving.fail(nbd.OpRead, r.e, err))
	}
	return int32(r.e.Len())
}

// do does what is not a read.
func (q *ublkQueue) do(r ublkRequest) int32 {
	s := q.d.n.serving
	fua := r.flags&ublkIOFUA != 0
	switch r.op {
	case ublkWrite:
		buf := q.d.buffers.get(r.e.Len())
		defer q.d.buffers.put(buf)
		p := (*buf)[:r.e.Len()]
		if err := q.copyIn(&r, p); err != nil {
			return result(0, s.fail(nbd.OpWrite, r.e, err))
		}
		return result(r.e.Len(), s.write(p, r.e.Start, fua))
	case ublkFlush:
		return result(0, s.flush())
	case ublkDiscard:
		return result(0, s.discard(r.e))
	case ublkZeroes:
		return result(0, s.zero(r.e, r.flags&ublkIONoUnmap == 0, fua))
	}
	return -int32(unix.EOPNOTSUPP)
}

// ublkBuffers are buffers of requests: one pool for those of most writes, one for any.
type ublkBuffers struct{ small, large sync.Pool }

const ublkSmall = 64 << 10

func (b *ublkBuffers) get(n int64) *[]byte {
	pool, size := &b.small, ublkSmall
	if n > ublkSmall {
		pool, size = &b.large, ublkMaxIO
	}
	if p, _ := pool.Get().(*[]byte); p != nil {
		return p
	}
	p := make([]byte, size)
	return &p
}

func (b *ublkBuffers) put(p *[]byte) {
	if len(*p) == ublkSmall {
		b.small.Put(p)
	} else {
		b.large.Put(p)
	}
}
