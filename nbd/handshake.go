package nbd

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// Bounds of option haggling. Every option of the spec fits in maxOption. The server
// skips the data of a longer one, to keep the framing, and drops the connection where
// an option is longer than maxSkip.
const (
	maxOption  = 64 << 10
	maxSkip    = 1 << 20
	maxOptions = 1024 // in one handshake

	// openTimes bounds the time of all calls of Exports in one handshake, in
	// multiples of FaultTimeout: for one export that fails to open, and one
	// that is opened.
	openTimes = 2
)

// errDone ends a handshake whose client has left in good order.
var errDone = errors.New("the client is done")

// handshake is option haggling on one connection, up to the export that is
// chosen. It never reads ahead: the bytes after STARTTLS belong to TLS, and those after
// GO to transmission.
type handshake struct {
	c      *conn
	nc     net.Conn // c.nc, or TLS over it
	w      *bufio.Writer
	log    *slog.Logger
	client ClientInfo

	speaks bool          // the client has sent an option: it is no probe
	used   time.Duration // by calls of Exports

	fixed      bool // the client speaks fixed newstyle
	noZeroes   bool
	structured bool
	data       []byte // of the option at hand

	// What SET_META_CONTEXT chose, good for the export of that name only.
	contexts     []metaContext
	contextsName string

	// The export opened last, kept so that INFO, SET_META_CONTEXT and GO
	// on one name open it once.
	export     *Export
	exportName string
	release    func()
}

// run haggles until the client has chosen an export, which is then h.export. It fails
// with errDone where the client leaves in good order.
func (h *handshake) run(ctx context.Context) error {
	h.w = bufio.NewWriter(h.nc)
	hello := binary.BigEndian.AppendUint64(nil, magicServer)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	hello = binary.BigEndian.AppendUint16(hello, flagFixedNewstyle|flagNoZeroes)
	if _, err := h.nc.Write(hello); err != nil {
		return err
	}
	var buf [optionHeaderLen]byte
	if _, err := io.ReadFull(h.nc, buf[:clientFlagsLen]); err != nil {
		return ended(err)
	}
	flags := binary.BigEndian.Uint32(buf[:])
	if unknown := flags &^ uint32(flagFixedNewstyle|flagNoZeroes); unknown != 0 {
		return fmt.Errorf("unknown client flags %#x", unknown)
	}
	h.fixed = flags&uint32(flagFixedNewstyle) != 0
	h.noZeroes = flags&uint32(flagNoZeroes) != 0

	for range maxOptions {
		if _, err := io.ReadFull(h.nc, buf[:]); err != nil {
			return ended(err)
		}
		if m := binary.BigEndian.Uint64(buf[:]); m != magicOption {
			return fmt.Errorf("bad option magic %#x", m)
		}
		h.speaks = true
		opt := binary.BigEndian.Uint32(buf[8:])
		fit, err := h.readData(binary.BigEndian.Uint32(buf[12:]))
		if err != nil {
			return ended(err)
		}
		chosen, err := h.option(ctx, opt, fit)
		if err == nil {
			err = h.w.Flush()
		}
		if err != nil || chosen {
			return err
		}
	}
	return fmt.Errorf("the client sent more than %d options", maxOptions)
}

// logEnd logs why the handshake ended without an export. It is no warning where the
// client sent no option, as monitoring and port scanners do, nor where the client hung
// up.
func (h *handshake) logEnd(msg string, key string, value any) {
	if err, _ := value.(error); !h.speaks || err != nil && gone(err) {
		h.log.Debug(msg, key, value)
		return
	}
	h.c.srv.lines.handshakes.Log(h.log, slog.LevelWarn, msg, key, value)
}

// ended returns errDone for a client that hung up between two options.
func ended(err error) error {
	if err == io.EOF {
		return errDone
	}
	return err
}

// readData reads the n bytes of an option's data to h.data. Where n is more than any
// option needs, it skips them, and fit is false.
func (h *handshake) readData(n uint32) (fit bool, err error) {
	if n > maxSkip {
		return false, fmt.Errorf("an option has %d bytes, of at most %d", n, maxSkip)
	}
	if n > maxOption {
		h.data = h.data[:0]
		_, err = io.CopyN(io.Discard, h.nc, int64(n))
		return false, err
	}
	if cap(h.data) < int(n) {
		h.data = make([]byte, n)
	}
	h.data = h.data[:n]
	_, err = io.ReadFull(h.nc, h.data)
	return true, err
}

