package vhost

import (
	"context"
	"errors"
	"runtime"
	"time"

	"thaw/blockmap"
)

// pass takes all requests that are there, and publishes the answers to those that it could
// answer at once. idle is true where nothing is left and the driver will kick.
//
// A fault comes out of the code that copies, wherever that is. It is either in the bytes
// of a view, which are then fetched again, or in the guest's memory, which the front end
// has truncated.
func (q *queue) pass() (idle bool, err error) {
	defer func() {
		if r := recover(); r != nil {
			idle, err = false, q.recovered(r)
		}
	}()
	q.setKicks(false)
	n, alone := 0, q.working.Load() == 0
	if q.again {
		q.again = false
		err = q.begin(q.cur)
	}
	for err == nil && len(q.resubmit) > 0 { // with an error, another goroutine may have the queue
		n++
		err = q.resume()
	}
	for err == nil {
		ahead := q.ring.availIdx() - q.at
		if ahead == 0 {
			if q.more(n) {
				continue
			}
			break
		}
		if uint32(ahead) > q.ring.num {
			err = broken("%d heads are available, of %d", ahead, q.ring.num)
		}
		for ; ahead > 0 && err == nil; ahead-- {
			n++
			err = q.take()
		}
		if err == nil && q.taking.Err() != nil {
			break
		}
	}
	if err == errTakenOver {
		return false, err
	}
	q.gather.ended(n)
	if e := q.flush(); err == nil {
		err = e
	}
	if n == 1 && alone {
		q.lone = min(q.lone+1, loneTakes)
	} else if n > 0 {
		q.lone = 0
	}
	if err != nil {
		return false, err
	}
	q.setKicks(true)
	return q.ring.availIdx() == q.at, nil
}

// recovered is what pass returns after a fault.
func (q *queue) recovered(r any) error {
	fault := asFault(r)
	again := damaged(&q.view, fault)
	q.view.Release()
	switch {
	case again:
		q.c.counts.repaired.Add(1)
		q.again = true
		return nil
	case q.mem.maps(fault), q.inflight != nil && fault.within(q.inflight.b):
		return fault
	}
	panic(r) // a bug
}

