package blockmap

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

// residency says which blocks of a data file are resident: one bit a block, in
// memory, and in a mapFile so that a bit outlives the process that set it. It
// knows nothing of streams and chunks.
//
// There are two copies of the bitmap. A bit is set in live as soon as the block's
// data has been written. It reaches durable only after an fdatasync of the data.
// On open, durable is trusted if the data is still in the file that the header
// names: a copy of a cache was made while data and bits changed. Live is trusted
// only if, besides, the machine has not rebooted and the file system has the same
// superblock: then the kernel has the data and the bit, even if the process was
// killed, and whatever the mount namespace of the next one. So a power cut, or a disk
// that went away, costs a refetch and nothing else.
type residency struct {
	file mapFile

	// syncing makes sync one caller's at a time. It is held across I/O.
	syncing sync.Mutex

	// mu is held to set and clear bits, and to begin and end a sync: a sync sees all
	// bits of a call of set, or none.
	mu struct {
		sync.Mutex
		// While a sync is under way: the bits cleared since it began. Their
		// blocks may have been filled again, with data that it missed.
		cleared map[uint32]uint64
	}
}

// newResidency has no resident blocks, and no file.
func newResidency(id Digest, blocks uint32) *residency {
	r := new(residency)
	r.file.id, r.file.blocks = id, blocks
	r.file.live, r.file.durable = newBitmap(blocks), newBitmap(blocks)
	r.file.mu.gone = true
	return r
}

// has says whether all of the n blocks from b are resident.
func (r *residency) has(b, n uint32) bool { return r.file.live.has(b, n) }

// any says whether one of the n blocks from b is resident.
func (r *residency) any(b, n uint32) bool { return r.file.live.any(b, n) }

// run is the length of the longest run of blocks from b, at most n, that are all
// resident or all absent.
func (r *residency) run(b, n uint32) (length uint32, resident bool) { return r.file.live.run(b, n) }

// absent is how many of the n blocks from b are not resident.
func (r *residency) absent(b, n uint32) uint32 { return n - r.file.live.countRange(b, n) }

// count is the number of resident blocks.
func (r *residency) count() int64 { return r.file.live.count() }

// set marks n blocks from b as resident, and returns how many of them were not.
// Their data has been written.
func (r *residency) set(b, n uint32) (added uint32) {
	r.mu.Lock()
	added = r.file.live.set(b, n)
	r.mu.Unlock()
	r.file.write(b, n)
	return added
}

// clear marks n blocks from b as absent, in both copies, and returns how many of
// them were resident. Their data may go once flush has returned.
func (r *residency) clear(b, n uint32) (gone uint32) {
	r.mu.Lock()
	gone = r.file.live.clear(b, n)
	r.file.durable.clear(b, n)
	if r.mu.cleared != nil {
		eachWord(b, n, func(i uint32, mask uint64) { r.mu.cleared[i] |= mask })
	}
	r.mu.Unlock()
	r.file.write(b, n)
	return gone
}

// flush makes durable that blocks were cleared.
func (r *residency) flush() error { return r.file.flush() }

// sync makes durable what is live: it makes the data durable by syncData, and
// then copies the bits that were live before. Where syncData fails it calls lost
// for each run of blocks that may never have reached the disk: the kernel reports
// that once, and takes the pages for written then.
func (r *residency) sync(syncData func() error, lost func(b, n uint32)) error {
	r.syncing.Lock()
	defer r.syncing.Unlock()
	type change struct {
		i    uint32
		bits uint64
	}
	var changes []change
	live, durable := r.file.live, r.file.durable
	r.mu.Lock()
	r.mu.cleared = make(map[uint32]uint64)
	for i := range uint32(len(live)) {
		if w := live.word(i) &^ durable.word(i); w != 0 {
			changes = append(changes, change{i, w})
		}
	}
	r.mu.Unlock()
	var err error
	if len(changes) > 0 {
		err = syncData()
	}
	r.mu.Lock()
	if err == nil {
		for _, c := range changes {
			atomic.OrUint64(&durable[c.i], c.bits&^r.mu.cleared[c.i])
		}
	}
	r.mu.cleared = nil
	r.mu.Unlock()
	if err != nil {
		for _, c := range changes {
			for w := c.bits; w != 0; {
				first := bits.TrailingZeros64(w)
				n := bits.TrailingZeros64(^(w >> first))
				lost(c.i*64+uint32(first), uint32(n))
				w &^= (^uint64(0) >> (64 - n)) << first
			}
		}
		return err
	}
	if len(changes) == 0 {
		return r.file.update(0, 0)
	}
	return r.file.update(changes[0].i, changes[len(changes)-1].i+1)
}
