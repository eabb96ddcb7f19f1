package ext4

import (
	"bytes"
	"fmt"
	"slices"
)

// sharedXattrs counts the inodes that share a block of extended attributes.
type sharedXattrs struct{ refs, found uint32 }

// inodeXattrs checks the extended attributes of an inode, and returns how many
// blocks of them it counts.
func (c *checker) inodeXattrs(number uint32, in []byte) (uint64, error) {
	start := 128 + int(le.Uint16(in[inExtraIsize:]))
	var own []diskXattr
	if start+4 <= inodeSize && le.Uint32(in[start:]) == xattrMagic {
		var err error
		if own, err = c.xattrEntries(in[start+4:inodeSize], 0, false); err != nil {
			return 0, err
		}
	}
	block := le.Uint32(in[inXattr:])
	if block == 0 {
		return 0, nil
	}
	s := c.xattrs[block]
	if s == nil || len(own) > 0 {
		if block >= c.blocks {
			return 0, fmt.Errorf("has extended attributes at block %d of %d", block, c.blocks)
		}
		var b [blockSize]byte
		if err := c.readBlocks(b[:], block, "extended attributes"); err != nil {
			return 0, err
		}
		shared, err := c.xattrBlock(block, b[:])
		if err != nil {
			return 0, fmt.Errorf("has extended attributes at block %d: %w", block, err)
		}
		for _, x := range own {
			if slices.ContainsFunc(shared, func(y diskXattr) bool { return compareXattrs(x, y) == 0 }) {
				return 0, fmt.Errorf("has extended attribute %q twice", x.fullName())
			}
		}
		if s == nil {
			s = &sharedXattrs{refs: le.Uint32(b[xhRefs:])}
			c.xattrs[block] = s
			if err := c.claim(block, 1, number); err != nil {
				return 0, err
			}
		}
	}
	s.found++
	return 1, nil
}

func (c *checker) xattrBlock(block uint32, b []byte) ([]diskXattr, error) {
	if le.Uint32(b[xhMagic:]) != xattrMagic || le.Uint32(b[xhBlocks:]) != 1 {
		return nil, fmt.Errorf("the header is malformed: %x", b[:xhSize])
	}
	if err := c.sum(le.Uint32(b[xhChecksum:]), xattrChecksum(c.seed, uint64(block), b), "the block"); err != nil {
		return nil, err
	}
	l, err := c.xattrEntries(b, xhSize, true)
	if err != nil {
		return nil, err
	}
	var sum [2]uint32
	for i := range l {
		if i > 0 && compareXattrs(l[i-1], l[i]) >= 0 {
			return nil, fmt.Errorf("%q is out of order", l[i].fullName())
		}
		for s := range sum {
			sum[s] = sum[s]<<16 ^ sum[s]>>16 ^ l[i].hash(s == 1)
		}
	}
	// The kernel writes 0 where the hash of an entry is.
	if h := le.Uint32(b[xhHash:]); h != 0 && h != sum[0] && h != sum[1] && !c.lax {
		return nil, fmt.Errorf("the computed hash is %#x, the stored one %#x", sum[0], h)
	}
	return l, nil
}

// xattrEntries parses the entries from start on, whose values are in b.
func (c *checker) xattrEntries(b []byte, start int, hashes bool) ([]diskXattr, error) {
	var l []diskXattr
	type span struct{ from, to int }
	var values []span
	at := start
	for ; ; at += xeName + (int(b[at+xeNameLen])+3)&^3 {
		if at+xattrEnd > len(b) {
			return nil, fmt.Errorf("has extended attributes that do not end")
		}
		if le.Uint32(b[at:]) == 0 {
			break
		}
		if at+xeName > len(b) || at+xeName+(int(b[at+xeNameLen])+3)&^3 > len(b) {
			return nil, fmt.Errorf("has an extended attribute beyond the end, at byte %d", at)
		}
		e := b[at:]
		x := diskXattr{index: e[xeIndex], name: string(e[xeName : xeName+int(e[xeNameLen])])}
		known := slices.ContainsFunc(xattrPrefixes, func(p xattrPrefix) bool {
			return p.index == x.index && p.whole == (x.name == "")
		})
		if !known || bytes.IndexByte(e[xeName:xeName+len(x.name)], 0) >= 0 {
			return nil, fmt.Errorf("has an extended attribute with index %d and name %q", x.index, x.name)
		}
		offset, size := int(le.Uint16(e[xeOffset:])), int64(le.Uint32(e[xeValueSize:]))
		if le.Uint32(e[xeInode:]) != 0 {
			return nil, fmt.Errorf("has extended attribute %q in an inode", x.fullName())
		}
		if size > 0 {
			if offset < start || int64(offset)+size > int64(len(b)) {
				return nil, fmt.Errorf("has extended attribute %q of %d bytes at byte %d", x.fullName(), size, offset)
			}
			x.value = b[offset : offset+int(size)]
			values = append(values, span{offset, offset + int(size)})
		}
		if h := le.Uint32(e[xeHash:]); hashes && h != x.hash(false) && h != x.hash(true) && !c.lax {
			return nil, fmt.Errorf("has extended attribute %q with the computed hash %#x and the stored hash %#x", x.fullName(), x.hash(false), h)
		}
		if slices.ContainsFunc(l, func(y diskXattr) bool { return compareXattrs(x, y) == 0 }) {
			return nil, fmt.Errorf("has extended attribute %q twice", x.fullName())
		}
		if x.index == xattrACLAccess || x.index == xattrACLDefault {
			if err := checkACL(x.value); err != nil {
				return nil, fmt.Errorf("has a malformed %s: %w", x.fullName(), err)
			}
		}
		l = append(l, x)
	}
	slices.SortFunc(values, func(a, b span) int { return a.from - b.from })
	end := at + xattrEnd
	for _, v := range values {
		if v.from < end {
			return nil, fmt.Errorf("has extended attributes that overlap at byte %d", v.from)
		}
		end = v.to
	}
	return l, nil
}

// checkACL checks an ACL as it is on disk.
func checkACL(v []byte) error {
	if len(v) < 4 || le.Uint32(v) != aclDiskVersion {
		return fmt.Errorf("its version is unknown: %x", v[:min(len(v), 4)])
	}
	for v = v[4:]; len(v) > 0; {
		n := 4
		if len(v) >= 2 {
			switch tag := le.Uint16(v); tag {
			case aclUser, aclGroup:
				n = 8
			case aclUserObj, aclGroupObj, aclMask, aclOther:
			default:
				return fmt.Errorf("it has an entry with tag %#x", tag)
			}
		}
		if len(v) < n {
			return fmt.Errorf("it ends within an entry")
		}
		v = v[n:]
	}
	return nil
}
