package flatten

import (
	"context"
	"slices"
	"sync"
)

// budget bounds what the layers of a build have at once: turns of a processor, requests
// of the target, bytes. Whoever asks for more than is free waits. The waiter with the
// lowest rank goes first, and of several the one that came first.
type budget struct {
	size int64

	mu struct {
		sync.Mutex
		free    int64
		waiting []*waiter // in the order in which they are served
	}
}

type waiter struct {
	rank    int
	n       int64
	granted chan struct{} // closed when n were taken from free for this waiter
}

func newBudget(size int64) *budget {
	b := &budget{size: size}
	b.mu.free = size
	return b
}

// take waits until n are free, and returns how many it has taken, for give: n, or the
// whole budget if that is less.
func (b *budget) take(ctx context.Context, rank int, n int64) (int64, error) {
	n = min(n, b.size)
	w := &waiter{rank: rank, n: n, granted: make(chan struct{})}
	b.mu.Lock()
	at, _ := slices.BinarySearchFunc(b.mu.waiting, rank, func(w *waiter, rank int) int {
		if w.rank <= rank {
			return -1
		}
		return 1
	})
	b.mu.waiting = slices.Insert(b.mu.waiting, at, w)
	b.grant()
	b.mu.Unlock()
	select {
	case <-w.granted:
		return n, nil
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if at := slices.Index(b.mu.waiting, w); at >= 0 {
		b.mu.waiting = slices.Delete(b.mu.waiting, at, at+1)
	} else {
		b.mu.free += n // it was granted meanwhile
	}
	b.grant()
	return 0, context.Cause(ctx)
}

// give returns what take has taken.
func (b *budget) give(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.free += n
	b.grant()
}

// grant serves waiters as far as the budget reaches. One that asks for much is not
// overtaken: it would wait for as long as others come. b.mu is held.
func (b *budget) grant() {
	for len(b.mu.waiting) > 0 && b.mu.waiting[0].n <= b.mu.free {
		w := b.mu.waiting[0]
		b.mu.waiting = slices.Delete(b.mu.waiting, 0, 1)
		b.mu.free -= w.n
		close(w.granted)
	}
}
