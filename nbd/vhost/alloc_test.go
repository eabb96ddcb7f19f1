package vhost

import (
	"context"
	"strconv"
	"testing"

	"thaw/blockmap"
	"thaw/nbd"
)

// flat is a device in one piece, fully resident, like a mapped file.
type flat struct{ p []byte }

func (d *flat) Size() int64         { return int64(len(d.p)) }
func (d *flat) Unpin(uint64)        {}
func (d *flat) Pinned(uint64) int64 { return 0 }
func (d *flat) Damaged(uint64)      {}
func (d *flat) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	v.Append(d.p[e.Start:e.End], d, 0)
	return v, true
}
func (d *flat) Load(_ context.Context, e blockmap.Extent) (blockmap.View, bool) { return d.View(e) }
func (d *flat) Fault(context.Context, blockmap.Extent) error                    { return nil }
func (d *flat) Prefetch(blockmap.Extent)                                        {}
func (d *flat) Status(e blockmap.Extent) blockmap.Status {
	return blockmap.Status{Extent: e, Resident: true}
}

// flatQueue is a queue with a driver, whose passes the test makes itself.
func flatQueue(t testing.TB, inflight bool) (*queue, *driver) {
	return queueOf(t, &flat{make([]byte, testSize)}, inflight)
}

func queueOf(t testing.TB, dev blockmap.Device, inflight bool) (*queue, *driver) {
	f := &frontEnd{t: t, mem: newGuestMemory(t), features: featureEventIdx}
	d := f.newDriver(0, 64)
	q := idleQueue(t, f.mem, dev)
	q.num, q.addr = uint32(d.num), vringAddr{user(d.desc), user(d.used), user(d.avail)}
	var err error
	if q.ring, err = newRing(q.mem, q.num, q.addr, true); err != nil {
		t.Fatal(err)
	}
	if inflight {
		a := inflightArea{queues: 1, queueSize: uint16(d.num)}
		file := &inflightFile{area: a, mapped: make([]byte, a.region())}
		if q.inflight, err = file.queue(0, q.num); err != nil {
			t.Fatal(err)
		}
		if _, err := q.inflight.restore(0); err != nil {
			t.Fatal(err)
		}
	}
	return q, d
}

// idleQueue is a queue that has no goroutine.
func idleQueue(t testing.TB, mem *guestMemory, dev blockmap.Device) *queue {
	s := new(Server)
	s.conns()
	c := newConn(s, nil, &endpoint{srv: s})
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	c.use(&nbd.Export{Device: dev})
	p := &message{payload: mem.table(), fds: []int{mem.fd, mem.fd}}
	m, err := parseMemTable(p, 1<<40)
	must(t, err)
	t.Cleanup(m.release)
	q := newQueue(c, 0)
	q.mem = m
	q.ctx, q.cancel = context.WithCancelCause(c.ctx)
	q.taking, q.stop1 = context.WithCancel(q.ctx)
	t.Cleanup(q.stop1)
	q.cur = &request{q: q, mem: m}
	q.mu.call = eventfd(t)
	return q
}

// A hit allocates nothing between the available ring and the used ring.
func TestHitsAllocateNothing(t *testing.T) {
	for _, inflight := range []bool{false, true} {
		for _, indirect := range []bool{false, true} {
			q, d := flatQueue(t, inflight)
			d.inTable = indirect
			for i := range queueSlots {
				d.add(opIn, uint64(8*i), nil, 4096)
			}
			allocs := testing.AllocsPerRun(200, func() {
				if idle, err := q.pass(); err != nil || !idle {
					t.Fatal(idle, err)
				}
				for i := range queueSlots {
					d.offer(d.slots[i].head)
				}
			})
			if used := q.ring.usedIdx(); used < 200*queueSlots || q.mu.ready.first != nil {
				t.Fatalf("%d requests were answered at once", used)
			}
			if allocs != 0 {
				t.Errorf("indirect=%v, in flight=%v: %v allocations for %d hits", indirect, inflight, allocs, queueSlots)
			}
		}
	}
}

// BenchmarkHits is the server's own part of a hit of 4 KiB, at depth 12.
func BenchmarkHits(b *testing.B) {
	for name, inflight := range map[string]bool{"inflight=no": false, "inflight=yes": true} {
		b.Run(name, func(b *testing.B) {
			q, d := flatQueue(b, inflight)
			d.inTable = true
			for i := range queueSlots {
				d.add(opIn, uint64(8*i), nil, 4096)
			}
			for b.Loop() {
				if _, err := q.pass(); err != nil {
					b.Fatal(err)
				}
				for i := range queueSlots {
					d.offer(d.slots[i].head)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/queueSlots, "ns/hit")
		})
	}
}

// BenchmarkDriver is what a driver of depth 1 sees of a read of 4 KiB, and of a write: with
// kicks and interrupts, and without a virtual machine.
func BenchmarkDriver(b *testing.B) {
	for name, op := range map[string]operation{"read": opIn, "write": opOut} {
		b.Run(name, func(b *testing.B) {
			_, d := disk(b, nbd.Export{Device: filled(testSize)})
			var out []byte
			in := 4096
			if op == opOut {
				out, in = make([]byte, 4096), 0
			}
			for b.Loop() {
				d.ok(op, 8, out, in)
			}
		})
	}
}

// BenchmarkDriverDepth is what a driver sees that keeps several reads of 4 KiB in flight, and
// makes another one for each that is done.
func BenchmarkDriverDepth(b *testing.B) {
	for _, depth := range []int{2, 4, queueSlots} {
		b.Run(strconv.Itoa(depth), func(b *testing.B) {
			_, d := disk(b, nbd.Export{Device: filled(testSize)})
			kicked, called := d.kicked, d.called
			for made, done := 0, 0; done < b.N; {
				for ; made < b.N && made-done < depth; made++ {
					old := d.next
					d.add(opIn, uint64(8*(made%1024)), nil, 4096)
					d.notify(old)
				}
				d.awaitAny()
				for i := range d.done {
					delete(d.done, i)
					d.free = append(d.free, i)
					done++
				}
			}
			b.ReportMetric(float64(d.kicked-kicked)/float64(b.N), "kicks/op")
			b.ReportMetric(float64(d.called-called)/float64(b.N), "interrupts/op")
		})
	}
}
