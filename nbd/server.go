package nbd

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Defaults of the limits of a [Server].
const (
	DefaultMaxConns         = 1024
	DefaultMaxWaiters       = 128
	DefaultMaxInFlightBytes = 64 << 20
	DefaultHandshakeTimeout = 10 * time.Second
	DefaultWriteTimeout     = 30 * time.Second
	DefaultFaultTimeout     = time.Minute
)

// ErrServerClosed is what Serve returns after Shutdown or Close.
var ErrServerClosed = errors.New("nbd: server closed")

// Server serves exports to NBD clients. Set its fields before the first Serve;
// the zero value of each but Exports is useful. A Server is used once: after
// Shutdown or Close it stays closed.
//
// What a client can cost is bounded: its connection takes one goroutine and
// some 200 KiB, plus MaxWaiters goroutines and MaxInFlightBytes of payload and
// pinned views while its requests wait for the device or for the client to
// take the replies. At a bound the server stops reading from the connection.
type Server struct {
	Exports Exports
	Log     *slog.Logger // nil: discarded

	// TLS, with at least a certificate, lets clients upgrade with STARTTLS.
	// Versions below 1.3 are refused whatever it says. ClientCAs and
	// ClientAuth ask for certificates, the names of which reach Exports in
	// ClientInfo.
	TLS        *tls.Config
	TLSFunc    func() *tls.Config // if not nil, asked at each STARTTLS in place of TLS, so that certificates can be renewed
	RequireTLS bool               // refuse to talk about exports before STARTTLS

	MaxConns         int           // connections at a time, 0: DefaultMaxConns; more are closed as they come
	HandshakeTimeout time.Duration // for the client's part of the handshake, 0: DefaultHandshakeTimeout
	WriteTimeout     time.Duration // without the client taking a byte of what it asked for, 0: DefaultWriteTimeout
	IdleTimeout      time.Duration // without a request from the client; 0: none
	FaultTimeout     time.Duration // for a request that waits for the device, and a call of Exports, 0: DefaultFaultTimeout

	MaxWaiters       int   // requests of one connection off the hit path, 0: DefaultMaxWaiters
	MaxInFlightBytes int64 // their bytes, 0: DefaultMaxInFlightBytes; one request is always let in

	bufs    buffers
	clients atomic.Int32   // connections in mu.conns, see pace
	wg      sync.WaitGroup // connections

	mu struct {
		sync.Mutex
		ctx       context.Context // of every connection; made with cancel by init
		cancel    context.CancelCauseFunc
		listeners map[net.Listener]struct{}
		conns     map[*conn]struct{}
		closing   bool // Shutdown or Close was called
		full      bool // at MaxConns, and said so
		past      Stats
	}
}

// Stats are counts since the server was made.
type Stats struct {
	Conns    int64 // connections open now
	Accepted int64 // connections accepted
	Hits     int64 // reads answered at once
	Misses   int64 // reads that waited for the device
	Others   int64 // writes, trims and all that is not a read
	Errors   int64 // requests answered with an error
	Sent     int64 // bytes written to clients in transmission
}

func (s *Stats) add(o Stats) {
	s.Conns += o.Conns
	s.Accepted += o.Accepted
	s.Hits += o.Hits
	s.Misses += o.Misses
	s.Others += o.Others
	s.Errors += o.Errors
	s.Sent += o.Sent
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

// Serve accepts connections from l until Shutdown or Close and then returns
// ErrServerClosed; it returns another error where l fails. It closes l. Several
// listeners can be served at once, each by its own Serve.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close()
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
			// Out of descriptors, or the peer gone already: others
			// may be luckier in a moment.
			if t, ok := err.(interface{ Temporary() bool }); ok && t.Temporary() {
				pause = min(max(2*pause, 5*time.Millisecond), time.Second)
				s.log().Warn("accept", "addr", l.Addr(), "err", err, "again in", pause)
				select {
				case <-time.After(pause):
					continue
				case <-s.context().Done():
					return ErrServerClosed
				}
			}
			return fmt.Errorf("nbd: accept on %s: %w", l.Addr(), err)
		}
		pause = 0
		s.start(nc)
	}
}

// start gives nc its goroutine, or closes it where there is no room.
func (s *Server) start(nc net.Conn) {
	c := &conn{srv: s, nc: nc}
	s.mu.Lock()
	room := len(s.mu.conns) < cmp.Or(s.MaxConns, DefaultMaxConns)
	tell := !room && !s.mu.full
	s.mu.full = !room
	if s.mu.closing || !room {
		s.mu.Unlock()
		nc.Close()
		if tell {
			s.log().Warn("connection refused: too many", "client", addrOf(nc), "max", cmp.Or(s.MaxConns, DefaultMaxConns))
		}
		return
	}
	s.mu.past.Accepted++
	s.mu.conns[c] = struct{}{}
	s.clients.Store(int32(len(s.mu.conns)))
	ctx := s.mu.ctx
	s.wg.Add(1)
	s.mu.Unlock()

	go func() {
		defer s.wg.Done()
		c.serve(ctx)
		s.mu.Lock()
		s.mu.past.add(c.counts.load())
		delete(s.mu.conns, c)
		s.clients.Store(int32(len(s.mu.conns)))
		s.mu.Unlock()
	}()
}

// Shutdown stops accepting, lets every connection answer what it has been
// asked, and closes it. Requests that arrive meanwhile are answered with
// ESHUTDOWN. When ctx ends first the rest is closed as by Close, and Shutdown
// returns the cause. All goroutines of the server are gone when it returns.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.close()
	for c := range s.mu.conns {
		c.drain()
	}
	s.mu.Unlock()

	done := make(chan struct{})
	go func() {
		s.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		s.Close()
		return nil
	case <-ctx.Done():
		s.Close()
		<-done
		return context.Cause(ctx)
	}
}

// Close closes every listener and connection at once and waits for their
// goroutines, which is as long as a device takes to heed its ctx.
func (s *Server) Close() error {
	s.mu.Lock()
	s.close()
	s.mu.cancel(ErrServerClosed)
	for c := range s.mu.conns {
		c.nc.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
	return nil
}

// init makes what the zero value lacks. s.mu is held.
func (s *Server) init() {
	if s.mu.ctx == nil {
		s.mu.ctx, s.mu.cancel = context.WithCancelCause(context.Background())
		s.mu.listeners = make(map[net.Listener]struct{})
		s.mu.conns = make(map[*conn]struct{})
	}
}

// close stops accepting. s.mu is held.
func (s *Server) close() {
	s.init()
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

// addrOf names a client. The peer of a unix socket has no name of its own.
func addrOf(nc net.Conn) string {
	if a := nc.RemoteAddr(); a != nil && a.String() != "" && a.String() != "@" {
		return a.String()
	}
	if a := nc.LocalAddr(); a != nil {
		return a.Network() + ":" + a.String()
	}
	return "?"
}
