package zone

import (
	"maps"
	"sync"
	"sync/atomic"
)

// traffic counts the bytes that have gone to peers. A Router counts those that came.
type traffic struct {
	all    atomic.Int64
	stored atomic.Int64 // of all: sent as the registry has them

	mu    sync.Mutex
	peers map[string]int64
}

// maxCounted bounds the peers that are counted one by one: without TLS, who connects can
// choose a name.
const maxCounted = 16 << 10

// sent adds n bytes that went to a peer. stored says that they are as the registry has them.
func (t *traffic) sent(peer string, n int64, stored bool) {
	t.all.Add(n)
	if stored {
		t.stored.Add(n)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.peers == nil {
		t.peers = make(map[string]int64)
	}
	if _, known := t.peers[peer]; known || len(t.peers) < maxCounted {
		t.peers[peer] += n
	}
}

// byPeer returns the counts.
func (t *traffic) byPeer() map[string]int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.peers)
}
