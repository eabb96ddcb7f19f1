package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
	"unsafe"

	"thaw/blockmap"
)

// A reply is sent from where its bytes lie, in the mapping of a cache file, with
// their chunks pinned. Detaching copies what is left of it to memory of the server
// and releases the pins, for three reasons:
//
//   - The bytes cannot be read: the file was truncated, or its disk has a bad
//     sector. They are fetched again. The client notices nothing.
//   - The client does not take the reply. Its pins would keep others' chunks out
//     of the cache for as long as it likes.
//   - The wire reads them in this process, as TLS does. A fault must be an error.

const (
	// stallTime is how long a reply may wait for its client with chunks
	// pinned. A client that reads at 1 MB/s takes a socket's buffer in that
	// time, and is not copied for; others wait no longer for room.
	stallTime = 500 * time.Millisecond
	// stallTimeOver is the same where the client pins more than
	// MaxInFlightBytes: chunks are pinned whole, so small reads can pin much.
	stallTimeOver = 10 * time.Millisecond
)

// errLate: a part of a reply has left that promises bytes which cannot be had.
var errLate = errors.New("the rest of a reply that was begun cannot be read")

// patience is how long b may wait for the client before it is detached.
func (s *session) patience() time.Duration {
	var pins int64
	for i := range s.sending.reads {
		pins += s.sending.reads[i].view.Pinned()
	}
	d := stallTime
	if t := s.c.srv.WriteTimeout; t > 0 {
		d = min(d, t)
	}
	if !s.client.Fits(pins) {
		d = min(d, stallTimeOver)
	}
	return d
}

// stall releases what the client has pinned that has no way to it now: the replies
// that wait behind the batch being sent. Until that has left, whoever adds replies
// detaches them first. Called by the holder of the write side, without s.mu.
func (s *session) stall() {
	s.mu.Lock()
	s.mu.stalled = true
	ready, handed := s.mu.ready, s.mu.handed
	s.mu.ready = taskList{}
	s.mu.Unlock()

	s.log.Debug("the client does not take its replies; they are copied, and the cache is free of them")
	if handed != nil && len(handed.reads) > 0 {
		s.detach(handed, 0)
	}
	for t := ready.first; t != nil; t = t.next {
		s.detachTask(t)
	}

	s.mu.Lock()
	ready.join(s.mu.ready)
	s.mu.ready = ready
	s.mu.Unlock()
}

// detach makes b what is left of it behind the first sent bytes, in memory of the
// server. Bytes that cannot be read are fetched again, for at most FaultTimeout.
// Where that fails too the reply becomes an error. It fails with errLate where so
// much of the reply has left that the protocol has no way to say so, which cannot
// be when sent is 0.
func (s *session) detach(b *batch, sent int) error {
	d := detacher{s: s, b: b, sent: sent}
	defer d.ahead.Wait()
	var cancel context.CancelFunc
	d.ctx, cancel = context.WithTimeout(s.ctx, s.timeout)
	defer cancel()
	d.out = pieces{pool: &s.c.srv.bufs, want: b.size - sent}
	if len(b.copies.list) == 0 {
		d.out.list = b.copies.list
	}
	next := 0
	var err error
	for i := range b.reads {
		r := &b.reads[i]
		if r.end == 0 {
			continue
		}
		for ; next < int(r.first); next++ {
			d.copy(b.bufs[next])
		}
		if err = d.read(r, b.reads[i+1:]); err != nil {
			break
		}
		next = int(r.end)
	}
	for ; err == nil && next < len(b.bufs); next++ {
		d.copy(b.bufs[next])
	}
	b.reset()
	b.copies = d.out
	b.bufs = append(b.bufs, d.out.list...)
	b.size = d.out.n
	return err
}

// detacher is one detach at work.
type detacher struct {
	s    *session
	ctx  context.Context
	b    *batch
	sent int // bytes of b that have left
	at   int // bytes of b that were looked at
	out  pieces

	damaged bool // something was
	ahead   sync.WaitGroup
}

// maxAhead bounds the Faults for what follows damage.
const maxAhead = 32

// left is how much of the next n bytes has left.
func (d *detacher) left(n int) int { return min(max(d.sent-d.at, 0), n) }

// copy takes a buffer that is memory of the server already.
func (d *detacher) copy(buf []byte) {
	d.out.append(buf[d.left(len(buf)):])
	d.at += len(buf)
}

// read takes the reply to a READ, behind which come others.
func (d *detacher) read(r *read, others []read) error {
	bufs := d.b.bufs[r.first:r.end]
	// The part that stands or falls together: a simple reply as a whole, or
	// one chunk of a structured one.
	part := part{at: d.at, mark: d.out.n, done: true}
	for _, buf := range bufs {
		if d.s.structured && d.at >= part.end {
			part.at, part.mark = d.at, d.out.n
			part.end = d.at + chunkLen + int(binary.BigEndian.Uint32(buf[16:]))
			part.done = binary.BigEndian.Uint16(buf[4:])&chunkDone != 0
		}
		skip := d.left(len(buf))
		if skip < len(buf) && d.out.appendMapped(buf[skip:]) != nil {
			off, err := d.repair(r, buf, skip, others)
			if err != nil {
				return d.fail(r, &part, off, err)
			}
		}
		d.at += len(buf)
	}
	return nil
}

