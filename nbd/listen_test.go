package nbd

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
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
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as if killed
	l.Close()
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
	srv := &Server{Exports: Static{{Name: "disk", Device: newMemDevice(testSize)}}}
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
