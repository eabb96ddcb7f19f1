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

// Options are the settings of a filesystem, besides its tree.
type Options struct {
	// Size is the size of the device in bytes, rounded up to whole blocks. If the
	// content or the number of inodes requires more, Layout makes the device as large
	// as required, and then the device may be full. The device has one inode for every
	// 16 KiB, or more if the tree has more.
	Size int64

	UUID     [16]byte // must not be zero
	HashSeed [16]byte // for directory hashes
	Label    string   // at most 16 bytes
	Time     Time     // when the filesystem and its inodes were made; e2fsck complains about times in the future

	dxFan int // for tests: children of a hash tree node, so that deep trees need few entries
}

// Filesystem is a filesystem that has been laid out. It refers to its tree, which must
// not change while the Filesystem is in use. Its methods are safe for concurrent use.
type Filesystem struct {
	opts     Options
	geo      geometry
	seed     uint32 // crc32c of the UUID
	hasher   nameHasher
	largeDir bool

	nodes     []node            // by inode number; see inodeNumber
	dirs      []uint32          // number of directories in each group that has inodes in use
	xattrRefs map[uint32]uint32 // number of inodes that share each block of extended attributes
	meta      []blockmap.Run    // runs of stream 0
	data      []blockmap.Run    // runs of the other streams, sorted by stream and block, which is also their order on the device

	fullBlockCsum, fullInodeCsum uint32 // checksums of bitmaps without a zero
}

// node is the placement of an inode. Its block numbers count from the start of the
// body.
type node struct {
	*Inode
	links      uint32
	parent     uint32 // index of the directory in which Layout found it first
	block      uint32 // of directories and long symlinks: first block of the content
	blocks     uint32
	tree       uint32 // first block of the extent tree without its root
	treeBlocks uint32
	xattr      uint32 // block of extended attributes; may belong to an earlier inode
}

// geometry holds the places of the parts, in blocks of the device.
type geometry struct {
	blocks         uint32
	groups         uint32
	inodesPerGroup uint32
	logFlex        uint8 // log2 of the groups in a flex group, which contains all groups

	// In this order. Each part extends to the next one.
	blockBitmaps uint32 // descriptors come before, from block 1
	inodeBitmaps uint32
	inodeTables  uint32
	journal      uint32
	journalTree  uint32
	body         uint32
	data         uint32
	end          uint32

	journalBlocks uint32
}

// tableBlocks returns the size of one group's inode table.
func (g *geometry) tableBlocks() uint32 { return g.inodesPerGroup / inodesPerBlock }

// inodeNumber returns the number of the inode of nodes[index].
func inodeNumber(index uint32) uint32 {
	if index == 0 {
		return rootInode
	}
	return firstInode - 1 + index
}

// usedInodes returns the number of inodes in use, reserved ones included. It is also
// the highest inode number.
func (fs *Filesystem) usedInodes() uint32 { return firstInode - 1 + uint32(len(fs.nodes)) - 1 }

// Layout lays out the tree below root. It reorders Entries. Concurrent calls must not
// share inodes. The error names the path that cannot be laid out, and the cause.
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

// Blocks returns the size of the device in blocks.
func (fs *Filesystem) Blocks() uint32 { return fs.geo.blocks }

// Runs returns the map of the device: the sorted runs of stream 0 and of the streams
// that the tree names. Blocks outside of all runs read as zeros.
func (fs *Filesystem) Runs() []blockmap.Run {
	return slices.Concat(fs.meta, fs.data)
}

// number gives every inode of the tree its number and counts links. The children of a
// directory have consecutive numbers, so that a program that lists the directory and
// looks at each child reads few blocks of the inode table. The children of the first
// subdirectory follow, and so on down.
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

// has reports whether in got its number in this layout. If not, in may have the number
// of another inode.
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
	var next uint64 // file block after the last run
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

// placeData puts the blocks of all streams in their order and fills fs.data, with
// device blocks counted from the start of the data. It returns the number of blocks.
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

// device returns the place of a stream's block on the device.
func (fs *Filesystem) device(stream, block uint32) uint32 {
	i, ok := slices.BinarySearchFunc(fs.data, blockmap.Run{Stream: stream, Block: block}, func(a, b blockmap.Run) int {
		return cmp.Or(cmp.Compare(a.Stream, b.Stream), cmp.Compare(a.Block, b.Block))
	})
	if !ok {
		i--
	}
	return fs.data[i].Device + block - fs.data[i].Block
}

// extents appends to l the extents of a node's content.
func (fs *Filesystem) extents(n *node, l []extent) []extent {
	for _, r := range n.Data {
		l = appendExtent(l, extent{r.FileBlock, fs.device(r.Stream, r.Block), r.Count})
	}
	if n.blocks > 0 {
		l = appendExtent(l, extent{0, fs.geo.body + n.block, n.blocks})
	}
	return l
}

// placeBody assigns blocks to directories, long symlinks, extent trees and blocks of
// extended attributes, in the order of inodes. It returns how many blocks they take.
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
		// The starts of body and data are not known yet, but the number of extents does
		// not depend on them.
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

// fit decides the size of the device and the starts of its parts.
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

// fault adds the path of the inode to an error about it.
func (fs *Filesystem) fault(index uint32, err error) error {
	return fmt.Errorf("ext4: %q %w", fs.path(fs.nodes[index].Inode), err)
}

// path returns the first path of an inode that has its number, for an error.
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

const maxErrorPath = 4096 // an error shows only the end of a longer path
