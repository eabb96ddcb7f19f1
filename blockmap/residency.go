package blockmap

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"math/bits"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
)

// residency says which blocks of a stream are here: one bit a block, in memory,
// and in a file so that a bit outlives the process that set it. The file is
// written with pwrite and never mapped: on a full disk a write to a mapping is
// a signal, and this is an error.
//
// There are two copies of the bitmap. A bit is set in live as soon as the
// block's data has been written. A bit reaches durable only after an fdatasync
// of the data. On open, durable is trusted if the data is still in the file that
// the header names: a copy of a cache was made while data and bits changed. Live
// is trusted only if besides the machine has not been rebooted and the file
// system has not been mounted anew since: then the kernel has the data and the
// bit, even if the process was killed. So a power cut, or a disk that went away,
// costs a refetch and nothing else.
//
//	   0    8  magic "thawresi"
//	   8    4  version, 2
//	  12    4  CRC-32C of bytes 0 to 103, this field taken as zero
//	  16   32  ID of the stream
//	  48    4  blocks
//	  52    4  zero
//	  56   16  boot ID of the machine when live was last begun
//	  72    8  mount ID then, 0 if not known (statx, STATX_MNT_ID_UNIQUE)
//	  80    8  device of the data's file then
//	  88    8  inode of the data's file
//	  96    8  when that inode was made, ns since 1970, 0 if not known
//	 104       zeros
//	4096    L  live: L = bytes of the bitmap, rounded up to 4096
//	4096+L  L  durable
//
// Numbers and words of 64 bits are little-endian.
type residency struct {
	id     Digest
	blocks uint32

	// Words are read and changed atomically.
	live    []uint64
	durable []uint64

	// syncing makes sync one caller's at a time. It is held across I/O.
	syncing sync.Mutex

	mu struct {
		sync.Mutex
		// While a sync is under way: the bits cleared since it began. Their
		// blocks may have been filled again, with data that it missed.
		cleared map[uint32]uint64
	}

	// file is the copy on disk. Its lock is held across writes of it, so that
	// of two writes of one word the later one has both changes. They are of a
	// few words, into the page cache.
	file struct {
		sync.Mutex
		fsys  FS
		path  string
		f     File // nil: closed
		head  []byte
		stale bool // it does not say what memory says: all of it is to be written
		gone  bool // there is none: it could not be written, and must not be believed

		// data is the file that the blocks are in, once there is one.
		data  FileID
		known bool
	}
}

// BootID identifies one run of the machine's kernel. The zero BootID is not
// known.
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
	residencyVersion = 2
	residencyHeader  = 4096
	residencyHead    = 104 // of it in use
	residencyBoot    = 56  // where what was true then begins
)

// bitmapLen is the length of a bitmap in its file, in bytes.
func bitmapLen(blocks uint32) int64 {
	n := (int64(blocks) + 63) / 64 * 8
	return (n + BlockSize - 1) &^ (BlockSize - 1)
}

func residencySize(blocks uint32) int64 { return residencyHeader + 2*bitmapLen(blocks) }

// newResidency has no blocks here, and no file.
func newResidency(id Digest, blocks uint32) *residency {
	words := (int(blocks) + 63) / 64
	r := &residency{id: id, blocks: blocks, live: make([]uint64, words), durable: make([]uint64, words)}
	r.file.gone = true
	return r
}

// errCopied says that a map is of another file than the one that lies beside it.
var errCopied = errors.New("the data is not in the file that it was written to: the cache was copied")

// load takes over what the file at path says, or fails and has nothing here. data
// is the file of the stream's data as it is now.
func (r *residency) load(fsys FS, path string, boot BootID, data FileID) error {
	b, err := readFile(fsys, path, residencySize(r.blocks))
	if err != nil {
		return err
	}
	if int64(len(b)) != residencySize(r.blocks) {
		return fmt.Errorf("%s has %d bytes instead of %d", path, len(b), residencySize(r.blocks))
	}
	was, then, ok := r.readHead(b)
	switch {
	case !ok:
		return fmt.Errorf("%s has a damaged header, or another stream's", path)
	case !then.sameFile(data):
		return fmt.Errorf("%s: %w", path, errCopied)
	}
	trusted := boot != BootID{} && boot == was && data.Mount != 0 && then == data
	words := func(w []uint64, b []byte) {
		for i := range w {
			w[i] = binary.LittleEndian.Uint64(b[8*i:])
		}
	}
	n := bitmapLen(r.blocks)
	words(r.durable, b[residencyHeader+n:])
	if trusted {
		words(r.live, b[residencyHeader:])
	} else {
		copy(r.live, r.durable)
	}
	r.trim()
	r.file.gone = false
	r.file.data, r.file.known = data, true
	return nil
}

