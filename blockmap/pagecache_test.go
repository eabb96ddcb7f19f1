package blockmap

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A page cache checks until all checks have succeeded for a while, and again from the
// first major fault on, each time for longer.
func TestPageCacheMode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var faults atomic.Int64
		p := newPageCache(faults.Load)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); p.watch(ctx) }()
		defer func() { cancel(); <-done }()
		// view is one view each millisecond, until the mode is want.
		view := func(want bool, limit time.Duration) time.Duration {
			t.Helper()
			begin := time.Now()
			for p.checking.Load() != want {
				if time.Since(begin) > limit {
					t.Fatalf("checking is not %v after %v", want, limit)
				}
				if !p.used.Load() {
					p.wake()
				}
				time.Sleep(time.Millisecond)
			}
			return time.Since(begin)
		}
		if !p.checking.Load() {
			t.Fatal("it trusts a page cache of which it knows nothing")
		}
		if d := view(false, time.Second); d < minCheck {
			t.Errorf("it trusts after %v of checks", d)
		}
		for want := 2 * minCheck; want < maxCheck; want *= 2 {
			faults.Add(1)
			if d := view(true, 10*faultPoll); d > 2*faultPoll {
				t.Errorf("it checks %v after a stall", d)
			}
			if d := view(false, 2*maxCheck); d < want-2*faultPoll || d > want+10*faultPoll {
				t.Errorf("it checked for %v, want %v", d, want)
			}
		}
		// A check that finds pages missing makes the while begin anew.
		faults.Add(1)
		view(true, time.Second)
		for range 20 {
			time.Sleep(time.Second / 2)
			p.wake()
			p.missed.Store(true)
		}
		if !p.checking.Load() {
			t.Error("it trusts although checks fail")
		}
		view(false, 2*maxCheck)
		// Long after the last stall, one is not held against it.
		for range 400 {
			time.Sleep(time.Second / 2)
			p.wake()
		}
		faults.Add(1)
		view(true, time.Second)
		if d := view(false, maxCheck); d > 2*minCheck {
			t.Errorf("it checked for %v after a stall long after the last", d)
		}
		// After a pause it begins by checking.
		time.Sleep(2 * idleAfter)
		if !p.checking.Load() {
			t.Error("it trusts after a pause")
		}
	})
}

// A look that comes late, because the machine is busy, makes nothing of the time since the one
// before: there was one view.
func TestPageCacheLooksLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		looks := 0
		p := newPageCache(func() int64 {
			if looks++; looks == 2 {
				time.Sleep(idleAfter)
			}
			return 0
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); p.watch(ctx) }()
		defer func() { cancel(); <-done }()
		p.wake()
		time.Sleep(idleAfter + 2*faultPoll)
		synctest.Wait()
		if looks < 2 || !p.checking.Load() {
			t.Errorf("after a view and %d looks it trusts", looks)
		}
	})
}
