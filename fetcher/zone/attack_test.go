package zone

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"thaw/blockmap"
)

// dial connects to the server.
func (z *Zone) dial(t testing.TB) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", z.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// say sends bytes, and returns the code of the answer, or "closed".
func (z *Zone) say(t testing.TB, request string) string {
	t.Helper()
	c := z.dial(t)
	defer c.Close()
	go io.WriteString(c, request)
	c.SetReadDeadline(time.Now().Add(time.Minute))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "closed"
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Errorf("%.60q: %v", request, err)
	}
	if resp.StatusCode != 200 && len(body) > maxRefusal+20 {
		t.Errorf("%.60q: a refusal of %d bytes", request, len(body))
	}
	return fmt.Sprint(resp.StatusCode)
}

// Whatever a peer says, it gets a short answer, and the server goes on.
func TestHostileRequests(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	id := s.stream.ID().String()
	query := "?image=" + imageRef + "&zone=" + testZone + "&from=peer-1"
	chunks := "/v1/streams/" + id + "/chunks/"
	run := fmt.Sprintf("0-%d", last)
	blob := "/v1/blobs/" + s.table.Blob.String() + "/"
	piece := fmt.Sprint("0-", s.firstPiece())
	request := func(target string) string { return "GET " + target + " HTTP/1.1\r\nHost: zone\r\n\r\n" }
	for _, c := range []struct{ want, request string }{
		{"200", request(chunks + run + query)},
		{"200", request(blob + piece + query)},
		{"200", request("/v1/health" + query)},
		{"405", "POST " + chunks + run + query + " HTTP/1.1\r\nHost: zone\r\nContent-Length: 0\r\n\r\n"},
		{"405", "PUT " + blob + piece + query + " HTTP/1.1\r\nHost: zone\r\nContent-Length: 9\r\n\r\nnew bytes"},
		{"405", "DELETE " + chunks + run + query + " HTTP/1.1\r\nHost: zone\r\n\r\n"},
		{"405", "OPTIONS * HTTP/1.1\r\nHost: zone\r\n\r\n"},
		{"405", "CONNECT zone:80 HTTP/1.1\r\nHost: zone\r\n\r\n"},
		{"400", "GET " + chunks + run + query + " HTTP/1.1\r\nHost: zone\r\nContent-Length: 1000000\r\n\r\nx"},
		{"400", "GET " + chunks + run + query + " HTTP/1.1\r\nHost: zone\r\nTransfer-Encoding: chunked\r\n\r\n"},
		{"431", "GET /" + " HTTP/1.1\r\nHost: zone\r\nX: " + strings.Repeat("x", 20<<10) + "\r\n\r\n"},
		{"431", request("/" + strings.Repeat("x", 20<<10))},
		{"414", request("/v1/streams/" + strings.Repeat("x", 1000) + query)},
		{"400", request(chunks + run + query + "&image=" + imageRef)},
		{"400", request(chunks + run + query + "&from=peer-2")},
		{"400", request(chunks + run + "?" + strings.Repeat("a&", 3000) + "%zz")},
		{"400", request(chunks + run + query + "&origin=yes")},
		{"400", request(chunks + run + "?zone=" + testZone + "&image=" + imageRef)},
		{"400", request(chunks + run + "?zone=" + testZone + "&from=a%0ab&image=" + imageRef)},
		{"400", request(chunks + run + "?zone=" + testZone + "&from=" + strings.Repeat("a", 254) + "&image=" + imageRef)},
		{"400", request(chunks + run + "?zone=" + testZone + "&from=peer-1&image=registry.example/app:v1")},
		{"400", request(chunks + run + "?zone=" + testZone + "&from=peer-1&image=@sha256:" + strings.Repeat("a", 64))},
		{"400", request(chunks + run + "?zone=" + testZone + "&from=peer-1&image=a/b%0d%0aX:%20y@sha256:" + strings.Repeat("a", 64))},
		{"400", request(chunks + run + "?zone=" + testZone + "&from=peer-1&image=a/" + strings.Repeat("b", 600) + "@sha256:" + strings.Repeat("a", 64))},
		{"403", request(chunks + run + "?zone=another&from=peer-1&image=" + imageRef)},
		{"403", request("/v1/health?from=peer-1")},
		{"400", request("/v1/health?zone=" + testZone)},
		{"400", request(chunks + fmt.Sprintf("0-%d", RunChunks) + query)},
		{"400", request(chunks + "3-0" + query)},
		{"400", request(chunks + "0" + query)},
		{"400", request(chunks + "-1" + query)},
		{"400", request(chunks + "0-03" + query)},
		{"400", request(chunks + "+0-3" + query)},
		{"400", request(chunks + "0-99999999999999999999" + query)},
		{"400", request(chunks + "4294967296-4294967297" + query)},
		{"400", request(chunks + "0-1" + query + "&leaves=0-0")},
		{"400", request(chunks + "0-0" + query + "&leaves=0-64")},
		{"400", request(chunks + "0-0" + query + "&leaves=1-0")},
		{"400", request(chunks + "0-0" + query + "&leaves=x")},
		{"400", request(chunks + "0-0" + query + "&stored=0")},
		{"400", request(chunks + "0-0" + query + "&stored=-1")},
		{"400", request(chunks + "0-0" + query + "&stored=1&stored=1")},
		{"400", request(chunks + "0-0" + query + "&stored=8388609")},
		{"400", request(chunks + "0-0" + query + "&stored=01")},
		{"400", request(chunks + "0-1" + query + "&stored=1")},
		{"400", request("/v1/streams/" + strings.ToUpper(id[:10]) + "/chunks/" + run + query)},
		{"400", request("/v1/streams/../chunks/" + run + query)},
		{"404", request("/v1/streams/" + id + "/chunks/" + run + "/" + query)},
		{"404", request("/v1/streams/" + id + "/table/" + run + query)},
		{"404", request("/v1/streams/" + query)},
		{"404", request("/v1/blobs/" + query)},
		{"404", request("/")},
		{"404", request("/v1/../v1/health" + query)},
		{"404", request("//v1/health" + query)},
		{"400", request(blob + "0-0" + query)},
		{"400", request(blob + "1-4096" + query)},
		{"400", request(blob + "0-1048577" + query)},
		{"400", request(blob + "1048576-1048575" + query)},
		{"400", request(blob + "9007199254740992000-9007199254740992001" + query)},
		{"400", request(blob + "-4096" + query)},
		{"400", request("/v1/blobs/sha512:" + id + "/0-4096" + query)},
		{"400", "\x00\x01\x02\r\n\r\n"},
		{"400", "GET " + chunks + " HTTP/1.1\r\n\r\n"}, // no host
		{"405", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"},
		{"closed", "\xf4\x05thaw "}, // gossip of nobody
		{"closed", "\xf4" + strings.Repeat("\xff", 300)},
	} {
		if got := z.say(t, c.request); got != c.want && !(c.want == "400" && got == "505") {
			t.Errorf("%.120q: %s instead of %s", c.request, got, c.want)
		}
	}
	if code, _, _ := get(t, z.chunksURL(s, 0, last, "")); code != 200 {
		t.Errorf("after all that: %d", code)
	}
	if n := s.fetched.Load(); n != RunChunks {
		t.Errorf("%d chunks were fetched instead of %d", n, RunChunks)
	}
}

// Peers that say nothing, or send one byte and no more, are disconnected, and cost others
// nothing.
func TestSilentPeers(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	var conns []net.Conn
	for i := range 60 {
		c := z.dial(t)
		conns = append(conns, c)
		switch i % 3 {
		case 1:
			fmt.Fprint(c, "G")
		case 2:
			fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: zo", strings.TrimPrefix(z.chunksURL(s, 0, 0, ""), "http://"+z.Addr()))
		}
	}
	// One after the other they would take five minutes.
	began := time.Now()
	if code, _, _ := get(t, z.chunksURL(s, 0, last, "")); code != 200 || time.Since(began) > 30*time.Second {
		t.Errorf("with silent peers: %d after %v", code, time.Since(began))
	}
	var wg sync.WaitGroup
	for _, c := range conns {
		wg.Go(func() {
			c.SetReadDeadline(time.Now().Add(time.Minute))
			if _, err := io.Copy(io.Discard, c); err != nil && !strings.Contains(err.Error(), "reset") {
				t.Errorf("a silent peer is not disconnected: %v", err)
			}
		})
	}
	wg.Wait()
}

// A peer that does not read its answer is disconnected, and what it held is free.
func TestSlowReaders(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	for i := range s.table.Chunks {
		s.fill(i)
	}
	var conns []net.Conn
	for i := range 8 {
		c := z.dial(t)
		_ = c.(*net.TCPConn).SetReadBuffer(4 << 10)
		conns = append(conns, c)
		// Many requests at once: more than all buffers on the way hold.
		go func() {
			for j := range 200 {
				from := fmt.Sprintf("slow-%d", i)
				url := strings.Replace(z.chunksURL(s, j%4*RunChunks, j%4*RunChunks+last, ""), "peer-1", from, 1)
				if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: zone\r\n\r\n", strings.TrimPrefix(url, "http://"+z.Addr())); err != nil {
					return
				}
			}
		}()
	}
	await(t, "uploads are under way", func() bool { return z.server.uploads.count() == len(conns) })
	await(t, "all slow readers are disconnected", func() bool { return z.server.uploads.count() == 0 })
	if code, _, _ := get(t, z.chunksURL(s, 0, last, "")); code != 200 {
		t.Errorf("afterwards: %d", code)
	}
	for c := range s.table.Chunks {
		if x, ok := s.stream.Section(s.stream.ChunkRange(c)); ok {
			x.Release()
		}
	}
	s.cache.Close() // fails if something is still pinned
}

