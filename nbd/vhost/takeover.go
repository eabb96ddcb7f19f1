package vhost

import (
	"errors"
	"time"

	"thaw/blockmap"
)

// The goroutine of a queue does small writes itself, and the read of the disk or the write of
// a driver that has nothing else in flight. That takes microseconds as a rule. It can take
// seconds where the disk is busy, and for ever where it hangs. So another goroutine takes over
// the queue after some milliseconds (package inline). The first one only finishes its request,
// like any other that waits for the device.

// stuckTime is how long the goroutine of a queue may wait for the device. It may wait twice
// as long.
const stuckTime = 2 * time.Millisecond

// errTakenOver ends a goroutine whose queue another one has taken. It owns nothing of the
// queue any more, and of its request what a goroutine in work owns.
var errTakenOver = errors.New("another goroutine has taken over the queue")

// fresh makes r a request that has no outcome yet.
func (r *request) fresh() {
	r.view, r.loaded, r.abandon, r.code, r.written = blockmap.View{}, false, false, statusOK, 1
}

// adopt makes cur, which is admitted, a request that is in flight without the queue's
// goroutine. Another one is cur afterwards.
func (q *queue) adopt() {
	r := q.cur
	r.mem.retain()
	q.tasks.Add(1)
	q.working.Add(1)
	q.cur, _ = q.c.srv.requests.Get().(*request)
	if q.cur == nil {
		q.cur = new(request)
	}
	q.cur.q, q.cur.mem = q, q.mem
}

// takeOver starts another goroutine for the queue. The one so far is stuck in cur.
func (q *queue) takeOver() {
	q.adopt()
	q.inline.Took(2 * stuckTime) // more than what is fast
	q.lone = 0
	q.gather.waited = false
	go q.run()
}

// writeHere does the write r, which is cur and admitted, on the queue's goroutine, and
// completes it with the next batch. Writes that are done wait with the batch for those after
// them, as they would on a slow disk.
func (q *queue) writeHere(r *request) error {
	if q.nhits > 0 {
		// Answers to reads must not wait for a disk.
		if err := q.flush(); err != nil {
			return err
		}
	}
	began := time.Now()
	ctx := q.deadline()
	n := q.watchdog.Begin()
	err := r.do(ctx)
	if !q.watchdog.End(n) {
		q.done(r, err)
		return errTakenOver
	}
	q.inline.Took(time.Since(began))
	q.c.client.Release(1, r.cost)
	switch {
	case err != nil:
		return err
	case r.abandon:
		q.untake()
		return errStopped
	}
	r.status[0] = r.code
	q.batch[q.nbatch] = completion{r.head, r.written}
	if q.nbatch++; q.nbatch == len(q.batch) {
		return q.flush()
	}
	return nil
}

// loadHere loads what the read r, which is cur, asks for on the queue's goroutine. ok is false
// where that is not on the disk.
func (q *queue) loadHere(r *request) (ok bool, err error) {
	r.cost = min(r.nout, pieceSize)
	if !q.c.client.TryAcquire(r.cost) {
		return false, nil
	}
	r.fresh()
	ctx := q.deadline()
	n := q.watchdog.Begin()
	v, ok := q.c.dev.Load(ctx, r.e)
	if q.watchdog.End(n) {
		q.c.client.Release(1, r.cost)
		q.view = v
		return ok, nil
	}
	q.c.counts.misses.Add(1)
	if !ok {
		q.work(ctx, r)
		return false, errTakenOver
	}
	r.view, r.loaded = v, true
	q.done(r, nil)
	return false, errTakenOver
}
