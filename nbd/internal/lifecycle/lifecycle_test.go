package lifecycle

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap/blocktest"
)

func TestMain(m *testing.M) {
	CloseTime = time.Minute
	blocktest.Main(m)
}

var errTestClosed = errors.New("test: server closed")

// server echoes what its clients send. It is a server as those of package nbd are.
type server struct {
	*Lifecycle[*conn]
	limit int
	open  int // counted by the functions that the lifecycle calls
	most  int
	stuck chan struct{} // connections end when it is closed; nil: at once
}

type conn struct {
	nc      net.Conn
	drained chan struct{}
	once    sync.Once
}

func (c *conn) Drain() { c.once.Do(func() { close(c.drained) }) }
func (c *conn) Abort() { c.nc.Close() }

func newServer() *server {
	return &server{Lifecycle: New[*conn]("test", errTestClosed), limit: 100}
}

var errFull = errors.New("full")

func (s *server) start(nc net.Conn) error {
	c := &conn{nc: nc, drained: make(chan struct{})}
	ctx, err := s.Add(c, func(open int) error {
		if open != s.open {
			panic("a connection was added or removed meanwhile")
		}
		if open >= s.limit {
			return errFull
		}
		s.open++
		s.most = max(s.most, s.open)
		return nil
	})
	if err != nil {
		nc.Close()
		return nil
	}
	go func() {
		defer s.Remove(c, func(open int) {
			s.open--
			if open != s.open {
				panic("a connection was added or removed meanwhile")
			}
		})
		defer nc.Close()
		done := make(chan struct{})
		go func() {
			defer close(done)
			io.Copy(nc, nc)
		}()
		select {
		case <-done:
		case <-c.drained:
			nc.Close()
			<-done
		case <-ctx.Done():
			<-done
			if context.Cause(ctx) != errTestClosed {
				panic(context.Cause(ctx))
			}
		}
		if s.stuck != nil {
			<-s.stuck
		}
	}()
	return nil
}

// serve serves a socket, and returns a function that connects to it.
func (s *server) serve(t *testing.T) (dial func() net.Conn, ended chan error) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	ended = make(chan error, 1)
	go func() { ended <- s.Serve(l, slog.New(slog.DiscardHandler), s.start) }()
	return func() net.Conn {
		nc, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { nc.Close() })
		nc.SetDeadline(time.Now().Add(time.Minute))
		return nc
	}, ended
}

