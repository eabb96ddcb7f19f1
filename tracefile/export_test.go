package tracefile

import (
	"encoding/binary"
	"hash/crc32"
)

// HeaderLen is where the frames of a trace begin.
const HeaderLen = headerLen

// Reseal gives b the checksums of a right trace, as far as it has frames.
func Reseal(b []byte) {
	if len(b) < headerLen {
		return
	}
	sum := crc32.Checksum(b[:52], castagnoli)
	binary.LittleEndian.PutUint32(b[52:], sum)
	for b = b[headerLen:]; len(b) >= frameHeader; {
		n := frameHeader + int(binary.LittleEndian.Uint16(b))
		if n > len(b) {
			return
		}
		sum = frameSum(sum, b[:n])
		binary.LittleEndian.PutUint32(b[2:], sum)
		b = b[n:]
	}
}
