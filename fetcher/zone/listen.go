package zone

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A member listens on one port: on TCP for HTTP and for the streams of memberlist, and on
// UDP for its packets. With TLS, the protocol that is negotiated tells streams from HTTP.
// Without TLS their first byte does.

// listener takes connections from peers, within bounds.
type listener struct {
	*net.TCPListener
	plain  bool           // look at the first byte
	gossip func(net.Conn) // takes a stream of memberlist; it does not block
	http   chan net.Conn  // connections for HTTP
	closed chan struct{}
	close  sync.Once
	wg     sync.WaitGroup
	files  atomic.Int64 // bytes that the kernel has sent from files

	most, mostFresh int // connections; see maxInbound and maxFresh

	mu struct {
		sync.Mutex
		stopped bool
		open    map[*conn]struct{}
		from    map[netip.Addr]int // connections by host
		fresh   list.List          // connections that have proven nothing yet, the oldest first
		idle    list.List          // those that wait for a request, the longest idle first
	}
}

// Bounds on connections. Peers on one machine share an address, and a member with TLS has
// one connection to each peer, or two.
const (
	maxInbound     = 4096
	maxInboundHost = 512
	// maxFresh is how many of these may have proven nothing yet. If there are more, the oldest
	// one is closed: so who is no member, and opens connections, does not keep members out. A
	// member needs some milliseconds to prove that it is one.
	maxFresh = 512
	// firstTime is how long a connection without TLS may take for its first byte.
	firstTime = 5 * time.Second
)

// listen listens on address for both protocols. Port 0 is a free port of both.
func listen(ctx context.Context, address string) (*net.TCPListener, *net.UDPConn, error) {
	var lc net.ListenConfig
	for try := 0; ; try++ {
		l, err := lc.Listen(ctx, "tcp", address)
		if err != nil {
			return nil, nil, fmt.Errorf("listen for the zone on %s: %w", address, err)
		}
		tcp := l.(*net.TCPListener)
		at := tcp.Addr().(*net.TCPAddr)
		udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: at.IP, Port: at.Port, Zone: at.Zone})
		if err == nil {
			_ = udp.SetReadBuffer(2 << 20) // as much as the system allows
			return tcp, udp, nil
		}
		tcp.Close()
		_, port, _ := net.SplitHostPort(address)
		if port != "0" || try == 10 || !errors.Is(err, unix.EADDRINUSE) {
			return nil, nil, fmt.Errorf("listen for the zone on %s by UDP: %w", address, err)
		}
	}
}

func newListener(l *net.TCPListener, plain bool, gossip func(net.Conn)) *listener {
	x := &listener{TCPListener: l, plain: plain, gossip: gossip, http: make(chan net.Conn), closed: make(chan struct{}), most: maxInbound, mostFresh: maxFresh}
	x.mu.open = make(map[*conn]struct{})
	x.mu.from = make(map[netip.Addr]int)
	x.wg.Go(x.run)
	return x
}

func (l *listener) run() {
	for {
		c, err := l.TCPListener.AcceptTCP()
		if err != nil {
			select {
			case <-l.closed:
				return
			case <-time.After(20 * time.Millisecond): // too many descriptors are open, as a rule
				continue
			}
		}
		x := l.admit(c)
		if x == nil {
			c.Close()
			continue
		}
		l.wg.Go(func() { l.sort(x) })
	}
}

// admit counts a connection, or returns nil if there are too many. Connections that wait for
// a request make room: peers keep them for a while, and make others when they need them.
func (l *listener) admit(c *net.TCPConn) *conn {
	from := remoteHost(c.RemoteAddr())
	l.mu.Lock()
	var gone []*conn
	defer func() {
		l.mu.Unlock()
		for _, x := range gone {
			x.Close()
		}
	}()
	if l.mu.stopped || l.mu.from[from] >= maxInboundHost {
		return nil
	}
	if l.mu.fresh.Len() >= l.mostFresh {
		oldest := l.mu.fresh.Front().Value.(*conn)
		gone = append(gone, oldest)
		l.forget(oldest)
	}
	if len(l.mu.open) >= l.most {
		e := l.mu.idle.Front()
		if e == nil {
			return nil
		}
		gone = append(gone, e.Value.(*conn))
		l.forget(e.Value.(*conn))
	}
	x := &conn{TCPConn: c, of: l, from: from}
	l.mu.open[x] = struct{}{}
	l.mu.from[from]++
	x.list = &l.mu.fresh
	x.place = x.list.PushBack(x)
	return x
}

// move puts a connection at the end of a list; nil takes it out of all. l.mu is held.
func (l *listener) move(c *conn, to *list.List) {
	if c.list != nil {
		c.list.Remove(c.place)
	}
	if c.list = to; to != nil {
		c.place = to.PushBack(c)
	}
}

