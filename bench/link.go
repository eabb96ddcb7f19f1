package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// LinkOptions are the properties of a link.
type LinkOptions struct {
	RTT  time.Duration // round trip of an idle link
	Rate int64         // bits per second in each direction, shared by all connections; 0: no limit
	// Dial connects to the server behind the link.
	Dial func(ctx context.Context) (net.Conn, error)
}

// Link simulates a slow network link, for kernels without netem. It is a TCP
// proxy that forwards bytes at the time when a link of that round trip and rate
// would deliver them.
//
// Opening a connection costs a round trip, as a handshake does. Each direction
// forwards one piece at a time, behind a short queue, so that connections share
// it as they share a router without bufferbloat. A Link has no loss and no slow
// start: it behaves as for a warm connection.
type Link struct {
	o        LinkOptions
	l        net.Listener
	up       lane // to the server
	down     lane
	conns    atomic.Int64
	open     atomic.Int64 // connections
	requests atomic.Int64
	cancel   context.CancelFunc
	wg       sync.WaitGroup
}

// Pieces are small enough for connections to take turns, and large enough for
// a sleep per piece to be precise, and cheap at a high rate.
const (
	minPiece  = 16 << 10
	maxPiece  = 64 << 10
	pieceTime = 500 * time.Microsecond // line time of a piece, within these bounds
	queueTime = 2 * time.Millisecond
	queueLen  = 1 << 10 // pieces in flight per connection
)

// NewLink forwards connections to l until Close.
func NewLink(l net.Listener, o LinkOptions) *Link {
	ctx, cancel := context.WithCancel(context.Background())
	k := &Link{o: o, l: l, cancel: cancel, up: newLane(o), down: newLane(o)}
	k.wg.Go(func() { k.accept(ctx) })
	return k
}

// ListenLink returns a link from a new loopback port to a TCP address.
func ListenLink(to string, rtt time.Duration, rate int64) (*Link, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return NewLink(l, LinkOptions{RTT: rtt, Rate: rate, Dial: func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", to)
	}}), nil
}

// Addr is the address that clients connect to.
func (k *Link) Addr() net.Addr { return k.l.Addr() }

// LinkStats counts what a Link has carried so far.
type LinkStats struct {
	Connections int64
	// Requests counts HTTP/1.1 requests without bodies, by the ends of their
	// headers. It is meaningless for other protocols.
	Requests int64
	Up, Down int64 // bytes to and from the server, headers included
}

// Sub returns what the link has carried between earlier and s.
func (s LinkStats) Sub(earlier LinkStats) LinkStats {
	return LinkStats{s.Connections - earlier.Connections, s.Requests - earlier.Requests, s.Up - earlier.Up, s.Down - earlier.Down}
}

// Stats may be called at any time.
func (k *Link) Stats() LinkStats {
	return LinkStats{Connections: k.conns.Load(), Requests: k.requests.Load(), Up: k.up.carried.Load(), Down: k.down.carried.Load()}
}

// Settle waits until no connection is open: until all bytes of clients that have ended are
// carried, and counted.
func (k *Link) Settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for k.open.Load() > 0 {
		if err := sleep(ctx, time.Millisecond); err != nil {
			return fmt.Errorf("%d connections of the link are open: %w", k.open.Load(), err)
		}
	}
	return nil
}

// Close ends all connections, and waits for all goroutines of the link.
func (k *Link) Close() error {
	k.cancel()
	err := k.l.Close()
	k.wg.Wait()
	return err
}

func (k *Link) accept(ctx context.Context) {
	for {
		c, err := k.l.Accept()
		if err != nil {
			return
		}
		k.conns.Add(1)
		k.open.Add(1)
		k.wg.Go(func() {
			defer k.open.Add(-1)
			k.connection(ctx, c)
		})
	}
}

