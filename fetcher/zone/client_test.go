package zone

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"thaw/blockmap"
)

// peerServer is a peer named "peer", and a client that asks it.
func peerServer(t *testing.T, o ClientOptions, handler http.HandlerFunc) *Client {
	t.Helper()
	srv := httptest.NewServer(handler)
	t.Cleanup(srv.Close)
	return clientOf(t, o, srv.Listener.Addr().String())
}

func clientOf(t *testing.T, o ClientOptions, addr string) *Client {
	o.Self, o.Zone = "self", "blue"
	o.Address = func(peer string) (string, bool) { return addr, peer == "peer" }
	// No peer that works exceeds these, however busy the machine is.
	o.Dial, o.FirstSign, o.Answer = cmp.Or(o.Dial, time.Minute), cmp.Or(o.FirstSign, time.Minute), cmp.Or(o.Answer, time.Minute)
	o.Stall, o.Body = cmp.Or(o.Stall, time.Minute), cmp.Or(o.Body, time.Minute)
	c := NewClient(o)
	t.Cleanup(c.Close)
	return c
}

const testImage = "registry.example/team/app@sha256:abc"

func askChunks(t *testing.T, c *Client, n int64) (*Body, error) {
	t.Helper()
	return c.Chunks(t.Context(), "peer", testImage, ChunksAsk{Stream: blockmap.Digest{1}, First: 4, Last: 6, Size: n}, true)
}

// outcome returns the outcome of a failed request.
func outcome(t *testing.T, err error) Outcome {
	t.Helper()
	var failed *PeerError
	if !errors.As(err, &failed) || failed.Peer != "peer" {
		t.Fatalf("got %v", err)
	}
	return failed.Outcome
}

// ends records the outcomes that a body reports.
func ends(b *Body) *[]Outcome {
	all := new([]Outcome)
	b.ended = func(o Outcome) { *all = append(*all, o) }
	b.wrong = func() { *all = append(*all, Outcome{Result: Wrong}) }
	return all
}

func TestClient(t *testing.T) {
	var seen atomic.Pointer[http.Request]
	c := peerServer(t, ClientOptions{}, func(w http.ResponseWriter, r *http.Request) {
		seen.Store(r)
		fmt.Fprint(w, "hello")
	})
	b, err := askChunks(t, c, 5)
	if err != nil {
		t.Fatal(err)
	}
	all := ends(b)
	if got, err := io.ReadAll(b); err != nil || string(got) != "hello" || b.Source() != "peer" {
		t.Errorf("got %q from %s: %v", got, b.Source(), err)
	}
	b.Close()
	if len(*all) != 1 || (*all)[0].Result != Served || (*all)[0].Bytes != 5 || (*all)[0].Took <= 0 {
		t.Errorf("it ended with %+v", *all)
	}
	b.Distrust()
	b.Distrust()
	if len(*all) != 2 || (*all)[1].Result != Wrong {
		t.Errorf("it ended with %+v", *all)
	}
	r := seen.Load()
	if r.Method != "GET" || r.URL.Path != fmt.Sprintf("/v1/streams/%s/chunks/4-6", blockmap.Digest{1}) {
		t.Errorf("%s %s", r.Method, r.URL)
	}
	q := r.URL.Query()
	if q.Get("image") != testImage || q.Get("zone") != "blue" || q.Get("from") != "self" || q.Get("origin") != "1" {
		t.Errorf("%v", q)
	}
	b, err = c.Piece(t.Context(), "peer", testImage, blockmap.Digest{2}, 1<<20, 5, false)
	if err != nil {
		t.Fatal(err)
	}
	all = ends(b)
	b.Distrust()
	b.Close()
	if len(*all) != 1 || (*all)[0].Result != Wrong {
		t.Errorf("it ended with %+v", *all)
	}
	if r := seen.Load(); r.URL.Path != fmt.Sprintf("/v1/blobs/%s/1048576-1048581", blockmap.Digest{2}) || r.URL.Query().Has("origin") {
		t.Errorf("%s", r.URL)
	}
	if p, err := c.Health(t.Context(), "peer"); err != nil || string(p) != "hello" {
		t.Errorf("health is %q: %v", p, err)
	}
}

// Connections are reused.
func TestKeepAlive(t *testing.T) {
	var conns atomic.Int64
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello") }))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			conns.Add(1)
		}
	}
	srv.Start()
	defer srv.Close()
	c := clientOf(t, ClientOptions{}, srv.Listener.Addr().String())
	for range 10 {
		b, err := askChunks(t, c, 5)
		if err != nil {
			t.Fatal(err)
		}
		io.ReadAll(b)
		b.Close()
	}
	if n := conns.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// What a peer answers instead of bytes.