// part is what of a reply can be taken back as long as none of it has left.
type part struct {
	at, end int // in the batch; end is known of chunks only
	mark    int // at, in what was copied
	done    bool
}

// repair appends a payload of r but for its first skip bytes, which have left,
// after fetching it again. It returns where on the device the payload begins.
func (d *detacher) repair(r *read, buf []byte, skip int, others []read) (off int64, err error) {
	off = int64(r.offset)
	segs := r.view.Segments()
	i := 0
	// Payloads are segments as they are. Those alike have the same content.
	for ; len(segs[i].Bytes) != len(buf) || &segs[i].Bytes[0] != &buf[0]; i++ {
		off += int64(len(segs[i].Bytes))
	}
	e := blockmap.Range(off, int64(len(buf)))
	gone := readable(buf[:skip])
	segs[i].Damaged()
	if !d.damaged {
		// A file is seldom damaged in one place. What else is gone with it
		// comes at the same time.
		d.damaged = true
		for j := range others[:min(len(others), maxAhead)] {
			o := &others[j]
			next := blockmap.Range(int64(o.offset), o.view.Len())
			if o.end > 0 && next.Len() > 0 {
				d.ahead.Go(func() { d.s.dev.Fault(d.ctx, next) }) // who reads it sees the error
			}
		}
	}
	p := make([]byte, len(buf))
	if err := d.s.readAgain(d.ctx, e, p); err != nil {
		return off, err
	}
	if !bytes.Equal(gone, p[:len(gone)]) {
		return off, fmt.Errorf("bytes of %v that were sent have changed: %w", e, blockmap.ErrDamaged)
	}
	d.out.append(p[skip:])
	return off, nil
}

// readable is what lies in p before the first page that faults, of bytes that have
// been sent. A page that a file ends in reads as zeros behind the end, and does not
// fault: if such zeros have left, nothing more must.
func readable(p []byte) []byte {
	got := make([]byte, 0, len(p))
	for len(p) > 0 {
		// A page faults as a whole.
		n := blockmap.BlockSize - int(uintptr(unsafe.Pointer(&p[0]))%blockmap.BlockSize)
		n = min(n, len(p))
		if err := blockmap.CopyMapped(got[len(got):len(got)+n], p[:n]); err != nil {
			break
		}
		got, p = got[:len(got)+n], p[n:]
	}
	return got
}

// fail makes r an error: its bytes from off on cannot be had.
func (d *detacher) fail(r *read, part *part, off int64, cause error) error {
	switch {
	case part.at >= d.sent:
		d.out.truncate(part.mark)
	case !part.done:
		// The chunk is filled up with zeros, as the specification says,
		// and the error behind it takes them back.
		d.out.appendZeros(part.end - max(d.at, d.sent))
	default:
		return fmt.Errorf("%w: %w", errLate, cause)
	}
	s := d.s
	s.c.counts.errors.Add(1)
	e := wireErrno(Errno(OpRead, cause))
	if s.ctx.Err() == nil {
		s.c.srv.lines.requests.log(s.log, slog.LevelWarn, "request failed", "command", cmdRead, "offset", off, "errno", uint32(e), "err", cause)
	}
	var reply batch
	reply.fail(r.cookie, e, strings.ToValidUTF8(cause.Error(), "?"), off, s.structured)
	for _, p := range reply.bufs {
		d.out.append(p)
	}
	d.at = d.end(r)
	return nil
}

// end is where r ends in the batch.
func (d *detacher) end(r *read) int {
	n := 0
	for _, buf := range d.b.bufs[:r.end] {
		n += len(buf)
	}
	return n
}

// detachTask copies what t has read.
func (s *session) detachTask(t *task) {
	if t.view.Pinned() == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.timeout)
	defer cancel()
	v, _, err := copyView(&t.view, int64(t.req.offset), func(e blockmap.Extent, p []byte) error {
		return s.readAgain(ctx, e, p)
	})
	t.view.Release()
	if err != nil {
		s.fail(ctx, t, err)
		return
	}
	t.view = v
}

// readAgain reads what was damaged.
func (s *session) readAgain(ctx context.Context, e blockmap.Extent, p []byte) error {
	s.c.srv.lines.damaged.log(s.log, slog.LevelWarn, "cannot read the cache's file; fetching its bytes again", "extent", e)
	err := blockmap.ReadInto(ctx, s.dev, e, p)
	if err == nil {
		s.c.counts.repaired.Add(1)
	}
	return err
}

// copyView returns v, the device's bytes from off, as a view that pins nothing.
// What is damaged is read by again; where that fails the view ends there.
func copyView(v *blockmap.View, off int64, again func(e blockmap.Extent, p []byte) error) (own blockmap.View, end int64, err error) {
	segs := v.Segments()
	for i := range segs {
		g := &segs[i]
		n := int64(len(g.Bytes))
		if g.Zero {
			own.AppendZeros(n)
		} else {
			p := make([]byte, n)
			if err := blockmap.CopyMapped(p, g.Bytes); err != nil {
				g.Damaged()
				if err := again(blockmap.Range(off, n), p); err != nil {
					return own, off, err
				}
			}
			own.Append(p, nil, 0)
		}
		off += n
	}
	return own, off, nil
}
