package nbd

import (
	"sync/atomic"
	"time"
)

// pace decides how a socket waits for its client. Parked, it leaves its thread to
// others, and requests gather while it sleeps, to be answered together. But a
// client that sends its requests one at a time waits for each, and then most
// of the wait is the scheduler's way from the event to the goroutine. For such
// a client the thread itself sleeps in the kernel, where the request wakes it.
//
// A thread that sleeps so has a processor of Go's in hand, and there may be no
// other that looks for events. So it sleeps for the only client alone: one with
// several connections that takes turns among them would wait, on the next one,
// for the end of the sleep on the last; and it sleeps no longer than a client
// that is busy takes to come back.
type pace struct {
	clients *atomic.Int32 // connections that the server has

	lone int // reads in a row that had to wait and brought one request
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
