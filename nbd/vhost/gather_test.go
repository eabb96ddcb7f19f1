package vhost

import (
	"bytes"
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/nbd"
)

// passes has a driver of a depth make passes: each takes all of its requests, and waits in
// vain for more where the limit says so. It returns how many waited.
func (g *gather) passes(passes, depth int) (waited int) {
	for range passes {
		g.waited = g.limit() > depth
		if g.waited {
			waited++
		}
		g.ended(depth)
	}
	return waited
}

// A queue waits for as many requests as its driver has in flight, and seldom for more.
func TestGatherLearns(t *testing.T) {
	var g gather
	g.passes(200, 8)
	for _, depth := range []int{1, 4, 1, 3, 8, 2, gatherMax + 8, 1} {
		g.passes(200, depth)
		if want := min(depth, gatherMax); g.expect != want {
			t.Errorf("it expects %d requests of a driver of depth %d", g.expect, depth)
		}
		g.passes(4*probeMax, depth)
		if n := g.passes(100*probeMax, depth); depth < gatherMax && (n == 0 || n > 100) {
			t.Errorf("of %d passes with depth %d, %d waited in vain", 100*probeMax, depth, n)
		}
	}
	// A driver that becomes deeper while the queue does not wait is noticed by a probe.
	found := false
	for range 2 * probeMax {
		n := 1
		if g.limit() > 1 {
			n, found = 5, true
		}
		g.waited = g.limit() > 1
		g.ended(n)
	}
	if !found || g.expect != 5 {
		t.Errorf("it expects %d requests of a driver that makes 5 where it is waited for", g.expect)
	}
	// Passes without requests say nothing.
	was := g
	g.ended(0)
	if g != was {
		t.Error("a pass without requests counts")
	}
}

// Requests that the driver makes available during a pass are answered together.
func TestGathers(t *testing.T) {
	q, d := flatQueue(t, true)
	d.inTable = true
	const together = 4
	var heads []uint16
	for i := range together {
		heads = append(heads, d.slots[d.add(opIn, uint64(8*i), nil, 4096)].head)
	}
	if _, err := q.pass(); err != nil || q.gather.expect != together {
		t.Fatalf("it expects %d requests: %v", q.gather.expect, err)
	}
	q.c.srv.waiters.limit = 1
	q.gather.gap, q.gather.most, q.gather.mostGap = limit, limit, limit // this machine may be busy
	d.collect()
	d.wantCall(true)
	before := q.c.counts.interrupts.Load()
	d.offer(heads[0])
	var driving sync.WaitGroup
	driving.Go(func() {
		for _, head := range heads[1:] {
			time.Sleep(time.Millisecond)
			d.offer(head)
		}
	})
	began := time.Now()
	_, err := q.pass()
	took := time.Since(began)
	driving.Wait()
	if got, n := q.ring.usedIdx()-together, q.c.counts.interrupts.Load()-before; err != nil || got != together || n != 1 {
		t.Errorf("a pass answered %d requests, in %d interrupts: %v", got, n, err)
	}
	if took > limit/2 {
		t.Errorf("it took %v: it waited for more requests than come together", took)
	}
}

// With no thread to spare, and with requests in flight that need one, nobody waits.
func TestGathersNothing(t *testing.T) {
	for name, change := range map[string]func(q *queue){
		"no thread to spare": func(q *queue) { q.c.srv.waiters.limit = 0 },
		"one in flight":      func(q *queue) { q.working.Store(1) },
	} {
		q, d := flatQueue(t, false)
		q.c.srv.waiters.limit = 1
		change(q)
		d.add(opIn, 0, nil, 4096)
		if _, err := q.pass(); err != nil || q.ring.usedIdx() != 1 {
			t.Fatal(err)
		}
		if q.gather.gap != 0 || !q.gather.began.IsZero() || q.c.srv.waiters.n.Load() != 0 {
			t.Errorf("%s: it waited", name)
		}
	}
}

// Small writes of whole blocks are done on the thread of the queue, and are completed
// together. Answers to reads do not wait for them.
//
// Time is virtual here: a write that takes long would have the next ones done elsewhere.
func TestWritesTogether(t *testing.T) { synctest.Test(t, testWritesTogether) }

func testWritesTogether(t *testing.T) {
	dev := filled(testSize)
	q, d := queueOf(t, dev, false)
	q.c.srv.waiters.limit = 0 // or it would look at a clock that stands still
	q.c.features = featureFlush
	want := bytes.Repeat([]byte("thaw"), 1024)
	read := d.add(opIn, 0, nil, 4096)
	dev.OnWrite = func(context.Context, blockmap.Extent) error {
		if d.collect(); !d.done[read] {
			t.Error("a write is done, and the read before it is not answered")
		}
		return nil
	}
	for i := range 6 {
		d.add(opOut, uint64(64+8*i), want, 0)
	}
	d.wantCall(true)
	if _, err := q.pass(); err != nil {
		t.Fatal(err)
	}
	if d.collect(); len(d.done) != 7 {
		t.Errorf("%d of 7 requests are done at the end of a pass", len(d.done))
	}
	if n := q.c.counts.interrupts.Load(); n > 2 {
		t.Errorf("%d interrupts", n)
	}
	for i := range 6 {
		if !bytes.Equal(content(dev, int64(64+8*i)*512, 4096), want) {
			t.Errorf("write %d is not there", i)
		}
	}
}

// A device whose writes take long holds up a queue once. After that, writes that hang hold
// up no reader.
func TestSlowWrites(t *testing.T) {
	dev := filled(testSize)
	var hang atomic.Bool
	hanging, release := make(chan struct{}, 64), make(chan struct{})
	dev.OnWrite = func(ctx context.Context, _ blockmap.Extent) error {
		if !hang.Load() {
			time.Sleep(10 * time.Millisecond)
			return nil
		}
		hanging <- struct{}{}
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	_, d := disk(t, nbd.Export{Device: dev})
	block := make([]byte, 4096)
	d.ok(opOut, 8, block, 0)
	hang.Store(true)
	var writes []int
	for i := range 4 {
		old := d.next
		writes = append(writes, d.add(opOut, uint64(8*i), block, 0))
		d.notify(old)
	}
	for range writes {
		select {
		case <-hanging:
		case <-time.After(limit):
			t.Fatal("the writes do not begin")
		}
	}
	for i := range 50 {
		d.ok(opIn, uint64(8000+8*i), nil, 4096)
	}
	close(release)
	for _, i := range writes {
		if code, _ := d.wait(i); code != statusOK {
			t.Errorf("a write: status %d", code)
		}
	}
}
