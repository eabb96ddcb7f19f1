package ext4

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// The log of a journal. Its first block is that of journal.go; all of it is big-endian.
// The log is a ring of transactions: descriptor blocks, each followed by the blocks that
// it lists, revoke blocks, and a commit block at the end. Each of these begins with a
// header:
const (
	jhMagic    = 0x0 // 4
	jhType     = 0x4 // 4
	jhSequence = 0x8 // 4: number of the transaction
	jhSize     = 12

	jhDescriptor = 1
	jhCommit     = 2
	jhRevoke     = 5

	// A descriptor block goes on with tags. With checksums of version 3, a tag is
	//
	//	0  4  block on the device
	//	4  4  flags
	//	8  4  block, high half
	//	12 4  crc32c(journal seed, sequence, block as it is in the log)
	//
	// and without them
	//
	//	0  4  block on the device
	//	4  2  with checksums of version 2, the low half of that crc32c
	//	6  2  flags
	//	8  4  with 64-bit numbers only: block, high half
	//	.. 2  with checksums of version 2: nothing
	//
	// Unless tagSameUUID is set, 16 bytes follow.
	tagEscaped  = 0x1 // the block began with the magic number, and begins with zeros in the log
	tagSameUUID = 0x2
	tagLast     = 0x8

	// A revoke block goes on with the bytes in use, and numbers of blocks of 4 or 8
	// bytes: no copy of such a block in this or an earlier transaction is replayed.
	rvCount = 0xC // 4
	rvFirst = 0x10

	// A commit block goes on with
	cmChecksum = 0x10 // 4: crc32c(journal seed, the block with 0 here)
	cmSeconds  = 0x30 // 8

	// With checksums, descriptor and revoke blocks end in crc32c(journal seed, the block
	// with 0 here).
	jtChecksum = blockSize - 4

	jsCompatChecksum = 0x1
	jsRevokes        = 0x1
	js64bit          = 0x2
	jsAsyncCommit    = 0x4
	jsFastCommit     = 0x20

	// maxJournal bounds the memory of a recovery. mke2fs makes journals of a quarter of it.
	maxJournal = 1 << 20 // blocks
	// maxJournalExtents bounds the time of a look-up. mke2fs and thaw make 8 at most.
	maxJournalExtents = 1024
)

var be = binary.BigEndian

// Recovered is a filesystem as the next mount will make it: the device with the
// transactions of its journal replayed, which lie in the log until then. It reads the
// device on each read, and changes nothing. It is for one goroutine at a time.
type Recovered struct {
	r       io.ReaderAt
	needed  bool
	journal uint32            // its first block on the device
	logged  map[uint32]logged // by block of the device
	fixed   [2]fixedBlock     // superblocks of the filesystem and of the journal

	transactions, revoked int
}

// logged is where the log has a block.
type logged struct {
	at      uint32 // block of the device
	escaped bool
}

type fixedBlock struct {
	block uint32
	bytes []byte // nil: as it is
}

// Replayed says what a recovery has done, or will do.
type Replayed struct {
	Needed       bool // the filesystem was not clean
	Transactions int
	Blocks       int // written to their places
	Revoked      int // copies in the log that are out of date
}

// Recover reads the journal of the filesystem on a device of size bytes. A filesystem
// that needs no recovery is Recovered as it is. Like Check, it trusts nothing that it
// reads; it fails if the log is damaged, and for journals with features that thaw does
// not replay. Journals of filesystems that thaw lays out have none of these.
func Recover(r io.ReaderAt, size int64) (*Recovered, error) {
	v := &Recovered{r: r, logged: make(map[uint32]logged)}
	c := &checker{r: r, size: size, used: true}
	if err := c.checkSuperblock(); err != nil {
		return nil, fmt.Errorf("ext4: %w", err)
	}
	if c.incompat&incompatRecover == 0 {
		return v, nil
	}
	v.needed = true
	if err := v.read(c); err != nil {
		return nil, fmt.Errorf("ext4: recover the journal: %w", err)
	}
	return v, nil
}

