package blockmap

import (
	"bytes"
	"slices"
	"sync"
	"sync/atomic"
)

// held are chunks in memory: a reader waits for them, and the disk has no room
// for them. The first to come is the first to go. Views point at the memory
// itself, which stays as long as they do.
type held struct {
	limit int64
	n     atomic.Int64 // chunks: without any, no reader takes the lock
	mu    struct {
		sync.Mutex
		chunks map[chunkRef][]byte
		order  []chunkRef // the keys of chunks, in the order in which they came
		bytes  int64
	}
}

// DefaultMemory bounds the bytes that a cache holds in memory while the disk has
// no room.
const DefaultMemory = 64 << 20

func (h *held) any() bool { return h.n.Load() > 0 }

func (h *held) has(x chunkRef) bool { return h.any() && h.get(x) != nil }

func (h *held) get(x chunkRef) []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mu.chunks[x]
}

// put keeps a copy of p.
func (h *held) put(x chunkRef, p []byte) {
	p = bytes.Clone(p)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mu.chunks == nil {
		h.mu.chunks = make(map[chunkRef][]byte)
	}
	if h.mu.chunks[x] != nil {
		return
	}
	h.mu.chunks[x] = p
	h.mu.order = append(h.mu.order, x)
	h.mu.bytes += int64(len(p))
	h.n.Store(int64(len(h.mu.chunks)))
	for h.mu.bytes > h.limit && len(h.mu.order) > 1 {
		first := h.mu.order[0]
		h.remove(func(y chunkRef) bool { return y == first })
	}
}

// drop lets go of a chunk.
func (h *held) drop(x chunkRef) {
	if !h.any() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mu.chunks[x] != nil {
		h.remove(func(y chunkRef) bool { return y == x })
	}
}

// dropAll lets go of all chunks of a stream.
func (h *held) dropAll(s *Stream) {
	if !h.any() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.remove(func(x chunkRef) bool { return x.stream == s })
}

// remove lets go of the chunks that goes selects. h.mu is held.
func (h *held) remove(goes func(chunkRef) bool) {
	h.mu.order = slices.DeleteFunc(h.mu.order, func(x chunkRef) bool {
		if !goes(x) {
			return false
		}
		h.mu.bytes -= int64(len(h.mu.chunks[x]))
		delete(h.mu.chunks, x)
		return true
	})
	h.n.Store(int64(len(h.mu.chunks)))
}

// store puts the chunks on disk, until one does not fit.
func (h *held) store() {
	if !h.any() {
		return
	}
	h.mu.Lock()
	order := slices.Clone(h.mu.order)
	h.mu.Unlock()
	for _, x := range order {
		if p := h.get(x); p != nil && x.stream.Fill(x.chunk, p) != nil {
			return
		}
	}
}

// size is the number of bytes in memory.
func (h *held) size() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mu.bytes
}
