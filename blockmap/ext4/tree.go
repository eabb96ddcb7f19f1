package ext4

// Inode is one file of any type. Several Dirents may point at one Inode: those
// are hard links. Which fields mean something depends on the type bits of Mode;
// the others are left zero.
type Inode struct {
	Mode  uint32 // as st_mode: type bits, permissions, setuid, setgid, sticky
	UID   uint32
	GID   uint32
	Major uint32 // character and block devices: below 4096
	Minor uint32 // below 1<<20

	index uint32 // in Filesystem.nodes; meaningless unless nodes[index] is this inode
	place place  // in a Plan

	Atime, Mtime, Ctime Time

	Size    int64    // regular files: length in bytes
	Data    []Run    // regular files: where the content is, sorted by FileBlock; gaps are holes
	Target  string   // symlinks: 1 to 4095 bytes
	Entries []Dirent // directories: all but "." and "..", in any order; Layout reorders them
	Xattrs  []Xattr  // in any order
}

// Run says that Count 4 KiB blocks of a file, from FileBlock, are those of a
// stream, from Block. Stream 0 is the filesystem's own. A stream block belongs
// to one file at most. Where a file ends within its last block, the rest of that
// block of the stream should be zeros, since a mapping of the file shows it.
type Run struct {
	FileBlock, Stream, Block, Count uint32
}

// Dirent is a name in a directory: 1 to 255 bytes, any but '/' and NUL.
type Dirent struct {
	Name  string
	Inode *Inode
}

// Xattr is an extended attribute under its full name, such as
// "security.capability". The value of a POSIX ACL is in the form that getxattr
// gives; it is put on disk in ext4's own.
type Xattr struct {
	Name  string
	Value []byte
}

// Time counts seconds and nanoseconds since 1970. Inodes hold seconds from
// -1<<31 to 3<<32-1<<31-1, which is 1901 to 2310; beyond that, the nearest time
// that they hold is stored. Nsec beyond 999,999,999 is taken as that.
type Time struct {
	Sec  int64
	Nsec uint32
}

// File types and the rest of st_mode. The on-disk mode has the same bits.
const (
	modeType    = 0o170000
	modeSocket  = 0o140000
	modeSymlink = 0o120000
	modeRegular = 0o100000
	modeBlock   = 0o060000
	modeDir     = 0o040000
	modeChar    = 0o020000
	modeFifo    = 0o010000

	modeMax = 0o177777
)

func (in *Inode) is(t uint32) bool { return in.Mode&modeType == t }

// blocksOf is how many blocks n bytes take.
func blocksOf(n int64) int64 {
	b := n / blockSize
	if n%blockSize != 0 {
		b++ // adding first could overflow
	}
	return b
}