// forget takes out a connection, once. l.mu is held.
func (l *listener) forget(c *conn) {
	if _, ok := l.mu.open[c]; !ok {
		return
	}
	l.move(c, nil)
	delete(l.mu.open, c)
	if l.mu.from[c.from]--; l.mu.from[c.from] == 0 {
		delete(l.mu.from, c.from)
	}
}

// busy says that a connection has proven itself and is used. idle says that it waits for a
// request after that.
func (c *conn) busy() { c.moved(nil) }
func (c *conn) idle() { c.moved(&c.of.mu.idle) }

func (c *conn) moved(to *list.List) {
	c.of.mu.Lock()
	defer c.of.mu.Unlock()
	if _, ok := c.of.mu.open[c]; ok {
		c.of.move(c, to)
	}
}

// connOf returns the connection from a peer that is below another one.
func connOf(c net.Conn) *conn {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	x, _ := c.(*conn)
	return x
}

func remoteHost(a net.Addr) netip.Addr {
	if ap, err := netip.ParseAddrPort(a.String()); err == nil {
		return ap.Addr().Unmap()
	}
	return netip.Addr{}
}

// labelByte is the first byte of a stream of memberlist with a label.
const labelByte = 244

// sort gives a connection to those whom it is for.
func (l *listener) sort(c *conn) {
	if l.plain {
		first, err := c.peek()
		if err != nil {
			c.Close()
			return
		}
		if first == labelByte {
			c.busy()
			l.gossip(c)
			return
		}
	}
	select {
	case l.http <- c:
	case <-l.closed:
		c.Close()
	}
}

// Accept implements net.Listener, for HTTP.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.http:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close stops listening. It does not close the connections that were accepted: Shutdown
// does.
func (l *listener) Close() (err error) {
	l.close.Do(func() {
		close(l.closed)
		err = l.TCPListener.Close()
	})
	return err
}

// shutdown closes all connections, and returns when nothing of the listener runs.
func (l *listener) shutdown() {
	_ = l.Close()
	l.mu.Lock()
	l.mu.stopped = true
	var open []*conn
	for c := range l.mu.open {
		open = append(open, c)
	}
	l.mu.Unlock()
	for _, c := range open {
		c.Close()
	}
	l.wg.Wait()
}

// conn is a connection from a peer.
type conn struct {
	*net.TCPConn
	of   *listener
	from netip.Addr

	// Guarded by the listener's mu.
	list  *list.List // that it is in; nil: none
	place *list.Element

	gather struct {
		sync.Mutex
		bytes *[]byte // what is written together; nil: nothing is
	}
}

// gathered is how many bytes are written together: the records of TLS of a leaf, and a
// little more.
const gathered = 80 << 10

var gatherers = sync.Pool{New: func() any { b := make([]byte, 0, gathered); return &b }}

// together has do write to the connection by way of TLS, and writes all of that at once. TLS
// writes each record of 16 KiB by itself: then a chunk takes a seventh more of the processor,
// and a leaf comes a fifth later.
func (c *conn) together(do func() error) error {
	b := gatherers.Get().(*[]byte)
	defer gatherers.Put(b)
	c.gather.Lock()
	c.gather.bytes = b
	c.gather.Unlock()
	err := do()
	c.gather.Lock()
	defer c.gather.Unlock()
	c.gather.bytes = nil
	return errors.Join(err, c.write(b))
}

// write writes what was gathered. c.gather is held.
func (c *conn) write(b *[]byte) (err error) {
	if len(*b) > 0 {
		_, err = c.TCPConn.Write(*b)
		*b = (*b)[:0]
	}
	return err
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (int, error) {
	c.gather.Lock()
	defer c.gather.Unlock()
	b := c.gather.bytes
	if b == nil {
		return c.TCPConn.Write(p)
	}
	if len(*b)+len(p) > cap(*b) {
		if err := c.write(b); err != nil {
			return 0, err
		}
		if len(p) > cap(*b) {
			return c.TCPConn.Write(p)
		}
	}
	*b = append(*b, p...)
	return len(p), nil
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.of.mu.Lock()
	c.of.forget(c)
	c.of.mu.Unlock()
	return c.TCPConn.Close()
}

// peek returns the first byte that comes, and leaves it to be read.
func (c *conn) peek() (first byte, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	if err := c.SetReadDeadline(time.Now().Add(firstTime)); err != nil {
		return 0, err
	}
	var b [1]byte
	var n int
	var readErr error
	err = raw.Read(func(fd uintptr) bool {
		for {
			n, _, readErr = unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK)
			if readErr != unix.EINTR {
				return readErr != unix.EAGAIN
			}
		}
	})
	switch {
	case err != nil:
		return 0, err
	case readErr != nil:
		return 0, readErr
	case n == 0:
		return 0, net.ErrClosed
	}
	return b[0], c.SetReadDeadline(time.Time{})
}
