package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"thaw/blockmap"
)

// Shutdown answers what is in flight, tells later requests, and ends the
// connection behind the replies.
func TestShutdown(t *testing.T) {
	dev := newPatternDevice(testSize)
	dev.evict(blockmap.Range(0, testSize/2))
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
	dev.noPins(t)
	if st := srv.Stats(); st.Conns != 0 || st.Accepted != 4 || st.Misses != 8 {
		t.Errorf("%+v", st)
	}
	if err := srv.Serve(newPipeListener()); err != ErrServerClosed {
		t.Errorf("Serve after Shutdown: %v", err)
	}
}

// Requests that come while the connection drains get ESHUTDOWN.
func TestShutdownRefuses(t *testing.T) {
	dev := newPatternDevice(testSize)
	dev.evict(blockmap.Range(0, 4096))
	g := newGate(dev)
	path, srv := "", &Server{Exports: Static{{Name: "disk", Device: dev}}}
	path = serve(t, srv)
	c := dial(t, path)
	c.enter(true)
	c.send(cmdRead, 0, 1, 0, 4096)
	<-g.waiting
	done := make(chan error)
	go func() { done <- srv.Shutdown(context.Background()) }()
	// The end of another connection says that all are told.
	for !srv.closed() {
		time.Sleep(time.Millisecond)
	}
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

// unread gives bytes back before the rest.
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

// A WRITE whose payload is under way when the server shuts down is done.
func TestShutdownDuringPayload(t *testing.T) {
	const n = 4 << 20
	dev := newMemDevice(n)
	srv := &Server{Exports: Static{{Name: "disk", Device: dev}}}
	c := dial(t, serve(t, srv))
	c.enter(true)
	p := pattern(0, n)
	c.send(cmdWrite, 0, 5, 0, n)
	c.write(p[:n/2]) // more than a socket holds, so the server is at it
	done := make(chan error)
	go func() { done <- srv.Shutdown(context.Background()) }()
	for !srv.closed() {
		time.Sleep(time.Millisecond)
	}
	c.write(p[n/2:])
	if k := c.reply(0)[0]; k.cookie != 5 || k.errno != 0 {
		t.Errorf("%+v", k)
	}
	c.closed()
	c.nc.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if !bytes.Equal(dev.content(blockmap.Range(0, n)), p) {
		t.Error("wrong data written")
	}
}

func TestShutdownGivesUp(t *testing.T) {
	dev := newPatternDevice(testSize)
	dev.evict(blockmap.Range(0, testSize))
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
	dev.noPins(t)
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
	c.closed()
	srv.Close() // again is fine
	if err := new(Server).Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown of a server that never served: %v", err)
	}
}

func TestMaxConns(t *testing.T) {
	l, log := newLogged()
	srv := &Server{Exports: Static{{Name: "disk", Device: newMemDevice(testSize)}}, MaxConns: 2, Log: log}
	path := serve(t, srv)
	a, b := dial(t, path), dial(t, path)
	a.enter(true)
	b.enter(true)
	for range 3 {
		dialRaw(t, path).closed()
	}
	l.wait(t, "too many")
	a.nc.Close()
	l.wait(t, "session ends")
	for { // the place is free in a moment
		c := dialRaw(t, path)
		if n, _ := c.nc.Read(make([]byte, 1)); n == 1 {
			break
		}
	}
}

// flaky fails to accept as a process without descriptors does.
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
	srv := &Server{Exports: Static{{Name: "disk", Device: newMemDevice(testSize)}}}
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
	dev.evict(blockmap.Range(0, 4096))
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
