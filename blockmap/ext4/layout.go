package ext4

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"thaw/blockmap"
)

// Options are what a filesystem is made with beside its tree.
type Options struct {
	// Size is the size of the device in bytes, rounded up to whole blocks. A
	// device that is too small for the content, or for its number of inodes,
	// is made as large as it must be; then it may be full. There is an inode
	// for every 16 KiB of the device, or more if the tree has more.
	Size int64

	UUID     [16]byte // must not be zero
	HashSeed [16]byte // of directory hashes
	Label    string   // at most 16 bytes
	Time     Time     // when the filesystem and its inodes were made; e2fsck dislikes the future

	dxFan int // tests: children of a hash tree node, to get deep trees cheaply
}

// Filesystem is a filesystem that was laid out. It refers to the tree that it was
// made from: nobody may change the tree while the Filesystem is in use. Its methods
// may run at the same time.
type Filesystem struct {
	opts     Options
	geo      geometry
	seed     uint32 // crc32c of the UUID
	hasher   nameHasher
	largeDir bool

	nodes     []node            // by inode number; see inodeNumber
	dirs      []uint32          // number of directories in each group that has inodes in use
	xattrRefs map[uint32]uint32 // inodes that share a block of extended attributes
	meta      []blockmap.Run    // stream 0
	data      []blockmap.Run    // the others, sorted by stream and block as well as by device

	fullBlockCsum, fullInodeCsum uint32 // of bitmaps without a zero
}

// node is where an inode is put. Blocks are counted from the start of the body.
type node struct {
	*Inode
	links      uint32
	parent     uint32 // index of the directory that it was found in first
	block      uint32 // directories and long symlinks: the content
	blocks     uint32
	tree       uint32 // extent tree without its root
	treeBlocks uint32
	xattr      uint32 // extended attributes; maybe another inode's, which is before this one
}

// geometry is where things are, in blocks of the device.
type geometry struct {
	blocks         uint32
	groups         uint32
	inodesPerGroup uint32
	logFlex        uint8 // log2 of groups in a flex group: all of them

	// In this order, each up to the next.
	blockBitmaps uint32 // descriptors are before, from block 1
	inodeBitmaps uint32
	inodeTables  uint32
	journal      uint32
	journalTree  uint32
	body         uint32
	data         uint32
	end          uint32

	journalBlocks uint32
}

// tableBlocks is the size of one group's inode table.
func (g *geometry) tableBlocks() uint32 { return g.inodesPerGroup / inodesPerBlock }

// inodeNumber is the number of the inode of nodes[index].
func inodeNumber(index uint32) uint32 {
	if index == 0 {
		return rootInode
	}
	return firstInode - 1 + index
}

// usedInodes is the number of inodes in use, reserved ones included. It is the
// highest number, too.
func (fs *Filesystem) usedInodes() uint32 { return firstInode - 1 + uint32(len(fs.nodes)) - 1 }

// Layout lays out the tree below root. It reorders Entries. Two calls at the same
// time must not share inodes. The error names the path that cannot be laid out, and
// the cause.
func Layout(root *Inode, o Options) (*Filesystem, error) {
	switch {
	case root == nil || !root.is(modeDir):
		return nil, fmt.Errorf("ext4: the root is not a directory")
	case o.UUID == [16]byte{}:
		return nil, fmt.Errorf("ext4: a filesystem needs a UUID")
	case len(o.Label) > 16:
		return nil, fmt.Errorf("ext4: the label %q has more than 16 bytes", o.Label)
	case o.Size < 0:
		return nil, fmt.Errorf("ext4: a size of %d bytes", o.Size)
	}
	fs := &Filesystem{
		opts:      o,
		seed:      crc32c(^uint32(0), o.UUID[:]),
		hasher:    newNameHasher(o.HashSeed, false),
		xattrRefs: make(map[uint32]uint32),
	}
	if err := fs.number(root); err != nil {
		return nil, err
	}
	dataBlocks, err := fs.placeData()
	if err != nil {
		return nil, err
	}
	bodyBlocks, err := fs.placeBody()
	if err != nil {
		return nil, err
	}
	if err := fs.geo.fit(o.Size, fs.usedInodes(), bodyBlocks, dataBlocks); err != nil {
		return nil, err
	}
	for i := range fs.data {
		fs.data[i].Device += fs.geo.data
	}
	fs.countDirs()
	var full [blockSize]byte
	setBits(full[:], 0, 8*blockSize)
	fs.fullBlockCsum = crc32c(fs.seed, full[:])
	fs.fullInodeCsum = crc32c(fs.seed, full[:fs.geo.inodesPerGroup/8])
	fs.mapMeta()
	return fs, nil
}

