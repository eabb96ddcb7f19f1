package blockmap

import (
	"math/bits"
	"sync/atomic"
)

// state is what a level of an overlay has of a block.
type state uint8

const (
	stateAbsent state = iota // nothing: what is below shows
	stateData                // its bytes are in the data file
	stateZero                // it reads as zeros, wherever it has space
	stateLost                // its bytes were in a data file that was cut short
)

// states are the states of blocks, of two bits each. The words are read and changed
// atomically, so readers need no lock. Whoever changes a word holds its stripe. A page of
// words takes memory once one of its blocks is not absent: a device of many GiB of which
// little is written takes little.
type states struct {
	words uint32
	pages []atomic.Pointer[statesPage] // nil: all absent
}

type statesPage [pageWords]uint64

const (
	perWord    = 32  // blocks that a word tells of
	pageWords  = 512 // of a page of states
	pageBlocks = pageWords * perWord
)

func newStates(blocks uint32) states {
	words := (int64(blocks) + perWord - 1) / perWord
	return states{uint32(words), make([]atomic.Pointer[statesPage], (words+pageWords-1)/pageWords)}
}

// statesOf are the states of the words of a map.
func statesOf(words []uint64) states {
	s := states{uint32(len(words)), make([]atomic.Pointer[statesPage], (len(words)+pageWords-1)/pageWords)}
	for i, w := range words {
		s.put(uint32(i), w)
	}
	return s
}

func (s states) clone() states {
	c := states{s.words, make([]atomic.Pointer[statesPage], len(s.pages))}
	for i := range s.pages {
		if p := s.pages[i].Load(); p != nil {
			q := *p
			c.pages[i].Store(&q)
		}
	}
	return c
}

func (s states) word(i uint32) uint64 {
	p := s.pages[i/pageWords].Load()
	if p == nil {
		return 0
	}
	return atomic.LoadUint64(&p[i%pageWords])
}

func (s states) put(i uint32, w uint64) {
	at := &s.pages[i/pageWords]
	p := at.Load()
	if p == nil {
		if w == 0 {
			return
		}
		p = new(statesPage)
		if !at.CompareAndSwap(nil, p) { // another word of the page
			p = at.Load()
		}
	}
	atomic.StoreUint64(&p[i%pageWords], w)
}

// absent is how many of the n blocks from b, at least, are absent because their page is.
func (s states) absent(b, n uint32) uint32 {
	if s.pages[b/pageBlocks].Load() != nil {
		return 0
	}
	return min(pageBlocks-b%pageBlocks, n)
}

// at is the state of block b.
func (s states) at(b uint32) state { return state(s.word(b/perWord) >> (b % perWord * 2) & 3) }

// none says whether all of the n blocks from b are absent.
func (s states) none(b, n uint32) bool {
	for n > 0 {
		k := s.absent(b, n)
		if k == 0 {
			bit := b % perWord
			k = min(perWord-bit, n)
			if s.word(b/perWord)&stateMask(bit, k) != 0 {
				return false
			}
		}
		b, n = b+k, n-k
	}
	return true
}

// all says whether all of the n blocks from b have the state st.
func (s states) all(b, n uint32, st state) bool {
	for n > 0 {
		bit := b % perWord
		k := min(perWord-bit, n)
		if (s.word(b/perWord)^repeat(st))&stateMask(bit, k) != 0 {
			return false
		}
		b, n = b+k, n-k
	}
	return true
}

// run is the length of the longest run of blocks from b, at most n, that are alike, and
// their state.
func (s states) run(b, n uint32) (length uint32, st state) {
	st = s.at(b)
	for length < n {
		if st == stateAbsent {
			if k := s.absent(b+length, n-length); k > 0 {
				length += k
				continue
			}
		}
		bit := (b + length) % perWord
		differ := (s.word((b+length)/perWord) ^ repeat(st)) >> (2 * bit)
		same := min(uint32(bits.TrailingZeros64(differ))/2, perWord-bit)
		length += same
		if same < perWord-bit {
			break
		}
	}
	return min(length, n), st
}

// count is how many blocks have the state st, which is not absent.
func (s states) count(st state) (n int64) {
	for i := range s.pages {
		if p := s.pages[i].Load(); p != nil {
			for j := range p {
				n += countIn(atomic.LoadUint64(&p[j]), ^uint64(0), st)
			}
		}
	}
	return n
}

// stateMask covers n blocks from bit on, within a word.
func stateMask(bit, n uint32) uint64 { return ^uint64(0) >> (64 - 2*n) << (2 * bit) }

// wordMask covers those of the n blocks from b that word i tells of.
func wordMask(i, b, n uint32) uint64 {
	first, end := max(b, i*perWord), min(uint64(b)+uint64(n), uint64(i+1)*perWord)
	return stateMask(first%perWord, uint32(end-uint64(first)))
}

// repeat is a word of blocks that all have the state st.
func repeat(st state) uint64 { return everyOther * uint64(st) }

const everyOther = 0x5555_5555_5555_5555

// blocksIn are the blocks of w that have the state st: the lower of their two bits.
func blocksIn(w uint64, st state) uint64 {
	same := ^(w ^ repeat(st))
	return same & (same >> 1) & everyOther
}

// trailingBlock is the first block of bits that blocksIn has returned.
func trailingBlock(blocks uint64) int { return bits.TrailingZeros64(blocks) / 2 }

// countIn is how many blocks of w, within mask, have the state st.
func countIn(w, mask uint64, st state) int64 {
	return int64(bits.OnesCount64(blocksIn(w, st) & mask))
}

// wordsOf are the words that tell of the n blocks from b.
func wordsOf(b, n uint32) (first, end uint32) { return b / perWord, (b+n-1)/perWord + 1 }

// blocksOf are the blocks that e, which is not empty, touches.
func blocksOf(e Extent) (b, n uint32) {
	b = uint32(e.Start / BlockSize)
	return b, uint32((e.End-1)/BlockSize) - b + 1
}

// blockRange is the extent of n blocks from b.
func blockRange(b, n uint32) Extent { return Range(int64(b)*BlockSize, int64(n)*BlockSize) }
