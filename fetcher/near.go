package fetcher

import (
	"context"
	"io"
	"slices"
	"time"

	"thaw/blockmap"
)

// Nearby is where a Bound looks for chunks before it asks its origin: the peers of a
// zone. A run of neighbouring chunks, or a piece of a blob, has one owner among them.
type Nearby struct {
	// RunChunks is how many chunks a run has. A request to a peer brings chunks of one run.
	RunChunks int
	// PieceBytes is how many bytes a piece of a blob has.
	PieceBytes int64
	// Route begins an attempt to get a run of a stream, or a piece of a blob. It is called
	// with the number of the run or the piece, and does no I/O.
	Route func(of blockmap.Digest, number uint32) Route
	// Alone, if not nil, reports whether there are no peers at present.
	Alone func() bool
	// Piece, if not nil, is a cache of pieces. It returns n bytes of a blob from off on,
	// and calls fetch unless it has them. owned says that fetch asks the origin at once, so
	// that peers that ask for the piece may wait for it. from names the peer that sent the
	// piece; it is empty if the origin did. The caller does not change p.
	Piece func(ctx context.Context, blob blockmap.Digest, off, n int64, owned bool, fetch FetchPiece) (p []byte, from string, err error)
	// Judged, if not nil, is told whether a piece that Piece has returned turned out to be
	// right, if that is found out. A cache drops one that is wrong.
	Judged func(blob blockmap.Digest, off int64, right bool)
	// Keep, if not nil, keeps a chunk as the registry has it, for peers that take it in that
	// form. It is called once the chunk is verified. The bytes are its own from then on.
	Keep func(stream blockmap.Digest, chunk int, stored []byte)
}

// FetchPiece fetches a piece for the cache of pieces.
type FetchPiece func(ctx context.Context) (p []byte, from string, err error)

// Route is an attempt to get a run or a piece from peers. The fetcher's lock is held while
// its methods are called, except for those that open something, so they do no I/O.
type Route interface {
	// Next returns the peer to ask next, and whether to ask it as an owner. ok is false if
	// the origin is to be asked, which is so after a bounded number of calls.
	Next() (peer string, owner, ok bool)
	// Usable reports whether a peer that Next has returned may still be asked.
	Usable(peer string) bool
	// RegistryFailed says, before the first call of Next, that the origin was asked and has
	// failed.
	RegistryFailed()
	// OpenChunks asks a peer for chunks first to last of the stream. The body has their n
	// bytes uncompressed. It may have methods Source and Distrust. If stored or leaves are
	// not 0, one chunk is asked for, which has that many bytes in the registry. A body with
	// a method Form may then bring it in that form, and leaves of it first: see form.
	OpenChunks(ctx context.Context, peer string, owner bool, first, last int, n, stored int64, leaves blockmap.LeafSet) (io.ReadCloser, error)
	// OpenPiece asks a peer for n bytes of the blob from off on.
	OpenPiece(ctx context.Context, peer string, owner bool, off, n int64) (io.ReadCloser, error)
	// Late reports whether a reader that waits for a peer, which was asked at asked, should
	// have another source asked as well. The answer began at began, and the last of got
	// bytes, of size, came at moved; both are zero before that. MayHedge reports whether
	// that may be done, and counts it if so.
	Late(peer string, asked, began, moved time.Time, got, size int64) bool
	MayHedge(peer string) bool
	// Hedge returns a peer to ask then, and whether to ask it as an owner. ok is false if
	// only the origin is left.
	Hedge() (peer string, owner, ok bool)
	// Sign returns when the peer last said that it will answer; zero if it did not.
	Sign(peer string) time.Time
	// Overtaken says that another source was quicker; Doubt that a piece of a blob from the
	// peer was wrong.
	Overtaken(peer string)
	Doubt(peer string)
}

const (
	// maxPeerRequests bounds the requests to a peer in flight.
	maxPeerRequests = 8
	// maxPeers bounds the peers whose pace is remembered while nothing is asked of them.
	maxPeers = 1024
)

