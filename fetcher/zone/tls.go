package zone

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
)

// Credentials prove to peers who this host is, and say which peers it believes. They do
// not change: new ones replace them.
type Credentials struct {
	// Certificate has the chain and the key of this host. It is for servers and for
	// clients, and has the name of the host.
	Certificate tls.Certificate
	// Roots are the authorities that issue the certificates of peers.
	Roots *x509.CertPool

	once     sync.Once // makes what follows
	server   *tls.Config
	sessions tls.ClientSessionCache
}

// maxSessions bounds the peers whose TLS session is kept, to be resumed.
const maxSessions = 1024

// ReadCredentials reads PEM files.
func ReadCredentials(cert, key, ca string) (*Credentials, error) {
	c := &Credentials{Roots: x509.NewCertPool()}
	var err error
	if c.Certificate, err = tls.LoadX509KeyPair(cert, key); err != nil {
		return nil, fmt.Errorf("certificate %s of the zone with the key %s: %w", cert, key, err)
	}
	if c.Certificate.Leaf == nil {
		if c.Certificate.Leaf, err = x509.ParseCertificate(c.Certificate.Certificate[0]); err != nil {
			return nil, fmt.Errorf("certificate %s of the zone: %w", cert, err)
		}
	}
	b, err := os.ReadFile(ca)
	if err != nil {
		return nil, fmt.Errorf("authorities of the zone: %w", err)
	}
	if !c.Roots.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("authorities of the zone: %s has no certificate", ca)
	}
	return c, nil
}

// nameIn returns the name of this host by its certificate: host, or the first name in the
// certificate if host is empty.
func (c *Credentials) nameIn(host string) (string, error) {
	leaf := c.Certificate.Leaf
	if host != "" {
		if err := leaf.VerifyHostname(host); err != nil {
			return "", fmt.Errorf("the certificate of the zone does not have the name %s of this host: %w", host, err)
		}
		return host, nil
	}
	for _, n := range leaf.DNSNames {
		if !strings.Contains(n, "*") {
			return n, nil
		}
	}
	for _, ip := range leaf.IPAddresses {
		return ip.String(), nil
	}
	return "", errors.New("the certificate of the zone has no name that can be the name of a host: pass one that it matches, with --zone-host NAME")
}

// protocols of a TLS connection between members, besides those of HTTP.
const gossipProtocol = "thaw-gossip/1"

// prepare makes what connections share. A session that was made with other credentials is
// not resumed: neither end has its key any more, so that both verify certificates again.
func (c *Credentials) prepare() {
	c.sessions = tls.NewLRUClientSessionCache(maxSessions)
	c.server = &tls.Config{
		Certificates: []tls.Certificate{c.Certificate}, MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: c.Roots,
		DynamicRecordSizingDisabled: true, // for the first bytes of a page; these are chunks
		NextProtos:                  []string{"h2", "http/1.1", gossipProtocol},
	}
	var key [32]byte
	_, _ = rand.Read(key[:]) // it never fails
	c.server.SetSessionTicketKeys([][32]byte{key})
}

// asServer is the configuration for connections from peers. Peers show their certificates;
// the handler checks that each request comes in a name that its certificate has. That holds
// for sessions that are resumed too: they have the certificates that they began with.
func (c *Credentials) asServer() *tls.Config {
	c.once.Do(c.prepare)
	return c.server
}

// toPeer is the configuration for connections to the peer of that name. An empty name is
// that of a member whose name is not known yet.
func (c *Credentials) toPeer(name string) *tls.Config {
	c.once.Do(c.prepare)
	o := &tls.Config{Certificates: []tls.Certificate{c.Certificate}, MinVersion: tls.VersionTLS13, RootCAs: c.Roots, ServerName: name, ClientSessionCache: c.sessions}
	if name == "" {
		o.ClientSessionCache = nil
		o.InsecureSkipVerify = true // of the name only
		o.VerifyConnection = func(st tls.ConnectionState) error {
			return c.verify(st.PeerCertificates, x509.ExtKeyUsageServerAuth, "")
		}
	}
	return o
}

// verify checks the certificate that a peer shows, and that it has a name unless that is
// empty.
func (c *Credentials) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage, name string) error {
	if len(chain) == 0 {
		return errors.New("the peer shows no certificate")
	}
	o := x509.VerifyOptions{
		Roots: c.Roots, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{usage}, DNSName: name, CurrentTime: time.Now(),
	}
	for _, cert := range chain[1:] {
		o.Intermediates.AddCert(cert)
	}
	_, err := chain[0].Verify(o)
	return err
}