func TestRefusals(t *testing.T) {
	for code, want := range map[int]Outcome{
		404: {Result: Absent}, 502: {Result: Absent}, 403: {Result: Refused}, 500: {Result: Broken}, 206: {Result: Broken}, 302: {Result: Broken},
		503: {Result: Busy, RetryAfter: 7 * time.Second, Holders: []string{"a", "b"}},
	} {
		c := peerServer(t, ClientOptions{}, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", "7")
			w.Header().Set("Thaw-Holders", "a, b")
			w.Header().Set("Location", "http://elsewhere.example/")
			w.WriteHeader(code)
			fmt.Fprintf(w, "because\x1b[2J%s", strings.Repeat("x", 10000))
		})
		_, err := askChunks(t, c, 5)
		got := outcome(t, err)
		if got.Result != want.Result || got.RetryAfter != want.RetryAfter || !slices.Equal(got.Holders, want.Holders) {
			t.Errorf("%d: %+v", code, got)
		}
		if text := err.Error(); strings.Contains(text, "\x1b") || len(text) > 700 || !strings.Contains(text, "because") {
			t.Errorf("%d: %q", code, text)
		}
	}
}

// A peer that refuses, and does not send the text that says why, or another protocol, holds
// up nobody: what it has said counts.
func TestRefusalsWithoutTheirText(t *testing.T) {
	for code, want := range map[int]Result{404: Absent, 503: Busy, 403: Refused, 500: Broken, 206: Broken, 101: Broken} {
		c := peerServer(t, ClientOptions{}, func(w http.ResponseWriter, r *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			fmt.Fprintf(conn, "HTTP/1.1 %d X\r\nConnection: upgrade\r\nUpgrade: x\r\n", code)
			if code != 101 {
				fmt.Fprintf(conn, "Content-Length: 100\r\n")
			}
			fmt.Fprintf(conn, "\r\nbeca")
			_, _ = io.Copy(io.Discard, conn) // until the client closes the connection
		})
		began := time.Now()
		_, err := askChunks(t, c, 5)
		if got := outcome(t, err); got.Result != want {
			t.Errorf("%d: %+v", code, got)
		}
		if took := time.Since(began); took > 20*time.Second { // the bound is textTime
			t.Errorf("%d: %v", code, took)
		}
	}
}

// A peer that sends signs of life as fast as it can is given up, before they keep a
// processor busy until AnswerTime.
func TestTooManySigns(t *testing.T) {
	for _, code := range []int{102, 103} {
		sent := make(chan int, 1)
		c := peerServer(t, ClientOptions{}, func(w http.ResponseWriter, r *http.Request) {
			n := 0
			for ; r.Context().Err() == nil; n++ {
				w.WriteHeader(code)
			}
			sent <- n
		})
		_, err := askChunks(t, c, 5)
		if o := outcome(t, err); o.Result != Broken || !errors.Is(err, errSigns) {
			t.Errorf("%d: %v, %+v", code, err, o)
		}
		if n := <-sent; n < maxSigns {
			t.Errorf("%d: given up after %d", code, n)
		}
	}
}

// Hostile header fields.
func TestHostileHeaders(t *testing.T) {
	for field, want := range map[string]time.Duration{"": 0, "-1": 0, "99999999999999999999": 0, "x": 0, " 3 ": 3 * time.Second, "Wed, 21 Oct 2015 07:28:00 GMT": 0} {
		if got := retryAfter(field); got != want {
			t.Errorf("%q: %v", field, got)
		}
	}
	c := peerServer(t, ClientOptions{}, func(w http.ResponseWriter, r *http.Request) {
		for i := range 100 {
			w.Header().Set(fmt.Sprintf("X-%d", i), strings.Repeat("x", 1000))
		}
		fmt.Fprint(w, "hello")
	})
	if _, err := askChunks(t, c, 5); outcome(t, err).Result != Broken {
		t.Errorf("got %v", err)
	}
}

