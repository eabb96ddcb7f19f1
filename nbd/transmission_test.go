package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// socketPair returns the two ends of a unix socket, as the kernel's nbd driver gets
// one.
func socketPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		ends[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ends[i].Close() })
	}
	ends[1].SetDeadline(time.Now().Add(5 * time.Minute))
	return ends[0], ends[1]
}

// transmit serves e to a client that begins with transmission. ended gets what
// ServeTransmission returns.
func transmit(t testing.TB, ctx context.Context, srv *Server, e *Export) (c *client, ended chan error) {
	t.Helper()
	server, nc := socketPair(t)
	ended = make(chan error, 1)
	go func() { ended <- srv.ServeTransmission(ctx, server, e) }()
	t.Cleanup(func() { nc.Close() })
	return &client{t, nc}, ended
}

// within returns the next value of ch, and fails t if none arrives in time.
func within(t testing.TB, ch <-chan error) error {
	t.Helper()
	select {
	case err := <-ch:
		return err
	case <-time.After(time.Minute):
		t.Fatal("ServeTransmission does not return")
		panic("unreachable")
	}
}

func TestTransmission(t *testing.T) {
	dev := newPatternDevice(testSize)
	dev.Evict(blockmap.Range(testSize/2, testSize/2))
	e := &Export{Name: "disk", Device: dev}
	size, flags := e.Transmission()
	if size != testSize || flags != flagHasFlags|flagMultiConn|flagCache|flagFlush|flagFUA|flagTrim|flagWriteZeroes|flagFastZero {
		t.Errorf("size %d, flags %#x", size, flags)
	}
	if _, flags := (&Export{Device: dev, ReadOnly: true}).Transmission(); flags != flagHasFlags|flagMultiConn|flagCache|flagReadOnly {
		t.Errorf("read-only: flags %#x", flags)
	}
	srv := &Server{} // no Exports: there is no handshake to name one in
	c, ended := transmit(t, t.Context(), srv, e)
	for off := uint64(0); off < testSize; off += 64 << 10 {
		c.send(cmdRead, 0, off, off, 64<<10)
		if k := c.chunk(64 << 10); k.typ != simpleType || k.cookie != off || k.errno != 0 ||
			!bytes.Equal(k.data, dev.Content(blockmap.Range(int64(off), 64<<10))) {
			t.Fatalf("READ at %d: errno %d or wrong bytes", off, k.errno)
		}
	}
	p := pattern(7, 10000)
	c.mustDo(cmdWrite, 0, 5000, 10000, p)
	if !bytes.Equal(dev.Content(blockmap.Range(5000, 10000)), p) {
		t.Error("WRITE has stored other bytes")
	}
	dev.Calls()
	c.mustDo(cmdWrite, cmdFlagFUA, 0, 4096, make([]byte, 4096))
	c.mustDo(cmdTrim, 0, 0, 4096, nil)
	c.mustDo(cmdWriteZeroes, 0, 0, 4096, nil)
	c.mustDo(cmdFlush, 0, 0, 0, nil)
	if got, want := dev.Calls(), []string{"write", "flush", "discard", "zero", "flush"}; !slices.Equal(got, want) {
		t.Errorf("calls %q, want %q", got, want)
	}
	c.mustFail(cmdRead, 0, testSize, 1, eInval)
	c.mustFail(cmdRead, cmdFlagDF, 0, 1, eInval)
	c.mustFail(cmdBlockStatus, 0, 0, 1, eInval)
	if st := srv.Stats(); st.Conns != 1 || st.Accepted != 1 || st.Hits == 0 || st.Misses == 0 {
		t.Errorf("%+v", st)
	}

	// Requests before DISC are answered.
	dev.Evict(blockmap.Range(0, testSize))
	c.write(appendRequest(appendRequest(nil, cmdRead, 0, 1, 16384, 4096), cmdDisc, 0, 2, 0, 0))
	if k := c.chunk(4096); k.cookie != 1 || k.errno != 0 {
		t.Errorf("%+v", k)
	}
	c.closed()
	if err := within(t, ended); err != nil {
		t.Errorf("after DISC: %v", err)
	}
	dev.NoPins(t)
	if st := srv.Stats(); st.Conns != 0 {
		t.Errorf("%+v", st)
	}
	if err := srv.Close(); err != nil {
		t.Error(err)
	}
}

