package inline

import (
	"sync"
	"sync/atomic"
	"time"
)

// Watchdog finds out that whoever serves requests one after the other is stuck in one that
// should take microseconds. Then another goroutine serves the others, and the stuck one only
// finishes its request. The zero Watchdog with TakeOver and Patience set is ready. It has a
// timer only while requests are made, which looks every Patience.
type Watchdog struct {
	// Patience is how long a request may take. It may take twice as long.
	Patience time.Duration
	// Waits reports whether something waits for the one who serves, besides the request: if
	// nothing does, it may take longer, up to maxLooks of Patience. It may be called on any
	// goroutine, and when the request is just ending. Nil: something always waits.
	Waits func() bool
	// TakeOver starts the other goroutine. It owns all that the stuck one owned but the
	// request. It may be called on any goroutine, and calls neither Begin nor End.
	TakeOver func()

	// count goes up when a request begins, and when it ends: it is odd meanwhile. Whoever
	// raises it at the end owns the rest: the one who serves, or the watchdog.
	count atomic.Uint64
	armed atomic.Bool // a look is to come

	mu struct {
		sync.Mutex // held during a look
		timer      *time.Timer
		seen       uint64 // count at the last look
		looks      int    // at the request of the last look
		over       bool
	}
}

// maxLooks is at how many looks a request is taken over although nothing waits for its end. It
// gets a deadline then, say.
const maxLooks = 100

// Begin says that a request begins. End takes what it returns.
func (w *Watchdog) Begin() (n uint64) {
	n = w.count.Add(1)
	if !w.armed.Load() {
		w.arm()
	}
	return n
}

// End says that a request has ended. It returns false if TakeOver was called meanwhile: the
// caller owns nothing but its request any more.
func (w *Watchdog) End(n uint64) bool { return w.count.CompareAndSwap(n, n+1) || w.taken() }

// taken waits for TakeOver, which may only just have begun: it counts the request as one in
// flight, and the caller is about to count it as ended. It returns false.
func (w *Watchdog) taken() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return false
}

// arm sets the timer.
func (w *Watchdog) arm() {
	if !w.armed.CompareAndSwap(false, true) {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.mu.over:
	case w.mu.timer == nil:
		w.mu.timer = time.AfterFunc(w.Patience, w.look)
	default:
		w.mu.timer.Reset(w.Patience)
	}
}

// look calls TakeOver if the request is the one of the last look. It looks again as long as
// there are requests.
func (w *Watchdog) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := w.count.Load()
	switch {
	case w.mu.over:
		return
	case n != w.mu.seen:
		w.mu.looks = 0
	case n%2 == 1:
		w.mu.looks++
		if w.Waits != nil && w.mu.looks < maxLooks && !w.Waits() {
			break
		}
		if w.count.CompareAndSwap(n, n+1) {
			w.TakeOver()
		}
	default: // no request since the last look
		w.armed.Store(false)
		// A request that begins now arms the watchdog. One that has begun before may have
		// seen it armed.
		if w.count.Load() == n || !w.armed.CompareAndSwap(false, true) {
			return
		}
	}
	w.mu.seen = n
	w.mu.timer.Reset(w.Patience)
}

// Stop ends the watchdog. No request is being made, and none begins.
func (w *Watchdog) Stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.over = true
	if w.mu.timer != nil {
		w.mu.timer.Stop()
	}
}
