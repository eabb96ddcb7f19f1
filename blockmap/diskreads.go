package blockmap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"thaw/blockmap/uring"
)

// diskReads reads data files to memory, for all streams of a cache or for an overlay: as
// many reads at once as callers ask for, through one io_uring; or through threads where there is none.
type diskReads struct {
	log     *slog.Logger
	threads bool // do not try io_uring
	buffers buffers

	begin sync.Once
	ring  *uring.Ring // nil: threads

	threaded sync.Once
	slots    chan struct{} // of threads

	n    atomic.Int64   // reads in flight
	wg   sync.WaitGroup // of reads
	pool sync.Pool      // of *diskRead
}

const (
	// ringDepth is how many reads the kernel has at a time; further ones wait.
	ringDepth = 256
	// largeRead is the size from which a read through the page cache takes a thread of
	// its own. The ring's one thread would find the memory for all of them, and copy
	// them, one after the other.
	largeRead = 32 << 10
	// maxThreads bounds the threads that wait for the disk. Disks gain little beyond it.
	maxThreads = 64
)

// start makes the ring for the first read of a file with a descriptor: most caches of a
// test, and those of idle servers, need none.
func (r *diskReads) start() {
	if !r.threads {
		ring, err := uring.New(ringDepth)
		if err == nil {
			r.ring = ring
			return
		}
		level := slog.LevelWarn
		if errors.Is(err, errors.ErrUnsupported) {
			level = slog.LevelInfo
		}
		r.log.Log(context.Background(), level, "cannot use io_uring; reading the disk with threads", "err", err)
	}
}

// close waits for all reads, and for those who are told of their ends.
func (r *diskReads) close() {
	r.begin.Do(func() {})
	r.wg.Wait()
	if r.ring != nil {
		r.ring.Close()
	}
}

// load makes a view of an extent, of which some parts are read from the disk. Those have
// their place in the view before they are read.
type load struct {
	view  View
	few   [2]*diskRead
	reads []*diskRead // in few, or not

	left   atomic.Int32 // reads that are not done
	failed atomic.Bool
	state  atomic.Int32
	done   func(v View, ok bool) // nil: told is
	told   chan struct{}
}

const (
	loadWaited    = iota // somebody waits for it
	loadDone             // and is told
	loadAbandoned        // nobody waits
)

// read adds n bytes at off of f to what r is to read. The token of pin pins them.
func (l *load) read(r *diskReads, pin diskPinner, f *dataFile, token uint64, off, n int64) {
	x, _ := r.pool.Get().(*diskRead)
	if x == nil {
		x = &diskRead{of: r}
		x.Done = func(*uring.Read) { x.finished() }
	}
	// Whole blocks, for the sake of direct I/O. The blocks at the ends are resident,
	// too.
	e := Range(off, n).Aligned()
	buf := r.buffers.get(e.Len())
	x.load, x.file, x.pin, x.token = l, f, pin, token
	x.Buf, x.Off = buf.b[:e.Len()], e.Start
	skip := off - e.Start
	l.view.Append(buf.b[skip:skip+n:skip+n], buf, 0)
	if l.reads == nil {
		l.reads = l.few[:0]
	}
	l.reads = append(l.reads, x)
	r.wg.Add(1)
}

// drop takes back what was added to l.
func (l *load) drop() {
	for _, x := range l.reads {
		r := x.of
		x.release()
		r.wg.Done()
	}
	l.reads = nil
	l.view.Release()
}

// begin begins the reads, and returns. done is told of the end, on any thread.
func (l *load) begin(done func(v View, ok bool)) {
	if len(l.reads) == 0 {
		done(l.view, true)
		return
	}
	l.done = done
	l.submit()
}

func (l *load) submit() {
	reads := l.reads // what is finished may be gone
	l.left.Store(int32(len(reads)))
	for _, x := range reads {
		x.of.n.Add(1)
		x.submit()
	}
}

// wait does the reads, and waits for them until ctx ends.
func (l *load) wait(ctx context.Context) (v View, ok bool) {
	if len(l.reads) == 0 {
		return l.view, true
	}
	if x := l.reads[0]; len(l.reads) == 1 && x.of.n.Load() == 0 {
		// Alone, it is fastest on the thread that is here already. A disk that hangs
		// holds up this caller beyond ctx, but no other.
		return l.readHere()
	}
	l.told = make(chan struct{}, 1)
	l.submit()
	select {
	case <-l.told:
	case <-ctx.Done():
		if l.state.CompareAndSwap(loadWaited, loadAbandoned) {
			return View{}, false
		}
		<-l.told
	}
	return l.outcome()
}