func (k *Link) connection(ctx context.Context, client net.Conn) {
	defer client.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { client.Close() })()
	if sleep(ctx, k.o.RTT) != nil {
		return
	}
	server, err := k.o.Dial(ctx)
	if err != nil {
		return
	}
	defer server.Close()
	defer context.AfterFunc(ctx, func() { server.Close() })()
	var both sync.WaitGroup
	both.Go(func() { k.up.carry(ctx, cancel, server, client, &headers{count: &k.requests}) })
	both.Go(func() { k.down.carry(ctx, cancel, client, server, nil) })
	both.Wait()
}

// lane is one direction of a link.
type lane struct {
	delay   time.Duration
	rate    int64
	piece   int           // largest piece, in bytes
	line    chan struct{} // a lock that can be waited for with a context
	free    time.Time     // when the line has sent everything so far; guarded by line
	carried atomic.Int64
}

func newLane(o LinkOptions) lane {
	piece := int64(maxPiece)
	if o.Rate > 0 {
		piece = min(max(o.Rate/8*int64(pieceTime)/int64(time.Second), minPiece), maxPiece)
	}
	return lane{delay: o.RTT / 2, rate: o.Rate, piece: int(piece), line: make(chan struct{}, 1)}
}

// piece is bytes in flight.
type piece struct {
	from *[]byte // to return to the pool
	b    []byte
	due  time.Time
}

// carry forwards what src sends, and its end of file. An error ends both
// directions of the connection. seen looks at all bytes; it may be nil.
func (l *lane) carry(ctx context.Context, cancel context.CancelFunc, dst, src net.Conn, seen *headers) {
	inFlight := make(chan piece, queueLen)
	free := sync.Pool{New: func() any { b := make([]byte, l.piece); return &b }}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for p := range inFlight {
			if sleep(ctx, time.Until(p.due)) != nil {
				continue
			}
			// Counted before they arrive: whoever has all bytes may ask for the count.
			l.carried.Add(int64(len(p.b)))
			if n, err := dst.Write(p.b); err != nil {
				l.carried.Add(int64(n - len(p.b)))
				cancel()
				continue
			}
			free.Put(p.from)
		}
		if ctx.Err() != nil {
			return
		}
		if c, ok := dst.(interface{ CloseWrite() error }); !ok || c.CloseWrite() != nil {
			cancel()
		}
	})
	defer close(inFlight)
	for {
		from := free.Get().(*[]byte)
		b := *from
		n, err := src.Read(b)
		if n > 0 {
			seen.look(b[:n])
			due, err := l.send(ctx, n)
			if err != nil {
				return
			}
			select {
			case inFlight <- piece{from, b[:n], due}:
			case <-ctx.Done():
				return
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				cancel()
			}
			return
		}
	}
}

// send waits until n bytes fit into the queue of the line, and returns the time
// at which they arrive.
func (l *lane) send(ctx context.Context, n int) (time.Time, error) {
	if l.rate <= 0 {
		return time.Now().Add(l.delay), nil
	}
	select {
	case l.line <- struct{}{}:
	case <-ctx.Done():
		return time.Time{}, ctx.Err()
	}
	defer func() { <-l.line }()
	if err := sleep(ctx, time.Until(l.free.Add(-queueTime))); err != nil {
		return time.Time{}, err
	}
	if now := time.Now(); l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(int64(n) * 8 * int64(time.Second) / l.rate))
	return l.free.Add(l.delay), nil
}

// headers counts the ends of HTTP headers in the bytes of a connection, however
// they are divided.
type headers struct {
	count *atomic.Int64
	at    int // length of the part of headerEnd that was seen last
}

const headerEnd = "\r\n\r\n"

func (h *headers) look(b []byte) {
	if h == nil {
		return
	}
	for _, c := range b {
		switch {
		case c == headerEnd[h.at]:
			h.at++
		case c == '\r':
			h.at = 1
		default:
			h.at = 0
		}
		if h.at == len(headerEnd) {
			h.count.Add(1)
			h.at = 0
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
