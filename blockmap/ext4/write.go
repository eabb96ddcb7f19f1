package ext4

import (
	"bufio"
	"fmt"
	"io"

	"thaw/blockmap"
)

// mapMeta fills fs.meta: the places of the blocks of stream 0, in the order in which
// WriteMeta writes them.
func (fs *Filesystem) mapMeta() {
	g := &fs.geo
	var next uint32
	add := func(device, count uint32) {
		if count == 0 {
			return
		}
		if n := len(fs.meta); n > 0 && fs.meta[n-1].Device+fs.meta[n-1].Count == device {
			fs.meta[n-1].Count += count
		} else {
			fs.meta = append(fs.meta, blockmap.Run{Device: device, Block: next, Count: count})
		}
		next += count
	}
	add(0, g.blockBitmaps) // superblock and descriptors
	for i := range g.groups {
		if fs.hasBlockBitmap(i) {
			add(g.blockBitmaps+i, 1)
		}
	}
	for i := range fs.groups {
		if fs.groups[i].usedInodes > 0 {
			add(g.inodeBitmaps+uint32(i), 1)
		}
	}
	if g.journalBlocks > 0 {
		add(g.journal, 1)
	}
	add(g.journalTree, g.inodeTables-g.journalTree)
	for block := range fs.tableBlocks {
		add(g.inodeTables+block, 1)
	}
	for _, p := range fs.body {
		add(g.content+p.block, p.count)
	}
}

// tableBlocks yields the blocks of the inode tables that hold inodes in use. The tables
// are consecutive. The first block always does.
func (fs *Filesystem) tableBlocks(yield func(block uint32) bool) {
	if !yield(0) {
		return
	}
	last := uint32(0)
	for _, i := range fs.byNumber {
		if block := (fs.nodes[i].number - 1) / inodesPerBlock; block != last {
			if !yield(block) {
				return
			}
			last = block
		}
	}
}

// WriteMeta writes stream 0.
func (fs *Filesystem) WriteMeta(w io.Writer) error {
	m := &metaWriter{fs: fs, w: bufio.NewWriterSize(w, 1<<18)}
	for _, part := range []func() error{
		m.descriptors, m.blockBitmaps, m.inodeBitmaps, m.journal, m.inodeTables, m.body, m.w.Flush,
	} {
		if err := part(); err != nil {
			return fmt.Errorf("write the metadata of an ext4 filesystem: %w", err)
		}
	}
	return nil
}

type metaWriter struct {
	fs  *Filesystem
	w   *bufio.Writer
	buf [blockSize]byte
	ext []extent
}

func (m *metaWriter) put(b []byte) error {
	_, err := m.w.Write(b)
	return err
}

// descriptors writes the first superblock and the descriptor table.
func (m *metaWriter) descriptors() error {
	clear(m.buf[:])
	m.fs.superblock(m.buf[superblockOffset : superblockOffset+superblockSize])
	if err := m.put(m.buf[:]); err != nil {
		return err
	}
	for first := uint32(0); first < m.fs.geo.groups; first += descsPerBlock {
		clear(m.buf[:])
		m.fs.descriptors(m.buf[:], first)
		if err := m.put(m.buf[:]); err != nil {
			return err
		}
	}
	return nil
}

func (m *metaWriter) blockBitmaps() error {
	for i := range m.fs.geo.groups {
		if !m.fs.hasBlockBitmap(i) {
			continue
		}
		m.fs.blockBitmap(m.buf[:], i)
		if err := m.put(m.buf[:]); err != nil {
			return err
		}
	}
	return nil
}

func (m *metaWriter) inodeBitmaps() error {
	for i := range m.fs.groups {
		if m.fs.groups[i].usedInodes == 0 {
			continue
		}
		m.fs.inodeBitmap(m.buf[:], uint32(i))
		if err := m.put(m.buf[:]); err != nil {
			return err
		}
	}
	return nil
}

func (m *metaWriter) inodeTables() error {
	fs := m.fs
	at := 0 // in fs.byNumber
	for block := range fs.tableBlocks {
		clear(m.buf[:])
		first := block*inodesPerBlock + 1
		// The other reserved inodes are zero and need no checksum.
		if block == 0 && fs.geo.journalBlocks > 0 {
			fs.putJournalInode(m.buf[(journalInode-1)*inodeSize:][:inodeSize])
		}
		for ; at < len(fs.byNumber); at++ {
			n := &fs.nodes[fs.byNumber[at]]
			if n.number-first >= inodesPerBlock {
				break
			}
			if err := m.node(m.buf[(n.number-first)*inodeSize:][:inodeSize], n); err != nil {
				return err
			}
		}
		if err := m.put(m.buf[:]); err != nil {
			return err
		}
	}
	return nil
}

func (m *metaWriter) node(b []byte, n *node) error {
	m.ext = m.fs.extents(n, m.ext[:0])
	return m.fs.putInode(b, n, m.ext)
}

func (m *metaWriter) journal() error {
	fs := m.fs
	if fs.geo.journalBlocks == 0 {
		return nil
	}
	clear(m.buf[:])
	fs.journalSuperblock(m.buf[:])
	if err := m.put(m.buf[:]); err != nil {
		return err
	}
	return extentBlocks(fs.geo.journalExtents(), fs.geo.journalTree, inodeSeed(checksumSeed, journalInode, 0), m.put)
}

// body writes everything that placeBody placed, in the same order.
func (m *metaWriter) body() error {
	dir := dirWriter{fs: m.fs}
	for _, p := range m.fs.body {
		n := &m.fs.nodes[p.node]
		seed := inodeSeed(checksumSeed, n.number, 0)
		var err error
		switch {
		case p.kind == bodyTree:
			m.ext = m.fs.extents(n, m.ext[:0])
			err = extentBlocks(m.ext, m.fs.geo.content+p.block, seed, m.put)
		case p.kind == bodyXattr:
			err = m.xattrs(n)
		case n.is(modeDir):
			dir.seed, dir.number, dir.parent = seed, n.number, m.fs.nodes[n.parent].number
			err = dir.blocks(n.Inode, n.blocks, m.put)
		default: // a long symlink
			clear(m.buf[:])
			copy(m.buf[:], n.Target)
			err = m.put(m.buf[:])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// xattrs writes a node's block of extended attributes.
func (m *metaWriter) xattrs(n *node) error {
	_, block, err := splitXattrs(n.Inode)
	if err != nil {
		return err
	}
	xattrBlock(m.buf[:], block)
	le.PutUint32(m.buf[xhRefs:], m.fs.xattrRefs[n.xattr])
	le.PutUint32(m.buf[xhChecksum:], xattrChecksum(checksumSeed, uint64(m.fs.geo.content+n.xattr), m.buf[:]))
	return m.put(m.buf[:])
}
