package blockmap

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A superblock is what the kernel sets up when a file system is mounted, and shares between
// all mounts of it: the page cache of its files lives as long. The IDs below distinguish a
// superblock from every other since the boot.

// ofDirectory distinguishes the kinds of IDs: with it, an ID is that of a directory in /sys;
// without it, that of a mount. Neither number has 64 bits: Linux counts both up from 1.
const ofDirectory = 1 << 63

// ofMemory is the ID of every superblock of tmpfs: that of no directory. Its files end with
// it, so a file that has the inode number and the time of birth that it had is under the
// superblock that it was.
const ofMemory = ofDirectory

// superblockID is the ID of the superblock of an open file, or 0 if that cannot be known. st
// is what statx says of the file.
//
// The driver of a file system makes a directory in /sys for each superblock, and removes it
// with the superblock. All mount namespaces see the same one. Its inode number is not used
// again before a reboot: since Linux 5.5, it has 31 bits that count up and 32 that count
// how often these began anew (kernfs_new_node).
//
// Where there is no such directory, the ID is that of the mount, which keeps its superblock
// alive. A process in another mount namespace sees other mounts of the same superblock, and
// cannot know that it is the same.
func superblockID(fd int, st *unix.Statx_t) uint64 {
	var fs unix.Statfs_t // its type stays 0 where it fails: no file system's
	if err := unix.Fstatfs(fd, &fs); err == nil && fs.Type == unix.TMPFS_MAGIC && st.Mask&unix.STATX_BTIME != 0 {
		return ofMemory
	}
	if n := directoryInode(superblockDirectory(fd, fs.Type, st)); n != 0 && n < ofDirectory {
		return n | ofDirectory
	}
	// Before Linux 6.8, IDs of mounts are used again.
	if st.Mask&unix.STATX_MNT_ID_UNIQUE != 0 && st.Mnt_id < ofDirectory {
		return st.Mnt_id
	}
	return 0
}

// superblockDirectory is the path of the directory that /sys has for the superblock of an
// open file. It is "" for a file system whose driver makes none. kind is what statfs says.
func superblockDirectory(fd int, kind int64, st *unix.Statx_t) string {
	switch kind {
	case unix.EXT4_SUPER_MAGIC:
		return diskDirectory("ext4", st)
	case unix.XFS_SUPER_MAGIC:
		return diskDirectory("xfs", st)
	case unix.F2FS_SUPER_MAGIC:
		return diskDirectory("f2fs", st)
	case unix.BTRFS_SUPER_MAGIC:
		return btrfsDirectory(fd)
	case unix.FUSE_SUPER_MAGIC, unix.NFS_SUPER_MAGIC:
		// A file system without a disk has a bdi of its own. That of a disk outlives a
		// superblock.
		if st.Dev_major == 0 {
			return fmt.Sprintf("/sys/class/bdi/0:%d", st.Dev_minor)
		}
	}
	return ""
}

// diskDirectory is the directory of a file system on a single disk, by whose name it goes.
func diskDirectory(kind string, st *unix.Statx_t) string {
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", st.Dev_major, st.Dev_minor))
	if err != nil {
		return ""
	}
	return filepath.Join("/sys/fs", kind, filepath.Base(link))
}

// btrfsDirectory is the directory of a btrfs, which goes by its UUID: it may have several
// disks, and several device numbers.
func btrfsDirectory(fd int) string {
	const fsInfo = 0x8400941f // BTRFS_IOC_FS_INFO of linux/btrfs.h
	var info struct {
		_    [2]uint64
		uuid [16]byte
		_    [1024 - 32]byte
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fsInfo, uintptr(unsafe.Pointer(&info))); errno != 0 {
		return ""
	}
	u := hex.EncodeToString(info.uuid[:])
	return filepath.Join("/sys/fs/btrfs", u[:8]+"-"+u[8:12]+"-"+u[12:16]+"-"+u[16:20]+"-"+u[20:])
}

// directoryInode is the inode number of a directory of /sys. It is 0 if there is none, or if
// something else is mounted there.
func directoryInode(path string) uint64 {
	if path == "" {
		return 0
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	var fs unix.Statfs_t
	var st unix.Stat_t
	if unix.Fstatfs(fd, &fs) != nil || fs.Type != unix.SYSFS_MAGIC || unix.Fstat(fd, &st) != nil {
		return 0
	}
	return st.Ino
}
