package blockmap

import (
	"context"
	"errors"
	"fmt"
)

// stepSize is how much of a write takes its stripes at a time.
const stepSize = stripeCount * perWord * BlockSize

// errLost says that what a block had is gone.
var errLost = fmt.Errorf("%w: the data file of the overlay was cut short: write whole blocks again, or restore the overlay from a copy", ErrDamaged)

// WriteAt implements WritableDevice.
func (o *Overlay) WriteAt(ctx context.Context, p []byte, off int64) error {
	e := Range(off, int64(len(p)))
	err := o.admit(e)
	for at := e.Start; at < e.End && err == nil; {
		end := min(e.End, (at/stepSize+1)*stepSize)
		err = o.writeStep(ctx, p[at-off:end-off], at)
		at = end
	}
	if err != nil {
		return fmt.Errorf("write bytes %v of overlay %s: %w", e, o.dir, err)
	}
	return nil
}

// admit fails where e cannot be written.
func (o *Overlay) admit(e Extent) error {
	if err := e.Check(o.size); err != nil {
		return err
	}
	if err := o.poison.Load(); err != nil {
		return *err
	}
	return nil
}

// write is one step of a write.
type write struct {
	o   *Overlay
	p   []byte
	off int64

	head, tail edge // the first and the last block, if they are written in part
}

// edge is a block of which a write has a part, and needs the rest from below.
type edge struct {
	b    uint32
	buf  *buffer // the block, once it was needed
	rest bool    // buf has the rest of the block
	from *level  // where the rest lies; nil: in the base
	s    *layers // of which from is one; in others, from may have got writes
}

// errRead says that a write cannot go on before the rest of an edge was read.
var errRead = errors.New("the rest of a block must be read")

