package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

func TestRead(t *testing.T) {
	dev := newPatternDevice(testSize)
	dev.Evict(blockmap.Range(testSize/2, testSize/4))
	path := serveDevice(t, Export{Device: dev})
	for _, structured := range []bool{false, true} {
		for _, flags := range []uint16{0, cmdFlagDF} {
			if flags != 0 && !structured {
				continue
			}
			t.Run(fmt.Sprintf("structured=%v flags=%d", structured, flags), func(t *testing.T) {
				c := dial(t, path)
				c.enter(structured)
				for i := range 300 {
					off := rand.Int64N(testSize)
					n := rand.Int64N(testSize - off + 1)
					if i%2 == 0 {
						n = min(n, 10000)
					}
					c.send(cmdRead, flags, uint64(i), uint64(off), uint32(n))
					cs := c.reply(int(n))
					var got []byte
					if structured {
						if cs[len(cs)-1].typ == chunkNone && n > 0 {
							cs = cs[:len(cs)-1]
						}
						if flags == cmdFlagDF && (len(cs) != 1 || cs[0].hole != 0) {
							t.Fatalf("DF: %d chunks", len(cs))
						}
						got = assemble(t, cs, uint64(off), int(n))
					} else {
						got = cs[0].data
					}
					if cs[0].cookie != uint64(i) || !bytes.Equal(got, dev.Content(blockmap.Range(off, n))) {
						t.Fatalf("wrong data for [%d+%d]", off, n)
					}
				}
			})
		}
	}
}

func TestHolesAreChunks(t *testing.T) {
	path := serveDevice(t, Export{Device: newPatternDevice(testSize)}) // every fourth block is a hole
	c := dial(t, path)
	c.enter(true)
	c.send(cmdRead, 0, 1, 100, 7*4096)
	cs := c.reply(0)
	want := []chunk{
		{typ: chunkData, offset: 100, data: make([]byte, 3*4096-100)},
		{typ: chunkHole, offset: 3 * 4096, hole: 4096},
		{typ: chunkData, offset: 4 * 4096, data: make([]byte, 3*4096)},
		{typ: chunkHole, offset: 7 * 4096, hole: 100, flags: chunkDone},
	}
	if len(cs) != len(want) {
		t.Fatalf("%d chunks", len(cs))
	}
	for i, w := range want {
		if g := cs[i]; g.typ != w.typ || g.offset != w.offset || g.hole != w.hole || len(g.data) != len(w.data) || g.flags != w.flags {
			t.Errorf("chunk %d: type %d offset %d hole %d data %d flags %d", i, g.typ, g.offset, g.hole, len(g.data), g.flags)
		}
	}
}