// A peer cannot make the client read more, or less, than was asked for.
func TestWrongLengths(t *testing.T) {
	for name, answer := range map[string]http.HandlerFunc{
		"too short": func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hell") },
		"too long":  func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello!") },
		"huge": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "9223372036854775807")
			fmt.Fprint(w, "hello")
		},
		"not said": func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			fmt.Fprint(w, "hello")
		},
		"compressed": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			fmt.Fprint(w, "hello")
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := peerServer(t, ClientOptions{}, answer)
			if _, err := askChunks(t, c, 5); outcome(t, err).Result != Broken {
				t.Errorf("got %v", err)
			}
		})
	}
	c := peerServer(t, ClientOptions{}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "5")
		fmt.Fprint(w, "he")
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	b, err := askChunks(t, c, 5)
	if err != nil {
		t.Fatal(err)
	}
	all := ends(b)
	_, err = io.ReadAll(b)
	b.Close()
	if outcome(t, err).Result != Broken || !errors.Is(err, io.ErrUnexpectedEOF) || len(*all) != 1 || (*all)[0].Result != Broken || (*all)[0].Bytes != 2 {
		t.Errorf("got %v, and it ended with %+v", err, *all)
	}
	c = peerServer(t, ClientOptions{}, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, strings.Repeat("x", 100<<10)) })
	if _, err := c.Health(t.Context(), "peer"); err == nil {
		t.Error("a health of 100 KB was read")
	}
}

// A peer that does not answer costs one short timeout, however it hangs.
func TestStalls(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	o := ClientOptions{FirstSign: 50 * time.Millisecond, Answer: 300 * time.Millisecond, Stall: 50 * time.Millisecond, Body: 300 * time.Millisecond}
	for name, c := range map[string]*Client{
		"no answer": clientOf(t, o, silent.Addr().String()),
		"signs only": peerServer(t, o, func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				w.WriteHeader(http.StatusProcessing)
				select {
				case <-time.After(10 * time.Millisecond):
				case <-r.Context().Done():
				}
			}
		}),
		"no bytes": peerServer(t, o, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000000")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}),
		"trickles": peerServer(t, o, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000000")
			for r.Context().Err() == nil {
				w.Write([]byte("x"))
				w.(http.Flusher).Flush()
				select {
				case <-time.After(5 * time.Millisecond):
				case <-r.Context().Done():
				}
			}
		}),
		"just fast enough for a moment": peerServer(t, o, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000000000")
			for r.Context().Err() == nil {
				w.Write(make([]byte, 64<<10))
				w.(http.Flusher).Flush()
				select {
				case <-time.After(20 * time.Millisecond):
				case <-r.Context().Done():
				}
			}
		}),
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			n := int64(1000000)
			if name[0] == 'j' {
				n = 1000000000
			}
			b, err := askChunks(t, c, n)
			if err == nil {
				all := ends(b)
				_, err = io.Copy(io.Discard, b)
				b.Close()
				if len(*all) != 1 || (*all)[0].Result != Late {
					t.Errorf("it ended with %+v", *all)
				}
			}
			if outcome(t, err).Result != Late {
				t.Errorf("got %v", err)
			}
			if took := time.Since(began); took > 30*time.Second { // the bounds are below 1 s
				t.Errorf("it took %v", took)
			}
		})
	}
}

// A sign that the answer will come extends the wait for it.
func TestSigns(t *testing.T) {
	c := peerServer(t, ClientOptions{FirstSign: 2 * time.Second, Answer: time.Minute}, func(w http.ResponseWriter, r *http.Request) {
		for range 10 {
			w.WriteHeader(http.StatusProcessing)
			time.Sleep(250 * time.Millisecond)
		}
		fmt.Fprint(w, "hello")
	})
	b, err := askChunks(t, c, 5)
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
}

// A caller that pauses between reads is not taken for a peer that stalls.
func TestPausesOfTheCaller(t *testing.T) {
	c := peerServer(t, ClientOptions{Stall: time.Second}, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello") })
	b, err := askChunks(t, c, 5)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := io.ReadFull(b, make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1500 * time.Millisecond)
	if _, err := io.ReadFull(b, make([]byte, 3)); err != nil {
		t.Error(err)
	}
}

// A request ends with its context, and says nothing about the peer then.
func TestCancel(t *testing.T) {
	asked := make(chan bool, 2)
	c := peerServer(t, ClientOptions{}, func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/v1/blobs") {
			w.Header().Set("Content-Length", "5")
			w.(http.Flusher).Flush()
		}
		asked <- true
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	_, err := c.Chunks(ctx, "peer", testImage, ChunksAsk{Size: 5}, false)
	if outcome(t, err).Result != Cancelled || !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	b, err := c.Piece(ctx, "peer", testImage, blockmap.Digest{}, 0, 5, false)
	if err != nil {
		t.Fatal(err)
	}
	go func() { <-asked; cancel() }()
	all := ends(b)
	if _, err = io.ReadAll(b); outcome(t, err).Result != Cancelled {
		t.Errorf("got %v", err)
	}
	b.Close()
	if len(*all) != 1 || (*all)[0].Result != Cancelled {
		t.Errorf("it ended with %+v", *all)
	}
}

// Nothing is sent to hosts that are no members, and without TLS to no other host.
func TestAddresses(t *testing.T) {
	c := clientOf(t, ClientOptions{}, "127.0.0.1:1")
	for _, peer := range []string{"stranger", "", "peer\r\nX: y", strings.Repeat("a", 300)} {
		if _, err := c.Chunks(t.Context(), peer, testImage, ChunksAsk{Size: 5}, false); err == nil {
			t.Errorf("%.20q was asked", peer)
		}
	}
	for _, addr := range []string{"192.0.2.1:80", "example.com:80", "[2001:db8::1]:80", "0.0.0.0:80", "localhost.example.com:80", "nonsense"} {
		c := clientOf(t, ClientOptions{Dial: 50 * time.Millisecond}, addr)
		_, err := askChunks(t, c, 5)
		if outcome(t, err).Result != Broken || addr != "nonsense" && !strings.Contains(err.Error(), "loopback") {
			t.Errorf("%s: %v", addr, err)
		}
	}
	refuses, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refuses.Close()
	if _, err := askChunks(t, clientOf(t, ClientOptions{}, refuses.Addr().String()), 5); outcome(t, err).Result != Broken {
		t.Errorf("got %v", err)
	}
}

// certificate makes a certificate for a name.
func certificate(t *testing.T, name string) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	raw, err := x509.CreateCertificate(crand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(raw)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(parsed)
	return tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key}, pool
}

