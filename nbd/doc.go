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
// The server answers a read of bytes that are in memory at once, from where they lie. One
// read takes all requests that have arrived on a connection. View of [blockmap.Device]
// returns the mapped bytes of each, pinned. One writev sends all replies. So a hit
// costs no copy in this process, no allocation, no goroutine, and no lock that
// connections share. The file session.go has that path from top to bottom.
//
// The same holds for small writes. The payload lies in the input buffer, and the device
// writes it from there. A client that waits for each request also has its flushes and its
// reads of the disk done so. If one takes longer than a millisecond and the client has sent
// something else, another goroutine goes on with the connection: see takeover.go.
//
// Everything else becomes a task, up to a bound for each connection, and its reply is sent
// when it is ready; hits overtake it. A read of what is on the disk takes no goroutine
// ([blockmap.LoadAsync]): the device reads as many as the client has requested at once, and
// one writev sends the replies to all that it has finished. A read that must be fetched,
// a large write, a flush and all else gets a goroutine.
//
// Views pin chunks of a cache, and the bytes of a view can turn out to be unreadable.
// So the server copies a reply to its own memory if the client does not take it, and
// reads the bytes from the device again if they cannot be read. TLS reads what it
// sends in this process, and is given copies only. See detach.go.
//
// # The protocol
//
// The server speaks the whole baseline of the protocol and its extensions that are not
// experimental: fixed newstyle negotiation with TLS, structured replies, block status,
// and all commands except RESIZE. It offers two metadata contexts:
//
//	base:allocation   NBD_STATE_HOLE and NBD_STATE_ZERO on holes
//	x-thaw:resident   bit 0 on what can be read without fetching anything
//
// The queries "base:" and "x-thaw:" list the contexts of their namespace. proto.go
// draws the wire format. An error costs its request. It costs the connection only
// where the server does not know where the next request begins.
//
// # For other transports
//
// [Server.ServeTransmission] serves a client without a handshake, as the kernel's nbd
// driver is one. [Admission] and [Errno] are policy without a wire format: how many
// requests and bytes may be in flight, for each client and for all, and with which
// errno a request fails. They live here and not in blockmap, since blockmap knows no
// clients and no errno; and here and not in a package of their own, since the other
// transports are children of this package (nbd/attach, nbd/vhost). Children may import
// their parent, but siblings must not import each other.
package nbd
