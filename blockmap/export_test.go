package blockmap

import "encoding/binary"

// SealIndex gives b the length and the checksum of a valid index.
func SealIndex(b []byte) {
	binary.LittleEndian.PutUint32(b[12:], uint32(len(b)-indexHeader))
	binary.LittleEndian.PutUint32(b[16:], indexSum(b))
}

// LimitOpen bounds the number of streams that are open at once.
func (c *Cache) LimitOpen(n int64) { c.streams.openLimit = n }

// CloseIdle closes damaged files and some of those that images have, as the cache does where
// there are too many.
func (c *Cache) CloseIdle() { c.streams.closeIdle(true) }

// StoreHeld writes the chunks held in memory to the disk, as the cache does from time
// to time.
func (c *Cache) StoreHeld() { c.streams.held.store() }

// Evict frees at least n bytes, and the space of what is torn.
func (c *Cache) Evict(n int64) { _, _ = c.evictor.evict(n) }

// ReadWithThreads has the cache read its disk as where there is no io_uring. It is called
// before the first read.
func (c *Cache) ReadWithThreads() { c.streams.reads.threads = true }

// Reading is how many reads of the disk have not ended.
func (c *Cache) Reading() int64 { return c.streams.reads.n.Load() }

// TrustMemory has the cache believe that all pages of its files are in memory, as it does
// once that was so for a while.
func (c *Cache) TrustMemory() { c.streams.memory.checking.Store(false) }
