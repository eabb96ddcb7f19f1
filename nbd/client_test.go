package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"thaw/blockmap/blocktest"
	"thaw/nbd/internal/lifecycle"
)

func TestMain(m *testing.M) {
	lifecycle.CloseTime = time.Minute // a test whose server leaves a connection behind fails
	blocktest.Main(m)
}

// logged collects the log of a server, and lets a test wait for a message.
type logged struct {
	ch chan string
}

func newLogged() (*logged, *slog.Logger) {
	l := &logged{make(chan string, 1000)}
	return l, slog.New(l)
}

func (l *logged) Enabled(context.Context, slog.Level) bool { return true }
func (l *logged) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *logged) WithGroup(string) slog.Handler            { return l }
func (l *logged) Handle(_ context.Context, r slog.Record) error {
	s := r.Message
	r.Attrs(func(a slog.Attr) bool { s += fmt.Sprintf(" %s=%v", a.Key, a.Value); return true })
	select {
	case l.ch <- s:
	default:
	}
	return nil
}

// wait returns the next message that contains want.
func (l *logged) wait(t testing.TB, want string) string {
	t.Helper()
	timeout := time.After(time.Minute)
	for {
		select {
		case s := <-l.ch:
			if strings.Contains(s, want) {
				return s
			}
		case <-timeout:
			t.Fatalf("nothing logged with %q", want)
		}
	}
}

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("a minute has passed, and this does not hold: %s", what)
		}
	}
}

// serve runs srv on a unix socket until the test ends. It returns the path of the
// socket.
func serve(t testing.TB, srv *Server) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(t.Context(), "unix:"+path)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, srv, l)
	return path
}

func serveOn(t testing.TB, srv *Server, l net.Listener) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := srv.Serve(l); err != ErrServerClosed {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(func() {
		srv.Close()
		wg.Wait()
	})
}

// serveDevice serves one device as "disk".
func serveDevice(t testing.TB, e Export) string {
	t.Helper()
	e.Name = "disk"
	return serve(t, &Server{Exports: Static{e}})
}

// client speaks the protocol byte by byte, so that it can also violate it.
type client struct {
	t  testing.TB
	nc net.Conn
}

// dial connects and sends the client flags.
func dial(t testing.TB, path string) *client {
	t.Helper()
	c := dialRaw(t, path)
	c.hello(uint32(flagFixedNewstyle | flagNoZeroes))
	return c
}

// dialRaw connects and sends nothing.
func dialRaw(t testing.TB, path string) *client {
	t.Helper()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	nc.SetDeadline(time.Now().Add(5 * time.Minute))
	t.Cleanup(func() { nc.Close() })
	return &client{t, nc}
}

func (c *client) hello(flags uint32) {
	c.t.Helper()
	p := c.read(18)
	if string(p[:16]) != "NBDMAGICIHAVEOPT" || binary.BigEndian.Uint16(p[16:]) != 3 {
		c.t.Fatalf("server's greeting is %x", p)
	}
	c.write(binary.BigEndian.AppendUint32(nil, flags))
}

func (c *client) write(p []byte) {
	c.t.Helper()
	if _, err := c.nc.Write(p); err != nil {
		c.t.Fatalf("write: %v", err)
	}
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	p := make([]byte, n)
	if _, err := io.ReadFull(c.nc, p); err != nil {
		c.t.Fatalf("read %d bytes: %v", n, err)
	}
	return p
}

// closed waits until the server closes the connection; no bytes may arrive before.
func (c *client) closed() {
	c.t.Helper()
	n, err := c.nc.Read(make([]byte, 1))
	if n != 0 || err == nil || strings.Contains(err.Error(), "timeout") {
		c.t.Fatalf("read %d bytes, %v; want the end", n, err)
	}
}

func (c *client) option(opt uint32, data []byte) {
	c.t.Helper()
	c.write(appendOption(nil, opt, data))
}

func appendOption(p []byte, opt uint32, data []byte) []byte {
	p = binary.BigEndian.AppendUint64(p, magicOption)
	p = binary.BigEndian.AppendUint32(p, opt)
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	return append(p, data...)
}

