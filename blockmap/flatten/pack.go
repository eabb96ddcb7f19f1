package flatten

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

const (
	blockSize = blockmap.BlockSize

	// ext4 numbers the blocks of a file with 32 bits.
	maxFileSize = (1<<32 - 1) * blockSize
)

// holeWindow is the granularity at which zeros in a file become a hole. Finer
// holes would cost an extent each, in the filesystem and in the index, and
// save bytes that compress to nothing.
const holeWindow = 64 << 10

// packer writes the files of a layer to a stream.
//
// A large file starts a chunk and is cut at fixed steps from its own start, and
// its end ends a chunk: so its chunks are the same in any stream. Smaller files
// are packed together. A pack ends before a file that would overflow it, in bytes or
// in files, and, once half full, behind a file whose checksum says so: a boundary that
// depends on a file alone, so that two layers with some of their files in common fall
// into step again.
type packer struct {
	*StreamWriter
	size int // of a full chunk
	tiny int // files of one block in the pack

	// The file being packed.
	large bool
	sum   uint32
	at    int64 // in the file
	runs  []ext4.Run
}

// packTiny is how many files of one block a pack has at most. Who reads one tiny file
// fetches its whole pack: with a chunk full of files of 2 KB, a hundred times and more of
// what is read. What programs read in a row has larger files between; such packs are full
// before they have as many tiny ones, so a start makes no more requests.
const packTiny = 64

func newPacker(s *StreamWriter) *packer { return &packer{StreamWriter: s, size: s.c.size} }

// file packs a file of size bytes, read from r, and returns where its blocks
// went. The runs' Stream is left zero.
func (p *packer) file(r io.Reader, size int64) ([]ext4.Run, error) {
	if size > maxFileSize {
		return nil, fmt.Errorf("a file of %d bytes: ext4 cannot hold it", size)
	}
	padded := (size + blockSize - 1) &^ (blockSize - 1)
	p.large = padded >= int64(p.size)
	if p.large || int64(len(*p.chunk))+padded > int64(p.size) || p.tiny == packTiny {
		if err := p.end(); err != nil {
			return nil, err
		}
	}
	p.sum, p.at, p.runs = 0, 0, nil
	window := min(holeWindow, p.size)
	for p.at < size {
		n := int(min(int64(window), size-p.at))
		if err := p.window(r, n); err != nil {
			return nil, err
		}
	}
	if len(p.runs) > 0 && padded == blockSize {
		p.tiny++
	}
	if p.large || len(p.runs) > 0 && p.marks(padded) {
		if err := p.end(); err != nil {
			return nil, err
		}
	}
	return p.runs, nil
}

// end ends the pack.
func (p *packer) end() error {
	p.tiny = 0
	return p.Cut()
}

// marks reports whether the file just packed ends a pack that is half full. On average
// one file does in each quarter of a chunk's size, for files of any size, and one of a
// quarter of packTiny. That is often enough that most packs end at such a file and do
// not overflow, and seldom enough that packs which began at different files end at the
// same one.
func (p *packer) marks(padded int64) bool {
	return len(*p.chunk) >= p.size/2 && uint64(p.sum)*uint64(p.size/4) < uint64(padded)<<32 ||
		p.tiny >= packTiny/2 && uint64(p.sum)*(packTiny/4) < 1<<32
}

var zeroWindow [holeWindow]byte

// window packs the next n bytes of the file.
func (p *packer) window(r io.Reader, n int) error {
	b := *p.chunk
	start := len(b)
	b = b[:start+n]
	if _, err := io.ReadFull(r, b[start:]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	first := uint32(p.at / blockSize)
	p.at += int64(n)
	if bytes.Equal(b[start:], zeroWindow[:n]) {
		// What lies in the buffer behind its length is never read again.
		if p.large && p.at%int64(p.size) == 0 {
			return p.Cut()
		}
		return nil
	}
	p.sum = crc32.Update(p.sum, castagnoli, b[start:])
	for len(b)%blockSize != 0 {
		pad := blockSize - len(b)%blockSize
		b = append(b, zeroWindow[:pad]...)
	}
	*p.chunk = b
	count := uint32(len(b)-start) / blockSize
	block := p.block + uint32(start/blockSize)
	if k := len(p.runs) - 1; k >= 0 && p.runs[k].FileBlock+p.runs[k].Count == first && p.runs[k].Block+p.runs[k].Count == block {
		p.runs[k].Count += count
	} else {
		p.runs = append(p.runs, ext4.Run{FileBlock: first, Block: block, Count: count})
	}
	if p.large && p.at%int64(p.size) == 0 {
		return p.Cut()
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)
