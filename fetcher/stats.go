package fetcher

// Stats counts what a Fetcher has done so far.
type Stats struct {
	Requests  int64 `json:"requests"`           // made to origins
	Bytes     int64 `json:"fetched_bytes"`      // received from origins
	Chunks    int64 `json:"fetched_chunks"`     // brought from origins
	Local     int64 `json:"local_chunks"`       // chunks that another stream held already
	Retries   int64 `json:"retries"`            // tries after a first one
	Wrong     int64 `json:"wrong_chunks"`       // chunks that came and did not match their digest
	Failed    int64 `json:"failed_chunks"`      // chunks given up
	Held      int64 `json:"held_chunks"`        // chunks kept in memory, since the cache could not keep them
	Dropped   int64 `json:"dropped_hints"`      // chunks not prefetched, since too many were being
	Extra     int64 `json:"extra_requests"`     // made since another brought its chunk too late
	Overtaken int64 `json:"overtaken_requests"` // requests that an extra one was quicker than
	Cancelled int64 `json:"cancelled_fetches"`  // chunks and requests that nobody waited for any more
	InFlight  int64 `json:"in_flight"`          // requests now
	MostAlive int64 `json:"most_in_flight"`     // the most requests that were in flight at once
}

// Stats returns the counts so far.
func (f *Fetcher) Stats() Stats {
	f.mu.Lock()
	n := f.mu.pool.taken.requests + f.mu.extraPool.taken.requests
	f.mu.Unlock()
	return Stats{
		Requests: f.requests.Load(), Bytes: f.bytes.Load(), Chunks: f.chunks.Load(), Local: f.local.Load(),
		Retries: f.retries.Load(), Wrong: f.wrong.Load(), Failed: f.failed.Load(),
		Held: f.held.Load(), Dropped: f.dropped.Load(),
		Extra: f.extra.Load(), Overtaken: f.overtaken.Load(), Cancelled: f.cancelled.Load(),
		InFlight: int64(n), MostAlive: f.maxInFlight.Load(),
	}
}