// setKicks says whether the driver is to kick when it makes the next head available. Whoever
// asks for kicks has to look again whether that has happened.
func (q *queue) setKicks(on bool) {
	if q.ring.eventIdx {
		if on { // what is asked for is one kick
			q.ring.setAvailEvent(q.at)
			q.barrier.Store(0)
		}
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.mu.flags = usedNoNotify
	if on {
		q.mu.flags = 0
	}
	q.ring.setUsedIdx(q.mu.used, q.mu.flags)
}

// take takes the next head of the available ring.
func (q *queue) take() error {
	head := q.ring.head(q.at)
	if uint32(head) >= q.ring.num {
		return broken("a head is %d, of %d descriptors", head, q.ring.num)
	}
	if q.inflight != nil {
		q.inflight.take(head)
	}
	q.at++
	q.took = true
	return q.handle(head)
}

// resume takes the next head that was in flight when the queue was started.
func (q *queue) resume() error {
	head := q.resubmit[0]
	q.resubmit = q.resubmit[1:]
	q.took = false
	return q.handle(head)
}

// untake takes back the head of cur, for a later start.
func (q *queue) untake() {
	if !q.took {
		q.resubmit = append([]uint16{q.cur.head}, q.resubmit...)
		return
	}
	q.at--
	if q.inflight != nil {
		q.inflight.untake(q.cur.head)
	}
}

// handle answers a request, or begins it.
func (q *queue) handle(head uint16) error {
	r := q.cur
	r.head = head
	if err := r.parse(q.ring, &q.scratch); err != nil {
		return err
	}
	if r.op == opIn {
		e, ok := q.dataExtent(r, r.nout)
		if !ok {
			return q.answer(statusIOErr, 0)
		}
		r.e = e
		if e.Len() <= maxHit {
			var ok bool
			if q.view, ok = q.c.dev.View(e); !ok && q.alone() {
				var err error
				if ok, err = q.loadHere(r); err != nil {
					return err
				}
			}
			if ok {
				to := cursor{bufs: r.out}
				to.writeView(&q.view)
				q.view.Release()
				q.nhits++
				q.nbytes += e.Len()
				return q.answer(statusOK, uint32(r.nout)+1)
			}
		}
		q.c.counts.misses.Add(1)
		return q.begin(r)
	}
	q.c.counts.others.Add(1)
	switch {
	case r.op == opGetID:
		to := cursor{bufs: r.out}
		to.write(q.c.id[:])
		return q.answer(statusOK, uint32(min(r.nout, idLen))+1)
	case r.op == opFlush && q.c.wdev == nil:
		return q.answer(statusOK, 1) // nothing was written
	case r.op == opFlush:
		return q.begin(r)
	case r.op == opOut:
		e, ok := q.dataExtent(r, r.nin)
		if !ok || q.c.wdev == nil {
			return q.answer(statusIOErr, 1)
		}
		if e.Len() == 0 {
			return q.answer(statusOK, 1)
		}
		r.e = e
		return q.begin(r)
	case (r.op == opDiscard || r.op == opWriteZeroes) && q.c.wdev != nil:
		if r.nin == 0 || r.nin%rangeLen != 0 || r.nin > maxRangeLen {
			return q.answer(statusIOErr, 1)
		}
		r.e = blockmap.Extent{}
		return q.begin(r)
	}
	return q.answer(statusUnsup, 1)
}

// dataExtent is where the n bytes of a read or write are. ok is false where there is no such place.
func (q *queue) dataExtent(r *request, n int64) (e blockmap.Extent, ok bool) {
	if n%sectorSize != 0 || n > maxRequest {
		return e, false
	}
	e, err := extent(r.sector, n, q.c.size)
	return e, err == nil
}

// alone reports whether the driver waits for the request at hand, and for nothing else.
func (q *queue) alone() bool {
	return q.lone >= loneTakes && q.working.Load() == 0 && q.nbatch == 0 && q.ring.availIdx() == q.at
}

// answer completes cur with the next batch.
func (q *queue) answer(code byte, written uint32) error {
	r := q.cur
	r.status[0] = code
	if code != statusOK {
		q.c.counts.errors.Add(1)
	}
	q.batch[q.nbatch] = completion{r.head, written}
	if q.nbatch++; q.nbatch == len(q.batch) || q.nbytes >= batchBytes {
		return q.flush()
	}
	return nil
}

// flush publishes the batch.
func (q *queue) flush() error {
	if q.nhits > 0 {
		q.c.counts.hits.Add(q.nhits)
		q.c.counts.read.Add(q.nbytes)
		q.nhits = 0
	}
	if q.nbatch == 0 {
		return nil
	}
	done := q.batch[:q.nbatch]
	q.nbatch, q.nbytes = 0, 0
	q.publish(done)
	return nil
}

// publish adds done to the used ring, and interrupts the guest if it wants that. It
// accesses the guest's memory.
func (q *queue) publish(done []completion) {
	q.mu.Lock()
	defer q.mu.Unlock()
	f := q.inflight
	for _, d := range done {
		if f != nil {
			f.list(d.head)
		}
		q.ring.put(q.mu.used, d.head, d.written)
		q.mu.used++
	}
	q.ring.setUsedIdx(q.mu.used, q.mu.flags)
	if f != nil {
		for _, d := range done {
			f.untake(d.head)
		}
		f.setUsed(q.mu.used)
	}
	wanted := q.ring.interrupt(q.mu.signalled, q.mu.used)
	q.mu.signalled = q.mu.used
	if wanted && q.mu.call >= 0 {
		q.c.counts.interrupts.Add(1)
		notify(q.mu.call)
	}
}

// begin starts cur, once it is admitted.
func (q *queue) begin(r *request) error {
	r.cost = min(max(r.nin, r.nout), pieceSize)
	if !q.c.client.TryAcquire(r.cost) {
		// Answers must not wait for the admission.
		if err := q.flush(); err != nil {
			return err
		}
		if err := q.c.client.Acquire(q.taking, r.cost); err != nil {
			q.untake()
			return err
		}
	}
	r.fresh()
	if r.op == opOut {
		switch {
		case q.alone():
			if err := q.writeHere(r); err != nil {
				return err
			}
			return q.flush()
		case !q.c.writethrough() && q.inline.Take(r.e):
			return q.writeHere(r)
		}
	}
	q.adopt()
	ctx := q.deadline()
	if r.op != opIn || r.e.Len() > maxHit {
		go q.work(ctx, r)
		return nil
	}
	blockmap.LoadAsync(q.c.dev, r.e, func(v blockmap.View, ok bool) {
		if !ok {
			go q.work(ctx, r)
			return
		}
		r.view, r.loaded = v, true
		if q.ready(r) {
			go q.complete()
		}
	})
	return nil
}

// deadline returns a context that ends after FaultTimeout, or up to deadlineStep later. To
// make one for each request would take longer than a write to memory.
func (q *queue) deadline() context.Context {
	if now := time.Now(); q.due.ctx == nil || now.Sub(q.due.made) > deadlineStep {
		// It is not cancelled before: requests that have it may go on.
		q.due.ctx, q.due.cancel = context.WithTimeout(q.ctx, q.c.srv.faultTimeout()+deadlineStep)
		q.due.made = now
	}
	return q.due.ctx
}

const deadlineStep = time.Second

// work does r on this goroutine.
func (q *queue) work(ctx context.Context, r *request) {
	q.done(r, r.do(ctx))
}

// done completes r, which is in flight without the queue's goroutine. err ends the connection.
func (q *queue) done(r *request, err error) {
	if err != nil {
		r.abandon = true
		q.c.fail(err)
	}
	if q.ready(r) {
		if q.working.Load() > 0 {
			// Others that are about to be done are published together with r, and
			// interrupt the guest once.
			runtime.Gosched()
		}
		q.complete()
	}
}

// ready adds r to what is to be published. mine is true where the caller has to call
// complete.
func (q *queue) ready(r *request) (mine bool) {
	q.working.Add(-1)
	q.mu.Lock()
	defer q.mu.Unlock()
	q.mu.ready.push(r)
	mine = !q.mu.busy
	q.mu.busy = true
	return mine
}

// complete publishes what is ready, until nothing is.
func (q *queue) complete() {
	var done [batchLen]completion
	for {
		q.mu.Lock()
		list := q.mu.ready
		q.mu.ready = requestList{}
		q.mu.busy = list.first != nil
		q.mu.Unlock()
		if list.first == nil {
			return
		}
		for list.first != nil {
			var ended requestList
			n := 0
			for n < len(done) {
				r := list.take()
				if r == nil {
					break
				}
				if r.loaded {
					q.copyLoaded(r)
				}
				if !r.abandon {
					if err := access(func() error { r.status[0] = r.code; return nil }); err != nil {
						q.c.fail(err)
					}
					done[n] = completion{r.head, r.written}
					n++
				}
				ended.push(r)
			}
			if n > 0 {
				if err := access(func() error { q.publish(done[:n]); return nil }); err != nil {
					q.c.fail(err)
				}
			}
			for r := ended.take(); r != nil; r = ended.take() {
				q.end(r)
			}
		}
	}
}

// copyLoaded copies what a read has loaded.
func (q *queue) copyLoaded(r *request) {
	ctx, cancel := context.WithTimeout(q.ctx, q.c.srv.faultTimeout())
	defer cancel()
	to := cursor{bufs: r.out}
	r.written = uint32(r.nout) + 1
	err := q.c.copyView(ctx, &to, &r.view, r.e)
	var fault *faultError
	switch {
	case errors.As(err, &fault):
		r.abandon = true
		q.c.fail(fault)
	case err != nil:
		r.fail(ctx, err)
	}
}

// end lets go of a request that is published, or abandoned.
func (q *queue) end(r *request) {
	q.c.client.Release(1, r.cost)
	r.mem.release()
	r.mem, r.in, r.out, r.status = nil, nil, nil, nil
	clear(r.reads)
	clear(r.writes)
	q.c.srv.requests.Put(r)
	q.tasks.Done()
}
