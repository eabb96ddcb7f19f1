package nbd

import "sync"

// buffers are pools of payloads, one for each power of two.
type buffers struct{ pools [26]sync.Pool }

const minBuffer = 12 // log2

func (b *buffers) get(n int) []byte {
	i := class(n)
	if p, _ := b.pools[i].Get().(*[]byte); p != nil {
		return (*p)[:n]
	}
	return make([]byte, n, 1<<i)
}

func (b *buffers) put(p []byte) {
	p = p[:0]
	b.pools[class(cap(p))].Put(&p)
}

// class is the power of two that holds n bytes.
func class(n int) int {
	i := minBuffer
	for 1<<i < n {
		i++
	}
	return i
}
