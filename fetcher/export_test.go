package fetcher

// OccupyDecoders keeps all of them busy until the channel is closed.
func (f *Fetcher) OccupyDecoders(until <-chan struct{}) {
	for range f.o.Decoders {
		f.decoders.do(nil, func() { <-until })
	}
}
