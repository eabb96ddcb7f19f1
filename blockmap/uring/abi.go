package uring

import "golang.org/x/sys/unix"

// The kernel's structures and numbers, of linux/io_uring.h.

type sqe struct {
	opcode   uint8
	flags    uint8
	ioprio   uint16
	fd       int32
	off      uint64
	addr     uint64
	len      uint32
	opFlags  uint32
	userData uint64
	_        [24]byte
}

type cqe struct {
	userData uint64
	res      int32
	flags    uint32
}

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
	opRead = 22

	enterGetEvents = 1 << 0

	setupClamp        = 1 << 4
	setupSubmitAll    = 1 << 7
	setupCoopTaskrun  = 1 << 8
	setupSingleIssuer = 1 << 12
	setupDeferTaskrun = 1 << 13

	featSingleMmap = 1 << 0
	featNoDrop     = 1 << 1
	featFastPoll   = 1 << 5 // Linux 5.7: also says that opRead is there

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
