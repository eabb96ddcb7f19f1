// Package attach gives a block device a node on this host: /dev/ublkb0, /dev/nbd0 or
// /dev/loop0, which can be mounted, or handed to a virtual machine.
//
//	n, err := attach.Attach(ctx, image, attach.Options{})
//	...
//	fmt.Println(n.Path, n.Driver, n.Why)
//	...
//	err = n.Detach(ctx)
//
// # The one idea
//
// There are three ways into the kernel, and one way to the bytes. Each driver answers a
// read of bytes that are in memory at once, from where they lie, by View of
// [blockmap.Device]. Everything else waits elsewhere: it holds up no hit, no other miss,
// and no detach.
//
// # ublk
//
// The kernel's ublk_drv (Linux 6.5 or later) gives requests to threads of this process by
// io_uring, one thread for each queue:
//
//	reader ─▶ /dev/ublkb0 ─▶ kernel ─completion─▶ thread ─View─▶ pwrite(/dev/ublkc0) ─▶ commit
//	                                                 │miss
//	                                                 ▼
//	                          disk: LoadAsync; network, writes: a goroutine ─▶ pread or pwrite ─▶ list, eventfd ─▶ thread ─▶ commit
//
// The thread only fetches and commits. It copies the bytes of a hit by one pwrite from the
// mapped cache to the pages of the request (USER_COPY), and hands over all commits and
// waits for the next requests with one system call. Who is done with a miss copies its
// bytes, puts the request on a list, and wakes the thread by an eventfd. See ublkqueue.go.
//
// A server that is killed comes back with [Recover]: the kernel keeps the node, and asks
// the new server again what the old one had not answered (USER_RECOVERY_REISSUE). Readers
// and writers wait for so long, and see no error.
//
// # nbd
//
// The kernel's nbd has several connections to an [nbd.Server] in this process, over socket
// pairs:
//
//	reader ─▶ /dev/nbd0 ─▶ kernel ─request─▶ socket pair ─▶ session of nbd.Server ─reply─▶ kernel
//
// The session begins with transmission; package nbd says what happens there. The driver is
// controlled by generic netlink, which lets the kernel choose the number of the node. A
// server that is killed comes back with [Recover]; a request that was in flight waits for
// the node's timeout. The kernel's driver reports every error as EIO, a full disk too.
//
// Many kernels have this netlink family in the network namespace of the host only. Elsewhere
// the node is made by ioctl: see nbdioctl.go. A thread of this process then waits in the
// kernel for as long as the node is there. The kernel takes no connection later on: a
// request whose connection dies goes to another one, and when the server dies, requests
// fail with EIO and [Recover] fails.
//
// # fuse
//
// The file system of one file, by FUSE, under a loop device with direct I/O:
//
//	reader ─▶ /dev/loop0 ─▶ loop ─direct I/O─▶ FUSE ─▶ reader of go-fuse ─View─▶ writev(/dev/fuse)
//	                                                        │miss
//	                                                        ▼
//	                                             waits; another reader takes its place
//
// It works on every kernel since Linux 5.8. The bytes of a hit go by one writev from the
// mapped cache to the pages of the reader. The loop device passes on as many requests at
// once as it has, reads and writes by asynchronous direct I/O; only a flush and a discard
// hold up those behind them, in the loop driver. The file system is mounted nowhere, and
// ends with the loop device. When the server dies, requests fail with EIO; see [Recover].
//
// # Which one
//
// Auto takes ublk where the kernel has it, else nbd, else fuse, and Node.Why says why. A
// driver that this host lacks is an error with [ErrUnavailable], whose text has the command
// that helps. All need root.
//
// # Writable nodes
//
// A node that is written to through a filesystem on the same host needs care, because the
// kernel may have to write to the node to find memory. Attach tells the kernel that the
// process carries writes (PR_SET_IO_FLUSHER), before the first node. What Attach cannot
// do, the host must: do not swap on a node, do not put thaw's cache, overlay or program on
// one, and do not let the process that serves a node open files on it. The process should
// not be in the mount namespace of those who mount the node: it would then take part in
// their mounts.
//
// # Numbers
//
// The kernel chooses the number of a node in the step that makes the node, so two programs
// never get the same one. What the kernel has cached of a node is dropped when it is
// detached, and again when the next node of that number is made. The kernel keeps a token
// with each node, which tells it from a later one with its number. [Sweep] finds by it what a
// process has left that was killed before it could keep the node's [State].
package attach
