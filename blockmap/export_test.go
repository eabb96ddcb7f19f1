package blockmap

import "encoding/binary"

// SealIndex gives b the length and the checksum of a valid index.
func SealIndex(b []byte) {
	binary.LittleEndian.PutUint32(b[12:], uint32(len(b)-indexHeader))
	binary.LittleEndian.PutUint32(b[16:], indexSum(b))
}

// LimitOpen bounds the number of streams that are open at once.
func (c *Cache) LimitOpen(n int64) { c.streams.openLimit = n }

// StoreHeld writes the chunks held in memory to the disk, as the cache does from time
// to time.
func (c *Cache) StoreHeld() { c.streams.held.store() }

// Evict frees at least n bytes, and the space of what is torn.
func (c *Cache) Evict(n int64) { _, _ = c.evictor.evict(n) }
