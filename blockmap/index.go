package blockmap

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"math"
	"slices"
	"sort"
)

// Digest is a SHA-256.
type Digest [sha256.Size]byte

func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// ParseDigest reads what String writes.
func ParseDigest(s string) (d Digest, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(d) {
		return d, fmt.Errorf("%q is not the hex of a SHA-256", s)
	}
	return Digest(b), nil
}

// Index says what a device is made of. It does not change once it is decoded or
// sealed.
//
// Its format on disk and in the registry follows. Integers are little-endian;
// numbers in the body are unsigned varints unless they are marked as signed:
//
//	 0  8  magic "thawindx"
//	 8  4  version, 2
//	12  4  length of the body in bytes
//	16  4  CRC-32C of bytes 0 to 15 and of the body
//	20     the body:
//	       blocks of the device
//	       number of streams; for each
//	           32 bytes: SHA-256 of its blob; length of the blob
//	           number of chunks; for each
//	               blocks; bytes skipped in the blob before it; bytes in the blob
//	           for each chunk 32 bytes: its digest, see ListDigest
//	       number of runs; for each
//	           blocks skipped on the device since the end of the run before
//	           stream
//	           signed: first block in the stream, less the end of the
//	               stream's run before
//	           blocks
//
// A run of neighbouring files takes about 5 bytes, a chunk about 37.
type Index struct {
	Blocks  uint32 // size of the device in blocks
	Streams []Table
	Runs    []Run // sorted by Device, disjoint

	shift uint8    // log2 of the blocks of a slot
	slots []uint32 // slots[i]: the first run that ends behind block i<<shift
}

// Run maps Count consecutive device blocks to consecutive blocks of one
// stream. Device blocks that no run covers read as zeros.
type Run struct {
	Device uint32 // first block on the device
	Stream uint32 // position in Index.Streams
	Block  uint32 // first block in the stream
	Count  uint32
}

// Table is the chunk table of one stream.
type Table struct {
	Blob     Digest  // of the blob that holds the compressed chunks
	BlobSize int64   // in bytes
	Chunks   []Chunk // in stream order, without gaps

	slots []uint32 // slots[i]: the chunk that holds block i<<slotShift
}

// Chunk is one line of a Table: the unit of fetching.
type Chunk struct {
	Digest Digest // of the content, by way of its leaves: see ListDigest
	Offset int64  // of the compressed bytes in the blob
	Stored uint32 // length of the compressed bytes
	Block  uint32 // first block in the stream
	Count  uint32 // blocks
}

// Size is the length of the chunk's content in bytes.
func (c *Chunk) Size() int { return int(c.Count) * BlockSize }

