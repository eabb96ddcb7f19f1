package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

const testSize = 1 << 20

func TestHaggling(t *testing.T) {
	path := serve(t, &Server{Exports: Static{
		{Name: "disk", Description: "the one", Device: readOnly{newPatternDevice(testSize)}},
		{Name: "other", Device: blocktest.NewMemory(4 * testSize)},
	}})
	c := dial(t, path)

	// After any option, the server understands the next one.
	c.want(99, nil, repErrUnsup)
	c.want(99, make([]byte, 1000), repErrUnsup)
	c.want(4, []byte("PEEK_EXPORT is history"), repErrUnsup)
	c.want(99, make([]byte, maxOption+1), repErrUnsup)
	c.want(optInfo, make([]byte, maxOption+1), repErrTooBig)
	c.want(optInfo, make([]byte, maxSkip), repErrTooBig)
	c.want(optInfo, nil, repErrInvalid)
	c.want(optInfo, []byte{0, 0, 0, 9, 'd', 'i', 's', 'k', 0, 0}, repErrInvalid)
	c.want(optInfo, append(appendString(nil, "disk"), 0, 2, 0, 1), repErrInvalid) // one of two
	c.want(optInfo, append(infoData("disk"), 0), repErrInvalid)
	c.want(optInfo, binary.BigEndian.AppendUint32(nil, 1<<32-1), repErrInvalid)
	c.want(optInfo, infoData("nothing"), repErrUnknown)
	c.want(optInfo, infoData(strings.Repeat("x", maxString+1)), repErrInvalid)
	c.want(optInfo, infoData("a\x00b"), repErrInvalid)
	c.want(optInfo, infoData("\xff"), repErrInvalid)
	c.want(optGo, infoData("nothing"), repErrUnknown)
	c.want(optList, []byte{1}, repErrInvalid)
	c.want(optStartTLS, nil, repErrPolicy)
	c.want(optStartTLS, []byte{1}, repErrInvalid)
	c.want(optStructuredReply, []byte{1}, repErrInvalid)
	c.want(optSetMetaContext, metaData("disk", "base:allocation"), repErrInvalid) // not structured yet
	c.want(optStructuredReply, nil, repAck)
	c.want(optSetMetaContext, nil, repErrInvalid)
	c.want(optSetMetaContext, metaData("disk", "nocolon"), repErrInvalid)
	c.want(optSetMetaContext, append(metaData("disk"), 1), repErrInvalid)
	c.want(optSetMetaContext, binary.BigEndian.AppendUint32(appendString(nil, "disk"), 1<<32-1), repErrInvalid)
	c.want(optSetMetaContext, metaData("disk", strings.Repeat("x:", maxString)), repErrInvalid)
	c.want(optSetMetaContext, metaData("nothing", "base:allocation"), repErrUnknown)
	c.want(optSetMetaContext, metaData("disk", "qemu:dirty-bitmap:x", "base:", "base:nothing"), repAck)
	c.want(optListMetaContext, metaData("disk", "qemu:"), repAck)

	c.option(optList, nil)
	rs := c.replies(optList)
	if len(rs) != 3 || string(rs[0].data[4:]) != "diskthe one" || string(rs[1].data[4:]) != "other" {
		t.Errorf("LIST: %v", rs)
	}

	c.option(optInfo, infoData("", infoName, infoDescription, infoBlockSize, 99))
	rs = c.replies(optInfo)
	if len(rs) != 5 {
		t.Fatalf("INFO: %v", rs)
	}
	flags := flagHasFlags | flagReadOnly | flagDF | flagMultiConn | flagCache
	wants := [][]byte{
		binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint64([]byte{0, 0}, testSize), flags),
		[]byte("\x00\x01disk"),
		[]byte("\x00\x02the one"),
		{0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0},
	}
	for i, want := range wants {
		if rs[i].typ != repInfo || !bytes.Equal(rs[i].data, want) {
			t.Errorf("INFO reply %d is %x, want %x", i, rs[i].data, want)
		}
	}
	c.option(optAbort, []byte("so long"))
	if r := c.optReply(); r.typ != repAck {
		t.Errorf("ABORT: %x", r.typ)
	}
	c.closed()
}

