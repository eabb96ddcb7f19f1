package blockmap

import (
	"math/bits"
	"sync"

	"github.com/ncw/directio"
)

// buffer is pooled memory that the kernel can read a disk into without the page cache:
// it is aligned. As the Pinner of a segment, it goes back to its pool when the view is
// released.
type buffer struct {
	b    []byte
	pool *sync.Pool
}

// buffers are pools of buffers, one for each power of two from a block to the most that
// is read at a time.
type buffers struct {
	pools [maxBuffer - minBuffer + 1]sync.Pool
}

const (
	minBuffer = 12 // log2 of BlockSize
	maxBuffer = 22 // log2 of readWindow
)

// get returns a buffer of n bytes, and more if n is not a power of two.
func (p *buffers) get(n int64) *buffer {
	class := max(bits.Len64(uint64(n-1)), minBuffer)
	if class > maxBuffer {
		return &buffer{b: directio.AlignedBlock(int(n))}
	}
	pool := &p.pools[class-minBuffer]
	if b, _ := pool.Get().(*buffer); b != nil {
		return b
	}
	return &buffer{directio.AlignedBlock(1 << class), pool}
}

// put gives the buffer back.
func (b *buffer) put() {
	if b.pool != nil {
		b.pool.Put(b)
	}
}

// Unpin implements Pinner.
func (b *buffer) Unpin(uint64) { b.put() }

// Pinned implements Pinner: the buffer keeps nothing in the cache.
func (b *buffer) Pinned(uint64) int64 { return 0 }

// Damaged implements Pinner. Memory does not fail.
func (b *buffer) Damaged(uint64) {}
