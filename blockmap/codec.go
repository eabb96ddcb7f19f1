package blockmap

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// ErrCorrupt marks input that violates its format: a truncated, altered or hostile
// index, table or header.
var ErrCorrupt = errors.New("corrupt")

// Decoder reads the varint-coded bodies of thaw's binary formats, which may be hostile.
// After the first fault, every later read returns zeros, so the reader of a format
// checks Err once per record instead of once per field. Count checks a count against
// the remaining bytes before anything is allocated for it.
type Decoder struct {
	b   []byte
	off int
	err error
}

// NewDecoder reads b without copying it.
func NewDecoder(b []byte) *Decoder { return &Decoder{b: b} }

// Err returns the first fault, or nil.
func (d *Decoder) Err() error { return d.err }

// Fail makes the decoder fail at the current offset, unless it has failed already.
func (d *Decoder) Fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%w at byte %d: %s", ErrCorrupt, d.off, fmt.Sprintf(format, args...))
	}
}

// Len returns the number of unread bytes.
func (d *Decoder) Len() int { return len(d.b) - d.off }

// Uvarint reads a number, which must not exceed limit.
func (d *Decoder) Uvarint(limit uint64) uint64 {
	if d.err != nil {
		return 0
	}
	v, n := binary.Uvarint(d.b[d.off:])
	if n <= 0 {
		d.Fail("a number is cut short or too long")
		return 0
	}
	if v > limit {
		d.Fail("%d where at most %d can be", v, limit)
		return 0
	}
	d.off += n
	return v
}

// Varint reads a signed number.
func (d *Decoder) Varint() int64 {
	if d.err != nil {
		return 0
	}
	v, n := binary.Varint(d.b[d.off:])
	if n <= 0 {
		d.Fail("a number is cut short or too long")
		return 0
	}
	d.off += n
	return v
}

// Count reads the number of the records that follow, each of at least size bytes.
func (d *Decoder) Count(size int) int {
	n := d.Uvarint(1 << 40)
	if d.err == nil && n > uint64(d.Len()/size) {
		d.Fail("%d records of at least %d bytes in the %d that are left", n, size, d.Len())
	}
	if d.err != nil {
		return 0
	}
	return int(n)
}

// Bytes returns the next n bytes, which are part of the input.
func (d *Decoder) Bytes(n int) []byte {
	if d.err != nil {
		return nil
	}
	if n < 0 || n > d.Len() {
		d.Fail("%d bytes wanted, %d left", n, d.Len())
		return nil
	}
	p := d.b[d.off : d.off+n : d.off+n]
	d.off += n
	return p
}

// String reads a length, which must not exceed limit, and as many bytes.
func (d *Decoder) String(limit uint64) string {
	return string(d.Bytes(int(d.Uvarint(limit))))
}

// Digest reads a SHA-256 digest.
func (d *Decoder) Digest() (g Digest) {
	copy(g[:], d.Bytes(len(g)))
	return g
}

// End fails unless all bytes have been read.
func (d *Decoder) End() {
	if d.Len() != 0 {
		d.Fail("%d bytes too many", d.Len())
	}
}
