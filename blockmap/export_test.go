package blockmap

import "encoding/binary"

// SealIndex gives b the length and the checksum of a right index.
func SealIndex(b []byte) {
	binary.LittleEndian.PutUint32(b[12:], uint32(len(b)-indexHeader))
	binary.LittleEndian.PutUint32(b[16:], indexSum(b))
}

// LimitOpen bounds the streams that are open at once.
func (c *Cache) LimitOpen(n int64) { c.streams.openLimit = n }

// StoreHeld puts what is held in memory on the disk, as happens now and then.
func (c *Cache) StoreHeld() { c.streams.held.store() }
