package flatten

import (
	"thaw/blockmap/ext4"
)

// regularEntry is a file of size bytes from block 0 of its stream.
func regularEntry(name string, size int64) *entry {
	return &entry{name: name, inode: &ext4.Inode{
		Mode: modeRegular | 0o644, Size: size, Mtime: ext4.Time{Sec: -1, Nsec: 5},
		Data: []ext4.Run{{Block: 0, Count: uint32((size + blockSize - 1) / blockSize)}},
	}}
}
