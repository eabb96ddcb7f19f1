package blockmap

import (
	"bytes"
	"slices"
	"sync"
	"sync/atomic"
)

// held are chunks in memory that somebody waits for and the disk has no room for.
// The first to come is the first to go. Views point at the memory itself, which
// stays as long as they do.
type held struct {
	limit int64
	n     atomic.Int64 // chunks, so that nobody takes the lock for none
	mu    struct {
		sync.Mutex
		chunks map[holder][]byte
		order  []holder // may name chunks that have gone
		bytes  int64
	}
}

// DefaultMemory is how much a cache holds in memory where the disk has no room.
const DefaultMemory = 64 << 20

func (h *held) any() bool { return h.n.Load() > 0 }

func (h *held) has(x holder) bool { return h.any() && h.get(x) != nil }

func (h *held) get(x holder) []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mu.chunks[x]
}

// put keeps a copy of p.
func (h *held) put(x holder, p []byte) {
	p = bytes.Clone(p)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mu.chunks == nil {
		h.mu.chunks = make(map[holder][]byte)
	}
	if h.mu.chunks[x] != nil {
		return
	}
	h.mu.chunks[x] = p
	h.mu.order = append(h.mu.order, x)
	h.mu.bytes += int64(len(p))
	for h.mu.bytes > h.limit && len(h.mu.order) > 1 {
		h.remove(h.mu.order[0])
		h.mu.order = h.mu.order[1:]
	}
	h.n.Store(int64(len(h.mu.chunks)))
}

func (h *held) drop(x holder) {
	if !h.any() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.remove(x)
	h.n.Store(int64(len(h.mu.chunks)))
	if len(h.mu.chunks) == 0 {
		h.mu.order = nil
	}
}

// remove is drop with h.mu held.
func (h *held) remove(x holder) {
	h.mu.bytes -= int64(len(h.mu.chunks[x]))
	delete(h.mu.chunks, x)
}

// dropAll lets go of what is held of a stream.
func (h *held) dropAll(s *Stream) {
	if !h.any() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for x := range h.mu.chunks {
		if x.stream == s {
			h.remove(x)
		}
	}
	h.n.Store(int64(len(h.mu.chunks)))
}

// storeHeld puts what is held on the disk, if that has room again.
func (c *Cache) storeHeld() {
	if !c.held.any() {
		return
	}
	c.held.mu.Lock()
	order := slices.Clone(c.held.mu.order)
	c.held.mu.Unlock()
	for _, x := range order {
		if p := c.held.get(x); p != nil && x.stream.Fill(x.chunk, p) != nil {
			return
		}
	}
}

func (h *held) size() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mu.bytes
}