// identity is the file that the blocks are in, if there is one.
func (r *residency) identity() (data FileID, known bool) {
	r.file.Lock()
	defer r.file.Unlock()
	return r.file.data, r.file.known
}

// forgetIdentity lets the blocks to come be in another file.
func (r *residency) forgetIdentity() {
	r.file.Lock()
	defer r.file.Unlock()
	r.file.data, r.file.known = FileID{}, false
}

// attach opens the file, or makes it, to be kept up to date from now on. What it
// says already is what load has read, unless data, the boot or the mount are
// other ones by now.
func (r *residency) attach(fsys FS, path string, boot BootID, data FileID) error {
	r.file.Lock()
	defer r.file.Unlock()
	if r.file.f != nil {
		return nil
	}
	f, err := fsys.Open(path, true)
	if err != nil {
		return err
	}
	size, _, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	r.file.fsys, r.file.path, r.file.f = fsys, path, f
	r.file.data, r.file.known = data, true
	r.file.head = r.makeHead(boot, data)
	if size == 0 {
		f.InPlace()
	}
	if !r.file.stale && !r.file.gone && size == residencySize(r.blocks) {
		head := make([]byte, residencyHead)
		if _, err := f.ReadAt(head, 0); err == nil && string(head) == string(r.file.head) {
			return nil
		}
	}
	r.file.stale, r.file.gone = true, false
	// A disk that is full keeps a map that says less than is here. That is
	// all right, and tried again with the next sync.
	_ = r.writeAll()
	return nil
}

// detach closes the file.
func (r *residency) detach() error {
	r.file.Lock()
	defer r.file.Unlock()
	if r.file.f == nil {
		return nil
	}
	err := r.file.f.Close()
	r.file.f = nil
	return err
}

func (r *residency) makeHead(boot BootID, data FileID) []byte {
	h := make([]byte, residencyHead)
	copy(h, residencyMagic)
	binary.LittleEndian.PutUint32(h[8:], residencyVersion)
	copy(h[16:], r.id[:])
	binary.LittleEndian.PutUint32(h[48:], r.blocks)
	copy(h[residencyBoot:], boot[:])
	binary.LittleEndian.PutUint64(h[72:], data.Mount)
	binary.LittleEndian.PutUint64(h[80:], data.Device)
	binary.LittleEndian.PutUint64(h[88:], data.Inode)
	binary.LittleEndian.PutUint64(h[96:], uint64(data.Born))
	binary.LittleEndian.PutUint32(h[12:], crc32.Checksum(h, castagnoli))
	return h
}

// readHead reads what makeHead makes, if it is of this stream.
func (r *residency) readHead(h []byte) (boot BootID, data FileID, ok bool) {
	copy(boot[:], h[residencyBoot:])
	data = FileID{
		Mount: binary.LittleEndian.Uint64(h[72:]), Device: binary.LittleEndian.Uint64(h[80:]),
		Inode: binary.LittleEndian.Uint64(h[88:]), Born: int64(binary.LittleEndian.Uint64(h[96:])),
	}
	return boot, data, string(h[:residencyHead]) == string(r.makeHead(boot, data))
}

// writeAll writes the whole file: the header last, since with an older one
// nothing is believed that is not durable. r.file is held.
func (r *residency) writeAll() error {
	size := residencySize(r.blocks)
	if err := r.file.f.Truncate(size); err != nil {
		return err
	}
	words := uint32(len(r.live))
	err := r.writeWords(0, words)
	if err == nil {
		head := make([]byte, residencyHeader)
		copy(head, r.file.head)
		_, err = r.file.f.WriteAt(head, 0)
	}
	r.file.stale = err != nil
	return err
}

