package nbd

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap/blocktest"
)

func TestListen(t *testing.T) {
	dir := t.TempDir()
	sock := filepath.Join(dir, "sock")
	l, err := Listen(t.Context(), "unix:"+sock)
	if err != nil {
		t.Fatal(err)
	}
	if Exposed(l) {
		t.Error("a unix socket is not exposed")
	}
	if _, err := Listen(t.Context(), "unix:"+sock); !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), "in use by another program") {
		t.Errorf("a second listener: %v", err)
	}
	l.(*socketListener).UnixListener.Close() // as if killed
	if _, err := os.Stat(sock); err != nil {
		t.Fatal(err)
	}
	l, err = Listen(t.Context(), "unix:"+sock)
	if err != nil {
		t.Fatalf("over a stale socket: %v", err)
	}
	l.Close()

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(t.Context(), "unix:"+file); err == nil {
		t.Error("listening on a file")
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Error("the file is gone")
	}

	l, err = Listen(t.Context(), "tcp:127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if Exposed(l) {
		t.Error("the loopback is not exposed")
	}
	if _, err := Listen(t.Context(), "tcp:"+l.Addr().String()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second listener: %v", err)
	}
	all, err := Listen(t.Context(), "tcp::0")
	if err != nil {
		t.Fatal(err)
	}
	defer all.Close()
	if !Exposed(all) {
		t.Error("all addresses are exposed")
	}
	for _, bad := range []string{"", "unix:", "tcp:", "udp:1.2.3.4:5", "/run/sock", "unix:" + filepath.Join(dir, "no/such/dir")} {
		if l, err := Listen(t.Context(), bad); err == nil {
			l.Close()
			t.Errorf("listening on %q", bad)
		}
	}
}

// A listener removes only the socket that it made.
func TestListenRemovesItsOwn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	a, err := Listen(t.Context(), "unix:"+path)
	if err != nil {
		t.Fatal(err)
	}
	// Another program clears the directory, and another server starts.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	b, err := Listen(t.Context(), "unix:"+path)
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	a.Close()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the first listener has removed the socket of the second: %v", err)
	}
	nc.Close()
	b.Close()
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
	b.Close()

	// The replacement may be of any kind.
	if a, err = Listen(t.Context(), "unix:"+path); err != nil {
		t.Fatal(err)
	}
	os.Remove(path)
	if err := os.WriteFile(path, []byte("precious"), 0o666); err != nil {
		t.Fatal(err)
	}
	a.Close()
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("the file is gone")
	}
}

// If servers start at once over a stale socket, one gets the path, and that one answers
// there.
func TestListenRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for range 100 {
		l, err := Listen(t.Context(), "unix:"+path)
		if err != nil {
			t.Fatal(err)
		}
		l.(*socketListener).UnixListener.Close() // as if killed
		const n = 4
		var wg sync.WaitGroup
		got := make(chan net.Listener, n)
		for range n {
			wg.Go(func() {
				l, err := Listen(t.Context(), "unix:"+path)
				switch {
				case err == nil:
					got <- l
				case !errors.Is(err, syscall.EADDRINUSE):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(got) != 1 {
			t.Fatalf("%d servers have the path", len(got))
		}
		l = <-got
		nc, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		served, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		served.Close()
		nc.Close()
		l.Close()
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("the socket is left: %v", err)
		}
	}
}

// Other users can never connect to a private socket, whatever the umask.
func TestListenPrivate(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "sock")
	old := unix.Umask(0)
	l, err := ListenPrivate(t.Context(), sock)
	unix.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if fi, err := os.Stat(sock); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if _, err := ListenPrivate(t.Context(), sock); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second listener: %v", err)
	}
}

func TestListenPathTooLong(t *testing.T) {
	dir := t.TempDir()
	name := strings.Repeat("x", maxSocketPath-len(dir)-1)
	l, err := Listen(t.Context(), "unix:"+filepath.Join(dir, name))
	if err != nil {
		t.Fatalf("the longest path: %v", err)
	}
	l.Close()
	_, err = Listen(t.Context(), "unix:"+filepath.Join(dir, name+"x"))
	if err == nil || !strings.Contains(err.Error(), "at most 107 bytes") {
		t.Errorf("a longer path: %v", err)
	}
}

// If another process keeps the directory locked, listening fails after a bounded time.
func TestListenLocked(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lockDir(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Listen(ctx, "unix:"+filepath.Join(dir, "s")); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	unlock()
	l, err := Listen(t.Context(), "unix:"+filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// A server whose queue is full counts as running.
func TestListenKeepsOut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for { // fill its queue
		c, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(c)
		if unix.Connect(c, &unix.SockaddrUnix{Name: path}) != nil {
			break
		}
	}
	if _, err := Listen(t.Context(), "unix:"+path); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("over a server that is busy: %v", err)
	}
}

func TestListenFiles(t *testing.T) {
	var files []*os.File
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		files = append(files, f)
	}
	ls, err := ListenFiles(files)
	if err != nil || len(ls) != 2 {
		t.Fatalf("%d listeners, %v", len(ls), err)
	}
	srv := &Server{Exports: Static{{Name: "disk", Device: blocktest.NewMemory(testSize)}}}
	for _, l := range ls { // several at once
		serveOn(t, srv, l)
		nc, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		c := &client{t, nc}
		c.hello(3)
		c.enter(true)
	}

	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ListenFiles([]*os.File{f}); err == nil {
		t.Error("listening on /dev/null")
	}
}