// option answers one option. chosen ends the handshake with an export.
func (h *handshake) option(ctx context.Context, opt uint32, fit bool) (chosen bool, err error) {
	srv := h.c.srv
	switch {
	case opt == optAbort:
		// The client may be gone already: it does not matter whether the
		// reply arrives.
		_ = h.reply(opt, repAck, nil)
		h.w.Flush()
		return false, errDone
	case srv.RequireTLS && !h.client.TLS && opt != optStartTLS:
		if opt == optExportName {
			return false, ErrTLSRequired // this option has no way to say so
		}
		return false, h.fail(opt, repErrTLSReqd, ErrTLSRequired.Error())
	case h.c.draining():
		if opt == optExportName {
			return false, ErrServerClosed
		}
		return false, h.fail(opt, repErrShutdown, eShutdown.String())
	case !fit && opt != optExportName && known(opt):
		return false, h.fail(opt, repErrTooBig, "option data is too long")
	}

	switch opt {
	case optExportName:
		if !fit {
			return false, errors.New("EXPORT_NAME with a name that is too long")
		}
		return h.exportNameOption(ctx)
	case optInfo, optGo:
		return h.info(ctx, opt)
	case optList:
		return false, h.list(ctx)
	case optStartTLS:
		return false, h.startTLS(ctx)
	case optStructuredReply:
		if len(h.data) != 0 {
			return false, h.fail(opt, repErrInvalid, "STRUCTURED_REPLY takes no data")
		}
		h.structured = true
		return false, h.reply(opt, repAck, nil)
	case optListMetaContext, optSetMetaContext:
		return false, h.metaContext(ctx, opt)
	}
	return false, h.fail(opt, repErrUnsup, "unknown option")
}

func known(opt uint32) bool { return opt >= optExportName && opt <= optSetMetaContext && opt != 4 }

// reply writes one reply; run flushes when the option is answered.
func (h *handshake) reply(opt, typ uint32, data []byte) error {
	var buf [20]byte
	hdr := binary.BigEndian.AppendUint64(buf[:0], magicReply)
	hdr = binary.BigEndian.AppendUint32(hdr, opt)
	hdr = binary.BigEndian.AppendUint32(hdr, typ)
	hdr = binary.BigEndian.AppendUint32(hdr, uint32(len(data)))
	h.w.Write(hdr)
	_, err := h.w.Write(data) // a bufio.Writer remembers its first error
	return err
}

func (h *handshake) fail(opt, typ uint32, why string) error {
	h.log.Debug("option refused", "option", opt, "why", why)
	return h.reply(opt, typ, sentence(why))
}

// failOpen answers an option whose export could not be opened.
func (h *handshake) failOpen(opt uint32, name string, err error) error {
	typ := repErrUnknown
	switch {
	case errors.Is(err, ErrTLSRequired) && !h.client.TLS:
		typ = repErrTLSReqd
	case errors.Is(err, ErrDenied), errors.Is(err, ErrTLSRequired), err == errSlowOpens:
		typ = repErrPolicy
	case errors.Is(err, errBadString):
		typ = repErrInvalid
	case h.c.draining():
		typ = repErrShutdown
	}
	h.c.srv.lines.exports.Log(h.log, slog.LevelInfo, "export refused", "export", name, "err", err)
	return h.reply(opt, typ, sentence(err.Error()))
}

// sentence makes s a string that the protocol allows.
func sentence(s string) []byte { return []byte(truncate(strings.ToValidUTF8(s, "?"), maxString)) }

