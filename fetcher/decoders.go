package fetcher

import (
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// decoders are threads of low priority that decompress, verify and store prefetched
// chunks. With normal priority they could keep both processors of a small host busy
// with chunks that a start reads later, while the start waits for a chunk that it reads
// now. They use the kernel's priorities and not Go's scheduler, because the program
// that starts is another process.
//
// A thread that waits for a processor still holds one of Go's GOMAXPROCS, so GOMAXPROCS
// should be larger than the number of decoders: see Options.Decoders.
//
// A job writes to a disk and may hang. If a job takes longer than stuckAfter, another
// thread replaces its thread, which ends with the job. So a source whose jobs hang
// delays the jobs of other sources for stuckAfter at most. The limit on what a source
// may have in flight bounds the number of its jobs that hang.
type decoders struct {
	work chan func()
	wg   sync.WaitGroup
	once sync.Once // closes work
}

// niceness is the niceness of the decoders' threads relative to the process. On a
// processor that other threads want, they get a tenth of the time; on an idle one, all
// of it.
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
		// of the process. This goroutine holds it until another goroutine has got
		// another thread.
		defer runtime.UnlockOSThread()
		var other sync.WaitGroup
		other.Go(d.run)
		other.Wait()
		return
	}
	// Only a sandbox refuses this; the thread then keeps the normal priority. The
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

// replaced does a job, and reports whether another thread has replaced this one
// meanwhile.
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

// do gives f to a thread as soon as one is free. It returns false if urgent is closed
// before that.
func (d *decoders) do(urgent <-chan struct{}, f func()) bool {
	select {
	case d.work <- f:
		return true
	case <-urgent:
		return false
	}
}

// Background runs a job on one of the threads of low priority, and returns when it is done.
// The job takes as much time as decompressing a few chunks; otherwise prefetches wait.
func (f *Fetcher) Background(job func()) {
	f.mu.Lock()
	closed := f.mu.closed
	if !closed {
		f.wg.Add(1)
	}
	f.mu.Unlock()
	if closed {
		job()
		return
	}
	defer f.wg.Done()
	done := make(chan struct{})
	f.decoders.do(nil, func() {
		defer close(done)
		job()
	})
	<-done
}

// close returns when all threads have ended. Nobody may call do afterwards.
func (d *decoders) close() {
	d.once.Do(func() { close(d.work) })
	d.wg.Wait()
}
