package zone

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// A body is sent in parts, each of which must be taken in time: who reads slower than
// leastSpeed is disconnected.
const (
	partBytes = 256 << 10
	leastTime = 2 * time.Second
	// leastSpeed is in bytes per second.
	leastSpeed = 128 << 10
)

// sender sends a body to a peer.
type sender struct {
	w    http.ResponseWriter
	c    *http.ResponseController
	file bool // the connection can take a file
	sent int64
	conn *conn // below TLS of HTTP/1.1; else nil
}

// sendsFiles reports whether the connection of a request can take a file.
func sendsFiles(r *http.Request) bool { return r.TLS == nil && r.ProtoMajor == 1 }

// newSender sends the header.
func newSender(w http.ResponseWriter, r *http.Request) *sender {
	s := &sender{w: w, c: http.NewResponseController(w), file: sendsFiles(r)}
	w.WriteHeader(http.StatusOK)
	if st, ok := r.Context().Value(connStateKey{}).(*connState); ok && r.ProtoMajor == 1 {
		s.conn = st.conn
	}
	if s.file {
		// net/http looks at the first bytes of a body before it has sent the header.
		s.deadline(0)
		_ = s.c.Flush()
	}
	return s
}

// rest says that nothing is written for a while. With HTTP/2, a deadline ends the answer
// also if nothing waits to be written.
func (s *sender) rest() { _ = s.c.SetWriteDeadline(time.Time{}) }

// deadline gives the peer time to take n more bytes.
func (s *sender) deadline(n int64) {
	_ = s.c.SetWriteDeadline(time.Now().Add(leastTime + time.Duration(n)*time.Second/leastSpeed))
}

// errEvicted says that what was resident when a request came is not any more.
var errEvicted = errors.New("the chunk was evicted meanwhile")

// turns has few uploads write at a time, in the order in which they come. Who gets all of
// the link for a moment is done sooner, and can pass on what it has got; so all are done
// sooner on average, and none later. A peer that reads slowly loses its turn, but not its
// answer.
type turns chan struct{}

const (
	writers  = 2 // uploads that write at a time
	turnTime = 200 * time.Millisecond
)

