package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
)

// errEnded is why a session ends whose ServeTransmission is cancelled.
var errEnded = errors.New("nbd: the caller has ended the session")

// ServeTransmission serves e to the client at the other end of nc, from the
// transmission phase on: without a handshake. It is for clients that are told by
// other means what a handshake would tell them, which [Export.Transmission] returns.
// The Linux kernel is one: it takes one end of a socket pair for each connection of a
// device. Replies are simple ones, as the kernel wants them; there is no TLS and no
// metadata context.
//
// The connection is one of the server's like those that come by Serve: with the same
// limits, in Stats, ended by Shutdown and Close. Exports and TLSFunc are not used. A
// socket of package net is served without copies, any other net.Conn with them.
//
// ServeTransmission closes nc, and returns when nothing of the session is left: nil
// after the client's DISC, whose earlier requests are all answered; io.EOF where the
// client closed its end without one; ErrServerClosed where the server shut down; the
// cause of ctx where ctx ended, which cancels the requests in flight; or what has gone
// wrong.
func (s *Server) ServeTransmission(ctx context.Context, nc net.Conn, e *Export) error {
	defer nc.Close()
	if err := s.Check(); err != nil {
		return err
	}
	c := &conn{srv: s, nc: nc}
	conns, err := s.register(c)
	if err != nil {
		return err
	}
	defer s.ended(c)
	session, cancel := context.WithCancelCause(conns)
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() {
		cancel(fmt.Errorf("%w: %w", errEnded, context.Cause(ctx)))
		nc.Close() // the reader has nothing to wait for
	})()
	log := s.log().With("client", addrOf(nc), "export", e.Name)
	err = c.transmit(session, nc, terms{export: e}, log, cancel)
	switch {
	case errors.Is(context.Cause(session), errEnded):
		return context.Cause(ctx)
	case errors.Is(context.Cause(session), ErrServerClosed), err == nil && c.draining():
		return ErrServerClosed
	}
	return err
}
