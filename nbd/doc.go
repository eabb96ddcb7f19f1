// Package nbd serves block devices to the clients of the NBD protocol: the
// Linux kernel, qemu, libnbd and its tools, fio.
//
// A [Server] serves [Exports], which are devices under names, on any number of
// listeners, and is shaped like the one of net/http. A server for one image on
// a unix socket:
//
//	l, err := nbd.Listen(ctx, "unix:/run/thaw.sock")
//	...
//	srv := &nbd.Server{Exports: nbd.Static{{Name: "app", Device: image}}}
//	go srv.Serve(l)
//	...
//	srv.Shutdown(ctx)
//
// and a client of it:
//
//	nbdinfo 'nbd+unix:///app?socket=/run/thaw.sock'
//
// # The one idea
//
// What is resident is answered at once from where it lies. One read takes all
// requests that have arrived on a connection; [blockmap.Device] View gives the
// mapped bytes of each, pinned; one writev sends all replies. A hit so costs no
// copy in this process, no allocation, no goroutine, and no lock that
// connections share. A read that misses, and everything that writes, goes to a
// goroutine of its own, of which each connection has a bounded number, and is
// answered when it is ready; hits overtake it. The file session.go is that
// path from top to bottom.
//
// Views pin chunks of a cache, and their bytes can turn out to be unreadable. So a
// reply that its client does not take, and one that cannot be read, is copied to
// memory of the server, from the device once more where it must be. TLS reads in
// this process what it sends, and gets copies only. That is detach.go.
//
// # What is spoken
//
// The whole of the protocol's baseline and of its extensions that are not
// experimental: fixed newstyle negotiation with TLS, structured replies, block
// status, and all commands but RESIZE. Two metadata contexts are offered:
//
//	base:allocation   NBD_STATE_HOLE and NBD_STATE_ZERO on what is a hole
//	x-thaw:resident   bit 0 on what is read without fetching anything
//
// As queries, "base:" and "x-thaw:" list what is in their namespace. The wire
// format is drawn in proto.go. Errors become errno values in one place,
// errno.go; an error costs its request, never the connection, as long as it is
// known where the next request begins.
package nbd
