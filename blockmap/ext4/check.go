package ext4

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
)

// Check reads the filesystem on a device of size bytes and returns the first
// fault, with its place. It accepts the features that Layout uses and refuses any
// other; within those it accepts a filesystem that another program has written to,
// such as the kernel after a mount. It reads metadata only.
//
// It trusts nothing that it reads: the metadata that the device really holds bounds
// memory and time, whatever the superblock claims.
func Check(r io.ReaderAt, size int64) error { return CheckMapped(r, size, nil) }

// CheckMapped is Check for a device that does not have all of its blocks. mapped reports
// whether the device has count blocks from start. It must be true of all blocks of files,
// of directories and of what belongs to them; the blocks of the filesystem itself that the
// device does not have read as zeros.
func CheckMapped(r io.ReaderAt, size int64, mapped func(start, count uint32) bool) error {
	c := &checker{r: r, size: size, mapped: mapped, xattrs: make(map[uint32]*sharedXattrs)}
	return c.check()
}

// checker reads a filesystem once, in the order of the methods in check. Every user
// of a block claims it; at the end, the claims must cover exactly the blocks that
// the bitmaps mark as used.
type checker struct {
	r      io.ReaderAt
	size   int64
	mapped func(start, count uint32) bool // nil: all blocks are
	lax    bool                           // fuzzing: wrong checksums are right, to get at what is behind them

	// used: the filesystem may be in use, with a journal to replay and in any state.
	// written: it may have orphans, as a clean one has that was replayed.
	used, written bool

	super      [superblockSize]byte
	blocks     uint32
	groupCount uint32
	perGroup   uint32 // inodes
	seed       uint32
	hasher     nameHasher
	incompat   uint32
	hasJournal bool

	groups  []groupDesc
	claims  []claim
	claimed uint64         // blocks in claims
	inodes  []inodeSummary // in use, not reserved but the root; sorted by number
	xattrs  map[uint32]*sharedXattrs
	orphans map[uint32]struct{} // inodes in the orphan list
}

// claim says that blocks are in use. Inode 0 stands for the filesystem itself.
type claim struct{ start, count, inode uint32 }

// inodeSummary is the part of an inode that the walk of the directories needs.
type inodeSummary struct {
	number uint32
	mode   uint16
	links  uint16
	index  bool   // directory with a hash tree
	found  uint32 // names that point here, "." and ".." among them
	parent uint32 // directory that was found to contain this directory
}

// CheckWritten is Check for a filesystem that was in use until just now. It checks the
// filesystem as the next mount will make it, with the journal replayed, and accepts
// orphans: files that were deleted while they were open.
func CheckWritten(r io.ReaderAt, size int64) error {
	v, err := Recover(r, size)
	if err != nil {
		return err
	}
	c := &checker{r: v, size: size, written: true, xattrs: make(map[uint32]*sharedXattrs)}
	return c.check()
}

func (c *checker) check() error {
	for _, step := range []func() error{
		c.checkSuperblock, c.checkDescriptors, c.readOrphans, c.checkInodes, c.checkJournal, c.checkTree, c.checkXattrRefs, c.checkBlocks,
	} {
		if err := step(); err != nil {
			return fmt.Errorf("ext4: %w", err)
		}
	}
	return nil
}

// readBlocks reads len(b)/blockSize blocks.
func (c *checker) readBlocks(b []byte, block uint32, what string) error {
	if uint64(block)+uint64(len(b)/blockSize) > uint64(c.blocks) {
		return fmt.Errorf("%s lies at block %d, beyond the device of %d blocks", what, block, c.blocks)
	}
	if n, err := c.r.ReadAt(b, int64(block)*blockSize); n < len(b) {
		return fmt.Errorf("read %s at block %d: %w", what, block, err)
	}
	return nil
}

// sum compares a stored checksum with the computed one.
func (c *checker) sum(written, computed uint32, what string) error {
	if written != computed && !c.lax {
		return fmt.Errorf("%s: the stored checksum is %#x, the computed one %#x", what, written, computed)
	}
	return nil
}

// claim records that an inode uses blocks. It fails at once if more blocks are
// claimed than the device has, which bounds the list of claims. Two claims of the
// same block are found at the end, by checkBlocks.
func (c *checker) claim(start uint32, count uint64, inode uint32) error {
	if uint64(start)+count > uint64(c.blocks) {
		return fmt.Errorf("%s %d blocks from block %d, beyond the device of %d blocks", uses(inode), count, start, c.blocks)
	}
	if c.claimed += count; c.claimed > uint64(c.blocks) {
		return fmt.Errorf("%s %d blocks from block %d: more blocks are in use than the device has", uses(inode), count, start)
	}
	if c.mapped != nil && inode != 0 && inode != journalInode && count > 0 && !c.mapped(start, uint32(count)) {
		return fmt.Errorf("uses %d blocks from block %d, and the device lacks some of them", count, start)
	}
	if n := len(c.claims); n > 0 {
		if last := &c.claims[n-1]; last.inode == inode && last.start+last.count == start {
			last.count += uint32(count)
			return nil
		}
	}
	c.claims = append(c.claims, claim{start, uint32(count), inode})
	return nil
}

