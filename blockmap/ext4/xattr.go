package ext4

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// The rest of the inode holds extended attributes after a word of xattrMagic, or else a
// block of their own holds them. Inodes with equal attributes share a block. The block
// begins with:
const (
	xhMagic    = 0x00 // 4
	xhRefs     = 0x04 // 4: inodes that share the block
	xhBlocks   = 0x08 // 4: 1
	xhHash     = 0x0C // 4: of all entries
	xhChecksum = 0x10 // 4: crc32c(seed, number of the block as 8 bytes, block with 0 here)
	xhSize     = 0x20 // the rest is zero

	xattrMagic = 0xEA020000

	// The entries follow, and end with a word of 0. In a block they are sorted by
	// index, length of the name, and name. Values fill the space from its end
	// downwards.
	xeNameLen   = 0x0 // 1
	xeIndex     = 0x1 // 1: stands for the beginning of the name
	xeOffset    = 0x2 // 2: offset of the value from the start of the block, or of the inode's entries
	xeInode     = 0x4 // 4: inode that holds the value; always 0
	xeValueSize = 0x8 // 4
	xeHash      = 0xC // 4: hash of name and value; 0 in an inode
	xeName      = 0x10

	xattrEnd = 4

	maxXattrRefs = 1024 // the kernel lets at most this many inodes share one block
	maxXattrName = 255

	inodeXattrs     = 128 + extraIsize // offset in the inode: xattrMagic, then entries
	inodeXattrSpace = inodeSize - inodeXattrs - 4
	blockXattrSpace = blockSize - xhSize
)

// Indexes that stand for the beginnings of names.
const (
	xattrUser       = 1
	xattrACLAccess  = 2
	xattrACLDefault = 3
	xattrTrusted    = 4
	xattrSecurity   = 6
)

type xattrPrefix struct {
	prefix string
	index  byte
	whole  bool // the prefix is the whole name
}

var xattrPrefixes = []xattrPrefix{
	{"user.", xattrUser, false},
	{"system.posix_acl_access", xattrACLAccess, true},
	{"system.posix_acl_default", xattrACLDefault, true},
	{"trusted.", xattrTrusted, false},
	{"security.", xattrSecurity, false},
}

// diskXattr is an attribute in its stored form.
type diskXattr struct {
	index byte
	name  string
	value []byte
}

func (x *diskXattr) size() int {
	return xeName + (len(x.name)+3)&^3 + (len(x.value)+3)&^3
}

func compareXattrs(a, b diskXattr) int {
	return cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(len(a.name), len(b.name)), strings.Compare(a.name, b.name))
}

func newDiskXattr(x *Xattr) (diskXattr, error) {
	for _, p := range xattrPrefixes {
		name, ok := strings.CutPrefix(x.Name, p.prefix)
		if !ok || p.whole != (name == "") {
			continue
		}
		if len(name) > maxXattrName || strings.IndexByte(name, 0) >= 0 {
			return diskXattr{}, fmt.Errorf("has an extended attribute whose name is too long or has a NUL in it: %.255q", x.Name)
		}
		d := diskXattr{index: p.index, name: name, value: x.Value}
		if p.whole {
			acl, err := diskACL(x.Value)
			if err != nil {
				return diskXattr{}, fmt.Errorf("has a malformed %s: %w", x.Name, err)
			}
			d.value = acl
		}
		return d, nil
	}
	return diskXattr{}, fmt.Errorf("has an extended attribute that ext4 cannot store: %.255q", x.Name)
}

// splitXattrs decides which attributes of in go in the inode and which in a block. If
// all fit in the inode, they go there. Otherwise, if all fit in a block, they go in the
// block, so that inodes can share it. Otherwise splitXattrs uses both.
func splitXattrs(in *Inode) (inode, block []diskXattr, err error) {
	if len(in.Xattrs) == 0 {
		return nil, nil, nil
	}
	all := make([]diskXattr, len(in.Xattrs))
	size := xattrEnd
	for i := range in.Xattrs {
		if all[i], err = newDiskXattr(&in.Xattrs[i]); err != nil {
			return nil, nil, err
		}
		size += all[i].size()
	}
	slices.SortFunc(all, compareXattrs)
	for i := 1; i < len(all); i++ {
		if compareXattrs(all[i-1], all[i]) == 0 {
			return nil, nil, fmt.Errorf("has two extended attributes %q", all[i].fullName())
		}
	}
	if size <= inodeXattrSpace {
		return all, nil, nil
	}
	if size <= blockXattrSpace {
		return nil, all, nil
	}

	largest := slices.Clone(all)
	slices.SortStableFunc(largest, func(a, b diskXattr) int { return cmp.Compare(b.size(), a.size()) })
	blockLeft, inodeLeft := blockXattrSpace-xattrEnd, inodeXattrSpace-xattrEnd
	for _, x := range largest {
		switch n := x.size(); {
		case n <= blockLeft:
			blockLeft -= n
			block = append(block, x)
		case n <= inodeLeft:
			inodeLeft -= n
			inode = append(inode, x)
		default:
			return nil, nil, fmt.Errorf("has an extended attribute that does not fit: %q, of %d bytes; "+
				"all of a file's have room for %d bytes", x.fullName(), len(x.value), blockXattrSpace+inodeXattrSpace-2*xattrEnd)
		}
	}
	slices.SortFunc(block, compareXattrs)
	slices.SortFunc(inode, compareXattrs)
	return inode, block, nil
}

