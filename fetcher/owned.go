package fetcher

import (
	"context"

	"thaw/blockmap"
)

// FetchOwned is Fetch on behalf of a peer that asks this host as the owner of the chunks:
// it fetches them from the origin and from no other peer. If a peer is being asked for one
// of them already, the origin is asked beside that. So no two hosts ever wait for each
// other, even if they disagree about who the owner is.
func (b *Bound) FetchOwned(ctx context.Context, wants []blockmap.Want) error {
	return b.awaitAll(ctx, wants, b.join(wants, nil, owner))
}

// own makes a fetch ask its origin only, from now on. f.mu is held; the caller calls
// dispatch.
func (f *Fetcher) own(ft *fetch) {
	ft.near = nil
	switch ft.state {
	case duplicate:
		f.own(ft.original)
	case downloading:
		// The download may be waiting for a peer.
		ft.toOrigin()
		f.enqueue(ft)
		if ft.state == duplicate {
			f.own(ft.original)
		}
	default:
		f.leavePeers(ft)
	}
}

// InFlight returns a function that waits for the fetches of chunks first to last of a
// stream that are in flight. ok is false if some of the chunks are neither resident nor in
// flight. It asks for nothing, and keeps no fetch from being cancelled. wait returns the
// first error of a fetch, or the cause of the end of its context.
func (f *Fetcher) InFlight(s *blockmap.Stream, first, last int) (wait func(context.Context) error, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var fetches []*fetch
	for i := first; i <= last; i++ {
		if ft := f.mu.fetches[key{s, i}]; ft != nil {
			fetches = append(fetches, ft)
		} else if !s.Has(i) {
			return nil, false
		}
	}
	return func(ctx context.Context) error {
		for _, ft := range fetches {
			select {
			case <-ft.done:
				if ft.err != nil {
					return ft.err
				}
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	}, true
}
