package nbd

import "sync/atomic"

// pace decides how a socket waits for its client. Parked, it leaves its thread to
// others, and requests gather while it sleeps, to be answered together. But a
// client that sends its requests one at a time waits for each, and then most
// of the wait is the scheduler's way from the event to the goroutine. For such
// a client the thread itself sleeps in the kernel, where the request wakes it:
// that is a fifth to a half faster at depth 1 (bench/nbd).
type pace struct {
	sleepers *atomic.Int32 // threads of the server that wait so

	lone int // reads in a row that had to wait and brought one request
}

const (
	loneReads   = 16 // so many in a row are a client of depth 1
	sleepMillis = 2  // a client that pauses for longer is parked after all
	maxSleepers = 16 // threads; clients beyond that are parked
)

// stay reports whether to sleep on the thread. Then leave has to be called.
func (p *pace) stay() bool {
	if p.lone < loneReads {
		return false
	}
	if p.sleepers.Add(1) > maxSleepers {
		p.sleepers.Add(-1)
		return false
	}
	return true
}

func (p *pace) leave() { p.sleepers.Add(-1) }

// got notes whether a wait was for a request that came alone.
func (p *pace) got(alone bool) {
	if alone {
		p.lone = min(p.lone+1, loneReads)
	} else {
		p.lone = 0
	}
}
