package zone

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"thaw/blockmap"
)

// Peers finds out whom to ask for a run, and asks: a Router and a Client together. It is
// the side of a zone that a host's fetcher sees.
type Peers struct {
	router *Router
	client *Client
}

// NewPeers makes Peers. The caller closes the client.
func NewPeers(r *Router, c *Client) *Peers { return &Peers{r, c} }

// Alone reports whether the zone has no members but this host.
func (p *Peers) Alone() bool {
	ring := p.router.Ring()
	return ring.Len() == 0 || ring.Len() == 1 && ring.Has(p.router.self)
}

// Route is one attempt to get a run from peers. It is safe for concurrent use.
type Route struct {
	peers   *Peers
	image   string
	run     Run
	attempt Attempt // guarded by the Router

	mu   sync.Mutex
	sign map[string]time.Time // when peers have given their last signs of life
}

// Route begins an attempt to get a run of a stream or of a blob that an image has. image
// is HOST/REPO@DIGEST of the image's manifest: who knows that may read it.
func (p *Peers) Route(image string, of blockmap.Digest, number uint32) *Route {
	return &Route{peers: p, image: image, run: Run{of, number}}
}

// Next returns the peer to ask next, and whether to ask it as an owner of the run. ok is
// false if the registry is to be asked.
func (r *Route) Next() (peer string, owner, ok bool) {
	hop, ok := r.peers.router.Next(r.run, &r.attempt, time.Now())
	return hop.Peer, hop.Owner, ok
}

// RegistryFailed makes Next return peers even for runs that this host owns. The caller
// calls it before it calls Next.
func (r *Route) RegistryFailed() { r.attempt.RegistryFailed = true }

// Usable reports whether a peer may still be asked.
func (r *Route) Usable(peer string) bool { return r.peers.router.Usable(peer, time.Now()) }

// Hedge returns a peer to ask beside those that are late, and whether to ask it as an
// owner. ok is false if only the registry is left.
func (r *Route) Hedge() (peer string, owner, ok bool) {
	hop, ok := r.peers.router.Hedge(r.run, &r.attempt, time.Now())
	return hop.Peer, hop.Owner, ok
}

// Late reports whether a reader that waits for a request to a peer should have another
// source asked as well. The answer began at began, and the last of got bytes, of size, came
// at moved; both are zero before that.
func (r *Route) Late(peer string, asked, began, moved time.Time, got, size int64) bool {
	return r.peers.router.Late(peer, Progress{Asked: asked, Began: began, Moved: later(moved, r.Sign(peer)), Got: got, Size: size}, time.Now())
}

// Sign returns when a peer gave its last sign of life while it was waited for; zero if it
// gave none.
func (r *Route) Sign(peer string) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sign[peer]
}

// signs has the Router judge the signs of life of a request.
func (r *Route) signs(ctx context.Context, peer string) context.Context {
	router := r.peers.router
	note := func() (now time.Time) {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.sign == nil {
			r.sign = make(map[string]time.Time)
		}
		now = time.Now()
		r.sign[peer] = now
		return now
	}
	return withSigns(ctx, &signs{
		patience: func(asked time.Time) time.Duration { return router.Patience(peer, asked, time.Now()) },
		pause:    router.SignPause,
		first:    func(after time.Duration) { router.Signed(peer, after, note()) },
		next:     func() { note() },
		revived:  func(after time.Duration) { router.Revived(peer, after, time.Now()) },
	})
}

// MayHedge reports whether an extra request may be made because this peer is late, and
// counts it if so.
func (r *Route) MayHedge(peer string) bool { return r.peers.router.MayPass(peer, time.Now()) }

// Overtaken records that another source was quicker than a peer.
func (r *Route) Overtaken(peer string) { r.peers.router.Overtaken(peer, time.Now()) }

// Doubt records that a peer has sent wrong bytes of a blob, which it could not verify.
func (r *Route) Doubt(peer string) { r.peers.router.Doubt(peer, time.Now()) }

// OpenChunks asks a peer for chunks first to last, which have n bytes in all. The body has
// their contents, uncompressed, and has methods Source and Distrust as those of a registry
// have.
//
// If one chunk is asked for, stored is how many bytes it has in the registry; 0 says that it
// is not wanted in that form. leaves are neighbouring leaves of it that are wanted first.
// The method Form of the body says what has come of that: see [Body.Form].
func (r *Route) OpenChunks(ctx context.Context, peer string, owner bool, first, last int, n, stored int64, leaves blockmap.LeafSet) (io.ReadCloser, error) {
	ctx = r.signs(ctx, peer)
	return r.open(peer, func() (*Body, error) {
		return r.peers.client.Chunks(ctx, peer, r.image, ChunksAsk{r.run.Of, first, last, n, stored, leaves}, owner)
	})
}

// OpenPiece asks a peer for n bytes of the blob from off on.
func (r *Route) OpenPiece(ctx context.Context, peer string, owner bool, off, n int64) (io.ReadCloser, error) {
	ctx = r.signs(ctx, peer)
	return r.open(peer, func() (*Body, error) {
		return r.peers.client.Piece(ctx, peer, r.image, r.run.Of, off, n, owner)
	})
}

// open makes a request, and tells the Router how it begins and ends.
func (r *Route) open(peer string, ask func() (*Body, error)) (io.ReadCloser, error) {
	router := r.peers.router
	router.Began(peer, time.Now())
	ended := func(o Outcome) { router.Ended(r.run, &r.attempt, peer, o, time.Now()) }
	body, err := ask()
	if err != nil {
		var failed *PeerError
		if errors.As(err, &failed) {
			ended(failed.Outcome)
		} else {
			ended(Outcome{Result: Broken})
		}
		return nil, err
	}
	body.ended = ended
	body.wrong = func() { router.Distrust(peer, time.Now()) }
	return body, nil
}
