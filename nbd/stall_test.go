package nbd

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// stalledClient requests all of a device of testSize a few times, in requests of n
// bytes, and reads no replies. It returns the number of its requests.
func stalledClient(c *client, n uint32) (asked uint64) {
	var p []byte
	for range 4 {
		for off := uint32(0); off < testSize; off += n {
			p = appendRequest(p, cmdRead, 0, asked, uint64(off), n)
			asked++
		}
	}
	c.write(p)
	return asked
}

// A client that reads no replies pins nothing, for hits, misses or both, and gets all
// replies when it continues.
func TestStalledClientPinsNothing(t *testing.T) {
	for _, transport := range transports {
		for _, absent := range []int64{0, testSize / 2, testSize} {
			t.Run(fmt.Sprintf("%s absent=%d", transport, absent), func(t *testing.T) {
				const n = 64 << 10
				dev := newPatternDevice(testSize)
				dev.Evict(blockmap.Range(0, absent))
				l, log := newLogged()
				srv := &Server{Exports: Static{{Name: "disk", Device: dev}}, Log: log}
				c := reach(t, transport, srv)(false)
				asked := stalledClient(c, n)
				l.wait(t, "does not take its replies")
				dev.NoPins(t)

				// Tasks that end during the stall pin nothing either.
				for range asked {
					k := c.chunk(n)
					off := int64(k.cookie) * n % testSize
					if k.errno != 0 || !bytes.Equal(k.data, dev.Content(blockmap.Range(off, n))) {
						t.Fatalf("cookie %d: errno %d or wrong bytes", k.cookie, k.errno)
					}
				}
				c.mustDo(cmdFlush, 0, 0, 0, nil)
				dev.NoPins(t)
			})
		}
	}
}

// Misses that end during the stall are copied as they arrive.
func TestMissesOfStalledClient(t *testing.T) {
	for _, transport := range transports {
		dev := newFullDevice(testSize)
		dev.Evict(blockmap.Range(0, 64<<10))
		g := newGate(dev)
		l, log := newLogged()
		c := reach(t, transport, &Server{Exports: Static{{Name: "disk", Device: dev}}, Log: log})(true)
		c.send(cmdRead, 0, 1000, 0, 64<<10)
		<-g.waiting
		var p []byte
		for i := range uint64(4) { // more than a socket takes
			p = appendRequest(p, cmdRead, 0, i, 64<<10, testSize-64<<10)
		}
		for i := range uint64(16) {
			p = appendRequest(p, cmdRead, 0, i, 64<<10, testSize-64<<10)
		}
		c.write(p)
		l.wait(t, "does not take its replies")
		close(g.open)
		dev.NoPins(t)
		for range 21 {
			cs := c.reply(0)
			off, n := int64(64<<10), testSize-64<<10
			if cs[0].cookie == 1000 {
				off, n = 0, 64<<10
			}
			if !bytes.Equal(assemble(t, cs, uint64(off), n), dev.Content(blockmap.Range(off, int64(n)))) {
				t.Fatalf("%s: wrong bytes", transport)
			}
		}
		dev.NoPins(t)
	}
}

// Replies behind errors that a client does not take pin nothing either.
func TestStalledByErrors(t *testing.T) {
	for _, transport := range transports {
		dev := newFullDevice(testSize)
		dev.Evict(blockmap.Range(0, 64<<10))
		g := newGate(dev)
		l, log := newLogged()
		c := reach(t, transport, &Server{Exports: Static{{Name: "disk", Device: dev}}, Log: log})(true)
		c.send(cmdRead, 0, 1000, 0, 64<<10)
		<-g.waiting
		const errors = 200_000 // more bytes than a socket takes
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			var p []byte
			for range errors {
				p = appendRequest(p, cmdRead, 0, 1, testSize, 4096)
			}
			c.write(p)
		}()
		l.wait(t, "does not take its replies")
		close(g.open)
		eventually(t, transport+": a reply behind errors pins nothing", func() bool { return dev.Pins() == 0 })
		reads := 0
		for range errors + 1 {
			k := c.reply(0)[0]
			if k.cookie == 1000 {
				reads++
			} else if k.errno != eInval {
				t.Fatalf("%s: errno %d", transport, k.errno)
			}
		}
		<-sent
		if reads != 1 {
			t.Errorf("%s: %d replies to the read", transport, reads)
		}
	}
}

// If a quota is smaller than what one client has requested and does not read, the quota
// is still available to other clients.
func TestStalledClientLeavesTheCache(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			img := newCached(t, 12, 6<<20)
			l, log := newLogged()
			srv := &Server{Exports: Static{{Name: "disk", Device: img}}, Log: log}
			dial := reach(t, transport, srv)
			for i := range 2 {
				c := dial(i == 0)
				var p []byte
				for j := range uint64(44) { // small reads pin whole chunks
					p = appendRequest(p, cmdRead, 0, j, j%10*cachedChunk+uint64(i), 128<<10)
				}
				c.write(p)
			}
			for range 2 {
				l.wait(t, "does not take its replies")
			}
			dial(true).readAll(true, img.content, 256<<10, 4) // a read that finds no room fails
		})
	}
}