// Every kind of invalid request gets its errno, and the connection continues.
func TestRefusals(t *testing.T) {
	dev := newPatternDevice(testSize)
	check := func(t *testing.T, c *client, structured, writable bool) {
		perm := func(e errno) errno {
			if !writable {
				return ePerm
			}
			return e
		}
		c.mustFail(99, 0, 0, 0, eInval)
		c.mustFail(cmdRead, 0, testSize, 1, eInval)
		c.mustFail(cmdRead, 0, testSize-1, 2, eInval)
		c.mustFail(cmdRead, 0, 1<<64-1, 2, eInval)
		c.mustFail(cmdRead, 0, 1<<63, 2, eInval)
		c.mustFail(cmdRead, cmdFlagNoHole, 0, 1, eInval)
		c.mustFail(cmdRead, 1<<15, 0, 1, eInval)
		c.mustFail(cmdRead, 0, 0, 1<<32-1, eInval) // beyond the end
		c.mustFail(cmdWrite, 0, testSize-1, 2, perm(eNoSpace))
		c.mustFail(cmdWrite, 0, 1<<64-1, 2, perm(eNoSpace))
		c.mustFail(cmdWrite, cmdFlagDF, 0, 100_000, perm(eInval))
		c.mustFail(cmdWrite, 0, 0, maxPayload+1, perm(eInval))
		c.mustFail(cmdTrim, 0, testSize-1, 2, perm(eInval))
		c.mustFail(cmdTrim, cmdFlagNoHole, 0, 2, perm(eInval))
		c.mustFail(cmdWriteZeroes, 0, testSize-1, 2, perm(eNoSpace))
		c.mustFail(cmdWriteZeroes, cmdFlagReqOne, 0, 2, perm(eInval))
		c.mustFail(cmdWriteZeroes, cmdFlagFastZero|cmdFlagNoHole, 0, 2, perm(eNotSup))
		c.mustFail(cmdFlush, 0, 0, 1, eInval)
		c.mustFail(cmdFlush, 0, 1, 0, eInval)
		c.mustFail(cmdCache, 0, testSize, 1, eInval)
		c.mustFail(cmdCache, cmdFlagDF, 0, 1, eInval)
		c.mustFail(cmdBlockStatus, 0, 0, 1, eInval) // no context chosen
		if !structured {
			c.mustFail(cmdRead, cmdFlagDF, 0, 1, eInval)
		}
		if !writable {
			c.mustFail(cmdRead, cmdFlagFUA, 0, 1, eInval)
		}
		c.mustDo(cmdFlush, 0, 0, 0, nil)
		c.send(cmdRead, 0, 9, testSize, 0)
		if k := c.reply(0)[0]; k.errno != 0 {
			t.Errorf("READ of nothing at the end: %d", k.errno)
		}
	}
	for _, structured := range []bool{false, true} {
		for name, e := range map[string]Export{
			"writable":          {Device: dev},
			"read-only":         {Device: readOnly{dev}},
			"read-only by wish": {Device: dev, ReadOnly: true},
		} {
			t.Run(fmt.Sprintf("%s structured=%v", name, structured), func(t *testing.T) {
				c := dial(t, serveDevice(t, e))
				f := c.enter(structured)
				if (f&flagReadOnly == 0) != (name == "writable") || (f&flagDF != 0) != structured || f&flagMultiConn == 0 {
					t.Errorf("flags %#x", f)
				}
				check(t, c, structured, name == "writable")
			})
		}
	}
	dev.NoPins(t)
}

func TestReadTooLarge(t *testing.T) {
	path := serveDevice(t, Export{Device: blocktest.NewMemory(2 * maxPayload)})
	c := dial(t, path)
	c.enter(false)
	c.mustFail(cmdRead, 0, 0, maxPayload+1, eInval)
	c = dial(t, path)
	c.enter(true)
	c.mustFail(cmdRead, 0, 0, maxPayload+1, eOverflow)
	c.send(cmdRead, 0, 1, 5, maxPayload)
	if cs := c.reply(0); len(cs) != 1 || cs[0].hole != maxPayload {
		t.Errorf("%d chunks, hole of %d", len(cs), cs[0].hole)
	}
	// A request without a payload may be larger than one with a payload.
	c.mustDo(cmdTrim, 0, 0, 2*maxPayload, nil)
	c.mustDo(cmdWriteZeroes, 0, 0, 2*maxPayload, nil)
	c.mustDo(cmdCache, 0, 0, 2*maxPayload, nil)
}

// The server reads past the payload of a refused write. If the payload is unreasonably
// long, the server drops the connection.
func TestOversizedWrite(t *testing.T) {
	path := serveDevice(t, Export{Device: blocktest.NewMemory(testSize)})
	c := dial(t, path)
	c.enter(true)
	c.send(cmdWrite, 0, 1, 0, maxSkipPayload+1)
	c.closed()
}

func TestBadMagic(t *testing.T) {
	c := dial(t, serveDevice(t, Export{Device: blocktest.NewMemory(testSize)}))
	c.enter(true)
	p := appendRequest(nil, cmdRead, 0, 1, 0, 4096)
	p = append(p, make([]byte, requestLen)...)
	c.write(p)
	if k := c.reply(0)[0]; k.cookie != 1 { // what came before is answered
		t.Errorf("cookie %d", k.cookie)
	}
	c.closed()
}

