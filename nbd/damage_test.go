package nbd

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"thaw/blockmap"
)

// transports are the ways to a server: they differ in how bytes leave it.
var transports = []string{"unix", "tcp", "tls"}

// smallBuffers makes the kernel buffer little for a client that does not read: TCP
// would buffer megabytes.
type smallBuffers struct{ net.Listener }

func (l smallBuffers) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if t, ok := nc.(*net.TCPConn); ok {
		t.SetWriteBuffer(256 << 10)
	}
	return nc, err
}

// reach serves srv over the transport and returns a function that connects to it, in
// the transmission phase of "disk".
func reach(t testing.TB, transport string, srv *Server) func(structured bool) *client {
	t.Helper()
	addr := "tcp:127.0.0.1:0"
	if transport == "unix" {
		addr = "unix:" + filepath.Join(t.TempDir(), "s")
	}
	var cfg *tls.Config
	if transport == "tls" {
		p := newPKI(t)
		srv.TLSFunc = p.serverFunc(t)
		cfg = &tls.Config{RootCAs: p.pool, ServerName: "localhost"}
	}
	l, err := Listen(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, srv, smallBuffers{l})
	return func(structured bool) *client {
		t.Helper()
		nc, err := net.Dial(l.Addr().Network(), l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		nc.SetDeadline(time.Now().Add(10 * time.Minute))
		nc.(interface{ SetReadBuffer(int) error }).SetReadBuffer(64 << 10) // it is to be full in the tests
		t.Cleanup(func() { nc.Close() })
		c := &client{t, nc}
		c.hello(uint32(flagFixedNewstyle | flagNoZeroes))
		if cfg != nil {
			if err := c.startTLS(cfg); err != nil {
				t.Fatal(err)
			}
		}
		c.enter(structured)
		return c
	}
}

// readAll reads all of want from front to back, with depth requests of n bytes in each
// write, and checks every byte.
func (c *client) readAll(structured bool, want []byte, n, depth int) {
	c.t.Helper()
	for at := 0; at < len(want); {
		var p []byte
		first, asked := at, 0
		for ; asked < depth && at < len(want); asked++ {
			m := min(n, len(want)-at)
			p = appendRequest(p, cmdRead, 0, uint64(at), uint64(at), uint32(m))
			at += m
		}
		c.write(p)
		for i := range asked {
			// The server answers hits in order and misses in any order.
			off := first + i*n
			m := min(n, len(want)-off)
			cs := c.reply(m)
			off = int(cs[0].cookie)
			for _, k := range cs {
				if k.errno != 0 {
					c.t.Fatalf("READ %d+%d: errno %d %s", off, m, k.errno, k.msg)
				}
			}
			got := cs[0].data
			if structured {
				got = assemble(c.t, cs, uint64(off), min(n, len(want)-off))
			}
			if !bytes.Equal(got, want[off:off+len(got)]) {
				c.t.Fatalf("READ %d+%d: wrong bytes", off, len(got))
			}
		}
	}
}

// If the server cannot read bytes that it is about to send, it fetches them again, and
// the connection stays.
func TestDamaged(t *testing.T) {
	for _, transport := range transports {
		for _, structured := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s structured=%v", transport, structured), func(t *testing.T) {
				dev := newCutDevice(t, 5)
				srv := &Server{Exports: Static{{Name: "disk", Device: dev}}}
				dial := reach(t, transport, srv)
				c, other := dial(structured), dial(structured)
				for _, cut := range []int64{0, 3*cachedChunk + 300<<10, 2*cachedChunk + 512<<10} {
					for _, n := range []int{12 << 10, 100_000, 4 << 20} {
						before := srv.Stats().Repaired
						dev.cut(cut)
						depth := max(1, 512<<10/n)
						c.readAll(structured, dev.content, n, depth)
						other.readAll(structured, dev.content, n, depth)
						if srv.Stats().Repaired == before {
							t.Errorf("cut to %d: nothing was repaired", cut)
						}
					}
				}
				if st := srv.Stats(); st.Accepted != 2 || st.Errors != 0 {
					t.Errorf("%+v", st)
				}
			})
		}
	}
}

