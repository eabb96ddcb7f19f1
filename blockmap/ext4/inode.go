package ext4

// An inode is 256 bytes. Numbers start at 1: inode n is entry n-1 of the concatenated
// tables of all groups.
const (
	inMode        = 0x00 // 2
	inUID         = 0x02 // 2, low half
	inSize        = 0x04 // 4, low half
	inAtime       = 0x08 // 4, low half, signed
	inCtime       = 0x0C // 4
	inMtime       = 0x10 // 4
	inDtime       = 0x14 // 4: deletion time
	inGID         = 0x18 // 2, low half
	inLinks       = 0x1A // 2
	inBlocks      = 0x1C // 4, low half: in units of 512 bytes
	inFlags       = 0x20 // 4
	inBlock       = 0x28 // 60: extent tree root, short symlink or device number
	inGeneration  = 0x64 // 4
	inXattr       = 0x68 // 4, low half: block of extended attributes
	inSizeHigh    = 0x6C // 4
	inBlocksHigh  = 0x74 // 2
	inXattrHigh   = 0x76 // 2
	inUIDHigh     = 0x78 // 2
	inGIDHigh     = 0x7A // 2
	inChecksum    = 0x7C // 2, low half: crc32c(inode seed, inode with 0 here and in inChecksumHigh)
	inExtraIsize  = 0x80 // 2: bytes in use beyond 128
	inChecksumHi  = 0x82 // 2
	inCtimeExtra  = 0x84 // 4: nanoseconds << 2 | amount to add to the seconds >> 32
	inMtimeExtra  = 0x88 // 4
	inAtimeExtra  = 0x8C // 4
	inCrtime      = 0x90 // 4
	inCrtimeExtra = 0x94 // 4

	inodeSize      = 256
	extraIsize     = 32
	inodesPerBlock = blockSize / inodeSize
	blockMapSize   = 60

	rootInode  = 2
	firstInode = 11 // lower numbers are reserved

	inodeFlagIndex    = 0x1000 // directory with a hash tree
	inodeFlagHugeFile = 0x40000
	inodeFlagExtents  = 0x80000

	maxLinks    = 65000 // a directory with more has a count of 1
	maxFastLink = 59    // longest symlink target that fits in the inode with a NUL
	maxSymlink  = 4095  // longest symlink target that fits in a block with a NUL
	maxFileSize = maxBlocks * int64(blockSize)
	maxMajor    = 1<<12 - 1
	maxMinor    = 1<<20 - 1

	// The format allows times up to 1<<34-1<<31-1. But e2fsck treats a set last bit of
	// the epoch as a mistake that old kernels made with times before 1970.
	minSeconds = -1 << 31
	maxSeconds = 3<<32 - 1<<31 - 1
	maxNsec    = 999_999_999
)

