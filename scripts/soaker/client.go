package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"syscall"
	"time"
)

// errWrong must never happen.
var errWrong = errors.New("WRONG BYTES")

// tally counts events.
type tally struct {
	reads, bytes, refused, lost         atomic.Int64
	opened, stalled, kills, stops, hups atomic.Int64
	fills, truncations, slowReads       atomic.Int64
}

func (t *tally) String() string {
	return fmt.Sprintf("%d reads of %d MiB right, %d refused, %d over 30 s; %d exports opened, %d connections lost, %d clients stalled; %d kills, %d stops, %d reloads; disk filled %d times, files cut %d times",
		t.reads.Load(), t.bytes.Load()>>20, t.refused.Load(), t.slowReads.Load(), t.opened.Load(), t.lost.Load(), t.stalled.Load(),
		t.kills.Load(), t.stops.Load(), t.hups.Load(), t.fills.Load(), t.truncations.Load())
}

// client is a connection in the transmission phase. It uses the simplest part of the
// NBD protocol: EXPORT_NAME and simple replies.
type client struct {
	c      net.Conn
	cookie uint64
}

func dial(socket, export string) (*client, error) {
	c, err := net.DialTimeout("unix", socket, time.Minute)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(90 * time.Second))
	var hello [18]byte
	if _, err := io.ReadFull(c, hello[:]); err != nil {
		c.Close()
		return nil, err
	}
	b := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	b = append(b, "IHAVEOPT"...)
	b = binary.BigEndian.AppendUint32(b, 1) // EXPORT_NAME
	b = binary.BigEndian.AppendUint32(b, uint32(len(export)))
	b = append(b, export...)
	_, err = c.Write(b)
	var info [10]byte
	if err == nil {
		_, err = io.ReadFull(c, info[:])
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return &client{c: c}, nil
}

// errRefused is a reply with an errno.
var errRefused = errors.New("refused")

// ask sends a READ.
func (c *client) ask(off int64, n int) error {
	c.cookie++
	b := binary.BigEndian.AppendUint32(nil, 0x25609513)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint64(b, c.cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	_, err := c.c.Write(b)
	return err
}

// read reads p at off.
func (c *client) read(p []byte, off int64) error {
	c.c.SetDeadline(time.Now().Add(90 * time.Second))
	if err := c.ask(off, len(p)); err != nil {
		return err
	}
	var h [16]byte
	if _, err := io.ReadFull(c.c, h[:]); err != nil {
		return err
	}
	if m := binary.BigEndian.Uint32(h[:]); m != 0x67446698 || binary.BigEndian.Uint64(h[8:]) != c.cookie {
		return fmt.Errorf("invalid reply %x: %w", h, errWrong)
	}
	if e := binary.BigEndian.Uint32(h[4:]); e != 0 {
		return fmt.Errorf("%w: %w", errRefused, syscall.Errno(e))
	}
	_, err := io.ReadFull(c.c, p)
	return err
}

// check reads n bytes at off and compares them.
func (c *client) check(m *image, off int64, n int, t *tally) error {
	p := make([]byte, n)
	began := time.Now()
	err := c.read(p, off)
	if time.Since(began) > 30*time.Second {
		t.slowReads.Add(1)
	}
	if err != nil {
		return err
	}
	if !bytes.Equal(p, m.content[off:off+int64(n)]) {
		return fmt.Errorf("%s: %d bytes at %d: %w", m.name, n, off, errWrong)
	}
	t.reads.Add(1)
	t.bytes.Add(int64(n))
	return nil
}

// readWhole opens an image and reads it from beginning to end.
func readWhole(ctx context.Context, socket, host string, m *image, t *tally) error {
	c, err := dial(socket, host+"/"+m.name)
	if err != nil {
		return fmt.Errorf("open %s: %w", m.name, err)
	}
	defer c.c.Close()
	t.opened.Add(1)
	for at := int64(0); at < int64(len(m.content)) && ctx.Err() == nil; at += 256 << 10 {
		if err := c.check(m, at, min(256<<10, len(m.content)-int(at)), t); err != nil {
			return fmt.Errorf("read %s: %w", m.name, err)
		}
	}
	return ctx.Err()
}

// readFor opens images, reads parts of them, and disconnects, with and without a
// word. It counts errors, and returns on wrong bytes.
func readFor(ctx context.Context, socket, host string, set []*image, rng *rand.Rand, t *tally) error {
	for ctx.Err() == nil {
		m := set[rng.IntN(len(set))]
		c, err := dial(socket, host+"/"+m.name)
		if err != nil {
			t.refused.Add(1)
			select {
			case <-time.After(time.Duration(50+rng.IntN(300)) * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		t.opened.Add(1)
		end := context.AfterFunc(ctx, func() { c.c.Close() })
		err = visit(ctx, c, m, rng, t)
		end()
		c.c.Close()
		switch {
		case errors.Is(err, errWrong):
			return err
		case err != nil:
			t.lost.Add(1)
		}
	}
	return nil
}

// visit is what one client does.
func visit(ctx context.Context, c *client, m *image, rng *rand.Rand, t *tally) error {
	if rng.IntN(8) == 0 {
		// A client that requests much, and does not read the replies for a while.
		t.stalled.Add(1)
		c.c.SetDeadline(time.Now().Add(30 * time.Second))
		for range 40 {
			if err := c.ask(rng.Int64N(int64(len(m.content)-1<<20)), 1<<20); err != nil {
				return err
			}
		}
		select {
		case <-time.After(time.Duration(rng.IntN(8000)) * time.Millisecond):
		case <-ctx.Done():
		}
		return nil // it disconnects without a word
	}
	large := rng.IntN(6) == 0
	for range 20 + rng.IntN(400) {
		if ctx.Err() != nil {
			return nil
		}
		n := 512 * (1 + rng.IntN(300))
		if large {
			n = 4 << 20
		}
		off := rng.Int64N(int64(len(m.content) - n))
		switch err := c.check(m, off, n, t); {
		case errors.Is(err, errRefused):
			t.refused.Add(1)
		case err != nil:
			return err
		}
	}
	return nil
}