// readHere does the reads one after the other on the caller's thread.
func (l *load) readHere() (v View, ok bool) {
	if len(l.reads) == 0 {
		return l.view, true
	}
	l.told = make(chan struct{}, 1)
	reads := l.reads // what is finished may be gone
	l.left.Store(int32(len(reads)))
	for _, x := range reads {
		x.of.n.Add(1)
		x.N, x.Err = x.file.readAt(x.Buf, x.Off)
		x.finished()
	}
	<-l.told
	return l.outcome()
}

// finished tells who waits, or cleans up if nobody does.
func (l *load) finished() {
	switch {
	case l.done != nil:
		l.done(l.outcome())
	case l.state.CompareAndSwap(loadWaited, loadDone):
		l.told <- struct{}{}
	default:
		l.view.Release()
	}
}

func (l *load) outcome() (v View, ok bool) {
	if l.failed.Load() {
		l.view.Release()
		return View{}, false
	}
	return l.view, true
}

// diskPinner pins bytes that are read by descriptor.
type diskPinner interface {
	Pinner
	// unread is Damaged for bytes that the disk itself could not read. What fails where it
	// is mapped may still be read by descriptor.
	unread(token uint64)
}

// diskRead is one read of a data file. Until it is finished it pins the bytes, and so
// keeps the file open and the blocks in place, even if nobody waits for it any more.
type diskRead struct {
	uring.Read
	of    *diskReads
	load  *load
	file  *dataFile
	pin   diskPinner
	token uint64 // of pin
}

// submit begins the read.
func (x *diskRead) submit() {
	r := x.of
	if x.FD = x.file.descriptor(); x.FD >= 0 && (len(x.Buf) < largeRead || x.file.direct != nil) {
		if r.begin.Do(r.start); r.ring != nil {
			r.ring.Submit(&x.Read)
			return
		}
	}
	r.threaded.Do(func() { r.slots = make(chan struct{}, maxThreads) })
	go func() {
		r.slots <- struct{}{}
		defer func() { <-r.slots }()
		x.N, x.Err = x.file.readAt(x.Buf, x.Off)
		x.finished()
	}()
}

// finished is called on the ring's thread, or on any other.
func (x *diskRead) finished() {
	if x.Err != nil || x.N < len(x.Buf) {
		go x.end(x.again()) // it writes to the disk, to note what is lost
		return
	}
	// If the file was cut short and made longer again, what was read may be zeros.
	x.end(x.file.intact())
}

func (x *diskRead) end(ok bool) {
	l := x.load
	if !ok {
		l.failed.Store(true)
	}
	r := x.of
	r.n.Add(-1)
	x.release()
	if l.left.Add(-1) == 0 {
		l.finished()
	}
	r.wg.Done() // only now: the view of l may pin chunks until it is finished
}

// again reads once more if it was not the disk that failed. Where the disk cannot be read,
// the pinner is told.
func (x *diskRead) again() bool {
	for _, e := range []unix.Errno{unix.ENOMEM, unix.EAGAIN, unix.EINVAL, unix.EOPNOTSUPP} {
		if errors.Is(x.Err, e) {
			// The kernel has no memory for the request, or the file system does not
			// read this file in this way.
			x.N, x.Err = x.file.f.ReadAt(x.Buf, x.Off)
		}
	}
	if x.Err == nil && x.N < len(x.Buf) {
		x.Err = io.ErrUnexpectedEOF
	}
	if x.Err == nil {
		return x.file.intact()
	}
	x.of.log.Debug("cannot read the disk", "err", fmt.Errorf("read %d bytes at %d: %w", len(x.Buf), x.Off, x.Err))
	x.pin.unread(x.token)
	return false
}

// release unpins the bytes. The buffer belongs to the view.
func (x *diskRead) release() {
	r := x.of
	x.pin.Unpin(x.token)
	x.load, x.file, x.pin = nil, nil, nil
	x.Buf, x.N, x.Err = nil, 0, nil
	r.pool.Put(x)
}
