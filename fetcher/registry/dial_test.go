package registry

import (
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// counting is a listener that counts and holds connections.
func counting(t *testing.T) (addr string, conns *atomic.Int64, open func() int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conns = new(atomic.Int64)
	var alive atomic.Int64
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			alive.Add(1)
			conns.Add(1)
			go func() {
				c.Read(make([]byte, 1)) // until the other side closes
				c.Close()
				alive.Add(-1)
			}()
		}
	}()
	t.Cleanup(func() { l.Close() })
	return l.Addr().String(), conns, func() int { return int(alive.Load()) }
}

// eventually waits until ok, for a minute at most.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not within a minute: ", what)
		}
	}
}

// The first connection makes the client open spare ones, which it uses next. It makes
// later ones as needed. It closes unused ones when it is closed.
func TestSpareConnections(t *testing.T) {
	addr, conns, open := counting(t)
	d := newDialer(net.Dialer{Timeout: time.Minute})
	dial := func() net.Conn {
		c, err := d.dial(t.Context(), "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	first := dial()
	defer first.Close()
	eventually(t, "spare connections", func() bool { return conns.Load() == 1+spareConns && len(d.spares[addr]) == spareConns })
	second := dial()
	defer second.Close()
	if n := conns.Load(); n != 1+spareConns {
		t.Errorf("%d connections: the second connection was not a spare one", n)
	}
	for range spareConns {
		defer dial().Close()
	}
	eventually(t, "one more connection", func() bool { return conns.Load() == 2+spareConns })

	other, otherConns, otherOpen := counting(t)
	c, err := d.dial(t.Context(), "tcp", other)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "spare connections", func() bool { return otherConns.Load() == 1+spareConns && len(d.spares[other]) == spareConns })
	d.close()
	eventually(t, "spare connections closed", func() bool { return otherOpen() == 1 })
	c.Close()
	if n := open(); n != 2+spareConns {
		t.Errorf("%d connections are open: Close has closed connections in use", n)
	}
}

// A host that does not answer fails in the same way as without spare connections.
func TestSpareConnectionsToNobody(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	d := newDialer(net.Dialer{Timeout: time.Minute})
	for range 3 {
		if _, err := d.dial(t.Context(), "tcp", l.Addr().String()); err == nil {
			t.Error("a connection to nobody")
		}
	}
	d.close()
}
