// Package fetcher makes absent chunks resident. It fetches each chunk once, however
// many readers wait for it, and demanded chunks before prefetched ones. One request
// brings several chunks. Every chunk is verified, and retried while it may still
// succeed.
//
// One [Fetcher] serves all devices of a process. From binds it to the origin of an
// image's blobs. The result is the fetcher that a [blockmap.Image] asks for its chunks:
//
//	f := fetcher.New(fetcher.Options{})
//	defer f.Close()
//	image, err := blockmap.NewImage(index, cache, f.From(repository))
//
// # The way of a miss
//
// A reader needs a chunk that is not resident. The files, in the order in which the
// chunk passes them:
//
//	bound.go       Bound.Fetch finds the fetch of the chunk, or makes one, and waits for it
//	readahead.go   predicts which chunks the reader demands next, if no trace says so
//	fetch.go       the fetch: the readers that wait for it, and its states from queued to ended
//	duplicates.go  a chunk of the same content is in flight: the fetch waits for that one
//	form.go        forms in which peers send chunks: as the registry has them, leaves first
//	near.go        in a zone: which peer is asked before the origin, and what comes next if
//	               that fails or is late
//	queue.go       the order of the fetches that wait for a source, and what one request brings
//	sources.go     what a source has in flight, and the bounds that sources share
//	pace.go        how much to have in flight to a source, from what its link carries
//	dispatch.go    starts requests: demands first, each source in turn, within the bounds
//	request.go     one request, and which of its chunks are still to come
//	receive.go     asks the origin, reads the chunks, and has each chunk stored as soon as it
//	               arrives
//	link.go        reads demanded bytes first, where they share a link with prefetched ones
//	decoders.go    threads of low priority, for chunks that no reader waits for
//	keep.go        decompresses a chunk, has it verified, stores it or holds it in memory
//	retry.go       ends the fetch: the chunk is resident, is tried again, or is given up
//
// Beside these:
//
//	watch.go       looks at all requests four times a second, for those that are late
//	rate.go        how fast the bytes of a request came lately
//	hedge.go       asks another server or source for a chunk that is late
//	reclaim.go     takes requests back from a source that hangs while others have no room
//	owned.go       fetches on behalf of peers, which go to the origin only
//
// # Ahead of readers
//
// [Bound.Replay] fetches a list of chunks (replay.go). Before the list it fetches a
// [Bundle]: leaves of many chunks in one download (bundle.go, download.go). A chunk of
// which a bundle brings leaves is a fetch like any other. A reader that needs such leaves
// waits for the download if that brings them soon, and is woken when they are resident,
// whatever else of the chunk is to come; otherwise a request fetches the chunk. If the cache has no room for
// prefetched chunks, the prefetch ends (refusals.go).
//
// # Rules
//
// A fetch belongs to the Fetcher, not to the reader that asked first. If that reader
// gives up, the fetch continues for the others. A fetch that no reader or prefetch
// wants any more is cancelled, and so is a request that brings nothing else.
//
// Each source has its own limits, so a source that hangs or trickles stops no other.
// The chunk of a fetch may be available in several places, in order. A request goes to
// the first place whose source has room. A failed try moves on to the next place, and a
// demand that is late is requested from the next place as well.
//
// With peers nearby ([Fetcher.FromNear]) a chunk has an owner among the hosts of a zone.
// Each peer is a source. A fetch goes to the peer that its route names and waits for it,
// even if the peer has no room at the moment, because each request that goes to the origin
// instead is one that the zone exists to save. It goes on to the next peer, and at last to
// the origin, when a peer fails. No peer is waited for so long that no time is left for the
// origin. What a host fetches on behalf of others it fetches from the origin only, so hosts
// never wait for each other in a circle. Bundles, and other blobs, are read by pieces in the
// same way (blob.go).
//
// Every chunk and every leaf, from any source, is verified in one place: the methods of
// [blockmap.Chunk], which the cache calls before it stores or holds anything.
//
// Fetcher.mu guards the state of all fetches, requests and sources. It is held for
// bookkeeping only, never during I/O. Decisions that need no I/O are in types of their
// own that do no locking: queue, pace, samples, pool.
package fetcher
