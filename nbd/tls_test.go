package nbd

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// pki is a CA with the certificates that it has signed, in memory and as the files that
// foreign clients need.
type pki struct {
	dir    string
	pool   *x509.CertPool
	ca     *x509.Certificate
	key    *ecdsa.PrivateKey
	serial int64
}

func newPKI(t testing.TB) *pki {
	p := &pki{dir: t.TempDir(), pool: x509.NewCertPool()}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p.key = key
	p.ca = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, p.ca, p.ca, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	p.write(t, "ca-cert.pem", "CERTIFICATE", der)
	if p.ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	p.pool.AddCert(p.ca)
	return p
}

func (p *pki) write(t testing.TB, name, typ string, der []byte) {
	if err := os.WriteFile(filepath.Join(p.dir, name), pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// issue signs a certificate and writes it as "<file>-cert.pem" and -key.pem.
func (p *pki) issue(t testing.TB, file, cn string, names ...string) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p.serial++
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1 + p.serial), Subject: pkix.Name{CommonName: cn}, DNSNames: names,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore:   time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, p.ca, &key.PublicKey, p.key)
	if err != nil {
		t.Fatal(err)
	}
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	p.write(t, file+"-cert.pem", "CERTIFICATE", der)
	p.write(t, file+"-key.pem", "PRIVATE KEY", k)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// serverFunc is for Server.TLSFunc.
func (p *pki) serverFunc(t testing.TB) func() *tls.Config {
	c := p.server(t)
	return func() *tls.Config { return c }
}

func (p *pki) server(t testing.TB) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{p.issue(t, "server", "localhost", "localhost")},
		ClientCAs:    p.pool,
		ClientAuth:   tls.VerifyClientCertIfGiven,
	}
}

// startTLS upgrades c.
func (c *client) startTLS(cfg *tls.Config) error {
	c.t.Helper()
	c.want(optStartTLS, nil, repAck)
	tc := tls.Client(c.nc, cfg)
	c.nc = tc
	return tc.Handshake()
}

func TestTLS(t *testing.T) {
	p := newPKI(t)
	dev := newPatternDevice(testSize)
	dev.Evict(blockmap.Range(0, testSize/2))
	seen := make(chan ClientInfo, 10)
	static := Static{
		{Name: "disk", Device: dev},
		{Name: "theirs", Device: dev, Clients: []string{"host-9", "host-7.example"}},
	}
	srv := &Server{TLSFunc: p.serverFunc(t), Exports: watching{static, seen}}
	path := serve(t, srv)
	cfg := &tls.Config{RootCAs: p.pool, ServerName: "localhost", Certificates: []tls.Certificate{p.issue(t, "client", "host-7", "host-7.example")}}

	c := dial(t, path)
	c.want(optStructuredReply, nil, repAck)
	c.want(optInfo, infoData("theirs"), repErrTLSReqd)
	if err := c.startTLS(cfg); err != nil {
		t.Fatal(err)
	}
	<-seen
	// Nothing from before TLS counts.
	c.want(optSetMetaContext, metaData("disk", "base:allocation"), repErrInvalid)
	c.want(optStartTLS, nil, repErrInvalid)
	c.option(optInfo, infoData("theirs"))
	if rs := c.replies(optInfo); rs[len(rs)-1].typ != repAck {
		t.Errorf("INFO of theirs: %v", rs)
	}
	if i := <-seen; !i.TLS || !i.Named("host-7") || !i.Named("nobody", "host-7.example") || i.Named("host-9") {
		t.Errorf("%+v", i)
	}
	c.enter(true, "base:allocation")
	for range 20 {
		c.send(cmdRead, 0, 1, 100, testSize-200)
		if got := assemble(t, c.reply(0), 100, testSize-200); !bytes.Equal(got, dev.Content(blockmap.Range(100, testSize-200))) {
			t.Fatal("wrong data")
		}
	}
	c.mustDo(cmdWrite, 0, 0, 300_000, pattern(7, 300_000))
	c.send(cmdDisc, 0, 0, 0, 0)
	c.closed()
	dev.NoPins(t)

	// A client without the name.
	c = dial(t, path)
	cfg2 := cfg.Clone()
	cfg2.Certificates = nil
	if err := c.startTLS(cfg2); err != nil {
		t.Fatal(err)
	}
	c.want(optGo, infoData("theirs"), repErrPolicy)
	c.option(optList, nil)
	if rs := c.replies(optList); len(rs) != 2 {
		t.Errorf("LIST shows %v", rs)
	}
	c.enter(true)

	// The server refuses 1.2, whatever the configuration says.
	c = dial(t, path)
	cfg3 := cfg.Clone()
	cfg3.MaxVersion = tls.VersionTLS12
	if err := c.startTLS(cfg3); err == nil {
		t.Error("TLS 1.2 is accepted")
	}

	// The server does not take bytes sent in the clear after STARTTLS for TLS.
	c = dial(t, path)
	c.write(append(appendOption(nil, optStartTLS, nil), appendOption(nil, optGo, infoData("disk"))...))
	c.optReply()
	if err := tls.Client(c.nc, cfg).Handshake(); err == nil {
		t.Error("plain text was injected into TLS")
	}

	// Without fixed newstyle there is no TLS.
	c = dialRaw(t, path)
	c.hello(0)
	c.want(optStartTLS, nil, repErrInvalid)
}

