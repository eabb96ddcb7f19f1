package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/nbd/internal/lifecycle"
)

// Shutdown answers requests in flight, refuses later requests, and ends the connection
// after the replies.
func TestShutdown(t *testing.T) {
	dev := newFullDevice(testSize)
	dev.Evict(blockmap.Range(0, testSize/2))
	g := newGate(dev)
	srv := &Server{Exports: Static{{Name: "disk", Device: dev}}}
	path := serve(t, srv)
	idle, busy, haggling, silent := dial(t, path), dial(t, path), dial(t, path), dialRaw(t, path)
	idle.enter(true)
	busy.enter(true)
	haggling.want(99, nil, repErrUnsup)
	silent.read(18)
	for i := range uint64(8) {
		busy.send(cmdRead, 0, i, i*4096, 4096)
	}
	for range 8 {
		<-g.waiting
	}
	done := make(chan error)
	go func() { done <- srv.Shutdown(context.Background()) }()
	idle.closed()
	haggling.closed()
	silent.closed()
	if _, err := net.Dial("unix", path); err == nil {
		t.Error("still accepting")
	}
	select {
	case <-done:
		t.Error("Shutdown did not wait")
	default:
	}
	close(g.open)
	for range 8 {
		if k := busy.reply(0)[0]; k.cookie >= 8 || k.errno != 0 {
			t.Errorf("cookie %d: errno %d", k.cookie, k.errno)
		}
	}
	busy.closed()
	busy.nc.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	dev.NoPins(t)
	if st := srv.Stats(); st.Conns != 0 || st.Accepted != 4 || st.Misses != 8 {
		t.Errorf("%+v", st)
	}
	if err := srv.Serve(newPipeListener()); err != ErrServerClosed {
		t.Errorf("Serve after Shutdown: %v", err)
	}
}

// Requests that come while the connection drains get ESHUTDOWN.
func TestShutdownRefuses(t *testing.T) {
	dev := newFullDevice(testSize)
	dev.Evict(blockmap.Range(0, 4096))
	g := newGate(dev)
	srv := &Server{Exports: Static{{Name: "disk", Device: dev}}}
	path := serve(t, srv)
	c := dial(t, path)
	c.enter(true)
	c.send(cmdRead, 0, 1, 0, 4096)
	<-g.waiting
	done := make(chan error)
	go func() { done <- srv.Shutdown(context.Background()) }()
	// When another connection has ended, all connections have been told.
	eventually(t, "the shutdown begins", srv.conns().Closed)
	for i := range uint64(10) {
		c.send(cmdRead, 0, 100+i, 8192, 4096)
	}
	close(g.open)
	late := 0
	for {
		var b [1]byte
		if _, err := c.nc.Read(b[:]); err != nil {
			break
		}
		k := (&client{t, &unread{c.nc, b[:]}}).reply(0)[0]
		switch {
		case k.cookie == 1 && k.errno == 0:
		case k.cookie >= 100 && (k.errno == eShutdown || k.errno == 0):
			late++
		default:
			t.Errorf("%+v", k)
		}
	}
	c.nc.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	t.Logf("%d of 10 late requests answered", late)
}

// unread returns bytes again before the rest.
type unread struct {
	net.Conn
	p []byte
}

func (u *unread) Read(p []byte) (int, error) {
	if len(u.p) > 0 {
		n := copy(p, u.p)
		u.p = u.p[n:]
		return n, nil
	}
	return u.Conn.Read(p)
}

// A WRITE completes if its payload is arriving when the server shuts down.
func TestShutdownDuringPayload(t *testing.T) {
	const n = 4 << 20
	dev := blocktest.NewMemory(n)
	srv := &Server{Exports: Static{{Name: "disk", Device: dev}}}
	c := dial(t, serve(t, srv))
	c.enter(true)
	p := pattern(0, n)
	c.send(cmdWrite, 0, 5, 0, n)
	c.write(p[:n/2]) // more than a socket holds, so the server is at it
	done := make(chan error)
	go func() { done <- srv.Shutdown(context.Background()) }()
	eventually(t, "the shutdown begins", srv.conns().Closed)
	c.write(p[n/2:])
	if k := c.reply(0)[0]; k.cookie != 5 || k.errno != 0 {
		t.Errorf("%+v", k)
	}
	c.closed()
	c.nc.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if !bytes.Equal(dev.Content(blockmap.Range(0, n)), p) {
		t.Error("wrong data written")
	}
}