// Truncating a file of the cache under the server harms no client.
func TestDamagedCache(t *testing.T) {
	for _, transport := range transports {
		for _, structured := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s structured=%v", transport, structured), func(t *testing.T) {
				img := newCached(t, 4, 0)
				srv := &Server{Exports: Static{{Name: "disk", Device: img}}}
				dial := reach(t, transport, srv)
				c, other := dial(structured), dial(structured)
				for _, cut := range []int64{0, cachedChunk + 300<<10 + 77} {
					for _, n := range []int{32 << 10, 3 << 20} {
						img.warm(t)
						img.cut(t, cut)
						depth := max(1, 512<<10/n)
						var wg sync.WaitGroup
						for _, c := range []*client{c, other} {
							wg.Go(func() { c.readAll(structured, img.content, n, depth) })
						}
						wg.Wait()
					}
				}
				// During a reply.
				for _, cut := range []int64{0, 2*cachedChunk + 512<<10} {
					img.warm(t)
					c.send(cmdRead, 0, 1, 0, 3<<20)
					first := c.read(1)
					img.cut(t, cut)
					cs := (&client{t, &unread{c.nc, first}}).reply(3 << 20)
					got := cs[0].data
					if structured {
						got = assemble(t, cs, 0, 3<<20)
					}
					if !bytes.Equal(got, img.content[:3<<20]) {
						t.Fatalf("cut to %d under a reply: wrong bytes", cut)
					}
				}
				if st := srv.Stats(); st.Accepted != 2 || st.Errors != 0 {
					t.Errorf("%+v", st)
				}
			})
		}
	}
}

// A file that ends within a page reads as zeros up to the end of that page, without a
// fault. If a fault follows, the server never sends such zeros as the device's bytes.
func TestDamagedWithinPage(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			dev := newCutDevice(t, 2)
			dial := reach(t, transport, &Server{Exports: Static{{Name: "disk", Device: dev}}})
			ended := 0
			for i := range 40 {
				dev.cut(cachedChunk + int64(i)*9973 + 1)
				c := dial(false)
				c.send(cmdRead, 0, 1, cachedChunk, cachedChunk)
				p := make([]byte, simpleReplyLen+cachedChunk)
				n := 0
				for n < len(p) {
					m, err := c.nc.Read(p[n:])
					n += m
					if err != nil {
						break
					}
				}
				if n < len(p) {
					ended++ // zeros had left
				} else if !bytes.Equal(p[simpleReplyLen:], dev.content[cachedChunk:2*cachedChunk]) {
					t.Fatalf("cut at %d: wrong bytes", i)
				}
				c.nc.Close()
			}
			if transport == "tls" && ended > 0 {
				t.Errorf("%d connections ended before a reply had been sent", ended)
			}
			t.Logf("%d of 40 connections ended", ended)
		})
	}
}

// If damaged bytes cannot be fetched, their request fails, as long as the protocol
// allows an error.
func TestDamagedAndAway(t *testing.T) {
	for _, transport := range transports {
		for _, structured := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s structured=%v", transport, structured), func(t *testing.T) {
				dev := newCutDevice(t, 4)
				l, log := newLogged()
				dial := reach(t, transport, &Server{Exports: Static{{Name: "disk", Device: dev}}, Log: log})
				c := dial(structured)

				// Small replies: the header has not been sent. The server answers the
				// requests before and after it.
				dev.cut(2*cachedChunk + 512<<10)
				dev.setAway(true)
				p := appendRequest(nil, cmdRead, 0, 1, 4096, 4096)
				p = appendRequest(p, cmdRead, 0, 2, 3*cachedChunk, 4096)
				p = appendRequest(p, cmdRead, 0, 3, 8192, 4096)
				p = appendRequest(p, cmdFlush, 0, 4, 0, 0)
				c.write(p)
				for i := range uint64(4) {
					cs := c.reply(4096 * min(1, int(3-i)))
					want := errno(0)
					if i == 1 {
						want = eIO
					}
					if cs[0].cookie != i+1 || cs[0].errno != want {
						t.Fatalf("reply %d: cookie %d errno %d %s", i, cs[0].cookie, cs[0].errno, cs[0].msg)
					}
					if i == 1 && structured && (cs[0].offset != 3*cachedChunk || !strings.Contains(cs[0].msg, "refused")) {
						t.Errorf("%+v", cs[0])
					}
				}
				l.wait(t, "request failed")
				dev.setAway(false)
				c.readAll(structured, dev.content, 64<<10, 8)

				// A large reply: its first half has been sent.
				dev.cut(cachedChunk + 512<<10)
				dev.setAway(true)
				c.send(cmdRead, 0, 5, cachedChunk, cachedChunk)
				switch {
				case transport == "tls":
					if k := c.reply(cachedChunk); k[0].errno != eIO {
						t.Fatalf("errno %d", k[0].errno)
					}
				case structured:
					cs := c.reply(0)
					if len(cs) != 2 || cs[0].typ != chunkData || len(cs[0].data) != cachedChunk ||
						cs[1].typ != chunkErrorOffset || cs[1].errno != eIO || cs[1].offset != cachedChunk {
						t.Fatalf("%d chunks, the last %+v", len(cs), cs[len(cs)-1])
					}
				default:
					p := make([]byte, 2*cachedChunk)
					n := 0
					for {
						m, err := c.nc.Read(p[n:])
						n += m
						if err != nil {
							break
						}
					}
					if n >= simpleReplyLen+cachedChunk {
						t.Fatalf("%d bytes: an impossible reply", n)
					}
					if s := l.wait(t, "session fails"); !strings.Contains(s, "connection refused") {
						t.Errorf("logged %q", s)
					}
					return
				}
				dev.setAway(false)
				c.readAll(structured, dev.content, 64<<10, 8)
			})
		}
	}
}

