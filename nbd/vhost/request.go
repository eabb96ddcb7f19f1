package vhost

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"syscall"

	"thaw/blockmap"
	"thaw/nbd"
)

// operation is the kind of a request (section 5.2.6).
type operation uint32

const (
	opIn          operation = 0
	opOut         operation = 1
	opFlush       operation = 4
	opGetID       operation = 8
	opDiscard     operation = 11
	opWriteZeroes operation = 13
)

func (o operation) String() string {
	switch o {
	case opIn:
		return "read"
	case opOut:
		return "write"
	case opFlush:
		return "flush"
	case opGetID:
		return "id"
	case opDiscard:
		return "discard"
	case opWriteZeroes:
		return "write zeroes"
	}
	return fmt.Sprintf("request %d", uint32(o))
}

// Outcomes of a request: its last byte.
const (
	statusOK    = 0
	statusIOErr = 1
	statusUnsup = 2
)

// request is one request of a driver, which is a chain of buffers (section 5.2.6):
//
//	what the device reads    0   u32  kind
//	                         4   u32  reserved
//	                         8   u64  sector
//	                         16       data of a write, or ranges
//	what the device writes   0        data of a read
//	                         -1  u8   status
//
// The buffers may divide that in any way (section 2.7.4). They lie in mem.
type request struct {
	q    *queue
	head uint16
	mem  *memory

	op     operation
	sector uint64
	in     [][]byte // what the device reads after the header
	out    [][]byte // what it writes before the status
	nin    int64    // bytes in in
	nout   int64    // bytes in out
	status []byte   // one byte
	reads  [][]byte // backs in, and is used again
	writes [][]byte // backs out

	// For a request that was not answered at once.
	e       blockmap.Extent
	cost    int64 // what it counts for while in flight
	view    blockmap.View
	loaded  bool // view is what a read loaded, and is to be copied
	code    byte // the status
	written uint32
	abandon bool // it stays in flight

	next *request // in a requestList
}

const (
	headerSize = 16

	// maxRequest bounds the data of a request. Drivers send a few MiB at most.
	maxRequest = 64 << 20
	// maxHit is up to where a read is answered on the thread of its queue.
	maxHit = 1 << 20
	// pieceSize is how much of a larger request is read or written at a time.
	pieceSize = 1 << 20

	rangeLen    = 16
	unmapFlag   = 1 << 0
	maxRangeLen = maxDiscardSegs * rangeLen
)

// parse takes the request that begins at r.head apart.
func (r *request) parse(ring *ring, scratch *[]byte) (err error) {
	r.reads, r.writes, err = ring.chain(r.mem, r.head, r.reads[:0], r.writes[:0], scratch)
	if err != nil {
		return err
	}
	var h [headerSize]byte
	in := cursor{bufs: r.reads}
	if !in.read(h[:]) {
		return broken("a request has less than %d bytes to read", headerSize)
	}
	r.op, r.sector = operation(binary.LittleEndian.Uint32(h[:])), binary.LittleEndian.Uint64(h[8:])
	r.in = in.rest()
	if len(r.writes) == 0 {
		return broken("a request has no byte for its status")
	}
	r.out = r.writes
	last := r.out[len(r.out)-1]
	r.status = last[len(last)-1:]
	if last = last[:len(last)-1]; len(last) > 0 {
		r.out[len(r.out)-1] = last
	} else {
		r.out = r.out[:len(r.out)-1]
	}
	r.nin, r.nout = total(r.in), total(r.out)
	return nil
}