// Requests that wait are bounded for each peer, and one peer does not shut out others.
func TestManyUploads(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s, Grants: GrantOptions{Slots: 1000}})
	unblock := s.block()
	var served, busy atomic.Int64
	var wg sync.WaitGroup
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	for i := range 3 * maxUploadsPeer {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			req, err := http.NewRequestWithContext(ctx, "GET", z.chunksURL(s, i%8, i%8, ""), nil)
			if err != nil {
				t.Error(err)
				return
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			_, _ = io.Copy(io.Discard, resp.Body)
			switch {
			case resp.StatusCode == 200:
				served.Add(1)
			case resp.StatusCode == 503 && resp.Header.Get("Thaw-Holders") == "" && resp.Header.Get("Retry-After") != "":
				busy.Add(1)
			default:
				t.Errorf("%d %v", resp.StatusCode, resp.Header)
			}
		})
	}
	await(t, "the rest is refused", func() bool { return busy.Load() == 2*maxUploadsPeer })
	s.fill(9)
	if code, _, _ := get(t, strings.Replace(z.chunksURL(s, 9, 9, ""), "peer-1", "peer-2", 1)); code != 200 {
		t.Errorf("another peer: %d", code)
	}
	unblock()
	wg.Wait()
	if served.Load() != maxUploadsPeer || s.fetched.Load() > 9 {
		t.Errorf("%d were served, and %d chunks fetched", served.Load(), s.fetched.Load())
	}
}

