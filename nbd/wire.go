package nbd

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// wire moves bytes for a session. One goroutine at a time reads from it, and
// one writes.
type wire interface {
	// read reads at least one byte and waits for it.
	read(p []byte) (int, error)
	// tryRead is read, but returns 0 where it would have to wait.
	tryRead(p []byte) (int, error)
	// waiting reports whether a read would return at once, or cannot be known to wait. Any
	// goroutine may call it.
	waiting() bool
	// brought says how many requests the reads since the last call have brought.
	brought(requests int)
	// writev writes all of bufs in order, or fails after n bytes: with errFault
	// where the next bytes cannot be read, and with os.ErrDeadlineExceeded
	// where the client takes too long. Without patience, that is when the
	// client has taken no byte for the timeout of the wire. With patience, it
	// is that long after the write first has to wait, whatever the client
	// takes meanwhile.
	writev(bufs [][]byte, patience func() time.Duration) (n int, err error)
}

// errFault: bytes of a mapping could not be read. The system call took nothing of the
// buffer with these bytes, nor of some buffers before it.
var errFault = errors.New("bytes to send cannot be read")

// newWire returns the wire over nc. copied reports whether the wire reads in this
// process what it writes: it must not get bytes of a mapping then, since those can
// fault. Such a wire calls stalled, on the goroutine that writes, when it has waited for
// the client for stallTime.
func newWire(nc net.Conn, timeout time.Duration, clients *atomic.Int32, stalled func()) (w wire, copied bool) {
	switch nc := nc.(type) {
	case *net.UnixConn, *net.TCPConn:
		if rc, err := nc.(syscall.Conn).SyscallConn(); err == nil {
			return newSocket(nc, rc, timeout, clients), false
		}
	case *tls.Conn:
		if p, ok := nc.NetConn().(*patientConn); ok {
			p.timeout, p.stalled = timeout, stalled
			return &stream{nc, p}, true
		}
	}
	p := &patientConn{Conn: nc, timeout: timeout, stalled: stalled}
	return &stream{p, p}, true
}

// socket is a wire over a kernel socket: one system call takes what has
// arrived, one writes headers and payloads from where they lie. It replaces net.Conn
// and net.Buffers because it sees every partial write, and so sets a deadline only where
// a write has to wait, which is rare.
type socket struct {
	nc      net.Conn
	rc      syscall.RawConn
	timeout time.Duration

	// For the reader. The closures are made once: no call allocates.
	readFn, tryFn func(fd uintptr) bool
	in            []byte
	nread         int
	rerr          syscall.Errno
	pace          pace
	parked        bool // the read at hand has been
	waited        bool // a read has, since brought
	poll          [1]unix.PollFd
	sleep         unix.Timespec

	// For the writer.
	writeFn  func(fd uintptr) bool
	iov      []unix.Iovec // what is left to write
	store    []unix.Iovec // what iov is cut from
	nwritten int
	werr     syscall.Errno
	patience func() time.Duration
	bounded  bool // the write has a deadline
}

// unixSendBuffer is where 1 MiB reads over a unix socket stop getting faster;
// the default of 208 KiB costs them a quarter.
const unixSendBuffer = 512 << 10

// maxIov is UIO_MAXIOV of Linux.
const maxIov = 1024

func newSocket(nc net.Conn, rc syscall.RawConn, timeout time.Duration, clients *atomic.Int32) *socket {
	s := &socket{nc: nc, rc: rc, timeout: timeout}
	s.pace.clients = clients
	if u, ok := nc.(*net.UnixConn); ok {
		growSendBuffer(u, rc)
	}
	s.readFn = s.readOnce
	s.tryFn = func(fd uintptr) bool { s.rerr = s.sysRead(fd); return true }
	s.writeFn = s.writeOnce
	return s
}

// growSendBuffer gives a unix socket room for two replies of a large read, unless it has
// that. TCP finds its own size.
func growSendBuffer(u *net.UnixConn, rc syscall.RawConn) {
	var size int
	_ = rc.Control(func(fd uintptr) { size, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF) })
	if size < 2*unixSendBuffer { // Linux doubles it, for what a packet takes beside its bytes
		_ = u.SetWriteBuffer(unixSendBuffer)
	}
}

func (s *socket) read(p []byte) (int, error)    { return s.readWith(p, s.readFn) }
func (s *socket) tryRead(p []byte) (int, error) { return s.readWith(p, s.tryFn) }

func (s *socket) waiting() (yes bool) {
	err := s.rc.Control(func(fd uintptr) {
		p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}
		n, err := unix.Poll(p[:], 0)
		yes = n > 0 || err != nil
	})
	return yes || err != nil
}

func (s *socket) readWith(p []byte, f func(uintptr) bool) (int, error) {
	s.in, s.nread, s.rerr = p, 0, 0
	err := s.rc.Read(f)
	s.in = nil
	switch {
	case err != nil:
		return 0, err
	case s.rerr == unix.EAGAIN:
		return 0, nil
	case s.rerr != 0:
		return 0, s.rerr
	case s.nread == 0:
		return 0, io.EOF
	}
	return s.nread, nil
}

