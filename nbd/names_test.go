package nbd

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"
)

func TestNamed(t *testing.T) {
	id, err := url.Parse("spiffe://Example.test/Host/7")
	if err != nil {
		t.Fatal(err)
	}
	c := ClientInfo{Names: namesOf(&x509.Certificate{
		Subject:        pkix.Name{CommonName: "Jane Doe"},
		DNSNames:       []string{"host-7.Example.test", "*.wild.test"},
		EmailAddresses: []string{"Jane@Example.test"},
		IPAddresses:    []net.IP{net.IPv4(10, 0, 0, 7), net.IPv6loopback, net.ParseIP("fe80::7")},
		URIs:           []*url.URL{id},
	})}
	for name, want := range map[string]bool{
		"host-7.example.test":            true,
		"HOST-7.EXAMPLE.TEST":            true,
		"host-7.example.test.":           true,
		"host-7.example.test..":          false,
		"host-7.example":                 false,
		"7.example.test":                 false,
		"host-7.example.test.evil.test":  false,
		"evil.test/host-7.example.test":  false,
		"host-7.example.test\x00":        false,
		"\u212Aost-7.example.test":       false, // the Kelvin sign folds to k elsewhere
		"*":                              false,
		"*.example.test":                 false,
		"*.wild.test":                    true, // what the certificate says, no more
		"a.wild.test":                    false,
		"wild.test":                      false,
		"Jane@example.TEST":              true,
		"jane@Example.test":              false,
		"example.test":                   false,
		"@example.test":                  false,
		"x@Jane@example.test":            false,
		"10.0.0.7":                       true,
		"::ffff:10.0.0.7":                true,
		"::ffff:a00:7":                   true,
		"010.0.0.7":                      false,
		"10.0.0.70":                      false,
		"10.0.0.0/24":                    false,
		"::1":                            true,
		"0:0:0:0:0:0:0:1":                true,
		"0000:0000::0001":                true,
		"FE80::7":                        true,
		"fe80::7%eth0":                   false,
		"fe80::70":                       false,
		"spiffe://Example.test/Host/7":   true,
		"spiffe://example.test/Host/7":   false,
		"spiffe://Example.test/Host/7/a": false,
		"Jane Doe":                       true,
		"jane doe":                       false,
		"":                               false,
		".":                              false,
	} {
		if got := c.Named(name); got != want {
			t.Errorf("Named(%q) is %v", name, got)
		}
	}
	if (ClientInfo{}).Named("x", "") || (ClientInfo{Names: []string{""}}).Named("") || c.Named() {
		t.Error("a name for nobody")
	}
	if !c.Named("nobody", "::1") {
		t.Error("one matching name of several is not enough")
	}
	// A common name is compared as a host name or as an address, whichever it looks like.
	c = ClientInfo{Names: []string{"Host-8", "10.0.0.8"}}
	if !c.Named("host-8") || !c.Named("::ffff:10.0.0.8") || c.Named("host-80") {
		t.Error("common names")
	}
}

func FuzzNamed(f *testing.F) {
	for _, s := range []string{"", ".", "a@b", "::1", "10.0.0.1", "a.b.", "A.B", "*.x", "a@b@c", "\u212a"} {
		f.Add(s, strings.ToUpper(s))
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		if sameName(a, b) != sameName(b, a) {
			t.Errorf("%q and %q: comparing them in both orders differs", a, b)
		}
		if a != "" && !sameName(a, a) {
			t.Errorf("%q is not itself", a)
		}
		_, errA := netip.ParseAddr(a)
		if errA != nil && sameName(a, b) && !strings.EqualFold(strings.TrimSuffix(a, "."), strings.TrimSuffix(b, ".")) {
			t.Errorf("%q is %q", a, b)
		}
	})
}
