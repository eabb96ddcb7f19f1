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
// resident at once. If awaited is set, the chunk is decompressed and verified while it
// arrives. The caller gives p to f.buffers, or to a keeper, and calls release of the frame.
func (f *Fetcher) readChunk(r *request, body io.Reader, ft *fetch, awaited bool) (p *[]byte, fr frame, n int64, err error) {
	c := ft.chunkAt(r.place)
	plain := r.place.src.isPeer() && !r.form.stored
	size := int(r.place.stored(ft))
	if r.form.stored {
		size = int(c.Stored)
	}
	if r.kept(ft) != nil {
		b := make([]byte, size) // no larger than it has to be
		p = &b
	} else {
		p = f.buffer(size)
	}
	in := &inbound{decoder: f.chunkDecoder, body: body, p: *p}
	fr = frame{f: f, stored: *p}
	if plain {
		fr.content = *p
		if awaited && size == c.Size() {
			in.arriving = blockmap.NewArriving(c, *p)
		}
	} else if awaited {
		fr.buf = f.buffer(c.Size())
		in.frame = blockmap.NewArriving(c, *fr.buf)
	}
	if r.form.first == 0 {
		err = in.rest()
	} else {
		err = f.readFirst(r, ft, in)
	}
	if err != nil {
		fr.release()
		f.buffers.Put(p)
		return nil, frame{}, in.n, err
	}
	fr.arriving = in.arriving
	if in.frame != nil {
		fr.arriving, fr.content = in.frame, in.frame.Content
	}
	return p, fr, in.n, nil
}

// inbound is the bytes of a chunk that arrive in p.
type inbound struct {
	decoder *blockmap.ChunkDecoder
	body    io.Reader
	n       int64 // read of body
	p       []byte
	// At most one of these is not nil: the content is p, or p is its frame.
	arriving, frame *blockmap.Arriving

	have, used int // of a frame: bytes of p that have come, and that were decompressed
}

// read fills b.
func (in *inbound) read(b []byte) error {
	m, err := io.ReadFull(in.body, b)
	in.n += int64(m)
	return err
}

// upTo reads the content from a byte on to another one.
func (in *inbound) upTo(from, to int) error {
	for from < to {
		m, err := in.body.Read(in.p[from:to])
		in.n += int64(m)
		from += m
		if in.arriving != nil {
			in.arriving.Came(from)
		}
		if err != nil && from < to {
			return err
		}
	}
	return nil
}

// rest reads all of p.
func (in *inbound) rest() error {
	if in.frame == nil {
		return in.upTo(0, len(in.p))
	}
	err := in.decoder.DecompressArriving(in, in.frame)
	if errors.Is(err, blockmap.ErrDigest) {
		// Whoever decompresses all of it finds that out, too.
		in.frame = nil
		return in.upTo(in.have, len(in.p))
	}
	return err
}

// Read gives the frame to its decoder.
func (in *inbound) Read(b []byte) (int, error) {
	if in.used == in.have {
		if in.have == len(in.p) {
			return 0, io.EOF
		}
		m, err := in.body.Read(in.p[in.have:])
		in.n += int64(m)
		if in.have += m; m == 0 {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
	}
	m := copy(b, in.p[in.used:in.have])
	in.used += m
	return m, nil
}

func (ft *fetch) chunkAt(p place) *blockmap.Chunk { return &p.table.Chunks[ft.key.chunk] }

// readFirst reads a chunk of which some leaves come first.
func (f *Fetcher) readFirst(r *request, ft *fetch, in *inbound) error {
	c := ft.chunkAt(r.place)
	first, count, e := span(c, r.form.first)
	digests := make([]byte, c.Leaves()*len(blockmap.Digest{}))
	if err := in.read(digests); err != nil {
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
		if err := in.read(in.p[e.Start:e.End]); err != nil {
			return err
		}
		if err := f.keepFirst(r, ft, part, in.p[e.Start:e.End]); err != nil {
			return err
		}
		if err := in.upTo(0, int(e.Start)); err != nil {
			return err
		}
		return in.upTo(int(e.End), len(in.p))
	}
	leaves := f.buffer(int(e.Len()))
	defer f.buffers.Put(leaves)
	if err := in.read(*leaves); err != nil {
		return err
	}
	if err := f.keepFirst(r, ft, part, *leaves); err != nil {
		return err
	}
	return in.rest()
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