func (x *diskXattr) fullName() string {
	for _, p := range xattrPrefixes {
		if p.index == x.index {
			return p.prefix + x.name
		}
	}
	return x.name
}

// putXattrs writes entries to b from start on, and their values backwards from the end
// of b.
func putXattrs(b []byte, start int, l []diskXattr, hashes bool) {
	end := len(b)
	for i := range l {
		x := &l[i]
		e := b[start:]
		e[xeNameLen] = byte(len(x.name))
		e[xeIndex] = x.index
		if len(x.value) > 0 {
			end -= (len(x.value) + 3) &^ 3
			copy(b[end:], x.value)
			le.PutUint16(e[xeOffset:], uint16(end))
		}
		le.PutUint32(e[xeValueSize:], uint32(len(x.value)))
		if hashes {
			le.PutUint32(e[xeHash:], x.hash(false))
		}
		copy(e[xeName:], x.name)
		start += xeName + (len(x.name)+3)&^3
	}
}

// xattrBlock writes a block of attributes to b, except the fields that depend on the
// place of the block and on the inodes that share it.
func xattrBlock(b []byte, l []diskXattr) {
	clear(b)
	le.PutUint32(b[xhMagic:], xattrMagic)
	le.PutUint32(b[xhBlocks:], 1)
	putXattrs(b, xhSize, l, true)
	var h uint32
	for i := range l {
		h = h<<16 ^ h>>16 ^ l[i].hash(false)
	}
	le.PutUint32(b[xhHash:], h)
}

// hash of the name and the value. Kernels before 6.2 hashed the bytes of the name as
// char, which is signed on some machines. Later kernels write the hash of unsigned
// bytes and read both.
func (x *diskXattr) hash(signed bool) uint32 {
	var h uint32
	for i := range len(x.name) {
		c := uint32(x.name[i])
		if signed {
			c = uint32(int32(int8(x.name[i])))
		}
		h = h<<5 ^ h>>27 ^ c
	}
	v := x.value
	for ; len(v) >= 4; v = v[4:] {
		h = h<<16 ^ h>>16 ^ le.Uint32(v)
	}
	if len(v) > 0 {
		var last [4]byte
		copy(last[:], v)
		h = h<<16 ^ h>>16 ^ le.Uint32(last[:])
	}
	return h
}

// xattrChecksum returns the checksum of xattr block b, which is at block on the device.
// It ignores the content of the checksum field.
func xattrChecksum(seed uint32, block uint64, b []byte) uint32 {
	c := crc32cWord(crc32cWord(seed, uint32(block)), uint32(block>>32))
	c = crc32cHole(crc32c(c, b[:xhChecksum]), 4)
	return crc32c(c, b[xhChecksum+4:])
}

// getxattr returns an ACL as a word of 2 and 8 bytes for each entry: tag, permissions
// (2 bytes each) and the user or group. On disk the word is 1, and entries without a
// particular user or group omit that last field.
const (
	aclVersion     = 2
	aclDiskVersion = 1

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

func diskACL(v []byte) ([]byte, error) {
	if len(v) < 4 || len(v)%8 != 4 {
		return nil, fmt.Errorf("it has %d bytes", len(v))
	}
	if n := le.Uint32(v); n != aclVersion {
		return nil, fmt.Errorf("it has version %d", n)
	}
	var out bytes.Buffer
	out.Write([]byte{aclDiskVersion, 0, 0, 0})
	for v = v[4:]; len(v) > 0; v = v[8:] {
		switch tag := le.Uint16(v); tag {
		case aclUser, aclGroup:
			out.Write(v[:8])
		case aclUserObj, aclGroupObj, aclMask, aclOther:
			out.Write(v[:4])
		default:
			return nil, fmt.Errorf("it has an entry with tag %#x", tag)
		}
	}
	return out.Bytes(), nil
}