// writeWords writes words first to end of both copies. r.file is held.
func (r *residency) writeWords(first, end uint32) error {
	for at, words := range [][]uint64{r.live, r.durable} {
		base := residencyHeader + int64(at)*bitmapLen(r.blocks)
		for i := first; i < end; {
			n := min(end-i, 1<<15)
			b := make([]byte, 0, 8*n)
			for k := range n {
				b = binary.LittleEndian.AppendUint64(b, atomic.LoadUint64(&words[i+k]))
			}
			if _, err := r.file.f.WriteAt(b, base+8*int64(i)); err != nil {
				return err
			}
			i += n
		}
	}
	return nil
}

// write brings the file up to date for n blocks from b, as far as it can be.
func (r *residency) write(b, n uint32) {
	r.file.Lock()
	defer r.file.Unlock()
	if r.file.f == nil || r.file.stale {
		r.file.stale = true
		return // it is written whole when it is opened, synced or flushed
	}
	if r.writeWords(b/64, (b+n-1)/64+1) != nil {
		r.file.stale = true
	}
}

// trim clears the bits behind the last block: nothing may have set them.
func (r *residency) trim() {
	if rest := r.blocks % 64; rest != 0 {
		last := len(r.live) - 1
		r.live[last] &= 1<<rest - 1
		r.durable[last] &= 1<<rest - 1
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
	r.write(b, n)
	return added
}

// clear marks n blocks from b as gone, in both copies, and returns how many of
// them were here. Before the data goes, flush must have returned.
func (r *residency) clear(b, n uint32) (gone uint32) {
	r.mu.Lock()
	eachWord(b, n, func(i uint32, mask uint64) {
		gone += uint32(bits.OnesCount64(atomic.AndUint64(&r.live[i], ^mask) & mask))
		atomic.AndUint64(&r.durable[i], ^mask)
		if r.mu.cleared != nil {
			r.mu.cleared[i] |= mask
		}
	})
	r.mu.Unlock()
	r.write(b, n)
	return gone
}

// flush makes the file durable, so that after a power cut it says nothing of
// blocks that were cleared. Where the disk has no room for it there is no file
// from then on, until a sync can make one: that says nothing either. The file
// is attached.
func (r *residency) flush() error {
	r.file.Lock()
	f, err := r.file.f, error(nil)
	if f != nil && r.file.stale {
		if err = r.writeAll(); diskFull(err) {
			f, err = nil, r.forget()
		}
	}
	r.file.Unlock()
	if f == nil || err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		// The kernel says so once, and takes what it could not write for
		// written: only new writes of all of it make the next sync mean something.
		r.file.Lock()
		r.file.stale = true
		r.file.Unlock()
		return err
	}
	return nil
}

// forget removes the file for good. r.file is held.
func (r *residency) forget() error {
	err := errors.Join(r.file.f.Close(), r.file.fsys.RemoveAll(r.file.path))
	if err == nil {
		err = r.file.fsys.SyncDir(filepath.Dir(r.file.path))
	}
	r.file.f, r.file.stale, r.file.gone = nil, true, err == nil
	return err
}

// sync makes durable what is live: it makes the data durable by syncData, and
// then copies the bits that were live before. Where syncData fails it calls lost
// for each run of blocks that may never have reached the disk. The kernel
// reports that once, and calls the pages clean: so these blocks are not here.
func (r *residency) sync(syncData func() error, lost func(b, n uint32)) error {
	r.syncing.Lock()
	defer r.syncing.Unlock()
	r.mu.Lock()
	r.mu.cleared = make(map[uint32]uint64)
	r.mu.Unlock()
	type change struct {
		i    uint32
		bits uint64
	}
	var changes []change
	for i := range r.live {
		if w := atomic.LoadUint64(&r.live[i]) &^ atomic.LoadUint64(&r.durable[i]); w != 0 {
			changes = append(changes, change{uint32(i), w})
		}
	}
	var err error
	if len(changes) > 0 {
		err = syncData()
	}
	r.mu.Lock()
	if err == nil {
		for _, c := range changes {
			atomic.OrUint64(&r.durable[c.i], c.bits&^r.mu.cleared[c.i])
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
	r.file.Lock()
	defer r.file.Unlock()
	switch {
	case r.file.f == nil:
		return nil
	case r.file.stale:
		return r.writeAll()
	case len(changes) > 0:
		if err := r.writeWords(changes[0].i, changes[len(changes)-1].i+1); err != nil {
			r.file.stale = true
			return err
		}
	}
	return nil
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