func echo(t *testing.T, nc net.Conn) {
	t.Helper()
	var b [5]byte
	if _, err := io.WriteString(nc, "hello"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(nc, b[:]); err != nil || string(b[:]) != "hello" {
		t.Fatalf("%q, %v", b, err)
	}
}

// Several listeners are served until the server is shut down, which ends all connections.
func TestServeUntilShutdown(t *testing.T) {
	s := newServer()
	one, oneEnded := s.serve(t)
	two, twoEnded := s.serve(t)
	conns := []net.Conn{one(), two(), one()}
	for _, nc := range conns {
		echo(t, nc)
	}
	s.View(func(conns map[*conn]struct{}) {
		if len(conns) != 3 {
			t.Errorf("%d connections", len(conns))
		}
	})
	if err := s.Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	for _, ended := range []chan error{oneEnded, twoEnded} {
		if err := <-ended; err != errTestClosed {
			t.Errorf("Serve: %v", err)
		}
	}
	for _, nc := range conns {
		if _, err := nc.Read(make([]byte, 1)); err == nil {
			t.Error("a connection is open after Shutdown")
		}
	}
	if s.open != 0 || !s.Closed() || s.Context().Err() == nil {
		t.Errorf("%d connections are counted", s.open)
	}
	// It stays closed.
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(l, slog.New(slog.DiscardHandler), s.start); err != errTestClosed {
		t.Errorf("Serve: %v", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve has left its listener open: %v", err)
	}
	if _, err := s.Add(&conn{}, func(int) error { return nil }); err != errTestClosed {
		t.Errorf("Add: %v", err)
	}
	for range 2 {
		if err := errors.Join(s.Close(), s.Shutdown(t.Context())); err != nil {
			t.Error(err)
		}
	}
}

// A server without connections is closed at once.
func TestCloseNothing(t *testing.T) {
	if err := newServer().Close(); err != nil {
		t.Error(err)
	}
	if err := newServer().Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

// A connection that is refused is not counted; the next one is taken once there is room.
func TestAddRefuses(t *testing.T) {
	s := newServer()
	s.limit = 2
	dial, ended := s.serve(t)
	a, b := dial(), dial()
	echo(t, a)
	echo(t, b)
	if _, err := dial().Read(make([]byte, 1)); err == nil {
		t.Error("a third connection is taken")
	}
	a.Close()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		c := dial()
		if _, err := io.WriteString(c, "x"); err == nil {
			if _, err := c.Read(make([]byte, 1)); err == nil {
				break
			}
		}
		if time.Now().After(end) {
			t.Fatal("no connection is taken although one has ended")
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != errTestClosed || s.most != 2 {
		t.Errorf("Serve: %v; %d connections at once", err, s.most)
	}
}

// Connections come and go while the server is closed.
func TestCloseUnderLoad(t *testing.T) {
	for range 20 {
		s := newServer()
		dial, ended := s.serve(t)
		var wg sync.WaitGroup
		for range 4 {
			nc := dial()
			wg.Go(func() {
				for {
					if _, err := io.WriteString(nc, "x"); err != nil {
						return
					}
					if _, err := nc.Read(make([]byte, 1)); err != nil {
						return
					}
				}
			})
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
		if err := <-ended; err != errTestClosed || s.open != 0 {
			t.Errorf("Serve: %v; %d are counted", err, s.open)
		}
	}
}

// What does not end is left behind, and said so. A later Close does not wait again, and
// succeeds once all has ended.
func TestLeftBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer()
		s.stuck = make(chan struct{})
		for range 2 {
			ours, theirs := net.Pipe()
			defer ours.Close()
			if err := s.start(theirs); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeoutCause(t.Context(), 3*time.Second, io.ErrNoProgress)
		defer cancel()
		begin := time.Now()
		err := s.Shutdown(ctx)
		if !errors.Is(err, io.ErrNoProgress) || !strings.Contains(err.Error(), "test: 2 connections were left behind") {
			t.Errorf("Shutdown: %v", err)
		}
		if d := time.Since(begin); d != 3*time.Second+CloseTime {
			t.Errorf("Shutdown took %v", d)
		}
		begin = time.Now()
		if err := s.Close(); err == nil || time.Since(begin) != 0 {
			t.Errorf("Close once more: %v after %v", err, time.Since(begin))
		}
		close(s.stuck)
		synctest.Wait()
		if err := s.Close(); err != nil {
			t.Errorf("Close at last: %v", err)
		}
	})
}

// failing is a listener whose Accept fails.
type failing struct {
	errs   chan error // what Accept returns
	closed chan struct{}
	once   sync.Once
}

func (l *failing) Accept() (net.Conn, error) {
	select {
	case err := <-l.errs:
		return nil, &net.OpError{Op: "accept", Net: "unix", Err: err}
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *failing) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *failing) Addr() net.Addr { return &net.UnixAddr{Name: "/run/test.sock", Net: "unix"} }

// A server that is out of descriptors tries again, at longer and longer intervals, and says so.
// Close ends the wait. Another error ends Serve.
func TestAcceptFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var said bytes.Buffer
		log := slog.New(slog.NewTextHandler(&said, nil))
		s := newServer()
		l := &failing{errs: make(chan error), closed: make(chan struct{})}
		ended := make(chan error, 1)
		go func() { ended <- s.Serve(l, log, s.start) }()
		begin := time.Now()
		for range 12 {
			l.errs <- syscall.EMFILE
		}
		// 5 + 10 + … + 640 ms, and 1 s three times.
		if d := time.Since(begin); d != 1275*time.Millisecond+3*time.Second {
			t.Errorf("the twelfth accept came after %v", d)
		}
		synctest.Wait()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := <-ended; err != errTestClosed || time.Since(begin) > 5*time.Second {
			t.Errorf("Serve: %v after %v", err, time.Since(begin))
		}
		if n := strings.Count(said.String(), "cannot accept a connection; trying again"); n != 12 {
			t.Errorf("it was said %d times: %s", n, said.String())
		}

		s = newServer()
		l = &failing{errs: make(chan error, 1), closed: make(chan struct{})}
		l.errs <- syscall.EINVAL
		err := s.Serve(l, log, s.start)
		if !errors.Is(err, syscall.EINVAL) || !strings.HasPrefix(err.Error(), "test: accept on /run/test.sock: ") {
			t.Errorf("Serve: %v", err)
		}
		<-l.closed
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// A server that cannot do with its connections ends Serve.
func TestStartFails(t *testing.T) {
	s := newServer()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	err = s.Serve(l, slog.New(slog.DiscardHandler), func(nc net.Conn) error { nc.Close(); return errFull })
	if err != errFull {
		t.Errorf("Serve: %v", err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener is open: %v", err)
	}
}