// Replayed says what the recovery consists of.
func (v *Recovered) Replayed() Replayed {
	return Replayed{v.needed, v.transactions, len(v.logged), v.revoked}
}

// ReadAt implements io.ReaderAt.
func (v *Recovered) ReadAt(p []byte, off int64) (int, error) {
	if !v.needed || off < 0 {
		return v.r.ReadAt(p, off)
	}
	n := 0
	for n < len(p) {
		at := off + int64(n)
		block, in := at/blockSize, at%blockSize
		rest := p[n:]
		if !v.changed(block) {
			// All up to the next block that the recovery changes.
			l := blockSize - in
			for l < int64(len(rest)) && !v.changed((at+l)/blockSize) {
				l += blockSize
			}
			rest = rest[:min(l, int64(len(rest)))]
			m, err := v.r.ReadAt(rest, at)
			if n += m; m < len(rest) {
				return n, err
			}
			continue
		}
		var b [blockSize]byte
		if err := v.block(b[:], uint32(block)); err != nil {
			return n, err
		}
		n += copy(rest, b[in:])
	}
	return n, nil
}

// changed reports whether the recovery changes a block.
func (v *Recovered) changed(block int64) bool {
	if block > maxBlocks {
		return false
	}
	_, ok := v.logged[uint32(block)]
	return ok || v.fixedAt(uint32(block)) != nil
}

func (v *Recovered) fixedAt(block uint32) []byte {
	for i := range v.fixed {
		if f := &v.fixed[i]; f.bytes != nil && f.block == block {
			return f.bytes
		}
	}
	return nil
}

// block reads a block that the recovery changes, as it will be.
func (v *Recovered) block(b []byte, block uint32) error {
	if f := v.fixedAt(block); f != nil {
		copy(b, f)
		return nil
	}
	return v.copyOf(b, block)
}

// copyOf reads the copy of a block in the log, or the block itself if there is none.
func (v *Recovered) copyOf(b []byte, block uint32) error {
	l, ok := v.logged[block]
	if !ok {
		l.at = block
	}
	if n, err := v.r.ReadAt(b, int64(l.at)*blockSize); n < len(b) {
		return fmt.Errorf("read block %d: %w", l.at, unexpectedEOF(err))
	}
	if l.escaped {
		be.PutUint32(b, journalMagic)
	}
	return nil
}