// Foreign clients do not notice the damage.
func TestDamagedForeign(t *testing.T) {
	nbdcopy, convert, qemuIO := tool(t, "nbdcopy"), tool(t, "qemu-img"), tool(t, "qemu-io")
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			dev := newCutDevice(t, 5)
			l, log := newLogged()
			srv := &Server{Exports: Static{{Name: "disk", Device: dev}}, Log: log}
			addr := "tcp:127.0.0.1:0"
			if transport == "unix" {
				addr = "unix:" + filepath.Join(t.TempDir(), "s")
			}
			p := newPKI(t)
			p.issue(t, "client", "host-7")
			srv.TLSFunc = p.serverFunc(t)
			ln, err := Listen(t.Context(), addr)
			if err != nil {
				t.Fatal(err)
			}
			serveOn(t, srv, ln)
			u := uri(ln.Addr().String())
			qemu := []string{"--image-opts", "driver=nbd,export=disk,path=" + ln.Addr().String()}
			if transport != "unix" {
				_, port, _ := net.SplitHostPort(ln.Addr().String())
				u = "nbd://localhost:" + port + "/disk"
				qemu[1] = "driver=nbd,export=disk,host=localhost,port=" + port
				if transport == "tls" {
					u = "nbds://localhost:" + port + "/disk?tls-certificates=" + p.dir
					qemu[1] += ",tls-creds=tls0"
					qemu = append([]string{"--object", "tls-creds-x509,id=tls0,endpoint=client,dir=" + p.dir}, qemu...)
				}
			}
			for _, cut := range []int64{0, cachedChunk + 256<<10} {
				file := filepath.Join(t.TempDir(), "copy")
				for what, copy := range map[string]func(){
					"nbdcopy":  func() { nbdcopy(u, file) },
					"qemu-img": func() { convert(append(append([]string{"convert", "-O", "raw"}, qemu...), file)...) },
				} {
					before := srv.Stats().Repaired
					dev.cut(cut)
					copy()
					got, err := os.ReadFile(file)
					if err != nil || !bytes.Equal(got, dev.content) {
						t.Errorf("cut to %d: %s has made another copy: %v", cut, what, err)
					}
					if srv.Stats().Repaired == before {
						t.Errorf("%s met no damage", what)
					}
				}
			}
			dev.cut(0)
			if out := qemuIO(append([]string{"-r", "-c", "read 0 1M", "-c", "aio_read 1M 64k", "-c", "aio_read 2M 64k", "-c", "aio_flush"}, qemu...)...); strings.Contains(out, "ail") {
				t.Error(out)
			}
			for len(l.ch) > 0 {
				if s := <-l.ch; strings.Contains(s, "fail") {
					t.Error(s)
				}
			}
		})
	}
}

