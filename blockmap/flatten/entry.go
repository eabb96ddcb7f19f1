package flatten

import (
	"archive/tar"
	"errors"
	"fmt"
	"math"
	"path"
	"strings"
	"time"

	"thaw/blockmap/ext4"
)

// The limits of Linux, in bytes.
const (
	maxName      = 255
	maxSymlink   = 4095 // of the target
	maxXattrName = 255
	maxXattr     = 64 << 10 // of the value

	// maxXattrs bounds all attributes of a file together: names, values and
	// xattrCost bytes for each. ext4 has room for much less, but its limit is
	// applied later: an upper layer may hide the file.
	maxXattrs = 64 << 10
	xattrCost = 16
)

func xattrSize(x *ext4.Xattr) int { return xattrCost + len(x.Name) + len(x.Value) }

// The types of a file in its mode, as in stat(2).
const (
	modeType    = 0o170000
	modeSymlink = 0o120000
	modeRegular = 0o100000
	modeBlock   = 0o060000
	modeDir     = 0o040000
	modeChar    = 0o020000
	modeFifo    = 0o010000
)

// Whiteouts, as the layer section of the OCI image spec names them.
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh." // bookkeeping of aufs, with one exception:
	whiteoutOpaque = ".wh..wh..opq"

	// aufs gives a file with several names one more name in this directory, and a
	// layer may list hard links to this name only.
	plinkDir = ".wh..wh.plnk/"
)

// entry is one line of a layer: a file, or the absence of one.
type entry struct {
	kind  kind
	name  string      // clean, relative to the root; "" is the root itself
	link  string      // symlinks: the target as it stands; hard links: the name of the target, clean
	inode *ext4.Inode // of kindFile
}

type kind uint8

const (
	kindFile     kind = iota // of any type: it is in the inode's mode
	kindHardLink             // another name for link
	kindWhiteout             // name is not there any more
	kindOpaque               // the directory name has nothing of the layers below
)

// clean makes a path relative to the root, without ".", ".." or double slashes.
// "" is the root.
func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// fromHeader turns a tar header into an entry, or into nil if the header describes no
// file. It calls drop for each attribute that it omits.
func fromHeader(h *tar.Header, drop func(attribute, entry string)) (*entry, error) {
	if len(h.Name) > maxPath {
		return nil, fmt.Errorf("a name of %d bytes: the limit of Linux is %d", len(h.Name), maxPath)
	}
	e := &entry{name: clean(h.Name)}
	dir, base := path.Split(e.name)
	plink := dir == plinkDir
	if !plink && (strings.HasPrefix(dir, whiteoutMeta) || strings.Contains(dir, "/"+whiteoutMeta)) {
		return nil, nil
	}
	if strings.HasPrefix(base, whiteoutPrefix) && !plink {
		switch {
		case base == whiteoutOpaque:
			e.kind, e.name = kindOpaque, clean(dir)
		case strings.HasPrefix(base, whiteoutMeta):
			return nil, nil
		default:
			name := base[len(whiteoutPrefix):]
			if name == "" || name == "." || name == ".." {
				return nil, errors.New("a whiteout of no name")
			}
			e.kind, e.name = kindWhiteout, dir+name
		}
		return e, checkName(e.name)
	}
	if err := checkName(e.name); err != nil {
		return nil, err
	}
	if plink && h.Typeflag == tar.TypeDir {
		return nil, nil
	}
	in := new(ext4.Inode)
	in.Mode = uint32(h.Mode) & 0o7777
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		in.Mode |= modeRegular
	case tar.TypeDir:
		in.Mode |= modeDir
	case tar.TypeLink:
		if len(h.Linkname) > maxPath {
			return nil, fmt.Errorf("a hard link to a name of %d bytes: the limit of Linux is %d", len(h.Linkname), maxPath)
		}
		e.kind, e.link = kindHardLink, clean(h.Linkname)
		return e, nil
	case tar.TypeSymlink:
		in.Mode |= modeSymlink
		in.Target, e.link = h.Linkname, h.Linkname
		switch n := len(h.Linkname); {
		case n == 0:
			return nil, errors.New("a symbolic link to nothing")
		case n > maxSymlink:
			return nil, fmt.Errorf("a symbolic link whose target has %d bytes: the limit is %d", n, maxSymlink)
		case strings.IndexByte(h.Linkname, 0) >= 0:
			return nil, errors.New("a symbolic link with a NUL in its target")
		}
	case tar.TypeChar:
		in.Mode |= modeChar
	case tar.TypeBlock:
		in.Mode |= modeBlock
	case tar.TypeFifo:
		in.Mode |= modeFifo
	case tar.TypeXGlobalHeader:
		return nil, nil
	default:
		return nil, fmt.Errorf("an entry of type %q, which is not a file", h.Typeflag)
	}
	if e.name == "" && in.Mode&modeType != modeDir {
		return nil, errors.New("the root is not a directory")
	}
	if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return nil, fmt.Errorf("device number %d:%d is out of range", h.Devmajor, h.Devminor)
		}
		in.Major, in.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	}
	if h.Uid < 0 || h.Uid > math.MaxUint32 || h.Gid < 0 || h.Gid > math.MaxUint32 {
		return nil, fmt.Errorf("owner %d:%d is out of range", h.Uid, h.Gid)
	}
	in.UID, in.GID = uint32(h.Uid), uint32(h.Gid)
	in.Mtime = timeOf(h.ModTime)
	in.Atime, in.Ctime = in.Mtime, in.Mtime
	if !h.AccessTime.IsZero() {
		in.Atime = timeOf(h.AccessTime)
	}
	if !h.ChangeTime.IsZero() {
		in.Ctime = timeOf(h.ChangeTime)
	}
	e.inode = in
	return e, xattrs(h, e, drop)
}

// checkName checks each part of a clean name.
func checkName(name string) error {
	for part := range strings.SplitSeq(name, "/") {
		if len(part) > maxName {
			return fmt.Errorf("a name of more than %d bytes", maxName)
		}
		if strings.IndexByte(part, 0) >= 0 {
			return errors.New("a name with a NUL in it")
		}
	}
	return nil
}

func timeOf(t time.Time) ext4.Time { return ext4.Time{Sec: t.Unix(), Nsec: uint32(t.Nanosecond())} }
