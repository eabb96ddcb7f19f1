package nbd

import (
	"bytes"
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// A read that waits for the disk holds up no other: hits overtake it, and so do other
// reads of the disk, which are answered in the order in which they end.
func TestColdReadHoldsUpNobody(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			dev := newFullDevice(testSize)
			dev.Chill(blockmap.Range(0, testSize/2))
			hung := make(chan struct{})
			dev.OnLoad = func(_ context.Context, e blockmap.Extent) bool {
				if e.Start == 0 {
					<-hung
				}
				return true
			}
			srv := &Server{Exports: Static{{Name: "disk", Device: dev}}}
			dial := reach(t, transport, srv)
			c := dial(true)
			other := dial(true)
			c.send(cmdRead, 0, 1, 0, 4096)
			for i := range uint64(50) {
				cold := i%2 == 0
				off := testSize/2 + i*4096
				if cold {
					off = 4096 + i*4096
				}
				for _, c := range []*client{c, other} {
					c.send(cmdRead, 0, 100+i, off, 4096)
					cs := c.reply(0)
					if cs[0].cookie != 100+i || !bytes.Equal(assemble(t, cs, off, 4096), dev.Content(blockmap.Range(int64(off), 4096))) {
						t.Fatalf("cold=%v: cookie %d, or wrong bytes", cold, cs[0].cookie)
					}
				}
			}
			close(hung)
			cs := c.reply(0)
			if cs[0].cookie != 1 || !bytes.Equal(assemble(t, cs, 0, 4096), dev.Content(blockmap.Range(0, 4096))) {
				t.Error("the slow read has wrong bytes")
			}
			dev.NoPins(t)
		})
	}
}

// A client of depth 1 is served without a goroutine, and one that begins to send more
// is not: while its first read waits, the second does not.
func TestLoneColdReads(t *testing.T) {
	dev := newFullDevice(testSize)
	dev.Chill(blockmap.Range(0, testSize))
	var waiting, most atomic.Int64
	gate := make(chan struct{})
	var gated atomic.Bool
	dev.OnLoad = func(context.Context, blockmap.Extent) bool {
		n := waiting.Add(1)
		defer waiting.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		if gated.Load() {
			<-gate
		}
		return true
	}
	c := dial(t, serveDevice(t, Export{Device: dev}))
	c.enter(false)
	read := func(i uint64) { c.send(cmdRead, 0, i, i*4096, 4096) }
	check := func(k chunk) {
		t.Helper()
		if k.errno != 0 || !bytes.Equal(k.data, dev.Content(blockmap.Range(int64(k.cookie)*4096, 4096))) {
			t.Fatalf("cookie %d: errno %d, or wrong bytes", k.cookie, k.errno)
		}
	}
	for i := range uint64(4 * loneReads) {
		read(i)
		check(c.chunk(4096))
	}
	// The first of a burst may be taken for a lone one. The others are not.
	for range 3 {
		var p []byte
		for i := range uint64(8) {
			p = appendRequest(p, cmdRead, 0, i, i*4096, 4096)
		}
		c.write(p)
		for range 8 {
			check(c.chunk(4096))
		}
	}
	gated.Store(true)
	most.Store(0)
	for i := range uint64(8) {
		read(i)
	}
	eventually(t, "8 reads wait for the disk", func() bool { return most.Load() >= 8 })
	close(gate)
	for range 8 {
		check(c.chunk(4096))
	}
}

// A load that fails is a miss: the bytes are fetched.
func TestFailedLoad(t *testing.T) {
	for _, structured := range []bool{false, true} {
		dev := newFullDevice(testSize)
		dev.Chill(blockmap.Range(0, testSize))
		dev.OnLoad = func(_ context.Context, e blockmap.Extent) bool {
			dev.Evict(e) // as a damaged chunk
			return false
		}
		dev.OnFault = func(_ context.Context, e blockmap.Extent) error {
			dev.Warm(e)
			return nil
		}
		c := dial(t, serveDevice(t, Export{Device: dev}))
		c.enter(structured)
		for i := range uint64(40) {
			off := i * 8192
			c.send(cmdRead, 0, i, off, 8192)
			var got []byte
			if structured {
				got = assemble(t, c.reply(0), off, 8192)
			} else {
				got = c.chunk(8192).data
			}
			if !bytes.Equal(got, dev.Content(blockmap.Range(int64(off), 8192))) {
				t.Fatalf("structured=%v: wrong bytes at %d", structured, off)
			}
		}
		dev.NoPins(t)
	}
}

// Reads of the disk are bounded like misses, and a connection that ends waits for them.
func TestColdReadsAreBounded(t *testing.T) {
	dev := blocktest.NewMemory(64 * 4096)
	dev.Fill(pattern(0, dev.Size()), 0)
	dev.Chill(blockmap.Range(0, dev.Size()))
	var n, most atomic.Int64
	gate := make(chan struct{})
	dev.OnLoad = func(context.Context, blockmap.Extent) bool {
		most.Store(max(most.Load(), n.Add(1)))
		<-gate
		n.Add(-1)
		return true
	}
	srv := &Server{Exports: Static{{Name: "disk", Device: dev}}, MaxWaiters: 8}
	c := dial(t, serve(t, srv))
	c.enter(false)
	var p []byte
	for i := range uint64(64) {
		p = appendRequest(p, cmdRead, 0, i, i*4096, 4096)
	}
	c.write(p)
	eventually(t, "8 reads begin", func() bool { return n.Load() >= 8 })
	close(gate)
	for range 64 {
		if k := c.chunk(4096); k.errno != 0 {
			t.Errorf("errno %d", k.errno)
		}
	}
	if m := most.Load(); m > 8 {
		t.Errorf("%d reads waited for the disk at once", m)
	}
	dev.NoPins(t)
}

// BenchmarkCold is a batch of 32 reads that Load answers at once.
func BenchmarkCold(b *testing.B) {
	for _, structured := range []bool{false, true} {
		b.Run(fmt.Sprint("structured=", structured), func(b *testing.B) {
			dev := newFullDevice(testSize)
			dev.Chill(blockmap.Range(0, testSize))
			c := dial(b, serveDevice(b, Export{Device: dev}))
			c.enter(structured)
			const n = 32
			var p []byte
			for i := range uint64(n) {
				p = appendRequest(p, cmdRead, 0, i, i*4096, 4096)
			}
			for b.Loop() {
				c.write(p)
				for range n {
					if structured {
						c.reply(0)
					} else {
						c.chunk(4096)
					}
				}
			}
		})
	}
}
