package ext4

import (
	"errors"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// memory is a device with its metadata in memory and zeros elsewhere.
type memory struct {
	blocks map[uint32][]byte
	size   int64
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	n := len(p)
	for len(p) > 0 {
		i, in := uint32(off/blockSize), off%blockSize
		if m.blocks[i] == nil {
			m.blocks[i] = make([]byte, blockSize)
		}
		c := copy(m.blocks[i][in:], p)
		p, off = p[c:], off+int64(c)
	}
	return n, nil
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		if off >= m.size {
			return n, io.EOF
		}
		i, in := uint32(off/blockSize), off%blockSize
		l := min(len(p)-n, int(blockSize-in))
		if b := m.blocks[i]; b != nil {
			copy(p[n:n+l], b[in:])
		} else {
			clear(p[n : n+l])
		}
		n, off = n+l, off+int64(l)
	}
	return n, nil
}

func memoryImage(t testing.TB, fs *Filesystem) *memory {
	t.Helper()
	m := &memory{blocks: make(map[uint32][]byte), size: int64(fs.Blocks()) * blockSize}
	if err := fs.WriteMeta(&metaPlacer{f: m, runs: fs.Runs()}); err != nil {
		t.Fatal(err)
	}
	return m
}

// clone copies the device, all of it.
func (m *memory) clone() *memory {
	c := &memory{blocks: maps.Clone(m.blocks), size: m.size}
	for i, b := range c.blocks {
		c.blocks[i] = append([]byte(nil), b...)
	}
	return c
}

// broken is a small filesystem to be broken: everything in it, and where.
type broken struct {
	*memory
	fs  *Filesystem
	set map[string]*Inode
}

// small is a tree with one of everything that Check looks at, and the names of
// the things that tests break.
func small() (root *Inode, set map[string]*Inode) {
	big := []byte(strings.Repeat("big.", 50))
	set = map[string]*Inode{
		"file":      file(3*4096, Run{0, 1, 0, 1}, Run{2, 1, 5, 1}),
		"fragments": fragmented(700, 2),
		"short":     symlink("short"),
		"long":      symlink(strings.Repeat("l", 100)),
		"device":    {Mode: modeChar | 0o600, Major: 1, Minor: 3},
		"fifo":      {Mode: modeFifo | 0o600},
		"sub":       dir(Dirent{"subsub", dir()}, Dirent{"z", file(0)}),
		"tree":      dir(),
		"xattrs":    withXattrs(file(0), Xattr{"user.aa", big}, Xattr{"user.b", []byte("b")}, Xattr{"user.cc", []byte("cc")}),
		"the same":  withXattrs(file(0), Xattr{"user.aa", big}, Xattr{"user.b", []byte("b")}, Xattr{"user.cc", []byte("cc")}),
		"inside":    withXattrs(file(0), Xattr{"user.in", []byte("value")}, Xattr{"system.posix_acl_access", defaultACL}),
	}
	for _, name := range names(strings.Repeat("hashed", 40), 200) {
		set["tree"].Entries = append(set["tree"].Entries, Dirent{name, file(0)})
	}
	root = dir()
	for name, in := range set {
		root.Entries = append(root.Entries, Dirent{name, in})
	}
	return root, set
}

func newBroken(t testing.TB) *broken {
	root, set := small()
	set["root"] = root
	o := testOptions
	o.Size = 9 << 20 // enough for a journal
	o.dxFan = 5
	fs := layout(t, root, o)
	return &broken{memoryImage(t, fs), fs, set}
}

// inode is where an inode is on the device.
func (b *broken) inode(name string) []byte {
	return b.inodeNumber(b.fs.nodes[b.set[name].index].number)
}

func (b *broken) inodeNumber(n uint32) []byte {
	at := (n - 1) * inodeSize
	return b.blocks[b.fs.geo.inodeTables+at/blockSize][at%blockSize:][:inodeSize]
}

// content is a block of a directory or symlink.
func (b *broken) content(name string, block uint32) []byte {
	return b.blocks[b.fs.geo.content+b.fs.nodes[b.set[name].index].block+block]
}

