package nbd

import (
	"errors"
	"syscall"

	"thaw/blockmap"
)

// errno is an error value of the protocol (spec: "Error values"). They are the
// numbers that Linux uses, on every platform.
type errno uint32

const (
	ePerm     = errno(1)
	eIO       = errno(5)
	eNoMem    = errno(12)
	eInval    = errno(22)
	eNoSpace  = errno(28)
	eOverflow = errno(75)
	eNotSup   = errno(95)
	eShutdown = errno(108)
)

// errnoOf is the one place where an error becomes a number on the wire. What
// is not known here is an I/O error: the reader can do no better with it.
func errnoOf(err error) errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, blockmap.ErrReadOnly), errors.Is(err, syscall.EROFS):
		return ePerm
	case errors.Is(err, blockmap.ErrOutOfRange):
		return eInval
	case errors.Is(err, blockmap.ErrNoSpace), errors.Is(err, syscall.ENOSPC),
		errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return eNoSpace
	case errors.Is(err, blockmap.ErrClosed), errors.Is(err, ErrServerClosed):
		return eShutdown
	case errors.Is(err, syscall.ENOMEM):
		return eNoMem
	}
	return eIO
}

func (e errno) String() string {
	switch e {
	case ePerm:
		return "operation not permitted"
	case eIO:
		return "input/output error"
	case eNoMem:
		return "out of memory"
	case eInval:
		return "invalid argument"
	case eNoSpace:
		return "no space left on device"
	case eOverflow:
		return "value too large"
	case eNotSup:
		return "operation not supported"
	case eShutdown:
		return "the server is shutting down"
	}
	return "ok"
}
