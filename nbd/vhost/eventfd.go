package vhost

import (
	"fmt"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// checkEventFD makes a descriptor that tells of an event non-blocking: an eventfd, or a
// pipe. It refuses others: a file, say, could always be read, and its queue would never
// sleep.
func checkEventFD(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("fstat: %w", err)
	}
	if t := st.Mode & unix.S_IFMT; t != 0 && t != unix.S_IFIFO {
		return fmt.Errorf("its descriptor is neither an eventfd nor a pipe: its mode is %#o", st.Mode)
	}
	return unix.SetNonblock(fd, true)
}

// newKick takes over a descriptor that a goroutine can wait for.
func newKick(fd int) (*os.File, error) {
	f := os.NewFile(uintptr(fd), "kick")
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		f.Close()
		return nil, fmt.Errorf("its descriptor cannot be waited for: %w", err)
	}
	return f, nil
}

// one is what is written to an eventfd.
var one = [8]byte{1}

// notify makes fd readable. It does nothing where fd is so already. The front end shares
// the descriptor, and can make it block, so the scheduler is told.
func notify(fd int) {
	for {
		_, _, e := unix.Syscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&one[0])), uintptr(len(one)))
		if e != unix.EINTR {
			return
		}
	}
}

// clearEvent makes an eventfd unreadable again. ok is false where it was so already.
func clearEvent(fd uintptr, p *[8]byte) (ok bool, err error) {
	for {
		n, _, e := unix.Syscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(p)), uintptr(len(p)))
		switch {
		case e == unix.EINTR:
		case e == unix.EAGAIN:
			return false, nil
		case e != 0:
			return false, fmt.Errorf("read the kick descriptor: %w", e)
		case n == 0: // the other end of a pipe was closed
			return false, fmt.Errorf("read the kick descriptor: %w", syscall.EPIPE)
		default:
			return true, nil
		}
	}
}
