package registry

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"

	"thaw/blockmap"
)

const xzMagic = "\xfd7zXZ\x00"

func newXZReader(b *bufio.Reader) (io.ReadCloser, error) {
	z, err := xz.NewReader(&xzGuard{b: b})
	if err != nil {
		return nil, err
	}
	return io.NopCloser(z), nil
}

// xzGuard passes an xz file on (xz-file-format.txt, version 1.2.1) and refuses
// one whose blocks ask for a dictionary of more than blockmap.MaxWindow: the decoder
// would allocate up to 4 GiB for four bytes of header. To find the headers of
// the blocks it walks the file: what it knows the length of it passes on.
//
//	stream: header (12 bytes) | blocks | index | footer (12 bytes) | padding (4 zero bytes, any number)
//	block:  header (4*(first byte+1) bytes) | LZMA2 chunks | padding to 4 bytes | check
//	index:  0x00 | number of records | two numbers for each | padding to 4 bytes | CRC-32 (4 bytes)
//	chunk:  0x00: the end
//	        0x01, 0x02: length-1 (2 bytes, big-endian) | as many bytes
//	        0x80 on: 2 bytes | length-1 (2 bytes, big-endian) | 1 byte if 0xc0 on | as many bytes
type xzGuard struct {
	b    *bufio.Reader
	pass int // bytes to pass on before the next look
	next func() error

	check   int    // bytes of a block's check
	body    int64  // bytes of the block's chunks, or of the index, so far
	numbers uint64 // of the index, still to come
}

func (g *xzGuard) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for g.pass == 0 {
		if g.next == nil {
			g.next = g.stream
		}
		if err := g.next(); err != nil {
			return 0, err
		}
	}
	n, err := g.b.Read(p[:min(len(p), g.pass)])
	g.pass -= n
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// peek gives the next n bytes without passing them on.
func (g *xzGuard) peek(n int) ([]byte, error) {
	p, err := g.b.Peek(n)
	if err == io.EOF && len(p) > 0 {
		err = io.ErrUnexpectedEOF
	}
	return p, err
}

var (
	errXZ        = errors.New("it is not an xz file, or is damaged")
	xzCheckSizes = [16]int{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}
)

func (g *xzGuard) stream() error {
	p, err := g.peek(4)
	if err != nil {
		return err // io.EOF: the end of the file
	}
	if binary.LittleEndian.Uint32(p) == 0 {
		g.pass = 4
		return nil
	}
	if p, err = g.peek(12); err != nil {
		return err
	}
	if string(p[:6]) != xzMagic {
		return errXZ
	}
	g.check = xzCheckSizes[p[7]&0xf]
	g.pass, g.next = 12, g.block
	return nil
}

func (g *xzGuard) block() error {
	p, err := g.peek(1)
	if err != nil {
		return err
	}
	if p[0] == 0 {
		g.pass, g.body, g.numbers, g.next = 1, 1, 0, g.indexSize
		return nil
	}
	size := 4 * (int(p[0]) + 1)
	if p, err = g.peek(size); err != nil {
		return err
	}
	if err := checkXZBlock(p[:size-4]); err != nil {
		return err
	}
	g.pass, g.body, g.next = size, 0, g.chunk
	return nil
}

// checkXZBlock looks at the header of a block, without its CRC.
func checkXZBlock(h []byte) error {
	flags := h[1]
	rest := h[2:]
	number := func() uint64 {
		v, n := binary.Uvarint(rest)
		if n <= 0 {
			rest = nil
			return 1 << 63
		}
		rest = rest[n:]
		return v
	}
	for _, bit := range []byte{0x40, 0x80} { // the lengths of the block
		if flags&bit != 0 {
			number()
		}
	}
	for range flags&3 + 1 {
		id, n := number(), number()
		if n > uint64(len(rest)) {
			return errXZ
		}
		properties := rest[:n]
		rest = rest[n:]
		if id != 0x21 {
			return fmt.Errorf("it uses the filter %#x of xz; thaw supports LZMA2 only", id)
		}
		if n != 1 {
			return errXZ
		}
		size, err := lzma.DecodeDictCap(properties[0])
		if err != nil {
			return errXZ
		}
		if size > blockmap.MaxWindow {
			return fmt.Errorf("it takes a dictionary of %d MiB to decompress, and thaw allows %d MiB: compress it again by xz -9 or less", size>>20, blockmap.MaxWindow>>20)
		}
	}
	return nil
}

func (g *xzGuard) chunk() error {
	p, err := g.peek(1)
	if err != nil {
		return err
	}
	switch c := p[0]; {
	case c == 0:
		g.body++
		pad := int(-g.body & 3)
		g.pass, g.next = 1+pad+g.check, g.block
		return nil
	case c <= 2:
		if p, err = g.peek(3); err != nil {
			return err
		}
		g.pass = 3 + int(binary.BigEndian.Uint16(p[1:])) + 1
	case c >= 0x80:
		if p, err = g.peek(5); err != nil {
			return err
		}
		g.pass = 5 + int(binary.BigEndian.Uint16(p[3:])) + 1
		if c >= 0xc0 {
			g.pass++
		}
	default:
		return errXZ
	}
	g.body += int64(g.pass)
	return nil
}

// number passes on a number of the index.
func (g *xzGuard) number() (uint64, error) {
	p, err := g.b.Peek(10)
	v, n := binary.Uvarint(p)
	if n <= 0 {
		if err == nil || err == io.EOF {
			err = errXZ
		}
		return 0, err
	}
	g.pass = n
	g.body += int64(n)
	return v, nil
}

func (g *xzGuard) indexSize() error {
	n, err := g.number()
	if err == nil && n > 1<<40 {
		err = errXZ
	}
	g.numbers, g.next = 2*n, g.record
	return err
}

func (g *xzGuard) record() error {
	if g.numbers == 0 {
		g.pass, g.next = int(-g.body&3)+4+12, g.stream
		return nil
	}
	g.numbers--
	_, err := g.number()
	return err
}