// FromNear is From for an origin with peers nearby that have the same chunks.
//
// A fetch goes to the peer that its route names, and waits for its turn there. It goes to
// the next peer, and at last to the origin, when a peer has failed, refuses or is not
// usable any more. A demand that is late is asked for at the next place as well.
func (f *Fetcher) FromNear(o Origin, n Nearby) *Bound {
	b := f.From(o)
	b.near, b.src.keep = &n, n.Keep
	return b
}

// hasPeers reports whether there are peers to ask at present.
func (b *Bound) hasPeers() bool { return b.near != nil && (b.near.Alone == nil || !b.near.Alone()) }

// isPeer reports whether a source is a peer.
func (s *source) isPeer() bool { return s != nil && s.peer != "" }

// peer finds or makes the source that stands for a peer. All images share it. f.mu is
// held.
func (f *Fetcher) peer(name string, run int, keep keeper) *source {
	s := f.mu.peers[name]
	if s == nil {
		if len(f.mu.peers) >= maxPeers {
			for name, s := range f.mu.peers {
				if !s.listed && len(s.running) == 0 && s.active.requests == 0 {
					delete(f.mu.peers, name)
				}
			}
		}
		s = f.newSource(nil)
		s.peer, s.run, s.keep = name, run, keep
		s.queue.peer = s
		f.mu.peers[name] = s
	}
	return s
}

// where returns the place of the next try.
func (ft *fetch) where() place {
	if ft.peer.src != nil {
		return ft.peer
	}
	return ft.place
}

// choosePeer decides whether a fetch that is being queued goes to a peer, and to which. A
// decision holds until the source that was chosen has failed. f.mu is held.
func (f *Fetcher) choosePeer(ft *fetch) bool {
	if ft.peer.src != nil && ft.route.Usable(ft.peer.src.peer) {
		return true
	}
	ft.peer = place{}
	if ft.near == nil || ft.fromOrigin {
		return false
	}
	if ft.route == nil {
		ft.route = ft.near.Route(ft.stream.ID(), uint32(ft.key.chunk/ft.near.RunChunks))
		if ft.originFailed {
			ft.route.RegistryFailed()
		}
	}
	return f.nextPeer(ft)
}

// nextPeer makes the next peer of its route the place of the next try. If there is none,
// it returns false, and the fetch goes to its origin.
func (f *Fetcher) nextPeer(ft *fetch) bool {
	peer, owner, ok := ft.route.Next()
	if !ok {
		ft.toOrigin()
		return false
	}
	ft.peer, ft.owner = place{f.peer(peer, ft.near.RunChunks, ft.near.Keep), ft.place.table}, owner
	return true
}

// toOrigin makes the next try of a fetch ask its origin.
func (ft *fetch) toOrigin() { ft.peer, ft.fromOrigin = place{}, true }

// passOver queues a fetch for the next place after a request to a peer has failed. There
// is no pause: the next place is another host. All fetches of the request go to the same
// one.
func (f *Fetcher) passOver(r *request, ft *fetch, err error) {
	f.passedOver.Add(1)
	f.log.Debug("a peer did not bring a chunk, so thaw asks the next source", "peer", r.place.src.peer, "stream", ft.stream.ID().String(), "chunk", ft.key.chunk, "err", err)
	switch {
	case ft.near == nil || ft.fromOrigin || ft.route == nil || time.Since(ft.began) >= f.nearMost():
		ft.toOrigin()
	case ft.route != r.route:
		f.nextPeer(ft)
	case !r.passed:
		r.passed = true
		f.nextPeer(ft)
		r.next, r.nextOwner = ft.peer.src, ft.owner
	case r.next == nil:
		ft.toOrigin()
	default:
		ft.peer, ft.owner = place{r.next, ft.place.table}, r.nextOwner
	}
	f.push(ft)
}

// fetchNear asks a peer for fetches of one run.
func (f *Fetcher) fetchNear(r *request, group []*fetch) {
	for len(group) > 0 {
		n := 1
		for n < len(group) && group[n].key.chunk == group[n-1].key.chunk+1 {
			n++
		}
		f.fetchRun(r, group[:n])
		group = group[n:]
	}
}

