package nbd

import (
	"sync/atomic"
	"time"
)

// pace decides how a socket waits for its client. As a rule its goroutine is parked:
// it leaves its thread to others, and requests gather meanwhile, to be answered
// together. But a client that sends one request at a time waits for each. Most of that
// wait is the scheduler's way from the event to the goroutine. For such a client the
// thread itself sleeps in the kernel, where the request wakes it.
//
// A thread that sleeps so keeps one of Go's processors, and there may be no other one
// that looks for events. So a thread sleeps only while the server has a single
// connection: a client that takes turns among several would wait, on the next one, for
// the sleep on the last one to end. And it sleeps no longer than a busy client takes to
// send its next request.
type pace struct {
	clients *atomic.Int32 // connections that the server has

	lone int // requests in a row that were waited for and came alone
}

const (
	loneReads = 16 // so many in a row are a client of depth 1
	// longestSleep is for what a request and its reply take on a busy client.
	longestSleep = 200 * time.Microsecond
)

// stay reports whether to sleep on the thread.
func (p *pace) stay() bool { return p.lone >= loneReads && p.clients.Load() == 1 }

// got notes whether a wait was for a request that came alone.
func (p *pace) got(alone bool) {
	if alone {
		p.lone = min(p.lone+1, loneReads)
	} else {
		p.lone = 0
	}
}
