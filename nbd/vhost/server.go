package vhost

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"thaw/blockmap"
	"thaw/nbd"
	"thaw/nbd/internal/lifecycle"
	"thaw/nbd/internal/lines"
)

// Defaults of the limits of a [Server].
const (
	DefaultMaxConns         = 256
	DefaultMaxQueues        = 64
	DefaultMaxWaiters       = 128
	DefaultMaxInFlightBytes = 64 << 20
	DefaultMaxMemory        = 1 << 40
	DefaultFaultTimeout     = time.Minute
	DefaultOpenTimeout      = 10 * time.Second
)

// Bounds of the memory of all guests together: a process has 128 TiB of addresses.
const (
	maxMapped         = 64 << 40
	maxEndpointMapped = 8 << 40 // of one listener's
)

// ErrServerClosed is what Serve returns after Shutdown or Close.
var ErrServerClosed = errors.New("vhost: server closed")

// Server serves exports to the front ends of vhost-user, which are virtual machine
// monitors. Set its fields before the first Serve. The zero value of each field except
// Exports is useful. A Server is used once: after Shutdown or Close it stays closed.
//
// The cost of a front end is bounded. Its connection takes a goroutine, and another one
// for each queue in use; a busy queue also takes a thread. While its requests wait for
// the device they take up to MaxWaiters goroutines, and MaxInFlightBytes of buffers and
// pinned views. At a limit the server takes no more requests from the queue.
type Server struct {
	// Exports is what there is to serve, as for an NBD server. A front end proves no
	// name, so it may open an export only if Clients is empty.
	Exports nbd.Exports
	Log     *slog.Logger // nil: discarded

	// MaxConns is how many connections one listener has open at a time; further ones are
	// closed as they arrive. Each listener has a bound of its own, so that whoever may
	// connect to one socket takes nothing from the others. 0: DefaultMaxConns.
	MaxConns int
	// MaxQueues is how many queues a device may have, at most 256. A front end is told
	// so, and makes at most one for each processor of its guest. 0: DefaultMaxQueues.
	MaxQueues int
	// MaxMemory is how many bytes of memory a guest may have. 0: DefaultMaxMemory.
	MaxMemory int64
	// FaultTimeout is for a request that waits for the device, and for a call of
	// Exports. 0: DefaultFaultTimeout.
	FaultTimeout time.Duration
	// OpenTimeout is for the first message of a connection, and for a connection to a
	// writable export that is in use: it waits for the other one to end. 0:
	// DefaultOpenTimeout.
	OpenTimeout time.Duration

	// MaxWaiters is how many requests of one connection may wait for the device. 0:
	// DefaultMaxWaiters.
	MaxWaiters int
	// MaxInFlightBytes is how many bytes they may have, or pin. One request of any
	// size is always let in. 0: DefaultMaxInFlightBytes; at least
	// nbd.MinInFlightBytes.
	MaxInFlightBytes int64
	// Admission bounds the requests of all connections together, with those of other
	// transports. Nil: no such bound.
	Admission *nbd.Admission

	bufs     buffers
	requests sync.Pool    // of *request
	mapped   atomic.Int64 // bytes of the memory of all guests
	waiters  waiters
	lines    struct{ refused, ends, requests, rings, full, small, resumed lines.Limiter }

	once sync.Once
	life *lifecycle.Lifecycle[*conn] // see conns
	past Stats                       // of what is gone; for functions that conns calls

	mu struct {
		sync.Mutex
		writers map[string]chan struct{} // by writable export in use; closed when it is not
	}
}

// Stats are counts since the server was made.
type Stats struct {
	Conns      int64 // connections open now
	Accepted   int64 // connections accepted
	Hits       int64 // reads answered at once
	Misses     int64 // reads that waited for the device
	Others     int64 // writes, flushes and all that is not a read
	Errors     int64 // requests answered with an error
	Read       int64 // bytes that guests have read
	Resumed    int64 // requests that an earlier connection had in flight, done again
	Kicks      int64 // times that a guest has woken a queue
	Interrupts int64 // times that a queue has interrupted its guest
	Repaired   int64 // reads from damaged cache files, done again
}

