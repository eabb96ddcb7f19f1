package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// slowWrites is a device whose writes below limit wait until they are let go.
type slowWrites struct {
	*blocktest.Memory
	waiting chan int64 // offsets
	open    chan struct{}
}

func newSlowWrites(size, limit int64) *slowWrites {
	d := &slowWrites{blocktest.NewMemory(size), make(chan int64, 10000), make(chan struct{})}
	d.OnWrite = func(ctx context.Context, e blockmap.Extent) error {
		if e.Start >= limit {
			return nil
		}
		d.waiting <- e.Start
		select {
		case <-d.open:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return d
}

// A write that takes long holds up nothing else of its connection, whether it comes alone or
// among others, and it writes what came with it although the input goes on.
func TestSlowWriteHoldsUpNothing(t *testing.T) {
	for _, transport := range transports {
		for _, structured := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s structured=%v", transport, structured), func(t *testing.T) {
				const n = 4096
				const size = 4 << 20
				d := newSlowWrites(size, n)
				d.Fill(pattern(size/2, n), size/2)
				c := reach(t, transport, &Server{Exports: Static{{Name: "disk", Device: d}}})(structured)
				for i := range uint64(2 * loneReads) { // a client of depth 1
					c.mustDo(cmdWrite, 0, n*(1+i), n, pattern(int64(n*(1+i)), n))
				}
				var p []byte
				p = appendRequest(p, cmdRead, 0, 1, size/2, n)
				p = append(appendRequest(p, cmdWrite, 0, 2, 0, n), pattern(0, n)...) // slow
				p = append(appendRequest(p, cmdWrite, 0, 3, 100*n, n), pattern(100*n, n)...)
				p = appendRequest(p, cmdRead, 0, 4, size/2, n)
				c.write(p)
				for range 3 {
					var cookie uint64
					for _, k := range c.replyOf(map[uint64]int{1: n, 4: n}) {
						cookie = k.cookie
						if k.errno != 0 || cookie == 2 {
							t.Fatalf("%+v", k)
						}
					}
				}
				// More than an input buffer has.
				for i := range uint64(200) {
					c.mustDo(cmdWrite, 0, n*(101+i), n, bytes.Repeat([]byte{0xee}, n))
				}
				c.mustDo(cmdFlush, 0, 0, 0, nil)
				close(d.open)
				if k := c.reply(0)[0]; k.cookie != 2 || k.errno != 0 {
					t.Errorf("the slow write: %+v", k)
				}
				if !bytes.Equal(d.Content(blockmap.Range(0, 101*n)), append(pattern(0, 33*n), append(make([]byte, 67*n), pattern(100*n, n)...)...)) {
					t.Error("wrong bytes were written")
				}
				d.NoPins(t)
			})
		}
	}
}

// slowFlushes is a device whose flushes wait until they are let go.
type slowFlushes struct {
	*blocktest.Memory
	waiting, open chan struct{}
}

