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
// The one idea is placement. What is added to a tree later does not move what is there,
// so versions of an image share their metadata and their map. A [Plan] gives each layer
// of a container image an area of inode numbers, and an area of the device: first its
// directories, then the contents of its files in the order of its stream, with gaps for
// files that an upper layer hides. So a whole layer becomes a few runs. Free space, which
// is in no run, reads as zeros and costs nothing:
//
//	superblock | descriptors | block bitmaps | inode bitmaps | journal | inode tables | layer 1     | layer 2     | ... | free
//	1 block      64 bytes a    1 block a       1 block a                 256 bytes an   body | data   body | data
//	             group         group           group                     inode          |
//	                                                                directories, long symlinks, extent trees, extended attributes
//
// Layers of inode numbers, layers of the content and all parts before them end in spare
// room. All parts before the content are in one flex group.
//
// Metadata that is zero (bitmaps of unused groups, unused parts of inode tables, all
// of the journal but its superblock) is in no run and not in stream 0.
//
// The format is that of mke2fs 1.47 with 4 KiB blocks: extents, 64bit, metadata_csum
// with a seed of its own (metadata_csum_seed), flex_bg, dir_index, dir_nlink,
// huge_file, large_file, extra_isize, has_journal, and sparse_super2 with no backups,
// since a backup superblock in the middle of the device would cut file data in two. Layouts
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
// Without a Plan, file data follows the inode tables, and directories follow file data.
//
// [Check] reads a filesystem without trusting it, and returns the first fault.
// [CheckWritten] does so for one that a kernel has written to and perhaps not unmounted.
//
// [Replay] recovers such a filesystem: it writes the transactions of its journal to their
// places, as a mount or e2fsck does, and needs neither. [Recover] shows the result without
// writing. [Diff] names the files that differ between two states of a filesystem, and
// [Owners] says what blocks are used for. All of them trust nothing that they read.
package ext4
