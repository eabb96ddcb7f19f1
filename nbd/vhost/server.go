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
	"thaw/nbd/internal/lines"
)

// Defaults of the limits of a [Server].
const (
	DefaultMaxConns         = 1024
	DefaultMaxQueues        = 64
	DefaultMaxWaiters       = 128
	DefaultMaxInFlightBytes = 64 << 20
	DefaultMaxMemory        = 1 << 40
	DefaultFaultTimeout     = time.Minute
	DefaultOpenTimeout      = 10 * time.Second
)

// maxMapped bounds the memory of all guests together: a process has 128 TiB of addresses.
const maxMapped = 32 << 40

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

	// MaxConns is how many connections are open at a time; further ones are closed as
	// they arrive. 0: DefaultMaxConns.
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
	sleepers sleepers
	lines    struct{ refused, ends, requests, rings, full, small, resumed lines.Limiter }

	mu struct {
		sync.Mutex
		ctx       context.Context // of every connection; made with cancel by init
		cancel    context.CancelCauseFunc
		listeners map[net.Listener]struct{}
		conns     map[*conn]struct{}
		writers   map[string]chan struct{} // by writable export in use; closed when it is not
		closing   bool                     // Shutdown or Close was called
		gone      chan struct{}            // closed once closing has no connections left
		abandon   time.Time                // when Close gives up waiting for connections
		past      Stats
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
	s.Resumed += o.Resumed
	s.Kicks += o.Kicks
	s.Interrupts += o.Interrupts
	s.Repaired += o.Repaired
}

// Stats returns the counts of all connections, those that are gone included.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.mu.past
	st.Conns = int64(len(s.mu.conns))
	for c := range s.mu.conns {
		st.add(c.counts.load())
	}
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
	defer l.Close()
	if err := s.Check(); err != nil {
		return err
	}
	s.mu.Lock()
	if s.mu.closing {
		s.mu.Unlock()
		return ErrServerClosed
	}
	s.init()
	s.mu.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.mu.listeners, l)
		s.mu.Unlock()
	}()

	var pause time.Duration
	for {
		nc, err := l.Accept()
		if err != nil {
			if s.closed() {
				return ErrServerClosed
			}
			// The process is out of descriptors, or the peer is gone already: the
			// next accept may succeed.
			if t, ok := err.(interface{ Temporary() bool }); ok && t.Temporary() {
				pause = min(max(2*pause, 5*time.Millisecond), time.Second)
				s.log().Warn("cannot accept a connection; trying again", "addr", l.Addr(), "err", err, "pause", pause)
				select {
				case <-time.After(pause):
					continue
				case <-s.context().Done():
					return ErrServerClosed
				}
			}
			return fmt.Errorf("vhost: accept on %s: %w", l.Addr(), err)
		}
		pause = 0
		u, ok := nc.(*net.UnixConn)
		if !ok {
			nc.Close()
			return fmt.Errorf("vhost: serve %s on %s: want a unix socket, which can pass file descriptors", export, l.Addr())
		}
		s.start(u, export)
	}
}

// start serves nc on a goroutine, or closes it where MaxConns are open.
func (s *Server) start(nc *net.UnixConn, export string) {
	c := newConn(s, nc, export)
	ctx, err := s.register(c)
	if err != nil {
		nc.Close()
		if err != ErrServerClosed {
			s.lines.refused.Log(s.log(), slog.LevelWarn, "connection refused: too many connections are open", "export", export, "max_conns", s.maxConns())
		}
		return
	}
	go func() {
		defer s.ended(c)
		c.serve(ctx)
	}()
}

// register counts c as open, and returns the context of all connections.
func (s *Server) register(c *conn) (context.Context, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.init()
	if s.mu.closing {
		return nil, ErrServerClosed
	}
	if limit := s.maxConns(); len(s.mu.conns) >= limit {
		return nil, fmt.Errorf("vhost: %d connections are open, which is MaxConns", limit)
	}
	s.mu.past.Accepted++
	s.mu.conns[c] = struct{}{}
	return s.mu.ctx, nil
}

// ended counts c as closed.
func (s *Server) ended(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.past.add(c.counts.load())
	delete(s.mu.conns, c)
	if s.mu.closing && len(s.mu.conns) == 0 {
		close(s.mu.gone)
	}
}

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
// guests of all connections have too much memory together.
func (s *Server) mapMemory(n int64) error {
	if total := s.mapped.Add(n); n > 0 && total > maxMapped {
		s.mapped.Add(-n)
		return fmt.Errorf("the guests of all connections have %d bytes of memory, of at most %d", total, int64(maxMapped))
	}
	return nil
}

// Shutdown stops accepting, completes the requests in flight of every connection, and
// closes it. A front end that connects again, to a later process, goes on where it was.
// When ctx ends first, Shutdown closes the rest as Close does, and returns the cause.
// When it returns, all goroutines of the server have ended, except those that Close
// leaves behind.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.close()
	for c := range s.mu.conns {
		c.drain()
	}
	s.mu.Unlock()

	select {
	case <-s.mu.gone:
		return s.Close()
	case <-ctx.Done():
		if err := s.Close(); err != nil {
			return errors.Join(context.Cause(ctx), err)
		}
		return context.Cause(ctx)
	}
}

// closeTime is how long Close waits for devices to return once their ctx has ended.
const closeTime = time.Second

// Close closes every listener and connection at once, cancels their requests, and waits
// for their goroutines for up to a second. It fails where a device or Exports does not
// return once its ctx has ended: such a call is left behind, with the goroutine of its
// connection.
func (s *Server) Close() error {
	s.mu.Lock()
	s.close()
	s.mu.cancel(ErrServerClosed)
	for c := range s.mu.conns {
		c.nc.Close()
	}
	if s.mu.abandon.IsZero() {
		s.mu.abandon = time.Now().Add(closeTime)
	}
	t := time.NewTimer(time.Until(s.mu.abandon))
	s.mu.Unlock()
	defer t.Stop()
	select {
	case <-s.mu.gone:
		return nil
	case <-t.C:
	}
	s.mu.Lock()
	n := len(s.mu.conns)
	s.mu.Unlock()
	if n == 0 {
		return nil
	}
	return fmt.Errorf("vhost: %d connections were left behind: their devices have not returned within %v of being cancelled", n, closeTime)
}

// init makes what the zero value lacks. s.mu is held.
func (s *Server) init() {
	if s.mu.ctx == nil {
		s.mu.ctx, s.mu.cancel = context.WithCancelCause(context.Background())
		s.mu.listeners = make(map[net.Listener]struct{})
		s.mu.conns = make(map[*conn]struct{})
		s.mu.writers = make(map[string]chan struct{})
		s.mu.gone = make(chan struct{})
		s.sleepers.limit = int32(runtime.GOMAXPROCS(0)) - 1
	}
}

// close stops accepting. s.mu is held.
func (s *Server) close() {
	s.init()
	if !s.mu.closing && len(s.mu.conns) == 0 {
		close(s.mu.gone)
	}
	s.mu.closing = true
	for l := range s.mu.listeners {
		l.Close()
	}
}

func (s *Server) closed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.closing
}

func (s *Server) context() context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.ctx
}

func (s *Server) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}