func TestShutdownGivesUp(t *testing.T) {
	dev := newFullDevice(testSize)
	dev.Evict(blockmap.Range(0, testSize))
	g := newGate(dev) // never opened
	srv := &Server{Exports: Static{{Name: "disk", Device: dev}}}
	c := dial(t, serve(t, srv))
	c.enter(true)
	c.send(cmdRead, 0, 1, 0, 4096)
	<-g.waiting
	ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, io.ErrNoProgress)
	defer cancel()
	if err := srv.Shutdown(ctx); err != io.ErrNoProgress {
		t.Errorf("Shutdown: %v", err)
	}
	dev.NoPins(t)
}

func TestCloseInHandshake(t *testing.T) {
	begun := make(chan struct{})
	srv := &Server{Exports: opener{func(ctx context.Context, _ string, _ ClientInfo) (*Export, func(), error) {
		close(begun)
		<-ctx.Done()
		return nil, nil, ctx.Err()
	}}}
	c := dial(t, serve(t, srv))
	c.option(optGo, infoData("disk"))
	<-begun
	srv.Close()
	// The handshake may have told its client before the connection was closed.
	if _, err := io.Copy(io.Discard, c.nc); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection is open")
	}
	srv.Close() // again is fine
	if err := new(Server).Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown of a server that never served: %v", err)
	}
}

// The server cancels a handshake that waits for Open as soon as it shuts down, because
// none of the handshake's work is needed.
func TestShutdownCancelsOpen(t *testing.T) {
	for name, option := range map[string][]byte{
		"GO":               appendOption(nil, optGo, infoData("disk")),
		"INFO":             appendOption(nil, optInfo, infoData("disk")),
		"EXPORT_NAME":      appendOption(nil, optExportName, []byte("disk")),
		"SET_META_CONTEXT": append(appendOption(nil, optStructuredReply, nil), appendOption(nil, optSetMetaContext, metaData("disk"))...),
	} {
		t.Run(name, func(t *testing.T) {
			begun := make(chan struct{})
			srv := &Server{Exports: opener{func(ctx context.Context, _ string, _ ClientInfo) (*Export, func(), error) {
				close(begun)
				<-ctx.Done()
				return nil, nil, context.Cause(ctx)
			}}}
			c := dial(t, serve(t, srv))
			c.write(option)
			<-begun
			done := make(chan error, 1)
			go func() { done <- srv.Shutdown(context.Background()) }()
			select {
			case err := <-done:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(time.Minute):
				t.Error("Shutdown waits for Open")
			}
		})
	}
}

// Shutdown leaves behind calls that ignore their ctx, and reports them.
func TestShutdownLeavesBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFullDevice(testSize)
		dev.Evict(blockmap.Range(0, testSize))
		held := make(chan struct{})
		dev.OnFault = func(context.Context, blockmap.Extent) error {
			<-held
			return errBroken
		}
		srv := &Server{Exports: opener{func(_ context.Context, name string, _ ClientInfo) (*Export, func(), error) {
			if name == "hangs" {
				<-held
			}
			return &Export{Name: name, Device: dev}, nil, nil
		}}}
		l := newPipeListener()
		var wg sync.WaitGroup
		wg.Go(func() { srv.Serve(l) })
		reader := &client{t, l.dial()}
		reader.hello(3)
		reader.enter(true)
		reader.send(cmdRead, 0, 1, 0, 4096)
		opening := &client{t, l.dial()}
		opening.hello(3)
		opening.option(optGo, infoData("hangs"))
		idle := &client{t, l.dial()}
		idle.hello(3)
		idle.enter(true)
		synctest.Wait()

		begin := time.Now()
		ctx, cancel := context.WithTimeoutCause(t.Context(), 2*time.Second, io.ErrNoProgress)
		defer cancel()
		err := srv.Shutdown(ctx)
		if !errors.Is(err, io.ErrNoProgress) || !strings.Contains(err.Error(), "2 connections were left behind") {
			t.Errorf("Shutdown: %v", err)
		}
		if d := time.Since(begin); d > 2*time.Second+lifecycle.CloseTime {
			t.Errorf("Shutdown took %v", d)
		}
		begin = time.Now()
		if err := srv.Close(); err == nil || time.Since(begin) > 0 {
			t.Errorf("Close once more: %v, after %v", err, time.Since(begin))
		}
		close(held)
		synctest.Wait()
		if err := srv.Close(); err != nil {
			t.Errorf("Close at last: %v", err)
		}
		wg.Wait()
	})
}