// Several connections of one device, as the kernel opens them: a FLUSH on one covers
// the writes on all.
func TestTransmissionOverSeveralConnections(t *testing.T) {
	dev := blocktest.NewMemory(testSize)
	srv := &Server{}
	defer srv.Close()
	var wg sync.WaitGroup
	for i := range uint64(4) {
		c, _ := transmit(t, t.Context(), srv, &Export{Device: dev})
		wg.Go(func() {
			for j := range uint64(20) {
				c.mustDo(cmdWrite, 0, (i*20+j)*4096, 4096, pattern(int64(i*20+j)*4096, 4096))
			}
			c.mustDo(cmdFlush, 0, 0, 0, nil)
		})
	}
	wg.Wait()
	if n := dev.Dirty(); n != 0 {
		t.Errorf("%d writes are not flushed", n)
	}
	if !bytes.Equal(dev.Content(blockmap.Range(0, 80*4096)), pattern(0, 80*4096)) {
		t.Error("wrong data written")
	}
}

// However the session ends, nothing of it is left, and the caller gets the reason.
func TestTransmissionEnds(t *testing.T) {
	gone := errors.New("the device was detached")
	for name, test := range map[string]struct {
		end  func(srv *Server, c *client, cancel func(error))
		want error
	}{
		"the peer closes":   {func(_ *Server, c *client, _ func(error)) { c.nc.Close() }, io.EOF},
		"the context ends":  {func(_ *Server, _ *client, cancel func(error)) { cancel(gone) }, gone},
		"the server closes": {func(srv *Server, _ *client, _ func(error)) { srv.Close() }, ErrServerClosed},
	} {
		for _, busy := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s busy=%v", name, busy), func(t *testing.T) {
				dev := newFullDevice(testSize)
				dev.Evict(blockmap.Range(0, testSize))
				g := newGate(dev) // never opened
				l, log := newLogged()
				srv := &Server{Log: log}
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				c, ended := transmit(t, ctx, srv, &Export{Device: dev})
				if busy {
					c.send(cmdRead, 0, 1, 0, 4096)
					<-g.waiting
				} else {
					c.mustDo(cmdFlush, 0, 0, 0, nil)
				}
				test.end(srv, c, cancel)
				err := within(t, ended)
				if !errors.Is(err, test.want) {
					t.Errorf("it ends with %v, want %v", err, test.want)
				}
				dev.NoPins(t)
				if st := srv.Stats(); st.Conns != 0 {
					t.Errorf("%+v", st)
				}
				l.wait(t, "session begins")
				if s := l.wait(t, "session"); strings.Contains(s, "fails") {
					t.Errorf("logged %q", s)
				}
				srv.Close()
			})
		}
	}
}

// The peer dies in the middle of a WRITE's payload, and of a reply.
func TestTransmissionPeerDies(t *testing.T) {
	for _, what := range []string{"in a header", "in a payload", "in a reply"} {
		t.Run(what, func(t *testing.T) {
			dev := newFullDevice(testSize)
			srv := &Server{}
			defer srv.Close()
			c, ended := transmit(t, t.Context(), srv, &Export{Device: dev})
			switch what {
			case "in a header":
				c.write(make([]byte, 5))
			case "in a payload":
				c.send(cmdWrite, 0, 1, 0, 4096)
				c.write(make([]byte, 100))
			case "in a reply":
				for i := range uint64(4) { // more than a socket holds
					c.send(cmdRead, 0, i, 0, testSize)
				}
				c.read(1)
			}
			c.nc.Close()
			if err := within(t, ended); err == nil || !isGone(err) {
				t.Errorf("it ends with %v", err)
			}
			if n := dev.Dirty(); n != 0 {
				t.Error("half a WRITE was done")
			}
			dev.NoPins(t)
		})
	}
}

func isGone(err error) bool { return gone(err) }