func (d *slowFlushes) Flush(ctx context.Context) error {
	d.waiting <- struct{}{}
	select {
	case <-d.open:
		return d.Memory.Flush(ctx)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// What the reader does for a client of depth 1 and takes long holds up nothing that the client
// sends meanwhile: a flush, and a read of the disk.
func TestSlowLoneRequests(t *testing.T) {
	const n = 4096
	for _, cmd := range []uint16{cmdFlush, cmdRead} {
		d := &slowFlushes{newFullDevice(testSize), make(chan struct{}, 100), make(chan struct{})}
		d.Chill(blockmap.Range(8*n, n))
		d.OnLoad = func(context.Context, blockmap.Extent) bool {
			d.waiting <- struct{}{}
			<-d.open
			return true
		}
		c, ended := transmit(t, t.Context(), &Server{}, &Export{Device: d})
		read := func(cookie, off uint64) {
			t.Helper()
			c.send(cmdRead, 0, cookie, off, n)
			if k := c.chunk(n); k.cookie != cookie || k.errno != 0 || !bytes.Equal(k.data, d.Content(blockmap.Range(int64(off), n))) {
				t.Fatalf("read %d: %+v, or wrong bytes", cookie, k)
			}
		}
		for i := range uint64(2 * loneReads) {
			read(i, n*(i%4))
		}
		size := uint32(0)
		if cmd == cmdRead {
			size = n
		}
		c.send(cmd, 0, 777, uint64(8*size), size)
		<-d.waiting
		for i := range uint64(50) {
			read(i, n*(i%4))
			c.mustDo(cmdWrite, 0, n*(i%4), n, pattern(int64(n*(i%4)), n))
		}
		close(d.open)
		k := c.chunk(int(size))
		if k.cookie != 777 || k.errno != 0 || size > 0 && !bytes.Equal(k.data, d.Content(blockmap.Range(8*n, n))) {
			t.Errorf("command %d: %+v, or wrong bytes", cmd, k)
		}
		read(1, 0)
		c.nc.Close()
		within(t, ended)
		d.NoPins(t)
	}
}

// A client of depth 1 that fills the input buffer to its last byte, with a read of the disk at
// its end, is served like any other. There is no room then to look for what comes next.
func TestLoneReadAtTheEndOfTheInput(t *testing.T) {
	const n = 4096
	d := newFullDevice(testSize)
	d.Chill(blockmap.Range(8*n, n))
	c, ended := transmit(t, t.Context(), &Server{}, &Export{Device: d, ReadOnly: true})
	read := func(cookie, off uint64) {
		t.Helper()
		if k := c.chunk(n); k.cookie != cookie || k.errno != 0 || !bytes.Equal(k.data, d.Content(blockmap.Range(int64(off), n))) {
			t.Fatalf("read %d: %+v, or wrong bytes", cookie, k)
		}
	}
	for i := range uint64(2 * loneReads) {
		c.send(cmdRead, 0, i, n*(i%4), n)
		read(i, n*(i%4))
	}
	p := appendRequest(nil, cmdWrite, 0, 100, 0, inputReadOnly-2*requestLen) // refused, and skipped
	p = append(p, make([]byte, inputReadOnly-2*requestLen)...)
	c.write(appendRequest(p, cmdRead, 0, 101, 8*n, n))
	if k := c.chunk(0); k.cookie != 100 || k.errno != ePerm {
		t.Fatalf("the write: %+v", k)
	}
	read(101, 8*n)
	c.nc.Close()
	within(t, ended)
	d.NoPins(t)
}

// A client that waits for a slow write, and has sent nothing else, keeps its reader, which does
// the next write too.
func TestSlowWritesOfALoneClient(t *testing.T) {
	d := blocktest.NewMemory(testSize)
	var inline, away atomic.Int32
	d.OnWrite = func(context.Context, blockmap.Extent) error {
		if bytes.Contains(debug.Stack(), []byte("writeInline")) {
			inline.Add(1)
		} else {
			away.Add(1)
		}
		time.Sleep(5 * inlineTime)
		return nil
	}
	c, _ := transmit(t, t.Context(), &Server{}, &Export{Device: d})
	for i := range uint64(20) {
		c.mustDo(cmdWrite, 0, 4096*i, 4096, pattern(0, 4096))
	}
	if away.Load() > 0 {
		t.Errorf("the reader did %d writes, and other goroutines %d", inline.Load(), away.Load())
	}
}

// replyOf is reply where the number of bytes depends on the cookie.
func (c *client) replyOf(sizes map[uint64]int) []chunk {
	c.t.Helper()
	k := c.chunk(0)
	cs := []chunk{k}
	if k.typ == simpleType && k.errno == 0 {
		c.read(sizes[k.cookie])
	}
	for k.flags&chunkDone == 0 {
		k = c.chunk(0)
		cs = append(cs, k)
	}
	return cs
}

// Writes to a slow device are in flight at once. None of them is answered before all are.
func TestSlowWritesAtOnce(t *testing.T) {
	const n = 32
	d := newSlowWrites(testSize, testSize)
	c := dial(t, serveDevice(t, Export{Device: d}))
	c.enter(false)
	var p []byte
	for i := range uint64(n) {
		p = append(appendRequest(p, cmdWrite, 0, i, i*4096, 4096), pattern(int64(i)*4096, 4096)...)
	}
	c.write(p)
	for i := range n {
		select {
		case <-d.waiting:
		case <-time.After(time.Minute):
			t.Fatalf("%d of %d writes are in flight, and no more come", i, n)
		}
	}
	close(d.open)
	seen := make(map[uint64]bool)
	for range n {
		k := c.chunk(0)
		if k.errno != 0 || seen[k.cookie] {
			t.Fatalf("%+v", k)
		}
		seen[k.cookie] = true
	}
	if !bytes.Equal(d.Content(blockmap.Range(0, n*4096)), pattern(0, n*4096)) {
		t.Error("wrong bytes were written")
	}
}

// Each slow write costs a goroutine while it lasts, and none afterwards, and those in
// flight are bounded.
func TestSlowWritesLeaveNothing(t *testing.T) {
	const limit = 3
	d := blocktest.NewMemory(testSize)
	var now, most atomic.Int32
	d.OnWrite = func(context.Context, blockmap.Extent) error {
		m := now.Add(1)
		for old := most.Load(); m > old && !most.CompareAndSwap(old, m); old = most.Load() {
		}
		time.Sleep(4 * time.Millisecond) // a slow disk
		now.Add(-1)
		return nil
	}
	srv := &Server{Exports: Static{{Name: "disk", Device: d}}, MaxWaiters: limit}
	c := dial(t, serve(t, srv))
	c.enter(true)
	c.mustDo(cmdFlush, 0, 0, 0, nil)
	before := runtime.NumGoroutine()
	const rounds, each = 10, afterInline + 1 // one reader is replaced in each round
	for range rounds {
		go func() {
			var p []byte
			for i := range uint64(each) {
				p = append(appendRequest(p, cmdWrite, 0, i, i*4096, 4096), make([]byte, 4096)...)
			}
			c.write(p)
		}()
		for range each {
			if k := c.reply(0)[0]; k.errno != 0 {
				t.Fatalf("%+v", k)
			}
		}
	}
	if m := most.Load(); m > limit+1 {
		t.Errorf("%d writes were in flight, at most %d are allowed", m, limit)
	}
	eventually(t, fmt.Sprintf("the goroutines of %d slow writes end", rounds), func() bool { return runtime.NumGoroutine() <= before+2 })
}

// A small write that was taken over counts for what it keeps, which is the input buffer of its
// reader, and for nothing when it has ended.
func TestSlowWriteCountsItsBuffer(t *testing.T) {
	d := newSlowWrites(testSize, 4096)
	a := newAdmission(t, Limits{Requests: 100})
	c, _ := transmit(t, t.Context(), &Server{Admission: a}, &Export{Device: d})
	p := append(appendRequest(nil, cmdWrite, 0, 1, 0, 512), pattern(0, 512)...)
	c.write(append(appendRequest(p, cmdWrite, 0, 2, 4096, 512), pattern(0, 512)...))
	if k := c.reply(0)[0]; k.cookie != 2 || k.errno != 0 {
		t.Fatalf("%+v", k)
	}
	want := Limits{Requests: 1, Bytes: inputWritable}
	eventually(t, "the second write has ended", func() bool { return a.InFlight().Requests == 1 })
	if got := a.InFlight(); got != want {
		t.Errorf("%+v is in flight, want %+v", got, want)
	}
	close(d.open)
	if k := c.reply(0)[0]; k.cookie != 1 || k.errno != 0 {
		t.Fatalf("%+v", k)
	}
	eventually(t, "the slow write has ended", func() bool { return a.InFlight() == Limits{} })
}

// A write that never ends fails after the FaultTimeout, and later ones do not.
func TestSlowWriteTimesOut(t *testing.T) {
	d := newSlowWrites(testSize, 4096) // never opened
	srv := &Server{Exports: Static{{Name: "disk", Device: d}}, FaultTimeout: 30 * time.Millisecond}
	c := dial(t, serve(t, srv))
	c.enter(true)
	for range 2 {
		c.mustFail(cmdWrite, 0, 0, 4096, eIO)
		for i := range uint64(2 * afterInline) {
			c.mustDo(cmdWrite, 0, 4096+i*4096, 4096, pattern(0, 4096))
		}
	}
}

// A session whose reader is stuck in a write ends when the client goes, when the server
// closes, and, once the write is answered, when the server shuts down.
func TestSlowWriteEndsWithSession(t *testing.T) {
	for name, end := range map[string]func(srv *Server, c *client, d *slowWrites) error{
		"the client goes": func(_ *Server, c *client, _ *slowWrites) error { return c.nc.Close() },
		"DISC": func(_ *Server, c *client, d *slowWrites) error {
			c.send(cmdDisc, 0, 2, 0, 0)
			close(d.open)
			return nil
		},
		"Close": func(srv *Server, _ *client, _ *slowWrites) error { return srv.Close() },
		"Shutdown": func(srv *Server, c *client, d *slowWrites) error {
			ended := make(chan error, 1)
			go func() { ended <- srv.Shutdown(context.Background()) }()
			eventually(c.t, "the shutdown begins", srv.conns().Closed)
			close(d.open)
			if k := c.reply(0)[0]; k.cookie != 1 || k.errno != 0 {
				return fmt.Errorf("the write: %+v", k)
			}
			return <-ended
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newSlowWrites(testSize, 4096)
			srv := &Server{}
			c, ended := transmit(t, t.Context(), srv, &Export{Device: d})
			c.write(append(appendRequest(nil, cmdWrite, 0, 1, 0, 4096), pattern(0, 4096)...))
			<-d.waiting
			if err := end(srv, c, d); err != nil {
				t.Error(err)
			}
			within(t, ended)
			if st := srv.Stats(); st.Conns != 0 {
				t.Errorf("%+v", st)
			}
			if name == "DISC" || name == "Shutdown" {
				if !bytes.Equal(d.Content(blockmap.Range(0, 4096)), pattern(0, 4096)) {
					t.Error("the write was answered, or was to be, and is not done")
				}
			}
			srv.Close()
		})
	}
}

// Payloads that come in pieces are taken as a whole, and no reply waits for them.
func TestSmallPayloadInPieces(t *testing.T) {
	for _, transport := range transports {
		d := blocktest.NewMemory(4 << 20)
		c := reach(t, transport, &Server{Exports: Static{{Name: "disk", Device: d}}})(false)
		const n = maxInline
		want := make([]byte, 0, 40*n)
		for i := range uint64(40) {
			p := pattern(int64(i)*n, n)
			want = append(want, p...)
			p = append(appendRequest(nil, cmdWrite, 0, i, i*n, n), p...)
			cut := int(i) * 1789 % len(p)
			c.write(append(appendRequest(nil, cmdRead, 0, 1000, 4<<20-4096, 4096), p[:cut]...))
			if k := c.chunk(4096); k.cookie != 1000 || k.errno != 0 {
				t.Fatalf("%s: %+v", transport, k)
			}
			c.write(p[cut:])
			if k := c.chunk(0); k.cookie != i || k.errno != 0 {
				t.Fatalf("%s: %+v", transport, k)
			}
		}
		if !bytes.Equal(d.Content(blockmap.Range(0, 40*n)), want) {
			t.Errorf("%s: wrong bytes were written", transport)
		}
	}
}

// Errors of writes that the reader does itself reach the client as any other.
func TestSmallWriteFails(t *testing.T) {
	d := blocktest.NewMemory(testSize)
	d.OnWrite = func(_ context.Context, e blockmap.Extent) error {
		if e.Start == 0 {
			return &errWrap{syscall.ENOSPC}
		}
		return errors.New("the disk is gone")
	}
	l, log := newLogged()
	srv := &Server{Exports: Static{{Name: "disk", Device: d}}, Log: log}
	c := dial(t, serve(t, srv))
	c.enter(true)
	if k := c.mustFail(cmdWrite, 0, 0, 4096, eNoSpace); k.msg == "" {
		t.Errorf("no sentence: %+v", k)
	}
	l.wait(t, "request failed")
	c.mustFail(cmdWrite, 0, 4096, 4096, eIO)
	if st := srv.Stats(); st.Errors != 2 {
		t.Errorf("%+v", st)
	}
}

// flatWritable takes writes at no cost.
type flatWritable struct{ flat }

func (d *flatWritable) WriteAt(_ context.Context, p []byte, off int64) error {
	copy(d.p[off:], p)
	return nil
}
func (d *flatWritable) Zero(context.Context, blockmap.Extent, bool) error { return nil }
func (d *flatWritable) Discard(context.Context, blockmap.Extent) error    { return nil }
func (d *flatWritable) Flush(context.Context) error                       { return nil }

// A small write allocates nothing.
func TestSmallWritesAllocateNothing(t *testing.T) {
	for _, structured := range []bool{false, true} {
		c := dial(t, serveDevice(t, Export{Device: &flatWritable{flat{make([]byte, testSize)}}}))
		c.enter(structured)
		const n = 32
		var p []byte
		for i := range uint64(n) {
			p = append(appendRequest(p, cmdWrite, 0, i, i*4096, 4096), pattern(int64(i)*4096, 4096)...)
		}
		in := make([]byte, n*simpleReplyLen)
		allocs := testing.AllocsPerRun(200, func() {
			c.nc.Write(p)
			if _, err := io.ReadFull(c.nc, in); err != nil {
				t.Error(err)
			}
		})
		if allocs > 1 { // a look of the watchdog is a goroutine
			t.Errorf("structured=%v: %v allocations for %d writes", structured, allocs, n)
		}
	}
}

// BenchmarkWrites is the server's own part of a small write, as BenchmarkHits is.
func BenchmarkWrites(b *testing.B) {
	d := &flatWritable{flat{make([]byte, testSize)}}
	s := &session{c: &conn{}, w: nullWire{}, dev: d, wdev: d, size: testSize, ctx: b.Context()}
	s.mu.changed.L = &s.mu
	s.watchdog.Stop() // it never looks
	const n = 32
	var p []byte
	for i := range uint64(n) {
		p = append(appendRequest(p, cmdWrite, 0, i, i*4096, 4096), pattern(int64(i)*4096, 4096)...)
	}
	s.in = make([]byte, inputWritable)
	for b.Loop() {
		s.end = copy(s.in, p)
		if s.parse(b.Context()) != nil || s.flush() != nil {
			b.Fatal("failed")
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/write")
}
