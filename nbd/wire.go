package nbd

import (
	"errors"
	"io"
	"net"
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
	// writev writes all of bufs in order. It fails once the peer has not
	// taken a byte for as long as the timeout of the wire.
	writev(bufs [][]byte) error
}

func newWire(nc net.Conn, timeout time.Duration, clients *atomic.Int32) wire {
	switch nc.(type) {
	case *net.UnixConn, *net.TCPConn:
		if rc, err := nc.(syscall.Conn).SyscallConn(); err == nil {
			return newSocket(nc, rc, timeout, clients)
		}
	}
	return &stream{nc: nc, timeout: timeout}
}

// socket is a wire over a kernel socket: one system call takes what has
// arrived, one writes headers and payloads from where they lie. It is net.Conn
// and net.Buffers without the bookkeeping, and sees every partial write, so
// that a deadline is only set where a write has to wait, which is rare.
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
	poll          [1]unix.PollFd
	sleep         unix.Timespec

	// For the writer.
	writeFn func(fd uintptr) bool
	iov     []unix.Iovec // what is left to write
	store   []unix.Iovec // what iov is cut from
	werr    syscall.Errno
	waited  bool
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
		// Room for two replies of a large read. TCP finds its own size.
		u.SetWriteBuffer(unixSendBuffer)
	}
	s.readFn = s.readOnce
	s.tryFn = func(fd uintptr) bool { s.rerr = s.sysRead(fd); return true }
	s.writeFn = s.writeOnce
	return s
}

func (s *socket) read(p []byte) (int, error)    { return s.readWith(p, s.readFn) }
func (s *socket) tryRead(p []byte) (int, error) { return s.readWith(p, s.tryFn) }

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

// readOnce is called until it is done, and waited for between the calls.
func (s *socket) readOnce(fd uintptr) (done bool) {
	e, slept := s.sysRead(fd), false
	if e == unix.EAGAIN && !s.parked && s.pace.stay() {
		s.poll[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
		// An error is as good as a timeout: then it is parked.
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
	if e == 0 {
		s.pace.got((slept || s.parked) && s.nread == requestLen)
	}
	s.parked = false
	s.rerr = e
	return true
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

func (s *socket) writev(bufs [][]byte) error {
	for len(bufs) > 0 {
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
		for len(s.iov) > 0 {
			s.werr = 0
			err := s.rc.Write(s.writeFn)
			if err == nil && s.werr != 0 {
				err = s.werr
			}
			if err != nil {
				clear(s.store)
				return err
			}
		}
		clear(s.store) // no stale pointers into the mappings
	}
	if s.waited {
		s.waited = false
		s.nc.SetWriteDeadline(time.Time{})
	}
	return nil
}

func (s *socket) writeOnce(fd uintptr) (done bool) {
	for len(s.iov) > 0 {
		// Pages of a mapping may have to come from disk, so this can
		// take time, and the scheduler is told.
		n, _, e := unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&s.iov[0])), uintptr(len(s.iov)))
		switch e {
		case 0:
			s.advance(int(n))
		case unix.EINTR:
		case unix.EAGAIN:
			s.waited = true
			s.nc.SetWriteDeadline(time.Now().Add(s.timeout))
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

// stream is a wire over any other net.Conn, TLS above all: pieces are put
// together before they are written, since each write is a record.
type stream struct {
	nc      net.Conn
	timeout time.Duration
	buf     []byte
}

// streamBuffer is what is put together at most: four TLS records.
const streamBuffer = 64 << 10

func (s *stream) read(p []byte) (int, error)  { return s.nc.Read(p) }
func (s *stream) tryRead([]byte) (int, error) { return 0, nil }

func (s *stream) writev(bufs [][]byte) error {
	if s.buf == nil {
		s.buf = make([]byte, 0, streamBuffer)
	}
	for _, b := range bufs {
		for len(b) > 0 {
			n := min(len(b), streamBuffer-len(s.buf))
			s.buf = append(s.buf, b[:n]...)
			b = b[n:]
			if len(s.buf) == streamBuffer {
				if err := s.flush(); err != nil {
					return err
				}
			}
		}
	}
	return s.flush()
}

func (s *stream) flush() error {
	if len(s.buf) == 0 {
		return nil
	}
	s.nc.SetWriteDeadline(time.Now().Add(s.timeout))
	n, err := s.nc.Write(s.buf)
	if err == nil && n < len(s.buf) {
		err = errors.New("short write")
	}
	s.buf = s.buf[:0]
	return err
}
