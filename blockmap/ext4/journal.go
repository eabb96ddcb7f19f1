package ext4

import "encoding/binary"

const journalInode = 8

// Inode 8 is the journal file. Its first block is the journal superblock, in big-endian
// byte order. Drivers do not read the rest while the log is empty, so it may hold
// anything. As after mke2fs, the first mount that writes turns on checksums and other
// features of the journal.
const (
	jsMagic     = 0x00 // 4
	jsBlockType = 0x04 // 4: 4 is a superblock, version 2
	jsBlockSize = 0x0C // 4
	jsMaxLen    = 0x10 // 4: blocks in the journal
	jsFirst     = 0x14 // 4: first block of the log
	jsSequence  = 0x18 // 4: first transaction expected
	jsStart     = 0x1C // 4: start of the log; 0 means that the log is empty
	jsError     = 0x20 // 4: errno of the last abort
	jsCompat    = 0x24 // 4: features
	jsIncompat  = 0x28 // 4
	jsROCompat  = 0x2C // 4
	jsUUID      = 0x30 // 16
	jsUsers     = 0x40 // 4: number of filesystems that share the journal
	jsChecksum  = 0xFC // 4: if one of these features is on, crc32c(the first 1024 bytes with 0 here)

	jsChecksumV2 = 0x8
	jsChecksumV3 = 0x10

	journalMagic = 0xC03B3998
)

// journalSuperblock writes the journal's first block to b, which is zeroed.
func (fs *Filesystem) journalSuperblock(b []byte) {
	be := binary.BigEndian
	be.PutUint32(b[jsMagic:], journalMagic)
	be.PutUint32(b[jsBlockType:], 4)
	be.PutUint32(b[jsBlockSize:], blockSize)
	be.PutUint32(b[jsMaxLen:], fs.geo.journalBlocks)
	be.PutUint32(b[jsFirst:], 1)
	be.PutUint32(b[jsSequence:], 1)
	copy(b[jsUUID:], fs.opts.UUID[:])
	be.PutUint32(b[jsUsers:], 1)
}

// journalSize returns the number of blocks that mke2fs gives the journal of a device.
// Devices below 8 MiB get no journal.
func journalSize(blocks uint32) uint32 {
	switch {
	case blocks < 2048:
		return 0
	case blocks < 32768: // 128 MiB
		return 1024
	case blocks < 256*1024: // 1 GiB
		return 4096
	case blocks < 512*1024:
		return 8192
	case blocks < 4096*1024: // 16 GiB
		return 16384
	case blocks < 8192*1024:
		return 32768
	case blocks < 16384*1024:
		return 65536
	case blocks < 32768*1024: // 128 GiB
		return 131072
	}
	return 262144
}

// journalExtents returns the extents of the journal.
func (g *geometry) journalExtents() []extent {
	var l []extent
	for n := uint32(0); n < g.journalBlocks; n += maxExtent {
		l = append(l, extent{file: n, device: g.journal + n, count: min(maxExtent, g.journalBlocks-n)})
	}
	return l
}
