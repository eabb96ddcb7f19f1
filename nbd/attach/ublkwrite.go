package attach

import (
	"time"

	"thaw/nbd"
	"thaw/nbd/internal/inline"
)

// inlineWrites are the writes that the thread of a queue does. Nobody can take over the
// queue's other requests while one of them hangs, since they belong to the thread.
type inlineWrites struct {
	inline.Writes
	buf []byte // for the bytes of a write
}

// write does the write r on the thread, and returns what it is committed with.
func (q *ublkQueue) write(r *ublkRequest) int32 {
	s, w := q.d.n.serving, &q.inline
	if w.buf == nil {
		w.buf = make([]byte, inline.MaxLen)
	}
	p := w.buf[:r.e.Len()]
	began := time.Now()
	err := q.copyIn(r, p)
	if err == nil {
		s.others.Add(1)
		// Nothing that this waits for ends earlier by a deadline.
		err = s.wdev.WriteAt(s.ctx, p, r.e.Start)
	}
	w.Took(time.Since(began))
	if err != nil {
		return result(0, s.fail(nbd.OpWrite, r.e, err))
	}
	return int32(r.e.Len())
}
