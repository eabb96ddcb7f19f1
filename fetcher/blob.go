package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"thaw/blockmap"
)

const (
	// piecesAhead is how many pieces of a blob are fetched before a reader needs them:
	// owners that do not have them wait for the registry.
	piecesAhead = 4
	// pieceTries bounds how often the origin is asked for a piece.
	pieceTries = 3
)

// OpenBlob reads a blob of size bytes from byte off to its end: by pieces, each from its
// owner in the zone, and from the origin where no peer has it. Without a zone it is one
// request to the origin. The bytes are not verified.
func (b *Bound) OpenBlob(ctx context.Context, blob blockmap.Digest, size, off int64) (io.ReadCloser, error) {
	if !b.hasPeers() || off >= size {
		return b.src.origin.OpenRange(ctx, blob, off, size-off)
	}
	r := &BlobReader{b: b, blob: blob, size: size, off: off, ask: off - off%b.near.PieceBytes, sent: make(map[int64]string)}
	r.ctx, r.cancel = context.WithCancel(ctx)
	r.fill()
	return r, nil
}

// BlobReader reads a blob by pieces from a zone. It is read by one goroutine; its other
// methods are safe for concurrent use.
type BlobReader struct {
	b      *Bound
	blob   blockmap.Digest
	size   int64
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	off   int64    // of the byte that Read returns next
	ask   int64    // of the piece that is asked for next
	ahead []*piece // asked for, and not read to the end

	mu   sync.Mutex
	sent map[int64]string // who has sent the piece at an offset, of those that were read
}

// piece is a piece of a blob that is being fetched.
type piece struct {
	off  int64
	p    []byte
	from string // the peer that sent it; empty for the origin
	err  error
	done chan struct{}
}

// fill asks for pieces ahead of the reader.
func (r *BlobReader) fill() {
	for len(r.ahead) < piecesAhead && r.ask < r.size {
		p := &piece{off: r.ask, done: make(chan struct{})}
		n := min(r.b.near.PieceBytes, r.size-r.ask)
		r.ask += n
		r.ahead = append(r.ahead, p)
		r.wg.Go(func() {
			defer close(p.done)
			p.p, p.from, p.err = r.b.piece(r.ctx, r.blob, p.off, n)
		})
	}
}

// Read reads as io.Reader does.
func (r *BlobReader) Read(buf []byte) (int, error) {
	if r.off >= r.size {
		return 0, io.EOF
	}
	if len(r.ahead) == 0 {
		return 0, io.ErrClosedPipe
	}
	p := r.ahead[0]
	select {
	case <-p.done:
	case <-r.ctx.Done():
		return 0, context.Cause(r.ctx)
	}
	if p.err != nil {
		return 0, fmt.Errorf("read %d bytes at %d of blob sha256:%.12s…: %w", r.b.near.PieceBytes, p.off, r.blob, p.err)
	}
	r.mu.Lock()
	r.sent[p.off] = p.from
	r.mu.Unlock()
	n := copy(buf, p.p[r.off-p.off:])
	if r.off += int64(n); r.off == p.off+int64(len(p.p)) {
		r.ahead = r.ahead[1:]
		r.fill()
	}
	return n, nil
}

// Close ends the requests that are in flight.
func (r *BlobReader) Close() error {
	r.cancel()
	r.wg.Wait()
	r.ahead = nil
	return nil
}

// pieces returns the offsets of the pieces that have any of n bytes from off on.
func (r *BlobReader) pieces(off, n int64) (offs []int64) {
	size := r.b.near.PieceBytes
	for at := off - off%size; at < off+n; at += size {
		offs = append(offs, at)
	}
	return offs
}

// Verified records that all that was read is right: the caller knows the digest of the
// blob.
func (r *BlobReader) Verified() { r.judgeAll(true) }

// Distrust records that the bytes that were read are not those of the blob: the peers that
// have sent them are not asked again for a long time.
func (r *BlobReader) Distrust() { r.judgeAll(false) }

func (r *BlobReader) judgeAll(right bool) {
	r.mu.Lock()
	var offs []int64
	for at := range r.sent {
		offs = append(offs, at)
	}
	r.mu.Unlock()
	for _, at := range offs {
		r.judge(at, right)
	}
}

// judge records whether the piece at an offset is right.
func (r *BlobReader) judge(at int64, right bool) {
	r.mu.Lock()
	from := r.sent[at]
	r.mu.Unlock()
	if near := r.b.near; near.Judged != nil {
		near.Judged(r.blob, at, right)
	}
	if !right && from != "" {
		r.b.f.log.Warn("a peer has sent wrong bytes; thaw does not ask it for now", "peer", from, "blob", r.blob.String())
		r.b.near.Route(r.blob, uint32(at/r.b.near.PieceBytes)).Doubt(from)
	}
}

// recheck reads bytes that turned out to be wrong, p at off, from the origin, and returns
// what that has. Pieces whose part of p is something else are dropped, and the peers that
// have sent them doubted. If there is none, whoever made the blob is at fault.
func (r *BlobReader) recheck(ctx context.Context, off int64, p []byte) (right []byte, err error) {
	right, err = r.b.readOrigin(ctx, r.blob, off, int64(len(p)))
	if err != nil {
		return nil, err
	}
	for _, at := range r.pieces(off, int64(len(p))) {
		from, to := max(at, off)-off, min(at+r.b.near.PieceBytes, off+int64(len(p)))-off
		if !slices.Equal(p[from:to], right[from:to]) {
			r.judge(at, false)
		}
	}
	return right, nil
}

