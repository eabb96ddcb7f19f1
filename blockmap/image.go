package blockmap

import (
	"context"
	"fmt"
)

// Image is the Device of a block image: its Index laid over the streams of a Cache,
// with a fetcher for absent chunks.
//
// This is the way of a read. A transport calls View for an extent. The index says which
// runs of streams make up the extent. Each stream returns a slice of its mapping if all
// blocks of the run are resident and in memory: that takes a search, a pin and a few bits,
// no lock and no copy. See pageCache for how it is known what is in memory.
//
// If View refuses, the transport calls LoadAsync, or Read on a goroutine that may wait.
// For what is resident, a load pins the chunks and reads them to buffers, many loads at
// once: see diskReads. A load of what is absent refuses, and Read calls Fault. Fault
// collects the missing chunks and passes them to the fetcher together, so that neighbours
// become one request. It returns when all of them have been verified and stored.
type Image struct {
	ix      *Index
	streams []*Stream
	fetch   fetcher
}

// Want names a chunk to fetch: the stream that lacks it or a part of it, and the table
// that says where in which blob it lies. (Streams of equal content are one stream, but
// their blobs may be compressed differently.)
type Want struct {
	Stream *Stream
	Table  *Table
	Chunk  int
	// Leaves are the leaves of the chunk that are needed; 0 means all of them.
	Leaves LeafSet
}

// Needs is the set of leaves that are needed.
func (w Want) Needs() LeafSet {
	if w.Leaves == 0 {
		return w.Table.Chunks[w.Chunk].All()
	}
	return w.Leaves
}

// Absent is how many bytes of the chunk are to be stored if it is fetched: those of all of
// its leaves that are not resident, needed or not.
func (w Want) Absent() (bytes int64) {
	c := &w.Table.Chunks[w.Chunk]
	for leaf := range (c.All() &^ w.Stream.Leaves(w.Chunk)).Each {
		bytes += int64(c.LeafSize(leaf))
	}
	return bytes
}

// Here says whether all that is needed can be viewed.
func (w Want) Here() bool {
	if w.Leaves == 0 {
		return w.Stream.Has(w.Chunk)
	}
	return w.Stream.HasLeaves(w.Chunk, w.Leaves)
}

// fetcher fetches chunks into their streams.
type fetcher interface {
	// Fetch returns when the leaves that wants need are resident, or fails with the
	// first cause. It may make the rest of their chunks resident as well. Prefetch
	// returns at once, and its chunks are fetched behind those of every Fetch.
	Fetch(ctx context.Context, wants []Want) error
	Prefetch(wants []Want)
}

// NewImage makes the device with index ix on the streams of c, which it holds until
// Close. f fetches the chunks that are read and absent.
func NewImage(ix *Index, c *Cache, f fetcher) (*Image, error) {
	m := &Image{ix: ix, fetch: f}
	for i := range ix.Streams {
		s, err := c.Stream(&ix.Streams[i])
		if err != nil {
			m.Close()
			return nil, err
		}
		m.streams = append(m.streams, s)
	}
	return m, nil
}

// Close releases the streams. The caller no longer uses the image, and holds no view
// of it.
func (m *Image) Close() {
	for _, s := range m.streams {
		s.Release()
	}
}

// Stream returns the stream that t, a table of the image's index, describes.
func (m *Image) Stream(t *Table) (*Stream, error) {
	for i := range m.ix.Streams {
		if &m.ix.Streams[i] == t {
			return m.streams[i], nil
		}
	}
	return nil, fmt.Errorf("%w: the stream is not one of the image", ErrCorrupt)
}

// Size implements Device.
func (m *Image) Size() int64 { return int64(m.ix.Blocks) * BlockSize }

// Index returns the index of the image. The caller must not change it.
func (m *Image) Index() *Index { return m.ix }

// View implements Device.
func (m *Image) View(e Extent) (v View, ok bool) {
	if e.Check(m.Size()) != nil {
		return View{}, false
	}
	for p := range m.pieces(e) {
		if p.stream < 0 {
			v.AppendZeros(p.n)
		} else if !m.streams[p.stream].view(&v, p.off, p.n) {
			v.Release()
			return View{}, false
		}
	}
	return v, true
}

// Load implements Device.
func (m *Image) Load(ctx context.Context, e Extent) (v View, ok bool) {
	if l := m.load(e); l != nil {
		return l.wait(ctx)
	}
	return View{}, false
}

