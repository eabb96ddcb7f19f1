package tracefile

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"thaw/blockmap"
)

// Bundle is the head of a bundle: one blob with the chunks of a plan in the order
// of the plan, so that a start is one sequential download. Parts are named by
// content: the head alone says every place that a part belongs to, in this image or
// in another.
//
// The blob is a valid zstd file whose content is that of the chunks. Its head
// is a skippable frame (RFC 8878, section 3.1.2); integers are little-endian,
// numbers in the body unsigned varints:
//
//	 0  4  0x184D2A5B
//	 4  4  length of the rest of the head
//	 8  8  magic "thawbndl"
//	16  4  version, 1
//	20  4  CRC-32C of the body
//	24     the body:
//	       number of parts; for each
//	           bytes of its frame
//	       for each part 32 bytes: SHA-256 of its content
//	..     the zstd frames of the parts
type Bundle struct {
	Parts []Part
}

// Part is one chunk in a Bundle.
type Part struct {
	Digest blockmap.Digest // of the content
	Stored uint32          // bytes of its frame
}

const (
	bundleFrame   = 0x184D2A5B
	bundleMagic   = "thawbndl"
	bundleVersion = 1
	bundleHead    = 24

	// maxBundleHead bounds a head: some 400,000 parts.
	maxBundleHead = 16 << 20
	// maxStored is the most that a chunk takes: raw blocks in a zstd frame.
	maxStored = blockmap.MaxChunkBlocks*blockmap.BlockSize + 1<<17
)

// Bundle is the head of the bundle that the plan makes: each content once.
func (p *Plan) Bundle() *Bundle {
	b := new(Bundle)
	for _, s := range p.Steps {
		if !s.Again {
			c := p.Chunk(s)
			b.Parts = append(b.Parts, Part{c.Digest, c.Stored})
		}
	}
	return b
}

// Stored is the length of all frames together.
func (b *Bundle) Stored() (n int64) {
	for _, p := range b.Parts {
		n += int64(p.Stored)
	}
	return n
}

// Head encodes the head. The first frame lies behind it.
func (b *Bundle) Head() []byte {
	body := binary.AppendUvarint(nil, uint64(len(b.Parts)))
	for _, p := range b.Parts {
		body = binary.AppendUvarint(body, uint64(p.Stored))
	}
	for _, p := range b.Parts {
		body = append(body, p.Digest[:]...)
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
		return nil, fmt.Errorf("bundle: version %d: this thaw knows version %d", v, bundleVersion)
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
	b := &Bundle{Parts: make([]Part, d.Count(1+sha256.Size))}
	for i := range b.Parts {
		b.Parts[i].Stored = uint32(d.Uvarint(maxStored))
	}
	for i := range b.Parts {
		b.Parts[i].Digest = d.Digest()
	}
	d.End()
	if d.Err() != nil {
		return nil, fmt.Errorf("bundle: %w", d.Err())
	}
	return b, nil
}

// Wants lists for each part the places at which an image with that index has its
// content. open returns the stream of a table, as for Plan.Wants. A part whose frame
// is longer than that of any such chunk is of no use, and has no places.
func (b *Bundle) Wants(ix *blockmap.Index, open func(*blockmap.Table) (*blockmap.Stream, error)) ([][]blockmap.Want, error) {
	parts := make(map[blockmap.Digest]int, len(b.Parts))
	for i, p := range b.Parts {
		if _, twice := parts[p.Digest]; !twice {
			parts[p.Digest] = i
		}
	}
	wants := make([][]blockmap.Want, len(b.Parts))
	for s := range ix.Streams {
		table := &ix.Streams[s]
		var stream *blockmap.Stream
		for c := range table.Chunks {
			chunk := &table.Chunks[c]
			i, ok := parts[chunk.Digest]
			if !ok || int64(b.Parts[i].Stored) > int64(chunk.Size())+1<<17 {
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
