package ext4

import (
	"encoding/binary"

	"thaw/blockmap"
)

const (
	blockSize      = blockmap.BlockSize
	blocksPerGroup = 8 * blockSize // one bitmap block's worth

	maxBlocks = 1<<32 - 1 // device blocks and their counts are uint32
)

// The superblock is 1024 bytes at byte 1024 of the device. Fields without a name here
// are zero: they belong to features that are off, or count errors and mounts.
const (
	superblockOffset = 1024
	superblockSize   = 1024

	sbInodesCount       = 0x000 // 4
	sbBlocksCount       = 0x004 // 4, low half
	sbReservedBlocks    = 0x008 // 4, low half: reserved for root
	sbFreeBlocks        = 0x00C // 4, low half
	sbFreeInodes        = 0x010 // 4
	sbFirstDataBlock    = 0x014 // 4: 0 for all block sizes but 1 KiB
	sbLogBlockSize      = 0x018 // 4: block size is 1024 << this
	sbLogClusterSize    = 0x01C // 4: equal to sbLogBlockSize, because bigalloc is off
	sbBlocksPerGroup    = 0x020 // 4
	sbClustersPerGroup  = 0x024 // 4
	sbInodesPerGroup    = 0x028 // 4
	sbWriteTime         = 0x030 // 4
	sbMaxMountCount     = 0x036 // 2: -1 means no limit
	sbMagic             = 0x038 // 2
	sbState             = 0x03A // 2: 1 is cleanly unmounted
	sbErrors            = 0x03C // 2: behaviour on errors; 1 continues
	sbCheckTime         = 0x040 // 4
	sbRevision          = 0x04C // 4: 1 means that the inode size and the features are in the superblock
	sbFirstInode        = 0x054 // 4: first inode that is not reserved
	sbInodeSize         = 0x058 // 2
	sbFeatureCompat     = 0x05C // 4
	sbFeatureIncompat   = 0x060 // 4
	sbFeatureROCompat   = 0x064 // 4
	sbUUID              = 0x068 // 16
	sbLabel             = 0x078 // 16, padded with NUL
	sbReservedGDT       = 0x0CE // 2: descriptor blocks kept for growth
	sbJournalInode      = 0x0E0 // 4
	sbLastOrphan        = 0x0E8 // 4
	sbHashSeed          = 0x0EC // 16
	sbHashVersion       = 0x0FC // 1: default for directories
	sbJournalBackupType = 0x0FD // 1: 1 if sbJournalBlocks is valid
	sbDescSize          = 0x0FE // 2
	sbMountOptions      = 0x100 // 4
	sbFirstMetaGroup    = 0x104 // 4
	sbMkfsTime          = 0x108 // 4
	sbJournalBlocks     = 0x10C // 68: the journal inode's block map, then its size, high half first
	sbBlocksCountHigh   = 0x150 // 4
	sbReservedHigh      = 0x154 // 4
	sbFreeBlocksHigh    = 0x158 // 4
	sbMinExtraIsize     = 0x15C // 2
	sbWantExtraIsize    = 0x15E // 2
	sbFlags             = 0x160 // 4
	sbLogGroupsPerFlex  = 0x174 // 1
	sbChecksumType      = 0x175 // 1: 1 is crc32c
	sbOverhead          = 0x248 // 4: blocks that never hold data
	sbBackupGroups      = 0x24C // 8: two groups that hold backups; 0 means none
	sbChecksumSeed      = 0x270 // 4: of metadata_csum_seed
	sbWriteTimeHigh     = 0x274 // 1
	sbMkfsTimeHigh      = 0x276 // 1
	sbCheckTimeHigh     = 0x277 // 1
	sbChecksum          = 0x3FC // 4: crc32c of all bytes before it

	superMagic      = 0xEF53
	stateClean      = 1
	descSize        = 64
	checksumCRC32C  = 1
	optionsXattrACL = 0x4 | 0x8 // user_xattr, acl

	flagSignedHash   = 0x1
	flagUnsignedHash = 0x2
)

// Features. A driver that does not know a compat feature may still write. One that does
// not know a ro_compat feature may only read. One that does not know an incompat
// feature may do neither.
const (
	compatHasJournal   = 0x4
	compatExtAttr      = 0x8
	compatDirIndex     = 0x20
	compatSparseSuper2 = 0x200

	incompatFiletype = 0x2
	incompatExtents  = 0x40
	incompat64bit    = 0x80
	incompatFlexBG   = 0x200
	incompatCsumSeed = 0x2000
	incompatLargeDir = 0x4000

	roCompatSparseSuper  = 0x1
	roCompatLargeFile    = 0x2
	roCompatHugeFile     = 0x8
	roCompatDirNlink     = 0x20
	roCompatExtraIsize   = 0x40
	roCompatMetadataCsum = 0x400
)

