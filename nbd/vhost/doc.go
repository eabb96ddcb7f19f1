// Package vhost is a backend of vhost-user-blk: it serves block devices to virtual
// machines. The guest has a virtio disk, and its driver works with this process
// directly, through memory that both share. No socket and no virtual machine monitor
// is in between, and no kernel module or privilege is needed.
//
// A [Server] serves exports, which are devices under names, and is shaped like the one of
// package nbd. The protocol has no names, so each export has a socket of its own:
//
//	l, err := nbd.ListenPrivate(ctx, "/run/thaw/app.sock")
//	...
//	srv := &vhost.Server{Exports: nbd.Static{{Name: "app", Device: image}}}
//	go srv.Serve(l, "app")
//	...
//	srv.Shutdown(ctx)
//
// and a virtual machine that has it as a disk:
//
//	qemu-system-x86_64 ... -object memory-backend-memfd,id=mem,size=1G,share=on -machine memory-backend=mem \
//		-chardev socket,id=app,path=/run/thaw/app.sock,reconnect=1 -device vhost-user-blk-pci,chardev=app,num-queues=2
//
// # The one idea
//
// The way of a request has two ends in the guest's memory, and what it need not do is
// left out. The driver puts a chain of buffers in the available ring of a queue. The
// goroutine of the queue takes all chains that are there in one pass. It asks View of
// [blockmap.Device] for the bytes of each read, and copies them from where they lie, in
// the mapping of a cache file, to the guest's buffers: the only copy. It adds all chains
// that it has answered to the used ring at once, and interrupts the guest once, if the
// guest wants that. So a hit costs no system call, no allocation, no other goroutine, and
// no lock that queues share. pass.go has that path from top to bottom. A driver that is
// about to add more chains is waited for, for some microseconds (gather.go).
//
// A small write of whole blocks is done in the pass too, as long as the device takes such
// writes fast (package inline). Everything else becomes a request that waits for the
// device, up to a bound for each connection: a read of what is on the disk, which takes no
// goroutine ([blockmap.LoadAsync]), a read that must be fetched, any other write, a flush.
// Hits overtake it. Where the driver waits for each request before it makes the next, the
// goroutine of the queue does reads of the disk and all writes itself: to wake another one
// would take longer. If such a read or write takes more than some milliseconds, another
// goroutine goes on with the queue (takeover.go). pace.go says how a queue waits for the
// driver.
//
// # The parts
//
//	conn      a front end's connection: messages (message.go), one goroutine
//	memory    the guest's memory, mapped; addresses are translated and checked here
//	queue     a virtqueue: one goroutine while it runs
//	ring      where descriptors and the two rings lie in the guest's memory
//	request   what a chain asks for, and the doing of it
//	inflight  what is kept across a crash
//
// Each of these files draws the layout that it reads, and names the section of the
// specification: of virtio 1.2, or of the document "Vhost-user Protocol" of QEMU.
//
// # A backend that dies
//
// The front end keeps a file that says which requests the backend has taken and not yet
// completed. When the process dies, even by kill -9, the virtual machine waits. The front
// end connects to the next process, hands it that file, and the requests in it are done
// again, each completed once. The guest sees no error. The same happens to requests that
// are in flight when a virtual machine pauses. QEMU does this with reconnect=1. See
// inflight.go.
//
// # Whom it does not trust
//
// The guest: its driver may write anything to the rings, at any time. Each value is read
// once and checked, each buffer must lie in the guest's memory, and chains have a bounded
// length. A ring that makes no sense is not used any more until the driver sets it up
// anew; other queues go on.
//
// The front end: a message that makes no sense ends its connection. It may truncate the
// memory that it shares, and an access to that faults. Each access is made where a fault
// is an error, and ends the connection too. Files, memory and requests are bounded for
// each connection.
//
// # What is offered
//
// Of virtio-blk: SEG_MAX, BLK_SIZE, TOPOLOGY, MQ, and RO or FLUSH, DISCARD and
// WRITE_ZEROES. Of rings: INDIRECT_DESC, EVENT_IDX, VERSION_1, and the split layout. Of
// vhost-user: MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE. A driver that does not
// take FLUSH has each of its writes made durable before it is completed. Not offered:
// packed rings, IOMMUs, migration (LOG_SHMFD), memory hotplug by slots
// (CONFIGURE_MEM_SLOTS; a new memory table is taken at any time), in-band notifications,
// and CONFIG_WCE, for the reason that config.go gives.
package vhost
