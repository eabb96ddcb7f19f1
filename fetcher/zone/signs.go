package zone

import (
	"context"
	"net/http"
	"sync"
	"time"
)

// signs is what a caller of a Client wants to know about the signs of life of a request,
// and what it decides about them. A Router is behind it.
type signs struct {
	patience func(asked time.Time) time.Duration // how much longer to wait for the first sign
	pause    func() time.Duration                // how long to wait for the next one
	first    func(after time.Duration)           // the first sign has come
	next     func()                              // a later one has
	revived  func(after time.Duration)           // the first sign has come when the request was given up
}

type signsKey struct{}

// withSigns has a Client tell and ask about the signs of life of the requests with the
// context that it returns.
func withSigns(ctx context.Context, s *signs) context.Context {
	return context.WithValue(ctx, signsKey{}, s)
}

// leastLag is how late a timer may be: if it is later, this host has no time to look at
// what has come, and peers get more.
const leastLag = 50 * time.Millisecond

// watch waits for the signs of life of one request. Without signs, the bounds are those of
// the Client.
type watch struct {
	o       *ClientOptions
	signs   *signs // may be nil
	began   time.Time
	overdue chan struct{} // closed when the first sign has not come in time
	stale   func()        // called when a later sign has not come in time

	mu      sync.Mutex
	timer   *time.Timer
	due     time.Time
	last    time.Time     // when the last sign came; zero before the first
	longest time.Duration // the longest pause between two signs
	ended   bool          // nobody waits for signs any more
	gaveUp  bool          // the caller does not wait any more
}

func newWatch(o *ClientOptions, s *signs, began time.Time, stale func()) *watch {
	w := &watch{o: o, signs: s, began: began, overdue: make(chan struct{}), stale: stale}
	w.mu.Lock()
	defer w.mu.Unlock()
	d := o.FirstSign
	if s != nil {
		d = min(d, s.patience(began))
	}
	d = min(d, o.Answer)
	w.due = began.Add(d)
	w.timer = time.AfterFunc(d, w.expire)
	return w
}

// reset makes the timer expire after d. w.mu is held.
func (w *watch) reset(now time.Time, d time.Duration) {
	d = min(d, w.began.Add(w.o.Answer).Sub(now))
	w.due = now.Add(d)
	w.timer.Reset(d)
}

// expire happens when a sign is due.
func (w *watch) expire() {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if w.ended || now.Before(w.due) {
		return // a sign has come meanwhile
	}
	if !w.last.IsZero() {
		w.ended = true
		w.stale()
		return
	}
	if most := w.began.Add(min(w.o.FirstSign, w.o.Answer)).Sub(now); most > 0 && w.signs != nil {
		more := w.signs.patience(w.began)
		if lag := now.Sub(w.due); lag > leastLag {
			more = max(more, 2*lag)
		}
		if more > 0 {
			w.reset(now, min(more, most))
			return
		}
	}
	close(w.overdue)
}

// giveUp ends the wait for the first sign when that is overdue. It returns false if the sign
// has come meanwhile.
func (w *watch) giveUp() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.gaveUp = w.last.IsZero()
	w.ended = w.ended || w.gaveUp
	return w.gaveUp
}

// sign records a sign of life: a 102, or the answer, after which no more are waited for. It
// reports whether the request was given up before.
func (w *watch) sign(answer bool) (late bool) {
	w.mu.Lock()
	now := time.Now()
	first := w.last.IsZero()
	late = w.gaveUp
	if w.ended && !late {
		w.mu.Unlock()
		return false
	}
	if !first {
		w.longest = max(w.longest, now.Sub(w.last))
	}
	w.last = now
	if !late {
		w.timer.Stop()
		if answer {
			w.ended = true
		} else {
			pause := w.o.FirstSign
			if w.signs != nil {
				pause = min(pause, w.signs.pause())
			}
			w.reset(now, pause)
		}
	}
	w.mu.Unlock()
	switch s := w.signs; {
	case s == nil:
	case late && first:
		s.revived(now.Sub(w.began))
	case first && !late:
		s.first(now.Sub(w.began))
	case !late:
		s.next()
	}
	return late
}

// stop ends the wait. It returns whether no sign has come, and the longest pause.
func (w *watch) stop() (silent bool, longest time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	w.timer.Stop()
	return w.last.IsZero(), w.longest
}

// answered is what a round trip returns.
type answered struct {
	resp *http.Response
	err  error
}

// linger waits for a sign of life of a request that was given up without one: whoever gives
// it is alive, and was given up too soon.
func (c *Client) linger(w *watch, done <-chan answered, signed <-chan struct{}, cancel context.CancelCauseFunc) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.closed {
		cancel(errNoAnswer)
		go func() { drain(<-done) }()
		return
	}
	c.wg.Go(func() {
		t := time.NewTimer(time.Until(w.began.Add(c.o.FirstSign)))
		defer t.Stop()
		var x answered
		select {
		case x = <-done:
			if x.err == nil {
				w.sign(true)
			}
			cancel(nil)
		case <-signed:
			cancel(nil)
			x = <-done
		case <-t.C:
			cancel(errNoAnswer)
			x = <-done
		case <-c.ctx.Done():
			cancel(errNoAnswer)
			x = <-done
		}
		drain(x)
	})
}

func drain(x answered) {
	if x.resp != nil {
		x.resp.Body.Close()
	}
}