func (s *Stats) add(o Stats) {
	s.Conns += o.Conns
	s.Accepted += o.Accepted
	s.Hits += o.Hits
	s.Misses += o.Misses
	s.Others += o.Others
	s.Errors += o.Errors
	s.Read += o.Read
	s.Resumed += o.Resumed
	s.Kicks += o.Kicks
	s.Interrupts += o.Interrupts
	s.Repaired += o.Repaired
}

// Stats returns the counts of all connections, those that are gone included.
func (s *Server) Stats() Stats {
	var st Stats
	s.conns().View(func(conns map[*conn]struct{}) {
		st = s.past
		st.Conns = int64(len(conns))
		for c := range conns {
			st.add(c.counts.load())
		}
	})
	return st
}

// Check fails where a field has a value that makes no sense, and names the field. Serve
// checks too.
func (s *Server) Check() error {
	switch {
	case s.MaxConns < 0:
		return fmt.Errorf("vhost: MaxConns is %d: want at least 1, or 0 for %d", s.MaxConns, DefaultMaxConns)
	case s.MaxQueues < 0 || s.MaxQueues > maxQueues:
		return fmt.Errorf("vhost: MaxQueues is %d: want 1 to %d, or 0 for %d", s.MaxQueues, maxQueues, DefaultMaxQueues)
	case s.MaxWaiters < 0:
		return fmt.Errorf("vhost: MaxWaiters is %d: want at least 1, or 0 for %d", s.MaxWaiters, DefaultMaxWaiters)
	case s.MaxMemory < 0:
		return fmt.Errorf("vhost: MaxMemory is %d: want at least 1, or 0 for %d", s.MaxMemory, int64(DefaultMaxMemory))
	case s.MaxInFlightBytes != 0 && s.MaxInFlightBytes < nbd.MinInFlightBytes:
		return fmt.Errorf("vhost: MaxInFlightBytes is %d: want at least %d, or 0 for %d", s.MaxInFlightBytes, nbd.MinInFlightBytes, DefaultMaxInFlightBytes)
	case s.FaultTimeout < 0:
		return fmt.Errorf("vhost: FaultTimeout is %v: a timeout is not negative", s.FaultTimeout)
	case s.OpenTimeout < 0:
		return fmt.Errorf("vhost: OpenTimeout is %v: a timeout is not negative", s.OpenTimeout)
	}
	return nil
}

func (s *Server) maxConns() int               { return cmp.Or(s.MaxConns, DefaultMaxConns) }
func (s *Server) queues() int                 { return cmp.Or(s.MaxQueues, DefaultMaxQueues) }
func (s *Server) faultTimeout() time.Duration { return cmp.Or(s.FaultTimeout, DefaultFaultTimeout) }
func (s *Server) openTimeout() time.Duration  { return cmp.Or(s.OpenTimeout, DefaultOpenTimeout) }

// Serve accepts connections from l, a listener on a unix socket, and serves each the
// export of that name. Each connection opens the export, and releases it when it ends.
// Serve returns ErrServerClosed after Shutdown or Close, and another error where l fails.
// It closes l. Several listeners can be served at once, each by its own Serve: the
// protocol has no names, so each export has a socket of its own.
//
// A read-only export takes any number of connections at once. A writable one takes one
// at a time: a file system that two guests mount is lost, and a request that a front end
// has in flight must end before the front end sends it again.
func (s *Server) Serve(l net.Listener, export string) error {
	if err := s.Check(); err != nil {
		l.Close()
		return err
	}
	e := &endpoint{srv: s, export: export}
	return s.conns().Serve(l, s.log(), func(nc net.Conn) error {
		u, ok := nc.(*net.UnixConn)
		if !ok {
			nc.Close()
			return fmt.Errorf("vhost: serve %s on %s: want a unix socket, which can pass file descriptors", export, l.Addr())
		}
		s.start(u, e)
		return nil
	})
}

// endpoint is a listener with what its connections have together.
type endpoint struct {
	srv    *Server
	export string
	open   int          // connections; for functions that conns calls
	mapped atomic.Int64 // bytes of the memory of their guests
}