// With TLS it keeps its connection, and only speaks to who has the peer's name.
func TestTLS(t *testing.T) {
	for _, name := range []string{"peer", "impostor"} {
		cert, pool := certificate(t, name)
		var conns atomic.Int64
		srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusProcessing)
			fmt.Fprint(w, r.Proto)
		}))
		srv.EnableHTTP2 = true // the client does not take it
		srv.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
		srv.Config.ErrorLog = nil
		srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
			if s == http.StateNew {
				conns.Add(1)
			}
		}
		srv.StartTLS()
		defer srv.Close()
		c := clientOf(t, ClientOptions{TLS: func(peer string) *tls.Config { return &tls.Config{RootCAs: pool, ServerName: peer} }},
			srv.Listener.Addr().String())
		for range 5 {
			b, err := askChunks(t, c, 8)
			if name != "peer" {
				if o := outcome(t, err); o.Result != Refused {
					t.Errorf("got %v, %+v", err, o)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(b); string(got) != "HTTP/1.1" || err != nil {
				t.Errorf("got %q: %v", got, err)
			}
			b.Close()
		}
		if n := conns.Load(); name == "peer" && n != 1 {
			t.Errorf("%d connections", n)
		}
	}
}

// FuzzAnswer has a peer send any bytes as its answer.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nThaw-Form: stored\r\nContent-Length: 3\r\n\r\nhel"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nThaw-Form: leaves\r\nContent-Length: 37\r\n\r\n" + strings.Repeat("x", 37)))
	f.Add([]byte("HTTP/1.1 200 OK\r\nThaw-Form: leaves, stored\r\nContent-Length: 40\r\n\r\n" + strings.Repeat("x", 40)))
	f.Add([]byte("HTTP/1.1 200 OK\r\nThaw-Form: stored\r\nThaw-Form: stored\r\nContent-Length: 3\r\n\r\nhel"))
	f.Add([]byte("HTTP/1.1 503 Busy\r\nThaw-Holders: a,b\r\nRetry-After: 3\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 102 Wait\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { l.Close() })
	var answer atomic.Pointer[[]byte]
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 4096))
			conn.Write(*answer.Load())
			conn.Close()
		}
	}()
	f.Fuzz(func(t *testing.T, p []byte) {
		answer.Store(&p)
		c := clientOf(t, ClientOptions{}, l.Addr().String())
		b, err := c.Chunks(t.Context(), "peer", testImage, ChunksAsk{Size: 5, Stored: 3, Leaves: 1}, true)
		if err != nil {
			if o := outcome(t, err); o.Result == Served || len(o.Holders) > maxHolders || o.RetryAfter < 0 {
				t.Fatalf("%+v", o)
			}
			return
		}
		all := ends(b)
		got, err := io.ReadAll(b)
		b.Close()
		want := map[form]int{{}: 5, {stored: true}: 3, {leaves: true}: 32 + 5, {stored: true, leaves: true}: 32 + 5 + 3}[b.form]
		if err == nil && len(got) != want || len(got) > want || len(*all) != 1 || ((*all)[0].Result == Served) != (err == nil) {
			t.Fatalf("%q, %v, %+v", got, err, *all)
		}
	})
}