// take waits for a turn. The caller calls done when it has written.
func (t turns) take(ctx context.Context) (done func(), err error) {
	select {
	case t <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	return t.begin(), nil
}

// try is take if there is a turn at once.
func (t turns) try() (done func(), ok bool) {
	select {
	case t <- struct{}{}:
		return t.begin(), true
	default:
		return nil, false
	}
}

func (t turns) begin() (done func()) {
	end := sync.OnceFunc(func() { <-t })
	over := time.AfterFunc(turnTime, end)
	return func() {
		over.Stop()
		end()
	}
}

// held is a range of a stream that is pinned: in the file, or as a view; or a chunk as the
// registry has it.
type held struct {
	section blockmap.Section
	view    blockmap.View
	stored  *storedChunk
}

// hold pins a range that is resident: as a section if the connection can take a file and
// the cache can send one.
func hold(ctx context.Context, from *blockmap.Stream, e blockmap.Extent, file bool) (h held, ok bool) {
	if file {
		if h.section, ok = from.Section(e); ok {
			return h, true
		}
	}
	h.view, ok = from.LoadRange(ctx, e)
	return h, ok
}

// inMemory reports whether the range is sent without waiting for the disk.
func (h *held) inMemory() bool { return h.section.Len() == 0 || h.section.InMemory() }

func (h *held) release() {
	h.section.Release()
	h.view.Release()
	h.stored.release()
	h.stored = nil
}

// part sends a range.
func (s *sender) part(h *held) error {
	if h.stored != nil {
		return s.bytes(h.stored.bytes)
	}
	if h.section.Len() > 0 {
		return s.section(&h.section)
	}
	return s.view(nil, &h.view)
}

// leavesFirst is leaves of a chunk that are sent before the rest of it.
type leavesFirst struct {
	digests []byte // of all leaves of the chunk
	part    held
}

// maxWrite is how many bytes of a view are written at once: a leaf, and before it the digests
// of all leaves of the largest chunk.
const maxWrite = blockmap.LeafSize + blockmap.MaxLeaves*len(blockmap.Digest{})

// maxFirst bounds the bytes of leaves that are sent first: they do not wait for their turn.
const maxFirst = 256 << 10

// leaves sends leaves at once: a reader waits for them, and they are few. nil is none.
func (s *sender) leaves(x *leavesFirst) error {
	if x == nil {
		return nil
	}
	defer x.part.release()
	if x.part.section.Len() == 0 {
		if err := s.view(x.digests, &x.part.view); err != nil {
			return err
		}
		return s.c.Flush()
	}
	if err := s.bytes(x.digests); err != nil {
		return err
	}
	return s.part(&x.part)
}

// leafDigests makes the digests of the leaves of a chunk.
func leafDigests(chunk *blockmap.View) (list []blockmap.Digest, err error) {
	err = copied(chunk, nil, blockmap.LeafSize, func(leaf []byte) error {
		list = append(list, blockmap.LeafDigest(leaf))
		return nil
	})
	return list, err
}

// view sends a few bytes, and then those of a view, which may be in a mapped file.
func (s *sender) view(head []byte, v *blockmap.View) error {
	size := blockmap.LeafSize
	if len(head) > 0 {
		size = maxWrite
	}
	return copied(v, head, size, s.bytes)
}

// buffers are for bytes that are encrypted or framed anyhow.
var buffers = sync.Pool{New: func() any { return new([maxWrite]byte) }}

// copied calls do with a few bytes that are followed by those of a view, in pieces of size
// bytes and a last one that may be shorter. A piece is do's until it returns.
func copied(v *blockmap.View, head []byte, size int, do func([]byte) error) error {
	buf := buffers.Get().(*[maxWrite]byte)
	defer buffers.Put(buf)
	n := copy(buf[:size], head)
	segments := v.Segments()
	for i := range segments {
		x := &segments[i]
		for p := x.Bytes; len(p) > 0; {
			m := min(size-n, len(p))
			if err := blockmap.CopyMapped(buf[n:n+m], p[:m]); err != nil {
				x.Damaged()
				return err
			}
			n, p = n+m, p[m:]
			if n == size {
				if err := do(buf[:n]); err != nil {
					return err
				}
				n = 0
			}
		}
	}
	if n == 0 {
		return nil
	}
	return do(buf[:n])
}

// bytes sends bytes in memory.
func (s *sender) bytes(p []byte) error {
	for len(p) > 0 {
		n := min(len(p), partBytes)
		s.deadline(int64(n))
		m, err := s.write(p[:n])
		s.sent += int64(m)
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

func (s *sender) write(p []byte) (n int, err error) {
	if s.conn == nil {
		return s.w.Write(p)
	}
	err = s.conn.together(func() (err error) {
		n, err = s.w.Write(p)
		return err
	})
	return n, err
}

// section sends a part of a file.
func (s *sender) section(x *blockmap.Section) error {
	for off := int64(0); off < x.Len(); {
		part := &filePart{section: x, off: off, n: min(partBytes, x.Len()-off)}
		s.deadline(part.n)
		n, err := s.w.(io.ReaderFrom).ReadFrom(part)
		s.sent += n
		off += n
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
	}
	return nil
}

// filePart is a part of a section that is to be sent. net/http gives it to conn.ReadFrom.
type filePart struct {
	section *blockmap.Section
	off, n  int64
}

var errNotSent = errors.New("a part of a file can only be sent to a socket")

// Read implements io.Reader. Nobody reads a part.
func (p *filePart) Read([]byte) (int, error) { return 0, errNotSent }

// ReadFrom implements io.ReaderFrom. It sends a filePart by sendfile(2).
func (c *conn) ReadFrom(r io.Reader) (n int64, err error) {
	p, ok := r.(*filePart)
	if !ok {
		return c.TCPConn.ReadFrom(r)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	for n < p.n {
		var m int64
		var sendErr error
		err := raw.Write(func(fd uintptr) bool {
			m, sendErr = p.section.SendTo(int(fd), p.off+n, p.n-n)
			return !errors.Is(sendErr, unix.EAGAIN)
		})
		if err == nil {
			err = sendErr
		}
		if err != nil {
			return n, err
		}
		n += m
		c.of.files.Add(m)
	}
	return n, nil
}
