package fetcher

// OccupyDecoders keeps all decoders busy until the channel is closed.
func (f *Fetcher) OccupyDecoders(until <-chan struct{}) {
	for range f.o.Decoders {
		f.decoders.do(nil, func() { <-until })
	}
}

// Queued is how many fetches the queue of a Bound holds.
func (f *Fetcher) Queued(b *Bound) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return b.src.queue.len()
}

// Fetches is how many fetches have not ended.
func (f *Fetcher) Fetches() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.mu.fetches)
}
