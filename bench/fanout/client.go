package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"syscall"
	"time"

	"thaw/tracefile"
)

// read is one read of a start, and the time that the program works before it.
type read struct {
	off   int64
	n     int
	after time.Duration
	sum   uint32 // of its bytes, once learn has found it out
}

// script is what a start reads, as the block device of a mounted filesystem does: in pieces
// of at most the readahead.
type script []read

const readAhead = 128 << 10

// scriptOf makes the script of a trace.
func scriptOf(t *tracefile.Trace) (s script) {
	var before time.Duration
	for _, x := range t.Touches {
		after := max(x.At-before, 0)
		before = max(before, x.At)
		e := x.Extent()
		for off := e.Start; off < e.End; off += readAhead {
			s = append(s, read{off: off, n: int(min(readAhead, e.End-off)), after: after})
			after = 0
		}
	}
	return s
}

// client is a connection to an export. It uses the simplest part of the NBD protocol:
// EXPORT_NAME and simple replies.
type client struct {
	c      net.Conn
	cookie uint64
	buf    []byte
}

// dial opens an export by a unix socket; the empty name is the default one.
func dial(ctx context.Context, socket, export string) (*client, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(readTimeout))
	var hello [18]byte
	if _, err = io.ReadFull(c, hello[:]); err == nil {
		b := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
		b = append(b, "IHAVEOPT"...)
		b = binary.BigEndian.AppendUint32(b, 1) // EXPORT_NAME
		b = binary.BigEndian.AppendUint32(b, uint32(len(export)))
		_, err = c.Write(append(b, export...))
	}
	if err == nil {
		_, err = io.ReadFull(c, hello[:10])
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("open export %q at %s: %w", export, socket, err)
	}
	return &client{c: c, buf: make([]byte, readAhead)}, nil
}

// readTimeout is how long a read may take before it counts as an error. thaw's own limit
// is 30 s.
const readTimeout = 60 * time.Second

func (c *client) close() { c.c.Close() }

// read returns the sum of n bytes at off.
func (c *client) read(off int64, n int) (uint32, error) {
	c.cookie++
	c.c.SetDeadline(time.Now().Add(readTimeout))
	var b [28]byte
	binary.BigEndian.PutUint32(b[:], 0x25609513)
	binary.BigEndian.PutUint64(b[8:], c.cookie)
	binary.BigEndian.PutUint64(b[16:], uint64(off))
	binary.BigEndian.PutUint32(b[24:], uint32(n))
	if _, err := c.c.Write(b[:]); err != nil {
		return 0, err
	}
	var h [16]byte
	if _, err := io.ReadFull(c.c, h[:]); err != nil {
		return 0, err
	}
	if m := binary.BigEndian.Uint32(h[:]); m != 0x67446698 || binary.BigEndian.Uint64(h[8:]) != c.cookie {
		return 0, fmt.Errorf("read of %d bytes at %d: the reply begins with %x", n, off, h)
	}
	if e := binary.BigEndian.Uint32(h[4:]); e != 0 {
		return 0, fmt.Errorf("read of %d bytes at %d: %w", n, off, syscall.Errno(e))
	}
	if _, err := io.ReadFull(c.c, c.buf[:n]); err != nil {
		return 0, err
	}
	return crc32.Checksum(c.buf[:n], castagnoli), nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// start does what a start does. It fails if a read fails, or returns other bytes than learn
// has found.
func (c *client) start(ctx context.Context, s script) error {
	for _, r := range s {
		if err := sleep(ctx, r.after); err != nil {
			return err
		}
		sum, err := c.read(r.off, r.n)
		if err != nil {
			return err
		}
		if sum != r.sum {
			return fmt.Errorf("read of %d bytes at %d: WRONG BYTES", r.n, r.off)
		}
	}
	return nil
}

// learn finds the sums of what a start reads, from an export that is right.
func (c *client) learn(s script) error {
	for i, r := range s {
		sum, err := c.read(r.off, r.n)
		if err != nil {
			return err
		}
		s[i].sum = sum
	}
	return nil
}

// sleep waits, precisely enough for times below a millisecond to add up.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
