package blockmap

import "fmt"

// This file is the part of a Stream that knows chunks of which only some leaves are
// resident: a bundle brings the leaves that a start reads, and no others. All that is
// resident of a chunk can be viewed, block by block.

// leavesOf is the set of leaves that have blocks first to last of the stream, as far as
// they lie in the chunk.
func (c *Chunk) leavesOf(first, last uint32) LeafSet {
	first, last = max(first, c.Block), min(last, c.Block+c.Count-1)
	if first > last {
		return 0
	}
	from, to := int(first-c.Block)/LeafBlocks, int(last-c.Block)/LeafBlocks
	return LeafRange(from, to-from+1)
}

// Leaves is the set of leaves of chunk i that can be viewed as a whole: they are on disk,
// or held in memory.
func (s *Stream) Leaves(i int) (leaves LeafSet) {
	c := &s.table.Chunks[i]
	if s.usable() {
		leaves = s.onDisk(c, c.All())
	}
	return leaves | s.store.held.leaves(chunkRef{s, i})
}

// onDisk is the set of those of leaves that are on disk.
func (s *Stream) onDisk(c *Chunk, leaves LeafSet) (here LeafSet) {
	for l := range leaves.Each {
		if s.res.has(c.leafBlocks(l)) {
			here |= LeafRange(l, 1)
		}
	}
	return here
}

// HasLeaves says whether these leaves of chunk i can be viewed.
func (s *Stream) HasLeaves(i int, leaves LeafSet) bool {
	return s.usable() && s.onDisk(&s.table.Chunks[i], leaves) == leaves || s.store.held.any() && s.Leaves(i).Contains(leaves)
}

// lacks is the set of leaves of chunk i that have blocks, of first to last, which cannot be
// viewed.
func (s *Stream) lacks(i int, first, last uint32) (leaves LeafSet) {
	c := &s.table.Chunks[i]
	first, last = max(first, c.Block), min(last, c.Block+c.Count-1)
	if s.usable() {
		if s.res.has(first, last-first+1) {
			return 0
		}
		for b := first; b <= last; {
			n, resident := s.res.run(b, last-b+1)
			if !resident {
				leaves |= c.leavesOf(b, b+n-1)
			}
			b += n
		}
	} else {
		leaves = c.leavesOf(first, last)
	}
	return leaves &^ s.store.held.leaves(chunkRef{s, i})
}

// FillLeaves verifies that p is the content of count leaves of chunk i, from leaf first
// on, and stores what is absent of it. Leaves that are resident are not looked at. It
// fails as Fill does.
func (s *Stream) FillLeaves(i int, list *LeafList, first, count int, p []byte) error {
	c := &s.table.Chunks[i]
	absent, err := s.checkLeaves(i, list, first, count, p)
	if err != nil {
		return err
	}
	for l := first; l < first+count; l++ {
		n := 0
		for ; absent.Has(l + n); n++ {
		}
		if n == 0 {
			continue
		}
		// Only what was verified: a leaf that was resident may be evicted by now.
		b, _ := c.leafBlocks(l)
		at := (l - first) * LeafSize
		if err := s.fill(i, b, p[at:at+c.leavesSize(l, n)]); err != nil {
			return err
		}
		l += n
	}
	return nil
}

// HoldLeaves is Hold for leaves, which it verifies as FillLeaves does.
func (s *Stream) HoldLeaves(i int, list *LeafList, first, count int, p []byte) error {
	absent, err := s.checkLeaves(i, list, first, count, p)
	if err != nil {
		return err
	}
	for l := range absent.Each {
		at := (l - first) * LeafSize
		s.store.held.put(chunkRef{s, i}, l, p[at:at+s.table.Chunks[i].LeafSize(l)])
	}
	return nil
}

// checkLeaves verifies those of count leaves of chunk i, from leaf first on, that are
// absent, and returns which these are. p is the content of them all.
func (s *Stream) checkLeaves(i int, list *LeafList, first, count int, p []byte) (absent LeafSet, err error) {
	c := &s.table.Chunks[i]
	if first < 0 || count <= 0 || first+count > c.Leaves() || len(p) != c.leavesSize(first, count) {
		return 0, fmt.Errorf("leaves %d+%d of chunk %d of stream %.12s: %w", first, count, i, s.id, ErrDigest)
	}
	absent = LeafRange(first, count) &^ s.Leaves(i)
	for l := range absent.Each {
		at := (l - first) * LeafSize
		if err := c.VerifyLeaf(list, l, p[at:at+c.LeafSize(l)]); err != nil {
			return 0, fmt.Errorf("leaf %d of chunk %d of stream %.12s: %w", l, i, s.id, err)
		}
	}
	return absent, nil
}

// ReadChunk reads chunk i into p, which has its size, and says whether all of it was
// resident.
func (s *Stream) ReadChunk(i int, p []byte) bool {
	return s.Has(i) && s.copyTo(p, int64(s.table.Chunks[i].Block)*BlockSize)
}

// copyTo fills p with the bytes from off, and says whether all of them were resident. It
// may wait for the disk.
func (s *Stream) copyTo(p []byte, off int64) bool {
	if s.prepare() != nil {
		return false
	}
	var l load
	if !s.addTo(&l, off, int64(len(p))) {
		l.drop()
		return false
	}
	v, ok := l.readHere() // no client waits for a copy within the cache
	if !ok {
		return false
	}
	defer v.Release()
	return v.CopyTo(p) == nil
}

// leavesSize is the length of count leaves from leaf first on, in bytes.
func (c *Chunk) leavesSize(first, count int) int {
	return min((first+count)*LeafSize, c.Size()) - first*LeafSize
}

// FillLeavesLocal fills those of leaves of chunk i that are absent with copies from other
// places of the cache that have the same content, and returns what is resident of leaves
// then. Unlike FillLocal it copies from chunks that are resident in part.
func (s *Stream) FillLeavesLocal(i int, list *LeafList, leaves LeafSet) LeafSet {
	c := &s.table.Chunks[i]
	var p []byte
	for _, x := range s.store.holders(c.Digest) {
		absent := leaves &^ s.Leaves(i)
		if absent == 0 {
			break
		}
		o := &x.stream.table.Chunks[x.chunk]
		if x.stream == s && x.chunk == i || o.Count != c.Count {
			continue
		}
		for l := range (absent & x.stream.Leaves(x.chunk)).Each {
			size := c.LeafSize(l)
			if p == nil {
				p = make([]byte, LeafSize)
			}
			if x.stream.copyTo(p[:size], int64(o.Block)*BlockSize+int64(l)*LeafSize) {
				_ = s.FillLeaves(i, list, l, 1, p[:size]) // where it fails, the leaf is fetched
			}
		}
	}
	return leaves & s.Leaves(i)
}