func TestListMetaContext(t *testing.T) {
	path := serve(t, &Server{Exports: Static{
		{Name: "disk", Device: blocktest.NewMemory(testSize)},
	}})
	for _, test := range []struct {
		name    string
		queries []string
		want    string
	}{
		{"disk", nil, "base:allocation x-thaw:resident"},
		{"disk", []string{"base:"}, "base:allocation"},
		{"disk", []string{"x-thaw:"}, "x-thaw:resident"},
		{"disk", []string{"x-thaw:resident", "base:allocation", "base:allocation"}, "base:allocation x-thaw:resident"},
		{"disk", []string{"qemu:", "x-tha:"}, ""},
	} {
		c := dial(t, path)
		c.option(optListMetaContext, metaData(test.name, test.queries...))
		var got []string
		for _, r := range c.replies(optListMetaContext) {
			if r.typ == repMetaContext {
				got = append(got, string(r.data[4:]))
			}
		}
		if s := strings.Join(got, " "); s != test.want {
			t.Errorf("%s %q: %q, want %q", test.name, test.queries, s, test.want)
		}
	}
}

// Errors that end a connection, because the protocol has no other answer.
func TestHandshakeDrops(t *testing.T) {
	path := serveDevice(t, Export{Device: blocktest.NewMemory(testSize)})
	for name, say := range map[string]func(c *client){
		"unknown client flag": func(c *client) { c.hello(1 << 7) },
		"bad option magic":    func(c *client) { c.hello(3); c.write(make([]byte, optionHeaderLen)) },
		"unknown EXPORT_NAME": func(c *client) { c.hello(3); c.option(optExportName, []byte("nothing")) },
		"endless EXPORT_NAME": func(c *client) { c.hello(3); c.option(optExportName, make([]byte, maxOption+1)) },
		"huge option": func(c *client) {
			c.hello(3)
			c.write(append(appendOption(nil, 99, nil)[:12], 0xff, 0xff, 0xff, 0xff))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := dialRaw(t, path)
			say(c)
			c.closed()
		})
	}
	t.Run("too many options", func(t *testing.T) {
		c := dial(t, path)
		for range maxOptions {
			c.want(99, nil, repErrUnsup)
		}
		c.closed()
	})
}

func TestExportName(t *testing.T) {
	dev := newPatternDevice(testSize)
	path := serveDevice(t, Export{Device: dev})
	for _, noZeroes := range []bool{false, true} {
		c := dialRaw(t, path)
		pad := exportPadding
		if noZeroes {
			pad = 0
			c.hello(3)
		} else {
			c.hello(1)
		}
		c.option(optExportName, []byte("disk"))
		p := c.read(10 + pad)
		if binary.BigEndian.Uint64(p) != testSize || binary.BigEndian.Uint16(p[8:])&flagDF != 0 {
			t.Errorf("EXPORT_NAME: %x", p[:10])
		}
		c.send(cmdRead, 0, 5, 100, 300)
		if k := c.chunk(300); k.cookie != 5 || !bytes.Equal(k.data, dev.Content(blockmap.Range(100, 300))) {
			t.Error("wrong data")
		}
	}
}

// opener is Exports that open by reference.
type opener struct {
	open func(ctx context.Context, name string, c ClientInfo) (*Export, func(), error)
}

func (o opener) Open(ctx context.Context, name string, c ClientInfo) (*Export, func(), error) {
	return o.open(ctx, name, c)
}
func (o opener) List(context.Context, ClientInfo) ([]Export, error) {
	return nil, errors.New("not listed")
}

