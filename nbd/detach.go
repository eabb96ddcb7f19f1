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

// A reply is sent from where its bytes lie: in the mapping of a cache file, with their
// chunks pinned. Detaching copies the rest of a reply to memory of the server and
// releases the pins, for three reasons:
//
//   - The bytes cannot be read: the file was truncated, or its disk has a bad
//     sector. They are fetched again. The client notices nothing.
//   - The client does not take the reply. Its pins would keep others' chunks out
//     of the cache for as long as it likes.
//   - The wire reads them in this process, as TLS does. A fault must be an error.

// stallTime is how long a reply may wait for its client with chunks pinned. A client that
// reads at 1 MB/s empties a socket's buffer in that time, and needs no copies. Others wait
// no longer for room in the cache. It is a variable for tests.
var stallTime = 500 * time.Millisecond

// stallTimeOver is the same where the client pins more than MaxInFlightBytes: chunks are
// pinned whole, so small reads can pin much.
const stallTimeOver = 10 * time.Millisecond

// errLate: a part of a reply was sent whose rest cannot be read, and the protocol has
// no way to say so.
var errLate = errors.New("cannot read the rest of a reply that was partly sent")

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

// stall detaches the replies that wait behind the batch being sent. Until that batch is
// sent, each goroutine that adds replies detaches them first. The holder of the write
// side calls stall, without s.mu.
func (s *session) stall() {
	s.mu.Lock()
	s.mu.stalled = true
	ready, handed := s.mu.ready, s.mu.handed
	s.mu.ready = taskList{}
	s.mu.Unlock()

	s.log.Debug("the client does not take its replies; copying them, so that they pin nothing in the cache")
	if handed != nil && len(handed.reads) > 0 {
		_ = s.detach(handed, 0)
	}
	for t := ready.first; t != nil; t = t.next {
		s.detachTask(t)
	}

	s.mu.Lock()
	ready.join(s.mu.ready)
	s.mu.ready = ready
	s.mu.Unlock()
}

// detach reduces b to what follows its first sent bytes, copied to memory of the
// server. It fetches bytes that cannot be read again, for at most FaultTimeout. Where
// that fails too, the reply becomes an error. detach fails with errLate where so much
// of the reply was sent that the protocol has no way to report the error; that cannot
// happen when sent is 0.
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
	sent int // bytes of b that were sent
	at   int // bytes of b that are done
	out  pieces

	damaged bool // some bytes could not be read
	ahead   sync.WaitGroup
}

// maxAhead bounds the Faults for replies behind a damaged one.
const maxAhead = 32

// left is how many of the next n bytes were sent.
func (d *detacher) left(n int) int { return min(max(d.sent-d.at, 0), n) }

// copy takes a buffer in memory of the server.
func (d *detacher) copy(buf []byte) {
	d.out.append(buf[d.left(len(buf)):])
	d.at += len(buf)
}

// read takes the reply to a READ, which others follow.
func (d *detacher) read(r *read, others []read) error {
	bufs := d.b.bufs[r.first:r.end]
	// The part that fails as a whole: a simple reply, or one chunk of a
	// structured one.
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

// part is a part of a reply that can be taken back as long as none of it was sent.
type part struct {
	at, end int // in the batch; end is known of chunks only
	mark    int // at, in what was copied
	done    bool
}

// repair fetches a payload of r again and appends it, except for its first skip bytes,
// which were sent. It returns where on the device the payload begins.
func (d *detacher) repair(r *read, buf []byte, skip int, others []read) (off int64, err error) {
	off = int64(r.offset)
	segs := r.view.Segments()
	i := 0
	// A payload is a whole segment. Equal slices have equal content.
	for ; len(segs[i].Bytes) != len(buf) || &segs[i].Bytes[0] != &buf[0]; i++ {
		off += int64(len(segs[i].Bytes))
	}
	e := blockmap.Range(off, int64(len(buf)))
	gone := readable(buf[:skip])
	segs[i].Damaged()
	if !d.damaged {
		// A file is seldom damaged in one place only. Fetch the damaged
		// bytes of the next replies at the same time.
		d.damaged = true
		for j := range others[:min(len(others), maxAhead)] {
			o := &others[j]
			next := blockmap.Range(int64(o.offset), o.view.Len())
			if o.end > 0 && next.Len() > 0 {
				d.ahead.Go(func() { _ = d.s.dev.Fault(d.ctx, next) }) // read reports the error
			}
		}
	}
	p := make([]byte, len(buf))
	if err := d.s.readAgain(d.ctx, e, p); err != nil {
		return off, err
	}
	if !bytes.Equal(gone, p[:len(gone)]) {
		return off, fmt.Errorf("bytes %v were sent in part and have changed: %w", e, blockmap.ErrDamaged)
	}
	d.out.append(p[skip:])
	return off, nil
}

// readable returns the bytes of p before the first page that faults. p was sent. The
// last page of a truncated file reads as zeros behind the end, and does not fault. If
// such zeros were sent, the server must send nothing more of the reply.
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

// fail makes r an error: its bytes from off on cannot be read.
func (d *detacher) fail(r *read, part *part, off int64, cause error) error {
	switch {
	case part.at >= d.sent:
		d.out.truncate(part.mark)
	case !part.done:
		// The chunk is filled up with zeros, as the spec says, and the
		// error behind it revokes them.
		d.out.appendZeros(part.end - max(d.at, d.sent))
	default:
		return fmt.Errorf("%w: %w", errLate, cause)
	}
	s := d.s
	s.c.counts.errors.Add(1)
	e := wireErrno(Errno(OpRead, cause))
	if s.ctx.Err() == nil {
		s.c.srv.lines.requests.Log(s.log, slog.LevelWarn, "request failed", "command", cmdRead, "offset", off, "errno", uint32(e), "err", cause)
	}
	var reply batch
	reply.fail(r.cookie, e, strings.ToValidUTF8(cause.Error(), "?"), off, s.structured)
	for _, p := range reply.bufs {
		d.out.append(p)
	}
	d.at = d.end(r)
	return nil
}

// end returns where r ends in the batch.
func (d *detacher) end(r *read) int {
	n := 0
	for _, buf := range d.b.bufs[:r.end] {
		n += len(buf)
	}
	return n
}

// detachTask copies the view of t.
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

// readAgain reads e after its bytes could not be read.
func (s *session) readAgain(ctx context.Context, e blockmap.Extent, p []byte) error {
	s.c.srv.lines.damaged.Log(s.log, slog.LevelWarn, "cannot read a file of the cache; fetching the bytes again", "extent", e)
	err := blockmap.ReadInto(ctx, s.dev, e, p)
	if err == nil {
		s.c.counts.repaired.Add(1)
	}
	return err
}

// copyView returns a copy of v, the device's bytes from off, that pins nothing. It reads
// damaged bytes by again. Where again fails, the copy ends there.
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
