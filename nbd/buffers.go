package nbd

import (
	"sync"

	"thaw/blockmap"
)

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

// pieces is a sequence of bytes in pooled buffers.
type pieces struct {
	pool *buffers
	list [][]byte
	n    int // bytes in list
	want int // bytes to come, as far as known
}

// pieceSize is the largest buffer. A client that stalls on few bytes then holds few.
const pieceSize = 256 << 10

// space returns room for up to n bytes at the end. The caller calls grow with how many
// of them it has filled.
func (p *pieces) space(n int) []byte {
	if len(p.list) > 0 {
		if b := p.list[len(p.list)-1]; len(b) < cap(b) {
			return b[len(b):min(cap(b), len(b)+n)]
		}
	}
	b := p.pool.get(min(max(n, p.want-p.n), pieceSize))
	p.list = append(p.list, b[:0])
	return b[:min(n, cap(b))]
}

func (p *pieces) grow(n int) {
	last := &p.list[len(p.list)-1]
	*last = (*last)[:len(*last)+n]
	p.n += n
}

// append copies b, which is in memory of the server.
func (p *pieces) append(b []byte) {
	for len(b) > 0 {
		n := copy(p.space(len(b)), b)
		p.grow(n)
		b = b[n:]
	}
}

// appendZeros appends n zeros.
func (p *pieces) appendZeros(n int) {
	for n > 0 {
		b := p.space(n)
		clear(b)
		p.grow(len(b))
		n -= len(b)
	}
}

// appendMapped copies b, which may be of a mapping. Where b cannot be read, it fails with
// blockmap.ErrDamaged and appends nothing.
func (p *pieces) appendMapped(b []byte) error {
	before := p.n
	for len(b) > 0 {
		to := p.space(len(b))
		if err := blockmap.CopyMapped(to, b); err != nil {
			p.truncate(before)
			return err
		}
		p.grow(len(to))
		b = b[len(to):]
	}
	return nil
}

// truncate keeps the first n bytes.
func (p *pieces) truncate(n int) {
	for last := len(p.list) - 1; last >= 0; last-- {
		b := p.list[last]
		if cut := p.n - n; cut < len(b) {
			p.list[last] = b[:len(b)-cut]
			p.n = n
			return
		}
		p.n -= len(b)
		p.pool.put(b)
		p.list[last] = nil
		p.list = p.list[:last]
	}
}