// An export is opened once for all options that name it. It is released when the
// connection ends or chooses another.
func TestOpenByReference(t *testing.T) {
	events := make(chan string, 10)
	path := serve(t, &Server{Exports: opener{func(_ context.Context, name string, _ ClientInfo) (*Export, func(), error) {
		switch name {
		case "denied":
			return nil, nil, fmt.Errorf("image %q: %w", name, ErrDenied)
		case "secret":
			return nil, nil, ErrTLSRequired
		case "broken":
			return nil, nil, errors.New("manifest of broken: 500")
		}
		events <- "open " + name
		e := &Export{Name: "canonical", Device: blocktest.NewMemory(testSize)}
		return e, func() { events <- "release " + name }, nil
	}}})
	next := func(want string) {
		t.Helper()
		if got := <-events; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	c := dial(t, path)
	c.want(optList, nil, repErrPolicy)
	c.want(optInfo, infoData("denied"), repErrPolicy)
	c.want(optInfo, infoData("secret"), repErrTLSReqd)
	c.option(optInfo, infoData("broken"))
	if r := c.optReply(); r.typ != repErrUnknown || string(r.data) != "manifest of broken: 500" {
		t.Errorf("broken: %x %s", r.typ, r.data)
	}
	c.option(optInfo, infoData("other"))
	c.replies(optInfo)
	next("open other")
	c.option(optInfo, infoData("disk", infoName))
	if rs := c.replies(optInfo); string(rs[1].data[2:]) != "canonical" {
		t.Errorf("name: %v", rs)
	}
	next("release other")
	next("open disk")
	c.enter(true, "base:allocation")
	c.send(cmdDisc, 0, 0, 0, 0)
	c.closed()
	next("release disk")
	if len(events) != 0 {
		t.Errorf("and %s", <-events)
	}
}

func TestContextsBelongToTheirExport(t *testing.T) {
	path := serve(t, &Server{Exports: Static{
		{Name: "disk", Device: blocktest.NewMemory(testSize)},
		{Name: "other", Device: blocktest.NewMemory(testSize)},
	}})
	c := dial(t, path)
	c.want(optStructuredReply, nil, repAck)
	c.option(optSetMetaContext, metaData("other", "base:allocation"))
	if rs := c.replies(optSetMetaContext); len(rs) != 2 {
		t.Fatalf("SET_META_CONTEXT: %v", rs)
	}
	c.enter(false)
	c.mustFail(cmdBlockStatus, 0, 0, 4096, eInval)
}

func TestSlowHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		serveOn(t, &Server{Exports: Static{{Name: "disk", Device: blocktest.NewMemory(testSize)}}, HandshakeTimeout: 3 * time.Second}, l)
		begin := time.Now()
		c := &client{t, l.dial()}
		c.hello(3)
		for range 4 { // a byte a second
			time.Sleep(time.Second)
			if _, err := c.nc.Write([]byte{'I'}); err != nil {
				break
			}
		}
		c.closed()
		if d := time.Since(begin); d < 3*time.Second || d > 4*time.Second {
			t.Errorf("dropped after %v", d)
		}
	})
}

// The time of opening does not count as the client's time.
func TestSlowOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		serveOn(t, &Server{HandshakeTimeout: 3 * time.Second, Exports: opener{func(context.Context, string, ClientInfo) (*Export, func(), error) {
			time.Sleep(20 * time.Second)
			return &Export{Name: "disk", Device: blocktest.NewMemory(testSize)}, nil, nil
		}}}, l)
		c := &client{t, l.dial()}
		c.hello(3)
		c.enter(true)
		time.Sleep(time.Hour) // a session may idle
		c.mustDo(cmdFlush, 0, 0, 0, nil)
		c.nc.Close()
	})
}

// However many options a client sends, opening exports for it takes a bounded time.
func TestSlowOpensAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 30 * time.Second
		l := newPipeListener()
		serveOn(t, &Server{HandshakeTimeout: 10 * time.Second, FaultTimeout: limit, Exports: opener{
			func(ctx context.Context, name string, _ ClientInfo) (*Export, func(), error) {
				select {
				case <-time.After(7 * time.Second):
				case <-ctx.Done():
					return nil, nil, ctx.Err()
				}
				return &Export{Name: name, Device: blocktest.NewMemory(testSize)}, nil, nil
			}}}, l)
		c := &client{t, l.dial()}
		c.hello(3)
		begin := time.Now()
		opened := 0
		for i := range 500 {
			c.option(optInfo, infoData(fmt.Sprint("image-", i)))
			rs := c.replies(optInfo)
			if r := rs[len(rs)-1]; r.typ == repErrPolicy {
				if !strings.Contains(string(r.data), "connect again") {
					t.Errorf("refused with %q", r.data)
				}
				break
			} else if r.typ == repAck {
				opened++
			}
		}
		if d := time.Since(begin); d > openTimes*limit || opened < 5 {
			t.Errorf("%d were opened in %v", opened, d)
		}
		// The client has only the rest of its own time.
		begin = time.Now()
		for {
			time.Sleep(time.Second)
			if _, err := c.nc.Write(appendOption(nil, optList, nil)); err != nil {
				break
			}
			if _, err := io.CopyN(io.Discard, c.nc, 20); err != nil {
				break
			}
			io.CopyN(io.Discard, c.nc, int64(len("not listed")))
			if time.Since(begin) > time.Minute {
				t.Fatal("the handshake has not ended")
			}
		}
		c.nc.Close()
	})
}