// putInode writes an inode to b, which is zeroed. ext lists the extents of its content.
// own is the number of blocks that the inode has besides its content.
func (fs *Filesystem) putInode(b []byte, n *node, ext []extent) error {
	in := n.Inode
	le.PutUint16(b[inMode:], uint16(in.Mode))
	putHalves(b, inUID, inUIDHigh, in.UID)
	putHalves(b, inGID, inGIDHigh, in.GID)
	le.PutUint16(b[inLinks:], n.linkCount())
	putTime(b, inAtime, inAtimeExtra, in.Atime)
	putTime(b, inCtime, inCtimeExtra, in.Ctime)
	putTime(b, inMtime, inMtimeExtra, in.Mtime)
	// The time of the filesystem differs from one version of an image to the next.
	putTime(b, inCrtime, inCrtimeExtra, in.Ctime)
	le.PutUint16(b[inExtraIsize:], extraIsize)

	var size int64
	var flags uint32
	blocks := uint64(n.treeBlocks)
	for _, e := range ext {
		blocks += uint64(e.count)
	}
	switch in.Mode & modeType {
	case modeRegular:
		size, flags = in.Size, inodeFlagExtents
	case modeDir:
		size, flags = int64(n.blocks)*blockSize, inodeFlagExtents
		if n.blocks > 1 {
			flags |= inodeFlagIndex
		}
	case modeSymlink:
		size = int64(len(in.Target))
		if len(in.Target) > maxFastLink {
			flags = inodeFlagExtents
		} else {
			copy(b[inBlock:], in.Target)
		}
	case modeChar, modeBlock:
		// The two forms of st_rdev: 8 + 8 bits in the first word, or 12 + 20
		// in the second.
		if in.Major < 256 && in.Minor < 256 {
			le.PutUint32(b[inBlock:], in.Major<<8|in.Minor)
		} else {
			le.PutUint32(b[inBlock+4:], in.Minor&0xFF|in.Major<<8|in.Minor&^0xFF<<12)
		}
	}
	if flags&inodeFlagExtents != 0 {
		putExtentRoot(b[inBlock:], ext, fs.geo.content+n.tree)
	}

	inXattrs, blockXattrs, err := splitXattrs(in)
	if err != nil {
		return err
	}
	if len(inXattrs) > 0 {
		le.PutUint32(b[inodeXattrs:], xattrMagic)
		putXattrs(b[inodeSize-inodeXattrSpace:inodeSize], 0, inXattrs, false)
	}
	if len(blockXattrs) > 0 {
		le.PutUint32(b[inXattr:], fs.geo.content+n.xattr)
		blocks++
	}

	putSizes(b, size, blocks)
	le.PutUint32(b[inFlags:], flags)
	fs.sealInode(b, n.number)
	return nil
}

// putJournalInode writes inode 8 to b, which is zeroed. Its times stay zero, because the
// first block of the inode table should not differ between versions of an image.
func (fs *Filesystem) putJournalInode(b []byte) {
	g := &fs.geo
	ext := g.journalExtents()
	le.PutUint16(b[inMode:], modeRegular|0o600)
	le.PutUint16(b[inLinks:], 1)
	le.PutUint32(b[inFlags:], inodeFlagExtents)
	le.PutUint16(b[inExtraIsize:], extraIsize)
	putSizes(b, int64(g.journalBlocks)*blockSize, uint64(g.journalBlocks)+uint64(treeBlocks(len(ext))))
	putExtentRoot(b[inBlock:], ext, g.journalTree)
	fs.sealInode(b, journalInode)
}

// sealInode sets the checksum of an inode that is otherwise complete.
func (fs *Filesystem) sealInode(b []byte, number uint32) {
	putHalves(b, inChecksum, inChecksumHi, inodeChecksum(checksumSeed, number, b))
}

// inodeChecksum returns the checksum of inode b. It ignores the content of the checksum
// fields.
func inodeChecksum(seed, number uint32, b []byte) uint32 {
	c := inodeSeed(seed, number, le.Uint32(b[inGeneration:]))
	c = crc32c(c, b[:inChecksum])
	c = crc32cHole(c, 2)
	c = crc32c(c, b[inChecksum+2:inChecksumHi])
	c = crc32cHole(c, 2)
	return crc32c(c, b[inChecksumHi+2:inodeSize])
}

// putSizes sets the length in bytes and in blocks. No device has more sectors of 512
// bytes than 48 bits can count. So the flag that counts in blocks instead is never
// needed.
func putSizes(b []byte, size int64, blocks uint64) {
	le.PutUint32(b[inSize:], uint32(size))
	le.PutUint32(b[inSizeHigh:], uint32(size>>32))
	sectors := blocks * (blockSize / 512)
	le.PutUint32(b[inBlocks:], uint32(sectors))
	le.PutUint16(b[inBlocksHigh:], uint16(sectors>>32))
}

func putTime(b []byte, low, extra int, t Time) {
	sec := min(max(t.Sec, minSeconds), maxSeconds)
	le.PutUint32(b[low:], uint32(sec))
	// Kernels read the low word as signed. So the amount to add to it is a multiple of
	// 1<<32, from 0 to 3.
	epoch := uint32((sec - int64(int32(sec))) >> 32)
	le.PutUint32(b[extra:], min(t.Nsec, maxNsec)<<2|epoch)
}