// truncate cuts s to at most n bytes, and not within a character.
func truncate(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

var errBadString = errors.New("a name is at most 4096 bytes of UTF-8 without NUL")

// open makes the export of that name h.export, if this client may have it.
func (h *handshake) open(ctx context.Context, name string) error {
	if h.export != nil && h.exportName == name {
		return nil
	}
	h.drop()
	if len(name) > maxString || !utf8.ValidString(name) || strings.ContainsRune(name, 0) {
		return errBadString
	}
	srv := h.c.srv
	ctx, done, err := h.ourTime(ctx)
	if err != nil {
		return err
	}
	e, release, err := srv.Exports.Open(ctx, name, h.client)
	done()
	if err != nil {
		return err
	}
	if release == nil {
		release = func() {}
	}
	if len(e.Clients) > 0 && !h.client.Named(e.Clients...) {
		release()
		if !h.client.TLS && srv.tls() != nil {
			return ErrTLSRequired
		}
		return ErrDenied
	}
	h.export, h.exportName, h.release = e, name, release
	return nil
}

// ourTime bounds a call of Exports. The time until done does not count against
// HandshakeTimeout, which is the client's. All such calls together are bounded by
// openTimes.
func (h *handshake) ourTime(ctx context.Context) (_ context.Context, done func(), err error) {
	limit := cmp.Or(h.c.srv.FaultTimeout, DefaultFaultTimeout)
	left := openTimes*limit - h.used
	if left <= 0 {
		return nil, nil, errSlowOpens
	}
	begin := time.Now()
	ctx, cancel := context.WithTimeout(ctx, min(limit, left))
	return ctx, func() {
		cancel()
		d := time.Since(begin)
		h.used += d
		h.c.extendHandshake(d)
	}, nil
}

var errSlowOpens = errors.New("this handshake has opened exports for too long; connect again")

// drop gives back the export opened last.
func (h *handshake) drop() {
	if h.export != nil {
		h.release()
		h.export, h.release = nil, nil
	}
}

func (h *handshake) exportNameOption(ctx context.Context) (chosen bool, err error) {
	name := string(h.data)
	if err := h.open(ctx, name); err != nil {
		return false, fmt.Errorf("export %.100q: %w", name, err) // no way to tell the client but to hang up
	}
	p := binary.BigEndian.AppendUint64(nil, uint64(h.export.Device.Size()))
	p = binary.BigEndian.AppendUint16(p, h.export.flags(h.structured))
	if !h.noZeroes {
		p = append(p, make([]byte, exportPadding)...)
	}
	h.w.Write(p)
	return true, h.w.Flush()
}

// info answers INFO and GO.
func (h *handshake) info(ctx context.Context, opt uint32) (chosen bool, err error) {
	rest := h.data
	name, rest, ok := cutString(rest)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		return false, h.fail(opt, repErrInvalid, "malformed option")
	}
	if err := h.open(ctx, name); err != nil {
		return false, h.failOpen(opt, name, err)
	}
	wants := func(typ uint16) bool {
		for p := rest[2:]; len(p) > 0; p = p[2:] {
			if binary.BigEndian.Uint16(p) == typ {
				return true
			}
		}
		return false
	}
	e := h.export
	h.replyInfo(opt, protocol.NegotiationReplyInfo{
		Type:              infoExport,
		Size:              uint64(e.Device.Size()),
		TransmissionFlags: e.flags(h.structured),
	}, "")
	if wants(infoName) {
		h.replyInfo(opt, infoName, e.Name)
	}
	if wants(infoDescription) && e.Description != "" {
		h.replyInfo(opt, infoDescription, e.Description)
	}
	if wants(infoBlockSize) {
		h.replyInfo(opt, protocol.NegotiationReplyBlockSize{
			Type:               infoBlockSize,
			MinimumBlockSize:   minBlock,
			PreferredBlockSize: preferredBlock,
			MaximumBlockSize:   maxPayload,
		}, "")
	}
	return opt == optGo, cmp.Or(h.reply(opt, repAck, nil), h.w.Flush())
}

// replyInfo sends the fixed part of an information reply, then text.
func (h *handshake) replyInfo(opt uint32, fixed any, text string) {
	var b bytes.Buffer
	_ = binary.Write(&b, binary.BigEndian, fixed)
	b.Write(sentence(text))
	_ = h.reply(opt, repInfo, b.Bytes())
}

func (h *handshake) list(ctx context.Context) error {
	if len(h.data) != 0 {
		return h.fail(optList, repErrInvalid, "LIST takes no data")
	}
	ctx, done, err := h.ourTime(ctx)
	if err != nil {
		return h.fail(optList, repErrPolicy, err.Error())
	}
	all, err := h.c.srv.Exports.List(ctx, h.client)
	done()
	if err != nil {
		return h.fail(optList, repErrPolicy, err.Error())
	}
	for i := range all {
		e := &all[i]
		if len(e.Clients) > 0 && !h.client.Named(e.Clients...) || len(e.Name) > maxString {
			continue
		}
		p := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
		p = append(p, e.Name...)
		p = append(p, sentence(e.Description)...)
		_ = h.reply(optList, repServer, p)
	}
	return h.reply(optList, repAck, nil)
}

// startTLS upgrades the connection. It drops everything that was agreed on before.
func (h *handshake) startTLS(ctx context.Context) error {
	cfg := h.c.srv.tls()
	switch {
	case len(h.data) != 0:
		return h.fail(optStartTLS, repErrInvalid, "STARTTLS takes no data")
	case h.client.TLS:
		return h.fail(optStartTLS, repErrInvalid, "TLS is on already")
	case cfg == nil:
		return h.fail(optStartTLS, repErrPolicy, "this server has no certificate")
	case !h.fixed:
		return h.fail(optStartTLS, repErrInvalid, "TLS needs fixed newstyle negotiation")
	}
	if err := cmp.Or(h.reply(optStartTLS, repAck, nil), h.w.Flush()); err != nil {
		return err
	}
	h.drop()
	h.structured, h.contexts = false, nil

	cfg = cfg.Clone()
	cfg.MinVersion = max(cfg.MinVersion, tls.VersionTLS13)
	verified := verifyClients(cfg)
	tc := tls.Server(&patientConn{Conn: h.nc}, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	h.nc = tc
	h.w.Reset(tc)
	h.client.TLS = true
	if certs := tc.ConnectionState().PeerCertificates; verified && len(certs) > 0 {
		h.client.Names = namesOf(certs[0])
	}
	return nil
}

// cutString cuts a string with its 32-bit length off the front of p.
func cutString(p []byte) (s string, rest []byte, ok bool) {
	if len(p) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(p)
	p = p[4:]
	if uint64(n) > uint64(len(p)) {
		return "", nil, false
	}
	return string(p[:n]), p[n:], true
}
