package attach

import (
	"time"

	"thaw/blockmap"
	"thaw/nbd"
)

// The thread of a queue does a small write of whole blocks itself. To give it away takes
// two switches between threads, which cost several times what the write does: the device
// puts the bytes in the page cache. It reads nothing for whole blocks, so it waits for no
// origin.
//
// It may wait for the disk all the same, and the other requests of the queue with it:
// where the disk is slower than the writers, say. Nobody can take the requests over, since
// they belong to the thread. So the thread gives writes away after a slow one, for longer
// each time, until one is fast again.
const (
	ublkInlineMax  = 64 << 10             // bytes of such a write
	ublkInlineTime = 2 * time.Millisecond // a write that takes longer is slow
	ublkAwayMin    = 64                   // writes that are given away after a slow one
	ublkAwayMax    = 64 << 6              // and after many
)

// ublkInline is what a thread knows of its own writes.
type ublkInline struct {
	buf  []byte // for the bytes of a write
	away int    // writes to come that are given away
	next int    // how many they are after the next slow one
}

// takes reports whether the thread does the write r.
func (w *ublkInline) takes(r *ublkRequest) bool {
	if r.e.Len() > ublkInlineMax || r.flags&ublkIOFUA != 0 || r.e.Start%blockmap.BlockSize != 0 || r.e.End%blockmap.BlockSize != 0 {
		return false
	}
	if w.away > 0 {
		w.away--
		return false
	}
	return true
}

// took notes how long a write took.
func (w *ublkInline) took(d time.Duration) {
	if d <= ublkInlineTime {
		w.next = ublkAwayMin
		return
	}
	w.next = max(w.next, ublkAwayMin)
	w.away, w.next = w.next, min(2*w.next, ublkAwayMax)
}

// write does the write r on the thread, and returns what it is committed with.
func (q *ublkQueue) write(r *ublkRequest) int32 {
	s, w := q.d.n.serving, &q.inline
	if w.buf == nil {
		w.buf = make([]byte, ublkInlineMax)
	}
	p := w.buf[:r.e.Len()]
	began := time.Now()
	err := q.copyIn(r, p)
	if err == nil {
		s.others.Add(1)
		// Nothing that this waits for ends earlier by a deadline.
		err = s.wdev.WriteAt(s.ctx, p, r.e.Start)
	}
	w.took(time.Since(began))
	if err != nil {
		return result(0, s.fail(nbd.OpWrite, r.e, err))
	}
	return int32(r.e.Len())
}
