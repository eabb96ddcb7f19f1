package api

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"thaw/cmd/thaw/internal/host"
	"thaw/nbd"
)

// socketName is the socket in the cache directory.
const socketName = "control.sock"

// bounds are bounds of time. Tests raise them.
type bounds struct {
	// A client that is alive sends a request, and takes an answer, at once.
	header, body, write time.Duration
	idle                time.Duration
	stop                time.Duration // for answers that are under way at the end
	add                 time.Duration // for the opening of a device that is added
}

var defaultBounds = bounds{
	header: 5 * time.Second, body: 5 * time.Second, write: 5 * time.Second, idle: time.Minute, stop: 500 * time.Millisecond, add: addTimeout,
}

// maxHeader bounds the header of a request, in bytes; net/http adds 4 KiB.
const maxHeader = 8 << 10

// Server answers requests of the control API for a host.
type Server struct {
	host    *host.Host
	version string
	log     *slog.Logger

	http  *http.Server
	mux   *http.ServeMux
	conns conns

	bounds bounds

	ctx      context.Context // ends the requests that wait
	cancel   context.CancelFunc
	handlers sync.WaitGroup
	done     chan struct{} // closed when nothing is accepted any more

	mu struct {
		sync.Mutex
		stopped bool // no handler begins any more
	}
}

// Start serves the control API of h, whose cache is in dir, until Stop. If it cannot
// listen, it logs why and answers nobody: the path of a socket has at most 107 bytes, for
// one. version is the program's.
func Start(ctx context.Context, h *host.Host, dir, version string, log *slog.Logger) *Server {
	s := newServer(h, version, log)
	s.listen(ctx, dir)
	return s
}

// listen serves the API on the socket in dir, if it can.
func (s *Server) listen(ctx context.Context, dir string) {
	l, err := nbd.ListenPrivate(ctx, filepath.Join(dir, socketName))
	if err != nil {
		s.log.Warn("cannot listen on the control socket: other commands will not reach this server", "err", err)
		close(s.done)
		return
	}
	s.serve(l)
}

func newServer(h *host.Host, version string, log *slog.Logger) *Server {
	s := &Server{host: h, version: version, log: log, mux: http.NewServeMux(), bounds: defaultBounds, done: make(chan struct{})}
	s.conns.open = make(map[net.Conn]*conn)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	for _, r := range s.routes() {
		s.mux.Handle(r.method+" "+r.path, r)
	}
	return s
}

func (s *Server) serve(l net.Listener) {
	s.http = &http.Server{
		Handler:                      http.HandlerFunc(s.answer),
		ReadHeaderTimeout:            s.bounds.header,
		WriteTimeout:                 s.bounds.write, // set again when an answer is ready
		IdleTimeout:                  s.bounds.idle,
		MaxHeaderBytes:               maxHeader,
		DisableGeneralOptionsHandler: true,
		ConnContext:                  s.conns.add,
		ConnState:                    s.conns.changed,
		ErrorLog:                     slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // clients can cause any number of lines
	}
	go func() {
		defer close(s.done)
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.log.Warn("the control socket has failed", "err", err)
		}
	}()
}

// Stop answers the requests that are under way, for half a second or until ctx ends. It
// closes the socket and all connections.
func (s *Server) Stop(ctx context.Context) {
	s.cancel()
	if s.http != nil {
		s.conns.closeIdle()
		ctx, cancel := context.WithTimeout(ctx, s.bounds.stop)
		defer cancel()
		if s.http.Shutdown(ctx) != nil {
			s.http.Close()
		}
	}
	<-s.done
	s.mu.Lock()
	s.mu.stopped = true
	s.mu.Unlock()
	s.handlers.Wait()
}

// enter begins a handler, which calls handlers.Done when it ends.
func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.mu.stopped {
		s.handlers.Add(1)
	}
	return !s.mu.stopped
}
