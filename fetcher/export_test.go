package fetcher

// OccupyDecoders keeps all of them busy until the channel is closed.
func (f *Fetcher) OccupyDecoders(until <-chan struct{}) {
	for range f.o.Decoders {
		f.decoders.do(nil, func() { <-until })
	}
}

// Queued is how long the queues of a Bound are.
func (f *Fetcher) Queued(b *Bound) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return b.src.queue.len()
}

// Fetches is how many chunks are on their way.
func (f *Fetcher) Fetches() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.mu.fetches)
}