// Blocks is the size of the device in blocks.
func (fs *Filesystem) Blocks() uint32 { return fs.geo.blocks }

// Runs is the map of the device, sorted, of stream 0 and of those that the tree
// names. Blocks in no run read as zeros.
func (fs *Filesystem) Runs() []blockmap.Run {
	return slices.Concat(fs.meta, fs.data)
}

// number gives every inode of the tree its number and counts links. A
// directory's children have consecutive numbers, so that to list it and to look
// at each takes few blocks of the inode table; then come those of its first
// subdirectory, and so on down.
func (fs *Filesystem) number(root *Inode) error {
	fs.add(root, 0)
	if err := root.validate(); err != nil {
		return fs.fault(0, err)
	}
	todo := []uint32{0}
	for len(todo) > 0 {
		parent := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		dir := fs.nodes[parent].Inode
		if err := sortEntries(dir.Entries); err != nil {
			return fs.fault(parent, err)
		}
		first := len(todo)
		for _, e := range dir.Entries {
			in := e.Inode
			if in == nil {
				return fs.fault(parent, fmt.Errorf("has an entry %q without an inode", e.Name))
			}
			if fs.has(in) {
				if in.is(modeDir) {
					return fs.fault(parent, fmt.Errorf("has an entry %q, which is the directory %q: a directory can have only one name", e.Name, fs.path(in)))
				}
				n := &fs.nodes[in.index]
				if n.links++; n.links > maxLinks {
					return fs.fault(in.index, fmt.Errorf("has more than %d hard links", maxLinks))
				}
				continue
			}
			if len(fs.nodes) >= maxInodes {
				return fs.fault(parent, fmt.Errorf("has an entry %q: the filesystem has no inode left for it", e.Name))
			}
			fs.add(in, parent)
			if err := in.validate(); err != nil {
				return fs.fault(in.index, err)
			}
			if in.is(modeDir) {
				fs.nodes[parent].links++
				todo = append(todo, in.index)
			}
		}
		slices.Reverse(todo[first:])
	}
	return nil
}

const maxInodes = 1<<32 - 1 - firstInode

// has reports whether in got its number in this layout: it may have the number of
// another one.
func (fs *Filesystem) has(in *Inode) bool {
	return int(in.index) < len(fs.nodes) && fs.nodes[in.index].Inode == in
}

func (fs *Filesystem) add(in *Inode, parent uint32) {
	in.index = uint32(len(fs.nodes))
	n := node{Inode: in, parent: parent, links: 1}
	if in.is(modeDir) {
		n.links = 2 // its name and its "."
	}
	fs.nodes = append(fs.nodes, n)
}

func (n *node) linkCount() uint16 {
	if n.links > maxLinks {
		return 1 // only a directory; dir_nlink
	}
	return uint16(n.links)
}