// A peer that leaves takes its requests with it.
func TestPeerLeaves(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	s.block()
	c := z.dial(t)
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: zone\r\n\r\n", strings.TrimPrefix(z.chunksURL(s, 0, last, ""), "http://"+z.Addr()))
	await(t, "the request waits", func() bool { return z.server.uploads.count() == 1 })
	c.Close()
	await(t, "the request has ended", func() bool { return z.server.uploads.count() == 0 })
	if n := z.grants.Uploads(Run{s.stream.ID(), 0}); n != 0 {
		t.Errorf("it still has %d slots of the run", n)
	}
}

// Connections are bounded for each host.
func TestManyConnections(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	for range maxInboundHost { // each is answered, and then idle for long
		fmt.Fprintf(z.dial(t), "GET /v1/health?zone=%s&from=peer-1 HTTP/1.1\r\nHost: zone\r\n\r\n", testZone)
	}
	await(t, "all are idle", func() bool {
		z.listener.mu.Lock()
		defer z.listener.mu.Unlock()
		return len(z.listener.mu.open) == maxInboundHost && z.listener.mu.idle.Len() == maxInboundHost
	})
	c := z.dial(t)
	c.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := c.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("one connection too many: %v", err)
	}
}

// limit bounds the connections to the server.
func (z *Zone) limit(most, fresh int) {
	z.listener.mu.Lock()
	defer z.listener.mu.Unlock()
	z.listener.most, z.listener.mostFresh = most, fresh
}

