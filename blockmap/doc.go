// Package blockmap is where the transports and the sources of thaw meet: it says what a
// block device consists of, and which parts of it are resident.
//
// A [Device] is what every transport serves and every source fills. An [Index]
// describes a thaw image: the blocks of the device are runs of a few streams, and a
// stream is cut into chunks. Chunks are the unit that thaw fetches and shares; a
// chunk consists of leaves, the least that thaw verifies and stores. A [Cache] keeps the streams on local disk, with a bitmap that says which
// blocks are resident. An [Image] puts Index and Cache together and is the Device that
// is served. The file image.go shows the path of a read from top to bottom.
//
//	device bytes ──Index──▶ (stream, block) ──Cache──▶ resident? ─yes─▶ in memory? ─yes─▶ View: mapped bytes, pinned
//	                                                       │no              │no
//	                                                       │                ▼
//	                                                       │   Load: bytes read from the disk, copied
//	                                                       ▼
//	                                            Fault: Fetcher brings the chunks, Stream.Fill stores them
//
// Resident means on the local disk. View never waits for it, so that one thread can answer
// all that is in memory; Load and Fault wait.
//
// An [Overlay] makes a device writable: it keeps what is written over a base that does not
// change. The file overlay.go shows the way of a write and of a flush.
//
// Terms: a block is 4 KiB. A chunk is the unit of fetching, a whole number of blocks, and
// a leaf is 64 KiB of it. A stream is a sequence of chunks; there is one for each layer of
// the source image and one for the filesystem's metadata.
package blockmap
