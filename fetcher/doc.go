// Package fetcher makes chunks resident that are not: each chunk once, however many
// readers wait for it; demanded chunks before prefetched ones; several chunks in one
// request; verified; and retried while there is hope.
//
// One [Fetcher] serves all devices of a process. From binds it to the origin of an
// image's blobs, and returns what a [blockmap.Image] asks for its chunks:
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
//	readahead.go   predicts which chunks the reader demands next, where no trace says so
//	fetch.go       the fetch: who waits for it, and its states from queued to ended
//	duplicates.go  a chunk of the same content is in flight: the fetch waits for that one
//	queue.go       the order of what waits for a source, and what one request brings
//	sources.go     what a source has in flight, and the bounds that sources share
//	pace.go        how much to have in flight to a source, from what its link carries
//	dispatch.go    starts requests: demands first, each source in turn, within the bounds
//	request.go     one request, and which of its chunks are still to come
//	receive.go     asks the origin, reads the chunks, and has each kept as soon as it came
//	link.go        reads demanded bytes first, where they share a link with prefetched ones
//	decoders.go    threads of low priority, for chunks that no reader waits for
//	keep.go        decompresses a chunk, has it verified, stores it or holds it in memory
//	retry.go       ends the fetch: the chunk is resident, is tried again, or is given up
//
// In the meantime:
//
//	watch.go       looks at all requests four times a second, for those that are late
//	rate.go        how fast the bytes of a request came lately
//	hedge.go       asks another server or source for a chunk that is late
//	reclaim.go     takes requests back from a source that hangs while others have no room
//
// # Ahead of readers
//
// [Bound.Replay] fetches a list of chunks (replay.go), and before it a [Bundle]: many
// chunks in one download (bundle.go, download.go). A chunk in a bundle is a fetch like
// any other. A reader that needs it waits for the download if the chunk comes soon by
// it, and else has it fetched by a request. Where the cache has no room for what is
// prefetched, the prefetch ends (refusals.go).
//
// # Rules
//
// A fetch belongs to the Fetcher, not to the reader that asked first. A reader that
// gives up leaves the fetch to the others. A fetch that nobody wants any more is
// cancelled, and with it a request that brings nothing else.
//
// Sources have bounds of their own, so one that hangs or trickles stops no other. A
// fetch may have several places where its chunk can be read, in order: a request goes
// to the first whose source has room, a failed try moves on to the next, and a demand
// that is late is asked of the next as well. A source between this host and the origin,
// such as the peers of a zone, is one more place before the origin's.
//
// Whatever sends a chunk, it is verified in one place: [blockmap.Chunk.Verify], which
// the cache calls before it stores or holds anything.
//
// Fetcher.mu guards the state of all fetches, requests and sources. It is held for
// bookkeeping only, never during I/O. What decides without I/O is in types of its own
// that do no locking: queue, pace, samples, pool.
package fetcher
