package fetcher

import (
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// decoders are threads of low priority that decompress, verify and store prefetched
// chunks. If they had normal priority, both processors of a small host could be busy with
// chunks that a start reads later, while it waits for one that it reads now. The kernel's
// priorities are used, and not Go's scheduler, because the program that starts is another
// process.
//
// A thread that waits for a processor still holds one of Go's GOMAXPROCS, so there should
// be more of these than decoders: see Options.Decoders.
//
// A job writes to a disk and may hang. A thread whose job takes longer than stuckAfter is
// replaced by another, and ends with its job. So a source whose jobs hang delays the
// jobs of others for stuckAfter at most, and how many of its jobs hang is bounded by what
// it may have in flight.
type decoders struct {
	work chan func()
	wg   sync.WaitGroup
	once sync.Once // closes work
}

// niceness is how much nicer the decoders' threads are than the process. On a processor
// that other threads want they get a tenth of the time, and on an idle one all of it.
const niceness = 10

func newDecoders(n int) *decoders {
	d := &decoders{work: make(chan func())}
	for range n {
		d.wg.Go(d.run)
	}
	return d
}

func (d *decoders) run() {
	// The goroutine never unlocks the thread, so the thread ends with it, and no other
	// goroutine runs at low priority.
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The first thread of a process never ends, and tools show its priority as that
		// of the process. It is held here until another goroutine has got another one.
		defer runtime.UnlockOSThread()
		var other sync.WaitGroup
		other.Go(d.run)
		other.Wait()
		return
	}
	// Only a sandbox refuses this, and then the thread keeps the normal priority. The
	// system call returns 20 minus the niceness.
	if p, err := unix.Getpriority(unix.PRIO_PROCESS, unix.Getpid()); err == nil {
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), min(20-p+niceness, 19))
	}
	for f := range d.work {
		if d.replaced(f) {
			return
		}
	}
}

// replaced does a job, and says whether another thread has replaced this one meanwhile.
func (d *decoders) replaced(job func()) bool {
	var mu sync.Mutex
	var done, replaced bool
	t := time.AfterFunc(stuckAfter, func() {
		mu.Lock()
		defer mu.Unlock()
		if !done {
			replaced = true
			d.wg.Go(d.run)
		}
	})
	defer t.Stop()
	job()
	mu.Lock()
	defer mu.Unlock()
	done = true
	return replaced
}

// do hands f to a thread as soon as one is free. It returns false if urgent is closed
// before that.
func (d *decoders) do(urgent <-chan struct{}, f func()) bool {
	select {
	case d.work <- f:
		return true
	case <-urgent:
		return false
	}
}

// close returns when all threads have ended. do must not be called any more.
func (d *decoders) close() {
	d.once.Do(func() { close(d.work) })
	d.wg.Wait()
}