func (o *Overlay) writeStep(ctx context.Context, p []byte, off int64) error {
	w := write{o: o, p: p, off: off}
	defer w.release()
	b, n := blocksOf(Range(off, int64(len(p))))
	first, end := wordsOf(b, n)
	if err := o.replaceCut(o.layers.Load().target()); err != nil {
		return err
	}
	for flushed := false; ; {
		o.stripes.lock(first, end)
		err := w.put(b, n)
		o.stripes.unlock(first, end)
		switch {
		case err == errRead:
			if err := w.read(ctx); err != nil {
				return err
			}
		case errors.Is(err, ErrNoSpace) && !flushed && o.reclaimable():
			flushed = true
			if err := o.Flush(ctx); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

// reclaimable says whether a flush would give space back.
func (o *Overlay) reclaimable() bool {
	for _, lv := range o.layers.Load().levels() {
		if lv.owesSpace() {
			return true
		}
	}
	return false
}

func (w *write) release() {
	for _, x := range []*edge{&w.head, &w.tail} {
		if x.buf != nil {
			x.buf.put()
		}
	}
}

// put writes the n blocks from b, of which the first and the last may be parts. The
// stripes are held.
func (w *write) put(b, n uint32) error {
	o := w.o
	if o.closed.Load() {
		return ErrClosed
	}
	s := o.layers.Load()
	reserved, err := o.reserve(s, b, n)
	if err != nil {
		return err
	}
	if err := w.data(s, b, n); err != nil {
		o.dataBlocks.Add(-reserved)
		return err
	}
	if err := o.mark(s, b, n, stateData); err != nil {
		o.dataBlocks.Add(-reserved)
		o.tidy(s.target(), b, n)
		return err
	}
	return nil
}

// reserve counts those of the n blocks from b as data that are not, unless that is beyond
// the limit.
func (o *Overlay) reserve(s *layers, b, n uint32) (reserved int64, err error) {
	if s.top.m.live.all(b, n, stateData) {
		return 0, nil
	}
	for left := n; left > 0; {
		k, _, st := s.run(b+n-left, left)
		if st != stateData && st != stateLost {
			reserved += int64(k)
		}
		left -= k
	}
	// In one step: a write that does not fit takes no room from one that does.
	for now := o.dataBlocks.Load(); ; now = o.dataBlocks.Load() {
		if o.limit > 0 && now+reserved > o.limit && reserved > 0 {
			return 0, fmt.Errorf("the overlay may have %d bytes of data: %w", o.limit*BlockSize, ErrNoSpace)
		}
		if o.dataBlocks.CompareAndSwap(now, now+reserved) {
			return reserved, nil
		}
	}
}

// data writes the data of w to the target: whole blocks, and parts of those that are data
// there, as they are; other parts with the rest of their blocks.
func (w *write) data(s *layers, b, n uint32) error {
	p, off := w.p, w.off
	end := off + int64(len(p))
	var head, tail []byte // parts that need the rest of their blocks
	var err error
	if off%BlockSize != 0 || int64(len(p)) < BlockSize {
		part := p[:min(int64(len(p)), BlockSize-off%BlockSize)]
		if head, err = w.head.complete(w.o, s, b, part, off%BlockSize); err != nil && err != errRead {
			return err
		}
		if head != nil || err == errRead {
			p, off = p[len(part):], off+int64(len(part))
		}
	}
	if end%BlockSize != 0 && off < end && off <= end&^(BlockSize-1) {
		part := p[int64(len(p))-end%BlockSize:]
		var e error
		if tail, e = w.tail.complete(w.o, s, b+n-1, part, 0); e != nil {
			err = e
		}
		if tail != nil {
			p = p[:len(p)-len(part)]
		}
	}
	switch {
	case err != nil:
		return err
	case head != nil:
		err = w.o.store(s, head, int64(b)*BlockSize)
	}
	if len(p) > 0 && err == nil {
		err = w.o.store(s, p, off)
	}
	if tail != nil && err == nil {
		err = w.o.store(s, tail, int64(b+n-1)*BlockSize)
	}
	return err
}

// complete returns block b with part at at of it, or nil where the part can be written as it
// is. It returns errRead where the rest of the block must be read first.
func (x *edge) complete(o *Overlay, s *layers, b uint32, part []byte, at int64) (block []byte, err error) {
	_, lv, st := s.run(b, 1)
	switch {
	case st == stateLost:
		return nil, errLost
	case st == stateData && lv == s.target():
		return nil, nil
	case st == stateAbsent:
		lv = nil
	}
	if x.buf == nil {
		x.buf = o.reads.buffers.get(BlockSize)
	}
	block = x.buf.b[:BlockSize]
	switch {
	case st == stateZero:
		clear(block)
		x.rest = false // if the block becomes something else before this is done
	case !x.rest || x.from != lv || lv != nil && x.s != s:
		x.b, x.from, x.s, x.rest = b, lv, s, false
		return nil, errRead
	}
	copy(block[at:], part)
	return block, nil
}

// read reads the edges that put has asked for. What they are read from is not written to:
// it is the base, a frozen level, or one that is being merged.
func (w *write) read(ctx context.Context) (err error) {
	for _, x := range []*edge{&w.head, &w.tail} {
		if x.buf == nil || x.rest {
			continue
		}
		block := x.buf.b[:BlockSize]
		if x.from == nil {
			err = ReadInto(ctx, w.o.base, blockRange(x.b, 1), block)
		} else if err = ctx.Err(); err == nil {
			if err = x.from.read(x.b, block); err != nil && x.from.file.Load() == nil {
				continue // it was merged meanwhile: put looks where the rest lies now
			}
		}
		if err != nil {
			return fmt.Errorf("read the rest of the block: %w", err)
		}
		x.rest = true
	}
	return nil
}

// store writes p, of whole blocks or parts of blocks that are data, to the target. Where it
// fails, blocks that are not data there give their space back.
func (o *Overlay) store(s *layers, p []byte, off int64) error {
	t := s.target()
	err := t.write(p, off)
	b, n := blocksOf(Range(off, int64(len(p))))
	if err != nil {
		o.tidy(t, b, n)
		return o.full(err)
	}
	t.trust(b, n)
	return nil
}

// full makes the error of a full disk ErrNoSpace.
func (o *Overlay) full(err error) error {
	if diskFull(err) {
		return fmt.Errorf("the disk of the overlay is full: %w (%w)", ErrNoSpace, err)
	}
	return err
}

// tidy gives back the space of those of the n blocks from b that are not data. The stripes
// are held.
func (o *Overlay) tidy(t *level, b, n uint32) {
	for n > 0 {
		k, st := t.m.live.run(b, n)
		if e := blockRange(b, k); st != stateData {
			if err := t.file.Load().punch(e.Start, e.Len()); err != nil {
				o.log.Warn("cannot give back the space of a write that has failed", "err", err)
			}
		}
		b, n = b+k, n-k
	}
}

// mark makes st the state of n blocks from b, and counts all changes but those from
// something to data, which reserve has counted. The stripes are held.
func (o *Overlay) mark(s *layers, b, n uint32, st state) error {
	t := s.target()
	if t.m.live.all(b, n, st) && (!s.merging || s.top.m.live.none(b, n)) {
		return nil
	}
	var data, zero int64 // as they were
	for left := n; left > 0; {
		k, _, was := s.run(b+n-left, left)
		switch was {
		case stateData, stateLost:
			data += int64(k)
		case stateZero:
			zero += int64(k)
		}
		left -= k
	}
	if err := o.setWords(t, b, n, st); err != nil {
		return err
	}
	if s.merging && !s.top.m.live.none(b, n) {
		if err := o.setWords(s.top, b, n, stateAbsent); err != nil {
			return err
		}
	}
	o.zeroBlocks.Add(-zero)
	if st == stateZero {
		o.dataBlocks.Add(-data)
		o.zeroBlocks.Add(int64(n))
	}
	return nil
}

// setWords makes st the state of n blocks from b in a level.
func (o *Overlay) setWords(lv *level, b, n uint32, st state) error {
	first, end := wordsOf(b, n)
	var few [4]uint64 // most writes are small
	words := few[:0]
	if end-first > uint32(len(few)) {
		words = make([]uint64, 0, end-first)
	}
	for i := first; i < end; i++ {
		mask := wordMask(i, b, n)
		words = append(words, lv.m.live.word(i)&^mask|repeat(st)&mask)
	}
	if st == stateZero && !o.volatile {
		// Noted before it is so: until then, the blocks are data, and keep their space.
		for i := first; i < end; i++ {
			lv.punchLater(i, blocksIn(lv.m.live.word(i), stateData)&wordMask(i, b, n))
		}
	}
	if err := lv.m.set(first, words, o.stripes[first%stripeCount].buf[:]); err != nil {
		return o.full(err)
	}
	if st == stateZero && o.volatile { // no flush comes
		e := blockRange(b, n)
		if err := lv.file.Load().punch(e.Start, e.Len()); err != nil { // they are zeros all the same
			o.unpunched.Do(func() { o.log.Warn("cannot give back the space of zeroed blocks", "err", err) })
		}
	}
	return nil
}
