package tracefile

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"

	"thaw/blockmap"
)

// A trace file is a header and frames. Integers are little-endian; numbers in
// the body of a frame are unsigned varints unless they are said to be signed.
//
//	 0   8  magic "thawtrac"
//	 8   4  version, 1
//	12   4  blocks of the device
//	16  32  SHA-256 of the image's index
//	48   4  starts that the trace is of: 1, or how many were merged
//	52   4  CRC-32C of bytes 0 to 51
//	56      frames:
//
//	 0   2  length of the body, at least 1
//	 2   4  CRC-32C of the CRC before it (the header's, or that of the frame
//	        before), the length and the body
//	 6      the body, whose first byte is its kind:
//
//	kind 1, touches; for each, until the body ends:
//	    microseconds since the touch before; of the first, since the first read
//	    signed: first block, less the end of the touch before; of the first, less 0
//	    twice the number of blocks, plus 1 if they were a miss
//	    only where the trace is of several starts: how many of them touched it
//	kind 2, the end of the trace:
//	    why it ended, a Reason
//	    microseconds from the first read to the end of the recording
//	    blocks dropped
//
// A frame is written whole and says nothing that needs a later one, so a file
// that was cut is good up to its last complete frame. Time never goes back
// within a frame. It does from one frame to the next in a merged trace, where
// what few starts touch comes after what most do. As each CRC covers the one
// before it, a frame of another file, or out of its place, does not match.
//
// A range of blocks costs some five bytes, a frame six or more.
const (
	magic   = "thawtrac"
	version = 1

	headerLen   = 56
	frameHeader = 6

	kindTouches = 1
	kindEnd     = 2

	// MaxSize bounds a trace file: some 800,000 ranges. A start of 500 MB
	// takes less than 64 KiB.
	MaxSize = 4 << 20

	// A frame is closed at this length of its body. No number is longer than
	// a varint of 64 bits.
	frameBody = 4096
	touchMax  = 4 * binary.MaxVarintLen64
	endMax    = frameHeader + 1 + 3*binary.MaxVarintLen64

	maxStarts = 1 << 16
	maxTime   = (1 << 40) * time.Microsecond // twelve days
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Writer writes a trace file as a stream.
type Writer struct {
	h       Header
	w       io.Writer
	written int64
	sum     uint32
	body    []byte // of the frame in the making, behind room for its header
	last    Touch  // the one before, within the frame
	blocks  uint64
	err     error
}

// NewWriter writes the header of a trace to w.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	if h.Starts == 0 || h.Starts > maxStarts {
		return nil, fmt.Errorf("write trace: it has %d starts, of at most %d", h.Starts, maxStarts)
	}
	b := make([]byte, headerLen)
	copy(b, magic)
	binary.LittleEndian.PutUint32(b[8:], version)
	binary.LittleEndian.PutUint32(b[12:], h.Blocks)
	copy(b[16:], h.Index[:])
	binary.LittleEndian.PutUint32(b[48:], h.Starts)
	out := &Writer{h: h, w: w, sum: crc32.Checksum(b[:52], castagnoli)}
	binary.LittleEndian.PutUint32(b[52:], out.sum)
	out.body = make([]byte, frameHeader, frameHeader+frameBody+touchMax)
	return out, out.write(b)
}

// Add appends a touch. It reaches the file with its frame: when that is full,
// on Flush or on Close. Add fails with ErrFull where the file would become
// longer than MaxSize; it can be closed then.
func (w *Writer) Add(t Touch) error {
	if w.err != nil {
		return w.err
	}
	if err := w.h.fits(t); err != nil {
		return fmt.Errorf("write trace: %w", err)
	}
	if w.blocks+uint64(t.Count) > uint64(w.h.Blocks) {
		return fmt.Errorf("write trace: more blocks than the device's %d", w.h.Blocks)
	}
	if t.At < w.last.At || len(w.body) >= frameHeader+frameBody {
		if err := w.Flush(); err != nil {
			return err
		}
	}
	if w.written+int64(len(w.body))+touchMax+endMax > MaxSize {
		return ErrFull
	}
	if len(w.body) == frameHeader {
		w.body = append(w.body, kindTouches)
	}
	w.body = binary.AppendUvarint(w.body, uint64(t.At/time.Microsecond-w.last.At/time.Microsecond))
	w.body = binary.AppendVarint(w.body, int64(t.Block)-int64(w.last.end()))
	var miss uint64
	if t.Miss {
		miss = 1
	}
	w.body = binary.AppendUvarint(w.body, uint64(t.Count)<<1|miss)
	if w.h.Starts > 1 {
		w.body = binary.AppendUvarint(w.body, uint64(max(t.Starts, 1)))
	}
	w.last = t
	w.blocks += uint64(t.Count)
	return nil
}