func TestWrites(t *testing.T) {
	dev := blocktest.NewMemory(testSize)
	path := serveDevice(t, Export{Device: dev})
	for _, structured := range []bool{false, true} {
		c := dial(t, path)
		c.enter(structured)
		for i := range 100 {
			off := rand.Int64N(testSize)
			n := rand.Int64N(min(testSize-off, 300_000) + 1)
			p := pattern(off+int64(i), n)
			c.mustDo(cmdWrite, 0, uint64(off), uint32(n), p)
			if !bytes.Equal(dev.Content(blockmap.Range(off, n)), p) {
				t.Fatalf("wrong data written at [%d+%d]", off, n)
			}
		}
	}
	c := dial(t, path)
	c.enter(true)
	calls := func(want ...string) {
		t.Helper()
		if got := dev.Calls(); !slices.Equal(got, want) {
			t.Errorf("calls %q, want %q", got, want)
		}
	}
	dev.Calls()
	c.mustDo(cmdWrite, cmdFlagFUA, 0, 4096, make([]byte, 4096))
	calls("write", "flush")
	c.mustDo(cmdTrim, 0, 0, 4096, nil)
	calls("discard")
	c.mustDo(cmdTrim, cmdFlagFUA, 0, 4096, nil)
	calls("discard", "flush")
	c.mustDo(cmdWriteZeroes, cmdFlagFastZero, 0, 4096, nil)
	calls("zero")
	if st := dev.Status(blockmap.Range(0, 4096)); !st.Zero {
		t.Error("WRITE_ZEROES left no hole")
	}
	c.mustDo(cmdWriteZeroes, cmdFlagNoHole|cmdFlagFUA, 0, 4096, nil)
	calls("zero", "flush")
	if st := dev.Status(blockmap.Range(0, 4096)); st.Zero {
		t.Error("WRITE_ZEROES with NO_HOLE left a hole")
	}
	c.mustDo(cmdFlush, 0, 0, 0, nil)
	calls("flush")
	c.mustDo(cmdFlush, cmdFlagFUA, 0, 0, nil)
	calls("flush")
	c.send(cmdRead, cmdFlagFUA, 1, 0, 10) // strange, and allowed
	if k := c.reply(0)[0]; k.errno != 0 {
		t.Errorf("READ with FUA: %d", k.errno)
	}
}

func TestBlockStatus(t *testing.T) {
	dev := blocktest.NewMemory(16 * 4096)
	// data 0-3, holes 4-7, data 8-15; absent 2-5
	for i := range 16 {
		if i < 4 || i > 7 {
			dev.Fill(make([]byte, 4096), int64(i)*4096)
		}
	}
	dev.Evict(blockmap.Range(2*4096, 4*4096))
	path := serveDevice(t, Export{Device: dev})

	status := func(c *client, flags uint16, off uint64, n uint32) map[uint32]string {
		c.send(cmdBlockStatus, flags, 3, off, n)
		got := make(map[uint32]string)
		for _, k := range c.reply(0) {
			if k.typ != chunkStatus || k.cookie != 3 {
				t.Fatalf("chunk %+v", k)
			}
			s := ""
			for p := k.data[4:]; len(p) > 0; p = p[8:] {
				s += fmt.Sprintf("%d:%d ", binary.BigEndian.Uint32(p), binary.BigEndian.Uint32(p[4:]))
			}
			got[binary.BigEndian.Uint32(k.data)] = s
		}
		return got
	}
	c := dial(t, path)
	c.enter(true, "base:allocation", "x-thaw:resident")
	for _, test := range []struct {
		flags       uint16
		off         uint64
		n           uint32
		alloc, resi string
	}{
		{0, 0, 16 * 4096, "16384:0 16384:3 32768:0 ", "8192:1 8192:0 49152:1 "},
		{cmdFlagReqOne, 0, 16 * 4096, "16384:0 ", "8192:1 "},
		{cmdFlagReqOne, 100, 50, "50:0 ", "50:1 "},
		{0, 5*4096 + 1, 4096, "4096:3 ", "4096:1 "},
		{0, 16*4096 - 1, 1, "1:0 ", "1:1 "},
	} {
		got := status(c, test.flags, test.off, test.n)
		if got[uint32(contextAllocation)] != test.alloc || got[uint32(contextResident)] != test.resi {
			t.Errorf("%d+%d: %v", test.off, test.n, got)
		}
	}
	c.mustFail(cmdBlockStatus, 0, 0, 0, eInval)
	c.mustFail(cmdBlockStatus, 0, 4096, 16*4096, eInval)
	c.mustFail(cmdBlockStatus, cmdFlagDF, 0, 4096, eInval)

	c = dial(t, path)
	c.enter(true, "x-thaw:resident")
	if got := status(c, 0, 0, 16*4096); len(got) != 1 || got[uint32(contextResident)] == "" {
		t.Errorf("one context: %v", got)
	}
}