// A client that pauses does not delay a shutdown beyond its ctx.
func TestShutdownPausedClient(t *testing.T) {
	for _, transport := range transports {
		dev := newPatternDevice(testSize)
		srv := &Server{Exports: Static{{Name: "disk", Device: dev}}}
		c := reach(t, transport, srv)(false)
		stalledClient(c, 64<<10)
		begin := time.Now()
		ctx, cancel := context.WithTimeoutCause(t.Context(), 100*time.Millisecond, io.ErrNoProgress)
		if err := srv.Shutdown(ctx); err != io.ErrNoProgress {
			t.Errorf("%s: Shutdown: %v", transport, err)
		}
		cancel()
		if d := time.Since(begin); d > time.Minute {
			t.Errorf("%s: Shutdown took %v", transport, d)
		}
		dev.NoPins(t)
	}
}

func TestMaxConns(t *testing.T) {
	l, log := newLogged()
	srv := &Server{Exports: Static{{Name: "disk", Device: blocktest.NewMemory(testSize)}}, MaxConns: 2, Log: log}
	path := serve(t, srv)
	a, b := dial(t, path), dial(t, path)
	a.enter(true)
	b.enter(true)
	for range 3 {
		dialRaw(t, path).closed()
	}
	if s := l.wait(t, "too many"); !strings.Contains(s, "max_conns=2") {
		t.Errorf("logged %q", s)
	}
	a.nc.Close()
	l.wait(t, "session ends")
	for { // the place is free in a moment
		c := dialRaw(t, path)
		if n, _ := c.nc.Read(make([]byte, 1)); n == 1 {
			break
		}
	}
}

// The server reports a client that starts a message and then sends nothing, with the
// limit.
func TestSilentHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines, log := newLogged()
		l := newPipeListener()
		serveOn(t, &Server{Exports: Static{{Name: "disk", Device: newFullDevice(testSize)}}, Log: log, HandshakeTimeout: 5 * time.Second}, l)
		c := &client{t, l.dial()}
		c.hello(3)
		c.want(99, nil, repErrUnsup)
		begin := time.Now()
		c.closed()
		if d := time.Since(begin); d != 5*time.Second {
			t.Errorf("closed after %v", d)
		}
		lines.wait(t, "the handshake took too long handshake_timeout=5s")
	})
}

// flaky fails to accept, like a process without free descriptors.
type flaky struct {
	net.Listener
	fails int
}

func (f *flaky) Accept() (net.Conn, error) {
	if f.fails--; f.fails >= 0 {
		return nil, temporary{}
	}
	return f.Listener.Accept()
}

type temporary struct{}

func (temporary) Error() string   { return "too many open files" }
func (temporary) Temporary() bool { return true }

func TestAcceptErrors(t *testing.T) {
	srv := &Server{Exports: Static{{Name: "disk", Device: blocktest.NewMemory(testSize)}}}
	l, err := Listen(t.Context(), "tcp:127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, srv, &flaky{l, 3})
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	c := &client{t, nc}
	c.hello(3)
	c.enter(true)

	p := newPipeListener()
	p.Close()
	if err := srv.Serve(p); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve on a broken listener: %v", err)
	}
}

func TestStats(t *testing.T) {
	dev := newPatternDevice(testSize)
	dev.Evict(blockmap.Range(0, 4096))
	srv := &Server{Exports: Static{{Name: "disk", Device: dev}}}
	c := dial(t, serve(t, srv))
	c.enter(false)
	c.send(cmdRead, 0, 1, 0, 4096)
	c.reply(4096)
	for range 5 {
		c.send(cmdRead, 0, 1, 0, 4096)
		c.reply(4096)
	}
	c.mustFail(cmdRead, 0, testSize, 1, eInval)
	c.mustDo(cmdTrim, 0, 0, 4096, nil)
	st := srv.Stats()
	st.Sent = 0
	if want := (Stats{Conns: 1, Accepted: 1, Hits: 5, Misses: 1, Others: 2, Errors: 1}); st != want {
		t.Errorf("%+v, want %+v", st, want)
	}
}

// leveled counts lines by level.
type leveled struct {
	slog.Handler
	mu    sync.Mutex
	lines map[slog.Level][]string
}

