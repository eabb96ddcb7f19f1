package zone

import (
	"container/list"
	"context"
	"crypto/sha256"
	"sync"
	"time"

	"thaw/blockmap"
)

// pieces are pieces of blobs in memory: for peers that ask for them soon after each other,
// and for this host. The least recently used ones go first. A piece that is being fetched
// is fetched once, however many wait for it.
//
// A piece cannot be verified by itself, unless it is a whole blob: only the frames in it
// can, when this host has the head of the bundle, and those that reach into the next piece
// when that has come. Members pass pieces on before that. If they did not, they would wait
// for each other: one has the first piece and waits for the second one, which another has,
// that waits for the first. So wrong bytes are not always the fault of who sends them, and
// a member is excused a few of them, see Router.Doubt. Who has found out that a piece is
// wrong drops it.
type pieces struct {
	most  int64         // bytes to keep
	slots chan struct{} // one for each fetch from the registry
	ctx   context.Context
	stop  context.CancelFunc
	wg    sync.WaitGroup

	mu struct {
		sync.Mutex
		here    map[pieceKey]*piece
		recent  list.List // of these; the next to go is last
		bytes   int64
		flights map[flightKey]*flight
	}
}

// pieceKey names a piece. The same blob in two repositories has two: whoever may read one
// repository may not read the other.
type pieceKey struct {
	repository string
	blob       blockmap.Digest
	off        int64
}

// piece is a piece that is here. Nobody changes its bytes.
type piece struct {
	key   pieceKey
	bytes []byte
	from  string // the peer that sent it; empty: the registry did
	right bool   // the registry has sent it, or it has been verified
	place *list.Element
	used  time.Time // last
}

// flightKey names a fetch of n bytes: from the registry, for peers, or by way of peers, for
// this host. The former never waits for the latter, which may wait for the very peer that
// asks.
type flightKey struct {
	pieceKey
	n      int64
	origin bool
}

// flight is a piece that is being fetched.
type flight struct {
	done    chan struct{} // closed when the rest is final
	bytes   []byte
	from    string
	err     error
	waiters int
	cancel  context.CancelFunc
}

// fetchPiece brings a piece, and says which peer has sent it; empty: the registry did.
type fetchPiece func(context.Context) (b []byte, from string, err error)

const (
	// pieceMemory is how many bytes of pieces a member keeps.
	pieceMemory = 64 << 20
	// pieceFetches is how many pieces a member fetches from the registry at once.
	pieceFetches = 32
	// pieceTime bounds the fetch of a piece.
	pieceTime = 30 * time.Second
	// pieceIdle is how long a piece is kept that nobody uses.
	pieceIdle = 2 * time.Minute
)

func newPieces(most int64) *pieces {
	p := &pieces{most: most, slots: make(chan struct{}, pieceFetches)}
	p.ctx, p.stop = context.WithCancel(context.Background())
	p.mu.here = make(map[pieceKey]*piece)
	p.mu.flights = make(map[flightKey]*flight)
	return p
}

// close ends all fetches.
func (p *pieces) close() {
	p.mu.Lock()
	p.stop() // no fetch begins from here on
	p.mu.Unlock()
	p.wg.Wait()
}

// find returns n bytes that are here.
func (p *pieces) find(k pieceKey, n int64) (b []byte, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if x := p.use(k, n); x != nil {
		return x.bytes, true
	}
	return nil, false
}

// use returns a piece that is here, and notes that it is used. p.mu is held.
func (p *pieces) use(k pieceKey, n int64) *piece {
	x := p.mu.here[k]
	if x == nil || int64(len(x.bytes)) != n {
		return nil
	}
	x.used = time.Now()
	p.mu.recent.MoveToFront(x.place)
	return x
}

