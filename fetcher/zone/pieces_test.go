package zone

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"thaw/blockmap"
)

func key(n int64) pieceKey { return pieceKey{"registry.example/a", blockmap.Digest{1}, n * PieceBytes} }

// from is a fetch that brings a piece from a peer, or from the registry.
func from(peer string, b []byte) fetchPiece {
	return func(context.Context) ([]byte, string, error) { return b, peer, nil }
}

// A piece is fetched once however many wait for it, and goes on when one of them leaves.
func TestPieceIsFetchedOnce(t *testing.T) {
	p := newPieces(1 << 20)
	defer p.close()
	gate := make(chan struct{})
	var fetches atomic.Int64
	fetch := func(ctx context.Context) ([]byte, string, error) {
		fetches.Add(1)
		select {
		case <-gate:
			return []byte("piece"), "", nil
		case <-ctx.Done():
			return nil, "", context.Cause(ctx)
		}
	}
	first, leave := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, _, err := p.get(first, key(1), 5, true, fetch)
		left <- err
	}()
	waiters := func() int {
		p.mu.Lock()
		defer p.mu.Unlock()
		if x := p.mu.flights[flightKey{key(1), 5, true}]; x != nil {
			return x.waiters
		}
		return 0
	}
	await(t, "the first waits", func() bool { return waiters() == 1 })
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if b, _, err := p.get(t.Context(), key(1), 5, true, fetch); err != nil || string(b) != "piece" {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
	await(t, "all wait", func() bool { return waiters() == 11 })
	leave()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("who leaves: %v", err)
	}
	close(gate)
	wg.Wait()
	if fetches.Load() != 1 {
		t.Errorf("%d fetches", fetches.Load())
	}
	if b, ok := p.find(key(1), 5); !ok || string(b) != "piece" {
		t.Errorf("%q, %v", b, ok)
	}
	if _, ok := p.find(key(1), 4); ok {
		t.Error("a piece of another length")
	}
	if _, ok := p.find(key(2), 5); ok {
		t.Error("another piece")
	}
}

// Nobody waits: the fetch ends, and the next one begins anew.
func TestAbandonedPiece(t *testing.T) {
	p := newPieces(1 << 20)
	defer p.close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		<-ended
	}()
	began := make(chan struct{})
	go func() { <-began; cancel() }()
	_, _, err := p.get(ctx, key(1), 5, true, func(ctx context.Context) ([]byte, string, error) {
		close(began)
		<-ctx.Done()
		close(ended)
		return nil, "", context.Cause(ctx)
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	<-ended
	if b, _, err := p.get(t.Context(), key(1), 5, true, from("", []byte("piece"))); err != nil || string(b) != "piece" {
		t.Errorf("%q, %v", b, err)
	}
	// A failure is not kept.
	if _, _, err := p.get(t.Context(), key(2), 5, true, func(context.Context) ([]byte, string, error) { return nil, "", errRegistry }); !errors.Is(err, errRegistry) {
		t.Error(err)
	}
	if b, _, err := p.get(t.Context(), key(2), 5, true, from("", []byte("piece"))); err != nil || string(b) != "piece" {
		t.Errorf("%q, %v", b, err)
	}
}

// What a peer has sent is passed on at once, and dropped when it turns out to be wrong. A
// whole blob is verified before. An owner does not wait for a fetch by way of peers.
func TestPiecesOfPeers(t *testing.T) {
	p := newPieces(4 << 20)
	defer p.close()
	k := key(1)
	if b, who, err := p.get(t.Context(), k, 5, false, from("liar", []byte("wrong"))); err != nil || string(b) != "wrong" || who != "liar" {
		t.Fatalf("%q of %q, %v", b, who, err)
	}
	if b, ok := p.find(k, 5); !ok || string(b) != "wrong" {
		t.Error("a piece that has come is not sent to peers")
	}
	p.judge(k, false)
	if _, ok := p.find(k, 5); ok {
		t.Error("a wrong piece is kept")
	}
	if _, ok := p.inFlight(k, 5); ok {
		t.Error("there is something to wait for")
	}
	p.get(t.Context(), k, 5, false, from("friend", []byte("right")))
	p.judge(k, true)
	if b, ok := p.find(k, 5); !ok || string(b) != "right" {
		t.Errorf("%q, %v", b, ok)
	}

	// A blob of one piece, as an index is.
	small := []byte("a small blob")
	k = pieceKey{"registry.example/a", sha256.Sum256(small), 0}
	for _, sent := range []string{"a wrong blob", string(small)} {
		b, _, err := p.get(t.Context(), k, int64(len(small)), false, from("peer", []byte(sent)))
		if err != nil || string(b) != sent {
			t.Errorf("%q, %v", b, err)
		}
		if _, ok := p.find(k, int64(len(small))); ok != (sent == string(small)) {
			t.Errorf("%q is kept: %v", sent, ok)
		}
	}

	// An owner asks the registry beside an own fetch that hangs, and what comes of that
	// later does not replace it.
	k = key(2)
	gate := make(chan struct{})
	own := make(chan struct{})
	go func() {
		defer close(own)
		p.get(t.Context(), k, 5, false, func(ctx context.Context) ([]byte, string, error) {
			<-gate
			return []byte("wrong"), "liar", nil
		})
	}()
	await(t, "the own fetch is under way", func() bool { _, ok := p.inFlight(k, 5); return ok })
	wait, _ := p.inFlight(k, 5)
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if b, err := wait(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%q, %v", b, err)
	}
	if b, _, err := p.get(t.Context(), k, 5, true, from("", []byte("right"))); err != nil || string(b) != "right" {
		t.Errorf("%q, %v", b, err)
	}
	close(gate)
	<-own
	if b, ok := p.find(k, 5); !ok || string(b) != "right" {
		t.Errorf("%q, %v", b, ok)
	}
	if b, err := wait(t.Context()); err != nil || string(b) != "right" {
		t.Errorf("%q, %v", b, err)
	}
}

// The memory is bounded, and what nobody uses goes.
func TestPiecesAreBounded(t *testing.T) {
	p := newPieces(10)
	defer p.close()
	for i := range int64(5) {
		p.get(t.Context(), key(i+1), 4, true, from("", bytes.Repeat([]byte{byte(i)}, 4)))
		p.find(key(1), 4) // is used all the time
	}
	for i, want := range []bool{true, false, false, false, true} {
		if _, ok := p.find(key(int64(i+1)), 4); ok != want {
			t.Errorf("piece %d: %v", i, ok)
		}
	}
	p.expire(time.Now().Add(time.Second))
	if len(p.mu.here) != 0 || p.mu.bytes != 0 || p.mu.recent.Len() != 0 {
		t.Errorf("%d pieces with %d bytes are left", len(p.mu.here), p.mu.bytes)
	}
	p.close()
	if _, _, err := p.get(t.Context(), key(9), 4, true, from("", nil)); !errors.Is(err, blockmap.ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
}