func total(bufs [][]byte) (n int64) {
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

// cursor is a place in a list of buffers.
type cursor struct {
	bufs [][]byte
	i    int // the buffer
	off  int // in it
}

// next returns the next bytes, up to n of them as far as they lie in one buffer, and
// goes past them. It is empty at the end.
func (c *cursor) next(n int) []byte {
	if c.i == len(c.bufs) {
		return nil
	}
	b := c.bufs[c.i][c.off:]
	if n < len(b) {
		c.off += n
		return b[:n:n]
	}
	c.i, c.off = c.i+1, 0
	return b
}

// rest is what lies behind the cursor. It changes the buffer that the cursor is in.
func (c *cursor) rest() [][]byte {
	rest := c.bufs[c.i:]
	if c.off > 0 {
		rest[0] = rest[0][c.off:]
	}
	return rest
}

// read fills p, or reports that there is less.
func (c *cursor) read(p []byte) bool {
	for len(p) > 0 {
		b := c.next(len(p))
		if len(b) == 0 {
			return false
		}
		p = p[copy(p, b):]
	}
	return true
}

// write copies p, as far as there is room.
func (c *cursor) write(p []byte) {
	for len(p) > 0 {
		b := c.next(len(p))
		if len(b) == 0 {
			return
		}
		p = p[copy(b, p):]
	}
}

// writeView copies v.
func (c *cursor) writeView(v *blockmap.View) {
	segs := v.Segments()
	for i := range segs {
		p, zero := segs[i].Bytes, segs[i].Zero
		for len(p) > 0 {
			b := c.next(len(p))
			if len(b) == 0 {
				return
			}
			if zero {
				clear(b)
			} else {
				copy(b, p)
			}
			p = p[len(b):]
		}
	}
}

// damaged reports the segment of v in which a fault is as damaged, and whether there is
// one.
func damaged(v *blockmap.View, fault *faultError) bool {
	segs := v.Segments()
	for i := range segs {
		if !segs[i].Zero && fault.within(segs[i].Bytes) {
			segs[i].Damaged()
			return true
		}
	}
	return false
}

// do does r on a goroutine of its own, or on the thread of its queue. ctx ends when
// FaultTimeout has passed. The status is in r.code afterwards. An error ends the
// connection.
func (r *request) do(ctx context.Context) error {
	var err error
	switch r.op {
	case opIn:
		err = r.read(ctx)
	case opOut:
		err = r.write(ctx)
	case opFlush:
		err = r.q.c.wdev.Flush(ctx)
	case opDiscard, opWriteZeroes:
		err = r.ranges(ctx)
	}
	var fault *faultError
	if errors.As(err, &fault) {
		return fault
	}
	if err == nil && r.op != opIn && r.op != opFlush && r.q.c.writethrough() {
		err = r.q.c.wdev.Flush(ctx)
	}
	if err != nil {
		r.fail(ctx, err)
	}
	return nil
}

// read copies the content of r.e to the guest.
func (r *request) read(ctx context.Context) error {
	c := r.q.c
	to := cursor{bufs: r.out}
	for at := r.e.Start; at < r.e.End; {
		piece := blockmap.Extent{Start: at, End: min(r.e.End, at+pieceSize)}
		v, err := blockmap.Read(ctx, c.dev, piece)
		if err != nil {
			return err
		}
		if err := c.copyView(ctx, &to, &v, piece); err != nil {
			return err
		}
		at = piece.End
	}
	r.written = uint32(r.nout) + 1
	return nil
}

// copyView copies v, which shows e, and releases it. Bytes of a damaged cache are fetched again.
func (c *conn) copyView(ctx context.Context, to *cursor, v *blockmap.View, e blockmap.Extent) error {
	from := *to
	err := access(func() error { to.writeView(v); return nil })
	var fault *faultError
	again := errors.As(err, &fault) && damaged(v, fault)
	v.Release()
	if !again {
		if err == nil {
			c.counts.read.Add(e.Len())
		}
		return err
	}
	c.counts.repaired.Add(1)
	buf := c.srv.bufs.get(int(e.Len()))
	defer c.srv.bufs.put(buf)
	p := (*buf)[:e.Len()]
	if err := blockmap.ReadInto(ctx, c.dev, e, p); err != nil {
		return err
	}
	*to = from
	if err := access(func() error { to.write(p); return nil }); err != nil {
		return err
	}
	c.counts.read.Add(e.Len())
	return nil
}

// write writes the guest's bytes to the device. It copies them first: the guest could
// change them meanwhile, and a fault within the device could not be recovered from.
func (r *request) write(ctx context.Context) error {
	bufs := &r.q.c.srv.bufs
	buf := bufs.get(int(min(r.nin, pieceSize)))
	defer bufs.put(buf)
	from := cursor{bufs: r.in}
	for at := r.e.Start; at < r.e.End; {
		p := (*buf)[:min(r.e.End-at, pieceSize)]
		if err := access(func() error { from.read(p); return nil }); err != nil {
			return err
		}
		if err := r.q.c.wdev.WriteAt(ctx, p, at); err != nil {
			return err
		}
		at += int64(len(p))
	}
	return nil
}

// errFlags: a range has flags that mean nothing.
var errFlags = fmt.Errorf("a range has unknown flags: %w", errors.ErrUnsupported)

// ranges discards or zeroes. Each range has
//
//	0   u64  sector
//	8   u32  number of sectors
//	12  u32  flags: 1 the range may become a hole, for WRITE_ZEROES only
//
// All are checked before the first one is done.
func (r *request) ranges(ctx context.Context) error {
	type span struct {
		e     blockmap.Extent
		unmap bool
	}
	var spans []span
	var buf [maxRangeLen]byte
	p := buf[:r.nin]
	if err := access(func() error { in := cursor{bufs: r.in}; in.read(p); return nil }); err != nil {
		return err
	}
	for ; len(p) > 0; p = p[rangeLen:] {
		n, flags := binary.LittleEndian.Uint32(p[8:]), binary.LittleEndian.Uint32(p[12:])
		if flags&^unmapFlag != 0 || r.op == opDiscard && flags != 0 {
			return errFlags
		}
		if n > maxDiscardSectors {
			return fmt.Errorf("a range has %d sectors, of at most %d: %w", n, maxDiscardSectors, syscall.EINVAL)
		}
		e, err := extent(binary.LittleEndian.Uint64(p), int64(n)<<sectorShift, r.q.c.size)
		if err != nil {
			return err
		}
		spans = append(spans, span{e, flags&unmapFlag != 0})
	}
	for _, s := range spans {
		r.e = s.e
		var err error
		if r.op == opDiscard {
			err = r.q.c.wdev.Discard(ctx, s.e)
		} else {
			err = r.q.c.wdev.Zero(ctx, s.e, s.unmap)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// fail makes err the outcome of r.
func (r *request) fail(ctx context.Context, err error) {
	c := r.q.c
	if cause := context.Cause(r.q.ctx); cause != nil && (r.q.inflight != nil || !errors.Is(cause, errStopped)) {
		r.abandon = true // nobody waits for it, or it is done again
		return
	}
	r.code, r.written = statusIOErr, 0
	if r.nout == 0 {
		r.written = 1
	}
	if errors.Is(err, errors.ErrUnsupported) {
		r.code = statusUnsup
	}
	c.counts.errors.Add(1)
	if ctx.Err() != nil && !errors.Is(err, context.DeadlineExceeded) {
		return
	}
	op := nbd.OpOther
	switch r.op {
	case opIn:
		op = nbd.OpRead
	case opOut, opWriteZeroes:
		op = nbd.OpWrite
	}
	args := []any{"command", r.op, "extent", r.e, "err", err}
	if nbd.Errno(op, err) == syscall.ENOSPC && !errors.Is(err, blockmap.ErrOutOfRange) {
		// A virtio device has no way to say so.
		c.srv.lines.full.Log(c.log, slog.LevelWarn, "no space left for what a virtual machine writes; it sees an I/O error", args...)
		return
	}
	c.srv.lines.requests.Log(c.log, slog.LevelWarn, "request failed", args...)
}

// requestList is a queue of requests.
type requestList struct{ first, last *request }

func (l *requestList) push(r *request) {
	r.next = nil
	if l.first == nil {
		l.first = r
	} else {
		l.last.next = r
	}
	l.last = r
}

// take cuts off the first request, nil where there is none.
func (l *requestList) take() *request {
	r := l.first
	if r != nil {
		l.first = r.next
	}
	return r
}
