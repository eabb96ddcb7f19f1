package zone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// transport carries the gossip of memberlist over the port that a member listens on.
// Packets are encrypted by memberlist. Streams go over mutual TLS, unless the zone has none.
type transport struct {
	udp         *net.UDPConn
	at          netip.AddrPort      // that peers reach this member at
	credentials func() *Credentials // nil: no TLS

	packets chan *memberlist.Packet
	streams chan net.Conn
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	// lost says which peers cannot be reached; nil: all can. Tests set it before the start.
	lost func(addr string) bool
}

func newTransport(udp *net.UDPConn, at netip.AddrPort, credentials func() *Credentials) *transport {
	t := &transport{udp: udp, at: at, credentials: credentials, packets: make(chan *memberlist.Packet), streams: make(chan net.Conn)}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	return t
}

func (t *transport) start() { t.wg.Go(t.receive) }

// receive takes packets.
func (t *transport) receive() {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := t.udp.ReadFrom(buf)
		at := time.Now()
		if err != nil {
			if t.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			continue // an answer of a port that nobody listens on
		}
		if n == 0 || t.isLost(from.String()) {
			continue
		}
		p := &memberlist.Packet{Buf: append([]byte(nil), buf[:n]...), From: from, Timestamp: at}
		select {
		case t.packets <- p:
		case <-t.ctx.Done():
			return
		}
	}
}

func (t *transport) isLost(addr string) bool { return t.lost != nil && t.lost(addr) }

// stream is a connection that memberlist has. It says when it is closed.
type stream struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (s *stream) Close() error {
	s.once.Do(func() { close(s.closed) })
	return s.Conn.Close()
}

// take gives a connection of a peer to memberlist, and returns when it is closed.
func (t *transport) take(c net.Conn) {
	defer c.Close()
	if t.isLost(c.RemoteAddr().String()) {
		return
	}
	s := &stream{Conn: c, closed: make(chan struct{})}
	select {
	case t.streams <- s:
	case <-t.ctx.Done():
		return
	}
	select {
	case <-s.closed:
	case <-t.ctx.Done():
	}
}

// FinalAdvertiseAddr implements memberlist.Transport.
func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return t.at.Addr().AsSlice(), int(t.at.Port()), nil
}

// WriteTo implements memberlist.Transport.
func (t *transport) WriteTo(b []byte, addr string) (time.Time, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return time.Time{}, err
	}
	if t.credentials == nil && !to.Addr().IsLoopback() {
		return time.Time{}, errExposed
	}
	if t.isLost(addr) {
		return time.Now(), nil
	}
	_, err = t.udp.WriteToUDPAddrPort(b, to)
	return time.Now(), err
}

// WriteToAddress implements memberlist.NodeAwareTransport.
func (t *transport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, a.Addr)
}

// PacketCh implements memberlist.Transport.
func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// StreamCh implements memberlist.Transport.
func (t *transport) StreamCh() <-chan net.Conn { return t.streams }

// DialTimeout implements memberlist.Transport.
func (t *transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return t.DialAddressTimeout(memberlist.Address{Addr: addr}, timeout)
}

// errExposed says that an address is not one of this machine.
var errExposed = errors.New("without TLS, all members of a zone have loopback addresses: pass --zone-cert, --zone-key and --zone-ca")

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (t *transport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	if t.isLost(a.Addr) {
		return nil, fmt.Errorf("connect to %s: %w", a.Addr, context.DeadlineExceeded)
	}
	ctx, cancel := context.WithTimeout(t.ctx, timeout)
	defer cancel()
	if t.credentials == nil {
		if to, err := netip.ParseAddrPort(a.Addr); err != nil || !to.Addr().IsLoopback() {
			return nil, errExposed
		}
		return new(net.Dialer).DialContext(ctx, "tcp", a.Addr)
	}
	config := t.credentials().toPeer(a.Name)
	config.NextProtos = []string{gossipProtocol}
	d := tls.Dialer{Config: config}
	c, err := d.DialContext(ctx, "tcp", a.Addr)
	if err != nil {
		return nil, err
	}
	if c.(*tls.Conn).ConnectionState().NegotiatedProtocol != gossipProtocol {
		c.Close()
		return nil, fmt.Errorf("%s is not a member of a zone", a.Addr)
	}
	return c, nil
}

// Shutdown implements memberlist.Transport.
func (t *transport) Shutdown() error {
	t.cancel()
	err := t.udp.Close()
	t.wg.Wait()
	return err
}
