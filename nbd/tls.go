package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"net/netip"
	"strings"
)

// verifyClients makes c check clients' certificates in VerifyConnection, and reports
// whether c asks for verified certificates at all. crypto/tls would check them too, but
// would also name the server's authorities to the client. GnuTLS 3.7, which libnbd,
// qemu and nbd-client use, then looks for a certificate of these authorities that fits
// the signatures of TLS 1.3 as Go lists them, finds no RSA one, and sends none.
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
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	for _, u := range cert.URIs {
		names = append(names, u.String())
	}
	if cn := cert.Subject.CommonName; cn != "" {
		names = append(names, cn)
	}
	return names
}

// sameName reports whether a and b name the same client: see ClientInfo.Named.
func sameName(a, b string) bool {
	ipA, errA := netip.ParseAddr(a)
	ipB, errB := netip.ParseAddr(b)
	if errA == nil || errB == nil {
		return errA == nil && errB == nil && ipA.Unmap() == ipB.Unmap()
	}
	localA, domainA, mailA := cutLast(a, '@')
	localB, domainB, mailB := cutLast(b, '@')
	if mailA != mailB || localA != localB {
		return false
	}
	if domainA == domainB {
		return a != ""
	}
	if !isDomain(domainA) || !isDomain(domainB) {
		return false
	}
	return strings.EqualFold(strings.TrimSuffix(domainA, "."), strings.TrimSuffix(domainB, "."))
}

// cutLast cuts s at the last sep; without one all of s is after.
func cutLast(s string, sep byte) (before, after string, ok bool) {
	if i := strings.LastIndexByte(s, sep); i >= 0 {
		return s[:i], s[i+1:], true
	}
	return "", s, false
}

// isDomain reports whether s has the form of a DNS name. Only DNS names are compared
// without regard to case.
func isDomain(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_', c == '*':
		default:
			return false
		}
	}
	return s != "" && s != "."
}