// dialFrom connects to the server from an address of this machine.
func (z *Zone) dialFrom(t testing.TB, ip string) net.Conn {
	t.Helper()
	c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}).Dial("tcp", z.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A piece in memory is not for peers if its image is not: this host may have it for itself.
func TestPiecesOfPrivateImages(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	url := z.pieceURL(s.table.Blob, 0, s.firstPiece(), "")
	if code, _, _ := get(t, url); code != 200 {
		t.Fatalf("%d", code)
	}
	s.mu.Lock()
	s.absent = true
	s.mu.Unlock()
	if code, _, _ := get(t, url); code != 404 {
		t.Errorf("a piece in memory of an image that is not for peers: %d", code)
	}
}

// Strangers that connect, and do not show a certificate, do not keep members out.
func TestStrangersMakeRoom(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	ca := newAuthority(t)
	z := open(t, secure(ca.credentials("host-1.example"), Options{Store: s}))
	z.limit(12, 4)
	var strangers []net.Conn
	for i := range 24 {
		strangers = append(strangers, z.dialFrom(t, fmt.Sprintf("127.0.0.%d", 2+i%3)))
	}
	for range 3 {
		member := as(ca.credentials("peer-1"), "host-1.example")
		if code, _, err := askAs(t, member, z.chunksURL(s, 0, last, "")); err != nil || code != 200 {
			t.Errorf("a member: %d, %v", code, err)
		}
		defer member.CloseIdleConnections()
	}
	// The first ones are closed long before the time of a handshake is over.
	began := time.Now()
	for _, c := range strangers[:20] {
		c.SetReadDeadline(began.Add(headerTimeout * 3 / 4))
		if _, err := c.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
			t.Fatalf("a stranger is still connected: %v", err)
		}
	}
}

// Connections that wait for a request make room for others; those with a request do not.
func TestIdleConnectionsMakeRoom(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s, Grants: GrantOptions{Slots: 100}})
	s.fill(0)
	z.limit(4, 4)
	request := func(c net.Conn, chunk int) {
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: zone\r\n\r\n", strings.TrimPrefix(z.chunksURL(s, chunk, chunk, ""), "http://"+z.Addr()))
	}
	answered := func(c net.Conn) bool {
		c.SetReadDeadline(time.Now().Add(time.Minute))
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		return err == nil && resp.StatusCode == 200
	}
	waiting := func(n int) {
		t.Helper()
		await(t, "connections wait for a request", func() bool {
			z.listener.mu.Lock()
			defer z.listener.mu.Unlock()
			return z.listener.mu.idle.Len() == n
		})
	}
	var idle []net.Conn
	for i := range 4 {
		c := z.dial(t)
		if request(c, 0); !answered(c) {
			t.Fatalf("%d: no answer", i)
		}
		waiting(i + 1)
		idle = append(idle, c)
	}
	request(idle[0], 0) // now the second one is idle for the longest
	if !answered(idle[0]) {
		t.Fatal("no answer on a connection that was idle")
	}
	waiting(4)
	unblock := s.block()
	var busy []net.Conn
	for i := range 4 {
		c := z.dial(t)
		request(c, RunChunks)
		busy = append(busy, c)
		waiting(3 - i)
	}
	if idle[1].SetReadDeadline(time.Now().Add(10 * time.Second)); answered(idle[1]) {
		t.Error("the connection that was idle for the longest is open")
	}
	more := z.dial(t)
	if request(more, 0); answered(more) {
		t.Error("one that is busy has made room")
	}
	unblock()
	for i, c := range busy {
		if !answered(c) {
			t.Errorf("%d: it was busy, and has no answer", i)
		}
	}
}

