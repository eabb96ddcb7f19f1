package vhost

import (
	"sync/atomic"
	"time"
)

// A queue without requests waits for the driver to kick it. As a rule its goroutine is
// parked, and costs nothing: a host may have thousands of idle virtual machines. But the
// scheduler's way from the event to the goroutine takes longer than a hit. So the thread
// of a busy queue first sleeps in the kernel for a while, where the kick wakes it.
//
// A thread that sleeps so keeps one of Go's processors for a while, and there must be
// another one for whoever has work. So does one that waits for a busy driver (gather.go).
// So at most GOMAXPROCS-1 threads wait at a time.
const longestSleep = time.Millisecond

// waiters are the threads that wait.
type waiters struct {
	limit int32
	n     atomic.Int32
}

// enter counts one more, if that is possible. leave takes it back.
func (w *waiters) enter() bool {
	if w.n.Add(1) <= w.limit {
		return true
	}
	w.n.Add(-1)
	return false
}

func (w *waiters) leave() { w.n.Add(-1) }

// loneTakes is how many passes of a queue in a row take one request, with none in flight,
// until the driver counts as one that waits for each. Such a request is done on the
// queue's own thread where that waits for the local disk at most. Any other one would have
// to be woken, which takes as long as a fast disk.
const loneTakes = 16