// checkered alternates between data and hole.
type checkered struct{ blockmap.Device }

func (checkered) Status(e blockmap.Extent) blockmap.Status {
	i := e.Start / blockmap.BlockSize
	return blockmap.Status{Extent: blockmap.Range(i*blockmap.BlockSize, blockmap.BlockSize), Zero: i%2 == 0}
}

// stubborn gives no useful answers.
type stubborn struct{ blockmap.Device }

func (stubborn) Status(blockmap.Extent) blockmap.Status { return blockmap.Status{} }

func TestBlockStatusBounds(t *testing.T) {
	e := blockmap.Range(0, 1<<32-4096)
	xs := blockStatus(t.Context(), checkered{}, e, []metaContext{contextAllocation}, 1000)
	if n := xs[0].count(); n != 1000 {
		t.Errorf("%d extents", n)
	}
	xs = blockStatus(t.Context(), checkered{}, e, []metaContext{contextAllocation}, maxExtents)
	if n := xs[0].count(); n != 1<<20-1 {
		t.Errorf("%d extents", n)
	}
	xs = blockStatus(t.Context(), stubborn{}, e, []metaContext{contextAllocation}, maxExtents)
	if n := xs[0].count(); n != 1 || binary.BigEndian.Uint32(xs[0].p[4:]) != 1<<32-4096 {
		t.Errorf("stubborn: %d extents", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	xs = blockStatus(ctx, checkered{}, e, []metaContext{contextAllocation}, maxExtents)
	if n := xs[0].count(); n == 0 || n > 1024 {
		t.Errorf("cancelled: %d extents", n)
	}
}

// slowPrefetch prefetches when the test tells it to, and counts requests for it.
type slowPrefetch struct {
	*blocktest.Memory
	mu      sync.Mutex
	pending []blockmap.Extent
}

func (d *slowPrefetch) Prefetch(e blockmap.Extent) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pending = append(d.pending, e)
}

// take prefetches the requested chunks.
func (d *slowPrefetch) take(ctx context.Context) []blockmap.Extent {
	d.mu.Lock()
	defer d.mu.Unlock()
	es := d.pending
	d.pending = nil
	for _, e := range es {
		d.Fault(ctx, e)
	}
	return es
}

func TestCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 64 << 20
		dev := blocktest.NewMemory(size)
		dev.Fill(make([]byte, size), 0)
		dev.Evict(blockmap.Range(0, size))
		p := &slowPrefetch{Memory: dev}
		l := newPipeListener()
		serveOn(t, &Server{Exports: Static{{Name: "disk", Device: p}}, FaultTimeout: time.Minute}, l)
		c := &client{t, l.dial()}
		c.hello(3)
		c.enter(true)
		for range 100 {
			c.mustDo(cmdCache, 0, 0, size, nil) // answered before it is done
		}
		// The server asks the device for little, however much clients request.
		var brought int64
		for range size / cacheStep {
			time.Sleep(time.Second)
			es := p.take(t.Context())
			if len(es) > maxBackground {
				t.Fatalf("%d prefetches at once", len(es))
			}
			for _, e := range es {
				if e.Len() > cacheStep {
					t.Fatalf("prefetch of %v", e)
				}
				brought = max(brought, e.End)
			}
		}
		if brought != size || !blockmap.Resident(p, blockmap.Range(0, size)) {
			t.Errorf("%d bytes were prefetched", brought)
		}
		time.Sleep(time.Second)
		if es := p.take(t.Context()); len(es) > 0 {
			t.Errorf("and %v", es)
		}
		// The server stops asking a device that does not bring what the server asks
		// for.
		dev.Evict(blockmap.Range(0, size))
		c.mustDo(cmdCache, 0, 0, size, nil)
		time.Sleep(2 * time.Minute)
		p.mu.Lock()
		if len(p.pending) != 1 {
			t.Errorf("asked for %v", p.pending)
		}
		p.mu.Unlock()
		c.nc.Close()
	})

	// However many commands arrive, only a few run at once.
	synctest.Test(t, func(t *testing.T) {
		dev := blocktest.NewMemory(testSize)
		dev.Fill(make([]byte, testSize), 0)
		dev.Evict(blockmap.Range(0, testSize))
		p := &slowPrefetch{Memory: dev}
		l := newPipeListener()
		serveOn(t, &Server{Exports: Static{{Name: "disk", Device: p}}}, l)
		c := &client{t, l.dial()}
		c.hello(3)
		c.enter(true)
		for range 10 * maxBackground {
			c.mustDo(cmdCache, 0, 0, 4096, nil) // answered before it is done
		}
		synctest.Wait()
		if es := p.take(t.Context()); len(es) != maxBackground {
			t.Errorf("%d prefetches at once, want %d", len(es), maxBackground)
		}
		c.nc.Close()
	})
}

