package host

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"thaw/fetcher/registry"
)

// reloadEvery is how often watched files are checked for changes.
const reloadEvery = 3 * time.Second

// Watched is the content of a set of files, which are read again when they change: when
// they are overwritten, when another file is renamed over them, or when a symbolic link
// in their path leads elsewhere. Files that cannot be read or parsed are logged once, and
// the content read before stays in use.
type Watched[T any] struct {
	what  string
	paths []string
	read  func() (T, error)
	log   *slog.Logger

	now atomic.Pointer[T]

	mu struct {
		sync.Mutex
		seen []stamp // of the files when they were last read, successfully or not
	}
}

// stamp tells whether a file has changed, without reading it.
type stamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
	regular      bool
	gone         bool
}

func stampOf(path string) stamp {
	fi, err := os.Stat(path)
	if err != nil {
		return stamp{gone: true}
	}
	s := stamp{size: fi.Size(), regular: fi.Mode().IsRegular()}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		s.dev, s.ino, s.mtime, s.ctime = st.Dev, st.Ino, st.Mtim, st.Ctim
	}
	return s
}

// Watch reads the files for the first time. Empty paths are ignored. It may wait for the
// writer of a FIFO.
func Watch[T any](what string, log *slog.Logger, read func() (T, error), paths ...string) (*Watched[T], error) {
	w := &Watched[T]{what: what, read: read, log: log}
	for _, p := range paths {
		if p != "" {
			w.paths = append(w.paths, p)
		}
	}
	w.mu.seen = w.stamps() // before the files are read, so that a change meanwhile is seen
	v, err := read()
	if err != nil {
		return nil, err
	}
	w.now.Store(&v)
	return w, nil
}

func (w *Watched[T]) stamps() []stamp {
	var all []stamp
	for _, p := range w.paths {
		all = append(all, stampOf(p))
	}
	return all
}

// Get returns the current content, or the last one that could be read.
func (w *Watched[T]) Get() T {
	w.Refresh(false)
	return *w.now.Load()
}

// Refresh reads the files again if they have changed or force is set, and reports whether
// it has read new content. What is not a regular file, such as a pipe, is read only once.
func (w *Watched[T]) Refresh(force bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := w.stamps()
	changed := force
	for i, s := range now {
		if !s.regular && !s.gone {
			return false
		}
		changed = changed || s != w.mu.seen[i]
	}
	if !changed {
		return false
	}
	w.mu.seen = now
	v, err := w.read()
	if err != nil {
		w.log.Warn("the "+w.what+" cannot be read again; the earlier content stays in use", "err", err)
		return false
	}
	w.now.Store(&v)
	w.log.Info("read the "+w.what+" again", "files", w.paths)
	return true
}

// Reload reads files again when they change, and on SIGHUP, until ctx ends. Each of the
// refresh functions does so for its own files.
func Reload(ctx context.Context, hangup <-chan os.Signal, refresh ...func(force bool)) {
	t := time.NewTicker(reloadEvery)
	defer t.Stop()
	for {
		force := false
		select {
		case <-ctx.Done():
			return
		case <-hangup:
			force = true
		case <-t.C:
		}
		for _, f := range refresh {
			f(force)
		}
	}
}

// WatchMirrors has the client use the mirrors that read returns, now and whenever the
// file at path has changed.
func WatchMirrors(path string, read func() (registry.Mirrors, error), client *registry.Client, log *slog.Logger) (refresh func(force bool), err error) {
	w, err := Watch("hosts file", log, read, path)
	if err != nil {
		return nil, err
	}
	client.SetMirrors(w.Get())
	return func(force bool) {
		if w.Refresh(force) {
			client.SetMirrors(w.Get())
		}
	}, nil
}

// TLSFiles are the files of a server's TLS. ClientCA may be empty.
type TLSFiles struct {
	Cert, Key, ClientCA string
}

// Watch reads the certificates now, and again when they change.
func (f TLSFiles) Watch(log *slog.Logger) (*Watched[*tls.Config], error) {
	return Watch("TLS certificates", log, f.read, f.Cert, f.Key, f.ClientCA)
}

func (f TLSFiles) read() (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		return nil, fmt.Errorf("TLS certificate %s with the key %s: %w", f.Cert, f.Key, err)
	}
	c := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}
	if f.ClientCA == "" {
		return c, nil
	}
	b, err := os.ReadFile(f.ClientCA)
	if err != nil {
		return nil, fmt.Errorf("TLS client authorities: %w", err)
	}
	c.ClientCAs = x509.NewCertPool()
	if !c.ClientCAs.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("TLS client authorities: %s has no certificate", f.ClientCA)
	}
	c.ClientAuth = tls.RequireAndVerifyClientCert
	return c, nil
}
