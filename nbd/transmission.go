package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
)

// errEnded is the cause of a session whose ServeTransmission was cancelled.
var errEnded = errors.New("nbd: the caller has ended the session")

// ServeTransmission serves e to the client at the other end of nc, without a handshake:
// the client begins with transmission. It is for clients that learn by other means what
// a handshake would tell them, which [Export.Transmission] returns. The Linux kernel is
// one: it takes one end of a socket pair for each connection of a device. The server
// sends simple replies, the only ones that the kernel takes, and offers no metadata
// contexts and no TLS.
//
// The connection counts like those of Serve: it has the same limits, is in Stats, and
// Shutdown and Close end it. The server does not use Exports and TLSFunc for it. It
// serves a TCP or unix socket of package net without copies, any other net.Conn with
// copies.
//
// ServeTransmission closes nc, and returns when nothing of the session is left. It
// returns
//
//   - nil after the client's DISC, once all earlier requests are answered,
//   - io.EOF where the client closed its end without DISC,
//   - ErrServerClosed where the server was shut down or closed,
//   - the cause of ctx where ctx ended, which cancels the requests in flight,
//   - otherwise the error that broke the session.
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
