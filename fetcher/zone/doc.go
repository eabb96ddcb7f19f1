// Package zone shares chunks between the hosts of a zone, so that a thousand hosts that
// start one image read it from the registry once.
//
// A stream is cut into runs of neighbouring chunks, and a blob that is read as a whole,
// such as a bundle, into pieces. Each run has one owner among the members of the zone. A
// host that lacks a chunk asks the owner of its run. The owner answers from its memory or
// its disk, or fetches the run from the registry, once however many ask for it. It never
// asks another member for that, whatever its own view of the zone is: so no two members
// wait for each other. An owner that is sending a run to a few members already names
// members that have got it instead, and these pass it on: so a tree grows for each run by
// itself. Whatever goes wrong with a peer costs one short timeout, and the next source is
// asked: another holder, the next owner, the registry. The owner of a run is the first
// member in its order that can be reached, so hosts that can reach the same members agree
// about it.
//
// Nothing that comes from a peer is believed. A host verifies it by its own index, like
// bytes from anywhere.
//
// # Who may read what
//
// A peer names what it wants by digests: the image by that of its manifest, the stream or
// the blob by its own. Who knows these may read what they name, with the credentials of
// the member that is asked: they are capabilities. Who is a member is decided by mutual
// TLS: each host has a certificate of the zone's authority with its name. Without TLS a
// zone is one of a single machine, and listens on loopback addresses only.
//
// A chunk in memory is sent to whom a chunk on disk is: to peers that name an image which has
// the stream.
//
// # On the wire
//
// All requests are GET. Without TLS they are HTTP/1.1, and the kernel sends bodies from the
// files of the cache. With TLS 1.3 a member answers HTTP/1.1 and HTTP/2. It asks by HTTP/1.1,
// with which a chunk takes less time. Sessions of TLS are resumed. The query always has zone
// and from, the names of the zone and of the member that asks; image is
// HOST/REPOSITORY@sha256:DIGEST.
//
//	/v1/streams/{stream}/chunks/{first}-{last}?image=…&zone=…&from=…[&origin=1][&stored=N][&leaves=a-b]
//
// is the uncompressed content of chunks first to last, which are of one run, one after the
// other. origin=1 says that the peer takes this member for an owner. {stream} is the ID of
// the stream in hexadecimal. Of a single chunk a peer may say more, and the member that is
// asked chooses the form of its answer:
//
// stored=N says that the peer also takes the chunk as the registry has it, compressed; in the
// peer's index it has N bytes there. A member sends that if it has such a chunk of N bytes in
// memory. It keeps the chunks that came lately, from the registry or from peers, once they
// are verified (stored.go). The stored form takes about a third of the bytes.
//
// leaves=a-b says that a reader waits for these leaves. Then the answer begins with the
// SHA-256 of all leaves of the chunk and with these leaves, uncompressed: so the reader goes
// on after 64 KiB, verified, while the rest arrives. That is the other leaves in their order,
// or all of the chunk in its stored form.
//
// The header Thaw-Form of the answer says "stored", "leaves", or "leaves, stored". Without it
// the answer is the plain content. The Content-Length must be exactly that of the form.
//
//	/v1/blobs/{digest}/{off}-{end}?image=…&zone=…&from=…[&origin=1]
//
// is bytes off to end, without end, of a blob as the registry has it. off is a multiple of
// PieceBytes, and end is off+PieceBytes or the end of the blob.
//
//	/v1/health?zone=…&from=…
//
// is a Health in JSON. The header of an answer has its exact Content-Length, and
// Thaw-Source: memory, disk, or origin. While a member waits for what was asked for, it
// sends 102: after 50 ms, and then twice a second. Other codes have a short text:
//
//	400  the request is malformed
//	403  another zone, or a name that the certificate does not have
//	404  not here, and not to be had here
//	405  not GET
//	502  the registry has failed
//	503  with Thaw-Holders: NAME,NAME, members that have the run; without: too many requests
//
// The gossip of members uses the same port: packets by UDP, encrypted with a secret; and
// streams by TCP, over TLS as the protocol "thaw-gossip/1", or without TLS as connections
// whose first byte is 244.
//
// # The files
//
//	zone.go       Zone: Open, Close, names and addresses; status.go: its Status
//
// decisions, without I/O and clocks:
//
//	ring.go       who owns a run
//	router.go     whom to ask, and in which order; health.go: what is known about a peer
//	late.go       when a peer is late
//	grants.go     who gets a run from here, and who is named instead
//	budget.go     how many extra requests there may be
//	names.go      names of members
//
// asking:
//
//	client.go     requests to peers; signs.go: their signs of life
//	peers.go      the way of a fetch through the zone
//
// answering:
//
//	server.go     requests of peers, and their bounds; request.go: how they are parsed
//	owned.go      what this host fetches for those that it refers to others
//	send.go       bodies: from files, from mappings, from memory, at a least speed
//	pieces.go     pieces of blobs in memory
//	stored.go     chunks in memory as the registry has them
//	form.go       the forms of an answer
//	traffic.go    what went to whom
//
// members:
//
//	members.go    who is there, by memberlist; join.go: where to look for others
//	listen.go     the port; transport.go: gossip on it
//	tls.go        certificates
package zone
