package nbd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// conn is one connection from accept to close: first a handshake, then a
// session. One goroutine of its own carries it through both.
type conn struct {
	srv    *Server
	nc     net.Conn
	counts counts

	mu struct {
		sync.Mutex
		drain    bool                    // the server shuts down
		abort    context.CancelCauseFunc // of the handshake, nil in transmission
		deadline time.Time               // of the handshake, zero in transmission
	}
}

// counts are the connection's share of Stats.
type counts struct{ hits, misses, others, errors, sent, repaired atomic.Int64 }

func (n *counts) load() Stats {
	return Stats{
		Hits:     n.hits.Load(),
		Misses:   n.misses.Load(),
		Others:   n.others.Load(),
		Errors:   n.errors.Load(),
		Sent:     n.sent.Load(),
		Repaired: n.repaired.Load(),
	}
}

// serve carries the connection of a listener through both phases.
func (c *conn) serve(ctx context.Context) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer c.nc.Close()
	log := c.srv.log().With("client", addrOf(c.nc))

	h := &handshake{c: c, nc: c.nc, log: log, client: ClientInfo{Addr: c.nc.RemoteAddr()}}
	defer h.drop()
	if err := c.handshake(ctx, h); err != nil {
		switch {
		case errors.Is(err, errDone), c.draining():
		case errors.Is(err, os.ErrDeadlineExceeded):
			h.logEnd("the handshake took too long", "handshake_timeout", c.srv.handshakeTimeout())
		default:
			h.logEnd("the handshake failed", "err", err)
		}
		if tc, ok := h.nc.(io.Closer); ok && h.client.TLS {
			tc.Close() // says goodbye; closes c.nc too
		}
		return
	}
	t := terms{export: h.export, structured: h.structured}
	if h.contextsName == h.exportName {
		t.contexts = h.contexts
	}
	_ = c.transmit(ctx, h.nc, t, log.With("export", h.export.Name), cancel)
}

// transmit runs the transmission phase over nc. It logs how the session ends, and
// returns that error.
func (c *conn) transmit(ctx context.Context, nc net.Conn, t terms, log *slog.Logger, cancel context.CancelCauseFunc) error {
	log.Debug("session begins", "structured", t.structured, "tls", nc != c.nc)
	err := newSession(c, nc, t, log, cancel).run(ctx)
	cause := context.Cause(ctx)
	switch {
	case err == nil, errors.Is(cause, ErrServerClosed), errors.Is(cause, errEnded):
		log.Debug("session ends")
	case gone(err):
		log.Debug("session ends", "err", err)
	case err == errIdle:
		log.Info("session ends", "err", err, "idle_timeout", c.srv.IdleTimeout)
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.srv.lines.sessions.Log(log, slog.LevelWarn, "session ends: the client takes no byte of its replies", "write_timeout", c.srv.WriteTimeout)
	default:
		c.srv.lines.sessions.Log(log, slog.LevelWarn, "session fails", "err", err)
	}
	return err
}

// handshake runs h within its deadline. A shutdown cancels it: a client loses nothing
// with an unfinished handshake.
func (c *conn) handshake(ctx context.Context, h *handshake) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c.mu.Lock()
	c.mu.abort = cancel
	drain := c.mu.drain
	c.mu.Unlock()
	if drain {
		return ErrServerClosed
	}
	c.setHandshakeDeadline(time.Now().Add(c.srv.handshakeTimeout()))
	err := h.run(ctx)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.mu.abort = nil
	c.mu.Unlock()
	c.setHandshakeDeadline(time.Time{})
	return nil
}

// gone reports whether err means only that the peer has gone.
func gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNABORTED)
}

// setHandshakeDeadline bounds the next reads and writes of the connection; the zero
// time lifts the bound. Once the server shuts down, reads end at once.
func (c *conn) setHandshakeDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.deadline = t
	c.nc.SetDeadline(t)
	if c.mu.drain {
		c.nc.SetReadDeadline(longAgo)
	}
}

// setReadDeadline bounds the next read, unless the server shuts down.
func (c *conn) setReadDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.mu.drain {
		c.nc.SetReadDeadline(t)
	}
}

// extendHandshake moves the deadline by d, which the server took and not the client.
func (c *conn) extendHandshake(d time.Duration) {
	c.mu.Lock()
	t := c.mu.deadline.Add(d)
	c.mu.Unlock()
	c.setHandshakeDeadline(t)
}

// Drain makes the connection answer its requests and end. The deadline wakes its
// goroutine.
func (c *conn) Drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.drain = true
	c.nc.SetReadDeadline(longAgo)
	if c.mu.abort != nil {
		c.mu.abort(ErrServerClosed)
	}
}

// Abort closes the connection.
func (c *conn) Abort() { c.nc.Close() }

func (c *conn) draining() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.drain
}

// longAgo as a deadline ends every wait.
var longAgo = time.Unix(1, 0)
