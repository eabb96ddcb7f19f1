package blockmap

import (
	"math/bits"
	"sync/atomic"
)

// bitmap is a sequence of bits. Its words are read and changed atomically, so it
// needs no lock; a change of several words is not atomic. It knows nothing of
// what a bit means.
type bitmap []uint64

func newBitmap(n uint32) bitmap { return make(bitmap, (int64(n)+63)/64) }

func (m bitmap) word(i uint32) uint64 { return atomic.LoadUint64(&m[i]) }

// eachWord calls f for each word that holds some of the n bits from b.
func eachWord(b, n uint32, f func(i uint32, mask uint64)) {
	for n > 0 {
		bit := b % 64
		m := min(64-bit, n)
		f(b/64, ^uint64(0)>>(64-m)<<bit)
		b, n = b+m, n-m
	}
}

// has says whether all of the n bits from b are set.
func (m bitmap) has(b, n uint32) bool {
	for n > 0 {
		bit := b % 64
		k := min(64-bit, n)
		mask := ^uint64(0) >> (64 - k) << bit
		if atomic.LoadUint64(&m[b/64])&mask != mask {
			return false
		}
		b, n = b+k, n-k
	}
	return true
}

// set sets n bits from b, and returns how many of them were not.
func (m bitmap) set(b, n uint32) (added uint32) {
	eachWord(b, n, func(i uint32, mask uint64) {
		old := atomic.OrUint64(&m[i], mask)
		added += uint32(bits.OnesCount64(mask &^ old))
	})
	return added
}

// clear clears n bits from b, and returns how many of them were set.
func (m bitmap) clear(b, n uint32) (gone uint32) {
	eachWord(b, n, func(i uint32, mask uint64) {
		gone += uint32(bits.OnesCount64(atomic.AndUint64(&m[i], ^mask) & mask))
	})
	return gone
}

// any says whether one of the n bits from b is set.
func (m bitmap) any(b, n uint32) (some bool) {
	eachWord(b, n, func(i uint32, mask uint64) { some = some || m.word(i)&mask != 0 })
	return some
}

// run is the length of the run of equal bits from b, at most n, and their value.
func (m bitmap) run(b, n uint32) (length uint32, set bool) {
	set = m.has(b, 1)
	for length < n {
		w := m.word((b+length)/64) >> ((b + length) % 64)
		if set {
			w = ^w
		}
		left := 64 - (b+length)%64
		same := min(uint32(bits.TrailingZeros64(w)), left)
		length += same
		if same < left {
			break
		}
	}
	return min(length, n), set
}

// countRange is how many of the n bits from b are set.
func (m bitmap) countRange(b, n uint32) (set uint32) {
	eachWord(b, n, func(i uint32, mask uint64) { set += uint32(bits.OnesCount64(m.word(i) & mask)) })
	return set
}

// count is the number of bits that are set.
func (m bitmap) count() (n int64) {
	for i := range m {
		n += int64(bits.OnesCount64(m.word(uint32(i))))
	}
	return n
}
