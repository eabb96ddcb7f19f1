// Package uring reads files through an io_uring of Linux: many reads at once, without a
// thread for each.
//
// A [Ring] has one thread of its own. Any goroutine gives it reads by Submit. The thread
// passes all that have gathered to the kernel with one system call, which also waits for
// the next that is finished, and calls Done of each:
//
//	Submit ──▶ queue ──▶ thread: io_uring_enter(submit all, wait for one) ──▶ Done
//	              └──eventfd, if the thread sleeps──┘
//
// While the disk is busy the thread is awake most of the time, and a read costs less than
// one system call.
//
// [Queues] are the lower half of a Ring, for other operations and for callers with a
// thread of their own. The driver of ublk in thaw/nbd/attach gives its commands by them.
//
// The package knows nothing of thaw. Kernels before 5.7 do not have what it needs, and
// containers often forbid io_uring: New and Open then fail with [errors.ErrUnsupported],
// and the caller of New reads with threads.
package uring