// Shutdown answers requests in flight, as for a client of a listener.
func TestTransmissionShutdown(t *testing.T) {
	dev := newFullDevice(testSize)
	dev.Evict(blockmap.Range(0, testSize))
	g := newGate(dev)
	srv := &Server{}
	c, ended := transmit(t, t.Context(), srv, &Export{Device: dev})
	c.send(cmdRead, 0, 1, 0, 4096)
	<-g.waiting
	down := make(chan error, 1)
	go func() { down <- srv.Shutdown(context.Background()) }()
	eventually(t, "the shutdown begins", srv.conns().Closed)
	close(g.open)
	if k := c.chunk(4096); k.cookie != 1 || k.errno != 0 {
		t.Errorf("%+v", k)
	}
	c.closed()
	c.nc.Close()
	if err := within(t, down); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	if err := within(t, ended); err != ErrServerClosed {
		t.Errorf("it ends with %v", err)
	}
	a, b := socketPair(t)
	if err := srv.ServeTransmission(t.Context(), a, &Export{Device: dev}); err != ErrServerClosed {
		t.Errorf("after Shutdown: %v", err)
	}
	(&client{t, b}).closed()
}

func TestTransmissionLimits(t *testing.T) {
	dev := newFullDevice(testSize)
	srv := &Server{MaxConns: 1}
	defer srv.Close()
	c, _ := transmit(t, t.Context(), srv, &Export{Device: dev})
	c.mustDo(cmdFlush, 0, 0, 0, nil)
	a, b := socketPair(t)
	if err := srv.ServeTransmission(t.Context(), a, &Export{Device: dev}); err == nil || !strings.Contains(err.Error(), "MaxConns") {
		t.Errorf("beyond MaxConns: %v", err)
	}
	(&client{t, b}).closed()
	bad := &Server{MaxWaiters: -1}
	a, b = socketPair(t)
	if err := bad.ServeTransmission(t.Context(), a, &Export{Device: dev}); err == nil || !strings.Contains(err.Error(), "MaxWaiters") {
		t.Errorf("MaxWaiters of -1: %v", err)
	}
	(&client{t, b}).closed()
}

func TestCheck(t *testing.T) {
	for field, srv := range map[string]*Server{
		"MaxConns":         {MaxConns: -1},
		"MaxWaiters":       {MaxWaiters: -1},
		"MaxInFlightBytes": {MaxInFlightBytes: 1},
		"HandshakeTimeout": {HandshakeTimeout: -1},
		"FaultTimeout":     {FaultTimeout: -1},
		"WriteTimeout":     {WriteTimeout: -1},
		"IdleTimeout":      {IdleTimeout: -1},
	} {
		if err := srv.Check(); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
		l := newPipeListener()
		if err := srv.Serve(l); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: Serve: %v", field, err)
		}
		if _, err := l.Accept(); err == nil {
			t.Errorf("%s: the listener is open", field)
		}
	}
	if err := (&Server{MaxInFlightBytes: -5}).Check(); err == nil {
		t.Error("a negative limit of bytes in flight was accepted")
	}
	for _, srv := range []*Server{{}, {MaxConns: 1, MaxWaiters: 1, MaxInFlightBytes: MinInFlightBytes}} {
		if err := srv.Check(); err != nil {
			t.Error(err)
		}
	}
}

// remote is a device at the other end of a connection: a client with many requests in
// flight, for the conformance suite of devices.
type remote struct {
	t          testing.TB
	nc         net.Conn
	size       int64
	structured bool

	mu struct {
		sync.Mutex
		next uint64
		wait map[uint64]chan []chunk
		asks map[uint64]int // bytes of payload in a simple reply
	}
}

func newRemote(t testing.TB, c *client, size int64, structured bool) *remote {
	c.nc.SetDeadline(time.Now().Add(10 * time.Minute))
	r := &remote{t: t, nc: c.nc, size: size, structured: structured}
	r.mu.wait, r.mu.asks = make(map[uint64]chan []chunk), make(map[uint64]int)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			var head [4]byte
			if _, err := io.ReadFull(r.nc, head[:]); err != nil {
				return // closed by the test's end
			}
			cs := r.receive(head[:])
			r.mu.Lock()
			r.mu.wait[cs[0].cookie] <- cs
			delete(r.mu.wait, cs[0].cookie)
			r.mu.Unlock()
		}
	})
	t.Cleanup(func() {
		// A request whose caller has left is answered all the same.
		for end := time.Now().Add(time.Minute); r.waiting() > 0 && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		r.nc.Close()
		wg.Wait()
	})
	return r
}

