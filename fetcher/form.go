package fetcher

import (
	"errors"
	"fmt"
	"io"

	"thaw/blockmap"
)

// form is the form in which a request brings a chunk. The zero form is that of the source:
// origins send chunks as they store them, and peers send them uncompressed.
type form struct {
	// stored says that a peer sends the chunk as the registry has it.
	stored bool
	// first is neighbouring leaves of the chunk that come first, uncompressed, behind the
	// digests of all leaves, so that they are verified and read before the rest is here.
	// The rest is all of the chunk if it comes as it is stored, and else its other leaves.
	first blockmap.LeafSet
}

// formed is a body of a peer that says in which form it brings a chunk.
type formed interface {
	Form() (stored bool, first blockmap.LeafSet)
}

const (
	// maxFirst bounds how many leaves a peer is asked to send first, and firstShare the
	// part of a chunk that they may be: for more, the reader waits for all of it.
	maxFirst   = 4
	firstShare = 4
)

// size returns how many bytes of its body a request has for a fetch.
func (r *request) size(ft *fetch) int64 {
	n := r.place.stored(ft)
	if r.form == (form{}) {
		return n
	}
	c := &r.place.table.Chunks[ft.key.chunk]
	if r.form.stored {
		n = int64(c.Stored)
	}
	if r.form.first != 0 {
		n += int64(c.Leaves() * len(blockmap.Digest{}))
		if r.form.stored {
			_, _, e := span(c, r.form.first)
			n += e.Len()
		}
	}
	return n
}

// span returns the first of neighbouring leaves of a chunk, how many they are, and where
// they lie in the chunk.
func span(c *blockmap.Chunk, leaves blockmap.LeafSet) (first, count int, e blockmap.Extent) {
	for i := range leaves.Each {
		if count == 0 {
			first = i
		}
		count = i - first + 1
	}
	return first, count, blockmap.Extent{Start: int64(first) * blockmap.LeafSize, End: min(int64(first+count)*blockmap.LeafSize, int64(c.Size()))}
}

// openChunks asks a peer for fetches of neighbouring chunks. If a single one is asked for,
// the peer may send it as the registry has it, and the leaves first that readers wait for.
func (f *Fetcher) openChunks(r *request, route Route, p place, owner bool, group []*fetch) (io.ReadCloser, error) {
	var n, stored int64
	var first blockmap.LeafSet
	for _, ft := range group {
		n += p.stored(ft)
	}
	if ft := group[0]; len(r.fetches) == 1 {
		if c := &p.table.Chunks[ft.key.chunk]; int(c.Stored) < c.Size() {
			stored = int64(c.Stored)
		}
		first = f.wantedFirst(p, ft)
	}
	return route.OpenChunks(r.ctx, p.src.peer, owner, group[0].key.chunk, group[len(group)-1].key.chunk, n, stored, first)
}

// wantedFirst returns the leaves that readers wait for, with those between them, if they
// are a small part of the chunk. While a list is replayed there are none: all that is on
// the list is on its way, to all hosts that start the image, and a leaf that is sent twice
// delays it. In simulations of 100 hosts on links of 100 Mbit/s that made starts a fifth
// longer.
func (f *Fetcher) wantedFirst(p place, ft *fetch) blockmap.LeafSet {
	c := &p.table.Chunks[ft.key.chunk]
	f.mu.Lock()
	reads := ft.reads
	if !ft.demand || ft.by == nil || ft.by.replays.Load() > 0 {
		reads = 0
	}
	f.mu.Unlock()
	if reads == 0 {
		return 0
	}
	first, count, _ := span(c, reads&^ft.stream.Leaves(ft.key.chunk))
	if count > maxFirst || count*firstShare > c.Leaves() {
		return 0
	}
	return blockmap.LeafRange(first, count)
}

// keeper keeps a chunk as the registry has it, for peers. It was verified, and nobody
// changes its bytes any more.
type keeper func(stream blockmap.Digest, chunk int, stored []byte)

// Keep has keep called with each chunk that the origin brings, as the origin has it, once it
// is verified. The bytes are keep's, which keeps them for peers. Keep is called before the
// first fetch.
func (b *Bound) Keep(keep func(stream blockmap.Digest, chunk int, stored []byte)) { b.src.keep = keep }