// LoadAsync implements AsyncDevice.
func (m *Image) LoadAsync(e Extent, done func(v View, ok bool)) {
	if l := m.load(e); l != nil {
		l.begin(done)
		return
	}
	done(View{}, false)
}

// load prepares the load of e. It returns nil unless all of e is resident.
func (m *Image) load(e Extent) *load {
	if e.Check(m.Size()) != nil {
		return nil
	}
	l := new(load)
	for p := range m.pieces(e) {
		if p.stream < 0 {
			l.view.AppendZeros(p.n)
		} else if !m.streams[p.stream].addTo(l, p.off, p.n) {
			l.drop()
			return nil
		}
	}
	return l
}

// Fault implements Device.
func (m *Image) Fault(ctx context.Context, e Extent) error {
	if err := e.Check(m.Size()); err != nil {
		return err
	}
	for p := range m.pieces(e) {
		if p.stream >= 0 {
			// Where it fails, the chunks of the stream count as missing for a
			// while, and are fetched into memory.
			_ = m.streams[p.stream].prepare()
		}
	}
	missing := m.Missing(e)
	if len(missing) == 0 {
		return ctx.Err()
	}
	if err := m.fetch.Fetch(ctx, missing); err != nil {
		return fmt.Errorf("fetch bytes %v: %w", e, err)
	}
	return nil
}

// Prefetch implements Device.
func (m *Image) Prefetch(e Extent) {
	m.fetch.Prefetch(m.Missing(e))
}

// MissingStream lists the chunks of a stream of the index that are not resident.
func (m *Image) MissingStream(stream int) (wants []Want) {
	s, t := m.streams[stream], &m.ix.Streams[stream]
	for i := range t.Chunks {
		if !s.Has(i) {
			wants = append(wants, Want{Stream: s, Table: t, Chunk: i})
		}
	}
	return wants
}

// Missing lists the chunks with blocks of e that are not resident, and which of their
// leaves have these blocks. It lists none for an extent that is not within the device.
func (m *Image) Missing(e Extent) (wants []Want) {
	if e.Check(m.Size()) != nil {
		return nil
	}
	for p := range m.pieces(e) {
		if p.stream < 0 {
			continue
		}
		s, t := m.streams[p.stream], &m.ix.Streams[p.stream]
		first, last := uint32(p.off/BlockSize), uint32((p.off+p.n-1)/BlockSize)
		for i := t.Find(first); i < len(t.Chunks) && t.Chunks[i].Block <= last; i++ {
			if leaves := s.lacks(i, first, last); leaves != 0 {
				wants = append(wants, Want{s, t, i, leaves})
			}
		}
	}
	return wants
}

// Status implements Device.
func (m *Image) Status(e Extent) Status {
	if e.Check(m.Size()) != nil {
		return Status{Extent: Extent{e.Start, e.Start}}
	}
	for p := range m.pieces(e) {
		if p.stream < 0 {
			return Status{Extent: Range(e.Start, p.n), Zero: true, Resident: true}
		}
		first := uint32(p.off / BlockSize)
		last := uint32((p.off + p.n - 1) / BlockSize)
		blocks, here := m.streams[p.stream].res.run(first, last-first+1)
		n := int64(first+blocks)*BlockSize - p.off
		return Status{Extent: Range(e.Start, min(n, p.n)), Resident: here}
	}
	return Status{Extent: e}
}

// piece is a part of an extent: n bytes at off of one stream, or a hole where stream
// is negative.
type piece struct {
	stream int
	off, n int64
}

// pieces walks the parts of e in order.
func (m *Image) pieces(e Extent) func(yield func(piece) bool) {
	return func(yield func(piece) bool) {
		if e.Len() == 0 {
			return
		}
		runs := m.ix.Runs
		i := m.ix.after(uint32(e.Start / BlockSize))
		for at := e.Start; at < e.End; i++ {
			if i == len(runs) {
				yield(piece{-1, 0, e.End - at})
				return
			}
			r := &runs[i]
			start := int64(r.Device) * BlockSize
			end := start + int64(r.Count)*BlockSize
			if start > at {
				n := min(start, e.End) - at
				if !yield(piece{-1, 0, n}) {
					return
				}
				at += n
			}
			if at < e.End {
				n := min(end, e.End) - at
				if !yield(piece{int(r.Stream), int64(r.Block)*BlockSize + at - start, n}) {
					return
				}
				at += n
			}
		}
	}
}
