package tracefile

import (
	"fmt"
	"time"

	"thaw/blockmap"
)

// Plan lists what to prefetch for a start: the chunks that a trace needs, in the order
// in which it needs them. The same trace and index give the same plan.
type Plan struct {
	Index *blockmap.Index
	Steps []Step

	Wanted int64 // bytes that the trace touches, except holes
	Size   int64 // uncompressed bytes of the chunks; equal content counts once
	Stored int64 // compressed bytes of the chunks; equal content counts once
}

// Step is one chunk of a Plan.
type Step struct {
	Stream, Chunk int           // positions in Index.Streams and its Chunks
	At            time.Duration // when the trace first touches one of its blocks
	Starts        uint32        // number of starts that touched that block
	Stored        int64         // compressed bytes
	// Again says that an earlier step has the same content in another place. Then the
	// chunk need not be fetched, and a bundle does not contain it.
	Again bool
}

// NewPlan makes the plan of a trace. It fails with ErrOtherImage if the trace is of an
// image with another index; Translate may help then.
func NewPlan(t *Trace, ix *blockmap.Index) (*Plan, error) {
	if err := t.is(ix); err != nil {
		return nil, fmt.Errorf("plan: %w", err)
	}
	if err := t.check(); err != nil {
		return nil, fmt.Errorf("plan: %w", err)
	}
	p := &Plan{Index: ix}
	planned := make([][]uint64, len(ix.Streams)) // one bit per chunk
	for i := range planned {
		planned[i] = make([]uint64, (len(ix.Streams[i].Chunks)+63)/64)
	}
	contents := make(map[blockmap.Digest]bool)
	for x, run := range pieces(ix, t.Touches) {
		if run.Count == 0 {
			continue
		}
		p.Wanted += x.Bytes()
		table := &ix.Streams[run.Stream]
		last := run.Block + x.Count - 1
		for i := table.Find(run.Block); i < len(table.Chunks) && table.Chunks[i].Block <= last; i++ {
			if word, bit := &planned[run.Stream][i/64], uint64(1)<<(i%64); *word&bit == 0 {
				*word |= bit
			} else {
				continue
			}
			c := &table.Chunks[i]
			again := contents[c.Digest]
			contents[c.Digest] = true
			p.Steps = append(p.Steps, Step{
				Stream: int(run.Stream), Chunk: i, At: x.At, Starts: max(x.Starts, 1), Stored: int64(c.Stored), Again: again,
			})
			if !again {
				p.Size += int64(c.Size())
				p.Stored += int64(c.Stored)
			}
		}
	}
	return p, nil
}

// pieces cuts touches where the runs of the index end. Each piece comes with the run
// that begins with it; for a hole, that run has no blocks.
func pieces(ix *blockmap.Index, touches []Touch) func(yield func(Touch, blockmap.Run) bool) {
	return func(yield func(Touch, blockmap.Run) bool) {
		for _, t := range touches {
			for t.Count > 0 {
				run, ok := ix.Lookup(t.Block)
				skip := t.Block - run.Device
				x := t
				x.Count = min(t.Count, run.Count-skip)
				if ok {
					run = blockmap.Run{Device: t.Block, Stream: run.Stream, Block: run.Block + skip, Count: run.Count - skip}
				} else {
					run = blockmap.Run{Device: t.Block}
				}
				if !yield(x, run) {
					return
				}
				t.Block += x.Count
				t.Count -= x.Count
			}
		}
	}
}

// Chunk returns the entry of the chunk table for a step: the place of its compressed
// bytes, and its content.
func (p *Plan) Chunk(s Step) *blockmap.Chunk { return &p.Index.Streams[s.Stream].Chunks[s.Chunk] }

// Wants returns the chunks of the plan in order, as a fetcher takes them. open returns
// the stream of each table that Wants needs: pass the Stream method of the
// blockmap.Cache. The index must be the one that the device was made with, because its
// tables say which chunks are neighbours.
func (p *Plan) Wants(open func(*blockmap.Table) (*blockmap.Stream, error)) ([]blockmap.Want, error) {
	streams := make([]*blockmap.Stream, len(p.Index.Streams))
	wants := make([]blockmap.Want, 0, len(p.Steps))
	for _, s := range p.Steps {
		table := &p.Index.Streams[s.Stream]
		if streams[s.Stream] == nil {
			stream, err := open(table)
			if err != nil {
				return nil, fmt.Errorf("plan: stream %d: %w", s.Stream, err)
			}
			streams[s.Stream] = stream
		}
		wants = append(wants, blockmap.Want{Stream: streams[s.Stream], Table: table, Chunk: s.Chunk})
	}
	return wants, nil
}