// Limits of the format. With them a hostile index takes no more memory than an
// honest index of the same length.
const (
	MaxChunkBlocks = 1024 // 4 MiB
	// MaxStreams bounds the streams of an index: each takes descriptors when it is
	// read. Container runtimes hardly run images of more than 127 layers.
	MaxStreams = 1024

	indexMagic   = "thawindx"
	indexVersion = 2
	indexHeader  = 20

	// With one slot for 256 blocks (1 MiB) a search looks at a few records.
	slotShift = 8
	// slotsARun bounds the slots of an index that has few runs in a large device:
	// otherwise a few bytes could claim any number of slots.
	slotsARun, leastSlots = 4, 64
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// storedLimit is the largest size of n bytes after compression: a zstd frame of
// raw blocks, with room to spare.
func storedLimit(n int) uint64 { return uint64(n) + uint64(n)>>6 + 512 }

// ID names the stream by its content: equal streams have equal IDs, however
// their blobs were compressed.
func (t *Table) ID() Digest {
	h := sha256.New()
	h.Write([]byte("thaw stream 2\n"))
	var n [4]byte
	for i := range t.Chunks {
		binary.LittleEndian.PutUint32(n[:], t.Chunks[i].Count)
		h.Write(n[:])
		h.Write(t.Chunks[i].Digest[:])
	}
	return Digest(h.Sum(nil))
}

// Blocks is the length of the stream.
func (t *Table) Blocks() uint32 {
	if len(t.Chunks) == 0 {
		return 0
	}
	c := &t.Chunks[len(t.Chunks)-1]
	return c.Block + c.Count
}

// Find is the position in Chunks of the chunk that holds block.
func (t *Table) Find(block uint32) int {
	i := int(t.slots[block>>slotShift])
	for t.Chunks[i].Block+t.Chunks[i].Count <= block {
		i++
	}
	return i
}

func (t *Table) seal() {
	n := t.Blocks()
	t.slots = make([]uint32, 0, n>>slotShift+1)
	i := 0
	for b := uint32(0); b < n; b += 1 << slotShift {
		for t.Chunks[i].Block+t.Chunks[i].Count <= b {
			i++
		}
		t.slots = append(t.slots, uint32(i))
		if b > math.MaxUint32-(1<<slotShift) {
			break
		}
	}
}

// Seal sorts the runs, merges neighbours and makes the index ready for look-ups,
// or says what is wrong with it. Code that builds an index calls it once.
func (ix *Index) Seal() error {
	slices.SortFunc(ix.Runs, func(a, b Run) int { return cmp.Compare(a.Device, b.Device) })
	merged := ix.Runs[:0]
	for _, r := range ix.Runs {
		if n := len(merged); n > 0 {
			p := &merged[n-1]
			if p.Stream == r.Stream && p.Device+p.Count == r.Device && p.Block+p.Count == r.Block {
				p.Count += r.Count
				continue
			}
		}
		merged = append(merged, r)
	}
	ix.Runs = merged
	checked, err := DecodeIndex(ix.Encode())
	if err != nil {
		return fmt.Errorf("seal the index: it cannot be read back: %w", err)
	}
	*ix = *checked
	return nil
}

// after is the position of the first run that ends behind block.
func (ix *Index) after(block uint32) int {
	s := block >> ix.shift
	lo, hi := int(ix.slots[s]), len(ix.Runs)
	if int(s)+1 < len(ix.slots) {
		hi = min(hi, int(ix.slots[s+1])+1)
	}
	return lo + sort.Search(hi-lo, func(i int) bool {
		r := &ix.Runs[lo+i]
		return uint64(r.Device)+uint64(r.Count) > uint64(block)
	})
}

// Lookup returns the run that holds a block of the device. Where no run does it
// returns false, and the hole that holds the block in the form of a run.
func (ix *Index) Lookup(block uint32) (Run, bool) {
	i := ix.after(block)
	if i < len(ix.Runs) && ix.Runs[i].Device <= block {
		return ix.Runs[i], true
	}
	hole := Run{Count: ix.Blocks}
	if i > 0 {
		hole.Device = ix.Runs[i-1].Device + ix.Runs[i-1].Count
	}
	if i < len(ix.Runs) {
		hole.Count = ix.Runs[i].Device
	}
	hole.Count -= hole.Device
	return hole, false
}

func (ix *Index) seal() {
	n := uint64(ix.Blocks)
	ix.shift = slotShift
	for n>>ix.shift > uint64(slotsARun*len(ix.Runs)+leastSlots) {
		ix.shift++
	}
	ix.slots = make([]uint32, 0, n>>ix.shift+1)
	i := 0
	for b := uint64(0); b < n; b += 1 << ix.shift {
		for i < len(ix.Runs) && uint64(ix.Runs[i].Device)+uint64(ix.Runs[i].Count) <= b {
			i++
		}
		ix.slots = append(ix.slots, uint32(i))
	}
	for i := range ix.Streams {
		ix.Streams[i].seal()
	}
}

// Encode writes the index in its format.
func (ix *Index) Encode() []byte {
	b := make([]byte, indexHeader, indexHeader+64)
	copy(b, indexMagic)
	binary.LittleEndian.PutUint32(b[8:], indexVersion)
	b = binary.AppendUvarint(b, uint64(ix.Blocks))
	b = binary.AppendUvarint(b, uint64(len(ix.Streams)))
	for i := range ix.Streams {
		b = ix.Streams[i].Append(b)
	}
	b = binary.AppendUvarint(b, uint64(len(ix.Runs)))
	last := make([]uint32, len(ix.Streams))
	var end uint32
	for _, r := range ix.Runs {
		b = binary.AppendUvarint(b, uint64(r.Device-end))
		b = binary.AppendUvarint(b, uint64(r.Stream))
		b = binary.AppendVarint(b, int64(r.Block)-int64(last[r.Stream]))
		b = binary.AppendUvarint(b, uint64(r.Count))
		end, last[r.Stream] = r.Device+r.Count, r.Block+r.Count
	}
	binary.LittleEndian.PutUint32(b[12:], uint32(len(b)-indexHeader))
	binary.LittleEndian.PutUint32(b[16:], indexSum(b))
	return b
}

func indexSum(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:16], castagnoli), castagnoli, b[indexHeader:])
}

// Append adds the table in the format that it has within an Index.
func (t *Table) Append(b []byte) []byte {
	b = append(b, t.Blob[:]...)
	b = binary.AppendUvarint(b, uint64(t.BlobSize))
	b = binary.AppendUvarint(b, uint64(len(t.Chunks)))
	var end int64
	for i := range t.Chunks {
		c := &t.Chunks[i]
		b = binary.AppendUvarint(b, uint64(c.Count))
		b = binary.AppendUvarint(b, uint64(c.Offset-end))
		b = binary.AppendUvarint(b, uint64(c.Stored))
		end = c.Offset + int64(c.Stored)
	}
	for i := range t.Chunks {
		b = append(b, t.Chunks[i].Digest[:]...)
	}
	return b
}