type optReply struct {
	opt, typ uint32
	data     []byte
}

func (r optReply) String() string { return fmt.Sprintf("{%d: %x %q}", r.opt, r.typ, r.data) }

func (c *client) optReply() optReply {
	c.t.Helper()
	h := c.read(20)
	if binary.BigEndian.Uint64(h) != magicReply {
		c.t.Fatalf("reply's magic is %x", h[:8])
	}
	r := optReply{opt: binary.BigEndian.Uint32(h[8:]), typ: binary.BigEndian.Uint32(h[12:])}
	r.data = c.read(int(binary.BigEndian.Uint32(h[16:])))
	return r
}

// replies reads until the final reply to opt.
func (c *client) replies(opt uint32) (rs []optReply) {
	c.t.Helper()
	for {
		r := c.optReply()
		if r.opt != opt {
			c.t.Fatalf("reply to option %d, want %d", r.opt, opt)
		}
		rs = append(rs, r)
		if r.typ == repAck || r.typ>>31 == 1 {
			return rs
		}
	}
}

// want sends an option and expects one reply of that type.
func (c *client) want(opt uint32, data []byte, typ uint32) {
	c.t.Helper()
	c.option(opt, data)
	rs := c.replies(opt)
	if len(rs) != 1 || rs[0].typ != typ {
		c.t.Fatalf("option %d: %v, want %x", opt, rs, typ)
	}
}

func appendString(p []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(p, uint32(len(s))), s...)
}

// infoData returns the data of INFO and GO.
func infoData(name string, infos ...uint16) []byte {
	p := appendString(nil, name)
	p = binary.BigEndian.AppendUint16(p, uint16(len(infos)))
	for _, i := range infos {
		p = binary.BigEndian.AppendUint16(p, i)
	}
	return p
}

// metaData returns the data of LIST_META_CONTEXT and SET_META_CONTEXT.
func metaData(name string, queries ...string) []byte {
	p := appendString(nil, name)
	p = binary.BigEndian.AppendUint32(p, uint32(len(queries)))
	for _, q := range queries {
		p = appendString(p, q)
	}
	return p
}

// enter chooses "disk" with structured replies and meta contexts if wanted, and returns
// the transmission flags.
func (c *client) enter(structured bool, contexts ...string) uint16 {
	c.t.Helper()
	if structured {
		c.want(optStructuredReply, nil, repAck)
	}
	if len(contexts) > 0 {
		c.option(optSetMetaContext, metaData("disk", contexts...))
		c.replies(optSetMetaContext)
	}
	c.option(optGo, infoData("disk"))
	rs := c.replies(optGo)
	if rs[len(rs)-1].typ != repAck {
		c.t.Fatalf("GO: %x %s", rs[len(rs)-1].typ, rs[len(rs)-1].data)
	}
	return binary.BigEndian.Uint16(rs[0].data[10:])
}

func appendRequest(p []byte, cmd, flags uint16, cookie, off uint64, n uint32) []byte {
	p = binary.BigEndian.AppendUint32(p, magicRequest)
	p = binary.BigEndian.AppendUint16(p, flags)
	p = binary.BigEndian.AppendUint16(p, cmd)
	p = binary.BigEndian.AppendUint64(p, cookie)
	p = binary.BigEndian.AppendUint64(p, off)
	return binary.BigEndian.AppendUint32(p, n)
}

func (c *client) send(cmd, flags uint16, cookie, off uint64, n uint32) {
	c.t.Helper()
	c.write(appendRequest(nil, cmd, flags, cookie, off, n))
}

// chunk is a structured chunk, or a simple reply (typ ^0).
type chunk struct {
	cookie uint64
	flags  uint16
	typ    uint16
	errno  errno
	msg    string
	offset uint64
	data   []byte // of OFFSET_DATA, BLOCK_STATUS
	hole   uint32
}

const simpleType = ^uint16(0)