// validate checks an inode by itself.
func (in *Inode) validate() error {
	t := in.Mode & modeType
	switch {
	case in.Mode > modeMax || fileTypes[t>>12] == 0:
		return fmt.Errorf("has mode %#o, which is no type of file", in.Mode)
	case t != modeRegular && (in.Size != 0 || len(in.Data) > 0):
		return fmt.Errorf("has a size or data, but is not a regular file")
	case t != modeDir && len(in.Entries) > 0:
		return fmt.Errorf("has entries, but is not a directory")
	case t != modeSymlink && in.Target != "":
		return fmt.Errorf("has a target, but is not a symlink")
	case t == modeSymlink && in.Target == "":
		return fmt.Errorf("is a symlink without a target")
	case t == modeSymlink && len(in.Target) > maxSymlink:
		return fmt.Errorf("is a symlink with a target of %d bytes: the limit is %d", len(in.Target), maxSymlink)
	case t == modeSymlink && strings.IndexByte(in.Target, 0) >= 0:
		return fmt.Errorf("is a symlink with a NUL in its target %q", in.Target)
	case t != modeChar && t != modeBlock && (in.Major != 0 || in.Minor != 0):
		return fmt.Errorf("has a device number, but is not a device")
	case in.Major > maxMajor || in.Minor > maxMinor:
		return fmt.Errorf("is device %d:%d: the highest is %d:%d", in.Major, in.Minor, maxMajor, maxMinor)
	case in.Size < 0 || in.Size > maxFileSize:
		return fmt.Errorf("has a size of %d bytes: the limit is %d", in.Size, int64(maxFileSize))
	}
	var next uint64 // file block behind the last run
	for _, r := range in.Data {
		switch {
		case r.Count == 0:
			return fmt.Errorf("has a run of no blocks at file block %d", r.FileBlock)
		case r.Stream == 0:
			return fmt.Errorf("has a run of stream 0 at file block %d, which is that of the filesystem's metadata", r.FileBlock)
		case uint64(r.FileBlock) < next:
			return fmt.Errorf("has a run at file block %d that overlaps an earlier run or is out of order", r.FileBlock)
		case uint64(r.Block)+uint64(r.Count) > 1<<32:
			return fmt.Errorf("has a run of %d blocks at block %d of stream %d, beyond the length that a stream can have", r.Count, r.Block, r.Stream)
		}
		next = uint64(r.FileBlock) + uint64(r.Count)
	}
	if next > uint64(blocksOf(in.Size)) {
		return fmt.Errorf("has a run up to file block %d, but a size of %d bytes", next, in.Size)
	}
	return nil
}

// placeData puts the blocks of all streams in their order and fills fs.data,
// with device blocks counted from the start of the data. It returns their
// number.
func (fs *Filesystem) placeData() (uint64, error) {
	type piece struct {
		at    uint64 // stream << 32 | block
		count uint32
		node  uint32
	}
	n := 0
	for i := range fs.nodes {
		n += len(fs.nodes[i].Data)
	}
	l := make([]piece, 0, n)
	for i := range fs.nodes {
		for _, r := range fs.nodes[i].Data {
			l = append(l, piece{uint64(r.Stream)<<32 | uint64(r.Block), r.Count, uint32(i)})
		}
	}
	slices.SortFunc(l, func(a, b piece) int { return cmp.Compare(a.at, b.at) })

	var total, end uint64
	for i, p := range l {
		stream, block := uint32(p.at>>32), uint32(p.at)
		if i > 0 && p.at < end {
			return 0, fmt.Errorf("ext4: %q and %q both have block %d of stream %d, which belongs to one file",
				fs.path(fs.nodes[l[i-1].node].Inode), fs.path(fs.nodes[p.node].Inode), block, stream)
		}
		if total += uint64(p.count); total > maxBlocks {
			return 0, errTooLarge(total)
		}
		if m := len(fs.data); m > 0 && p.at == end && fs.data[m-1].Stream == stream {
			fs.data[m-1].Count += p.count
		} else {
			fs.data = append(fs.data, blockmap.Run{
				Device: uint32(total - uint64(p.count)), Stream: stream, Block: block, Count: p.count,
			})
		}
		end = p.at + uint64(p.count)
	}
	return total, nil
}

// device is where a block of a stream is on the device.
func (fs *Filesystem) device(stream, block uint32) uint32 {
	i, ok := slices.BinarySearchFunc(fs.data, blockmap.Run{Stream: stream, Block: block}, func(a, b blockmap.Run) int {
		return cmp.Or(cmp.Compare(a.Stream, b.Stream), cmp.Compare(a.Block, b.Block))
	})
	if !ok {
		i--
	}
	return fs.data[i].Device + block - fs.data[i].Block
}

// extents appends to l where the content of a node is.
func (fs *Filesystem) extents(n *node, l []extent) []extent {
	for _, r := range n.Data {
		l = appendExtent(l, extent{r.FileBlock, fs.device(r.Stream, r.Block), r.Count})
	}
	if n.blocks > 0 {
		l = appendExtent(l, extent{0, fs.geo.body + n.block, n.blocks})
	}
	return l
}

