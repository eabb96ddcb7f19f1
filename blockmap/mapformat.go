package blockmap

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// mapFormat is the layout of a file that says something of each block of a data file:
// the residency of a stream's blocks, or the changes of an overlay. There are two copies of
// that, live and durable: both in the file of a stream, and each in a file of its own of an
// overlay, where a sync of the durable one is not to write the other.
//
//	   0    8  magic
//	   8    4  version
//	  12    4  CRC-32C of bytes 0 to 103, this field taken as zero
//	  16   32  ID of the stream, or digest of the image below the overlay
//	  48    4  blocks
//	  52    4  zero
//	  56   16  boot ID of the machine when live was last begun, 0 if it must not be believed
//	  72    8  superblock of the file system then, 0 if not known: the inode number of its
//	           directory in /sys, with bit 63 set; or the ID of the mount (statx,
//	           STATX_MNT_ID_UNIQUE)
//	  80    8  device of the data's file then
//	  88    8  inode of the data's file
//	  96    8  when that inode was made, ns since 1970, 0 if not known
//	 104       zeros
//	4096    L  live, or the only copy: L = bytes of the words, rounded up to 4096
//	4096+L  L  durable, if there are two
//
// In the durable map of an overlay, bytes 56 to 103 are zero. Numbers and words of 64 bits are little-endian.
type mapFormat struct {
	magic   string
	version uint32
	perWord int64 // blocks that a word tells of
	copies  int64
	name    string // in errors
}

var (
	residencyMap = mapFormat{"thawresi", 2, 64, 2, "residency map"}
	overlayMap   = mapFormat{"thawover", 1, perWord, 1, "overlay map"}
)

const (
	mapHeader  = 4096
	mapHeadLen = 104 // bytes of the header that are in use
)

// words is how many words a copy has.
func (m *mapFormat) words(blocks uint32) int64 { return (int64(blocks) + m.perWord - 1) / m.perWord }

// half is the length of a copy in the file, in bytes.
func (m *mapFormat) half(blocks uint32) int64 { return allocated(8 * m.words(blocks)) }

// size is the length of the file, in bytes.
func (m *mapFormat) size(blocks uint32) int64 { return mapHeader + m.copies*m.half(blocks) }

// mapHead is the header of such a file.
type mapHead struct {
	id     Digest
	blocks uint32
	boot   BootID
	data   FileID
}

// liveHolds says whether the live copy can be believed: neither has the machine
// rebooted since, nor was the file system unmounted, nor was the file copied.
// data is the data file as it is now.
func (h *mapHead) liveHolds(boot BootID, data FileID) bool {
	return boot != (BootID{}) && boot == h.boot && data.Superblock != 0 && h.data == data
}

// head encodes h.
func (m *mapFormat) head(h *mapHead) []byte {
	b := make([]byte, mapHeadLen)
	copy(b, m.magic)
	binary.LittleEndian.PutUint32(b[8:], m.version)
	copy(b[16:], h.id[:])
	binary.LittleEndian.PutUint32(b[48:], h.blocks)
	copy(b[56:], h.boot[:])
	binary.LittleEndian.PutUint64(b[72:], h.data.Superblock)
	binary.LittleEndian.PutUint64(b[80:], h.data.Device)
	binary.LittleEndian.PutUint64(b[88:], h.data.Inode)
	binary.LittleEndian.PutUint64(b[96:], uint64(h.data.Born))
	binary.LittleEndian.PutUint32(b[12:], crc32.Checksum(b, castagnoli))
	return b
}

// decode reads the content of a file. It fails with ErrCorrupt.
func (m *mapFormat) decode(b []byte) (h mapHead, copies [][]uint64, err error) {
	if len(b) < mapHeader || string(b[:8]) != m.magic {
		return h, nil, fmt.Errorf("%w: it is no %s", ErrCorrupt, m.name)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != m.version {
		return h, nil, fmt.Errorf("%w: %s version %d, this program reads %d", ErrCorrupt, m.name, v, m.version)
	}
	copy(h.id[:], b[16:])
	h.blocks = binary.LittleEndian.Uint32(b[48:])
	copy(h.boot[:], b[56:])
	h.data = FileID{
		Superblock: binary.LittleEndian.Uint64(b[72:]), Device: binary.LittleEndian.Uint64(b[80:]),
		Inode: binary.LittleEndian.Uint64(b[88:]), Born: int64(binary.LittleEndian.Uint64(b[96:])),
	}
	if string(b[:mapHeadLen]) != string(m.head(&h)) {
		return h, nil, fmt.Errorf("%w: the header of the %s is damaged", ErrCorrupt, m.name)
	}
	if int64(len(b)) != m.size(h.blocks) {
		return h, nil, fmt.Errorf("%w: the %s has %d bytes instead of %d", ErrCorrupt, m.name, len(b), m.size(h.blocks))
	}
	for i := range m.copies {
		at := b[mapHeader+i*m.half(h.blocks):]
		words := make([]uint64, m.words(h.blocks))
		for i := range words {
			words[i] = binary.LittleEndian.Uint64(at[8*i:])
		}
		m.trim(words, h.blocks)
		copies = append(copies, words)
	}
	return h, copies, nil
}

// trim clears what stands for no block.
func (m *mapFormat) trim(words []uint64, blocks uint32) {
	if rest := int64(blocks) % m.perWord; rest != 0 {
		words[len(words)-1] &= 1<<(rest*64/m.perWord) - 1
	}
}

// writeWords writes words first to end of those that lie from base in the file.
func writeWords(f File, base int64, words interface{ word(i uint32) uint64 }, first, end uint32) error {
	for i := first; i < end; {
		n := min(end-i, 1<<15)
		b := make([]byte, 0, 8*n)
		for k := range n {
			b = binary.LittleEndian.AppendUint64(b, words.word(i+k))
		}
		if _, err := f.WriteAt(b, base+8*int64(i)); err != nil {
			return err
		}
		i += n
	}
	return nil
}
