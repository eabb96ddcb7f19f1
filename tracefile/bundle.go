package tracefile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"thaw/blockmap"
)

// Bundle is the head of a bundle: one blob with the leaves of a plan in the order of the
// plan, so that a start is one sequential download of what it reads. Leaves are named by
// the digest of their chunk and their position in it: the head alone says every place that
// a leaf belongs to, in this image or in another, and whether its content is right.
//
// The blob is a valid zstd file whose content is that of the leaves. Its head
// is a skippable frame (RFC 8878, section 3.1.2); integers are little-endian,
// numbers in the body unsigned varints:
//
//	 0  4  0x184D2A5B
//	 4  4  length of the rest of the head
//	 8  8  magic "thawbndl"
//	16  4  version, 2
//	20  4  CRC-32C of the body
//	24     the body:
//	       number of chunks; for each
//	           its blocks; 32 bytes: its digest
//	       number of frames; for each
//	           bytes of the frame
//	           number of parts; for each
//	               chunk, as its position in the list above; first leaf; number of leaves
//	       for each chunk, unless one part has all of its leaves,
//	           for each of its leaves 32 bytes: its SHA-256
//	..     the zstd frames
//
// The content of a frame is that of its parts, one after the other. A leaf is in one
// part at most. A chunk that one part has all of is verified by its own digest.
type Bundle struct {
	Chunks []BundleChunk
	Frames []Frame
}

// BundleChunk is a chunk of which a Bundle has leaves.
type BundleChunk struct {
	Digest blockmap.Digest
	Blocks uint32
	List   *blockmap.LeafList // nil if one part has all leaves
}

// Frame is one zstd frame of a Bundle.
type Frame struct {
	Stored uint32 // bytes of the frame
	Parts  []Part
}

// Part is consecutive leaves of one chunk.
type Part struct {
	Chunk int // position in Bundle.Chunks
	Leaf  int // the first one
	Count int
}

const (
	bundleFrame   = 0x184D2A5B
	bundleMagic   = "thawbndl"
	bundleVersion = 2
	bundleHead    = 24

	// maxBundleHead bounds a head: some 400,000 leaves.
	maxBundleHead = 16 << 20
	// maxContent is the most content that a frame has, and maxStored the most that it
	// takes: raw blocks in a zstd frame.
	maxContent = blockmap.MaxChunkBlocks * blockmap.BlockSize
	maxStored  = maxContent + 1<<17
)

func (c *BundleChunk) chunk() *blockmap.Chunk {
	return &blockmap.Chunk{Digest: c.Digest, Count: c.Blocks}
}

// PartSize is the length of the content of a part.
func (b *Bundle) PartSize(p Part) int {
	c := b.Chunks[p.Chunk].chunk()
	return (p.Count-1)*blockmap.LeafSize + c.LeafSize(p.Leaf+p.Count-1)
}

// FrameSize is the length of the content of a frame.
func (b *Bundle) FrameSize(f *Frame) (n int) {
	for _, p := range f.Parts {
		n += b.PartSize(p)
	}
	return n
}

// Leaves is how many leaves the bundle has, and Size the length of their content.
func (b *Bundle) Leaves() (leaves int, size int64) {
	for i := range b.Frames {
		for _, p := range b.Frames[i].Parts {
			leaves += p.Count
			size += int64(b.PartSize(p))
		}
	}
	return leaves, size
}

// Stored is the length of all frames together.
func (b *Bundle) Stored() (n int64) {
	for i := range b.Frames {
		n += int64(b.Frames[i].Stored)
	}
	return n
}

// whole says whether a part has all leaves of its chunk.
func (b *Bundle) whole(p Part) bool { return p.Count == b.Chunks[p.Chunk].chunk().Leaves() }

// Head encodes the head. The first frame lies behind it.
func (b *Bundle) Head() []byte {
	body := binary.AppendUvarint(nil, uint64(len(b.Chunks)))
	for i := range b.Chunks {
		body = binary.AppendUvarint(body, uint64(b.Chunks[i].Blocks))
		body = append(body, b.Chunks[i].Digest[:]...)
	}
	body = binary.AppendUvarint(body, uint64(len(b.Frames)))
	for i := range b.Frames {
		body = binary.AppendUvarint(body, uint64(b.Frames[i].Stored))
		body = binary.AppendUvarint(body, uint64(len(b.Frames[i].Parts)))
		for _, p := range b.Frames[i].Parts {
			body = binary.AppendUvarint(body, uint64(p.Chunk))
			body = binary.AppendUvarint(body, uint64(p.Leaf))
			body = binary.AppendUvarint(body, uint64(p.Count))
		}
	}
	for i := range b.Chunks {
		if l := b.Chunks[i].List; l != nil {
			for _, d := range l.Digests() {
				body = append(body, d[:]...)
			}
		}
	}
	head := binary.LittleEndian.AppendUint32(nil, bundleFrame)
	head = binary.LittleEndian.AppendUint32(head, uint32(bundleHead-8+len(body)))
	head = append(head, bundleMagic...)
	head = binary.LittleEndian.AppendUint32(head, bundleVersion)
	head = binary.LittleEndian.AppendUint32(head, crc32.Checksum(body, castagnoli))
	return append(head, body...)
}