// Errors of the device, and what a client sees of them.
func TestDeviceErrors(t *testing.T) {
	dev := newPatternDevice(testSize)
	var fail atomic.Value
	dev.OnFault = func(context.Context, blockmap.Extent) error { return fail.Load().(error) }
	dev.OnWrite = dev.OnFault
	dev.Evict(blockmap.Range(2*4096, 4096))
	path := serveDevice(t, Export{Device: dev})
	simple, structured := dial(t, path), dial(t, path)
	simple.enter(false)
	structured.enter(true)
	for _, test := range []struct {
		err         error
		read, write errno
	}{
		{errBroken, eIO, eIO},
		{fmt.Errorf("write: %w", blockmap.ErrNoSpace), eIO, eNoSpace},
		{&errWrap{syscall.ENOSPC}, eIO, eNoSpace},
		{syscall.EDQUOT, eIO, eNoSpace},
		{blockmap.ErrReadOnly, ePerm, ePerm},
		{blockmap.ErrOutOfRange, eInval, eNoSpace},
		{blockmap.ErrClosed, eShutdown, eShutdown},
		{syscall.ENOMEM, eNoMem, eNoMem},
		{context.DeadlineExceeded, eIO, eIO},
		{errors.ErrUnsupported, eIO, eIO},
	} {
		fail.Store(&errWrap{test.err})
		simple.mustFail(cmdRead, 0, 2*4096, 100, test.read)
		k := structured.mustFail(cmdRead, 0, 2*4096+50, 100, test.read)
		if k.typ != chunkErrorOffset || k.offset != 2*4096+50 || k.msg != "wrapped: "+test.err.Error() {
			t.Errorf("chunk %+v", k)
		}
		if k := structured.mustFail(cmdRead, cmdFlagDF, 2*4096, 100, test.read); k.typ != chunkError {
			t.Errorf("DF: chunk %+v", k)
		}
		simple.mustFail(cmdWrite, 0, 0, 100, test.write)
		structured.mustFail(cmdWrite, cmdFlagFUA, 0, 100, test.write)
	}

	// The client gets the bytes before the hole in the cache.
	structured.send(cmdRead, 0, 8, 4096-10, 3*4096)
	cs := structured.reply(0)
	if len(cs) != 2 || cs[0].typ != chunkData || cs[0].flags != 0 ||
		!bytes.Equal(cs[0].data, dev.Content(blockmap.Range(4096-10, 4096+10))) ||
		cs[1].typ != chunkErrorOffset || cs[1].offset != 2*4096 {
		t.Errorf("partial read: %d chunks", len(cs))
	}
	dev.NoPins(t)
}

// errWrap lets errors of all kinds be stored in one atomic.Value.
type errWrap struct{ err error }

func (e *errWrap) Error() string { return "wrapped: " + e.err.Error() }
func (e *errWrap) Unwrap() error { return e.err }

// gate blocks Faults until it is opened.
type gate struct {
	waiting chan struct{} // one for each that has come
	open    chan struct{}
}

