package main

import (
	"bytes"
	"context"
	"os"
	"strings"
	"time"

	"thaw/bench/fanout/sim"
	"thaw/blockmap"
	"thaw/tracefile"
)

// planOf makes the simulator's plan of a block image in a registry and a trace of a start of
// it. The start should have had everything resident: then the times between its reads are
// the program's own.
func planOf(ctx context.Context, image, trace string) (*sim.Plan, error) {
	ix, opens, err := indexOf(ctx, image)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(trace)
	if err != nil {
		return nil, err
	}
	t, err := tracefile.Read(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	index := int64(len(ix.Encode()))
	return simPlan(t, ix, opens-index, index)
}

// writePlan writes the plan of IMAGE,TRACE to stdout.
func writePlan(ctx context.Context, what string) error {
	image, trace, _ := strings.Cut(what, ",")
	p, err := planOf(ctx, image, trace)
	if err != nil {
		return err
	}
	return p.Write(os.Stdout)
}

// simPlan makes the simulator's plan of a trace.
func simPlan(t *tracefile.Trace, ix *blockmap.Index, manifest, index int64) (*sim.Plan, error) {
	plan, err := tracefile.NewPlan(t, ix)
	if err != nil {
		return nil, err
	}
	p := &sim.Plan{Manifest: manifest, Index: index}
	type place struct{ stream, chunk int }
	at := make(map[place]int)
	var before time.Duration
	for _, s := range plan.Steps {
		if s.Again {
			continue
		}
		where := place{s.Stream, s.Chunk}
		i, known := at[where]
		if !known {
			i = len(p.Chunks)
			at[where] = i
			c := plan.Chunk(s)
			p.Chunks = append(p.Chunks, sim.Chunk{Stream: s.Stream, Number: s.Chunk, Stored: int64(c.Stored), Size: int64(c.Size())})
		}
		after := max(s.At-before, 0)
		before = max(before, s.At)
		if n := len(p.Reads); n > 0 && p.Reads[n-1].Chunk == i && after == 0 {
			continue
		}
		p.Reads = append(p.Reads, sim.Read{Chunk: i, After: after})
	}
	return p, nil
}
