package zone

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"thaw/blockmap"
)

// last is the last chunk of the first run.
const last = RunChunks - 1

// An owner answers with what is asked for: from the registry once, and from what it has
// then. What it sends of a file is sent by the kernel.
func TestOwnerAnswers(t *testing.T) {
	for what, o := range map[string]blockmap.CacheOptions{"buffered": {}, "direct": {Mode: blockmap.Direct}} {
		s := newTestStore(t, o)
		z := open(t, Options{Store: s})
		for _, c := range []struct {
			first, last int
			source      string
		}{{0, last, "origin"}, {0, last, "memory"}, {last, last, "memory"}, {2*RunChunks - 1, 2*RunChunks - 1, "origin"}, {2 * RunChunks, 2*RunChunks + last, "origin"}, {2 * RunChunks, 2 * RunChunks, "memory"}} {
			code, body, header := get(t, z.chunksURL(s, c.first, c.last, ""))
			if code != 200 || !bytes.Equal(body, s.part(c.first, c.last)) {
				t.Errorf("%s: chunks %d to %d: %d, %d bytes: %.100q", what, c.first, c.last, code, len(body), body)
			}
			if got := header.Get("Thaw-Source"); got != c.source && (what == "buffered" || got == "origin" != (c.source == "origin")) {
				t.Errorf("%s: chunks %d to %d come from %s instead of %s", what, c.first, c.last, got, c.source)
			}
			if header.Get("Content-Length") != fmt.Sprint(len(body)) || header.Get("Content-Type") != "application/octet-stream" {
				t.Errorf("%s: %v", what, header)
			}
		}
		if n := s.fetched.Load(); n != 2*RunChunks+1 {
			t.Errorf("%s: %d chunks come from the registry instead of %d", what, n, 2*RunChunks+1)
		}
		st := z.status(t)
		// All bytes but none of the header's.
		if sent := z.listener.files.Load(); (sent > 0) != (what == "buffered") || sent > z.traffic.all.Load() {
			t.Errorf("%s: of %d bytes, the kernel has sent %d", what, z.traffic.all.Load(), sent)
		}
		if what == "buffered" && z.listener.files.Load() != z.traffic.all.Load() {
			t.Errorf("of %d bytes, the kernel has sent %d", z.traffic.all.Load(), z.listener.files.Load())
		}
		if st.Served != 6 || st.Sent != z.traffic.all.Load() || !st.Alone || st.Members != 1 {
			t.Errorf("%s: %+v", what, st)
		}
	}
}

// Pieces of blobs come from the registry once, and from memory then.
func TestPieces(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	blob := s.table.Blob
	b := s.image.Blobs[blob]
	end := min(int64(len(b)), PieceBytes)
	for i, source := range []string{"origin", "memory", "memory"} {
		code, body, header := get(t, z.pieceURL(blob, 0, end, ""))
		if code != 200 || !bytes.Equal(body, b[:end]) || header.Get("Thaw-Source") != source {
			t.Errorf("%d: %d, %d bytes, %s", i, code, len(body), header.Get("Thaw-Source"))
		}
	}
	if n := s.blobs.Load(); n != 1 {
		t.Errorf("the registry was asked %d times", n)
	}
	// Another repository may have another answer.
	other := strings.Replace(z.pieceURL(blob, 0, end, ""), "team/app", "team/other", 1)
	if code, _, _ := get(t, other); code != 404 {
		t.Errorf("a blob of another repository: %d", code)
	}
	if code, _, _ := get(t, z.pieceURL(blockmap.Digest{1}, 0, 100, "")); code != 404 {
		t.Errorf("a blob that does not exist: %d", code)
	}
}

// A blob of one piece is verified before it is passed on. It is asked for again then: the
// registry may have been wrong once.
func TestWrongPieceOfTheRegistry(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	small := []byte("a blob of one piece")
	of := blockmap.Digest(sha256.Sum256(small))
	wrong := bytes.Clone(small)
	wrong[3]++
	for i, sent := range [][]byte{wrong, small, wrong} {
		s.image.Blobs[of] = sent
		code, body, _ := get(t, z.pieceURL(of, 0, int64(len(small)), ""))
		if want := []int{502, 200, 200}[i]; code != want || want == 200 && !bytes.Equal(body, small) {
			t.Errorf("%d: %d %q", i, code, body)
		}
	}
}