// The zone ends while peers wait, read, and say nothing.
func TestCloseUnderLoad(t *testing.T) {
	s := newTestStore(t, blockmap.CacheOptions{})
	z := open(t, Options{Store: s})
	s.fill(0)
	s.block()
	for i := range 12 {
		c := z.dial(t)
		switch i % 3 {
		case 0:
			fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: zone\r\n\r\n", strings.TrimPrefix(z.chunksURL(s, RunChunks, RunChunks, ""), "http://"+z.Addr()))
		case 1:
			fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: zone\r\n\r\n", strings.TrimPrefix(z.chunksURL(s, 0, 0, ""), "http://"+z.Addr()))
		}
	}
	await(t, "some wait", func() bool { return z.server.uploads.count() > 0 })
	began := time.Now()
	z.Close()
	if took := time.Since(began); took >= OriginTime-time.Second { // what peers wait for ends by itself then
		t.Errorf("the zone has ended after %v", took)
	}
}

func FuzzRequest(f *testing.F) {
	id := strings.Repeat("0a", 32)
	for _, target := range []string{
		"/v1/streams/" + id + "/chunks/0-3?image=" + imageRef + "&zone=z&from=p", "/v1/streams/" + id + "/chunks/4-4?image=" + imageRef + "&zone=z&from=p&leaves=0-3&origin=1",
		"/v1/streams/" + id + "/chunks/4-4?image=" + imageRef + "&zone=z&from=p&leaves=63-63&stored=8388608",
		"/v1/blobs/" + id + "/0-1048576?image=" + imageRef + "&zone=z&from=p", "/v1/health?zone=z&from=p", "/", "?", "/v1/streams//chunks/-", "/v1/blobs/sha256:/-",
	} {
		f.Add(target)
	}
	f.Fuzz(func(t *testing.T, target string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("GET " + target + " HTTP/1.1\r\nHost: zone\r\n\r\n")))
		if err != nil {
			return
		}
		if c, err := parseChunks(r); err == nil {
			if c.first < 0 || c.last < c.first || c.first/RunChunks != c.last/RunChunks || !ValidName(c.from) || !isImage(c.image) {
				t.Errorf("%q: %+v", target, c)
			}
			if (c.leaves != 0 || c.stored != 0) && c.first != c.last || c.stored < 0 || c.stored > maxStored {
				t.Errorf("%q: leaves %v, %d bytes", target, c.leaves, c.stored)
			}
			// The leaves are neighbours.
			const most = blockmap.MaxChunkBlocks * blockmap.BlockSize
			if e := leavesOf(c.leaves, most); e.Start < 0 || e.End > most || e.Len() != int64(c.leaves.Len())*blockmap.LeafSize {
				t.Errorf("%q: leaves %v are %v", target, c.leaves, e)
			}
		}
		if p, err := parsePiece(r); err == nil {
			if p.e.Start < 0 || p.e.Start%PieceBytes != 0 || p.e.Len() <= 0 || p.e.Len() > PieceBytes || repositoryOf(p.image) == "" {
				t.Errorf("%q: %+v", target, p)
			}
		}
	})
}
