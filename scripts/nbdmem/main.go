// Command nbdmem is a test tool. It serves writable devices in memory through package
// nbd, for the suites of other NBD projects, which need a server that takes writes and
// that they start themselves. scripts/foreign-nbd runs it.
//
//	nbdmem [FLAGS] [NAME...]
//
// Each NAME is an export with a device of its own, all zeros but for -fill;
// NAME=ro is a read-only one. Without a NAME there is one export, called "".
// Clients come by -listen, by the sockets of systemd's activation, or, with
// -inetd, as the one connection that is the standard input; nbdmem then ends
// with it. Otherwise it runs until SIGTERM or SIGINT. Nothing is kept.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/nbd"
)

type options struct {
	listen      list
	inetd       bool
	size, grain int64
	fill        list
	pattern     bool
	delay       time.Duration
	description string

	cert, key, clientCA string
	optional            bool
}

// list is a flag that may be given more than once.
type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func main() {
	var o options
	flag.Var(&o.listen, "listen", "unix:PATH or tcp:HOST:PORT (repeatable)")
	flag.BoolVar(&o.inetd, "inetd", false, "serve the connection that is the standard input")
	flag.Int64Var(&o.size, "size", 1<<20, "bytes of each device, a multiple of -grain")
	flag.Int64Var(&o.grain, "grain", blockmap.BlockSize, "bytes that are a hole or not")
	flag.Var(&o.fill, "fill", "OFFSET:LENGTH:BYTE to write before serving (repeatable)")
	flag.BoolVar(&o.pattern, "pattern", false, "each 8 bytes begin as their own offset, big endian, as in nbdkit's pattern")
	flag.DurationVar(&o.delay, "delay", 0, "what each read, write, zeroing and flush takes")
	flag.StringVar(&o.description, "description", "", "of the exports")
	flag.StringVar(&o.cert, "tls-cert", "", "file with the certificate; TLS is required then")
	flag.StringVar(&o.key, "tls-key", "", "file with its key")
	flag.StringVar(&o.clientCA, "tls-client-ca", "", "file with the authority that clients' certificates have to be of")
	flag.BoolVar(&o.optional, "tls-optional", false, "serve clients without TLS, too")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := o.run(ctx, flag.Args())
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "nbdmem:", err)
		os.Exit(1)
	}
}

func (o *options) run(ctx context.Context, names []string) error {
	exports, err := o.exports(names)
	if err != nil {
		return err
	}
	tlsConfig, err := o.tls()
	if err != nil {
		return err
	}
	ls, err := o.listeners(ctx)
	if err != nil {
		return err
	}
	srv := &nbd.Server{
		Exports: exports, TLSFunc: func() *tls.Config { return tlsConfig }, RequireTLS: tlsConfig != nil && !o.optional,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}
	failed := make(chan error, len(ls))
	for _, l := range ls {
		go func() { failed <- srv.Serve(l) }()
	}
	left := len(ls)
	var gone <-chan struct{}
	if o.inetd {
		gone = ended(ctx, srv)
	}
	select {
	case <-ctx.Done():
	case <-gone:
	case err = <-failed:
		left--
	}
	end, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err = errors.Join(err, srv.Shutdown(end))
	for range left {
		if e := <-failed; !errors.Is(e, nbd.ErrServerClosed) {
			err = errors.Join(err, e)
		}
	}
	return err
}

func (o *options) exports(names []string) (nbd.Static, error) {
	if o.grain < 1 || o.size < o.grain || o.size%o.grain != 0 {
		return nil, fmt.Errorf("-size %d is not a multiple of -grain %d, or one of them is less than 1", o.size, o.grain)
	}
	if len(names) == 0 {
		names = []string{""}
	}
	var exports nbd.Static
	for _, name := range names {
		mem := blocktest.NewGrainy(o.size, o.grain)
		if o.pattern {
			pattern(mem)
		}
		for _, f := range o.fill {
			if err := fill(mem, f); err != nil {
				return nil, err
			}
		}
		var dev blockmap.Device = mem
		if o.delay > 0 {
			dev = newSlow(mem, o.delay)
		}
		name, ro := strings.CutSuffix(name, "=ro")
		exports = append(exports, nbd.Export{Name: name, Description: o.description, Device: dev, ReadOnly: ro})
	}
	return exports, nil
}

func (o *options) tls() (*tls.Config, error) {
	if o.cert == "" {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(o.cert, o.key)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	c := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}
	if o.clientCA != "" {
		b, err := os.ReadFile(o.clientCA)
		if err != nil {
			return nil, fmt.Errorf("client authority: %w", err)
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("client authority: %s has no certificate", o.clientCA)
		}
		// Not ClientCAs, which would name the authority to the client: GnuTLS
		// 3.7 finds no RSA certificate then that goes with the signatures that
		// crypto/tls asks for in TLS 1.3, and sends none.
		c.ClientAuth = tls.RequireAnyClientCert
		c.VerifyConnection = func(st tls.ConnectionState) error {
			between := x509.NewCertPool()
			for _, cert := range st.PeerCertificates[1:] {
				between.AddCert(cert)
			}
			_, err := st.PeerCertificates[0].Verify(x509.VerifyOptions{
				Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
			})
			return err
		}
	}
	return c, nil
}

func (o *options) listeners(ctx context.Context) ([]net.Listener, error) {
	if o.inetd {
		c, err := net.FileConn(os.Stdin)
		if err != nil {
			return nil, fmt.Errorf("standard input: %w", err)
		}
		return []net.Listener{newInetd(c)}, nil
	}
	ls, err := nbd.ListenFiles(activation.Files(true))
	if err != nil {
		return nil, err
	}
	for _, addr := range o.listen {
		l, err := nbd.Listen(ctx, addr)
		if err != nil {
			return nil, err
		}
		ls = append(ls, l)
	}
	if len(ls) == 0 {
		return nil, errors.New("there is nothing to listen on: pass -listen or -inetd, or start nbdmem with a socket of systemd")
	}
	return ls, nil
}

// inetd is a listener for one connection that is open already.
type inetd struct {
	conn   chan net.Conn
	addr   net.Addr
	closed chan struct{}
	close  func()
}

func newInetd(c net.Conn) *inetd {
	l := &inetd{conn: make(chan net.Conn, 1), addr: c.LocalAddr(), closed: make(chan struct{})}
	l.conn <- c
	l.close = sync.OnceFunc(func() { close(l.closed) })
	return l
}

func (l *inetd) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *inetd) Close() error   { l.close(); return nil }
func (l *inetd) Addr() net.Addr { return l.addr }

// ended returns a channel that is closed when the first connection of srv has ended.
func ended(ctx context.Context, srv *nbd.Server) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if st := srv.Stats(); st.Accepted > 0 && st.Conns == 0 {
					close(done)
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return done
}