// An owner that refers a peer to others fetches the run all the same: the others may be
// waiting for this host, which may be waiting for the peer.
func TestOwnerFetchesForThoseItRefers(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	z.disown()
	ended := s.flight(0)
	defer ended()
	// Two members wait for this host as for a holder, for HolderTime. They have all slots.
	run := Run{Of: s.stream.ID()}
	for i := range 2 {
		if serve, _ := z.grants.Ask(run, fmt.Sprint("holder-", i), time.Now()); !serve {
			t.Fatalf("holder %d has no slot", i)
		}
		defer z.grants.Done(run, fmt.Sprint("holder-", i), false, time.Now())
	}
	code, _, header := get(t, z.chunksURL(s, 0, 0, "&origin=1"))
	if code != 503 || header.Get("Thaw-Holders") == "" {
		t.Fatalf("%d, holders %q", code, header.Get("Thaw-Holders"))
	}
	await(t, "the owner fetches the chunk", func() bool { return s.stream.Has(0) })
	if n := s.fetched.Load(); n != 1 {
		t.Errorf("%d chunks from the registry", n)
	}
}

// While the registry is slow, who waits for it is told that the owner is alive. A failure
// of the registry is one of the registry.
func TestSlowRegistry(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	// Also while the index of the image comes.
	opened := make(chan struct{})
	s.opening.Store(&opened)
	signed := make(chan struct{}, 10)
	opens := make(chan int)
	go func() {
		code, _ := getSigned(t, z.chunksURL(s, 4*RunChunks, 4*RunChunks, ""), func() { signed <- struct{}{} })
		opens <- code
	}()
	select {
	case <-signed:
	case <-time.After(time.Minute):
		t.Fatal("no sign of life while the image is opened")
	}
	close(opened)
	if code := <-opens; code != 200 {
		t.Errorf("%d", code)
	}
	unblock := s.block()
	var signs int
	type answer struct {
		code int
		body []byte
	}
	got := make(chan answer, 1)
	signed = make(chan struct{}, 10)
	go func() {
		code, body := getSigned(t, z.chunksURL(s, 0, 0, ""), func() {
			signs++
			signed <- struct{}{}
		})
		got <- answer{code, body}
	}()
	for range 2 {
		select {
		case <-signed:
		case <-time.After(time.Minute):
			t.Fatal("no sign of life")
		}
	}
	unblock()
	if a := <-got; a.code != 200 || !bytes.Equal(a.body, s.part(0, 0)) {
		t.Errorf("%d, %d bytes", a.code, len(a.body))
	}
	s.fail(errRegistry)
	if code, body, _ := get(t, z.chunksURL(s, 2*RunChunks, 2*RunChunks, "")); code != 502 || !strings.Contains(string(body), errRegistry.Error()) {
		t.Errorf("the registry fails: %d %s", code, body)
	}
	if code, body, _ := get(t, z.pieceURL(s.table.Blob, 0, s.firstPiece(), "")); code != 502 {
		t.Errorf("the registry fails: %d %s", code, body)
	}
}

// A member that does not own a run answers with what it has, and waits a moment for what it
// is getting. It fetches nothing for others.
func TestHolderAnswers(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	z.disown()
	if code, body, _ := get(t, z.chunksURL(s, 0, last, "")); code != 404 {
		t.Errorf("what is not here: %d %s", code, body)
	}
	s.fill(0)
	if code, body, _ := get(t, z.chunksURL(s, 0, 0, "")); code != 200 || !bytes.Equal(body, s.part(0, 0)) {
		t.Errorf("what is here: %d", code)
	}
	n := s.fetched.Load()
	const at = 2 * RunChunks
	ended := s.flight(at)
	var uploads int
	s.mu.Lock()
	s.waited = sync.OnceFunc(func() { // it comes when the peer waits, and not HolderTime later
		uploads = z.grants.Uploads(Run{s.stream.ID(), 2})
		s.fill(at)
		ended()
	})
	s.mu.Unlock()
	if code, _, _ := get(t, z.chunksURL(s, at, at, "")); code != 200 || uploads != 1 {
		t.Errorf("what comes meanwhile: %d, %d uploads", code, uploads)
	}
	// A fetch that does not end costs a peer one short wait.
	s.flight(at + RunChunks)
	began := time.Now()
	if code, _, _ := get(t, z.chunksURL(s, at+RunChunks, at+RunChunks, "")); code != 404 || time.Since(began) > 10*HolderTime {
		t.Errorf("what does not come: %d after %v", code, time.Since(began))
	}
	if s.fetched.Load() != n+1 {
		t.Error("a member has fetched for others what it does not own")
	}
	// A peer whose ring says otherwise.
	if code, _, _ := get(t, z.chunksURL(s, RunChunks, RunChunks, "&origin=1")); code != 200 {
		t.Errorf("as an owner: %d", code)
	}
	if code, _, _ := get(t, z.pieceURL(s.table.Blob, 0, s.firstPiece(), "")); code != 404 {
		t.Errorf("a piece that is not here: %d", code)
	}
	if code, _, _ := get(t, z.pieceURL(s.table.Blob, 0, s.firstPiece(), "&origin=1")); code != 200 {
		t.Errorf("a piece as an owner: %d", code)
	}
	if code, _, _ := get(t, z.pieceURL(s.table.Blob, 0, s.firstPiece(), "")); code != 200 {
		t.Errorf("a piece that is here: %d", code)
	}
}