// piece returns a piece of a blob, from the cache of pieces if there is one.
func (b *Bound) piece(ctx context.Context, blob blockmap.Digest, off, n int64) (p []byte, from string, err error) {
	route := b.near.Route(blob, uint32(off/b.near.PieceBytes))
	var first hop
	first.peer, first.owner, first.ok = route.Next()
	fetch := func(ctx context.Context) ([]byte, string, error) {
		return b.fetchPiece(ctx, route, first, blob, off, n)
	}
	if b.near.Piece == nil {
		return fetch(ctx)
	}
	p, from, err = b.near.Piece(ctx, blob, off, n, !first.ok, fetch)
	if err == nil && int64(len(p)) != n {
		err = io.ErrUnexpectedEOF
	}
	return p, from, err
}

// hop is what Route.Next returns.
type hop struct {
	peer      string
	owner, ok bool
}

// asking is a request for a piece.
type asking struct {
	hop
	asked time.Time
	began atomic.Int64 // when the answer began, and the last bytes came, in nanoseconds; 0 before that
	moved atomic.Int64
	got   atomic.Int64
	p     []byte
	err   error
}

// late reports whether the request is late.
func (x *asking) late(route Route, n int64) bool {
	at := func(ns int64) time.Time {
		if ns == 0 {
			return time.Time{}
		}
		return time.Unix(0, ns)
	}
	return x.ok && route.Late(x.peer, x.asked, at(x.began.Load()), at(x.moved.Load()), x.got.Load(), n)
}

// fetchPiece fetches a piece from the first source that brings it: the peers of its route,
// one after the other, and the origin. The next one is asked when one fails. When one is
// late, another peer that may have the piece is asked as well, or the origin, if that is
// within the budget of extra requests.
func (b *Bound) fetchPiece(ctx context.Context, route Route, x hop, blob blockmap.Digest, off, n int64) ([]byte, string, error) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	answers := make(chan *asking)
	var running []*asking
	ask := func(h hop) {
		x := &asking{hop: h, asked: time.Now()}
		running = append(running, x)
		wg.Go(func() {
			if x.ok {
				x.err = b.pieceFromPeer(ctx, route, x, off, n)
			} else {
				x.p, x.err = b.retryOrigin(ctx, blob, off, n)
			}
			select {
			case answers <- x:
			case <-ctx.Done():
			}
		})
	}
	ask(x)
	check := time.NewTicker(watchEvery)
	defer check.Stop()
	for {
		select {
		case x := <-answers:
			running = slices.DeleteFunc(running, func(y *asking) bool { return x == y })
			if x.err == nil {
				for _, y := range running {
					if y.ok && y.late(route, n) {
						route.Overtaken(y.peer)
					}
				}
				return x.p, x.peer, nil
			}
			if x.ok {
				b.f.passedOver.Add(1)
				b.f.log.Debug("a peer did not bring a piece of a blob, so thaw asks the next source", "peer", x.peer, "err", x.err)
			}
			if len(running) > 0 {
				continue
			}
			if !x.ok {
				return nil, "", x.err
			}
			var next hop
			next.peer, next.owner, next.ok = route.Next()
			ask(next)
		case <-check.C:
			last := running[len(running)-1]
			late := !slices.ContainsFunc(running, func(x *asking) bool { return !x.late(route, n) })
			if late && len(running) < maxTries && route.MayHedge(last.peer) {
				var beside hop
				beside.peer, beside.owner, beside.ok = route.Hedge()
				ask(beside)
			}
		case <-ctx.Done():
			return nil, "", context.Cause(ctx)
		}
	}
}

// pieceFromPeer asks a peer for n bytes of the blob from off on.
func (b *Bound) pieceFromPeer(ctx context.Context, route Route, x *asking, off, n int64) (err error) {
	b.f.nearby.requests.Add(1)
	body, err := route.OpenPiece(ctx, x.peer, x.owner, off, n)
	if err != nil {
		return err
	}
	x.began.Store(time.Now().UnixNano())
	x.moved.Store(x.began.Load())
	x.p, err = readPiece(&pieceBody{body, x}, n, &b.f.nearby)
	return err
}

// pieceBody is the body of a piece that is being read.
type pieceBody struct {
	io.ReadCloser
	of *asking
}

func (b *pieceBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.of.got.Add(int64(n))
	b.of.moved.Store(time.Now().UnixNano())
	return n, err
}

// readPiece reads n bytes of a body and closes it.
func readPiece(body io.ReadCloser, n int64, counts *counts) ([]byte, error) {
	defer body.Close()
	p := make([]byte, n)
	got, err := io.ReadFull(body, p)
	counts.bytes.Add(int64(got))
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return p, err
}

// retryOrigin is readOrigin with a few tries.
func (b *Bound) retryOrigin(ctx context.Context, blob blockmap.Digest, off, n int64) ([]byte, error) {
	for try := 0; ; try++ {
		p, err := b.readOrigin(ctx, blob, off, n)
		if err == nil || ctx.Err() != nil || try == pieceTries-1 || b.f.o.Temporary != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !b.f.o.Temporary(err) {
			return p, err
		}
		b.f.retries.Add(1)
		t := time.NewTimer(b.f.heed(err, b.f.o.Backoff<<try))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, context.Cause(ctx)
		}
	}
}

// readOrigin reads n bytes of a blob from the origin.
func (b *Bound) readOrigin(ctx context.Context, blob blockmap.Digest, off, n int64) ([]byte, error) {
	b.f.origins.requests.Add(1)
	body, err := b.src.origin.OpenRange(ctx, blob, off, n)
	if err != nil {
		return nil, err
	}
	return readPiece(body, n, &b.f.origins)
}