// uses begins an error about a claim. The caller names the inode.
func uses(inode uint32) string {
	if inode == 0 {
		return "the filesystem uses"
	}
	return "uses"
}

func owner(inode uint32) string {
	if inode == 0 {
		return "the filesystem"
	}
	return fmt.Sprintf("inode %d", inode)
}

const (
	knownCompat   = compatHasJournal | compatExtAttr | compatDirIndex | compatSparseSuper2
	needCompat    = compatSparseSuper2
	needIncompat  = incompatFiletype | incompatExtents | incompat64bit | incompatFlexBG
	knownIncompat = needIncompat | incompatLargeDir | incompatCsumSeed
	needROCompat  = roCompatMetadataCsum | roCompatExtraIsize
	knownROCompat = needROCompat | roCompatSparseSuper | roCompatLargeFile | roCompatHugeFile | roCompatDirNlink
)

// readOrphans follows the orphan list: the superblock has the first inode, and the field
// of the deletion time of each has the next one.
func (c *checker) readOrphans() error {
	number := le.Uint32(c.super[sbLastOrphan:])
	if number == 0 {
		return nil
	}
	c.orphans = make(map[uint32]struct{})
	var in [inodeSize]byte
	for number != 0 {
		if _, again := c.orphans[number]; again || number < firstInode || number > c.groupCount*c.perGroup {
			return fmt.Errorf("the orphan list has inode %d, which does not exist or is in it already", number)
		}
		c.orphans[number] = struct{}{}
		if err := c.readInode(in[:], number); err != nil {
			return err
		}
		number = le.Uint32(in[inDtime:])
	}
	return nil
}

// orphan reports whether an inode is in the orphan list.
func (c *checker) orphan(number uint32) bool {
	_, ok := c.orphans[number]
	return ok
}