func (r *remote) waiting() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.mu.wait)
}

// receive reads a reply whose first bytes are head.
func (r *remote) receive(head []byte) []chunk {
	if binary.BigEndian.Uint32(head) != magicSimple {
		return (&client{r.t, &unread{r.nc, head}}).reply(0)
	}
	p := make([]byte, 12)
	if _, err := io.ReadFull(r.nc, p); err != nil {
		r.t.Errorf("read a reply: %v", err)
	}
	cookie := binary.BigEndian.Uint64(p[4:])
	r.mu.Lock()
	n := r.mu.asks[cookie]
	delete(r.mu.asks, cookie)
	r.mu.Unlock()
	return []chunk{(&client{r.t, &unread{r.nc, append(head, p...)}}).chunk(n)}
}

// do sends a request and waits for its reply.
func (r *remote) do(ctx context.Context, cmd, flags uint16, e blockmap.Extent, payload []byte) ([]chunk, error) {
	done := make(chan []chunk, 1)
	r.mu.Lock()
	cookie := r.mu.next
	r.mu.next++
	r.mu.wait[cookie] = done
	if cmd == cmdRead {
		r.mu.asks[cookie] = int(e.Len())
	}
	_, err := r.nc.Write(append(appendRequest(nil, cmd, flags, cookie, uint64(e.Start), uint32(e.Len())), payload...))
	r.mu.Unlock()
	if err != nil {
		return nil, err
	}
	var cs []chunk
	select {
	case cs = <-done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	for _, k := range cs {
		switch k.errno {
		case 0:
		case ePerm:
			return nil, fmt.Errorf("errno %d: %w", k.errno, blockmap.ErrReadOnly)
		case eNoSpace, eInval:
			if e.Check(r.size) != nil {
				return nil, fmt.Errorf("errno %d: %w", k.errno, blockmap.ErrOutOfRange)
			}
			return nil, fmt.Errorf("errno %d: %w", k.errno, blockmap.ErrNoSpace)
		default:
			return nil, fmt.Errorf("errno %d: %s", k.errno, k.msg)
		}
	}
	return cs, nil
}

// fits reports whether the protocol can express e.
func fits(e blockmap.Extent) error {
	if e.Start < 0 || e.Len() < 0 || e.Len() > maxPayload {
		return e.Check(0)
	}
	return nil
}

func (r *remote) Size() int64 { return r.size }

// View reads: a client cannot see what is resident in any other way.
func (r *remote) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	p, err := r.read(context.Background(), e)
	if err != nil {
		return v, false
	}
	v.Append(p, nil, 0)
	return v, true
}

func (r *remote) Load(_ context.Context, e blockmap.Extent) (blockmap.View, bool) { return r.View(e) }

func (r *remote) Fault(ctx context.Context, e blockmap.Extent) error {
	_, err := r.read(ctx, e)
	return err
}

func (r *remote) read(ctx context.Context, e blockmap.Extent) ([]byte, error) {
	if err := fits(e); err != nil {
		return nil, err
	}
	cs, err := r.do(ctx, cmdRead, 0, e, nil)
	switch {
	case err != nil:
		return nil, err
	case !r.structured:
		return cs[0].data, nil
	}
	return assemble(r.t, slices.DeleteFunc(cs, func(k chunk) bool { return k.typ == chunkNone }), uint64(e.Start), int(e.Len())), nil
}

func (r *remote) Status(e blockmap.Extent) blockmap.Status {
	st := blockmap.Status{Extent: blockmap.Range(e.Start, 0)}
	if fits(e) != nil || e.Len() == 0 {
		return st
	}
	cs, err := r.do(context.Background(), cmdBlockStatus, cmdFlagReqOne, e, nil)
	if err != nil {
		return st
	}
	st.End = e.End
	for _, k := range cs {
		flags := binary.BigEndian.Uint32(k.data[8:])
		st.End = min(st.End, e.Start+int64(binary.BigEndian.Uint32(k.data[4:])))
		if binary.BigEndian.Uint32(k.data) == uint32(contextAllocation) {
			st.Zero = flags == stateHole|stateZero
		} else {
			st.Resident = flags == stateResident
		}
	}
	return st
}

