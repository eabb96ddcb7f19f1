package nbd

import (
	"context"
	"encoding/binary"
	"math"
	"strings"

	"thaw/blockmap"
)

// metaContext is a kind of metadata that BLOCK_STATUS can ask for. Its value is
// its id on the wire.
type metaContext uint32

const (
	// base:allocation is the spec's own: NBD_STATE_HOLE and NBD_STATE_ZERO on
	// holes, which read as zeros and take no space.
	contextAllocation = metaContext(1)
	// x-thaw:resident is ours: bit 0 is set on what can be read without
	// fetching anything.
	contextResident = metaContext(2)
)

var allContexts = []metaContext{contextAllocation, contextResident}

var contextNames = map[metaContext]string{
	contextAllocation: "base:allocation",
	contextResident:   "x-thaw:resident",
}

// state is the status flags of st in the context.
func (m metaContext) state(st blockmap.Status) uint32 {
	switch {
	case m == contextAllocation && st.Zero:
		return stateHole | stateZero
	case m == contextResident && (st.Resident || st.Zero):
		return stateResident
	}
	return 0
}

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (h *handshake) metaContext(ctx context.Context, opt uint32) error {
	set := opt == optSetMetaContext
	if set {
		h.contexts = nil // also where it fails
		if !h.structured {
			return h.fail(opt, repErrInvalid, "structured replies are needed first")
		}
	}
	name, rest, ok := cutString(h.data)
	if !ok || len(rest) < 4 {
		return h.fail(opt, repErrInvalid, "malformed option")
	}
	count := binary.BigEndian.Uint32(rest)
	rest = rest[4:]
	var queries []string
	for range count {
		var q string
		if q, rest, ok = cutString(rest); !ok || len(q) > maxString {
			return h.fail(opt, repErrInvalid, "malformed query")
		}
		if !strings.Contains(q, ":") {
			return h.fail(opt, repErrInvalid, "a query is a namespace, a colon and a name")
		}
		queries = append(queries, q)
	}
	if len(rest) != 0 {
		return h.fail(opt, repErrInvalid, "bytes after the last query")
	}
	if err := h.open(ctx, name); err != nil {
		return h.failOpen(opt, name, err)
	}

	for _, m := range allContexts {
		match := !set && count == 0
		for _, q := range queries {
			namespace, _, _ := strings.Cut(contextNames[m], ":")
			match = match || q == contextNames[m] || !set && q == namespace+":"
		}
		if !match {
			continue
		}
		id := uint32(0) // reserved in a list
		if set {
			id = uint32(m)
			h.contexts = append(h.contexts, m)
		}
		p := binary.BigEndian.AppendUint32(nil, id)
		_ = h.reply(opt, repMetaContext, append(p, contextNames[m]...))
	}
	h.contextsName = name
	return h.reply(opt, repAck, nil)
}

// extents is the body of one BLOCK_STATUS chunk in the making.
type extents struct {
	context metaContext
	p       []byte // the payload of the chunk: context id, then length and flags of each extent
}

// add appends a run of n bytes, or makes the last one longer.
func (x *extents) add(n int64, state uint32) {
	if len(x.p) > 4 {
		last := x.p[len(x.p)-8:]
		if sum := int64(binary.BigEndian.Uint32(last)) + n; binary.BigEndian.Uint32(last[4:]) == state && sum <= math.MaxUint32 {
			binary.BigEndian.PutUint32(last, uint32(sum))
			return
		}
	}
	x.p = binary.BigEndian.AppendUint32(x.p, uint32(n))
	x.p = binary.BigEndian.AppendUint32(x.p, state)
}

func (x *extents) count() int { return (len(x.p) - 4) / 8 }

// blockStatus describes e in each of the contexts, with at most limit extents
// in each. It may stop short of the end of e, and does when ctx ends.
func blockStatus(ctx context.Context, d blockmap.Device, e blockmap.Extent, contexts []metaContext, limit int) []extents {
	out := make([]extents, len(contexts))
	for i, m := range contexts {
		out[i] = extents{m, binary.BigEndian.AppendUint32(nil, uint32(m))}
	}
	for round := 0; e.Start < e.End; round++ {
		st := d.Status(e)
		st.Extent = st.Intersect(e)
		if st.Start != e.Start || st.Len() <= 0 {
			st = blockmap.Status{Extent: e} // the device does not describe e: call it data
		}
		full := false
		for i := range out {
			out[i].add(st.Len(), out[i].context.state(st))
			full = full || out[i].count() > limit
		}
		if full {
			// The run did not fit in one context, and is taken back
			// there. The other contexts may describe more.
			for i := range out {
				if out[i].count() > limit {
					out[i].p = out[i].p[:len(out[i].p)-8]
				}
			}
			break
		}
		if round%1024 == 1023 && ctx.Err() != nil {
			break
		}
		e.Start = st.End
	}
	return out
}
