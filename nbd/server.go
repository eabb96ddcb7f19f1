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

	"thaw/nbd/internal/lifecycle"
	"thaw/nbd/internal/lines"
)

// Defaults of the limits of a [Server].
const (
	DefaultMaxConns         = 1024
	DefaultMaxWaiters       = 128
	DefaultMaxInFlightBytes = 64 << 20
	DefaultHandshakeTimeout = 10 * time.Second
	DefaultFaultTimeout     = time.Minute
)

// MinInFlightBytes is the least MaxInFlightBytes. Below it most clients would have one
// request in flight at a time.
const MinInFlightBytes = 128 << 10

// ErrServerClosed is what Serve returns after Shutdown or Close.
var ErrServerClosed = errors.New("nbd: server closed")

// Server serves exports to NBD clients. Set its fields before the first Serve. The
// zero value of each field except Exports is useful. A Server is used once: after
// Shutdown or Close it stays closed.
//
// The cost of a client is bounded. Its connection takes one goroutine and about
// 200 KiB, or 450 KiB if it may write. While its requests wait for the device, or for the client to take their
// replies, they take up to MaxWaiters goroutines, and MaxInFlightBytes of payload and
// pinned views. At a limit the server stops reading from the connection.
//
// A client may pause for as long as it likes: see WriteTimeout. It then pins nothing,
// since the server copies replies that have waited for their client for half a second:
// up to MaxInFlightBytes of them, and those being written, which are up to 256 KiB of
// small replies or one large one. TCP finds peers that are dead and not only silent.
// Keepalive probes end an idle connection after a minute and a half. A connection with
// data under way ends at the kernel's limit of retransmissions
// (net.ipv4.tcp_retries2, about 15 minutes). TCP_USER_TIMEOUT is not set, since it
// takes a client that pauses for dead.
type Server struct {
	Exports Exports
	Log     *slog.Logger // nil: discarded

	// TLSFunc lets clients upgrade with STARTTLS. The server calls it for each
	// upgrade, several at once, so that the next client sees renewed
	// certificates. The result has at least a certificate, and must not change
	// afterwards. Where the function or its result is nil, the server refuses
	// TLS. It refuses versions below 1.3 in any case. ClientCAs and ClientAuth
	// ask clients for certificates, whose names reach Exports in ClientInfo.
	TLSFunc    func() *tls.Config
	RequireTLS bool // refuse to talk about exports before STARTTLS

	// MaxConns is how many connections are open at a time; further ones are
	// closed as they arrive. 0: DefaultMaxConns.
	MaxConns int
	// HandshakeTimeout is for the client's part of the handshake. 0:
	// DefaultHandshakeTimeout.
	HandshakeTimeout time.Duration
	// FaultTimeout is for a request that waits for the device, and for a call
	// of Exports. 0: DefaultFaultTimeout.
	FaultTimeout time.Duration
	// WriteTimeout ends a session whose client has taken no byte of its replies
	// for so long, and up to half a second more (see above). 0: no bound, as in
	// other NBD servers.
	WriteTimeout time.Duration
	// IdleTimeout ends a session without requests in flight whose client has
	// sent no byte for so long. 0: no bound.
	IdleTimeout time.Duration

	// MaxWaiters is how many requests of one connection may wait for the device
	// or for the client to take their replies. 0: DefaultMaxWaiters.
	MaxWaiters int
	// MaxInFlightBytes is how many bytes they may have, or pin. One request of
	// any size is always let in. 0: DefaultMaxInFlightBytes; at least
	// MinInFlightBytes.
	MaxInFlightBytes int64
	// Admission bounds the requests of all connections together, with those of
	// other transports. Nil: no such bound.
	Admission *Admission

	bufs    buffers
	clients atomic.Int32 // connections that are open, see pace
	lines   struct{ refused, handshakes, exports, sessions, requests, damaged lines.Limiter }

	once sync.Once
	life *lifecycle.Lifecycle[*conn] // see conns
	past Stats                       // of what is gone; for functions that conns calls
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
	Repaired int64 // reads from damaged cache files, done again
}

