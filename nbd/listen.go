package nbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Listen listens on an address of the form "unix:PATH" or "tcp:HOST:PORT"; the port
// assigned to NBD is 10809. It replaces a socket file that a dead process has left
// behind, but not one on which a process listens: of several servers that start at
// once, one gets the path. The umask decides who may connect to a socket file. Closing
// the listener removes the socket file, if it is still the one that Listen made.
func Listen(ctx context.Context, addr string) (net.Listener, error) {
	return listen(ctx, addr, net.ListenConfig{})
}

// ListenPrivate is Listen on a unix socket that only this user, and root, can connect
// to, from the moment on that it exists.
func ListenPrivate(ctx context.Context, path string) (net.Listener, error) {
	return listen(ctx, "unix:"+path, net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// Linux gives the file the mode that the socket has when it is bound.
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); e != nil {
			return e
		}
		return err
	}})
}

func listen(ctx context.Context, addr string, lc net.ListenConfig) (net.Listener, error) {
	network, where, _ := strings.Cut(addr, ":")
	if where == "" || network != "unix" && network != "tcp" {
		return nil, fmt.Errorf("listen on %q: want unix:PATH or tcp:HOST:PORT", addr)
	}
	var l net.Listener
	var err error
	if network == "unix" && where[0] != '@' { // @ is the abstract namespace, which has no files
		l, err = listenSocket(ctx, where, lc)
	} else {
		l, err = lc.Listen(ctx, network, where)
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("listen on %s: the address is in use by another program: %w", addr, syscall.EADDRINUSE)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return l, nil
}

// maxSocketPath is the size of sun_path without the zero at its end.
const maxSocketPath = 107

// socketListener listens on a socket file. The listener of package net removes any file
// at its path when it is closed. That may be another server's by then.
type socketListener struct {
	*net.UnixListener
	path string
	file os.FileInfo // of the socket; the listener keeps its inode from being used again
	once sync.Once
}

// listenSocket makes a socket file. It holds the lock of the directory while it checks
// whether a process listens on an old socket file, removes that, and makes the new one.
// Otherwise another server could take a socket for stale that is not listened on yet,
// or remove one that has just been made.
func listenSocket(ctx context.Context, path string, lc net.ListenConfig) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("the path of a socket has at most %d bytes, and this one has %d: choose a shorter one, for instance under /run", maxSocketPath, len(path))
	}
	unlock, err := lockDir(ctx, filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	u := l.(*net.UnixListener)
	u.SetUnlinkOnClose(false)
	fi, err := os.Lstat(path)
	if err != nil {
		u.Close()
		return nil, err
	}
	return &socketListener{UnixListener: u, path: path, file: fi}, nil
}

// Close removes the socket file, if it is still there, and stops listening.
func (l *socketListener) Close() error {
	l.once.Do(func() {
		unlock, err := lockDir(context.Background(), filepath.Dir(l.path))
		if err != nil {
			return // the next server finds it stale
		}
		defer unlock()
		if fi, err := os.Lstat(l.path); err == nil && os.SameFile(fi, l.file) {
			os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}

// lockTime is how long another process may hold the lock of a directory. A server holds
// it only until it knows whether a process listens on a socket.
const lockTime = 5 * time.Second

// lockDir locks a directory against other servers that make sockets in it. It locks the
// directory itself, so the lock leaves no file behind and ends with the process. Where
// the file system has no such locks, or this user may not lock, lockDir succeeds
// without one.
func lockDir(ctx context.Context, dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrPermission) {
		return func() {}, nil
	}
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(lockTime); ; {
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err {
		case nil:
			return func() { f.Close() }, nil
		case unix.EINTR:
		case unix.EWOULDBLOCK:
			if time.Now().After(end) {
				f.Close()
				return nil, fmt.Errorf("another program has locked the directory %s for %v: end it, or choose another directory", dir, lockTime)
			}
			select {
			case <-time.After(5 * time.Millisecond):
			case <-ctx.Done():
				f.Close()
				return nil, context.Cause(ctx)
			}
		default:
			return func() { f.Close() }, nil
		}
	}
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
	switch {
	case err == nil:
		c.Close()
		return syscall.EADDRINUSE
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.EPROTOTYPE):
		return syscall.EADDRINUSE // its queue is full, or it is a socket of another type
	case !errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("cannot find out whether a program listens on %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// ListenFiles makes listeners of inherited listening sockets, such as those of systemd's
// activation.Files. It closes the files. On an error it closes the listeners too.
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

// Exposed reports whether other hosts can reach l: whether its address is neither a
// unix socket nor the loopback. Such a listener needs TLS.
func Exposed(l net.Listener) bool {
	switch a := l.Addr().(type) {
	case *net.UnixAddr:
		return false
	case *net.TCPAddr:
		return !a.IP.IsLoopback()
	}
	return true
}