// In a read, the bytes before the unavailable ones may be damaged as well.
func TestDamagedPrefix(t *testing.T) {
	for _, transport := range transports {
		dev := newCutDevice(t, 3)
		dial := reach(t, transport, &Server{Exports: Static{{Name: "disk", Device: dev}}})
		c := dial(true)
		for _, cut := range []int64{cachedChunk, 0} {
			dev.cut(cut)
			dev.Damaged(1)
			dev.setAway(true)
			c.send(cmdRead, 0, 1, 100, 2*cachedChunk)
			cs := c.reply(0)
			last := cs[len(cs)-1]
			switch {
			case cut > 0 && (len(cs) != 2 || !bytes.Equal(cs[0].data, dev.content[100:cachedChunk]) || last.errno != eIO || last.offset != cachedChunk),
				cut == 0 && (len(cs) != 1 || last.errno != eIO || last.offset != 100):
				t.Errorf("%s, cut to %d: %d chunks, the last %+v", transport, cut, len(cs), last)
			}
			dev.setAway(false)
			c.readAll(true, dev.content, 64<<10, 4)
		}
	}
}

// Bytes that were damaged together are fetched together.
func TestDamagedComesTogether(t *testing.T) {
	// On a busy machine half a second may pass before the file is cut. The server would have
	// copied its good bytes then.
	patience := stallTime
	stallTime = time.Hour
	t.Cleanup(func() { stallTime = patience })
	img := newCached(t, 16, 0)
	srv := &Server{Exports: Static{{Name: "disk", Device: img}}}
	c := reach(t, "unix", srv)(false)
	if err := img.Fault(t.Context(), blockmap.Range(2*cachedChunk, img.Size()-2*cachedChunk)); err != nil {
		t.Fatal(err)
	}
	// A miss fills the socket, and hits wait after it in one batch.
	p := appendRequest(nil, cmdRead, 0, 100, 0, 2*cachedChunk)
	c.write(p)
	first := c.read(1)
	p = nil
	for i := range uint64(14) {
		p = appendRequest(p, cmdRead, 0, i, (i+2)*cachedChunk, 8192)
	}
	c.write(p)
	eventually(t, "the hits are read", func() bool { return srv.Stats().Hits == 14 })
	img.cut(t, 0)
	img.from.atOnce()
	img.from.gather(2, 8) // chunks 0 and 1 are those of the miss
	rest := &client{t, &unread{c.nc, first}}
	for range 15 {
		k := rest.chunk(8192)
		if k.cookie == 100 {
			k.data = append(k.data, rest.read(2*cachedChunk-8192)...)
			k.cookie = 0
		} else {
			k.cookie = (k.cookie + 2) * cachedChunk
		}
		if k.errno != 0 || !bytes.Equal(k.data, img.content[k.cookie:][:len(k.data)]) {
			t.Fatalf("at %d: errno %d or wrong bytes", k.cookie, k.errno)
		}
	}
	if n := img.from.atOnce(); n < 8 {
		t.Errorf("%d fetches at once", n)
	}
	if n := srv.Stats().Repaired; n < 14 {
		t.Errorf("%d were repaired", n)
	}
}

// The adapter for go-nbd copies in this process.
func TestDamagedBackend(t *testing.T) {
	dev := newCutDevice(t, 3)
	b := &Backend{Device: dev}
	p := make([]byte, dev.Size())
	for _, cut := range []int64{0, cachedChunk + 4096, 2 * cachedChunk} {
		dev.cut(cut)
		if n, err := b.ReadAt(p, 0); n != len(p) || err != nil || !bytes.Equal(p, dev.content) {
			t.Errorf("cut to %d: %d, %v", cut, n, err)
		}
	}
	dev.cut(0)
	dev.setAway(true)
	if _, err := b.ReadAt(p, 0); !errors.Is(err, errAway) {
		t.Errorf("unavailable bytes: %v", err)
	}
}

// A read larger than the cache returns the right bytes, and does not fetch them
// repeatedly.
func TestReadLargerThanQuota(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			img := newCached(t, 40, 8<<20)
			dial := reach(t, transport, &Server{Exports: Static{{Name: "disk", Device: img}}})
			c := dial(false)
			c.send(cmdRead, 0, 1, 100, maxPayload)
			if k := c.chunk(maxPayload); k.errno != 0 || !bytes.Equal(k.data, img.content[100:100+maxPayload]) {
				t.Fatalf("errno %d or wrong bytes", k.errno)
			}
			most, all := img.from.most()
			t.Logf("%d fetches of 33 chunks, at most %d of one", all, most)
			if most > 2 || all > 2*33 {
				t.Errorf("%d fetches of 33 chunks, %d of one", all, most)
			}
		})
	}
}