func (f *Fetcher) fetchRun(r *request, group []*fetch) {
	asked := time.Now()
	body, err := f.openChunks(r, r.route, r.place, r.owner, group)
	f.nearby.requests.Add(1)
	if err != nil {
		f.fail(r, group, err)
		return
	}
	defer body.Close()
	f.answered(r, body, time.Since(asked))
	f.receive(r, body, group)
}

// leavePeers takes a fetch out of the requests to peers, and queues it for its origin. The
// requests go on: the first source that brings the chunk ends the fetch. f.mu is held; the
// caller calls dispatch.
func (f *Fetcher) leavePeers(ft *fetch) {
	switch ft.state {
	case queued:
		if ft.peer.src == nil {
			return
		}
	case running:
		if !onlyPeers(ft) {
			return
		}
		for _, r := range slices.Clone(ft.requests) {
			ft.leave(r)
		}
	default:
		ft.toOrigin()
		return
	}
	ft.toOrigin()
	f.push(ft)
}

// onlyPeers reports whether all requests that bring a fetch are to peers.
func onlyPeers(ft *fetch) bool {
	return !slices.ContainsFunc(ft.requests, func(r *request) bool { return !r.place.src.isPeer() })
}

// checkNear acts on a demand that a peer is to bring and that is late. It reports whether
// it has done anything. f.mu is held.
func (f *Fetcher) checkNear(ft *fetch, now time.Time) bool {
	switch ft.state {
	case queued:
		src := ft.peer.src
		if src == nil || now.Sub(ft.since) < stallAfter {
			return false
		}
		if (src.rates(now).sum >= sharedSpeed || src.lives(now)) && now.Sub(ft.since) < f.nearMost() {
			return false // its turn comes
		}
		f.leavePeers(ft)
		return true
	case running:
		if !onlyPeers(ft) {
			return false
		}
		first := ft.requests[0]
		peer := first.place.src.peer
		if now.Sub(ft.since) >= f.nearMost() && !first.soon(ft) {
			// Whatever peers say, the origin is asked while there is time for it.
			first.route.Overtaken(peer)
			f.leavePeers(ft)
			return true
		}
		late := !slices.ContainsFunc(ft.requests, func(r *request) bool { return !r.late(ft) })
		if late && len(ft.requests) < maxTries && !now.Before(ft.noExtraBefore) {
			f.askElsewhere(ft, false, now)
			return true
		}
		return now.Sub(ft.began) < f.o.RetryFor // what a stalled origin is does not hold for peers
	}
	return false
}

// nearMost is how long a chunk is tried at peers before it is requested from the origin in
// any case.
func (f *Fetcher) nearMost() time.Duration { return f.o.RetryFor / 3 }

// soon reports whether a request brings a fetch within a moment, at its present speed.
func (r *request) soon(ft *fetch) bool {
	rate, known := r.samples.lately()
	return known && rate > 0 && float64(r.left(ft))/rate < watchEvery.Seconds()
}

// late reports whether a request to a peer is late with a fetch.
func (r *request) late(ft *fetch) bool {
	return r.route.Late(r.place.src.peer, r.asked, r.began, r.moved, r.got, r.got+r.left(ft)) && !r.soon(ft)
}

// lives reports whether a peer has sent bytes lately, or a sign that it will answer: one of
// its requests waits for the origin, and those behind it have their turn after that.
func (s *source) lives(now time.Time) bool {
	for r := range s.running {
		if now.Sub(r.moved) < stallAfter || now.Sub(r.route.Sign(s.peer)) < stallAfter {
			return true
		}
	}
	return false
}

// nearWay is the way to ask for a chunk that a peer is late with: another peer, and the
// origin if there is none. The late one may be waiting for the origin, and the chunk would
// come from there twice.
func (f *Fetcher) nearWay(ft *fetch, first *request) way {
	if peer, owner, ok := first.route.Hedge(); ok {
		return way{place: place{f.peer(peer, first.place.src.run, first.place.src.keep), ft.place.table}, route: first.route, owner: owner}
	}
	return way{place: ft.place}
}
