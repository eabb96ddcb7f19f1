package registry

import (
	"context"
	"net"
	"sync"
	"time"
)

// dialer makes connections, and to an address that it has not seen before some
// more than it is asked for. A start asks for one manifest and then for several
// things at once: those find the handshake done that would have cost a round
// trip. A spare connection that nobody takes is closed soon.
type dialer struct {
	net.Dialer

	mu     sync.Mutex
	closed bool
	spares map[string]chan net.Conn // those that were made and not taken
	all    sync.WaitGroup
	end    context.Context
	cancel context.CancelFunc
}

const (
	spareConns = 2
	spareTime  = 5 * time.Second
	// What registries redirect to has no bound of its own.
	maxSpareAddrs = 1 << 10
)

func newDialer(d net.Dialer) *dialer {
	x := &dialer{Dialer: d, spares: make(map[string]chan net.Conn)}
	x.end, x.cancel = context.WithCancel(context.Background())
	return x
}

// dial is http.Transport's DialContext.
func (d *dialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
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

// spare makes one connection, and sees to it that one is closed if not all are
// taken.
func (d *dialer) spare(network, addr string, spares chan net.Conn) {
	ctx, cancel := context.WithTimeout(d.end, d.Timeout+spareTime)
	defer cancel()
	c, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return // who needs one will see why
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