func (s *Stats) add(o Stats) {
	s.Conns += o.Conns
	s.Accepted += o.Accepted
	s.Hits += o.Hits
	s.Misses += o.Misses
	s.Others += o.Others
	s.Errors += o.Errors
	s.Sent += o.Sent
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
// and ServeTransmission check too.
func (s *Server) Check() error {
	switch {
	case s.MaxConns < 0:
		return fmt.Errorf("nbd: MaxConns is %d: want at least 1, or 0 for %d", s.MaxConns, DefaultMaxConns)
	case s.MaxWaiters < 0:
		return fmt.Errorf("nbd: MaxWaiters is %d: want at least 1, or 0 for %d", s.MaxWaiters, DefaultMaxWaiters)
	case s.MaxInFlightBytes != 0 && s.MaxInFlightBytes < MinInFlightBytes:
		return fmt.Errorf("nbd: MaxInFlightBytes is %d: want at least %d, or 0 for %d", s.MaxInFlightBytes, MinInFlightBytes, DefaultMaxInFlightBytes)
	}
	for _, f := range []struct {
		name string
		d    time.Duration
	}{
		{"HandshakeTimeout", s.HandshakeTimeout}, {"FaultTimeout", s.FaultTimeout},
		{"WriteTimeout", s.WriteTimeout}, {"IdleTimeout", s.IdleTimeout},
	} {
		if f.d < 0 {
			return fmt.Errorf("nbd: %s is %v: a timeout is not negative", f.name, f.d)
		}
	}
	return nil
}

func (s *Server) maxConns() int { return cmp.Or(s.MaxConns, DefaultMaxConns) }

func (s *Server) handshakeTimeout() time.Duration {
	return cmp.Or(s.HandshakeTimeout, DefaultHandshakeTimeout)
}

// Serve accepts connections from l until Shutdown or Close and then returns
// ErrServerClosed; it returns another error where l fails. It closes l. Several
// listeners can be served at once, each by its own Serve.
func (s *Server) Serve(l net.Listener) error {
	if err := s.Check(); err != nil {
		l.Close()
		return err
	}
	return s.conns().Serve(l, s.log(), s.start)
}

// conns are the listeners and the open connections.
func (s *Server) conns() *lifecycle.Lifecycle[*conn] {
	s.once.Do(func() { s.life = lifecycle.New[*conn]("nbd", ErrServerClosed) })
	return s.life
}

// Probes of a TCP connection on which nothing happens.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 6}

// start serves nc on a goroutine, or closes it where MaxConns are open.
func (s *Server) start(nc net.Conn) error {
	if t, ok := nc.(*net.TCPConn); ok {
		_ = t.SetKeepAliveConfig(keepAlive)
	}
	c := &conn{srv: s, nc: nc}
	ctx, err := s.register(c)
	if err != nil {
		nc.Close()
		if err != ErrServerClosed {
			s.lines.refused.Log(s.log(), slog.LevelWarn, "connection refused: too many connections are open", "client", addrOf(nc), "max_conns", s.maxConns())
		}
		return nil
	}
	go func() {
		defer s.ended(c)
		c.serve(ctx)
	}()
	return nil
}

// register counts c as open, and returns the context of all connections.
func (s *Server) register(c *conn) (context.Context, error) {
	return s.conns().Add(c, func(open int) error {
		if limit := s.maxConns(); open >= limit {
			return fmt.Errorf("nbd: %d connections are open, which is MaxConns", limit)
		}
		s.past.Accepted++
		s.clients.Store(int32(open) + 1)
		return nil
	})
}

// ended counts c as closed.
func (s *Server) ended(c *conn) {
	s.conns().Remove(c, func(open int) {
		s.past.add(c.counts.load())
		s.clients.Store(int32(open))
	})
}

// Shutdown stops accepting, answers the requests in flight of every connection, and
// closes it. It answers requests that arrive meanwhile with ESHUTDOWN, and cancels
// handshakes. When ctx ends first, Shutdown closes the rest as Close does, and returns
// the cause. When it returns, all goroutines of the server have ended, except those
// that Close leaves behind.
func (s *Server) Shutdown(ctx context.Context) error { return s.conns().Shutdown(ctx) }

// Close closes every listener and connection at once, cancels their requests, and waits
// for their goroutines for up to a second. It fails where a device or Exports does not
// return once its ctx has ended: such a call is left behind, with the goroutine of its
// connection.
func (s *Server) Close() error { return s.conns().Close() }

// tls is the configuration for the next upgrade, nil where there is none.
func (s *Server) tls() *tls.Config {
	if s.TLSFunc == nil {
		return nil
	}
	return s.TLSFunc()
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