// placeBody gives directories, long symlinks, extent trees and blocks of
// extended attributes their places, in the order of inodes, and returns how many
// blocks they take.
func (fs *Filesystem) placeBody() (uint64, error) {
	type shared struct{ block, refs uint32 }
	blocks := make(map[[sha256.Size]byte]shared) // attributes, by content
	var buf [blockSize]byte
	var ext []extent
	var next uint64
	take := func(n uint32) uint32 {
		at := uint32(next)
		next += uint64(n)
		return at
	}
	for i := range fs.nodes {
		n := &fs.nodes[i]
		if n.is(modeDir) {
			var err error
			if n.blocks, err = fs.dirBlocks(n.Inode); err != nil {
				return 0, fs.fault(uint32(i), err)
			}
		} else if len(n.Target) > maxFastLink {
			n.blocks = 1
		}
		n.block = take(n.blocks)
		// Where body and data begin is not known yet, but how many extents
		// there are does not depend on it.
		ext = fs.extents(n, ext[:0])
		n.treeBlocks = treeBlocks(len(ext))
		n.tree = take(n.treeBlocks)

		_, block, err := splitXattrs(n.Inode)
		if err != nil {
			return 0, fs.fault(uint32(i), err)
		}
		if len(block) > 0 {
			xattrBlock(buf[:], block)
			sum := sha256.Sum256(buf[:])
			s, ok := blocks[sum]
			if !ok || s.refs == maxXattrRefs {
				s = shared{block: take(1)}
			}
			s.refs++
			blocks[sum] = s
			n.xattr = s.block
			fs.xattrRefs[s.block] = s.refs
		}
		if next > maxBlocks {
			return 0, errTooLarge(next)
		}
	}
	return next, nil
}

// fit decides the size of the device and where its parts begin.
func (g *geometry) fit(size int64, used uint32, body, data uint64) error {
	blocks := uint64(max(blocksOf(size), 1))
	for {
		inodes := max(uint64(used)+uint64(used)/4+256, blocks/4)
		blocks = max(blocks, (inodes-1)/(8*blockSize)*blocksPerGroup+1)
		if blocks > maxBlocks {
			return errTooLarge(blocks)
		}
		groups := (blocks + blocksPerGroup - 1) / blocksPerGroup
		perGroup := (inodes + groups - 1) / groups
		perGroup = (perGroup + inodesPerBlock - 1) / inodesPerBlock * inodesPerBlock

		g.blocks, g.groups, g.inodesPerGroup = uint32(blocks), uint32(groups), uint32(perGroup)
		g.journalBlocks = journalSize(g.blocks)
		next := 1 + (groups+descsPerBlock-1)/descsPerBlock
		for _, part := range []struct {
			start *uint32
			size  uint64
		}{
			{&g.blockBitmaps, groups},
			{&g.inodeBitmaps, groups},
			{&g.inodeTables, groups * uint64(g.tableBlocks())},
			{&g.journal, uint64(g.journalBlocks)},
			{&g.journalTree, uint64(treeBlocks(len(g.journalExtents())))},
			{&g.body, body},
			{&g.data, data},
			{&g.end, 0},
		} {
			*part.start = uint32(next)
			next += part.size
		}
		if next <= blocks {
			break
		}
		blocks = next
	}
	g.logFlex = uint8(max(4, bits.Len32(g.groups-1)))
	return nil
}

func errTooLarge(blocks uint64) error {
	return fmt.Errorf("ext4: the content needs %d blocks of 4 KiB: a device has at most %d", blocks, uint64(maxBlocks))
}

func (fs *Filesystem) countDirs() {
	perGroup := fs.geo.inodesPerGroup
	fs.dirs = make([]uint32, (fs.usedInodes()+perGroup-1)/perGroup)
	for i := range fs.nodes {
		if fs.nodes[i].is(modeDir) {
			fs.dirs[(inodeNumber(uint32(i))-1)/perGroup]++
		}
	}
}

// fault says which inode an error is about.
func (fs *Filesystem) fault(index uint32, err error) error {
	return fmt.Errorf("ext4: %q %w", fs.path(fs.nodes[index].Inode), err)
}

// path is the first name of an inode that has its number, for an error.
func (fs *Filesystem) path(in *Inode) string {
	var names []string
	for in.index != 0 {
		parent := fs.nodes[in.index].parent
		name := "?"
		for _, e := range fs.nodes[parent].Entries {
			if e.Inode == in {
				name = e.Name
				break
			}
		}
		names = append(names, name)
		in = fs.nodes[parent].Inode
	}
	slices.Reverse(names)
	path := "/" + strings.Join(names, "/")
	if n := len(path) - maxErrorPath; n > 0 {
		path = "..." + path[n:]
	}
	return path
}

const maxErrorPath = 4096 // of a path, an error has the end
