package registry

import (
	"context"
	"net"
	"sync"
	"time"
)

// dialer makes connections. The first time that it connects to an address, it makes some
// spare connections too. A start asks for one manifest and then for several things at once:
// these requests then need not wait for a handshake. An unused spare connection is closed
// after spareTime.
type dialer struct {
	net.Dialer

	mu     sync.Mutex
	closed bool
	spares map[string]chan net.Conn // spare connections by address
	inside map[string]bool          // the addresses that have led to this machine
	all    sync.WaitGroup
	end    context.Context
	cancel context.CancelFunc
}

const (
	spareConns = 2
	spareTime  = 5 * time.Second
	// The number of hosts that registries redirect to is not limited otherwise.
	maxSpareAddrs = 1 << 10
)

func newDialer(d net.Dialer) *dialer {
	x := &dialer{Dialer: d, spares: make(map[string]chan net.Conn), inside: make(map[string]bool)}
	x.end, x.cancel = context.WithCancel(context.Background())
	return x
}

// dial is http.Transport's DialContext.
func (d *dialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	c, err := d.take(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return d.checkInside(ctx, c, addr)
}

// take takes a spare connection, or makes one.
func (d *dialer) take(ctx context.Context, network, addr string) (net.Conn, error) {
	d.mu.Lock()
	spares, known := d.spares[addr]
	if !known && !d.closed && len(d.spares) < maxSpareAddrs {
		spares = make(chan net.Conn, spareConns)
		d.spares[addr] = spares
		for range spareConns {
			d.all.Go(func() { d.spare(network, addr, spares) })
		}
	}
	d.mu.Unlock()
	if known {
		select {
		case c := <-spares:
			return c, nil
		default:
		}
	}
	return d.DialContext(ctx, network, addr)
}

// spare makes a connection, and closes one after spareTime if not all were taken.
func (d *dialer) spare(network, addr string, spares chan net.Conn) {
	ctx, cancel := context.WithTimeout(d.end, d.Timeout+spareTime)
	defer cancel()
	c, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return // a caller that needs a connection gets the error
	}
	spares <- c
	t := time.NewTimer(spareTime)
	defer t.Stop()
	select {
	case <-t.C:
	case <-d.end.Done():
	}
	select {
	case c := <-spares:
		c.Close()
	default:
	}
}

// close closes the spare connections.
func (d *dialer) close() {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.cancel()
	d.all.Wait()
}