// chunk reads one. A simple reply without an error has simple bytes of data after it.
func (c *client) chunk(simple int) chunk {
	c.t.Helper()
	switch magic := binary.BigEndian.Uint32(c.read(4)); magic {
	case magicSimple:
		p := c.read(12)
		r := chunk{typ: simpleType, flags: chunkDone, errno: errno(binary.BigEndian.Uint32(p)), cookie: binary.BigEndian.Uint64(p[4:])}
		if r.errno == 0 {
			r.data = c.read(simple)
		}
		return r
	case magicChunk:
		p := c.read(16)
		r := chunk{flags: binary.BigEndian.Uint16(p), typ: binary.BigEndian.Uint16(p[2:]), cookie: binary.BigEndian.Uint64(p[4:])}
		b := c.read(int(binary.BigEndian.Uint32(p[12:])))
		switch r.typ {
		case chunkNone:
		case chunkData:
			r.offset, r.data = binary.BigEndian.Uint64(b), b[8:]
		case chunkHole:
			r.offset, r.hole = binary.BigEndian.Uint64(b), binary.BigEndian.Uint32(b[8:])
		case chunkStatus:
			r.data = b
		case chunkError, chunkErrorOffset:
			n := int(binary.BigEndian.Uint16(b[4:]))
			r.errno, r.msg = errno(binary.BigEndian.Uint32(b)), string(b[6:6+n])
			if b = b[6+n:]; r.typ == chunkErrorOffset {
				r.offset = binary.BigEndian.Uint64(b)
				b = b[8:]
			}
			if len(b) != 0 {
				c.t.Fatalf("%d bytes after an error", len(b))
			}
		default:
			c.t.Fatalf("chunk of type %d", r.typ)
		}
		return r
	default:
		c.t.Fatalf("bad magic %#x", magic)
		panic("unreachable")
	}
}

// reply reads all chunks of the next reply, which must not be interleaved.
func (c *client) reply(simple int) []chunk {
	c.t.Helper()
	var cs []chunk
	for {
		k := c.chunk(simple)
		if len(cs) > 0 && cs[0].cookie != k.cookie {
			c.t.Fatalf("chunks of %d and %d are interleaved", cs[0].cookie, k.cookie)
		}
		cs = append(cs, k)
		if k.flags&chunkDone != 0 {
			return cs
		}
	}
}

// assemble combines the content chunks of a READ and checks that they cover it once.
func assemble(t testing.TB, cs []chunk, off uint64, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	slices.SortFunc(cs, func(a, b chunk) int { return int(int64(a.offset) - int64(b.offset)) })
	at := off
	for _, k := range cs {
		switch k.typ {
		case chunkData:
			copy(p[k.offset-off:], k.data)
			at += uint64(len(k.data))
		case chunkHole:
			at += uint64(k.hole)
		case chunkNone:
			continue
		default:
			t.Fatalf("chunk %+v in a READ", k)
		}
		if k.offset >= at {
			t.Fatalf("gap before %d", k.offset)
		}
	}
	if at != off+uint64(n) {
		t.Fatalf("%d bytes of content, want %d", at-off, n)
	}
	return p
}

// mustFail sends a request and expects one reply with that error.
func (c *client) mustFail(cmd, flags uint16, off uint64, n uint32, want errno) chunk {
	c.t.Helper()
	c.send(cmd, flags, 77, off, n)
	if cmd == cmdWrite {
		c.write(bytes.Repeat([]byte{0xee}, int(n)))
	}
	k := c.reply(0)[0]
	if k.cookie != 77 || k.errno != want {
		c.t.Fatalf("command %d flags %#x [%d+%d]: errno %d (%s), want %d", cmd, flags, off, n, k.errno, k.msg, want)
	}
	return k
}

// mustDo sends a request without payload in the reply and expects success.
func (c *client) mustDo(cmd, flags uint16, off uint64, n uint32, payload []byte) {
	c.t.Helper()
	c.write(append(appendRequest(nil, cmd, flags, 78, off, n), payload...))
	if k := c.reply(0)[0]; k.cookie != 78 || k.errno != 0 {
		c.t.Fatalf("command %d flags %#x [%d+%d]: errno %d (%s)", cmd, flags, off, n, k.errno, k.msg)
	}
}
