package fetcher

import (
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// decoders are threads that decompress, check and store what nobody waits for.
// They are of low priority: a start that is given its chunks faster than it
// reads them would otherwise wait, while both of two processors unpack what
// it wants later, for them to answer what it reads now. The kernel is asked,
// and not Go's scheduler, since the program that starts is another process.
//
// A thread that the kernel keeps waiting holds one of Go's GOMAXPROCS all the
// same, so there should be more of these than decoders: see Options.Decoders.
//
// A job may hang, since it writes to a disk. A thread that has had one for long
// is replaced by another, and ends when the job does. So the jobs of a source
// that hang hold up those of others for stuckAfter at most; how many hang is
// bounded by what a source may have in flight.
type decoders struct {
	work chan func()
	wg   sync.WaitGroup
	once sync.Once // closes work
}

// niceness is what the decoders' threads have more than the process. A processor
// that is wanted by others gives them a tenth of its time, and all of it when it is
// idle.
const niceness = 10

func newDecoders(n int) *decoders {
	d := &decoders{work: make(chan func())}
	for range n {
		d.wg.Go(d.run)
	}
	return d
}

func (d *decoders) run() {
	// It is never unlocked, so the thread ends with the goroutine, and nobody
	// else gets one of low priority.
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The first thread of a process does not end, and its priority is taken
		// for that of the process. While it is held here, another is found.
		defer runtime.UnlockOSThread()
		var other sync.WaitGroup
		other.Go(d.run)
		other.Wait()
		return
	}
	// Only a sandbox refuses this; then it is as urgent as the rest. The kernel
	// gives 20 less the niceness.
	if p, err := unix.Getpriority(unix.PRIO_PROCESS, unix.Getpid()); err == nil {
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), min(20-p+niceness, 19))
	}
	for f := range d.work {
		if d.replaced(f) {
			return
		}
	}
}

// replaced does a job, and says whether another thread was started meanwhile.
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

// do has f called as soon as a thread is free, and returns then; or it returns
// false once hurry is closed.
func (d *decoders) do(hurry <-chan struct{}, f func()) bool {
	select {
	case d.work <- f:
		return true
	case <-hurry:
		return false
	}
}

// close returns when all threads have ended. Nothing is handed to do any more.
func (d *decoders) close() {
	d.once.Do(func() { close(d.work) })
	d.wg.Wait()
}
