package nbd

import (
	"crypto/tls"
	"crypto/x509"
)

func (s *Server) tls() *tls.Config {
	if s.TLSFunc != nil {
		return s.TLSFunc()
	}
	return s.TLS
}

// verifyClients makes c check clients' certificates by itself, where crypto/tls
// would, and reports whether it is to be done at all. The difference is that
// the server then does not name its authorities to the client: GnuTLS 3.7, which
// libnbd, qemu and nbd-client stand on, looks for a certificate of theirs that
// goes with the signatures of TLS 1.3 as Go lists them, finds no RSA one, and
// sends none.
func verifyClients(c *tls.Config) bool {
	switch c.ClientAuth {
	case tls.RequireAndVerifyClientCert:
		c.ClientAuth = tls.RequireAnyClientCert
	case tls.VerifyClientCertIfGiven:
		c.ClientAuth = tls.RequestClientCert
	default:
		return false
	}
	roots, also := c.ClientCAs, c.VerifyConnection
	c.ClientCAs = nil
	c.VerifyConnection = func(st tls.ConnectionState) error {
		if len(st.PeerCertificates) > 0 {
			o := x509.VerifyOptions{
				Roots: roots, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
			}
			if c.Time != nil {
				o.CurrentTime = c.Time()
			}
			for _, cert := range st.PeerCertificates[1:] {
				o.Intermediates.AddCert(cert)
			}
			if _, err := st.PeerCertificates[0].Verify(o); err != nil {
				return err
			}
		}
		if also != nil {
			return also(st)
		}
		return nil
	}
	return true
}

// namesOf are the names that a certificate gives its owner.
func namesOf(cert *x509.Certificate) []string {
	var names []string
	names = append(names, cert.DNSNames...)
	names = append(names, cert.EmailAddresses...)
	for _, u := range cert.URIs {
		names = append(names, u.String())
	}
	if cn := cert.Subject.CommonName; cn != "" {
		names = append(names, cn)
	}
	return names
}
