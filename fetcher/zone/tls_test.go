package zone

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"thaw/blockmap"
)

// askAs gets chunks by a client, and returns the code, or why there is none.
func askAs(t testing.TB, c *http.Client, url string) (code int, body []byte, err error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", strings.Replace(url, "http:", "https:", 1), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	if resp.ProtoMajor != 2 {
		t.Errorf("it speaks %s", resp.Proto)
	}
	body, err = io.ReadAll(resp.Body)
	return resp.StatusCode, body, err
}

// Members prove who they are. A stranger without a certificate, or with one of another
// authority, is refused; and so is a member by another's name.
func TestStrangers(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	ca, other := newAuthority(t), newAuthority(t)
	z := open(t, secure(ca.credentials("host-1.example"), Options{Store: s}))
	if z.Name() != "host-1.example" {
		t.Errorf("the host is %s", z.Name())
	}
	url := z.chunksURL(s, 0, last, "")
	member := as(ca.credentials("peer-1", "*.many.example"), "host-1.example")
	defer member.CloseIdleConnections()
	if code, body, err := askAs(t, member, url); err != nil || code != 200 || !bytes.Equal(body, s.part(0, last)) {
		t.Errorf("a member: %d, %d bytes, %v", code, len(body), err)
	}
	for name, want := range map[string]int{"peer-2": 403, "host-1.example": 403, "a.many.example": 200, "a.b.many.example": 403, "127.0.0.1": 403} {
		if code, _, err := askAs(t, member, strings.Replace(url, "peer-1", name, 1)); err != nil || code != want {
			t.Errorf("by the name %s: %d, %v", name, code, err)
		}
	}
	if code, _, err := askAs(t, member, strings.Replace(url, testZone, "zone-2", 1)); err != nil || code != 403 {
		t.Errorf("of another zone: %d, %v", code, err)
	}
	stranger := as(nil, "")
	defer stranger.CloseIdleConnections()
	if code, _, err := askAs(t, stranger, url); err == nil {
		t.Errorf("without a certificate: %d", code)
	}
	forger := as(other.credentials("peer-1"), "host-1.example")
	forger.Transport.(*http.Transport).TLSClientConfig.InsecureSkipVerify = true
	defer forger.CloseIdleConnections()
	if code, _, err := askAs(t, forger, url); err == nil {
		t.Errorf("with the certificate of another authority: %d", code)
	}
	if code, _, err := askAs(t, as(ca.credentials("peer-1"), "host-2.example"), url); err == nil {
		t.Errorf("a server of another name is believed: %d", code)
	}
	if got := z.say(t, "GET /v1/health HTTP/1.1\r\nHost: zone\r\n\r\n"); got != "400" && got != "closed" {
		t.Errorf("without TLS: %s", got)
	}
	if n := s.fetched.Load(); n != RunChunks {
		t.Errorf("%d chunks were fetched", n)
	}
}

// Certificates are replaced while the zone runs. Who has a certificate of the old authority
// only is refused from then on, on connections that are open as well.
func TestReloadedCertificates(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	ca, next := newAuthority(t), newAuthority(t)
	var now atomic.Pointer[Credentials]
	now.Store(ca.credentials("host-1.example"))
	o := secure(nil, Options{Store: s})
	o.TLS = now.Load
	z := open(t, o)
	url := z.chunksURL(s, 0, last, "")
	old := as(ca.credentials("peer-1"), "host-1.example")
	defer old.CloseIdleConnections()
	if code, _, err := askAs(t, old, url); err != nil || code != 200 {
		t.Fatalf("%d, %v", code, err)
	}
	now.Store(next.credentials("host-1.example"))
	if code, _, err := askAs(t, old, url); err != nil || code != 403 {
		t.Errorf("a connection of before: %d, %v", code, err)
	}
	fresh := as(next.credentials("peer-1"), "host-1.example")
	defer fresh.CloseIdleConnections()
	if code, _, err := askAs(t, fresh, url); err != nil || code != 200 {
		t.Errorf("with the new authority: %d, %v", code, err)
	}
	old.CloseIdleConnections()
	if code, _, err := askAs(t, old, url); err == nil {
		t.Errorf("with the old authority: %d", code)
	}
}

