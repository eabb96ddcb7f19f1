package blockmap

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/edsrzf/mmap-go"
)

// residency says which blocks of a stream are here: one bit a block, in a file
// that is mapped, so that a bit outlives the process that set it.
//
// The file holds two copies of the bitmap. A bit is set in live as soon as the
// block's data has been written, and live is trusted on open when the machine
// has not been rebooted since: the kernel has the data and the bit, even if
// the process was killed. A bit reaches durable only after an fdatasync of the
// data, and durable alone is trusted after a reboot: its bits trail the data,
// so a power cut costs a refetch and nothing else.
//
//	   0    8  magic "thawresi"
//	   8    4  version, 1
//	  12    4  CRC-32C of the header, this field taken as zero
//	  16   32  ID of the stream
//	  48    4  blocks
//	  52   16  boot ID of the machine when live was last opened
//	  68       zeros
//	4096    L  live: L = bytes of the bitmap, rounded up to 4096
//	4096+L  L  durable
//
// Words are 64 bits in the machine's byte order, which is little-endian on
// every machine that thaw runs on.
type residency struct {
	f       File
	m       mmap.MMap
	live    []uint64
	durable []uint64
	blocks  uint32

	// syncing makes sync one caller's at a time. It is held across I/O.
	syncing sync.Mutex

	mu struct {
		sync.Mutex
		// While a sync is under way: the bits cleared since it began. Their
		// blocks may have been filled again, with data that it missed.
		cleared map[uint32]uint64
	}
}

// BootID identifies one run of the machine's kernel.
type BootID [16]byte

// ParseBootID reads the form that Linux has in /proc/sys/kernel/random/boot_id.
func ParseBootID(s string) (id BootID, err error) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != len(id) {
		return id, fmt.Errorf("%q is not a boot ID", s)
	}
	return BootID(b), nil
}

const (
	residencyMagic   = "thawresi"
	residencyVersion = 1
	residencyHeader  = 4096
	residencyBootID  = 52
	residencyUsed    = 68
)

func bitmapLen(blocks uint32) int64 {
	return (int64(blocks)+63)/64*8 + (BlockSize - 1) - ((int64(blocks)+63)/64*8+(BlockSize-1))%BlockSize
}