func (c *checker) checkSuperblock() error {
	b := c.super[:]
	if n, err := c.r.ReadAt(b, superblockOffset); n < len(b) {
		return fmt.Errorf("read the superblock: %w", err)
	}
	if m := le.Uint16(b[sbMagic:]); m != superMagic {
		return fmt.Errorf("no superblock: the magic number is %#x", m)
	}
	if err := c.sum(le.Uint32(b[sbChecksum:]), crc32c(^uint32(0), b[:sbChecksum]), "the superblock"); err != nil {
		return err
	}
	c.incompat = le.Uint32(b[sbFeatureIncompat:])
	if c.incompat&incompatRecover != 0 && !c.used {
		return fmt.Errorf("the journal needs recovery")
	}
	for _, f := range []struct {
		name              string
		have, need, known uint32
	}{
		{"compat", le.Uint32(b[sbFeatureCompat:]), needCompat, knownCompat},
		{"incompat", c.incompat, needIncompat, knownIncompat},
		{"ro_compat", le.Uint32(b[sbFeatureROCompat:]), needROCompat, knownROCompat},
	} {
		if missing := f.need &^ f.have; missing != 0 {
			return fmt.Errorf("the superblock lacks the required %s features %#x", f.name, missing)
		}
		if unknown := f.have &^ f.known; unknown != 0 && (!c.used || f.name != "incompat" || unknown != incompatRecover) {
			return fmt.Errorf("the superblock has unknown %s features %#x", f.name, unknown)
		}
	}
	c.hasJournal = le.Uint32(b[sbFeatureCompat:])&compatHasJournal != 0

	word := func(at int) uint64 { return uint64(le.Uint32(b[at:])) }
	half := func(at int) uint64 { return uint64(le.Uint16(b[at:])) }
	var journal uint64
	if c.hasJournal {
		journal = journalInode
	}
	for _, f := range []struct {
		name      string
		got, want uint64
	}{
		{"revision", word(sbRevision), 1},
		{"log of block size", word(sbLogBlockSize), 2},
		{"log of cluster size", word(sbLogClusterSize), 2},
		{"blocks per group", word(sbBlocksPerGroup), blocksPerGroup},
		{"clusters per group", word(sbClustersPerGroup), blocksPerGroup},
		{"first data block", word(sbFirstDataBlock), 0},
		{"first inode", word(sbFirstInode), firstInode},
		{"inode size", half(sbInodeSize), inodeSize},
		{"descriptor size", half(sbDescSize), descSize},
		{"reserved descriptor blocks", half(sbReservedGDT), 0},
		{"checksum type", uint64(b[sbChecksumType]), checksumCRC32C},
		{"journal inode", word(sbJournalInode), journal},
		{"high half of blocks", word(sbBlocksCountHigh), 0},
		{"high half of free blocks", word(sbFreeBlocksHigh), 0},
		{"high half of reserved blocks", word(sbReservedHigh), 0},
		{"first backup group", word(sbBackupGroups), 0},
		{"second backup group", word(sbBackupGroups + 4), 0},
	} {
		if f.got != f.want {
			return fmt.Errorf("the superblock has %s %d, want %d", f.name, f.got, f.want)
		}
	}
	if n := half(sbState); n != stateClean && !c.used {
		return fmt.Errorf("the superblock has state %d, want %d", n, stateClean)
	}
	if n := word(sbLastOrphan); n != 0 && !c.used && !c.written {
		return fmt.Errorf("the superblock has orphan list %d, want 0", n)
	}
	if n := b[sbLogGroupsPerFlex]; n > 31 {
		return fmt.Errorf("the superblock has 1<<%d groups in a flex group", n)
	}
	if v := b[sbHashVersion]; v != hashHalfMD4 {
		return fmt.Errorf("the superblock has hash version %d", v)
	}
	flags := word(sbFlags) & (flagSignedHash | flagUnsignedHash)
	if flags != flagSignedHash && flags != flagUnsignedHash {
		return fmt.Errorf("the superblock does not say whether directory hashes are signed")
	}

	c.blocks = uint32(word(sbBlocksCount))
	c.perGroup = uint32(word(sbInodesPerGroup))
	if c.blocks == 0 || int64(c.blocks) > c.size/blockSize {
		return fmt.Errorf("the superblock says %d blocks, the device has %d", c.blocks, c.size/blockSize)
	}
	if c.perGroup == 0 || c.perGroup%inodesPerBlock != 0 || c.perGroup > blocksPerGroup {
		return fmt.Errorf("the superblock has %d inodes in a group", c.perGroup)
	}
	c.groupCount = (c.blocks-1)/blocksPerGroup + 1
	if n := word(sbInodesCount); n != uint64(c.groupCount)*uint64(c.perGroup) || n < firstInode {
		return fmt.Errorf("the superblock says %d inodes, but has %d groups of %d inodes", n, c.groupCount, c.perGroup)
	}
	if word(sbReservedBlocks) > uint64(c.blocks) {
		return fmt.Errorf("the superblock reserves %d of %d blocks", word(sbReservedBlocks), c.blocks)
	}
	c.seed = crc32c(^uint32(0), b[sbUUID:sbUUID+16])
	if c.incompat&incompatCsumSeed != 0 {
		c.seed = le.Uint32(b[sbChecksumSeed:])
	}
	c.hasher = newNameHasher([16]byte(b[sbHashSeed:]), flags == flagSignedHash)
	return nil
}

// checkJournal looks at the journal's superblock, and at the copy of the
// journal's inode in that of the filesystem.
func (c *checker) checkJournal() error {
	if !c.hasJournal {
		return nil
	}
	var in [inodeSize]byte
	if err := c.readInode(in[:], journalInode); err != nil {
		return err
	}
	backup := c.super[sbJournalBlocks:]
	if c.super[sbJournalBackupType] != 1 ||
		!bytes.Equal(backup[:blockMapSize], in[inBlock:inBlock+blockMapSize]) ||
		!bytes.Equal(backup[blockMapSize:blockMapSize+4], in[inSizeHigh:inSizeHigh+4]) ||
		!bytes.Equal(backup[blockMapSize+4:blockMapSize+8], in[inSize:inSize+4]) {
		return fmt.Errorf("the superblock's copy of the journal's inode differs from the inode")
	}
	var first extent
	found := false
	if _, err := c.extents(journalInode, in[:], false, func(e extent, _ bool) error {
		if !found {
			first, found = e, true
		}
		return nil
	}); err != nil {
		return err
	}
	if !found || first.file != 0 {
		return fmt.Errorf("the journal has no first block")
	}
	var b [blockSize]byte
	if err := c.readBlocks(b[:], first.device, "the journal"); err != nil {
		return err
	}
	be := binary.BigEndian
	for _, f := range []struct {
		name      string
		got, want uint32
	}{
		{"magic number", be.Uint32(b[jsMagic:]), journalMagic},
		{"block type", be.Uint32(b[jsBlockType:]), 4},
		{"block size", be.Uint32(b[jsBlockSize:]), blockSize},
		{"length", be.Uint32(b[jsMaxLen:]), uint32(inodeLength(in[:]) / blockSize)},
		{"log start", be.Uint32(b[jsStart:]), 0},
		{"error", be.Uint32(b[jsError:]), 0},
		{"unknown compat features", be.Uint32(b[jsCompat:]) &^ 0x1, 0},
		{"unknown incompat features", be.Uint32(b[jsIncompat:]) &^ (0x1 | 0x2 | 0x4 | jsChecksumV2 | jsChecksumV3), 0},
		{"unknown ro_compat features", be.Uint32(b[jsROCompat:]), 0},
		{"users", be.Uint32(b[jsUsers:]), 1},
	} {
		if f.got != f.want {
			return fmt.Errorf("the journal's superblock has %s %#x, want %#x", f.name, f.got, f.want)
		}
	}
	if be.Uint32(b[jsIncompat:])&(jsChecksumV2|jsChecksumV3) != 0 {
		got := be.Uint32(b[jsChecksum:])
		clear(b[jsChecksum : jsChecksum+4])
		return c.sum(got, crc32c(^uint32(0), b[:1024]), "the journal's superblock")
	}
	return nil
}

