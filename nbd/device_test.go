package nbd

import (
	"errors"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// newPatternDevice is full of data that depends on its position, except for holes in
// every fourth block.
func newPatternDevice(size int64) *blocktest.Memory {
	d := blocktest.NewMemory(size)
	for i := range size / blockmap.BlockSize {
		if i%4 != 3 {
			d.Fill(pattern(i*blockmap.BlockSize, blockmap.BlockSize), i*blockmap.BlockSize)
		}
	}
	return d
}

// newFullDevice has no holes, so that every evicted block is a miss.
func newFullDevice(size int64) *blocktest.Memory {
	d := blocktest.NewMemory(size)
	d.Fill(pattern(0, size), 0)
	return d
}

// pattern returns the bytes that newPatternDevice would hold at off without holes.
func pattern(off, n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		at := uint64(off) + uint64(i)
		p[i] = byte(at*2654435761>>13) | 1
	}
	return p
}

// readOnly hides the writes of a device.
type readOnly struct{ blockmap.Device }

var errBroken = errors.New("fetch chunk 7 of layer 3: connection refused")
