package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// script is a client that sends prepared bytes, and records the answers.
type script struct {
	in io.Reader
	mu struct {
		sync.Mutex
		out bytes.Buffer
	}
}

func (s *script) Read(p []byte) (int, error) { return s.in.Read(p) }
func (s *script) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.out.Write(p)
}
func (s *script) Close() error                     { return nil }
func (s *script) LocalAddr() net.Addr              { return pipeAddr{} }
func (s *script) RemoteAddr() net.Addr             { return pipeAddr{} }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// FuzzHandshake sends bytes as options. For any bytes, the server sends well-formed
// replies to options that were sent, and then ends the connection.
func FuzzHandshake(f *testing.F) {
	flags := []byte{0, 0, 0, 3}
	seed := func(opts ...[]byte) { f.Add(append(bytes.Clone(flags), bytes.Join(opts, nil)...)) }
	seed()
	seed(appendOption(nil, optList, nil), appendOption(nil, optAbort, nil))
	seed(appendOption(nil, optStructuredReply, nil),
		appendOption(nil, optListMetaContext, metaData("disk")),
		appendOption(nil, optSetMetaContext, metaData("disk", "base:allocation", "x-thaw:resident")),
		appendOption(nil, optInfo, infoData("disk", 0, 1, 2, 3)),
		appendOption(nil, optGo, infoData("disk", 3)))
	seed(appendOption(nil, optSetMetaContext, metaData("other", "base:", "qemu:x")))
	seed(appendOption(nil, optStartTLS, nil))
	seed(appendOption(nil, 99, []byte("hello")))
	seed(appendOption(nil, optExportName, []byte("disk")))
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{0xff})

	srv := &Server{Exports: Static{
		{Name: "disk", Description: "d", Device: blocktest.NewMemory(testSize)},
		{Name: "other", Device: blocktest.NewMemory(testSize), Clients: []string{"x"}},
	}}
	f.Fuzz(func(t *testing.T, in []byte) {
		nc := &script{in: bytes.NewReader(in)}
		h := &handshake{c: &conn{srv: srv, nc: nc}, nc: nc, log: slog.New(slog.DiscardHandler)}
		err := h.run(t.Context())
		if err == nil && h.export == nil {
			t.Error("done without an export")
		}
		h.drop()

		out := nc.mu.out.Bytes()
		if len(out) < 18 {
			t.Fatal("no greeting")
		}
		out = out[18:]
		for len(out) > 0 {
			if len(out) < 20 || binary.BigEndian.Uint64(out) != magicReply {
				if len(out) == 10 || len(out) == 10+exportPadding { // to EXPORT_NAME, which is the last
					break
				}
				t.Fatalf("malformed reply %x", out)
			}
			n := binary.BigEndian.Uint32(out[16:])
			if uint64(len(out)) < 20+uint64(n) {
				t.Fatalf("reply of %d bytes, want %d", len(out), n)
			}
			out = out[20+n:]
		}
	})
}

// FuzzTransmission sends bytes as requests. Each complete request, up to the first that
// breaks the framing, gets one well-formed reply.
func FuzzTransmission(f *testing.F) {
	seed := func(rs ...[]byte) { f.Add(true, bytes.Join(rs, nil)); f.Add(false, bytes.Join(rs, nil)) }
	seed()
	seed(appendRequest(nil, cmdRead, 0, 1, 4096, 4096), appendRequest(nil, cmdRead, cmdFlagDF, 2, 100, 60000))
	seed(append(appendRequest(nil, cmdWrite, cmdFlagFUA, 3, 10, 5), "hello"...), appendRequest(nil, cmdFlush, 0, 4, 0, 0))
	seed(appendRequest(nil, cmdTrim, 0, 5, 0, 65536), appendRequest(nil, cmdWriteZeroes, cmdFlagNoHole, 6, 0, 65536),
		appendRequest(nil, cmdWriteZeroes, cmdFlagFastZero, 6, 4096, 4096))
	seed(appendRequest(nil, cmdBlockStatus, 0, 7, 0, 65536), appendRequest(nil, cmdBlockStatus, cmdFlagReqOne, 8, 5, 6),
		appendRequest(nil, cmdCache, 0, 9, 0, 65536))
	seed(append(appendRequest(nil, cmdWrite, 0, 3, 1<<40, 5), "hello"...), appendRequest(nil, 77, 0xffff, 4, 1<<63, 1<<31), appendRequest(nil, cmdDisc, 0, 0, 0, 0))
	seed(make([]byte, requestLen))

	f.Fuzz(func(t *testing.T, structured bool, in []byte) {
		dev := newPatternDevice(64 << 10)
		dev.Evict(blockmap.Range(16<<10, 16<<10))
		nc := &script{in: bytes.NewReader(in)}
		agreed := terms{export: &Export{Device: dev}, structured: structured}
		if structured {
			agreed.contexts = allContexts
		}
		srv := &Server{}
		ctx, cancel := context.WithCancelCause(context.Background())
		defer cancel(nil)
		newSession(&conn{srv: srv, nc: nc}, nc, agreed, slog.New(slog.DiscardHandler), cancel).run(ctx)
		dev.NoPins(t)

		// The requests, by cookie.
		type ask struct {
			n    int
			read bool
		}
		asked := make(map[uint64][]ask)
		for len(in) >= requestLen {
			r, ok := parseRequest(in)
			if !ok || r.cmd == cmdDisc {
				break
			}
			in = in[requestLen:]
			if r.cmd == cmdWrite {
				if uint64(len(in)) < uint64(r.length) {
					break
				}
				in = in[r.length:]
			}
			asked[r.cookie] = append(asked[r.cookie], ask{int(r.length), r.cmd == cmdRead})
		}
		if !structured {
			// If several requests have one cookie, the request of a reply is unknown,
			// and so is the reply's length.
			for _, a := range asked {
				if len(a) > 1 {
					return
				}
			}
		}
		c := &client{t, &script{in: bytes.NewReader(nc.mu.out.Bytes())}}
		for n := nc.mu.out.Len(); n > 0; n = c.nc.(*script).in.(*bytes.Reader).Len() {
			out := c.nc.(*script).in.(*bytes.Reader)
			payload := 0
			if !structured {
				var p [simpleReplyLen]byte
				out.Read(p[:])
				out.Seek(-simpleReplyLen, io.SeekCurrent)
				if a := asked[binary.BigEndian.Uint64(p[8:])]; len(a) > 0 && a[0].read {
					payload = a[0].n
				}
			}
			k := c.chunk(payload)
			if k.flags&chunkDone == 0 {
				continue
			}
			a := asked[k.cookie]
			if len(a) == 0 {
				t.Fatalf("reply to cookie %d, for which no request waits", k.cookie)
			}
			asked[k.cookie] = a[1:]
		}
		for cookie, a := range asked {
			if len(a) > 0 {
				t.Errorf("%d requests with cookie %d unanswered", len(a), cookie)
			}
		}
	})
}