func newGate(dev *blocktest.Memory) *gate {
	g := &gate{make(chan struct{}, 10000), make(chan struct{})}
	dev.OnFault = func(ctx context.Context, _ blockmap.Extent) error {
		g.waiting <- struct{}{}
		select {
		case <-g.open:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return g
}

func TestHitsOvertakeMisses(t *testing.T) {
	dev := newFullDevice(testSize)
	dev.Evict(blockmap.Range(0, testSize/2))
	g := newGate(dev)
	c := dial(t, serveDevice(t, Export{Device: dev}))
	c.enter(false)
	// One write, misses first.
	var p []byte
	for i := range uint64(8) {
		p = appendRequest(p, cmdRead, 0, i, i*4096, 4096)
	}
	for i := range uint64(8) {
		p = appendRequest(p, cmdRead, 0, 100+i, testSize/2+i*4096, 4096)
	}
	c.write(p)
	for i := range uint64(8) {
		if k := c.chunk(4096); k.cookie != 100+i {
			t.Fatalf("hit %d: cookie %d", i, k.cookie)
		}
	}
	close(g.open)
	seen := make(map[uint64]bool)
	for range 8 {
		k := c.chunk(4096)
		if k.cookie >= 8 || seen[k.cookie] || !bytes.Equal(k.data, dev.Content(blockmap.Range(int64(k.cookie)*4096, 4096))) {
			t.Fatalf("miss: cookie %d", k.cookie)
		}
		seen[k.cookie] = true
	}
}

// Many misses of one connection wait at once, up to the bound. Then the server stops
// reading the connection, and continues when they are done.
func TestMissesInFlight(t *testing.T) {
	overall, err := NewAdmission(Limits{Requests: 7})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		srv  *Server
		size uint32
		want int
	}{
		{&Server{}, 4096, 128},
		{&Server{MaxWaiters: 10}, 4096, 10},
		{&Server{MaxInFlightBytes: 160 << 10}, 4096, 40},
		{&Server{MaxInFlightBytes: MinInFlightBytes}, 2 * MinInFlightBytes, 1}, // one is always let in
		{&Server{Admission: overall}, 4096, 7},
	} {
		dev := newFullDevice(testSize)
		dev.Evict(blockmap.Range(0, testSize))
		g := newGate(dev)
		test.srv.Exports = Static{{Name: "disk", Device: dev}}
		c := dial(t, serve(t, test.srv))
		c.enter(true)
		const n = 200
		var p []byte
		for i := range uint64(n) {
			p = appendRequest(p, cmdRead, 0, i, i*4096%(testSize-uint64(test.size)), test.size)
		}
		c.write(p)
		for range test.want {
			<-g.waiting
		}
		if len(g.waiting) > 0 {
			t.Errorf("more than %d misses in flight", test.want)
		}
		close(g.open)
		for range n {
			if cs := c.reply(0); cs[0].errno != 0 {
				t.Fatalf("cookie %d: errno %d", cs[0].cookie, cs[0].errno)
			}
		}
		dev.NoPins(t)
	}
}

// 320 distinct misses of 5 ms at queue depth 32 take ten times 5 ms.
func TestMissesTakeTheirTimeTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := newFullDevice(320 * 4096)
		dev.Evict(blockmap.Range(0, dev.Size()))
		var now, most atomic.Int64
		dev.OnFault = func(context.Context, blockmap.Extent) error {
			most.Store(max(most.Load(), now.Add(1)))
			time.Sleep(5 * time.Millisecond)
			now.Add(-1)
			return nil
		}
		l := newPipeListener()
		serveOn(t, &Server{Exports: Static{{Name: "disk", Device: dev}}}, l)
		c := &client{t, l.dial()}
		c.hello(3)
		c.enter(true)

		begin := time.Now()
		depth := make(chan struct{}, 32)
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := range uint64(320) {
				depth <- struct{}{}
				c.send(cmdRead, 0, i, i*4096, 4096)
			}
		})
		for range 320 {
			if k := c.reply(0)[0]; k.errno != 0 {
				t.Errorf("errno %d", k.errno)
			}
			<-depth
		}
		wg.Wait()
		if d := time.Since(begin); d > 55*time.Millisecond {
			t.Errorf("took %v", d)
		}
		if most.Load() < 28 {
			t.Errorf("%d in flight at most", most.Load())
		}
		c.nc.Close()
	})
}

// A device that never makes promised data resident causes an error, not a loop.
func TestFaultTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		serveOn(t, &Server{Exports: Static{{Name: "disk", Device: never{}}}, FaultTimeout: 3 * time.Second}, l)
		c := &client{t, l.dial()}
		c.hello(3)
		c.enter(true)
		begin := time.Now()
		c.mustFail(cmdRead, 0, 0, 4096, eIO)
		if d := time.Since(begin); d < 2*time.Second || d > 4*time.Second {
			t.Errorf("failed after %v", d)
		}
		c.nc.Close()
	})
}

// never is evicted as soon as it is fetched.
type never struct{}