func (b *broken) extentTree(block uint32) []byte {
	return b.blocks[b.fs.geo.content+b.fs.nodes[b.set["fragments"].index].tree+block]
}

func (b *broken) xattrs() []byte {
	return b.blocks[b.fs.geo.content+b.fs.nodes[b.set["xattrs"].index].xattr]
}

func (b *broken) super() []byte { return b.blocks[0][superblockOffset:][:superblockSize] }

func (b *broken) desc() []byte { return b.blocks[1][:descSize] }

// entry is an entry of a directory block.
func entryAt(block []byte, n int) []byte {
	for range n {
		block = block[le.Uint16(block[deLength:]):]
	}
	return block
}

// Every fault that Check looks for is found, and is told as what it is.
// Checksums are not looked at, or none would get that far.
func TestCheckFaults(t *testing.T) {
	put16 := func(b []byte, at int, v uint16) { le.PutUint16(b[at:], v) }
	put32 := func(b []byte, at int, v uint32) { le.PutUint32(b[at:], v) }
	add16 := func(b []byte, at int, v int) { put16(b, at, uint16(int(le.Uint16(b[at:]))+v)) }
	add32 := func(b []byte, at int, v int) { put32(b, at, uint32(int(le.Uint32(b[at:]))+v)) }
	for _, test := range []struct {
		name, want string
		breakIt    func(b *broken)
	}{
		{"no superblock", "magic", func(b *broken) { put16(b.super(), sbMagic, 1) }},
		{"recovery", "recovery", func(b *broken) { b.super()[sbFeatureIncompat] |= incompatRecover }},
		{"unknown feature", "unknown incompat", func(b *broken) { b.super()[sbFeatureIncompat+3] |= 1 }},
		{"unknown compat feature", "unknown compat", func(b *broken) { b.super()[sbFeatureCompat+3] |= 1 }},
		{"unknown ro_compat feature", "unknown ro_compat", func(b *broken) { b.super()[sbFeatureROCompat+3] |= 1 }},
		{"missing feature", "lacks the required incompat", func(b *broken) { b.super()[sbFeatureIncompat] &^= incompatExtents }},
		{"not clean", "state 0", func(b *broken) { put16(b.super(), sbState, 0) }},
		{"block size", "log of block size", func(b *broken) { put32(b.super(), sbLogBlockSize, 30) }},
		{"blocks in a group", "blocks per group", func(b *broken) { put32(b.super(), sbBlocksPerGroup, 0) }},
		{"no inodes", "0 inodes in a group", func(b *broken) { put32(b.super(), sbInodesPerGroup, 0) }},
		{"many inodes", "inodes in a group", func(b *broken) { put32(b.super(), sbInodesPerGroup, 1<<31) }},
		{"inode count", "inodes, but has", func(b *broken) { add32(b.super(), sbInodesCount, 1) }},
		{"larger than the device", "the device has", func(b *broken) { put32(b.super(), sbBlocksCount, 1<<31) }},
		{"no blocks", "0 blocks", func(b *broken) { put32(b.super(), sbBlocksCount, 0) }},
		{"smaller than its content", "from block", func(b *broken) { put32(b.super(), sbBlocksCount, 3) }},
		{"hash version", "hash version", func(b *broken) { b.super()[sbHashVersion] = 2 }},
		{"hash sign", "signed", func(b *broken) { b.super()[sbFlags] = 3 }},
		{"flex", "flex", func(b *broken) { b.super()[sbLogGroupsPerFlex] = 32 }},
		{"reserve", "reserves", func(b *broken) { put32(b.super(), sbReservedBlocks, 1<<30) }},
		{"free blocks", "free blocks, but", func(b *broken) { add32(b.super(), sbFreeBlocks, 1) }},
		{"free inodes", "free inodes, but the groups", func(b *broken) { add32(b.super(), sbFreeInodes, 1) }},

		{"bitmap beyond", "group 0", func(b *broken) { put32(b.desc(), gdBlockBitmap, 1<<30) }},
		{"bitmap far beyond", "beyond the device", func(b *broken) { put32(b.desc(), gdInodeBitmapHigh, 1) }},
		{"table over itself", "belongs to both", func(b *broken) { put32(b.desc(), gdBlockBitmap, b.fs.geo.content) }},
		{"group flags", "unknown flags", func(b *broken) { b.desc()[gdFlags+1] = 1 }},
		{"group inodes", "inodes, of which", func(b *broken) { put16(b.desc(), gdFreeInodes, 60000) }},
		{"group without inodes", "that were used", func(b *broken) { b.desc()[gdFlags] |= groupInodeUninit }},
		{"group without bitmap", "block bitmap is wrong", func(b *broken) { b.desc()[gdFlags] |= groupBlockUninit }},
		{"group free blocks", "free blocks, but its descriptor", func(b *broken) { add16(b.desc(), gdFreeBlocks, -1) }},
		{"group free inodes", "inodes in use, but its descriptor", func(b *broken) { add16(b.desc(), gdFreeInodes, -1); add16(b.desc(), gdUnusedInodes, -1) }},
		{"group directories", "directories, but its descriptor", func(b *broken) { add16(b.desc(), gdUsedDirs, 1) }},
		{"never used", "part of the table that was never used", func(b *broken) { add16(b.desc(), gdUnusedInodes, 1); add16(b.desc(), gdFreeInodes, 1) }},
		{"block bitmap", "wrong about block", func(b *broken) { b.blocks[b.fs.geo.blockBitmaps][b.fs.geo.end/8+1] ^= 1 }},
		{"inode bitmap padding", "padded", func(b *broken) { b.blocks[b.fs.geo.inodeBitmaps][blockSize-1] ^= 1 }},
		{"inode free", "in use, but its descriptor", func(b *broken) {
			b.blocks[b.fs.geo.inodeBitmaps][2] ^= 1
			put16(b.inodeNumber(17), inLinks, 0)
		}},
		{"inode free with links", "free, but has links", func(b *broken) { b.blocks[b.fs.geo.inodeBitmaps][2] ^= 1 }},
		{"reserved inode free", "reserved, but marked free", func(b *broken) { b.blocks[b.fs.geo.inodeBitmaps][0] ^= 1 }},
		{"reserved inode used", "reserved, but is a file", func(b *broken) { put16(b.inodeNumber(3), inMode, modeRegular) }},
		{"root", "no root", func(b *broken) {
			copy(b.inodeNumber(2), b.inode("short"))
			add16(b.desc(), gdUsedDirs, -1)
		}},

		{"extra size", "extra bytes", func(b *broken) { put16(b.inode("file"), inExtraIsize, 28) }},
		{"type", "no type of file", func(b *broken) { put16(b.inode("file"), inMode, 0) }},
		{"no links", "no links", func(b *broken) { put16(b.inode("file"), inLinks, 0) }},
		{"deleted", "deletion time", func(b *broken) { put32(b.inode("file"), inDtime, 1) }},
		{"inode flags", "unknown flags", func(b *broken) { b.inode("file")[inFlags+3] |= 0x10 }},
		{"index of a file", "hash tree", func(b *broken) { b.inode("file")[inFlags+1] |= 0x10 }},
		{"file without extents", "has flags", func(b *broken) { put32(b.inode("file"), inFlags, 0) }},
		{"links", "links, but its link count is", func(b *broken) { add16(b.inode("file"), inLinks, 1) }},
		{"sectors", "sectors", func(b *broken) { add32(b.inode("file"), inBlocks, 8) }},
		{"shorter than its content", "content up to", func(b *broken) { put32(b.inode("file"), inSize, 8192) }},
		{"longest", "bytes", func(b *broken) { put32(b.inode("file"), inSizeHigh, 1<<31) }},
		{"directory of odd size", "directory of", func(b *broken) { put32(b.inode("sub"), inSize, 4095) }},
		{"directory with a hole", "directory of", func(b *broken) { put32(b.inode("sub"), inSize, 8192) }},
		{"device with size", "bytes", func(b *broken) { put32(b.inode("device"), inSize, 1) }},
		{"fifo with number", "block map", func(b *broken) { put32(b.inode("fifo"), inBlock, 1) }},
		{"short symlink", "symlink of 4", func(b *broken) { put32(b.inode("short"), inSize, 4) }},
		{"empty symlink", "symlink of 0", func(b *broken) { put32(b.inode("short"), inSize, 0) }},
		{"long symlink", "ends after 100", func(b *broken) { put32(b.inode("long"), inSize, 101) }},
		{"endless symlink", "ends after", func(b *broken) {
			for i := range b.content("long", 0) {
				b.content("long", 0)[i] = 'l'
			}
		}},
		{"symlink longer than a block", "symlink of 4096", func(b *broken) { put32(b.inode("long"), inSize, 4096) }},

		{"extent magic", "malformed header", func(b *broken) { put16(b.inode("file"), inBlock+ehMagic, 0) }},
		{"extent entries", "malformed header", func(b *broken) { put16(b.inode("file"), inBlock+ehEntries, 5) }},
		{"extent depth", "depth 6", func(b *broken) { put16(b.inode("file"), inBlock+ehDepth, 6) }},
		{"extent child depth", "malformed header", func(b *broken) { put16(b.extentTree(0), ehDepth, 1) }},
		{"extent child empty", "malformed header", func(b *broken) { put16(b.extentTree(0), ehEntries, 0) }},
		{"extents overlap", "out of order", func(b *broken) { put16(b.inode("file"), inBlock+ehSize+eeCount, 3) }},
		{"empty extent", "out of order", func(b *broken) { put16(b.inode("file"), inBlock+ehSize+eeCount, 0) }},
		{"extent beyond", "extent of 1 blocks at", func(b *broken) { put32(b.inode("file"), inBlock+ehSize+eeStart, b.fs.geo.blocks) }},
		{"extent far beyond", "extent of 1 blocks at", func(b *broken) { put16(b.inode("file"), inBlock+ehSize+eeStartHigh, 1) }},
		{"extent on metadata", "belongs to both", func(b *broken) { put32(b.inode("file"), inBlock+ehSize+eeStart, b.fs.geo.journal) }},
		{"extent of another", "belongs to both", func(b *broken) { add32(b.inode("file"), inBlock+ehSize+eeStart, 1) }},
		{"unwritten directory", "hole at block 0", func(b *broken) { put16(b.inode("sub"), inBlock+ehSize+eeCount, maxExtent+1) }},
		{"extent tree loop", "malformed header", func(b *broken) {
			put32(b.inode("fragments"), inBlock+ehSize+eiLeaf, b.fs.geo.content)
		}},
		{"extent tree twice", "out of order", func(b *broken) {
			in := b.inode("fragments")
			copy(in[inBlock+ehSize+extentSize+eiLeaf:][:4], in[inBlock+ehSize+eiLeaf:])
		}},
		{"extent tree order", "out of order", func(b *broken) { put32(b.inode("fragments"), inBlock+ehSize+extentSize+eiFile, 0) }},
		{"extent tree beyond", "blocks from block", func(b *broken) { put32(b.inode("fragments"), inBlock+ehSize+eiLeaf, 1<<31) }},
		{"extent tree far beyond", "beyond the device", func(b *broken) { put16(b.inode("fragments"), inBlock+ehSize+eiLeafHigh, 1) }},

		{"journal backup", "copy of the journal's inode differs", func(b *broken) { b.super()[sbJournalBlocks] ^= 1 }},
		{"journal magic", "magic number", func(b *broken) { b.blocks[b.fs.geo.journal][0] ^= 1 }},
		{"journal log", "log start", func(b *broken) { b.blocks[b.fs.geo.journal][jsStart+3] = 1 }},
		{"journal type", "inode 8", func(b *broken) { put16(b.inodeNumber(8), inMode, modeFifo) }},

		{"no dot", `want "." for inode 2`, func(b *broken) { b.content("root", 0)[deName] = 'x' }},
		{"dot dot elsewhere", `want ".."`, func(b *broken) { put32(b.content("sub", 0)[12:], deInode, 11) }},
		{"entry length", "entry of 4097", func(b *broken) { put16(entryAt(b.content("sub", 0), 2), deLength, 4097) }},
		{"entry of nothing", "entry of 0", func(b *broken) { put16(entryAt(b.content("sub", 0), 2), deLength, 0) }},
		{"entry shorter than its name", "with a name of 200", func(b *broken) { entryAt(b.content("sub", 0), 2)[deNameLn] = 200 }},
		{"no tail", "no checksum", func(b *broken) { b.content("sub", 0)[dirTail+deType] = 0 }},
		{"slash", "slash", func(b *broken) { entryAt(b.content("sub", 0), 2)[deName] = '/' }},
		{"name", `entry ""`, func(b *broken) { entryAt(b.content("sub", 0), 2)[deNameLn] = 0 }},
		{"second dot", `entry "."`, func(b *broken) { e := entryAt(b.content("sub", 0), 3); e[deNameLn] = 1; e[deName] = '.' }},
		{"twice", `two entries "z"`, func(b *broken) {
			e := entryAt(b.content("sub", 0), 2)
			e[deNameLn] = 1
			e[deName] = 'z'
		}},
		{"free inode", "not in use", func(b *broken) { put32(entryAt(b.content("sub", 0), 2), deInode, 500) }},
		{"inode beyond", "not in use", func(b *broken) { put32(entryAt(b.content("sub", 0), 2), deInode, 1<<32-1) }},
		{"root as a child", "not in use", func(b *broken) { put32(entryAt(b.content("sub", 0), 2), deInode, rootInode) }},
		{"journal as a child", "not in use", func(b *broken) { put32(entryAt(b.content("sub", 0), 2), deInode, journalInode) }},
		{"entry type", "of type 1", func(b *broken) { entryAt(b.content("sub", 0), 2)[deType] = 1 }},
		{"linked directory", "in directory inode 2 already", func(b *broken) {
			put32(entryAt(b.content("sub", 0), 2), deInode, b.fs.nodes[b.set["sub"].index].number)
		}},
		{"lost file", "no directory has it", func(b *broken) { put32(entryAt(b.content("sub", 0), 3), deInode, 0) }},
		{"lost directory", "no directory has it", func(b *broken) { put32(entryAt(b.content("sub", 0), 2), deInode, 0) }},

		{"index without dots", "root without", func(b *broken) { put16(b.content("tree", 0), deLength, 16) }},
		{"index version", "hash version 9", func(b *broken) { b.content("tree", 0)[dxHash] = 9 }},
		{"index levels", "levels", func(b *broken) { b.content("tree", 0)[dxIndirect] = 3 }},
		{"index level missing", "no checksum", func(b *broken) { b.content("tree", 0)[dxIndirect]-- }},
		{"index limit", "entries of", func(b *broken) { put16(b.content("tree", 0), dxRoot+dxLimit, 400) }},
		{"index count", "entries of", func(b *broken) { put16(b.content("tree", 0), dxRoot+dxCount, 508) }},
		{"index empty", "0 entries", func(b *broken) { put16(b.content("tree", 0), dxRoot+dxCount, 0) }},
		{"index order", "behind", func(b *broken) { put32(b.content("tree", 0), dxRoot+dxEntrySize, 0) }},
		{"index block beyond", "names block", func(b *broken) { put32(b.content("tree", 0), dxRoot+dxBlock, 100) }},
		{"index loop", "names block 0", func(b *broken) { put32(b.content("tree", 0), dxRoot+dxBlock, 0) }},
		{"index block missing", "its hash tree names", func(b *broken) { add16(b.content("tree", 1), dxNode+dxCount, -1) }},
		{"index node", "empty directory block", func(b *broken) { put16(b.content("tree", 1), dxFake+deLength, 12) }},
		{"index hash", "in a block for hashes from", func(b *broken) { b.content("tree", 10)[deName+3] ^= 2 }},

		{"shared count", "2 inodes share", func(b *broken) { put32(b.xattrs(), xhRefs, 3) }},
		{"xattr magic", "header is malformed", func(b *broken) { put32(b.xattrs(), xhMagic, 3) }},
		{"xattr block beyond", "extended attributes at block", func(b *broken) { put32(b.inode("xattrs"), inXattr, 1<<31) }},
		{"xattr block far beyond", "beyond the device", func(b *broken) { put16(b.inode("xattrs"), inXattrHigh, 1) }},
		{"xattr index", "index 99", func(b *broken) { b.xattrs()[xhSize+xeIndex] = 99 }},
		{"xattr name", "index 1 and name", func(b *broken) { b.xattrs()[xhSize+xeName] = 0 }},
		{"xattr value", "at byte 4095", func(b *broken) { put16(b.xattrs(), xhSize+20+xeOffset, 4095) }},
		{"xattr value size", "of 4294967295 bytes", func(b *broken) { put32(b.xattrs(), xhSize+xeValueSize, 1<<32-1) }},
		{"xattr value inode", "in an inode", func(b *broken) { put32(b.xattrs(), xhSize+xeInode, 11) }},
		{"xattr over another", "overlap", func(b *broken) { put32(b.xattrs(), xhSize+2*20+xeValueSize, 5) }},
		{"xattr over its entry", "overlap", func(b *broken) { put16(b.xattrs(), xhSize+xeOffset, 40) }},
		{"xattr order", "out of order", func(b *broken) { b.xattrs()[xhSize+2*20+xeName] = 'A'; b.xattrs()[xhSize+20+xeName] = 'z' }},
		{"xattr twice", "twice", func(b *broken) { copy(b.xattrs()[xhSize+2*20+xeName:], "aa") }},
		{"xattrs without end", "beyond the end", func(b *broken) { b.inode("inside")[inodeXattrs+4] = 255 }},
		{"xattr ACL", "malformed", func(b *broken) { b.inode("inside")[inodeSize-8-16] = 9 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := newBroken(t)
			test.breakIt(b)
			c := &checker{r: b, size: b.size, lax: true, xattrs: make(map[uint32]*sharedXattrs)}
			if err := c.check(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("want %q: %v", test.want, err)
			}
			if err := Check(b, b.size); err == nil {
				t.Error("Check finds nothing")
			}
		})
	}
	b := newBroken(t)
	if err := Check(b, b.size); err != nil {
		t.Errorf("an undamaged image: %v", err)
	}
	if err := Check(b, b.size-1); err == nil {
		t.Error("Check accepts a device that is too short")
	}
	if err := Check(b, 0); err == nil {
		t.Error("Check accepts an empty device")
	}
}