// openResidency opens or creates the file at path. fresh says that it was
// created, or replaced because it was not what it should have been; cause then
// says why, for the log.
func openResidency(fsys FS, path string, id Digest, blocks uint32, boot BootID) (r *residency, fresh bool, cause error, err error) {
	f, err := fsys.Open(path, true)
	if err != nil {
		return nil, false, nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	bytes := bitmapLen(blocks)
	size := residencyHeader + 2*bytes
	got, _, err := f.Stat()
	if err != nil {
		return nil, false, nil, err
	}
	want := residencyHead(id, blocks)
	head := make([]byte, residencyUsed)
	switch {
	case got == 0:
		fresh = true
	case got != size:
		cause = fmt.Errorf("%s has %d bytes instead of %d", path, got, size)
	default:
		if _, err := f.ReadAt(head, 0); err != nil {
			return nil, false, nil, err
		}
		copy(want[residencyBootID:], head[residencyBootID:])
		sealResidencyHead(want)
		if string(head) != string(want) {
			cause = fmt.Errorf("%s has a damaged header, or another stream's", path)
		}
	}
	if fresh || cause != nil {
		fresh = true
		// From zero length, so that no old bit survives; and written, since
		// setting a bit in a mapped hole of a full disk would be fatal.
		if err := f.Truncate(0); err != nil {
			return nil, false, nil, err
		}
		if _, err := f.WriteAt(make([]byte, size), 0); err != nil {
			return nil, false, nil, err
		}
	}
	m, err := f.Map(size, true)
	if err != nil {
		return nil, false, nil, err
	}
	r = &residency{
		f: f, m: m, blocks: blocks,
		live:    words(m[residencyHeader:][:bytes]),
		durable: words(m[residencyHeader+bytes:][:bytes]),
	}
	if !fresh && BootID(head[residencyBootID:]) != boot {
		copy(r.live, r.durable)
	}
	r.trim()
	copy(want[residencyBootID:], boot[:])
	sealResidencyHead(want)
	copy(m, want)
	if fresh {
		// An old map may come back after a power cut until this one is on
		// disk; not in parts, so that a new header stands over old bits.
		if err := r.flush(); err != nil {
			return nil, false, nil, errors.Join(err, m.Unmap())
		}
	}
	return r, fresh, cause, nil
}

func residencyHead(id Digest, blocks uint32) []byte {
	h := make([]byte, residencyUsed)
	copy(h, residencyMagic)
	binary.LittleEndian.PutUint32(h[8:], residencyVersion)
	copy(h[16:], id[:])
	binary.LittleEndian.PutUint32(h[48:], blocks)
	return h
}

func sealResidencyHead(h []byte) {
	clear(h[12:16])
	binary.LittleEndian.PutUint32(h[12:], crc32.Checksum(h, castagnoli))
}

// words looks at mapped, and so page-aligned, bytes as words.
func words(b []byte) []uint64 {
	if len(b) == 0 {
		return nil
	}
	return unsafe.Slice((*uint64)(unsafe.Pointer(&b[0])), len(b)/8)
}

// trim clears the bits behind the last block: nothing may have set them.
func (r *residency) trim() {
	for _, w := range [][]uint64{r.live, r.durable} {
		for i := range w {
			if first := uint64(i) * 64; first+64 > uint64(r.blocks) {
				keep := uint64(0)
				if first < uint64(r.blocks) {
					keep = 1<<(uint64(r.blocks)-first) - 1
				}
				w[i] &= keep
			}
		}
	}
}

// eachWord calls f for each word that holds a bit of the n blocks from b.
func eachWord(b, n uint32, f func(i uint32, mask uint64)) {
	for n > 0 {
		bit := b % 64
		m := min(64-bit, n)
		f(b/64, ^uint64(0)>>(64-m)<<bit)
		b, n = b+m, n-m
	}
}

// has says whether all of the n blocks from b are here.
func (r *residency) has(b, n uint32) bool {
	for n > 0 {
		bit := b % 64
		m := min(64-bit, n)
		mask := ^uint64(0) >> (64 - m) << bit
		if atomic.LoadUint64(&r.live[b/64])&mask != mask {
			return false
		}
		b, n = b+m, n-m
	}
	return true
}

// set marks n blocks from b as here, and returns how many of them were not.
// Their data has been written.
func (r *residency) set(b, n uint32) (added uint32) {
	eachWord(b, n, func(i uint32, mask uint64) {
		old := atomic.OrUint64(&r.live[i], mask)
		added += uint32(bits.OnesCount64(mask &^ old))
	})
	return added
}

// clear marks n blocks from b as gone, in both copies, and returns how many of
// them were here. Before the data goes, flush must have returned.
func (r *residency) clear(b, n uint32) (gone uint32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	eachWord(b, n, func(i uint32, mask uint64) {
		gone += uint32(bits.OnesCount64(atomic.AndUint64(&r.live[i], ^mask) & mask))
		atomic.AndUint64(&r.durable[i], ^mask)
		if r.mu.cleared != nil {
			r.mu.cleared[i] |= mask
		}
	})
	return gone
}

// flush makes the map itself durable.
func (r *residency) flush() error { return r.f.Sync() }

// sync makes durable what is live: it makes the data durable by syncData, and
// then copies the bits that were live before.
func (r *residency) sync(syncData func() error) error {
	r.syncing.Lock()
	defer r.syncing.Unlock()
	r.mu.Lock()
	r.mu.cleared = make(map[uint32]uint64)
	r.mu.Unlock()
	type change struct {
		i    int
		bits uint64
	}
	var changes []change
	for i := range r.live {
		if w := atomic.LoadUint64(&r.live[i]) &^ atomic.LoadUint64(&r.durable[i]); w != 0 {
			changes = append(changes, change{i, w})
		}
	}
	var err error
	if len(changes) > 0 {
		err = syncData()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		for _, c := range changes {
			atomic.OrUint64(&r.durable[c.i], c.bits&^r.mu.cleared[uint32(c.i)])
		}
	}
	r.mu.cleared = nil
	return err
}

// run is the length of the longest run of blocks from b, within n, that are
// all here or all not.
func (r *residency) run(b, n uint32) (length uint32, here bool) {
	here = r.has(b, 1)
	for length < n {
		w := atomic.LoadUint64(&r.live[(b+length)/64]) >> ((b + length) % 64)
		if here {
			w = ^w
		}
		left := 64 - (b+length)%64
		same := min(uint32(bits.TrailingZeros64(w)), left)
		length += same
		if same < left {
			break
		}
	}
	return min(length, n), here
}

// count is the number of blocks that are here.
func (r *residency) count() (n int64) {
	for i := range r.live {
		n += int64(bits.OnesCount64(atomic.LoadUint64(&r.live[i])))
	}
	return n
}

func (r *residency) close() error {
	return errors.Join(r.m.Unmap(), r.f.Close())
}