// readOnce is called until it is done. Between the calls the goroutine is parked.
func (s *socket) readOnce(fd uintptr) (done bool) {
	e, slept := s.sysRead(fd), false
	if e == unix.EAGAIN && !s.parked && s.pace.stay() {
		s.poll[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
		// An error is treated like a timeout: the goroutine is parked.
		s.sleep = unix.NsecToTimespec(int64(longestSleep))
		if n, _ := unix.Ppoll(s.poll[:], &s.sleep, nil); n > 0 {
			e = s.sysRead(fd)
		}
		slept = true
	}
	if e == unix.EAGAIN {
		s.parked = true
		return false
	}
	if slept || s.parked {
		s.waited = true
	}
	s.parked = false
	s.rerr = e
	return true
}

func (s *socket) brought(requests int) {
	s.pace.got(s.waited && requests == 1)
	s.waited = false
}

func (s *socket) sysRead(fd uintptr) syscall.Errno {
	for {
		// The socket does not block, so the scheduler need not be told.
		n, _, e := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&s.in[0])), uintptr(len(s.in)))
		if e == unix.EINTR {
			continue
		}
		if e == 0 {
			s.nread = int(n)
		}
		return e
	}
}

func (s *socket) writev(bufs [][]byte, patience func() time.Duration) (n int, err error) {
	s.nwritten, s.patience = 0, patience
	for len(bufs) > 0 && err == nil {
		s.store = s.store[:0]
		for len(bufs) > 0 && len(s.store) < maxIov {
			if b := bufs[0]; len(b) > 0 {
				v := unix.Iovec{Base: &b[0]}
				v.SetLen(len(b))
				s.store = append(s.store, v)
			}
			bufs = bufs[1:]
		}
		s.iov = s.store
		for len(s.iov) > 0 && err == nil {
			s.werr = 0
			err = s.rc.Write(s.writeFn)
			switch {
			case err != nil:
			case s.werr == unix.EFAULT:
				err = errFault
			case s.werr != 0:
				err = s.werr
			}
		}
		clear(s.store) // no stale pointers into the mappings
	}
	if s.bounded {
		s.bounded = false
		s.nc.SetWriteDeadline(time.Time{})
	}
	return s.nwritten, err
}

func (s *socket) writeOnce(fd uintptr) (done bool) {
	for len(s.iov) > 0 {
		// Pages of a mapping may have to be read from disk, so this can
		// take long, and the scheduler must know.
		n, _, e := unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&s.iov[0])), uintptr(len(s.iov)))
		switch e {
		case 0:
			s.nwritten += int(n)
			s.advance(int(n))
		case unix.EINTR:
		case unix.EAGAIN:
			switch {
			case s.patience == nil && s.timeout > 0:
				s.nc.SetWriteDeadline(time.Now().Add(s.timeout))
			case s.patience != nil && !s.bounded:
				s.nc.SetWriteDeadline(time.Now().Add(s.patience()))
			}
			s.bounded = true
			return false
		default:
			s.werr = e
			return true
		}
	}
	return true
}

// advance drops the n bytes that were written from iov.
func (s *socket) advance(n int) {
	for n > 0 {
		v := &s.iov[0]
		if uint64(n) < uint64(v.Len) {
			v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
			v.SetLen(int(v.Len) - n)
			return
		}
		n -= int(v.Len)
		s.iov = s.iov[1:]
	}
}

// stream is a wire over any other net.Conn, TLS above all.
type stream struct {
	nc   net.Conn
	conn *patientConn // nc, or what is below it
}

func (s *stream) read(p []byte) (int, error)  { return s.nc.Read(p) }
func (s *stream) tryRead([]byte) (int, error) { return 0, nil }
func (s *stream) waiting() bool               { return true } // TLS may have bytes already
func (s *stream) brought(int)                 {}

func (s *stream) writev(bufs [][]byte, _ func() time.Duration) (n int, err error) {
	s.conn.begin()
	defer s.conn.end()
	for _, b := range bufs {
		m, err := s.nc.Write(b)
		n += m
		if err == nil && m < len(b) {
			err = io.ErrShortWrite
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// patientConn lies below TLS, which cannot go on after a write that has timed out.
// Between begin and end it calls stalled when a write stalls, and goes on with the
// write. The reader writes too, when the client asks for new keys, so the state is
// atomic.
type patientConn struct {
	net.Conn
	timeout time.Duration // without a byte, 0: none
	stalled func()

	active, told atomic.Bool
}

func (c *patientConn) begin() {
	c.told.Store(false)
	c.active.Store(true)
	c.SetWriteDeadline(time.Now().Add(stallTime))
}

func (c *patientConn) end() {
	c.active.Store(false)
	c.SetWriteDeadline(time.Time{})
}

func (c *patientConn) Write(p []byte) (n int, err error) {
	for {
		m, err := c.Conn.Write(p[n:])
		n += m
		if !errors.Is(err, os.ErrDeadlineExceeded) || !c.active.Load() {
			return n, err
		}
		if c.told.CompareAndSwap(false, true) {
			c.stalled()
		} else if m == 0 {
			return n, err
		}
		var end time.Time
		if c.timeout > 0 {
			end = time.Now().Add(c.timeout)
		}
		c.SetWriteDeadline(end)
	}
}