// What a device says of itself costs nothing until it is there: a directory of
// 11 million blocks is one block of extents, and 30 groups of inodes in use are
// 30 descriptors.
func TestCheckBoundedMemory(t *testing.T) {
	root, set := small()
	o := testOptions
	o.Size = maxBlocks * blockSize
	fs := layout(t, root, o)
	for _, name := range []string{"tree", "sub"} {
		b := &broken{memoryImage(t, fs), fs, set}
		in := b.inode(name)
		tree := b.extentTree(0)
		fragments := b.inode("fragments")
		clear(fragments[inBlock : inBlock+blockMapSize])
		putExtentHeader(fragments[inBlock:], 0, rootExtents, 0)
		le.PutUint32(fragments[inBlocks:], 0)
		clear(in[inBlock : inBlock+blockMapSize])
		putExtentHeader(in[inBlock:], 1, rootExtents, 1)
		le.PutUint32(in[inBlock+ehSize+eiLeaf:], fs.geo.content+fs.nodes[set["fragments"].index].tree)
		putExtentHeader(tree, blockExtents, blockExtents, 0)
		for i := range uint32(blockExtents) {
			e := tree[ehSize+i*extentSize:]
			le.PutUint32(e[eeFile:], i*maxExtent)
			le.PutUint16(e[eeCount:], maxExtent)
			le.PutUint32(e[eeStart:], fs.geo.end+i*maxExtent)
		}
		// The directory itself stays where its first block says.
		le.PutUint32(tree[ehSize+eeStart:], fs.geo.end)
		for i := range uint32(3) {
			if from := b.blocks[fs.geo.content+fs.nodes[set[name].index].block+i]; i < fs.nodes[set[name].index].blocks {
				b.blocks[fs.geo.end+i] = from
			}
		}
		size := uint64(blockExtents) * maxExtent * blockSize
		le.PutUint32(in[inSize:], uint32(size))
		le.PutUint32(in[inSizeHigh:], uint32(size>>32))
		sectors := size/512 + 8
		le.PutUint32(in[inBlocks:], uint32(sectors))
		le.PutUint16(in[inBlocksHigh:], uint16(sectors>>32))
		for i := range uint32(30) {
			d := b.blocks[1][(i+1)*descSize:][:descSize]
			le.PutUint16(d[gdFlags:], groupTableZeroed|groupBlockUninit)
			le.PutUint16(d[gdUnusedInodes:], 0)
			b.blocks[fs.geo.inodeBitmaps+i+1] = make([]byte, blockSize)
			setBits(b.blocks[fs.geo.inodeBitmaps+i+1], fs.geo.inodesPerGroup, 8*blockSize)
		}

		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		reads := &counting{memory: b.memory}
		c := &checker{r: reads, size: b.size, lax: true, xattrs: make(map[uint32]*sharedXattrs)}
		if err := c.check(); err == nil || !strings.Contains(err.Error(), "directory inode") {
			t.Errorf("%s: %v", name, err)
		}
		runtime.ReadMemStats(&after)
		// A descriptor is about 50 bytes, and there are 131,072.
		if n := after.TotalAlloc - before.TotalAlloc; n > 60<<20 {
			t.Errorf("%s: %d bytes of memory", name, n)
		}
		if reads.bytes > 20<<20 {
			t.Errorf("%s: %d bytes read", name, reads.bytes)
		}
	}
}

