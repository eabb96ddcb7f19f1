package ext4

import "hash/crc32"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksumSeed starts the checksums of the filesystem (metadata_csum_seed). By default the
// checksum of the UUID would do so. But that differs between versions of an image, and so
// would every block of metadata.
const checksumSeed = 0x77616874 // "thaw"

// crc32c carries on a checksum as ext4 does: without the inversion before and
// after that crc32.Update makes. Most checksums of a filesystem start from its seed,
// and those of the superblock and the journal from ^0.
func crc32c(crc uint32, p []byte) uint32 {
	return ^crc32.Update(^crc, castagnoli, p)
}

// crc32cWord carries on a checksum with a little-endian word. It goes byte by
// byte, since a slice for crc32.Update would be allocated, for every inode.
func crc32cWord(crc, word uint32) uint32 {
	for range 4 {
		crc = castagnoli[byte(crc)^byte(word)] ^ crc>>8
		word >>= 8
	}
	return crc
}

// crc32cHole carries on a checksum with the zeros that stand for a checksum of
// n bytes.
func crc32cHole(crc uint32, n int) uint32 {
	for range n {
		crc = castagnoli[byte(crc)] ^ crc>>8
	}
	return crc
}

// inodeSeed starts the checksums of everything that belongs to one inode.
func inodeSeed(seed, number, generation uint32) uint32 {
	return crc32cWord(crc32cWord(seed, number), generation)
}