// The pinned bytes of finished misses count, not the bytes that they show.
func TestPinsAreCharged(t *testing.T) {
	const weight, bound = 1 << 20, 8
	dev := blocktest.NewMemory(64 * 4096)
	dev.Fill(pattern(0, dev.Size()), 0)
	dev.Weight = weight
	dev.Evict(blockmap.Range(0, dev.Size()))
	srv := &Server{MaxInFlightBytes: bound * weight}
	nc := &script{in: bytes.NewReader(nil)}
	s := newSession(&conn{srv: srv, nc: nc}, nc, terms{export: &Export{Device: dev}}, slog.New(slog.DiscardHandler), func(error) {})
	s.ctx = t.Context()
	s.mu.writing = true // by somebody who does not get on
	for i := range uint64(64) {
		if err := s.launch(t.Context(), &task{req: request{cmd: cmdRead, offset: i * 4096, length: 4096}, cost: 4096}); err != nil {
			t.Fatal(err)
		}
	}
	s.tasks.Wait()
	if n := dev.Pins(); n == 0 || n > bound {
		t.Errorf("%d chunks are pinned, %d are allowed", n, bound)
	}
	if n := s.client.InFlight().Bytes; n > bound*weight {
		t.Errorf("%d bytes are charged", n)
	}
	s.mu.Lock()
	s.write(nil)
	s.mu.Unlock()
	if left := s.client.InFlight(); s.mu.err != nil || left != (Limits{}) {
		t.Errorf("%+v left, %v", left, s.mu.err)
	}
	dev.NoPins(t)
	out := s.nc.(*script).mu.out.Bytes()
	if len(out) != 64*(simpleReplyLen+4096) {
		t.Fatalf("%d bytes sent", len(out))
	}
	c := &client{t, &script{in: bytes.NewReader(out)}}
	for range 64 {
		if k := c.chunk(4096); k.errno != 0 {
			t.Errorf("errno %d", k.errno)
		}
	}
}

// A client may pause for as long as it likes.
func TestPausedClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newPatternDevice(testSize)
		l := newPipeListener()
		serveOn(t, &Server{Exports: Static{{Name: "disk", Device: dev}}}, l)
		c := &client{t, l.dial()}
		c.hello(3)
		c.enter(false)
		c.send(cmdRead, 0, 1, 0, testSize)
		half := c.read(testSize / 2)
		time.Sleep(100 * time.Hour)
		dev.NoPins(t)
		got := append(half, c.read(simpleReplyLen+testSize-testSize/2)...)
		if !bytes.Equal(got[simpleReplyLen:], dev.Content(blockmap.Range(0, testSize))) {
			t.Error("wrong bytes")
		}
		c.nc.Close()
	})
}

// With WriteTimeout, the server drops a client that reads nothing, and keeps a slow
// one.
func TestWriteTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newPatternDevice(testSize)
		l := newPipeListener()
		serveOn(t, &Server{Exports: Static{{Name: "disk", Device: dev}}, WriteTimeout: 3 * time.Second}, l)
		c := &client{t, l.dial()}
		c.hello(3)
		c.enter(false)
		c.send(cmdRead, 0, 1, 0, testSize)
		for range 10 { // a byte now and then
			time.Sleep(2 * time.Second)
			c.read(1)
		}
		time.Sleep(5 * time.Second)
		c.closed()
		dev.NoPins(t)
	})
}

func TestIdleTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFullDevice(testSize)
		dev.Evict(blockmap.Range(0, 4096))
		dev.OnFault = func(context.Context, blockmap.Extent) error {
			time.Sleep(30 * time.Second)
			return nil
		}
		lines, log := newLogged()
		l := newPipeListener()
		srv := &Server{Exports: Static{{Name: "disk", Device: dev}}, IdleTimeout: 10 * time.Second, Log: log}
		serveOn(t, srv, l)
		dial := func() *client {
			c := &client{t, l.dial()}
			c.hello(3)
			c.enter(false)
			return c
		}
		c := dial()
		for range 5 { // not idle
			time.Sleep(9 * time.Second)
			c.mustDo(cmdFlush, 0, 0, 0, nil)
		}
		// A connection with a request in flight is not idle, nor is it just after.
		c.send(cmdRead, 0, 1, 0, 4096)
		c.reply(4096)
		time.Sleep(9 * time.Second)
		c.mustDo(cmdFlush, 0, 0, 0, nil)
		begin := time.Now()
		c.closed()
		if d := time.Since(begin); d < 10*time.Second || d > 11*time.Second {
			t.Errorf("closed after %v", d)
		}
		lines.wait(t, "idle_timeout=10s")

		// Half a request does not count as a request in flight. A payload that does not
		// arrive does not either.
		for _, p := range [][]byte{make([]byte, 5), appendRequest(nil, cmdWrite, 0, 1, 0, 4096)} {
			c = dial()
			c.write(p)
			begin = time.Now()
			c.closed()
			if d := time.Since(begin); d < 10*time.Second || d > 11*time.Second {
				t.Errorf("closed after %v", d)
			}
		}
		// The bound does not delay a shutdown.
		c = dial()
		if err := srv.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		c.closed()
	})
}
