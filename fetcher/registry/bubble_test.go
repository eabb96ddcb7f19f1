package registry

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"testing"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
)

// network is servers and clients in one bubble of synctest. Sockets of the kernel would keep its
// clock from going on.
type network struct {
	t     *testing.T
	mu    sync.Mutex
	hosts map[string]*listening // by HOST:PORT
}

func newNetwork(t *testing.T) *network {
	return &network{t: t, hosts: make(map[string]*listening)}
}

// serve runs a server by this name until the test ends.
func (n *network) serve(host string, h http.Handler) {
	l := &listening{conns: make(chan net.Conn), closed: make(chan struct{})}
	n.mu.Lock()
	n.hosts[host+":80"] = l
	n.mu.Unlock()
	s := &http.Server{Handler: h, ErrorLog: quiet}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	n.t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
}

// open opens a repository of a server by a client of its own.
func (n *network) open(ref string, o Options) *Repo {
	o.Insecure = []string{"*"}
	c := newClient(n.t, o)
	c.transport.DialContext = func(ctx context.Context, _, addr string) (net.Conn, error) {
		n.mu.Lock()
		l := n.hosts[addr]
		n.mu.Unlock()
		if l == nil {
			return nil, errors.New("nobody listens at " + addr)
		}
		here, there := net.Pipe()
		select {
		case l.conns <- there:
			return here, nil
		case <-l.closed:
			return nil, net.ErrClosed
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return openRepo(n.t, c, ref)
}

// listening is a net.Listener.
type listening struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *listening) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listening) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *listening) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// registryHandler is the registry of go-containerregistry, with or without the referrers API.
func registryHandler(referrers bool) http.Handler {
	return ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithReferrersSupport(referrers))
}
