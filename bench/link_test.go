package bench

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// wire returns a link to handle, and a function that dials it.
func wire(t *testing.T, rtt time.Duration, rate int64, handle func(net.Conn)) (*Link, func() net.Conn) {
	t.Helper()
	l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	var servers sync.WaitGroup
	k := NewLink(l, LinkOptions{RTT: rtt, Rate: rate, Dial: func(context.Context) (net.Conn, error) {
		a, b := net.Pipe()
		servers.Go(func() {
			defer b.Close()
			handle(b)
		})
		return a, nil
	}})
	t.Cleanup(func() {
		k.Close()
		servers.Wait()
	})
	return k, func() net.Conn {
		a, b := net.Pipe()
		l.conns <- b
		return a
	}
}

type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

func ask(t *testing.T, c net.Conn, n int) time.Duration {
	t.Helper()
	began := time.Now()
	if _, err := c.Write([]byte("?")); err != nil {
		t.Error(err)
	}
	if _, err := io.CopyN(io.Discard, c, int64(n)); err != nil {
		t.Error(err)
	}
	return time.Since(began)
}

// answer sends n bytes for each byte that it receives.
func answer(n int) func(net.Conn) {
	return func(c net.Conn) {
		for b := make([]byte, 1); ; {
			if _, err := io.ReadFull(c, b); err != nil {
				return
			}
			if _, err := c.Write(make([]byte, n)); err != nil {
				return
			}
		}
	}
}

func within(t *testing.T, what string, got, want time.Duration) {
	t.Helper()
	if got < want || got > want+want/50+time.Millisecond {
		t.Errorf("%s took %v, want %v", what, got, want)
	}
}

func TestLinkRoundTrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, dial := wire(t, 20*time.Millisecond, 200e6, answer(1))
		c := dial()
		within(t, "a handshake and a question", ask(t, c, 1), 40*time.Millisecond)
		within(t, "the next question", ask(t, c, 1), 20*time.Millisecond)
		c.Close()
		if err := k.Settle(t.Context()); err != nil {
			t.Error(err)
		}
		if s := k.Stats(); s != (LinkStats{Connections: 1, Up: 2, Down: 2}) {
			t.Errorf("%+v", s)
		}
	})
}

// Ends of headers are counted however a connection's bytes are divided.
func TestLinkCountsRequests(t *testing.T) {
	const two = "GET /v2/ HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nX: \r\r\n\r\n"
	for cut := range len(two) {
		var n atomic.Int64
		h := headers{count: &n}
		h.look([]byte(two[:cut]))
		h.look([]byte(two[cut:]))
		if n.Load() != 2 {
			t.Errorf("%d requests when cut after %d bytes", n.Load(), cut)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		k, dial := wire(t, time.Millisecond, 1e9, answer(1))
		c := dial()
		go io.Copy(io.Discard, c)
		c.Write([]byte(two))
		time.Sleep(time.Second)
		c.Close()
		synctest.Wait()
		if s := k.Stats().Sub(LinkStats{Requests: 1, Up: 10}); s.Requests != 1 || s.Up != int64(len(two)-10) {
			t.Errorf("%+v", s)
		}
	})
}

// All connections together get the rate of the link, and its latency overlaps
// with bytes in flight.
func TestLinkRate(t *testing.T) {
	const each = 5 << 20
	synctest.Test(t, func(t *testing.T) {
		_, dial := wire(t, 20*time.Millisecond, 200e6, answer(each))
		began := time.Now()
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() { c := dial(); defer c.Close(); ask(t, c, each) })
		}
		wg.Wait()
		within(t, "20 MiB", time.Since(began), 40*time.Millisecond+time.Duration(4*each*8*int64(time.Second)/200e6))
	})
}

// A client that asks for little does not wait for another client's download.
func TestLinkIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, dial := wire(t, 20*time.Millisecond, 200e6, func(c net.Conn) {
			b := make([]byte, 1)
			if _, err := io.ReadFull(c, b); err == nil && b[0] == '?' {
				c.Write(b)
			} else {
				c.Write(make([]byte, 50<<20))
			}
		})
		bulk := dial()
		defer bulk.Close()
		var wg sync.WaitGroup
		wg.Go(func() { bulk.Write([]byte("!")); io.Copy(io.Discard, bulk) })
		time.Sleep(time.Second)
		c := dial()
		if took := ask(t, c, 1); took > 50*time.Millisecond {
			t.Errorf("a byte took %v beside a download", took)
		}
		c.Close()
		bulk.Close()
		wg.Wait()
	})
}

// Over real sockets, every byte arrives in order, and so does the end of file.
func TestLinkCarries(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var servers sync.WaitGroup
	defer servers.Wait()
	servers.Go(func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		io.Copy(c, c) // until the client has sent all
	})
	k, err := ListenLink(l.Addr().String(), time.Millisecond, 1e9)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	c, err := net.Dial("tcp", k.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sent := make([]byte, 3<<20)
	for i := range sent {
		sent[i] = byte(i * 7 / 3)
	}
	var sender sync.WaitGroup
	sender.Go(func() { c.Write(sent); c.(*net.TCPConn).CloseWrite() })
	got, err := io.ReadAll(c)
	sender.Wait()
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d of %d bytes came back, %v", len(got), len(sent), err)
	}
	if s := k.Stats(); s.Up != int64(len(sent)) || s.Down != int64(len(sent)) {
		t.Errorf("%+v", s)
	}
}

// Whoever has all bytes finds all of them counted.
func TestLinkCountsBeforeBytesArrive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, dial := wire(t, time.Millisecond, 1e9, answer(100<<10))
		c := dial()
		for i := range int64(20) {
			ask(t, c, 100<<10)
			if s := k.Stats(); s.Up != i+1 || s.Down != (i+1)*100<<10 {
				t.Errorf("after %d questions: %+v", i+1, s)
			}
		}
		c.Close()
	})
}

// Settle waits for the connections that are open, and for no longer than it may.
func TestLinkSettles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, dial := wire(t, time.Millisecond, 1e9, answer(1))
		if err := k.Settle(t.Context()); err != nil {
			t.Error(err)
		}
		c := dial()
		ask(t, c, 1)
		began := time.Now()
		if err := k.Settle(t.Context()); err == nil || time.Since(began) != time.Minute {
			t.Errorf("beside an open connection: %v after %v", err, time.Since(began))
		}
		c.Close()
		if err := k.Settle(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// Close ends busy connections, and leaves no goroutine.
func TestLinkClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, dial := wire(t, time.Second, 1e6, answer(10<<20))
		c := dial()
		go func() { c.Write([]byte("?")); io.Copy(io.Discard, c) }()
		time.Sleep(10 * time.Second)
		k.Close()
		synctest.Wait() // the bubble fails if a goroutine is left
		if _, err := c.Write([]byte("?")); err == nil {
			t.Error("the connection is still open")
		}
	})
}
