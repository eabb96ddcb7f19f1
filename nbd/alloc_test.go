package nbd

import (
	"context"
	"io"
	"testing"
	"time"

	"thaw/blockmap"
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

// A hit allocates nothing between the system call that reads the request and the one
// that writes the reply.
func TestHitsAllocateNothing(t *testing.T) {
	for _, structured := range []bool{false, true} {
		c := dial(t, serveDevice(t, Export{Device: &flat{make([]byte, testSize)}}))
		c.enter(structured)
		const n = 32
		var p []byte
		for i := range uint64(n) {
			p = appendRequest(p, cmdRead, 0, i, i*4096, 4096)
		}
		header := simpleReplyLen
		if structured {
			header = chunkLen + 8
		}
		in := make([]byte, n*(header+4096))
		allocs := testing.AllocsPerRun(200, func() {
			c.nc.Write(p)
			if _, err := io.ReadFull(c.nc, in); err != nil {
				t.Error(err)
			}
		})
		if allocs != 0 {
			t.Errorf("structured=%v: %v allocations for %d hits", structured, allocs, n)
		}
	}
}

// BenchmarkHits is the server's own part of a hit: parse, View, compose. The
// wire costs nothing here.
func BenchmarkHits(b *testing.B) {
	s := &session{c: &conn{}, w: nullWire{}, dev: &flat{make([]byte, testSize)}, size: testSize, structured: true}
	s.mu.changed.L = &s.mu
	const n = 32
	var p []byte
	for i := range uint64(n) {
		p = appendRequest(p, cmdRead, 0, i, i*4096, 4096)
	}
	s.in = make([]byte, inputReadOnly)
	for b.Loop() {
		s.end = copy(s.in, p)
		if s.parse(b.Context()) != nil || s.flush() != nil {
			b.Fatal("failed")
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/hit")
}

// nullWire accepts every write.
type nullWire struct{ wire }

func (nullWire) writev([][]byte, func() time.Duration) (int, error) { return 0, nil }