var le = binary.LittleEndian

// superblock writes the superblock to b, which is zeroed and superblockSize long.
func (fs *Filesystem) superblock(b []byte) {
	g := &fs.geo
	compat := uint32(compatExtAttr | compatDirIndex | compatSparseSuper2)
	incompat := uint32(incompatFiletype | incompatExtents | incompat64bit | incompatFlexBG | incompatCsumSeed)
	if fs.largeDir {
		incompat |= incompatLargeDir
	}
	if g.journalBlocks > 0 {
		compat |= compatHasJournal
		le.PutUint32(b[sbJournalInode:], journalInode)
		b[sbJournalBackupType] = 1
		var in [inodeSize]byte
		fs.putJournalInode(in[:])
		copy(b[sbJournalBlocks:], in[inBlock:inBlock+blockMapSize])
		copy(b[sbJournalBlocks+blockMapSize:], in[inSizeHigh:inSizeHigh+4])
		copy(b[sbJournalBlocks+blockMapSize+4:], in[inSize:inSize+4])
	}

	le.PutUint32(b[sbInodesCount:], g.groups*g.inodesPerGroup)
	le.PutUint32(b[sbBlocksCount:], g.blocks)
	le.PutUint32(b[sbFreeBlocks:], g.blocks-fs.usedBlocks())
	le.PutUint32(b[sbFreeInodes:], g.groups*g.inodesPerGroup-fs.usedInodes())
	le.PutUint32(b[sbLogBlockSize:], 2)
	le.PutUint32(b[sbLogClusterSize:], 2)
	le.PutUint32(b[sbBlocksPerGroup:], blocksPerGroup)
	le.PutUint32(b[sbClustersPerGroup:], blocksPerGroup)
	le.PutUint32(b[sbInodesPerGroup:], g.inodesPerGroup)
	le.PutUint16(b[sbMaxMountCount:], 0xFFFF)
	le.PutUint16(b[sbMagic:], superMagic)
	le.PutUint16(b[sbState:], stateClean)
	le.PutUint16(b[sbErrors:], 1)
	le.PutUint32(b[sbRevision:], 1)
	le.PutUint32(b[sbFirstInode:], firstInode)
	le.PutUint16(b[sbInodeSize:], inodeSize)
	le.PutUint32(b[sbFeatureCompat:], compat)
	le.PutUint32(b[sbFeatureIncompat:], incompat)
	le.PutUint32(b[sbFeatureROCompat:], roCompatSparseSuper|roCompatLargeFile|roCompatHugeFile|
		roCompatDirNlink|roCompatExtraIsize|roCompatMetadataCsum)
	copy(b[sbUUID:], fs.opts.UUID[:])
	copy(b[sbLabel:sbLabel+16], fs.opts.Label)
	copy(b[sbHashSeed:], fs.opts.HashSeed[:])
	b[sbHashVersion] = hashHalfMD4
	le.PutUint16(b[sbDescSize:], descSize)
	le.PutUint32(b[sbMountOptions:], optionsXattrACL)
	le.PutUint16(b[sbMinExtraIsize:], extraIsize)
	le.PutUint16(b[sbWantExtraIsize:], extraIsize)
	// Names are hashed as unsigned bytes, whether or not the machine's char is signed.
	le.PutUint32(b[sbFlags:], flagUnsignedHash)
	b[sbLogGroupsPerFlex] = g.logFlex
	b[sbChecksumType] = checksumCRC32C
	le.PutUint32(b[sbChecksumSeed:], checksumSeed)
	le.PutUint32(b[sbOverhead:], g.content-(g.inodeTables-g.journalTree))

	t := uint64(min(max(fs.opts.Time.Sec, 0), 1<<40-1))
	for _, f := range []struct{ low, high int }{
		{sbWriteTime, sbWriteTimeHigh}, {sbMkfsTime, sbMkfsTimeHigh}, {sbCheckTime, sbCheckTimeHigh},
	} {
		le.PutUint32(b[f.low:], uint32(t))
		b[f.high] = byte(t >> 32)
	}
	le.PutUint32(b[sbChecksum:], crc32c(^uint32(0), b[:sbChecksum]))
}