// Flush writes what was added and is not in the file yet.
func (w *Writer) Flush() error {
	if w.err != nil || len(w.body) == frameHeader {
		return w.err
	}
	b := w.body
	binary.LittleEndian.PutUint16(b, uint16(len(b)-frameHeader))
	w.sum = frameSum(w.sum, b)
	binary.LittleEndian.PutUint32(b[2:], w.sum)
	w.body, w.last = b[:frameHeader], Touch{}
	return w.write(b)
}

// Close writes the end of the trace. It does not close what it writes to.
func (w *Writer) Close(e End) error {
	if err := w.Flush(); err != nil {
		return err
	}
	w.body = append(w.body, kindEnd)
	w.body = binary.AppendUvarint(w.body, uint64(e.Why))
	w.body = binary.AppendUvarint(w.body, uint64(min(max(e.After, 0), maxTime)/time.Microsecond))
	w.body = binary.AppendUvarint(w.body, e.Dropped)
	if err := w.Flush(); err != nil {
		return err
	}
	w.err = errors.New("write trace: it is closed")
	return nil
}

func (w *Writer) write(b []byte) error {
	if _, err := w.w.Write(b); err != nil {
		w.err = fmt.Errorf("write trace: %w", err)
	}
	w.written += int64(len(b))
	return w.err
}

// frameSum is the CRC of the frame b, header and body, behind one with the CRC
// before.
func frameSum(before uint32, b []byte) uint32 {
	var p [6]byte
	binary.LittleEndian.PutUint32(p[:], before)
	copy(p[4:], b[:2])
	return crc32.Update(crc32.Checksum(p[:], castagnoli), castagnoli, b[frameHeader:])
}

// Reader reads a trace file as a stream, one frame in memory at a time. Unlike
// Read it does not see whether a block is touched twice.
type Reader struct {
	Header

	r      *bufio.Reader
	off    int64 // of what is read next
	sum    uint32
	buf    []byte
	frame  []Touch // what is left of the last frame read
	blocks uint64
	end    End
	err    error
}