func (l *leveled) Enabled(context.Context, slog.Level) bool { return true }
func (l *leveled) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *leveled) Handle(_ context.Context, r slog.Record) error {
	s := r.Message
	r.Attrs(func(a slog.Attr) bool { s += " " + a.String(); return true })
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines[r.Level] = append(l.lines[r.Level], s)
	return nil
}

// Port scans are not logged as warnings, and frequent failures are logged only from
// time to time.
func TestHandshakeLog(t *testing.T) {
	p := newPKI(t)
	h := &leveled{Handler: slog.DiscardHandler, lines: make(map[slog.Level][]string)}
	newServer := func(timeout time.Duration) *Server {
		return &Server{
			Exports: Static{{Name: "disk", Device: blocktest.NewMemory(testSize)}}, TLSFunc: p.serverFunc(t),
			Log: slog.New(h), HandshakeTimeout: timeout,
		}
	}
	// Only a client that is silent meets the timeout of a server. To any other one it could
	// happen on a busy machine, and that would be logged.
	srv, hasty := newServer(time.Hour), newServer(500*time.Millisecond)
	path, hastyPath := serve(t, srv), serve(t, hasty)
	opened := int64(0)
	settle := func() {
		eventually(t, "all connections have come and gone", func() bool {
			st, st2 := srv.Stats(), hasty.Stats()
			return st.Accepted+st2.Accepted == opened && st.Conns+st2.Conns == 0
		})
	}
	for name, say := range map[string]func(c *client){
		"connect and close": func(c *client) {},
		"read and close":    func(c *client) { c.read(18) },
		"half the flags":    func(c *client) { c.write([]byte{0, 0}) },
		"flags and close":   func(c *client) { c.hello(3) },
		"HTTP":              func(c *client) { c.write([]byte("GET / HTTP/1.1\r\n\r\n")) },
		"TLS": func(c *client) {
			c.nc.SetDeadline(time.Now().Add(50 * time.Millisecond))
			tls.Client(c.nc, &tls.Config{ServerName: "x"}).Handshake()
		},
		"silence":               func(c *client) { c.read(18); c.closed() },
		"half an option":        func(c *client) { c.hello(3); c.write(appendOption(nil, optGo, infoData("disk"))[:20]) },
		"gone without a word":   func(c *client) { c.hello(3); c.option(optList, nil) },
		"abort":                 func(c *client) { c.hello(3); c.option(optAbort, nil); c.optReply() },
		"gone without reading":  func(c *client) { c.hello(3); c.option(optInfo, infoData("disk")) },
		"session without a bye": func(c *client) { c.hello(3); c.enter(true); c.send(cmdRead, 0, 1, 0, testSize) },
	} {
		for range 3 {
			opened++
			to := path
			if name == "silence" {
				to = hastyPath
			}
			c := dialRaw(t, to)
			say(c)
			c.nc.Close()
		}
		settle()
		h.mu.Lock()
		for level, lines := range h.lines {
			if level > slog.LevelDebug && len(lines) > 0 {
				t.Errorf("%s: %v %q", name, level, lines)
			}
		}
		clear(h.lines)
		h.mu.Unlock()
	}

	// Real faults, many of them.
	began := time.Now()
	for range 50 {
		opened += 3
		c := dial(t, path)
		c.option(optExportName, []byte("nothing"))
		c.closed()
		c = dial(t, path)
		c.want(optGo, infoData("nothing"), repErrUnknown)
		c.nc.Close()
		c = dial(t, path)
		c.enter(true)
		c.write(make([]byte, requestLen))
		c.closed()
	}
	settle()
	count := func() (n int, all string) {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.lines[slog.LevelInfo]) + len(h.lines[slog.LevelWarn]), fmt.Sprint(h.lines)
	}
	// There are three kinds of faults, and of each one line a second at most.
	took := time.Since(began)
	if n, all := count(); n < 3 || n > 3*(1+int(took/time.Second)) {
		t.Errorf("%d lines for 150 faults in %v: %s", n, took, all)
	}
	for end := time.Now().Add(time.Minute); ; {
		_, all := count()
		if strings.Contains(all, "suppressed=") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the log does not count omitted lines: %s", all)
		}
		c := dial(t, path)
		c.option(optExportName, []byte("nothing"))
		c.closed()
	}
}