// inBody reports whether a block is metadata that belongs to one inode.
func (b *broken) inBody(block uint32) bool {
	return slices.ContainsFunc(b.fs.body, func(p bodyPart) bool {
		return block-b.fs.geo.content >= p.block && block-b.fs.geo.content < p.block+p.count
	})
}

// A flipped bit is found wherever a checksum covers it, which is everywhere but
// in what nothing uses, in symlinks and in the journal.
func TestCheckFlippedBits(t *testing.T) {
	b := newBroken(t)
	g := &b.fs.geo
	covered := func(block uint32, at int) bool {
		switch {
		case block == 0:
			return at >= superblockOffset && at < superblockOffset+superblockSize
		case block < g.blockBitmaps:
			return at < descSize
		case block >= g.inodeTables && block < g.content:
			number := (block-g.inodeTables)*inodesPerBlock + uint32(at/inodeSize) + 1
			return number == rootInode || number == journalInode || number >= firstInode && number <= b.fs.usedInodes()
		case block == g.journal:
			return false
		case block >= g.content && b.inBody(block):
			for _, n := range b.fs.nodes {
				if n.is(modeSymlink) && n.blocks == 1 && block == g.content+n.block {
					return false
				}
			}
			switch block - g.content - b.fs.nodes[b.set["tree"].index].block {
			case 0:
				return at < dxRoot+dxEntrySize*int(le.Uint16(b.content("tree", 0)[dxRoot+dxCount:]))
			case 1, 2, 3:
				return at < dxNode+dxEntrySize*int(le.Uint16(b.blocks[block][dxNode+dxCount:]))
			}
		}
		return true
	}
	step := 37
	if testing.Short() {
		step = 517
	}
	for block, data := range b.blocks {
		for at := int(block) % step; at < blockSize; at += step {
			if !covered(block, at) {
				continue
			}
			data[at] ^= 1 << (at % 8)
			if err := Check(b, b.size); err == nil {
				t.Errorf("Check ignores byte %d of block %d", at, block)
			}
			data[at] ^= 1 << (at % 8)
		}
	}
}

var errRead = errors.New("no such sector")

// failing fails the n'th read.
type failing struct {
	*memory
	n int
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	if f.n--; f.n < 0 {
		return 0, errRead
	}
	return f.memory.ReadAt(p, off)
}

func TestCheckReadErrors(t *testing.T) {
	b := newBroken(t)
	for n := 0; ; n++ {
		f := &failing{b.memory, n}
		err := Check(f, b.size)
		if err == nil {
			if f.n < 0 {
				t.Fatalf("the failure of read %d is not reported", n)
			}
			break
		}
		if !errors.Is(err, errRead) {
			t.Fatalf("read %d: %v", n, err)
		}
	}
}
