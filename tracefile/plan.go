package tracefile

import (
	"fmt"
	"time"

	"thaw/blockmap"
)

// Plan lists what to prefetch for a start: the leaves that a trace needs, in the order in
// which it needs them. The same trace and index give the same plan.
type Plan struct {
	Index *blockmap.Index
	Steps []Step

	Wanted int64 // bytes that the trace touches, except holes
	Size   int64 // bytes of the leaves; equal content counts once
	Stored int64 // compressed bytes of the chunks that have them; equal content counts once
}

// Step is a run of leaves of one chunk in a Plan.
type Step struct {
	Stream, Chunk int           // positions in Index.Streams and its Chunks
	Leaf, Leaves  int           // the first leaf, and how many there are
	At            time.Duration // when the trace first touches one of their blocks
	Starts        uint32        // number of starts that touched that block
	// New says that no earlier step has leaves of this chunk.
	New bool
	// Again says that earlier steps have the same content in another place. Then the
	// leaves need not be fetched, and a bundle does not contain them.
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
	p := &planner{Plan: Plan{Index: ix}, planned: make(map[place]blockmap.LeafSet), contents: make(map[blockmap.Digest]blockmap.LeafSet)}
	for x, run := range pieces(ix, t.Touches) {
		if run.Count == 0 {
			continue
		}
		p.Wanted += x.Bytes()
		table := &ix.Streams[run.Stream]
		last := run.Block + x.Count - 1
		for i := table.Find(run.Block); i < len(table.Chunks) && table.Chunks[i].Block <= last; i++ {
			p.add(x, place{run.Stream, uint32(i)}, run.Block, last)
		}
	}
	return &p.Plan, nil
}

// planner is a Plan in the making.
type planner struct {
	Plan
	planned  map[place]blockmap.LeafSet
	contents map[blockmap.Digest]blockmap.LeafSet
}

// add plans the leaves of a chunk that have blocks first to last of its stream.
func (p *planner) add(x Touch, at place, first, last uint32) {
	c := &p.Index.Streams[at.stream].Chunks[at.chunk]
	before, known := p.planned[at]
	if !known {
		if _, ok := p.contents[c.Digest]; !ok {
			p.Stored += int64(c.Stored)
		}
	}
	leaf := func(block uint32) int { return int(block-c.Block) / blockmap.LeafBlocks }
	for i := leaf(max(first, c.Block)); i <= leaf(min(last, c.Block+c.Count-1)); i++ {
		if before.Has(i) {
			continue
		}
		again := p.contents[c.Digest].Has(i)
		if !again {
			p.Size += int64(c.LeafSize(i))
		}
		p.contents[c.Digest] |= blockmap.LeafRange(i, 1)
		p.planned[at] |= blockmap.LeafRange(i, 1)
		if n := len(p.Steps); n > 0 {
			if s := &p.Steps[n-1]; s.is(at) && s.Leaf+s.Leaves == i && s.At == x.At && s.Starts == max(x.Starts, 1) && s.Again == again {
				s.Leaves++
				continue
			}
		}
		p.Steps = append(p.Steps, Step{
			Stream: int(at.stream), Chunk: int(at.chunk), Leaf: i, Leaves: 1, At: x.At, Starts: max(x.Starts, 1), New: !known, Again: again,
		})
		known = true
	}
}

func (s *Step) is(at place) bool { return s.Stream == int(at.stream) && s.Chunk == int(at.chunk) }

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

// Wants returns the chunks of the plan, each where the plan first needs a leaf of it and
// with all leaves that the plan needs, as a fetcher takes them. open returns the stream of
// each table that Wants needs: pass the Stream method of the blockmap.Cache. The index must
// be the one that the device was made with, because its tables say which chunks are
// neighbours.
func (p *Plan) Wants(open func(*blockmap.Table) (*blockmap.Stream, error)) ([]blockmap.Want, error) {
	streams := make([]*blockmap.Stream, len(p.Index.Streams))
	var wants []blockmap.Want
	at := make(map[place]int)
	for _, s := range p.Steps {
		table := &p.Index.Streams[s.Stream]
		if streams[s.Stream] == nil {
			stream, err := open(table)
			if err != nil {
				return nil, fmt.Errorf("plan: stream %d: %w", s.Stream, err)
			}
			streams[s.Stream] = stream
		}
		where := place{uint32(s.Stream), uint32(s.Chunk)}
		if s.New {
			at[where] = len(wants)
			wants = append(wants, blockmap.Want{Stream: streams[s.Stream], Table: table, Chunk: s.Chunk})
		}
		wants[at[where]].Leaves |= blockmap.LeafRange(s.Leaf, s.Leaves)
	}
	return wants, nil
}