// A peer that connects again resumes its session, which spares both a signature. Who may ask
// is checked all the same, and new credentials end all sessions.
func TestResumedSessions(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	ca, other := newAuthority(t), newAuthority(t)
	server := ca.credentials("host-1.example")
	var now atomic.Pointer[Credentials]
	now.Store(server)
	o := secure(nil, Options{Store: s})
	o.TLS = now.Load
	z := open(t, o)
	peer := ca.credentials("peer-1")
	ask := func(by *Credentials, from string) (code int, resumed bool, err error) {
		c := as(by, "host-1.example")
		defer c.CloseIdleConnections() // each request has a connection of its own
		url := strings.NewReplacer("http:", "https:", "peer-1", from).Replace(z.chunksURL(s, 0, 0, ""))
		req, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(req)
		if err != nil {
			return 0, false, err
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		return resp.StatusCode, resp.TLS.DidResume, err
	}
	for i, c := range []struct {
		from    string
		code    int
		resumed bool
	}{{"peer-1", 200, false}, {"peer-1", 200, true}, {"peer-2", 403, true}, {"peer-1", 200, true}} {
		if code, resumed, err := ask(peer, c.from); err != nil || code != c.code || resumed != c.resumed {
			t.Errorf("%d: %d, resumed %v, %v", i, code, resumed, err)
		}
	}
	// The server believes another authority now, and shows the same certificate.
	now.Store(&Credentials{Certificate: server.Certificate, Roots: other.credentials("x").Roots})
	if code, resumed, err := ask(peer, "peer-1"); err == nil {
		t.Errorf("the server believes another authority: %d, resumed %v", code, resumed)
	}
	now.Store(server)
	if code, resumed, err := ask(peer, "peer-1"); err != nil || code != 200 || !resumed {
		t.Errorf("%d, resumed %v, %v", code, resumed, err)
	}
	// The client believes another authority now.
	if code, _, err := ask(&Credentials{Certificate: peer.Certificate, Roots: other.credentials("x").Roots}, "peer-1"); err == nil {
		t.Errorf("the client believes another authority: %d", code)
	}
	// Also credentials that say the same are others.
	now.Store(&Credentials{Certificate: server.Certificate, Roots: server.Roots})
	if code, resumed, err := ask(peer, "peer-1"); err != nil || code != 200 || resumed {
		t.Errorf("with other credentials: %d, resumed %v, %v", code, resumed, err)
	}
	now.Store(server)
	// A member resumes its sessions, too.
	y := open(t, secure(ca.credentials("host-2.example"), Options{Store: newTestStore(t, blockmap.CacheOptions{}), Join: []Seed{z.seed(t)}}))
	awaitMembers(t, 2, z, y)
	for i := range 3 {
		if _, err := y.client.Health(t.Context(), z.Name()); err != nil {
			t.Fatal(err)
		}
		y.client.transport.CloseIdleConnections()
		if _, ok := y.o.TLS().sessions.Get("host-1.example"); !ok {
			t.Errorf("no session after %d connections", i+1)
		}
	}
}

func TestNameInCertificate(t *testing.T) {
	ca := newAuthority(t)
	for _, c := range []struct{ names, host, want string }{
		{"a.example b.example", "", "a.example"}, {"a.example b.example", "b.example", "b.example"}, {"*.example a.example", "", "a.example"},
		{"*.example", "c.example", "c.example"}, {"*.example", "", ""}, {"a.example", "b.example", ""}, {"192.0.2.7", "", "192.0.2.7"}, {"192.0.2.7", "192.0.2.8", ""},
	} {
		got, err := ca.credentials(strings.Fields(c.names)...).nameIn(c.host)
		if got != c.want || (err != nil) != (c.want == "") {
			t.Errorf("%+v: %q, %v", c, got, err)
		}
	}
}

func TestReadCredentials(t *testing.T) {
	ca := newAuthority(t)
	cert, key := ca.issue("a.example")
	if _, err := ReadCredentials(cert, key, ca.ca()); err != nil {
		t.Error(err)
	}
	_, otherKey := ca.issue("b.example")
	empty := ca.write("empty.pem", "NOTHING", nil)
	for _, f := range [][3]string{{cert, otherKey, ca.ca()}, {"/none", key, ca.ca()}, {cert, key, "/none"}, {cert, key, empty}, {empty, key, ca.ca()}} {
		if _, err := ReadCredentials(f[0], f[1], f[2]); err == nil || !strings.Contains(err.Error(), "of the zone") {
			t.Errorf("%v: %v", f, err)
		}
	}
}

func TestReadSecrets(t *testing.T) {
	long := strings.Repeat("s", 40)
	for text, want := range map[string]int{
		"0123456789abcdef": 1, "0123456789abcdef\n": 1, long + "\n\n  " + long + "x \n": 2, "": -1, "\n": -1, "short": -1, long + "\nshort\n": -1,
		strings.Repeat(long+"\n", maxSecrets): maxSecrets, strings.Repeat(long+"\n", maxSecrets+1): -1, strings.Repeat("x", maxSecretFile+1): -1,
	} {
		path := t.TempDir() + "/secret"
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := ReadSecrets(path)
		if want < 0 && (err == nil || strings.Contains(err.Error(), "short\n")) || want > 0 && (err != nil || len(got) != want) {
			t.Errorf("%.30q: %d secrets, %v", text, len(got), err)
		}
	}
	a, err := gossipKeys("zone-1", func() ([]string, error) { return []string{long}, nil })
	b, _ := gossipKeys("zone-2", func() ([]string, error) { return []string{long}, nil })
	if err != nil || len(a) != 1 || len(a[0]) != 32 || bytes.Equal(a[0], b[0]) {
		t.Errorf("keys of two zones: %x, %x, %v", a, b, err)
	}
}

// A whole zone over TLS: the members get each other's chunks by the client of the zone.
func TestSecureMembers(t *testing.T) {
	ca := newAuthority(t)
	s1, s2 := newTestStore(t, blockmap.CacheOptions{}), newTestStore(t, blockmap.CacheOptions{})
	a := open(t, secure(ca.credentials("host-1.example"), Options{Store: s1}))
	b := open(t, secure(ca.credentials("host-2.example"), Options{Store: s2, Join: []Seed{a.seed(t)}}))
	awaitMembers(t, 2, a, b)
	body, err := b.client.Chunks(t.Context(), a.Name(), imageRef, ChunksAsk{Stream: s1.stream.ID(), Last: last, Size: int64(len(s1.part(0, last)))}, true)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if got, err := io.ReadAll(body); err != nil || !bytes.Equal(got, s1.part(0, last)) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	st := b.Ask(t.Context())
	if len(st.Peers) != 1 || st.Peers[0].Health == nil || st.Peers[0].Health.Version != "v1.2.3" || st.Alone || st.Members != 2 || !st.TLS {
		t.Errorf("%+v", st)
	}
	b.Close()
	await(t, "the other has left", func() bool { return a.Status().Alone })
}