// watching reports the client that opens an export.
type watching struct {
	Static
	seen chan ClientInfo
}

func (w watching) Open(ctx context.Context, name string, c ClientInfo) (*Export, func(), error) {
	w.seen <- c
	return w.Static.Open(ctx, name, c)
}

func TestRequireTLS(t *testing.T) {
	p := newPKI(t)
	srv := &Server{TLSFunc: p.serverFunc(t), RequireTLS: true, Exports: Static{{Name: "disk", Device: blocktest.NewMemory(testSize)}}}
	path := serve(t, srv)
	c := dial(t, path)
	for _, opt := range []uint32{optList, optInfo, optGo, optStructuredReply, optListMetaContext, optSetMetaContext, 99} {
		c.want(opt, nil, repErrTLSReqd)
	}
	if err := c.startTLS(&tls.Config{RootCAs: p.pool, ServerName: "localhost"}); err != nil {
		t.Fatal(err)
	}
	c.want(99, nil, repErrUnsup)
	c.enter(true)
	c.mustDo(cmdFlush, 0, 0, 0, nil)

	c = dial(t, path)
	c.option(optExportName, []byte("disk"))
	c.closed()
	c = dial(t, path)
	c.option(optAbort, nil)
	c.optReply()
	c.closed()
}

// The next client gets renewed certificates.
func TestTLSFunc(t *testing.T) {
	old, renewed := newPKI(t), newPKI(t)
	var cfg atomic.Pointer[tls.Config]
	srv := &Server{TLSFunc: cfg.Load, Exports: Static{{Name: "disk", Device: blocktest.NewMemory(testSize)}}}
	path := serve(t, srv)
	dial(t, path).want(optStartTLS, nil, repErrPolicy) // none yet
	cfg.Store(old.server(t))
	first := dial(t, path)
	if err := first.startTLS(&tls.Config{RootCAs: old.pool, ServerName: "localhost"}); err != nil {
		t.Fatal(err)
	}
	cfg.Store(renewed.server(t))
	if err := dial(t, path).startTLS(&tls.Config{RootCAs: old.pool, ServerName: "localhost"}); err == nil {
		t.Error("the old certificate is still used")
	}
	if err := dial(t, path).startTLS(&tls.Config{RootCAs: renewed.pool, ServerName: "localhost"}); err != nil {
		t.Errorf("the renewed certificate: %v", err)
	}
	first.enter(true) // connections go on
	first.mustDo(cmdFlush, 0, 0, 0, nil)
}

// Shutdown over TLS also answers requests in flight.
func TestShutdownTLS(t *testing.T) {
	p := newPKI(t)
	dev := newPatternDevice(testSize)
	dev.Evict(blockmap.Range(0, testSize))
	g := newGate(dev)
	srv := &Server{TLSFunc: p.serverFunc(t), Exports: Static{{Name: "disk", Device: dev}}}
	c := dial(t, serve(t, srv))
	if err := c.startTLS(&tls.Config{RootCAs: p.pool, ServerName: "localhost"}); err != nil {
		t.Fatal(err)
	}
	c.enter(true)
	c.send(cmdRead, 0, 1, 0, 4096)
	<-g.waiting
	done := make(chan error)
	go func() { done <- srv.Shutdown(t.Context()) }()
	close(g.open)
	if k := c.reply(0)[0]; k.cookie != 1 || k.errno != 0 {
		t.Errorf("%+v", k)
	}
	c.closed()
	if err := <-done; err != nil {
		t.Error(err)
	}
	dev.NoPins(t)
}
