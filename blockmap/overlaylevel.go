package blockmap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// level is a set of changed blocks: a sparse data file with identity offsets, and a map of
// what is in it. An overlay has one, and two from Freeze until their merge.
type level struct {
	memory *pageCache
	reads  *diskReads
	name   string // in errors: the path of the data
	m      *changeMap

	// file is nil once the level is closed. A goroutine that has pinned and then loads
	// file may use it until it unpins.
	file atomic.Pointer[dataFile]
	pins pins // by word, see pinOf

	written atomic.Bool // data was written since the last sync of it began

	// suspects are blocks of which a read has failed. They are not shown until they
	// were read once more, or written.
	anySuspect atomic.Bool
	mu         struct {
		sync.Mutex
		suspects  map[uint32]struct{}
		unpunched map[uint32]uint64 // by word: blocks that are zero and have space
	}
}

func newLevel(memory *pageCache, reads *diskReads, name string, m *changeMap) *level {
	lv := &level{memory: memory, reads: reads, name: name, m: m, pins: make(pins, pinStripes*pinStride)}
	lv.mu.suspects = make(map[uint32]struct{})
	lv.mu.unpunched = make(map[uint32]uint64)
	return lv
}

const (
	pinStripes = 64
	pinStride  = 16 // counts that share no cache line
)

// pinOf is the count that pins block b.
func pinOf(b uint32) int { return int(b / perWord % pinStripes * pinStride) }

// A level's files in the directory of the overlay. The upper one has the suffix.
const (
	lockName    = "lock"
	headerName  = "header"
	liveName    = "live"
	upperSuffix = ".1"
)

// pin keeps the file open, and returns it with the token that unpins n bytes at off. f is
// nil, and nothing is pinned, where the level is closed or the file was cut short.
func (lv *level) pin(off, n int64) (f *dataFile, token uint64) {
	b, count := blocksOf(Range(off, n))
	lv.pins.pin(pinOf(b))
	if f = lv.file.Load(); f == nil || !f.intact() {
		lv.pins.unpin(pinOf(b))
		return nil, 0
	}
	return f, uint64(b)<<32 | uint64(count)
}

// Unpin implements Pinner: the token holds the first block and the number of blocks.
func (lv *level) Unpin(token uint64) { lv.pins.unpin(pinOf(uint32(token >> 32))) }

// Pinned implements Pinner. A pin keeps the file, which has these bytes.
func (lv *level) Pinned(token uint64) int64 { return int64(uint32(token)) * BlockSize }

// Damaged implements Pinner: the blocks are not shown before a read of them succeeds.
func (lv *level) Damaged(token uint64) {
	b, n := uint32(token>>32), uint32(token)
	lv.mu.Lock()
	defer lv.mu.Unlock()
	for i := range n {
		lv.mu.suspects[b+i] = struct{}{}
	}
	lv.anySuspect.Store(true)
}

// unread implements diskPinner.
func (lv *level) unread(token uint64) { lv.Damaged(token) }

// suspect says whether a read of some of the n blocks from b has failed.
func (lv *level) suspect(b, n uint32) bool {
	if !lv.anySuspect.Load() {
		return false
	}
	lv.mu.Lock()
	defer lv.mu.Unlock()
	for i := range n {
		if _, ok := lv.mu.suspects[b+i]; ok {
			return true
		}
	}
	return false
}

// trust ends the suspicion about n blocks from b, which were written or read.
func (lv *level) trust(b, n uint32) {
	if !lv.anySuspect.Load() {
		return
	}
	lv.mu.Lock()
	defer lv.mu.Unlock()
	for i := range n {
		delete(lv.mu.suspects, b+i)
	}
	lv.anySuspect.Store(len(lv.mu.suspects) > 0)
}

// view appends n bytes from off, which are data, to v, or returns false where they are not
// in memory.
func (lv *level) view(v *View, off, n int64) bool {
	f, token := lv.pin(off, n)
	if f == nil {
		return false
	}
	if !lv.memory.has(f, off, n) || lv.suspect(blocksOf(Range(off, n))) {
		lv.Unpin(token)
		return false
	}
	v.Append(f.bytes(off, n), lv, token)
	return true
}

// addTo adds n bytes from off, which are data, to l, or returns false where they cannot be
// read.
func (lv *level) addTo(l *load, off, n int64) bool {
	f, token := lv.pin(off, n)
	switch {
	case f == nil:
		return false
	case lv.memory.trusted(f) && !lv.suspect(blocksOf(Range(off, n))):
		l.view.Append(f.bytes(off, n), lv, token)
	default:
		l.read(lv.reads, lv, f, token, off, n)
	}
	return true
}

// cut says whether the data file was cut short. It pins: the level may be merged meanwhile,
// and its file unmapped.
func (lv *level) cut() bool {
	lv.pins.pin(0)
	defer lv.pins.unpin(0)
	f := lv.file.Load()
	return f != nil && !f.intact()
}

