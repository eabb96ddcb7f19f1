// Package ext4 lays out an ext4 filesystem from a file tree without touching
// file data.
//
// [Layout] takes a tree of [Inode]s whose contents are [Run]s of blocks in streams,
// and decides where everything goes. The result is a [Filesystem]: a
// map of the device ([Filesystem.Runs]) and the metadata blocks themselves
// ([Filesystem.WriteMeta]), which are one more stream, number 0. A server of
// the device reads file data from the other streams, at the blocks that the map
// names; this package never reads file data.
//
// The one idea is placement. All metadata lies packed at the front, in one flex
// group; behind it lies file data in the order of (stream, stream block), so
// neighbours in a stream are neighbours on the device and a whole layer of a
// container image becomes a few runs; behind that is free space, which is in no
// run, reads as zeros and costs nothing. Everything in use is one prefix of the
// device:
//
//	superblock | descriptors | block bitmaps | inode bitmaps | inode tables | journal | body | file data | free
//	1 block      64 bytes a    1 block a       1 block a       256 bytes an            |
//	             group         group           group           inode                   |
//	                                      directories, long symlinks, extent trees, extended attributes
//
// Metadata that is zero (bitmaps of unused groups, unused parts of inode tables, all
// of the journal but its superblock) is in no run and not in stream 0.
//
// The format is that of mke2fs 1.47 with 4 KiB blocks: extents, 64bit,
// metadata_csum, flex_bg, dir_index, dir_nlink, huge_file, large_file,
// extra_isize, has_journal, and sparse_super2 with no backups, since a backup
// superblock in the middle of the device would cut file data in two. Layouts
// stand byte by byte beside the constants that name their fields; the reference
// is Documentation/filesystems/ext4 of the kernel. All integers are
// little-endian but those of the journal.
//
// The same tree and options give the same bytes. The order of the entries of a
// directory does not matter.
//
//	root := &ext4.Inode{Mode: 0o040755, Entries: []ext4.Dirent{{Name: "hello", Inode: &ext4.Inode{
//		Mode: 0o100644, Size: 6, Data: []ext4.Run{{FileBlock: 0, Stream: 1, Block: 0, Count: 1}},
//	}}}}
//	fs, err := ext4.Layout(root, ext4.Options{Size: 8 << 30, UUID: uuid})
//
// [Check] reads a filesystem without trusting it, and returns the first fault.
package ext4
