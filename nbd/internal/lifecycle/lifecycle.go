// Package lifecycle is what the servers of package nbd and of its transports have in common:
// they accept connections from any number of listeners until they are shut down or closed,
// and leave nothing behind. What a connection is, and when there are too many, is theirs.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"
)

// Conn is a connection of a server.
type Conn interface {
	comparable
	// Drain makes the connection answer the requests in flight, and end.
	Drain()
	// Abort closes the connection. What waits for its client fails at once.
	Abort()
}

// Lifecycle has the listeners and the open connections of a server, from its beginning to its
// end. It is used once: after Shutdown or Close it stays closed.
type Lifecycle[C Conn] struct {
	name   string // of the server's package, which begins errors
	closed error  // what the server's methods return when it is closed

	ctx    context.Context // of every connection
	cancel context.CancelCauseFunc

	mu struct {
		sync.Mutex
		listeners map[net.Listener]struct{}
		conns     map[C]struct{}
		closing   bool          // Shutdown or Close was called
		gone      chan struct{} // closed once closing has no connections left
		abandon   time.Time     // when Close gives up waiting for connections
	}
}

// New makes the lifecycle of a server. name begins its errors. closed is what Serve and Add
// return once the server is shut down, and why the contexts of connections end then.
func New[C Conn](name string, closed error) *Lifecycle[C] {
	l := &Lifecycle[C]{name: name, closed: closed}
	l.ctx, l.cancel = context.WithCancelCause(context.Background())
	l.mu.listeners = make(map[net.Listener]struct{})
	l.mu.conns = make(map[C]struct{})
	l.mu.gone = make(chan struct{})
	return l
}

// Pauses after an accept that has failed.
const (
	leastPause = 5 * time.Millisecond
	mostPause  = time.Second
)

// Serve accepts connections from ln, and calls start for each, until the server is shut down
// or closed. It returns another error where ln or start fails. It closes ln. start returns at
// once: it adds the connection, or closes it.
func (l *Lifecycle[C]) Serve(ln net.Listener, log *slog.Logger, start func(net.Conn) error) error {
	defer ln.Close()
	if !l.listen(ln) {
		return l.closed
	}
	defer l.unlisten(ln)
	var pause time.Duration
	for {
		nc, err := ln.Accept()
		if err == nil {
			pause = 0
			if err := start(nc); err != nil {
				return err
			}
			continue
		}
		if l.Closed() {
			return l.closed
		}
		// The process is out of descriptors, or the peer is gone already: the next
		// accept may succeed.
		if t, ok := err.(interface{ Temporary() bool }); !ok || !t.Temporary() {
			return fmt.Errorf("%s: accept on %s: %w", l.name, ln.Addr(), err)
		}
		pause = min(max(2*pause, leastPause), mostPause)
		log.Warn("cannot accept a connection; trying again", "addr", ln.Addr(), "err", err, "pause", pause)
		select {
		case <-time.After(pause):
		case <-l.ctx.Done():
			return l.closed
		}
	}
}

// listen adds ln, and reports false if the server is closed.
func (l *Lifecycle[C]) listen(ln net.Listener) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.mu.closing {
		l.mu.listeners[ln] = struct{}{}
	}
	return !l.mu.closing
}

func (l *Lifecycle[C]) unlisten(ln net.Listener) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.mu.listeners, ln)
}

// Add adds an open connection, and returns the context of all connections. It fails if the
// server is closed, or if may does. may is called with the number of the others, and no
// other function of a caller runs meanwhile.
func (l *Lifecycle[C]) Add(c C, may func(open int) error) (context.Context, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.closing {
		return nil, l.closed
	}
	if err := may(len(l.mu.conns)); err != nil {
		return nil, err
	}
	l.mu.conns[c] = struct{}{}
	return l.ctx, nil
}

// Remove removes a connection of which nothing is left. It calls ended with the number of the
// others, and no other function of a caller runs meanwhile.
func (l *Lifecycle[C]) Remove(c C, ended func(open int)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.mu.conns, c)
	ended(len(l.mu.conns))
	if l.mu.closing && len(l.mu.conns) == 0 {
		close(l.mu.gone)
	}
}

// View calls f with the open connections. No connection is added or removed meanwhile, and no
// other function of a caller runs.
func (l *Lifecycle[C]) View(f func(conns map[C]struct{})) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(l.mu.conns)
}

// Context is the context of every connection. Close ends it.
func (l *Lifecycle[C]) Context() context.Context { return l.ctx }

// Closed reports whether Shutdown or Close was called.
func (l *Lifecycle[C]) Closed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.closing
}

// Shutdown closes the listeners, drains every connection, and waits until all are removed.
// When ctx ends first, Shutdown closes the rest as Close does, and returns the cause.
func (l *Lifecycle[C]) Shutdown(ctx context.Context) error {
	l.mu.Lock()
	l.stopListening()
	for c := range l.mu.conns {
		c.Drain()
	}
	l.mu.Unlock()

	select {
	case <-l.mu.gone:
		return l.Close()
	case <-ctx.Done():
		if err := l.Close(); err != nil {
			return errors.Join(context.Cause(ctx), err)
		}
		return context.Cause(ctx)
	}
}

// CloseTime is how long Close waits for connections whose context has ended. It is a variable for
// tests: on a busy machine, connections that end may take longer than a server should wait.
var CloseTime = time.Second

// Close closes the listeners, ends the context of the connections, aborts them, and waits
// until they are removed, for up to CloseTime. It fails where some are not: these are left
// behind.
func (l *Lifecycle[C]) Close() error {
	l.mu.Lock()
	l.stopListening()
	l.cancel(l.closed)
	for c := range l.mu.conns {
		c.Abort()
	}
	if l.mu.abandon.IsZero() {
		l.mu.abandon = time.Now().Add(CloseTime)
	}
	t := time.NewTimer(time.Until(l.mu.abandon))
	l.mu.Unlock()
	defer t.Stop()
	select {
	case <-l.mu.gone:
		return nil
	case <-t.C:
	}
	l.mu.Lock()
	n := len(l.mu.conns)
	l.mu.Unlock()
	if n == 0 {
		return nil
	}
	return fmt.Errorf("%s: %d connections were left behind: their devices have not returned within %v of being cancelled", l.name, n, CloseTime)
}

// stopListening closes the listeners, for good. l.mu is held.
func (l *Lifecycle[C]) stopListening() {
	if !l.mu.closing && len(l.mu.conns) == 0 {
		close(l.mu.gone)
	}
	l.mu.closing = true
	for ln := range l.mu.listeners {
		ln.Close()
	}
}