// check fails where some of the n blocks from b, which are data, cannot be read.
func (lv *level) check(ctx context.Context, b, n uint32) error {
	if lv.cut() {
		return fmt.Errorf("read bytes %v of %s: %w", blockRange(b, n), lv.name, errLost)
	}
	if !lv.suspect(b, n) {
		return ctx.Err()
	}
	p := lv.reads.buffers.get(BlockSize)
	defer p.put()
	for i := range n {
		if lv.suspect(b+i, 1) {
			if err := lv.read(b+i, p.b[:BlockSize]); err != nil {
				return err
			}
			lv.trust(b+i, 1)
		}
	}
	return ctx.Err()
}

// read reads whole blocks from b on, which are data, to p from the disk.
func (lv *level) read(b uint32, p []byte) error {
	e := Range(int64(b)*BlockSize, int64(len(p)))
	f, token := lv.pin(e.Start, e.Len())
	if f == nil {
		return fmt.Errorf("read bytes %v of %s: %w", e, lv.name, errLost)
	}
	defer lv.Unpin(token)
	n, err := f.readAt(p, e.Start)
	if err == nil && n < len(p) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("read bytes %v of %s: %w: write whole blocks again, or restore the overlay from a copy", e, lv.name, err)
	}
	return nil
}

// write writes p at off of the data file. The stripes are held.
func (lv *level) write(p []byte, off int64) error {
	f := lv.file.Load()
	if _, err := f.f.WriteAt(p, off); err != nil {
		return err
	}
	lv.wrote()
	return nil
}

func (lv *level) wrote() {
	if !lv.written.Load() {
		lv.written.Store(true)
	}
}

// clean says whether all is durable, and no space is to be given back.
func (lv *level) clean() bool {
	if lv.written.Load() || !lv.m.clean() {
		return false
	}
	lv.mu.Lock()
	defer lv.mu.Unlock()
	return len(lv.mu.unpunched) == 0
}

// owesSpace says whether zeroed blocks have space that a flush gives back.
func (lv *level) owesSpace() bool {
	lv.mu.Lock()
	defer lv.mu.Unlock()
	return len(lv.mu.unpunched) > 0
}

// punchLater notes that blocks of word i, as bits of their states, need no space.
func (lv *level) punchLater(i uint32, blocks uint64) {
	if blocks == 0 {
		return
	}
	lv.mu.Lock()
	defer lv.mu.Unlock()
	lv.mu.unpunched[i] |= blocks
}

// punch gives back the space of blocks whose durable state says that they need none. Those
// that have got data meanwhile keep it.
func (lv *level) punch(locks *stripes) error {
	lv.mu.Lock()
	due := lv.mu.unpunched
	lv.mu.unpunched = make(map[uint32]uint64)
	lv.mu.Unlock()
	words := make([]uint32, 0, len(due))
	for i := range due {
		words = append(words, i)
	}
	slices.Sort(words)
	var failed error
	for len(words) > 0 && failed == nil {
		n := 1
		for n < len(words) && n < stripeCount && words[n] == words[0]+uint32(n) {
			n++
		}
		if failed = lv.punchWords(locks, words[0], words[0]+uint32(n), due); failed == nil {
			words = words[n:]
		}
	}
	if errors.Is(failed, unix.EOPNOTSUPP) {
		return failed // it will not go better the next time
	}
	for _, i := range words {
		lv.punchLater(i, due[i])
	}
	return failed
}

// punchWords is punch for words first to end.
func (lv *level) punchWords(locks *stripes, first, end uint32, due map[uint32]uint64) error {
	locks.lock(first, end)
	defer locks.unlock(first, end)
	var run Extent
	flush := func() error {
		if run.Len() == 0 {
			return nil
		}
		return lv.file.Load().punch(run.Start, run.Len())
	}
	for i := first; i < end; i++ {
		live, durable := lv.m.live.word(i), lv.m.durable.word(i)
		idle := due[i] &^ blocksIn(live, stateData)
		later := idle & blocksIn(durable, stateData)
		lv.punchLater(i, later)
		for now := idle &^ later; now != 0; now &= now - 1 {
			e := blockRange(i*perWord+uint32(trailingBlock(now)), 1)
			if e.Start == run.End {
				run.End = e.End
				continue
			}
			if err := flush(); err != nil {
				return err
			}
			run = e
		}
	}
	return flush()
}

// space is how many bytes the level takes on disk.
func (lv *level) space() (n int64, err error) {
	if f := lv.file.Load(); f != nil {
		n, err = f.space()
	}
	m, e := lv.m.space()
	return n + m, errors.Join(err, e)
}

// close closes the files. While a view is held the mapping stays: a leak is better than a
// fault in whoever reads the view.
func (lv *level) close() error {
	err := lv.m.close()
	f := lv.file.Swap(nil)
	switch {
	case f == nil:
		return err
	case lv.pins.any():
		return errors.Join(err, fmt.Errorf("%s: %w", filepath.Base(lv.name), errNotReleased))
	}
	return errors.Join(err, f.close())
}
