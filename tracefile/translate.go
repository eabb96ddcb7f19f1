package tracefile

import (
	"cmp"
	"fmt"
	"slices"
	"sort"

	"thaw/blockmap"
)

// Carried says how much of a trace another version of its image has too. The chunks
// are those of the earlier version that the trace touches. The bytes are those that it
// touches, without holes.
type Carried struct {
	SharedChunks int   `json:"shared_chunks"` // of which something touched is in the new version
	SharedBytes  int64 `json:"shared_bytes"`
	LostChunks   int   `json:"lost_chunks"`
	LostBytes    int64 `json:"lost_bytes"`
}

func (c Carried) String() string {
	return fmt.Sprintf("%d of %d chunks and %d of %d bytes of the trace are in this version of the image",
		c.SharedChunks, c.SharedChunks+c.LostChunks, c.SharedBytes, c.SharedBytes+c.LostBytes)
}

// Translate turns a trace of the image with index old into a trace of the image with
// index ix. It finds a touched block by the digest of its chunk and its position
// there, wherever in the new image that chunk is. A block whose content the new device
// no longer has is left out. Where ix has a content several times, a place in a stream
// that both images have is preferred.
//
// It fails with ErrOtherImage where the trace is not one of old.
func Translate(t *Trace, old, ix *blockmap.Index) (*Trace, Carried, error) {
	var c Carried
	if err := t.is(old); err != nil {
		return nil, c, fmt.Errorf("translate trace: %w", err)
	}
	if err := t.check(); err != nil {
		return nil, c, fmt.Errorf("translate trace: %w", err)
	}
	out := &Trace{Header: t.Header, End: t.End, Cut: t.Cut}
	out.Index, out.Blocks = IndexDigest(ix), ix.Blocks
	tr := newTranslator(t, old, ix)
	shared := make(map[place]bool)
	taken := make([]uint64, (uint64(ix.Blocks)+63)/64)
	for x, run := range pieces(old, t.Touches) {
		if run.Count == 0 {
			continue
		}
		table := &old.Streams[run.Stream]
		for i := table.Find(run.Block); x.Count > 0; i++ {
			chunk := &table.Chunks[i]
			at := run.Block - chunk.Block
			part := x
			part.Count = min(x.Count, chunk.Count-at)
			kept := tr.carry(part, place{run.Stream, uint32(i)}, at, func(y Touch) {
				out.Touches = appendFree(out.Touches, y, taken)
			})
			c.SharedBytes += int64(kept) * blockmap.BlockSize
			c.LostBytes += int64(part.Count-kept) * blockmap.BlockSize
			where := place{run.Stream, uint32(i)}
			shared[where] = shared[where] || kept > 0
			run.Block += part.Count
			x.Count -= part.Count
		}
	}
	for _, ok := range shared {
		if ok {
			c.SharedChunks++
		} else {
			c.LostChunks++
		}
	}
	return out, c, nil
}

// appendFree appends to touches those blocks of x that are not taken, and takes
// them: what was in two places of the old device may be in one of the new.
func appendFree(touches []Touch, x Touch, taken []uint64) []Touch {
	for b := x.Block; b < x.Block+x.Count; b++ {
		word, bit := &taken[b/64], uint64(1)<<(b%64)
		if *word&bit != 0 {
			continue
		}
		*word |= bit
		if n := len(touches); n > 0 {
			if p := &touches[n-1]; p.end() == uint64(b) && p.At == x.At && p.Miss == x.Miss && p.Starts == x.Starts {
				p.Count++
				continue
			}
		}
		y := x
		y.Block, y.Count = b, 1
		touches = append(touches, y)
	}
	return touches
}

// place is a chunk of an index.
type place struct{ stream, chunk uint32 }

// translator finds chunks of one index in another.
type translator struct {
	old, ix *blockmap.Index
	twins   []int                       // for each stream of old the equal one of ix, or -1
	places  map[blockmap.Digest][]place // of ix: what old may be asked for
	device  []blockmap.Run              // of ix, sorted by stream and block, disjoint
}