func (r *remote) Prefetch(e blockmap.Extent) {
	if fits(e) == nil {
		r.do(context.Background(), cmdCache, 0, e, nil)
	}
}

func (r *remote) WriteAt(ctx context.Context, p []byte, off int64) error {
	_, err := r.do(ctx, cmdWrite, 0, blockmap.Range(off, int64(len(p))), p)
	return err
}

func (r *remote) Zero(ctx context.Context, e blockmap.Extent, mayDiscard bool) error {
	if err := fits(e); err != nil {
		return err
	}
	flags := uint16(0)
	if !mayDiscard {
		flags = cmdFlagNoHole
	}
	_, err := r.do(ctx, cmdWriteZeroes, flags, e, nil)
	return err
}

func (r *remote) Discard(ctx context.Context, e blockmap.Extent) error {
	if err := fits(e); err != nil {
		return err
	}
	_, err := r.do(ctx, cmdTrim, 0, e, nil)
	return err
}

func (r *remote) Flush(ctx context.Context) error {
	_, err := r.do(ctx, cmdFlush, 0, blockmap.Extent{}, nil)
	return err
}

// A writable device is writable for clients too: the conformance suite of devices runs
// on a device in memory through a server. With metadata contexts the connection is
// negotiated; without them the client begins with transmission.
func TestServesWritableDevice(t *testing.T) {
	const size = 64 * blockmap.BlockSize
	content := newPatternDevice(size).Content(blockmap.Range(0, size))
	rng := rand.New(rand.NewPCG(1, 2))
	var mu sync.Mutex
	behind := make(map[blockmap.WritableDevice]*blocktest.Memory)
	connect := func(t *testing.T, dev *blocktest.Memory) blockmap.WritableDevice {
		c := dial(t, serveDevice(t, Export{Device: dev}))
		c.enter(true, "base:allocation", "x-thaw:resident")
		r := newRemote(t, c, size, true)
		mu.Lock()
		defer mu.Unlock()
		behind[r] = dev
		return r
	}
	blocktest.TestWritableDevice(t, blocktest.Writable{
		Content: content,
		Open: func(t *testing.T) blockmap.WritableDevice {
			dev := newPatternDevice(size)
			dev.Evict(blockmap.Range(0, size))
			return connect(t, dev)
		},
		Crash: func(t *testing.T, d blockmap.WritableDevice) blockmap.WritableDevice {
			mu.Lock()
			dev := behind[d]
			mu.Unlock()
			return connect(t, dev.Crash(rng))
		},
		Limited: func(t *testing.T, room int64) blockmap.WritableDevice {
			dev := newPatternDevice(size)
			dev.Space = size*3/4 + room/2
			return connect(t, dev)
		},
		ReadOnly: func(t *testing.T) blockmap.WritableDevice {
			dev := newPatternDevice(size)
			dev.ReadOnly = true
			return connect(t, dev)
		},
	})
}

// The same content through simple replies, without a handshake.
func TestTransmissionIsADevice(t *testing.T) {
	const size = 64 * blockmap.BlockSize
	dev := newPatternDevice(size)
	srv := &Server{}
	defer srv.Close()
	c, _ := transmit(t, t.Context(), srv, &Export{Device: dev})
	r := newRemote(t, c, size, false)
	var wg sync.WaitGroup
	for i := range uint64(8) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(i, 9))
			for range 100 {
				off := rng.Int64N(size - 1)
				e := blockmap.Range(off, 1+rng.Int64N(size-off-1))
				got, err := blocktest.Read(t.Context(), r, e)
				if err != nil || !bytes.Equal(got, dev.Content(e)) {
					t.Errorf("read %v: wrong bytes, or %v", e, err)
				}
				dev.Evict(blockmap.Range(off, 1))
			}
		})
	}
	wg.Wait()
}
