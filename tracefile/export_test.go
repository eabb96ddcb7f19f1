package tracefile

import (
	"encoding/binary"
	"hash/crc32"
	"time"
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

// Put hands over a touch of a block at a time since NewRecorder, as readers do
// that have looked at the clock and then waited for the lock.
func (r *Recorder) Put(at time.Duration, block uint32) { r.put(event{at: at, block: block, count: 1}) }