// kept returns who keeps the bytes of a fetch, or nil if nobody does.
func (r *request) kept(ft *fetch) keeper {
	c := &r.place.table.Chunks[ft.key.chunk]
	if r.place.src.isPeer() && !r.form.stored || int(c.Stored) >= c.Size() {
		return nil
	}
	return r.place.src.keep
}

// readChunk reads the bytes of a fetch from a body, in the form that the place has it or
// that r.form says, and returns how many it has read. Leaves that come first are made
// resident at once. The caller gives p to f.buffers, or to a keeper.
func (f *Fetcher) readChunk(r *request, body io.Reader, ft *fetch) (p *[]byte, n int64, err error) {
	size := int(r.place.stored(ft))
	if r.form.stored {
		size = int(ft.chunkAt(r.place).Stored)
	}
	if r.kept(ft) != nil {
		b := make([]byte, size) // no larger than it has to be
		p = &b
	} else {
		p = f.buffer(size)
	}
	read := func(b []byte) (err error) {
		m, err := io.ReadFull(body, b)
		n += int64(m)
		return err
	}
	if r.form.first == 0 {
		err = read(*p)
	} else {
		err = f.readFirst(r, ft, *p, read)
	}
	if err != nil {
		f.buffers.Put(p)
		return nil, n, err
	}
	return p, n, nil
}

func (ft *fetch) chunkAt(p place) *blockmap.Chunk { return &p.table.Chunks[ft.key.chunk] }

// readFirst reads a chunk into p of which some leaves come first.
func (f *Fetcher) readFirst(r *request, ft *fetch, p []byte, read func([]byte) error) error {
	c := ft.chunkAt(r.place)
	first, count, e := span(c, r.form.first)
	digests := make([]byte, c.Leaves()*len(blockmap.Digest{}))
	if err := read(digests); err != nil {
		return err
	}
	digest := make([]blockmap.Digest, c.Leaves())
	for i := range digest {
		copy(digest[i][:], digests[i*len(digest[i]):])
	}
	list, err := blockmap.NewLeafList(c, digest)
	if err != nil {
		return fmt.Errorf("digests of leaves: %w", err)
	}
	part := &Part{Leaf: first, Count: count, Size: int(e.Len()), List: list}
	if !r.form.stored {
		if err := read(p[e.Start:e.End]); err != nil {
			return err
		}
		if err := f.keepFirst(r, ft, part, p[e.Start:e.End]); err != nil {
			return err
		}
		if err := read(p[:e.Start]); err != nil {
			return err
		}
		return read(p[e.End:])
	}
	leaves := f.buffer(int(e.Len()))
	defer f.buffers.Put(leaves)
	if err := read(*leaves); err != nil {
		return err
	}
	if err := f.keepFirst(r, ft, part, *leaves); err != nil {
		return err
	}
	return read(p)
}

// keepFirst makes leaves resident that have come before the rest of their chunk, and wakes
// the readers that need no more. If the cache cannot store them, the rest is read all the
// same.
func (f *Fetcher) keepFirst(r *request, ft *fetch, p *Part, content []byte) error {
	w := blockmap.Want{Stream: ft.stream, Table: r.place.table, Chunk: ft.key.chunk}
	if err := f.keepLeaves(w, p, content); err != nil {
		var unstored *storeError
		if errors.As(err, &unstored) {
			return nil
		}
		return err
	}
	f.mu.Lock()
	f.wantRest(ft)
	f.mu.Unlock()
	f.leavesCame(ft.key, p.leaves())
	return nil
}

// wantRest makes the rest of a chunk wanted as a prediction, when the readers of its first
// leaves are about to leave. f.mu is held.
func (f *Fetcher) wantRest(ft *fetch) {
	b := ft.by
	if ft.state == ended || b == nil || ft.wanted > 0 || len(b.hints) >= maxHints {
		return
	}
	ft.need = ft.chunk().All()
	ft.wanted, ft.rank, ft.hint = 1, predicted, b
	b.hints[ft] = struct{}{}
}