// checkXattrRefs compares the reference counts of shared blocks of attributes.
func (c *checker) checkXattrRefs() error {
	blocks := make([]uint32, 0, len(c.xattrs))
	for block := range c.xattrs {
		blocks = append(blocks, block)
	}
	slices.Sort(blocks) // the same fault first every time
	for _, block := range blocks {
		if s := c.xattrs[block]; s.found != s.refs {
			return fmt.Errorf("%[2]d inodes share the extended attributes at block %[1]d, but their reference count is %[3]d", block, s.found, s.refs)
		}
	}
	return nil
}

// checkBlocks compares the claims with one another and with the bitmaps.
func (c *checker) checkBlocks() error {
	slices.SortFunc(c.claims, func(a, b claim) int {
		return cmp.Or(cmp.Compare(a.start, b.start), cmp.Compare(a.inode, b.inode))
	})
	var end uint64
	var last claim
	for _, cl := range c.claims {
		if uint64(cl.start) < end {
			return fmt.Errorf("block %d belongs to both %s and %s", cl.start, owner(last.inode), owner(cl.inode))
		}
		end, last = uint64(cl.start)+uint64(cl.count), cl
	}

	free := uint64(0)
	rest := c.claims
	var have, want [blockSize]byte
	for i := range c.groupCount {
		first := i * blocksPerGroup
		size := min(blocksPerGroup, c.blocks-first)
		clear(want[:])
		used := uint32(0)
		for len(rest) > 0 && rest[0].start < first+size {
			cl := rest[0]
			from := max(cl.start, first) - first
			to := uint32(min(uint64(cl.start)+uint64(cl.count)-uint64(first), uint64(size)))
			setBits(want[:], from, to)
			used += to - from
			if uint64(cl.start)+uint64(cl.count) > uint64(first)+uint64(size) {
				break // it goes on in the next group
			}
			rest = rest[1:]
		}
		setBits(want[:], size, blocksPerGroup)

		g := &c.groups[i]
		if g.freeBlocks != size-used {
			return fmt.Errorf("group %d has %d free blocks, but its descriptor says %d", i, size-used, g.freeBlocks)
		}
		free += uint64(size - used)
		if g.flags&groupBlockUninit != 0 {
			clear(have[:])
			setBits(have[:], size, blocksPerGroup)
			for _, own := range []struct{ start, count uint32 }{
				{g.blockBitmap, 1}, {g.inodeBitmap, 1}, {g.inodeTable, c.perGroup / inodesPerBlock},
			} {
				// Of what is in the group itself; it may begin before it.
				from := max(uint64(own.start), uint64(first))
				to := min(uint64(own.start)+uint64(own.count), uint64(first)+uint64(size))
				if from < to {
					setBits(have[:], uint32(from-uint64(first)), uint32(to-uint64(first)))
				}
			}
		} else {
			if err := c.readBlocks(have[:], g.blockBitmap, "a block bitmap"); err != nil {
				return fmt.Errorf("group %d: %w", i, err)
			}
			if err := c.sum(g.blockBitmapCsum, crc32c(c.seed, have[:]), "its block bitmap"); err != nil {
				return fmt.Errorf("group %d: %w", i, err)
			}
		}
		if bit := differingBit(have[:], want[:]); bit >= 0 {
			return fmt.Errorf("group %d: the block bitmap is wrong about block %d", i, int64(first)+int64(bit))
		}
	}
	if got := le.Uint32(c.super[sbFreeBlocks:]); uint64(got) != free {
		return fmt.Errorf("the superblock says %d free blocks, but %d are free", got, free)
	}
	return nil
}

// differingBit is the first bit in which a and b differ, or -1.
func differingBit(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		for bit := range 8 {
			if (a[i]^b[i])>>bit&1 != 0 {
				return i*8 + bit
			}
		}
	}
	return -1
}
