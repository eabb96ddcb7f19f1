package blockmap

import "encoding/binary"

// SealIndex gives b the length and the checksum of a right index.
func SealIndex(b []byte) {
	binary.LittleEndian.PutUint32(b[12:], uint32(len(b)-indexHeader))
	binary.LittleEndian.PutUint32(b[16:], indexSum(b))
}
