package nbd

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// Limits bound requests in flight. In each field 0 means no bound.
type Limits struct {
	Requests int
	Bytes    int64 // of payload, and of what replies pin beyond that
}

// check fails where a limit makes no sense.
func (l Limits) check() error {
	if l.Requests < 0 || l.Bytes < 0 {
		return fmt.Errorf("limits of %d requests and %d bytes: a limit is not negative", l.Requests, l.Bytes)
	}
	return nil
}

// fits reports whether used is within l.
func (l Limits) fits(used Limits) bool {
	return (l.Requests == 0 || used.Requests <= l.Requests) && (l.Bytes == 0 || used.Bytes <= l.Bytes)
}

// Admission bounds the requests in flight of all clients together, whichever
// transports they use. Each client has limits of its own as well: see
// [Admission.Client]. Requests that are answered at once need no admission.
//
// A client without requests in flight is always admitted, with a request of any size.
// So a client that does not take its replies stops no other client, and a request that
// is larger than a limit is served by itself. The limits of all are therefore exceeded
// by at most one request of each client.
type Admission struct {
	all Limits

	mu struct {
		sync.Mutex
		used    Limits
		waiting []*waiter // in the order in which they came
	}
}

// waiter is an Acquire that has to wait.
type waiter struct {
	c     *Client
	bytes int64
	ready chan struct{} // closed when the request is admitted
}

// NewAdmission makes an Admission with limits on the requests of all clients together.
// It fails where a limit is negative.
func NewAdmission(all Limits) (*Admission, error) {
	if err := all.check(); err != nil {
		return nil, err
	}
	return &Admission{all: all}, nil
}

// InFlight is what the requests of all clients take. It is zero for an Admission
// without limits, whose clients are not counted together.
func (a *Admission) InFlight() Limits {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.mu.used
}

// Client is one client's part of an Admission. Its methods may be called at once.
type Client struct {
	a    *Admission
	each Limits
	used Limits // guarded by a.mu
}

// Client makes a client with the limits each. A client without requests in flight
// holds nothing, so there is no call that ends one. a may be nil: there are no limits
// on all clients then.
func (a *Admission) Client(each Limits) *Client {
	if a == nil || a.all == (Limits{}) {
		a = new(Admission) // clients that share no bound share no lock
	}
	return &Client{a: a, each: each}
}

// fits reports whether that many requests and bytes fit beside those in flight.
// c.a.mu is held.
func (c *Client) fits(requests int, bytes int64) bool {
	mine := Limits{c.used.Requests + requests, c.used.Bytes + bytes}
	all := Limits{c.a.mu.used.Requests + requests, c.a.mu.used.Bytes + bytes}
	return c.each.fits(mine) && c.a.all.fits(all)
}

// admissible reports whether one more request can be admitted. c.a.mu is held.
func (c *Client) admissible(bytes int64) bool { return c.used.Requests == 0 || c.fits(1, bytes) }

// add counts requests and bytes that begin, or end where negative. c.a.mu is held.
func (c *Client) add(requests int, bytes int64) {
	c.used.Requests += requests
	c.used.Bytes += bytes
	c.a.mu.used.Requests += requests
	c.a.mu.used.Bytes += bytes
}

// TryAcquire admits a request of that many bytes, if that is possible at once. It does
// not overtake a request of this client that waits, nor one of another client that
// waits for the limits of all.
func (c *Client) TryAcquire(bytes int64) bool {
	c.a.mu.Lock()
	defer c.a.mu.Unlock()
	return c.tryAcquire(bytes)
}

func (c *Client) tryAcquire(bytes int64) bool {
	// Requests that wait for the limits of their own client do not count: they
	// may wait for long, and leave room for other clients.
	overtakes := slices.ContainsFunc(c.a.mu.waiting, func(w *waiter) bool {
		return w.c == c || c.used.Requests > 0 && w.c.each.fits(Limits{w.c.used.Requests + 1, w.c.used.Bytes + w.bytes})
	})
	if overtakes || !c.admissible(bytes) {
		return false
	}
	c.add(1, bytes)
	return true
}

// Acquire waits until a request of that many bytes is admitted, or fails with the cause
// of ctx. Requests of one client are admitted in the order in which they came.
func (c *Client) Acquire(ctx context.Context, bytes int64) error {
	c.a.mu.Lock()
	if ctx.Err() != nil {
		c.a.mu.Unlock()
		return context.Cause(ctx)
	}
	if c.tryAcquire(bytes) {
		c.a.mu.Unlock()
		return nil
	}
	w := &waiter{c, bytes, make(chan struct{})}
	c.a.mu.waiting = append(c.a.mu.waiting, w)
	c.a.mu.Unlock()
	select {
	case <-w.ready:
		return nil
	case <-ctx.Done():
	}
	c.a.mu.Lock()
	defer c.a.mu.Unlock()
	i := slices.Index(c.a.mu.waiting, w)
	if i < 0 { // admitted at the same moment
		return nil
	}
	c.a.mu.waiting = slices.Delete(c.a.mu.waiting, i, i+1)
	c.a.wake() // requests behind it may fit
	return context.Cause(ctx)
}

// acquireNow admits a request of that many bytes without waiting, whatever is in flight: it
// has begun.
func (c *Client) acquireNow(bytes int64) {
	c.a.mu.Lock()
	defer c.a.mu.Unlock()
	c.add(1, bytes)
}

// TryGrow adds bytes to a request in flight, such as those that its reply pins, and
// reports whether they fit. Where they do not fit it adds nothing.
func (c *Client) TryGrow(bytes int64) bool {
	c.a.mu.Lock()
	defer c.a.mu.Unlock()
	if !c.fits(0, bytes) {
		return false
	}
	c.add(0, bytes)
	return true
}

// Fits reports whether bytes more would fit beside what is in flight.
func (c *Client) Fits(bytes int64) bool {
	c.a.mu.Lock()
	defer c.a.mu.Unlock()
	return c.fits(0, bytes)
}

// Release gives back that many requests, and the bytes that were counted for them.
func (c *Client) Release(requests int, bytes int64) {
	c.a.mu.Lock()
	defer c.a.mu.Unlock()
	c.add(-requests, -bytes)
	c.a.wake()
}

// InFlight is what the client's requests take.
func (c *Client) InFlight() Limits {
	c.a.mu.Lock()
	defer c.a.mu.Unlock()
	return c.used
}

// wake admits waiting requests that fit, in order. A request that fits the limits of
// its client but not those of all is not overtaken, except by a request of a client
// that has none in flight. a.mu is held.
func (a *Admission) wake() {
	full := false
	var behind []*Client // each has a waiter that stays
	rest := a.mu.waiting[:0]
	for _, w := range a.mu.waiting {
		switch {
		case slices.Contains(behind, w.c):
			rest = append(rest, w)
			continue
		case w.c.used.Requests == 0, !full && w.c.fits(1, w.bytes):
			w.c.add(1, w.bytes)
			close(w.ready)
			continue
		case w.c.each.fits(Limits{w.c.used.Requests + 1, w.c.used.Bytes + w.bytes}):
			full = true
		}
		behind = append(behind, w.c)
		rest = append(rest, w)
	}
	clear(a.mu.waiting[len(rest):])
	a.mu.waiting = rest
}
