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
	add(g.inodeBitmaps, uint32(len(fs.dirs)))
	add(g.inodeTables, fs.usedTableBlocks())
	if g.journalBlocks > 0 {
		add(g.journal, 1)
	}
	add(g.journalTree, g.body-g.journalTree)
	add(g.body, g.data-g.body)
}

// usedTableBlocks returns how many blocks of the inode tables hold inodes in use. The
// tables are consecutive.
func (fs *Filesystem) usedTableBlocks() uint32 {
	return (fs.usedInodes() + inodesPerBlock - 1) / inodesPerBlock
}

// WriteMeta writes stream 0.
func (fs *Filesystem) WriteMeta(w io.Writer) error {
	m := &metaWriter{fs: fs, w: bufio.NewWriterSize(w, 1<<18)}
	for _, part := range []func() error{
		m.descriptors, m.blockBitmaps, m.inodeBitmaps, m.inodeTables, m.journal, m.body, m.w.Flush,
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
		gr := m.fs.group(i)
		prefixBitmap(m.buf[:], gr.usedBlocks, gr.size)
		if err := m.put(m.buf[:]); err != nil {
			return err
		}
	}
	return nil
}

func (m *metaWriter) inodeBitmaps() error {
	for i := range m.fs.dirs {
		prefixBitmap(m.buf[:], m.fs.group(uint32(i)).usedInodes, m.fs.geo.inodesPerGroup)
		if err := m.put(m.buf[:]); err != nil {
			return err
		}
	}
	return nil
}

func (m *metaWriter) inodeTables() error {
	fs := m.fs
	for block := range fs.usedTableBlocks() {
		clear(m.buf[:])
		for i := range uint32(inodesPerBlock) {
			number := block*inodesPerBlock + i + 1
			if number > fs.usedInodes() {
				break
			}
			if err := m.inode(m.buf[i*inodeSize:(i+1)*inodeSize], number); err != nil {
				return err
			}
		}
		if err := m.put(m.buf[:]); err != nil {
			return err
		}
	}
	return nil
}

func (m *metaWriter) inode(b []byte, number uint32) error {
	fs := m.fs
	switch {
	case number == rootInode:
		return m.node(b, &fs.nodes[0])
	case number >= firstInode:
		return m.node(b, &fs.nodes[number-firstInode+1])
	case number == journalInode && fs.geo.journalBlocks > 0:
		fs.putJournalInode(b)
	}
	// The other reserved inodes are zero and need no checksum.
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
	return extentBlocks(fs.geo.journalExtents(), fs.geo.journalTree, inodeSeed(fs.seed, journalInode, 0), m.put)
}

// body writes everything that placeBody placed, in the same order.
func (m *metaWriter) body() error {
	fs := m.fs
	var next uint32
	count := func(b []byte) error {
		next++
		return m.put(b)
	}
	dir := dirWriter{fs: fs}
	for i := range fs.nodes {
		n := &fs.nodes[i]
		number := inodeNumber(uint32(i))
		seed := inodeSeed(fs.seed, number, 0)
		switch {
		case n.is(modeDir):
			dir.seed, dir.number, dir.parent = seed, number, inodeNumber(n.parent)
			if err := dir.blocks(n.Inode, n.blocks, count); err != nil {
				return err
			}
		case n.blocks > 0: // a long symlink
			clear(m.buf[:])
			copy(m.buf[:], n.Target)
			if err := count(m.buf[:]); err != nil {
				return err
			}
		}
		if n.treeBlocks > 0 {
			m.ext = fs.extents(n, m.ext[:0])
			if err := extentBlocks(m.ext, fs.geo.body+n.tree, seed, count); err != nil {
				return err
			}
		}
		if len(n.Xattrs) == 0 || n.xattr != next {
			continue // no attributes, or in the inode, or in the block of an earlier inode
		}
		if _, block, err := splitXattrs(n.Inode); err != nil {
			return err
		} else if len(block) > 0 {
			xattrBlock(m.buf[:], block)
			le.PutUint32(m.buf[xhRefs:], fs.xattrRefs[next])
			le.PutUint32(m.buf[xhChecksum:], xattrChecksum(fs.seed, uint64(fs.geo.body+next), m.buf[:]))
			if err := count(m.buf[:]); err != nil {
				return err
			}
		}
	}
	return nil
}