// ReadBundle reads the head of a bundle and leaves r at the first frame. It
// fails with blockmap.ErrCorrupt where it is not one, and allocates no more
// than a few times what it has read.
func ReadBundle(r io.Reader) (*Bundle, error) {
	fail := func(format string, args ...any) (*Bundle, error) {
		return nil, fmt.Errorf("bundle: %w: %w", blockmap.ErrCorrupt, fmt.Errorf(format, args...))
	}
	var head [bundleHead]byte
	if _, err := io.ReadFull(r, head[:]); errors.Is(err, io.ErrUnexpectedEOF) || err == io.EOF {
		return fail("it ends within its head")
	} else if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	if binary.LittleEndian.Uint32(head[:]) != bundleFrame || string(head[8:16]) != bundleMagic {
		return fail("it is not one")
	}
	if v := binary.LittleEndian.Uint32(head[16:]); v != bundleVersion {
		return nil, fmt.Errorf("bundle: it has version %d, and this thaw reads version %d: pack it again with thaw trace pack", v, bundleVersion)
	}
	n := int64(binary.LittleEndian.Uint32(head[4:])) - (bundleHead - 8)
	if n < 1 || n > maxBundleHead {
		return fail("a head of %d bytes", n)
	}
	body, err := io.ReadAll(io.LimitReader(r, n))
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	if int64(len(body)) < n {
		return fail("it ends within its head")
	}
	if crc32.Checksum(body, castagnoli) != binary.LittleEndian.Uint32(head[20:]) {
		return fail("the checksum of its head does not match")
	}
	d := blockmap.NewDecoder(body)
	b := decodeBundle(d)
	d.End()
	if d.Err() != nil {
		return nil, fmt.Errorf("bundle: %w", d.Err())
	}
	return b, nil
}

// decodeBundle reads the body of a head. A failure is in d.Err.
func decodeBundle(d *blockmap.Decoder) *Bundle {
	const leastChunk, leastFrame, leastPart = 1 + 32, 2 + leastPartBytes, leastPartBytes
	b := &Bundle{Chunks: make([]BundleChunk, d.Count(leastChunk))}
	known := make(map[blockmap.Digest]bool, len(b.Chunks))
	for i := range b.Chunks {
		c := &b.Chunks[i]
		c.Blocks, c.Digest = uint32(d.Uvarint(blockmap.MaxChunkBlocks)), d.Digest()
		if c.Blocks == 0 {
			d.Fail("chunk %d is empty", i)
		}
		if known[c.Digest] {
			d.Fail("chunk %d is listed twice", i)
		}
		known[c.Digest] = true
	}
	b.Frames = make([]Frame, d.Count(leastFrame))
	leaves := make([]blockmap.LeafSet, len(b.Chunks))
	whole := make([]bool, len(b.Chunks))
	for i := range b.Frames {
		f := &b.Frames[i]
		f.Stored = uint32(d.Uvarint(maxStored))
		f.Parts = make([]Part, d.Count(leastPart))
		if len(f.Parts) == 0 {
			d.Fail("frame %d has nothing", i)
		}
		size := 0
		for j := range f.Parts {
			p := &f.Parts[j]
			p.Chunk = int(d.Uvarint(maxBundleHead))
			p.Leaf, p.Count = int(d.Uvarint(blockmap.MaxLeaves)), int(d.Uvarint(blockmap.MaxLeaves))
			if d.Err() != nil {
				return b
			}
			if p.Chunk >= len(b.Chunks) {
				d.Fail("frame %d has leaves of chunk %d, and there are %d", i, p.Chunk, len(b.Chunks))
				return b
			}
			all := b.Chunks[p.Chunk].chunk().Leaves()
			these := blockmap.LeafRange(p.Leaf, p.Count)
			switch {
			case p.Count == 0 || p.Leaf+p.Count > all:
				d.Fail("frame %d has leaves %d+%d of a chunk of %d", i, p.Leaf, p.Count, all)
				return b
			case leaves[p.Chunk]&these != 0:
				d.Fail("frame %d has leaves of chunk %d that are there already", i, p.Chunk)
			}
			leaves[p.Chunk] |= these
			whole[p.Chunk] = p.Count == all
			size += b.PartSize(*p)
		}
		if size > maxContent || int64(f.Stored) > int64(size)+1<<17 {
			d.Fail("frame %d has %d bytes for a content of %d", i, f.Stored, size)
		}
	}
	for i := range b.Chunks {
		if leaves[i] == 0 {
			d.Fail("no frame has leaves of chunk %d", i)
		}
		c := b.Chunks[i].chunk()
		if whole[i] || d.Err() != nil {
			continue
		}
		if d.Len() < c.Leaves()*len(blockmap.Digest{}) {
			d.Fail("the list of the leaves of chunk %d is cut short", i)
			break
		}
		list := make([]blockmap.Digest, c.Leaves())
		for j := range list {
			list[j] = d.Digest()
		}
		l, err := blockmap.NewLeafList(c, list)
		if err != nil {
			d.Fail("the list of the leaves of chunk %d: %v", i, err)
		}
		b.Chunks[i].List = l
	}
	return b
}

const leastPartBytes = 3

// Wants lists for each chunk of the bundle the places at which an image with that index
// has its content. open returns the stream of a table, as for Plan.Wants.
func (b *Bundle) Wants(ix *blockmap.Index, open func(*blockmap.Table) (*blockmap.Stream, error)) ([][]blockmap.Want, error) {
	chunks := make(map[blockmap.Digest]int, len(b.Chunks))
	for i := range b.Chunks {
		chunks[b.Chunks[i].Digest] = i
	}
	wants := make([][]blockmap.Want, len(b.Chunks))
	for s := range ix.Streams {
		table := &ix.Streams[s]
		var stream *blockmap.Stream
		for c := range table.Chunks {
			chunk := &table.Chunks[c]
			i, ok := chunks[chunk.Digest]
			if !ok || b.Chunks[i].Blocks != chunk.Count {
				continue
			}
			if stream == nil {
				var err error
				if stream, err = open(table); err != nil {
					return nil, fmt.Errorf("bundle: stream %d: %w", s, err)
				}
			}
			wants[i] = append(wants[i], blockmap.Want{Stream: stream, Table: table, Chunk: c})
		}
	}
	return wants, nil
}
