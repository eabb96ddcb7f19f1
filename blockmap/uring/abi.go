package uring

import "golang.org/x/sys/unix"

// The kernel's structures and numbers, of linux/io_uring.h.

// Entry is an entry of the submission queue (struct io_uring_sqe).
type Entry struct {
	Op       uint8
	_        uint8
	_        uint16
	FD       int32
	Off      uint64 // of a file; the number of the command of OpCommand
	Addr     uint64 // of a buffer, which must neither move nor go until the completion
	Len      uint32
	_        uint32
	UserData uint64
	_        [8]byte
	// Command is what OpCommand carries: 16 bytes; 80 from here on if the ring is Large.
	Command [16]byte
}

// Completion says that an operation is finished (struct io_uring_cqe).
type Completion struct {
	UserData uint64 // of the entry
	Result   int32  // -errno where it failed
	Flags    uint32
}

// eventsArg is struct io_uring_getevents_arg.
type eventsArg struct {
	sigmask   uint64
	sigmaskSz uint32
	_         uint32
	ts        uint64
}

// Operations.
const (
	OpRead    = 22
	OpCommand = 46 // IORING_OP_URING_CMD: a command that the driver of the file defines
)

type sqOffsets struct {
	head, tail, mask, entries, flags, dropped, array, _ uint32
	_                                                   uint64
}

type cqOffsets struct {
	head, tail, mask, entries, overflow, cqes, flags, _ uint32
	_                                                   uint64
}

type params struct {
	sqEntries, cqEntries, flags, sqCPU, sqIdle, features, wqFD uint32
	_                                                          [3]uint32
	sq                                                         sqOffsets
	cq                                                         cqOffsets
}

const (
	enterGetEvents = 1 << 0
	enterExtArg    = 1 << 3

	setupClamp        = 1 << 4
	setupSubmitAll    = 1 << 7
	setupCoopTaskrun  = 1 << 8
	setupSQE128       = 1 << 10
	setupSingleIssuer = 1 << 12
	setupDeferTaskrun = 1 << 13

	featSingleMmap = 1 << 0
	featNoDrop     = 1 << 1
	featFastPoll   = 1 << 5 // Linux 5.7: also says that OpRead is there
	featExtArg     = 1 << 8 // Linux 5.11

	offSQRing = 0
	offSQEs   = 0x10000000
)

// setups are the flags to try, the best first: of Linux 6.1, of 5.19, of 5.7. The first
// makes the kernel finish reads only when the ring's thread asks for them, and never
// interrupt it.
var setups = []uint32{
	setupClamp | setupSubmitAll | setupCoopTaskrun | setupSingleIssuer | setupDeferTaskrun,
	setupClamp | setupSubmitAll | setupCoopTaskrun,
	setupClamp,
}

// unsupported reports whether an error of io_uring_setup says that there is no io_uring
// for this process: the kernel is too old or built without it, or the sysctl
// kernel.io_uring_disabled or a seccomp filter forbids it.
func unsupported(e unix.Errno) bool {
	return e == unix.ENOSYS || e == unix.EPERM || e == unix.EACCES || e == unix.EINVAL
}
