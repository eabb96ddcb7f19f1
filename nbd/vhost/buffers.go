package vhost

import (
	"math/bits"
	"sync"
)

// buffers are pools of buffers for what guests write, one for each power of two.
type buffers struct{ pools [maxClass + 1]sync.Pool }

const (
	minClass = 12 // log2
	maxClass = 20 // of pieceSize
)

func (b *buffers) get(n int) *[]byte {
	i := class(n)
	if p, _ := b.pools[i].Get().(*[]byte); p != nil {
		return p
	}
	p := make([]byte, 1<<i)
	return &p
}

func (b *buffers) put(p *[]byte) { b.pools[class(len(*p))].Put(p) }

// class is the power of two that holds n bytes.
func class(n int) int { return max(minClass, bits.Len(uint(max(n, 1)-1))) }
