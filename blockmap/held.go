package blockmap

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
)

// held are leaves in memory: a reader waits for them, and the disk has no room for them or
// cannot read them back.
// They are kept by chunk, and the first chunk to come is the first to go. Views point at
// the memory itself, which stays as long as they do.
type held struct {
	limit int64
	n     atomic.Int64 // chunks: without any, no reader takes the lock
	mu    struct {
		sync.Mutex
		chunks map[chunkRef]*heldChunk
		order  []chunkRef // the keys of chunks, in the order in which they came
		bytes  int64
	}
}

// heldChunk has room for all of a chunk, and the content of some leaves.
type heldChunk struct {
	content []byte
	leaves  LeafSet
}

// DefaultMemory bounds the bytes that a cache holds in memory while the disk has
// no room.
const DefaultMemory = 64 << 20

func (h *held) any() bool { return h.n.Load() > 0 }

// has says whether all of leaves are in memory.
func (h *held) has(x chunkRef, leaves LeafSet) bool { return h.any() && h.get(x, leaves) != nil }

// leaves is the set of leaves of a chunk that are in memory.
func (h *held) leaves(x chunkRef) LeafSet {
	if !h.any() {
		return 0
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.mu.chunks[x]; c != nil {
		return c.leaves
	}
	return 0
}

// get returns the content of a chunk if all of leaves are in memory. The others are not to
// be read.
func (h *held) get(x chunkRef, leaves LeafSet) []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.mu.chunks[x]; c != nil && c.leaves.Contains(leaves) {
		return c.content
	}
	return nil
}

// put keeps a copy of p, the content of leaves of a chunk from leaf first on.
func (h *held) put(x chunkRef, first int, p []byte) {
	chunk := &x.stream.table.Chunks[x.chunk]
	leaves := LeafRange(first, (len(p)+LeafSize-1)/LeafSize)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mu.chunks == nil {
		h.mu.chunks = make(map[chunkRef]*heldChunk)
	}
	c := h.mu.chunks[x]
	if c == nil {
		c = &heldChunk{content: make([]byte, chunk.Size())}
		h.mu.chunks[x] = c
		h.mu.order = append(h.mu.order, x)
		h.mu.bytes += int64(chunk.Size())
		h.n.Store(int64(len(h.mu.chunks)))
	}
	// Views may show the leaves that are there.
	for l := range (leaves &^ c.leaves).Each {
		at := (l - first) * LeafSize
		copy(c.content[l*LeafSize:], p[at:at+chunk.LeafSize(l)])
	}
	c.leaves |= leaves
	for h.mu.bytes > h.limit && len(h.mu.order) > 1 {
		oldest := h.mu.order[0]
		h.remove(func(y chunkRef) bool { return y == oldest })
	}
}

// dropStored lets go of a chunk if all leaves that are held of it are on disk.
func (h *held) dropStored(x chunkRef) {
	if !h.any() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.mu.chunks[x]; c != nil && x.stream.onDisk(&x.stream.table.Chunks[x.chunk], c.leaves) == c.leaves {
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
		h.mu.bytes -= int64(len(h.mu.chunks[x].content))
		delete(h.mu.chunks, x)
		return true
	})
	h.n.Store(int64(len(h.mu.chunks)))
}

// store puts the leaves on disk, until one does not fit. Those that the disk cannot read
// back stay here. They were verified when they were put here.
func (h *held) store() {
	if !h.any() {
		return
	}
	h.mu.Lock()
	order := slices.Clone(h.mu.order)
	h.mu.Unlock()
	for _, x := range order {
		c := &x.stream.table.Chunks[x.chunk]
		for l := range h.leaves(x).Each {
			b, n := c.leafBlocks(l)
			p := h.get(x, LeafRange(l, 1))
			if p == nil {
				continue
			}
			err := x.stream.fill(x.chunk, b, p[l*LeafSize:l*LeafSize+int(n)*BlockSize])
			if errors.Is(err, errUnreadable) {
				break
			}
			if err != nil {
				return
			}
		}
	}
}

// size is the number of bytes in memory.
func (h *held) size() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mu.bytes
}