// conns are the listeners and the open connections.
func (s *Server) conns() *lifecycle.Lifecycle[*conn] {
	s.once.Do(func() {
		s.life = lifecycle.New[*conn]("vhost", ErrServerClosed)
		s.mu.writers = make(map[string]chan struct{})
		s.waiters.limit = int32(runtime.GOMAXPROCS(0)) - 1
	})
	return s.life
}

// start serves nc on a goroutine, or closes it where MaxConns are open.
func (s *Server) start(nc *net.UnixConn, e *endpoint) {
	c := newConn(s, nc, e)
	limit := s.maxConns()
	ctx, err := s.conns().Add(c, func(int) error {
		if e.open >= limit {
			return errTooMany
		}
		e.open++
		s.past.Accepted++
		return nil
	})
	if err != nil {
		nc.Close()
		if err == errTooMany {
			s.lines.refused.Log(s.log(), slog.LevelWarn, "connection refused: too many connections are open", "export", e.export, "max_conns", limit)
		}
		return
	}
	go func() {
		defer s.conns().Remove(c, func(int) {
			e.open--
			s.past.add(c.counts.load())
		})
		c.serve(ctx)
	}()
}

// errTooMany refuses a connection.
var errTooMany = errors.New("too many connections")

// open opens an export for a connection. The caller calls release.
func (s *Server) open(ctx context.Context, name string) (*nbd.Export, func(), error) {
	opening, cancel := context.WithTimeout(ctx, s.faultTimeout())
	defer cancel()
	e, release, err := s.Exports.Open(opening, name, nbd.ClientInfo{})
	if err != nil {
		return nil, nil, err
	}
	if release == nil {
		release = func() {}
	}
	if len(e.Clients) > 0 {
		release()
		return nil, nil, fmt.Errorf("it is for clients with a certificate, which a virtual machine does not have: %w", nbd.ErrDenied)
	}
	if writable(e) == nil {
		return e, release, nil
	}
	if err := s.lock(ctx, e.Name); err != nil {
		release()
		return nil, nil, err
	}
	return e, func() { release(); s.unlock(e.Name) }, nil
}

// writable returns the device to write to, nil on a read-only export.
func writable(e *nbd.Export) blockmap.WritableDevice {
	if e.ReadOnly {
		return nil
	}
	w, _ := e.Device.(blockmap.WritableDevice)
	return w
}

// lock waits until no connection uses the writable export, for at most OpenTimeout.
func (s *Server) lock(ctx context.Context, name string) error {
	timeout := time.NewTimer(s.openTimeout())
	defer timeout.Stop()
	for {
		s.mu.Lock()
		used := s.mu.writers[name]
		if used == nil {
			s.mu.writers[name] = make(chan struct{})
		}
		s.mu.Unlock()
		if used == nil {
			return nil
		}
		select {
		case <-used:
		case <-timeout.C:
			return errors.New("it is writable, and another virtual machine uses it: wait for that to end, or serve it read-only")
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (s *Server) unlock(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.mu.writers[name])
	delete(s.mu.writers, name)
}

// mapMemory takes n bytes of addresses, negative to give them back. It fails where the
// guests have too much memory together.
func (e *endpoint) mapMemory(n int64) error {
	here, all := e.mapped.Add(n), e.srv.mapped.Add(n)
	if n < 0 || here <= maxEndpointMapped && all <= maxMapped {
		return nil
	}
	e.mapped.Add(-n)
	e.srv.mapped.Add(-n)
	return fmt.Errorf("the guests of this socket have %d bytes of memory, of at most %d, and those of all sockets %d, of at most %d",
		here, int64(maxEndpointMapped), all, int64(maxMapped))
}

// Shutdown stops accepting, completes the requests in flight of every connection, and
// closes it. A front end that connects again, to a later process, goes on where it was.
// When ctx ends first, Shutdown closes the rest as Close does, and returns the cause.
// When it returns, all goroutines of the server have ended, except those that Close
// leaves behind.
func (s *Server) Shutdown(ctx context.Context) error { return s.conns().Shutdown(ctx) }

// Close closes every listener and connection at once, cancels their requests, and waits
// for their goroutines for up to a second. It fails where a device or Exports does not
// return once its ctx has ended: such a call is left behind, with the goroutine of its
// connection.
func (s *Server) Close() error { return s.conns().Close() }

func (s *Server) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}
