// Package blockmap is the waist of thaw: what a block device is made of and
// what of it is here.
//
// A [Device] is what every transport serves and every source fills. A thaw
// image is described by an [Index]: its device blocks are runs of a few
// streams, and a stream is cut into chunks, which are what is fetched, verified
// and shared. A [Cache] keeps the streams on local disk, with a bitmap that
// says which blocks are resident. An [Image] puts the two together and is the
// Device that is served; the file image.go shows the way of a read from top to
// bottom.
//
//	device bytes ──Index──▶ (stream, block) ──Cache──▶ resident? ─yes─▶ View: mapped bytes, pinned
//	                                                       │no
//	                                                       ▼
//	                                            Fault: Fetcher brings the chunks, Stream.Fill stores them
//
// The words: a block is 4 KiB; a chunk is the fetched unit, a whole number of
// blocks; a stream is a sequence of chunks, one for each layer of the source
// image and one for the filesystem's metadata.
package blockmap
