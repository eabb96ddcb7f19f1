package nbd

import (
	"errors"
	"syscall"

	"thaw/blockmap"
)

// Op is the kind of a request, as far as its errno depends on it.
type Op int

const (
	OpOther Op = iota // flush, discard
	OpRead
	OpWrite // and zero
)

// Errno returns the errno with which a request fails, as on a Linux block device. It is
// the one place where an error of a device becomes a number, for every transport. Any
// error that Errno does not know is EIO: the client could do no better with it.
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
			return syscall.EIO // the cache is full, not the device; no reader expects ENOSPC
		}
		return syscall.ENOSPC
	case errors.Is(err, blockmap.ErrClosed), errors.Is(err, ErrServerClosed):
		return syscall.ESHUTDOWN
	case errors.Is(err, syscall.ENOMEM):
		return syscall.ENOMEM
	}
	return syscall.EIO
}