func (never) Size() int64                                    { return testSize }
func (never) View(blockmap.Extent) (v blockmap.View, b bool) { return }
func (never) Load(context.Context, blockmap.Extent) (v blockmap.View, b bool) {
	return
}
func (never) Fault(context.Context, blockmap.Extent) error { return nil }
func (never) Prefetch(blockmap.Extent)                     {}
func (never) Status(e blockmap.Extent) blockmap.Status     { return blockmap.Status{Extent: e} }

// The server drops a client that reads no replies after WriteTimeout, and releases its
// pins.
func TestStuckClient(t *testing.T) {
	dev := newPatternDevice(testSize)
	l, log := newLogged()
	srv := &Server{Exports: Static{{Name: "disk", Device: dev}}, WriteTimeout: 20 * time.Millisecond, Log: log}
	path := serve(t, srv)
	for _, miss := range []bool{false, true} {
		c := dial(t, path)
		c.enter(true)
		if miss {
			dev.Evict(blockmap.Range(0, testSize))
		}
		var p []byte
		for i := range uint64(1000) {
			p = appendRequest(p, cmdRead, 0, i, 0, testSize)
		}
		c.nc.Write(p)
		eventually(t, "the connection ends", func() bool { return srv.Stats().Conns == 0 })
		dev.NoPins(t)
	}
	l.wait(t, "write_timeout=20ms")
	if st := srv.Stats(); st.Sent > 64<<20 {
		t.Errorf("%d bytes sent to a client that reads none", st.Sent)
	}
}

// If a client vanishes, its waiting requests end.
func TestVanishedClient(t *testing.T) {
	dev := newFullDevice(testSize)
	dev.Evict(blockmap.Range(0, testSize))
	g := newGate(dev) // never opened
	l, log := newLogged()
	c := dial(t, serve(t, &Server{Exports: Static{{Name: "disk", Device: dev}}, Log: log}))
	c.enter(true)
	for i := range uint64(5) {
		c.send(cmdRead, 0, i, i*4096, 4096)
	}
	for range 5 {
		<-g.waiting
	}
	c.nc.Close()
	l.wait(t, "session ends")
	dev.NoPins(t)
}

// DISC answers requests in flight first.
func TestDisc(t *testing.T) {
	dev := newFullDevice(testSize)
	dev.Evict(blockmap.Range(0, testSize))
	g := newGate(dev)
	c := dial(t, serveDevice(t, Export{Device: dev}))
	c.enter(true)
	p := appendRequest(nil, cmdRead, 0, 1, 0, 4096)
	c.write(appendRequest(p, cmdDisc, 0, 2, 0, 0))
	<-g.waiting
	close(g.open)
	if k := c.reply(0)[0]; k.cookie != 1 || k.errno != 0 {
		t.Errorf("%+v", k)
	}
	c.closed()
}

// Reads, writes and misses from several connections at once. Every byte is checked
// against the connection's own writes.
func TestConcurrency(t *testing.T) {
	const part = 64 * 4096
	dev := blocktest.NewMemory(4 * part)
	path := serveDevice(t, Export{Device: dev})
	var wg sync.WaitGroup
	for i := range int64(4) {
		wg.Go(func() {
			c := dial(t, path)
			c.enter(i%2 == 0)
			rnd := rand.New(rand.NewPCG(1, uint64(i)))
			want := make([]byte, part)
			for range 50 {
				// Concurrent writes that do not overlap.
				var p []byte
				const n = 16
				for j := range int64(n) {
					off := j*part/n + rnd.Int64N(1000)
					b := pattern(rnd.Int64(), 1+rnd.Int64N(part/n-1000))
					copy(want[off:], b)
					p = append(appendRequest(p, cmdWrite, 0, uint64(j), uint64(i*part+off), uint32(len(b))), b...)
				}
				c.write(p)
				for range n {
					if k := c.reply(0)[0]; k.errno != 0 {
						t.Errorf("errno %d", k.errno)
						return
					}
				}
				dev.Evict(blockmap.Range(i*part+rnd.Int64N(part/2), part/4))
				c.send(cmdRead, 0, 1, uint64(i*part), part)
				cs := c.reply(part)
				got := cs[0].data
				if i%2 == 0 {
					got = assemble(t, cs, uint64(i*part), part)
				}
				if !bytes.Equal(got, want) {
					t.Errorf("connection %d did not read what it wrote", i)
					return
				}
			}
		})
	}
	wg.Wait()
	dev.NoPins(t)
}
