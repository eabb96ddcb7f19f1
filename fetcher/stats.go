package fetcher

import "sync/atomic"

// counts are what sources of one kind have brought.
type counts struct{ requests, bytes, chunks atomic.Int64 }

// counts returns the counts of the kind that a source is of.
func (f *Fetcher) counts(s *source) *counts {
	if s.isPeer() {
		return &f.nearby
	}
	return &f.origins
}

// Stats are the counts of a Fetcher.
type Stats struct {
	Requests     int64 `json:"requests"`           // to origins
	Bytes        int64 `json:"fetched_bytes"`      // received from origins, compressed
	Chunks       int64 `json:"fetched_chunks"`     // received from origins by requests and stored
	Leaves       int64 `json:"fetched_leaves"`     // received from origins by bundle downloads and stored
	ZoneRequests int64 `json:"zone_requests"`      // to peers
	ZoneBytes    int64 `json:"zone_bytes"`         // received from peers
	ZoneStored   int64 `json:"zone_stored_bytes"`  // the part of ZoneBytes that is chunks as the registry has them, compressed
	ZoneChunks   int64 `json:"zone_chunks"`        // received from peers by requests and stored
	PassedOver   int64 `json:"zone_passed_over"`   // chunks that a peer did not bring, so that the next source was asked
	Local        int64 `json:"local_chunks"`       // chunks, and parts of bundles, copied from another stream of the cache
	Retries      int64 `json:"retries"`            // tries after the first one of a chunk or bundle
	Wrong        int64 `json:"wrong_chunks"`       // chunks received that did not match their digest
	Failed       int64 `json:"failed_chunks"`      // chunks given up
	Held         int64 `json:"held_chunks"`        // chunks held in memory, because the cache could not store them
	Dropped      int64 `json:"dropped_hints"`      // hints dropped, because too many chunks were being prefetched
	Extra        int64 `json:"extra_requests"`     // made because another request was late
	Overtaken    int64 `json:"overtaken_requests"` // requests whose chunk an extra request brought first
	Cancelled    int64 `json:"cancelled_fetches"`  // fetches and requests cancelled because no reader or prefetch wanted them any more
	InFlight     int64 `json:"in_flight"`          // requests at present
	MostInFlight int64 `json:"most_in_flight"`     // the largest number of requests that were in flight at once
}

// Stats returns the current counts.
func (f *Fetcher) Stats() Stats {
	f.mu.Lock()
	n := f.mu.pool.taken.requests + f.mu.extraPool.taken.requests
	f.mu.Unlock()
	return Stats{
		Requests: f.origins.requests.Load(), Bytes: f.origins.bytes.Load(), Chunks: f.origins.chunks.Load(),
		ZoneRequests: f.nearby.requests.Load(), ZoneBytes: f.nearby.bytes.Load(), ZoneStored: f.nearStored.Load(), ZoneChunks: f.nearby.chunks.Load(),
		PassedOver: f.passedOver.Load(), Leaves: f.leaves.Load(), Local: f.local.Load(),
		Retries: f.retries.Load(), Wrong: f.wrong.Load(), Failed: f.failed.Load(),
		Held: f.held.Load(), Dropped: f.dropped.Load(),
		Extra: f.extra.Load(), Overtaken: f.overtaken.Load(), Cancelled: f.cancelled.Load(),
		InFlight: int64(n), MostInFlight: f.maxInFlight.Load(),
	}
}