func newTranslator(t *Trace, old, ix *blockmap.Index) *translator {
	tr := &translator{old: old, ix: ix, twins: make([]int, len(old.Streams)), places: make(map[blockmap.Digest][]place)}
	ids := make(map[blockmap.Digest]int)
	for i := range ix.Streams {
		ids[ix.Streams[i].ID()] = i
	}
	for i := range old.Streams {
		tr.twins[i] = -1
		if twin, ok := ids[old.Streams[i].ID()]; ok {
			tr.twins[i] = twin
		}
	}
	// Only what the trace touches is kept.
	for x, run := range pieces(old, t.Touches) {
		if run.Count == 0 {
			continue
		}
		table := &old.Streams[run.Stream]
		last := run.Block + x.Count - 1
		for i := table.Find(run.Block); i < len(table.Chunks) && table.Chunks[i].Block <= last; i++ {
			tr.places[table.Chunks[i].Digest] = nil
		}
	}
	for s := range ix.Streams {
		for i := range ix.Streams[s].Chunks {
			d := ix.Streams[s].Chunks[i].Digest
			if all, ok := tr.places[d]; ok && len(all) < maxPlaces {
				tr.places[d] = append(all, place{uint32(s), uint32(i)})
			}
		}
	}
	runs := slices.Clone(ix.Runs)
	slices.SortFunc(runs, func(a, b blockmap.Run) int {
		return cmp.Or(cmp.Compare(a.Stream, b.Stream), cmp.Compare(a.Block, b.Block), cmp.Compare(a.Device, b.Device))
	})
	for _, r := range runs {
		// What is on the device twice is looked for where it is first.
		if n := len(tr.device); n > 0 && tr.device[n-1].Stream == r.Stream {
			if end := tr.device[n-1].Block + tr.device[n-1].Count; end > r.Block {
				skip := min(end-r.Block, r.Count)
				r = blockmap.Run{Device: r.Device + skip, Stream: r.Stream, Block: r.Block + skip, Count: r.Count - skip}
			}
		}
		if r.Count > 0 {
			tr.device = append(tr.device, r)
		}
	}
	return tr
}

// maxPlaces bounds how many places of one content are looked at: a chunk of
// zeros may be anywhere.
const maxPlaces = 16

// carry gives to yield where in the new image the blocks of x are, which lie at
// a position in a chunk of the old one, and returns how many it has found.
func (tr *translator) carry(x Touch, from place, at uint32, yield func(Touch)) (kept uint32) {
	chunk := &tr.old.Streams[from.stream].Chunks[from.chunk]
	places := tr.places[chunk.Digest]
	twin := tr.twins[from.stream]
	for x.Count > 0 {
		n, device, ok := x.Count, uint32(0), false
		if twin >= 0 {
			n, device, ok = tr.find(uint32(twin), chunk.Block+at, x.Count)
		}
		for _, p := range places {
			if ok {
				break
			}
			c := &tr.ix.Streams[p.stream].Chunks[p.chunk]
			if c.Count != chunk.Count {
				continue
			}
			var m uint32
			if m, device, ok = tr.find(p.stream, c.Block+at, x.Count); ok {
				n = m
			} else {
				n = min(n, m)
			}
		}
		if ok {
			y := x
			y.Block, y.Count = device, n
			yield(y)
			kept += n
		}
		at += n
		x.Count -= n
	}
	return kept
}

// find says where on the new device the block of a stream is, and how many of
// the next count blocks follow it there; or that it is nowhere, and how many are
// not, either.
func (tr *translator) find(stream, block, count uint32) (n, device uint32, ok bool) {
	i := sort.Search(len(tr.device), func(i int) bool {
		r := &tr.device[i]
		return r.Stream > stream || r.Stream == stream && r.Block+r.Count > block
	})
	if i == len(tr.device) || tr.device[i].Stream != stream {
		return count, 0, false
	}
	r := &tr.device[i]
	if r.Block > block {
		return min(count, r.Block-block), 0, false
	}
	return min(count, r.Count-(block-r.Block)), r.Device + block - r.Block, true
}