// An owner whose slots for a run are taken names those who have it.
func TestServerRefers(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s, Grants: GrantOptions{Slots: 2}})
	unblock := s.block()
	got := make(chan int, 2)
	for i := range 2 {
		go func() {
			code, _, _ := get(t, strings.Replace(z.chunksURL(s, 0, last, ""), "peer-1", fmt.Sprintf("peer-%d", i+1), 1))
			got <- code
		}()
	}
	await(t, "both slots are taken", func() bool { return z.grants.Uploads(Run{s.stream.ID(), 0}) == 2 })
	code, _, header := get(t, strings.Replace(z.chunksURL(s, 0, last, ""), "peer-1", "peer-3", 1))
	if names := ParseHolders(header.Get("Thaw-Holders")); code != 503 || len(names) != 2 || !strings.HasPrefix(names[0], "peer-") || header.Get("Retry-After") == "" {
		t.Errorf("%d, %v", code, header)
	}
	// Other runs have other slots.
	unblock()
	for range 2 {
		if code := <-got; code != 200 {
			t.Errorf("%d", code)
		}
	}
	if code, _, _ := get(t, z.chunksURL(s, 2*RunChunks, 2*RunChunks, "")); code != 200 {
		t.Errorf("another run: %d", code)
	}
	if st := z.status(t); st.Referred != 1 {
		t.Errorf("%+v", st)
	}
}

// What a host does not have, and does not open, is not to be had from it.
func TestAbsent(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	chunks := len(s.table.Chunks)
	for _, url := range []string{
		z.chunksURL(s, chunks, chunks, ""), z.chunksURL(s, 1<<30, 1<<30, ""),
		strings.Replace(z.chunksURL(s, 0, 0, ""), s.stream.ID().String(), strings.Repeat("ab", 32), 1),
		strings.Replace(z.chunksURL(s, 0, 0, ""), "team/app", "team/secret", 1),
	} {
		if code, body, _ := get(t, url); code != 404 || len(body) == 0 || len(body) > maxRefusal+10 {
			t.Errorf("%s: %d %s", url, code, body)
		}
	}
	s.mu.Lock()
	s.absent = true
	s.mu.Unlock()
	if code, _, _ := get(t, z.chunksURL(s, 0, 0, "&origin=1")); code != 404 {
		t.Errorf("an image that the host does not open: %d", code)
	}
	if s.fetched.Load() != 0 {
		t.Error("something was fetched")
	}
}

// A file of the cache that another program cuts short is no answer, and is fetched again.
func TestCutFile(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	if code, _, _ := get(t, z.chunksURL(s, 0, last, "")); code != 200 {
		t.Fatalf("%d", code)
	}
	cutFiles(t, s)
	code, body, header := get(t, z.chunksURL(s, 0, last, ""))
	if code != 200 || !bytes.Equal(body, s.part(0, last)) || header.Get("Thaw-Source") != "origin" {
		t.Errorf("after the file was cut short: %d, %d bytes from %s", code, len(body), header.Get("Thaw-Source"))
	}
}

func TestHealth(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	get(t, z.chunksURL(s, 0, 0, ""))
	z.status(t)
	code, body, header := get(t, fmt.Sprintf("http://%s/v1/health?zone=%s&from=peer-1", z.Addr(), testZone))
	want := fmt.Sprintf(`{"name":"%s","zone":"zone-1","version":"v1.2.3","uploads":0,"sent_bytes":%d}`+"\n", z.Name(), len(s.part(0, 0)))
	if code != 200 || string(body) != want || header.Get("Content-Type") != "application/json" {
		t.Errorf("%d %s instead of %s", code, body, want)
	}
}