// inFlight reports whether this host is fetching a piece. wait waits for it.
func (p *pieces) inFlight(k pieceKey, n int64) (wait func(context.Context) ([]byte, error), ok bool) {
	if p.pending(k, n) == nil {
		return nil, false
	}
	return func(ctx context.Context) ([]byte, error) {
		for {
			if b, ok := p.find(k, n); ok {
				return b, nil
			}
			pending := p.pending(k, n)
			if pending == nil {
				return nil, ErrAbsent
			}
			select {
			case <-pending:
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
	}, true
}

// pending returns what is closed when a fetch of a piece has ended; nil if there is none.
func (p *pieces) pending(k pieceKey, n int64) chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, origin := range []bool{true, false} {
		if x := p.mu.flights[flightKey{k, n, origin}]; x != nil {
			return x.done
		}
	}
	return nil
}

// get returns n bytes, which fetch brings if they are not here. origin says that fetch asks
// the registry and nobody else, for a peer. The fetch outlives ctx while others wait for it.
func (p *pieces) get(ctx context.Context, k pieceKey, n int64, origin bool, fetch fetchPiece) (b []byte, from string, err error) {
	p.mu.Lock()
	if x := p.use(k, n); x != nil {
		p.mu.Unlock()
		return x.bytes, x.from, nil
	}
	if p.ctx.Err() != nil {
		p.mu.Unlock()
		return nil, "", blockmap.ErrClosed
	}
	fk := flightKey{k, n, origin}
	x := p.mu.flights[fk]
	if x == nil {
		x = &flight{done: make(chan struct{})}
		var flying context.Context
		flying, x.cancel = context.WithTimeout(p.ctx, pieceTime)
		p.mu.flights[fk] = x
		p.wg.Go(func() { p.fetch(flying, fk, x, fetch) })
	}
	x.waiters++
	p.mu.Unlock()
	select {
	case <-x.done:
		return x.bytes, x.from, x.err
	case <-ctx.Done():
		p.mu.Lock()
		defer p.mu.Unlock()
		if x.waiters--; x.waiters == 0 {
			x.cancel()
			if p.mu.flights[fk] == x {
				delete(p.mu.flights, fk) // the next one begins anew
			}
		}
		return nil, "", context.Cause(ctx)
	}
}

func (p *pieces) fetch(ctx context.Context, k flightKey, x *flight, fetch fetchPiece) {
	defer x.cancel()
	var b []byte
	var from string
	var err error
	if k.origin {
		// What this host fetches for itself is bounded by itself, and may wait for another
		// member, which must not wait for a slot here.
		select {
		case p.slots <- struct{}{}:
			defer func() { <-p.slots }()
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	if err == nil {
		b, from, err = fetch(ctx)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	x.bytes, x.from, x.err = b, from, err
	close(x.done)
	if p.mu.flights[k] != x {
		return // nobody waits for it any more
	}
	delete(p.mu.flights, k)
	if err == nil && int64(len(b)) == k.n && mayBe(k.blob, k.off, b) {
		p.keep(k.pieceKey, b, from)
	}
}

// mayBe reports whether the bytes at off of a blob may be these. If they are the whole blob,
// its digest says so.
func mayBe(blob blockmap.Digest, off int64, b []byte) bool {
	return off > 0 || len(b) >= PieceBytes || blockmap.Digest(sha256.Sum256(b)) == blob
}

// keep keeps a piece that has come. What a peer has sent does not replace what is right.
// p.mu is held.
func (p *pieces) keep(k pieceKey, b []byte, from string) {
	if old := p.mu.here[k]; old != nil {
		if old.right && len(old.bytes) == len(b) || from != "" && old.right {
			return
		}
		p.remove(old)
	}
	x := &piece{key: k, bytes: b, from: from, right: from == "", used: time.Now()}
	p.mu.here[k] = x
	x.place = p.mu.recent.PushFront(x)
	p.mu.bytes += int64(len(b))
	for p.mu.bytes > p.most && p.mu.recent.Len() > 1 {
		p.remove(p.mu.recent.Back().Value.(*piece))
	}
}

// judge says whether what is in a piece has been verified. A wrong piece is dropped.
func (p *pieces) judge(k pieceKey, right bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	x := p.mu.here[k]
	switch {
	case x == nil:
	case !right:
		p.remove(x)
	default:
		x.right = true
	}
}

// expire drops the pieces that nobody has used since a time.
func (p *pieces) expire(since time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for e := p.mu.recent.Back(); e != nil && e.Value.(*piece).used.Before(since); e = p.mu.recent.Back() {
		p.remove(e.Value.(*piece))
	}
}

// remove drops a piece that is here. p.mu is held.
func (p *pieces) remove(x *piece) {
	p.mu.recent.Remove(x.place)
	delete(p.mu.here, x.key)
	p.mu.bytes -= int64(len(x.bytes))
}
