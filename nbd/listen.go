package nbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

// Listen listens on an address of the form "unix:PATH" or "tcp:HOST:PORT"; the
// port that NBD has by assignment is 10809. A socket file that a dead process
// has left behind is replaced, and one that somebody answers on is not.
func Listen(ctx context.Context, addr string) (net.Listener, error) {
	network, where, _ := strings.Cut(addr, ":")
	switch {
	case where == "", network != "unix" && network != "tcp":
		return nil, fmt.Errorf("listen on %q: want unix:PATH or tcp:HOST:PORT", addr)
	case network == "unix" && where[0] != '@': // @ is the abstract namespace, which has no files
		if err := removeStale(ctx, where); err != nil {
			return nil, fmt.Errorf("listen on %s: %w", addr, err)
		}
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, network, where)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("listen on %s: the address is in use by another program: %w", addr, syscall.EADDRINUSE)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return l, nil
}

// removeStale removes the socket at path if nobody listens on it.
func removeStale(ctx context.Context, path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is not a socket: %w", path, fs.ErrExist)
	}
	d := net.Dialer{Timeout: time.Second}
	c, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		c.Close()
		return fmt.Errorf("the address is in use by another program: %w", syscall.EADDRINUSE)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("see who is there: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// ListenFiles makes listeners of listening sockets that were inherited, as
// from systemd (its activation.Files gives such a list). It closes the files,
// and on an error everything.
func ListenFiles(files []*os.File) ([]net.Listener, error) {
	var ls []net.Listener
	var errs []error
	for _, f := range files {
		l, err := net.FileListener(f)
		if err != nil {
			errs = append(errs, fmt.Errorf("listen on inherited %s: %w", f.Name(), err))
		} else {
			ls = append(ls, l)
		}
		f.Close()
	}
	if len(errs) > 0 {
		for _, l := range ls {
			l.Close()
		}
		return nil, errors.Join(errs...)
	}
	return ls, nil
}

// Exposed reports whether other hosts may reach l: whether its address is not a
// unix socket nor the loopback. Such a listener wants TLS.
func Exposed(l net.Listener) bool {
	switch a := l.Addr().(type) {
	case *net.UnixAddr:
		return false
	case *net.TCPAddr:
		return !a.IP.IsLoopback()
	}
	return true
}
