package zone

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/miekg/dns"

	"thaw/blockmap"
)

// nameServer is a DNS server for one name, which has the addresses of a headless service of
// Kubernetes. What does not fit into a packet of UDP is asked for by TCP.
type nameServer struct {
	mu    sync.Mutex
	code  int // of the answers; dns.RcodeSuccess with addrs
	addrs []netip.Addr
	byTCP int // answers
}

const service = "zone.thaw.svc.cluster.test"

// startNameServer has the names of this process looked up at a new server.
func startNameServer(t *testing.T) *nameServer {
	t.Helper()
	s := &nameServer{code: dns.RcodeNameError}
	packets, err := net.ListenPacket("udp", "127.9.0.53:0") // nobody else uses these addresses, so the port is free for TCP as well
	if err != nil {
		t.Fatal(err)
	}
	addr := packets.LocalAddr().String()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	for _, server := range []*dns.Server{{PacketConn: packets, Handler: s}, {Listener: l, Handler: s}} {
		started := make(chan struct{})
		server.NotifyStartedFunc = func() { close(started) }
		done := make(chan error, 1)
		go func() { done <- server.ActivateAndServe() }()
		<-started
		t.Cleanup(func() {
			_ = server.Shutdown()
			<-done
		})
	}
	before := net.DefaultResolver
	t.Cleanup(func() { net.DefaultResolver = before })
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, addr)
	}}
	return s
}

// set makes the name have addresses, or be an error.
func (s *nameServer) set(code int, addrs ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.code, s.addrs = code, nil
	for _, a := range addrs {
		s.addrs = append(s.addrs, netip.MustParseAddr(a))
	}
}

// ServeDNS implements dns.Handler.
func (s *nameServer) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := new(dns.Msg)
	m.SetReply(q)
	switch {
	case len(q.Question) != 1 || q.Question[0].Name != service+".":
		m.Rcode = dns.RcodeNameError
	case s.code != dns.RcodeSuccess:
		m.Rcode = s.code
	case q.Question[0].Qtype == dns.TypeA:
		for _, a := range s.addrs {
			m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: service + ".", Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 5}, A: a.AsSlice()})
		}
	}
	if _, ok := w.RemoteAddr().(*net.TCPAddr); ok {
		s.byTCP++
	} else {
		m.Truncate(dns.MinMsgSize)
	}
	_ = w.WriteMsg(m)
}

// Hosts find each other by a name whose addresses come and go, as those of a headless service
// of Kubernetes do: before it has any, with addresses at which nobody listens any more, with
// more than fit into a packet, and while the server of names fails.
func TestMembersJoinByDNS(t *testing.T) {
	names := startNameServer(t)
	seed, err := ParseSeed("dns:" + service)
	if err != nil {
		t.Fatal(err)
	}
	// All listen at the same port, as the pods of a service do.
	l, err := net.Listen("tcp", "127.9.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	host := func(addr string) *Zone {
		return open(t, Options{Store: newTestStore(t, blockmap.CacheOptions{}), Join: []Seed{seed}, Listen: net.JoinHostPort(addr, port)})
	}
	a := host("127.9.0.1") // the name does not exist yet
	if st := a.Status(); !st.Alone {
		t.Errorf("%+v", st)
	}
	names.set(dns.RcodeSuccess, "127.9.0.1", "127.9.0.9")
	b := host("127.9.0.2") // nobody listens at the second address
	awaitMembers(t, 2, a, b)
	var many []string
	for i := range 60 {
		many = append(many, fmt.Sprintf("127.9.7.%d", i+1))
	}
	names.set(dns.RcodeSuccess, append(many, "127.9.0.2")...)
	c := host("127.9.0.3")
	awaitMembers(t, 3, a, b, c)
	names.mu.Lock()
	if names.byTCP == 0 {
		t.Error("the long answer was not asked for by TCP")
	}
	names.mu.Unlock()
	// The members need the names only to find each other.
	names.set(dns.RcodeServerFailure)
	b.Close()
	awaitMembers(t, 2, a, c)
	names.set(dns.RcodeSuccess, "127.9.0.1", "127.9.0.3")
	d := host("127.9.0.2") // the same address again
	awaitMembers(t, 3, a, c, d)
}