func unexpectedEOF(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// read finds the journal, reads its log, and prepares both superblocks.
func (v *Recovered) read(c *checker) error {
	if !c.hasJournal {
		return errors.New("the superblock asks for it, but the filesystem has no journal")
	}
	j, err := c.openJournal()
	if err != nil {
		return err
	}
	next, err := j.replay(v)
	if err != nil {
		return err
	}
	v.journal = j.extents[0].device

	// The log is empty from now on.
	js := j.super
	be.PutUint32(js[jsSequence:], next)
	be.PutUint32(js[jsStart:], 0)
	j.sealSuper(js[:])
	v.fixed[1] = fixedBlock{v.journal, js[:]}

	var b [blockSize]byte
	if err := v.block(b[:], 0); err != nil {
		return err
	}
	s := b[superblockOffset:][:superblockSize]
	if le.Uint16(s[sbMagic:]) != superMagic || le.Uint32(s[sbChecksum:]) != crc32c(^uint32(0), s[:sbChecksum]) {
		return errors.New("the superblock in the log does not match its checksum")
	}
	le.PutUint32(s[sbFeatureIncompat:], le.Uint32(s[sbFeatureIncompat:])&^incompatRecover)
	le.PutUint32(s[sbChecksum:], crc32c(^uint32(0), s[:sbChecksum]))
	v.fixed[0] = fixedBlock{0, b[:]}
	v.count(c, s)
	return nil
}

// count sets the free blocks and inodes of the superblock to the sums of the groups.
// The kernel keeps only those of the groups up to date, and sums them up at a mount. If
// a descriptor is damaged, the superblock stays as it is: the next check will say so.
func (v *Recovered) count(c *checker, s []byte) {
	blocks, inodes := uint64(0), uint64(0)
	var b [blockSize]byte
	for i := range c.groupCount {
		if i%descsPerBlock == 0 {
			if n, _ := v.ReadAt(b[:], int64(1+i/descsPerBlock)*blockSize); n < len(b) {
				return
			}
		}
		d := b[i%descsPerBlock*descSize:][:descSize]
		if le.Uint16(d[gdChecksum:]) != descChecksum(c.seed, i, d) {
			return
		}
		blocks += uint64(getHalves(d, gdFreeBlocks, gdFreeBlocksHigh))
		inodes += uint64(getHalves(d, gdFreeInodes, gdFreeInodesHigh))
	}
	if blocks > uint64(c.blocks) || inodes > maxBlocks {
		return
	}
	le.PutUint32(s[sbFreeBlocks:], uint32(blocks))
	le.PutUint32(s[sbFreeInodes:], uint32(inodes))
	le.PutUint32(s[sbChecksum:], crc32c(^uint32(0), s[:sbChecksum]))
}

// journal is the file of the journal.
type journal struct {
	c       *checker
	extents []extent // without gaps
	super   [blockSize]byte
	seed    uint32
	csum    bool // descriptor, revoke and commit blocks have checksums
	tag     int  // bytes of a tag
	wide    bool // 64-bit numbers of blocks
	v3      bool
	first   uint32 // block of the log
	end     uint32
}

// openJournal finds the journal and reads its superblock.
func (c *checker) openJournal() (*journal, error) {
	j := &journal{c: c}
	var b [blockSize]byte
	if err := c.readBlocks(b[:], 1, "the descriptor table"); err != nil {
		return nil, err
	}
	// The descriptor and the inode of the journal are the same before and after a
	// recovery, but for the counts.
	table := le.Uint32(b[gdInodeTable:])
	if le.Uint32(b[gdInodeTableHigh:]) != 0 || table >= c.blocks {
		return nil, errors.New("the inodes of group 0 are beyond the device")
	}
	if c.perGroup < journalInode {
		return nil, errors.New("group 0 has no inode for the journal")
	}
	var in [inodeSize]byte
	at := int64(table)*blockSize + (journalInode-1)*inodeSize
	if n, err := c.r.ReadAt(in[:], at); n < len(in) {
		return nil, fmt.Errorf("read the journal's inode: %w", unexpectedEOF(err))
	}
	if err := c.sum(getHalves(in[:], inChecksum, inChecksumHi), inodeChecksum(c.seed, journalInode, in[:]), "the journal's inode"); err != nil {
		return nil, err
	}
	length := inodeLength(in[:])
	if le.Uint32(in[inFlags:])&inodeFlagExtents == 0 || uint32(le.Uint16(in[inMode:]))&modeType != modeRegular ||
		length%blockSize != 0 || length == 0 || length/blockSize > uint64(c.blocks) {
		return nil, fmt.Errorf("the journal's inode is not one of a journal: %d bytes", length)
	}
	j.end = uint32(length / blockSize)
	if j.end > maxJournal {
		return nil, fmt.Errorf("the journal has %d MiB, and thaw replays one of at most %d MiB: mount the filesystem, or run e2fsck on the device",
			length>>20, int64(maxJournal)*blockSize>>20)
	}
	next := uint32(0)
	if _, err := c.extents(journalInode, in[:], false, func(e extent, unwritten bool) error {
		if unwritten || e.file != next || e.count > j.end-next {
			return fmt.Errorf("the journal has a hole, or is longer than %d blocks, at block %d", j.end, next)
		}
		if len(j.extents) == maxJournalExtents {
			return fmt.Errorf("the journal lies in more than %d pieces", maxJournalExtents)
		}
		next += e.count
		j.extents = append(j.extents, e)
		return nil
	}); err != nil {
		return nil, fmt.Errorf("the journal's inode %w", err)
	}
	if next != j.end {
		return nil, fmt.Errorf("the journal has %d blocks of %d", next, j.end)
	}
	if err := c.readBlocks(j.super[:], j.extents[0].device, "the journal"); err != nil {
		return nil, err
	}
	return j, j.checkSuper()
}

func (j *journal) checkSuper() error {
	b := j.super[:]
	incompat := be.Uint32(b[jsIncompat:])
	switch {
	case be.Uint32(b[jsMagic:]) != journalMagic || be.Uint32(b[jsBlockType:]) != 4:
		return errors.New("the journal has no superblock of version 2")
	case incompat&jsFastCommit != 0:
		return errors.New("the journal has fast commits, which thaw does not replay: mount the filesystem, or run e2fsck on the device")
	case incompat&jsAsyncCommit != 0:
		return errors.New("the journal has asynchronous commits, which thaw does not replay: mount the filesystem, or run e2fsck on the device")
	case be.Uint32(b[jsCompat:])&jsCompatChecksum != 0:
		return errors.New("the journal has checksums of version 1, which thaw does not replay: mount the filesystem, or run e2fsck on the device")
	case be.Uint32(b[jsCompat:]) != 0 || be.Uint32(b[jsROCompat:]) != 0 || incompat&^(jsRevokes|js64bit|jsChecksumV2|jsChecksumV3) != 0:
		return fmt.Errorf("the journal has unknown features %#x, %#x and %#x", be.Uint32(b[jsCompat:]), incompat, be.Uint32(b[jsROCompat:]))
	case incompat&jsChecksumV2 != 0 && incompat&jsChecksumV3 != 0:
		return errors.New("the journal has checksums of versions 2 and 3")
	}
	j.csum = incompat&(jsChecksumV2|jsChecksumV3) != 0
	j.v3 = incompat&jsChecksumV3 != 0
	j.wide = incompat&js64bit != 0
	j.seed = crc32c(^uint32(0), b[jsUUID:jsUUID+16])
	switch {
	case j.v3:
		j.tag = 16
	default:
		j.tag = 8
		if incompat&jsChecksumV2 != 0 {
			j.tag += 2
		}
		if j.wide {
			j.tag += 4
		}
	}
	if j.csum {
		sealed := j.super
		j.sealSuper(sealed[:])
		if err := j.c.sum(be.Uint32(b[jsChecksum:]), be.Uint32(sealed[jsChecksum:]), "the journal's superblock"); err != nil {
			return err
		}
	}
	j.first = be.Uint32(b[jsFirst:])
	start := be.Uint32(b[jsStart:])
	if be.Uint32(b[jsBlockSize:]) != blockSize || be.Uint32(b[jsMaxLen:]) != j.end || j.first == 0 || j.first >= j.end ||
		start != 0 && (start < j.first || start >= j.end) {
		return fmt.Errorf("the journal of %d blocks says %d blocks of %d bytes, a log from block %d on, and a start at block %d",
			j.end, be.Uint32(b[jsMaxLen:]), be.Uint32(b[jsBlockSize:]), j.first, start)
	}
	return nil
}

// sealSuper sets the checksum of a superblock of the journal, if it has one.
func (j *journal) sealSuper(b []byte) {
	if j.csum {
		be.PutUint32(b[jsChecksum:], 0)
		be.PutUint32(b[jsChecksum:], crc32c(^uint32(0), b[:1024]))
	}
}

// device is where a block of the journal lies.
func (j *journal) device(block uint32) uint32 {
	i, ok := slices.BinarySearchFunc(j.extents, block, func(e extent, b uint32) int { return cmp.Compare(e.file, b) })
	if !ok {
		i--
	}
	return j.extents[i].device + block - j.extents[i].file
}

// holds reports whether a block of the device is one of the journal.
func (j *journal) holds(block uint32) bool {
	for _, e := range j.extents {
		if block >= e.device && block-e.device < e.count {
			return true
		}
	}
	return false
}

// logBlock is a descriptor or revoke block.
type logBlock struct {
	at       uint32 // in the journal
	sequence uint32
}

// log is a walk through the ring.
type log struct {
	*journal
	at    uint32
	steps uint32 // blocks passed
	buf   [blockSize]byte
}

// pass goes on by n blocks. A ring is passed once.
func (l *log) pass(n uint32) error {
	if l.steps += n; n > l.end || l.steps > l.end {
		return errors.New("the log does not end")
	}
	if l.at += n; l.at >= l.end {
		l.at -= l.end - l.first
	}
	return nil
}

func (l *log) read() error { return l.c.readBlocks(l.buf[:], l.device(l.at), "the journal") }

// sealed reports whether the descriptor or revoke block in buf has its checksum.
func (l *log) sealed() bool {
	return !l.csum || l.c.lax || crc32cHole(crc32c(l.seed, l.buf[:jtChecksum]), 4) == be.Uint32(l.buf[jtChecksum:])
}

// committed reports whether the commit block in buf has its checksum.
func (l *log) committed() bool {
	sum := crc32c(crc32cHole(crc32c(l.seed, l.buf[:cmChecksum]), 4), l.buf[cmChecksum+4:])
	return !l.csum || l.c.lax || sum == be.Uint32(l.buf[cmChecksum:])
}

// tags calls fn with the tags of the descriptor block in buf, until fn fails.
func (l *log) tags(fn func(tag []byte, flags uint16) error) error {
	room := blockSize
	if l.csum {
		room = jtChecksum
	}
	for at := jhSize; at+l.tag <= room; {
		tag := l.buf[at : at+l.tag]
		flags := be.Uint16(tag[6:]) // both kinds of tags have them there
		if err := fn(tag, flags); err != nil {
			return err
		}
		if at += l.tag; flags&tagSameUUID == 0 {
			at += 16
		}
		if flags&tagLast != 0 {
			break
		}
	}
	return nil
}

// later says whether transaction a is behind b. Numbers wrap.
func later(a, b uint32) bool { return int32(a-b) > 0 }

// replay fills v.logged with what a replay writes. It returns the number of the next
// transaction.
//
// The steps are those of the kernel (fs/jbd2/recovery.c): find the end of the log, which
// is the first transaction without a commit block; read the revoke blocks up to there;
// then take the blocks of each transaction in order, so that the last copy of a block
// wins.
func (j *journal) replay(v *Recovered) (next uint32, err error) {
	start, sequence := be.Uint32(j.super[jsStart:]), be.Uint32(j.super[jsSequence:])
	if start == 0 {
		return sequence + 1, nil // the log is empty
	}
	descriptors, revokes, end, err := j.scan(start, sequence)
	if err != nil {
		return 0, err
	}
	v.transactions = int(end - sequence)
	revoked, err := j.revoked(descriptors, revokes, end)
	if err != nil {
		return 0, err
	}
	for _, d := range descriptors {
		if !later(end, d.sequence) {
			break
		}
		if err := j.take(v, d, revoked); err != nil {
			return 0, fmt.Errorf("transaction %d: %w", d.sequence, err)
		}
	}
	return end + 1, nil
}

// scan finds the end of the log: the number of the first transaction that is not
// complete.
func (j *journal) scan(start, sequence uint32) (descriptors, revokes []logBlock, end uint32, err error) {
	l := &log{journal: j, at: start}
	var lastCommit uint64
	doubtful := false // blocks without their checksum, of this transaction or left from long ago
	for {
		if l.steps >= l.end-l.first {
			return descriptors, revokes, sequence, nil // the log is full
		}
		if err := l.read(); err != nil {
			return nil, nil, 0, err
		}
		at := l.at
		if err := l.pass(1); err != nil {
			return nil, nil, 0, err
		}
		if be.Uint32(l.buf[jhMagic:]) != journalMagic || be.Uint32(l.buf[jhSequence:]) != sequence {
			return descriptors, revokes, sequence, nil
		}
		switch be.Uint32(l.buf[jhType:]) {
		case jhDescriptor:
			doubtful = doubtful || !l.sealed()
			n := uint32(0)
			if err := l.tags(func([]byte, uint16) error { n++; return nil }); err != nil {
				return nil, nil, 0, err
			}
			if err := l.pass(n); err != nil {
				return nil, nil, 0, err
			}
			descriptors = append(descriptors, logBlock{at, sequence})
		case jhRevoke:
			doubtful = doubtful || !l.sealed()
			revokes = append(revokes, logBlock{at, sequence})
		case jhCommit:
			when := be.Uint64(l.buf[cmSeconds:])
			if doubtful || !l.committed() {
				if when < lastCommit {
					// It was written before the transaction in front of it: a remainder of
					// an earlier round of the ring.
					return descriptors, revokes, sequence, nil
				}
				return nil, nil, 0, fmt.Errorf("transaction %d is damaged: its checksum is wrong", sequence)
			}
			lastCommit = when
			sequence++
		default:
			return descriptors, revokes, sequence, nil
		}
	}
}

// revoked maps blocks that the log has to the last transaction that has revoked them. A
// revoke block can list 1000 others: without them, the log bounds the memory.
func (j *journal) revoked(descriptors, revokes []logBlock, end uint32) (map[uint64]uint32, error) {
	revoked := make(map[uint64]uint32)
	if len(revokes) == 0 {
		return revoked, nil
	}
	l := &log{journal: j}
	has := make(map[uint64]struct{})
	for _, d := range descriptors {
		if !later(end, d.sequence) {
			break
		}
		l.at = d.at
		if err := l.read(); err != nil {
			return nil, err
		}
		if err := l.tags(func(tag []byte, _ uint16) error { has[j.target(tag)] = struct{}{}; return nil }); err != nil {
			return nil, err
		}
	}
	size := 4
	if j.wide {
		size = 8
	}
	room := blockSize
	if j.csum {
		room = jtChecksum
	}
	for _, r := range revokes {
		if !later(end, r.sequence) {
			break
		}
		l.at = r.at
		if err := l.read(); err != nil {
			return nil, err
		}
		used := be.Uint32(l.buf[rvCount:])
		if used > uint32(room) {
			return nil, fmt.Errorf("transaction %d has a revoke block with %d bytes of %d", r.sequence, used, room)
		}
		for at := rvFirst; at+size <= int(used); at += size {
			block := uint64(be.Uint32(l.buf[at:]))
			if j.wide {
				block = be.Uint64(l.buf[at:])
			}
			if _, ok := has[block]; !ok {
				continue
			}
			if last, ok := revoked[block]; !ok || later(r.sequence, last) {
				revoked[block] = r.sequence
			}
		}
	}
	return revoked, nil
}

// target is the block on the device that a tag names.
func (j *journal) target(tag []byte) uint64 {
	block := uint64(be.Uint32(tag))
	if j.wide {
		block |= uint64(be.Uint32(tag[8:])) << 32
	}
	return block
}

// take enters the blocks of a descriptor into v.logged.
func (j *journal) take(v *Recovered, d logBlock, revoked map[uint64]uint32) error {
	l := &log{journal: j, at: d.at}
	if err := l.read(); err != nil {
		return err
	}
	data := &log{journal: j, at: d.at}
	return l.tags(func(tag []byte, flags uint16) error {
		if err := data.pass(1); err != nil {
			return err
		}
		block := j.target(tag)
		if last, ok := revoked[block]; ok && !later(d.sequence, last) {
			v.revoked++
			return nil
		}
		if block >= uint64(j.c.blocks) || j.holds(uint32(block)) {
			return fmt.Errorf("it writes block %d of a device of %d blocks, which is beyond the device or in the journal", block, j.c.blocks)
		}
		if j.csum {
			if err := data.read(); err != nil {
				return err
			}
			var s [4]byte
			be.PutUint32(s[:], d.sequence)
			sum := crc32c(crc32c(j.seed, s[:]), data.buf[:])
			wrong := j.v3 && be.Uint32(tag[12:]) != sum || !j.v3 && be.Uint16(tag[4:]) != uint16(sum)
			if wrong && !j.c.lax {
				return fmt.Errorf("its copy of block %d is damaged: its checksum is wrong", block)
			}
		}
		v.logged[uint32(block)] = logged{j.device(data.at), flags&tagEscaped != 0}
		return nil
	})
}