// Without TLS a zone is one of this machine.
func TestLoopbackOnly(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	for _, listen := range []string{":0", "0.0.0.0:0", "[::]:0", "192.0.2.1:0", "not a host:0", "127.0.0.1", ""} {
		z, err := Open(t.Context(), Options{Zone: testZone, Listen: listen, Store: s})
		if err == nil {
			z.Close()
			t.Errorf("%q: it listens without TLS", listen)
		} else if strings.HasSuffix(listen, ":0") && listen != "not a host:0" && !strings.Contains(err.Error(), "--zone-cert") {
			t.Errorf("%q: %v", listen, err)
		}
	}
	if _, err := Open(t.Context(), Options{Zone: "a zone", Listen: "127.0.0.1:0", Store: s}); err == nil {
		t.Error("a zone with a name that is none")
	}
	c := newAuthority(t).credentials("host-1.example")
	if _, err := Open(t.Context(), Options{Zone: testZone, Listen: "127.0.0.1:0", Store: s, TLS: func() *Credentials { return c }}); err == nil || !strings.Contains(err.Error(), "--zone-secret") {
		t.Errorf("TLS without a secret: %v", err)
	}
	z := open(t, Options{Store: s})
	_, err := z.gossip.DialAddressTimeout(address("192.0.2.1:7946"), time.Second)
	_, sendErr := z.gossip.WriteTo([]byte("x"), "192.0.2.1:7946")
	if err != errExposed || sendErr != errExposed {
		t.Errorf("gossip with another host: %v, %v", err, sendErr)
	}
}

// The records of TLS of a leaf leave in one write, in their order, and so do those of a larger
// body in few.
func TestWritesTogether(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	received := make(chan []byte)
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b, _ := io.ReadAll(c)
		received <- b
	}()
	to, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := &conn{TCPConn: to.(*net.TCPConn)}
	var want []byte
	write := func(n int, together bool) {
		t.Helper()
		p := bytes.Repeat([]byte{byte(len(want)/1000 + 1)}, n)
		if m, err := c.Write(p); m != n || err != nil {
			t.Errorf("%d of %d bytes: %v", m, n, err)
		}
		want = append(want, p...)
		if gathers := c.gather.bytes != nil; gathers != together || gathers && n <= gathered && len(*c.gather.bytes) < n {
			t.Errorf("%d bytes are not gathered", n)
		}
	}
	write(10, false)
	failed := errors.New("failed")
	for _, sizes := range [][]int{{100}, {16 << 10, 16 << 10, 16 << 10, 16 << 10, 2000}, {gathered, 1, gathered + 1, 5}, nil} {
		if err := c.together(func() error {
			for _, n := range sizes {
				write(n, true)
			}
			return failed
		}); !errors.Is(err, failed) {
			t.Error(err)
		}
		write(7, false)
	}
	to.Close()
	if got := <-received; !bytes.Equal(got, want) {
		t.Errorf("%d bytes arrive, in place of %d", len(got), len(want))
	}
	if err := c.together(func() error { _, err := c.Write([]byte("x")); return err }); err == nil {
		t.Error("a write to a connection that is closed has no error")
	}
}

// BenchmarkUpload sends runs that are in memory to a client that discards them.
func BenchmarkUpload(b *testing.B) {
	for _, secured := range []bool{false, true} {
		b.Run(map[bool]string{false: "plain", true: "tls"}[secured], func(b *testing.B) {
			s := newTestStore(b, blockmap.CacheOptions{})
			o, client := Options{Store: s, Grants: GrantOptions{Slots: 1 << 20}}, http.DefaultClient
			if secured {
				ca := newAuthority(b)
				o, client = secure(ca.credentials("host-1.example"), o), as(ca.credentials("peer-1"), "host-1.example")
			}
			z := open(b, o)
			url := z.chunksURL(s, 0, last, "")
			if secured {
				url = strings.Replace(url, "http:", "https:", 1)
			}
			b.SetBytes(int64(len(s.part(0, last))))
			for b.Loop() {
				ctx, cancel := context.WithTimeout(b.Context(), 10*time.Second)
				if err := discard(ctx, client, url); err != nil {
					b.Fatal(err)
				}
				cancel()
			}
			client.CloseIdleConnections()
		})
	}
}
