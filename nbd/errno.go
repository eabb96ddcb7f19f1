package nbd

import (
	"errors"
	"syscall"

	"thaw/blockmap"
)

// Op is what a request asks of a device, as far as its errno depends on that.
type Op int

const (
	OpOther Op = iota // flush, discard
	OpRead
	OpWrite // and zero
)

// Errno is the errno with which a request fails, as a Linux block device would:
// the one place where an error of a device becomes a number, for every transport.
// It knows no wire format. An error that is not known here is an I/O error: the
// client can do no better with it.
func Errno(op Op, err error) syscall.Errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, blockmap.ErrReadOnly), errors.Is(err, syscall.EROFS):
		return syscall.EPERM
	case errors.Is(err, blockmap.ErrOutOfRange):
		if op == OpWrite {
			return syscall.ENOSPC
		}
		return syscall.EINVAL
	case errors.Is(err, blockmap.ErrNoSpace), errors.Is(err, syscall.ENOSPC),
		errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		if op == OpRead {
			return syscall.EIO // the cache is full, not the device; readers know no ENOSPC
		}
		return syscall.ENOSPC
	case errors.Is(err, blockmap.ErrClosed), errors.Is(err, ErrServerClosed):
		return syscall.ESHUTDOWN
	case errors.Is(err, syscall.ENOMEM):
		return syscall.ENOMEM
	}
	return syscall.EIO
}