// DecodeIndex reads an index without trusting it: every offset, count and length
// is checked before it is used or allocated for. It fails with ErrCorrupt, and
// allocates at most about eight bytes for each byte of b. The index has at least
// one block and at least one stream.
func DecodeIndex(b []byte) (*Index, error) {
	if len(b) < indexHeader || string(b[:8]) != indexMagic {
		return nil, fmt.Errorf("%w: not a thaw index", ErrCorrupt)
	}
	switch v := binary.LittleEndian.Uint32(b[8:]); {
	case v > 0 && v < indexVersion:
		return nil, fmt.Errorf("%w: the index has version %d, and this thaw reads version %d: build the block image again with thaw build", ErrCorrupt, v, indexVersion)
	case v != indexVersion:
		return nil, fmt.Errorf("%w: the index has version %d, and this thaw reads version %d: a later thaw may read it", ErrCorrupt, v, indexVersion)
	}
	if n := binary.LittleEndian.Uint32(b[12:]); int64(n) != int64(len(b)-indexHeader) {
		return nil, fmt.Errorf("%w: the body of the index has %d bytes, and its header says %d", ErrCorrupt, len(b)-indexHeader, n)
	}
	if indexSum(b) != binary.LittleEndian.Uint32(b[16:]) {
		return nil, fmt.Errorf("%w: the index does not match its checksum", ErrCorrupt)
	}
	d := NewDecoder(b[indexHeader:])
	ix := &Index{Blocks: uint32(d.Uvarint(math.MaxUint32))}
	const leastTable, leastRun = 32 + 2, 4
	n := d.Count(leastTable)
	if d.Err() == nil && ix.Blocks == 0 {
		d.Fail("the device has no blocks")
	}
	if d.Err() == nil && (n == 0 || n > MaxStreams) {
		d.Fail("%d streams; 1 to %d are allowed", n, MaxStreams)
		n = 0
	}
	ix.Streams = make([]Table, n)
	for i := range ix.Streams {
		DecodeTable(d, &ix.Streams[i])
	}
	ix.Runs = make([]Run, d.Count(leastRun))
	last := make([]uint32, n)
	var end uint64
	for i := range ix.Runs {
		dev := end + d.Uvarint(math.MaxUint32)
		s := uint32(d.Uvarint(MaxStreams))
		if d.Err() == nil && int(s) >= n {
			d.Fail("run %d is in stream %d, and there are %d", i, s, n)
		}
		if d.Err() != nil {
			break
		}
		// The sum may wrap. The check below finds a start outside the stream.
		block := uint64(int64(last[s]) + d.Varint())
		count := d.Uvarint(math.MaxUint32)
		end = dev + count
		size := uint64(ix.Streams[s].Blocks())
		switch {
		case d.Err() != nil:
		case count == 0:
			d.Fail("run %d is empty", i)
		case end > uint64(ix.Blocks):
			d.Fail("run %d ends at block %d of a device of %d", i, end, ix.Blocks)
		case block >= size || count > size-block:
			d.Fail("run %d has blocks %d+%d of stream %d, which has %d", i, block, count, s, size)
		}
		ix.Runs[i] = Run{uint32(dev), s, uint32(block), uint32(count)}
		last[s] = uint32(block + count)
	}
	d.End()
	if d.Err() != nil {
		return nil, fmt.Errorf("index: %w", d.Err())
	}
	ix.seal()
	return ix, nil
}

// DecodeTable reads what Append wrote. A failure is in d.Err.
func DecodeTable(d *Decoder, t *Table) {
	t.Blob = d.Digest()
	t.BlobSize = int64(d.Uvarint(math.MaxInt64))
	const leastChunk = 3 + 32
	t.Chunks = make([]Chunk, d.Count(leastChunk))
	var block uint64
	var off int64
	for i := range t.Chunks {
		c := &t.Chunks[i]
		c.Count = uint32(d.Uvarint(MaxChunkBlocks))
		skip := int64(d.Uvarint(uint64(t.BlobSize)))
		c.Stored = uint32(d.Uvarint(storedLimit(c.Size())))
		if d.Err() != nil {
			break
		}
		c.Block = uint32(block)
		block += uint64(c.Count)
		switch {
		case c.Count == 0:
			d.Fail("chunk %d is empty", i)
		case block > math.MaxUint32:
			d.Fail("chunk %d ends at block %d", i, block)
		case skip > t.BlobSize-off || int64(c.Stored) > t.BlobSize-off-skip:
			d.Fail("chunk %d lies beyond the end of its blob", i)
		}
		c.Offset = off + skip
		off = c.Offset + int64(c.Stored)
	}
	for i := range t.Chunks {
		t.Chunks[i].Digest = d.Digest()
	}
	if d.Err() != nil {
		t.Chunks = nil
		return
	}
	t.seal()
}