// NewReader reads the header of a trace. It fails with blockmap.ErrCorrupt where
// this program cannot read it.
func NewReader(r io.Reader) (*Reader, error) {
	// One byte more than MaxSize shows that a file is too long.
	in := &Reader{r: bufio.NewReaderSize(io.LimitReader(r, MaxSize+1), 1<<14)}
	b := make([]byte, headerLen)
	n, err := io.ReadFull(in.r, b)
	switch {
	case err != nil && err != io.EOF && err != io.ErrUnexpectedEOF:
		return nil, fmt.Errorf("read trace: %w", err)
	case n < len(magic) || string(b[:len(magic)]) != magic:
		return nil, fmt.Errorf("%w: not a thaw trace", blockmap.ErrCorrupt)
	case err != nil:
		return nil, fmt.Errorf("%w: a trace of %d bytes, which ends in its header", blockmap.ErrCorrupt, n)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != version {
		return nil, fmt.Errorf("%w: trace version %d, this program reads %d", blockmap.ErrCorrupt, v, version)
	}
	in.sum = crc32.Checksum(b[:52], castagnoli)
	if in.sum != binary.LittleEndian.Uint32(b[52:]) {
		return nil, fmt.Errorf("%w: the header of the trace does not match its checksum", blockmap.ErrCorrupt)
	}
	in.Blocks = binary.LittleEndian.Uint32(b[12:])
	in.Index = blockmap.Digest(b[16:48])
	in.Starts = binary.LittleEndian.Uint32(b[48:])
	if in.Starts == 0 || in.Starts > maxStarts {
		return nil, fmt.Errorf("%w: a trace of %d starts", blockmap.ErrCorrupt, in.Starts)
	}
	in.off = headerLen
	return in, nil
}

// Next returns the next touch. After the last one it fails: with io.EOF where the
// trace was closed, with ErrCut where the file ends without that, and with
// blockmap.ErrCorrupt where bytes follow that are no frame of this trace.
func (r *Reader) Next() (Touch, error) {
	for len(r.frame) == 0 {
		if r.err == nil {
			r.err = r.read()
		}
		if r.err != nil {
			return Touch{}, r.err
		}
	}
	t := r.frame[0]
	r.frame = r.frame[1:]
	return t, nil
}

// End says how the recording ended, once Next has returned io.EOF.
func (r *Reader) End() End { return r.end }

// read reads a frame.
func (r *Reader) read() error {
	r.buf = append(r.buf[:0], make([]byte, frameHeader)...)
	if _, err := io.ReadFull(r.r, r.buf); err != nil {
		return r.cut(err)
	}
	n := int(binary.LittleEndian.Uint16(r.buf))
	if r.off+frameHeader+int64(n) > MaxSize {
		return fmt.Errorf("trace: %w: longer than %d bytes", blockmap.ErrCorrupt, MaxSize)
	}
	r.buf = append(r.buf, make([]byte, n)...)
	if _, err := io.ReadFull(r.r, r.buf[frameHeader:]); err != nil {
		return r.cut(err)
	}
	if r.sum = frameSum(r.sum, r.buf); r.sum != binary.LittleEndian.Uint32(r.buf[2:]) {
		return fmt.Errorf("trace: %w: the frame at byte %d does not match its checksum", blockmap.ErrCorrupt, r.off)
	}
	d := blockmap.NewDecoder(r.buf[frameHeader:])
	blocks := r.blocks
	frame, ended := r.decode(d)
	if d.Err() != nil {
		r.blocks = blocks
		return fmt.Errorf("trace: the frame at byte %d: %w", r.off, d.Err())
	}
	r.frame = frame
	r.off += int64(len(r.buf))
	if !ended {
		return nil
	}
	if _, err := r.r.ReadByte(); err == nil {
		return fmt.Errorf("trace: %w: bytes follow its end at byte %d", blockmap.ErrCorrupt, r.off)
	}
	return io.EOF
}

// cut is the error for a file that ends within a frame, or before the last one.
func (r *Reader) cut(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("%w behind byte %d", ErrCut, r.off)
	}
	return fmt.Errorf("read trace: %w", err)
}

// decode reads the body of a frame. Faults are left in d.
func (r *Reader) decode(d *blockmap.Decoder) (frame []Touch, ended bool) {
	kind := d.Uvarint(kindEnd)
	switch {
	case kind == kindEnd:
		r.end = End{
			Why:     Reason(d.Uvarint(reasons - 1)),
			After:   time.Duration(d.Uvarint(uint64(maxTime/time.Microsecond))) * time.Microsecond,
			Dropped: d.Uvarint(1 << 62),
		}
		d.End()
		return nil, true
	case kind != kindTouches:
		d.Fail("a frame of kind %d", kind)
	}
	var last Touch
	for d.Err() == nil && d.Len() > 0 {
		t := Touch{Starts: 1}
		t.At = last.At + time.Duration(d.Uvarint(uint64(maxTime/time.Microsecond)))*time.Microsecond
		// The sum may wrap: a block that is not on the device is caught below.
		block := uint64(int64(last.end()) + d.Varint())
		n := d.Uvarint(1 << 33)
		t.Count, t.Miss = uint32(n>>1), n&1 != 0
		if r.Starts > 1 {
			t.Starts = uint32(d.Uvarint(uint64(r.Starts)))
		}
		r.blocks += uint64(t.Count)
		switch {
		case d.Err() != nil:
		case block >= uint64(r.Blocks) || n>>1 > uint64(r.Blocks)-block:
			d.Fail("a range of blocks %d+%d of %d", block, n>>1, r.Blocks)
		case r.blocks > uint64(r.Blocks):
			d.Fail("more blocks than the device's %d", r.Blocks)
		case t.Starts == 0:
			d.Fail("a range that no start touched")
		default:
			t.Block = uint32(block)
			if err := r.fits(t); err != nil {
				d.Fail("%v", err)
			}
			frame = append(frame, t)
			last = t
		}
	}
	return frame, false
}
