package blockmap

import (
	"context"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// pageCache answers whether resident bytes are in memory, so that reading them where
// they are mapped does not wait for the disk. To ask the kernel costs a system call for
// each view, a twentieth of what a small hit costs in all. So there are two modes, for
// all streams of a cache. While it trusts, it answers yes. While it checks, it asks.
//
// What turns checking on is a measured stall: the kernel counts the page faults for which
// this process has waited for a disk (major faults), whatever code or system call they
// were in, and watch looks at that count while there are views. Once all views have found
// their pages for a while, it trusts again. Each time that this was too early, the while
// is doubled.
type pageCache struct {
	checking atomic.Bool

	// Views set these, and watch clears them: in the common case a view only reads.
	used   atomic.Bool // something was viewed
	missed atomic.Bool // a check found pages that are not in memory

	kick   chan struct{} // tells watch of the first view after a pause
	faults func() int64  // the count of major faults
}

const (
	faultPoll = 5 * time.Millisecond // how long a stall goes unnoticed
	// idleAfter is the time without a view after which the count is left alone.
	// What the kernel has evicted when the views go on is not known, so they begin
	// by checking.
	idleAfter = time.Second
	minCheck  = 100 * time.Millisecond // how long all checks must succeed
	maxCheck  = 10 * time.Second
)

func newPageCache(faults func() int64) *pageCache {
	p := &pageCache{kick: make(chan struct{}, 1), faults: faults}
	p.checking.Store(true)
	return p
}

// majorFaults is the count of major faults of this process.
func majorFaults() int64 {
	var r unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &r)
	return r.Majflt
}

// has reports whether n bytes at off of f can be read at once where they are mapped.
func (p *pageCache) has(f *dataFile, off, n int64) bool {
	if f.direct != nil {
		return false // nobody keeps them in memory
	}
	if !p.used.Load() {
		p.wake()
	}
	return !p.checking.Load() || p.check(f, off, n)
}

// trusted is has for who can wait: while there is a doubt, a read by descriptor is as good
// as a check.
func (p *pageCache) trusted(f *dataFile) bool { return f.direct == nil && !p.checking.Load() }

// doubt turns checking on: mapped bytes could not be read. A read by descriptor may do
// better: where the disk refuses a part of a large folio of the page cache, the kernel reads
// the other parts, and maps none of them. Such a fault is not counted as a major one.
func (p *pageCache) doubt() {
	p.missed.Store(true)
	p.checking.Store(true)
}

func (p *pageCache) wake() {
	if p.used.Swap(true) {
		return
	}
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

func (p *pageCache) check(f *dataFile, off, n int64) bool {
	if f.inMemory(off, n) {
		return true
	}
	if !p.missed.Load() {
		p.missed.Store(true)
	}
	return false
}

// watch sets the mode, until ctx ends.
func (p *pageCache) watch(ctx context.Context) {
	t := time.NewTicker(faultPoll)
	defer t.Stop()
	hold := minCheck
	var left time.Time // when it last began to trust
	for {
		t.Stop()
		select {
		case <-ctx.Done():
			return
		case <-p.kick:
		}
		t.Reset(faultPoll)
		p.checking.Store(true)
		faults, last := p.faults(), time.Now()
		viewed := last
		var good time.Duration // of views that all found their pages
		for time.Since(viewed) < idleAfter {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
			before, n := faults, p.faults()
			now := time.Now()
			passed := now.Sub(last)
			faults, last = n, now
			used := p.used.Swap(false)
			if used {
				viewed = now
			}
			switch stalled := faults != before; {
			case !p.checking.Load():
				if stalled {
					if hold = min(2*hold, maxCheck); now.Sub(left) > 10*hold {
						hold = minCheck
					}
					good = 0
					p.checking.Store(true)
				}
			case p.missed.Swap(false) || stalled:
				good = 0
			case used:
				// A tick that comes late, on a busy machine, is about no more views.
				if good += min(passed, 2*faultPoll); good >= hold {
					left = now
					p.checking.Store(false)
				}
			}
		}
		p.checking.Store(true)
		select { // what came before is over; used is cleared after that, so no view is missed
		case <-p.kick:
		default:
		}
		p.used.Store(false)
	}
}
