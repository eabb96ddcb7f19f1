package ext4

import (
	"cmp"
	"fmt"
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
	Time     Time     // when the filesystem was made; e2fsck complains about times in the future
	Plan     *Plan    // places for inodes and contents; nil: there is none

	dxFan int // for tests: children of a hash tree node, so that deep trees need few entries
}

// Filesystem is a filesystem that has been laid out. It refers to its tree, which must
// not change while the Filesystem is in use. Its methods are safe for concurrent use.
type Filesystem struct {
	opts     Options
	geo      geometry
	hasher   nameHasher
	largeDir bool

	nodes     []node            // in the order in which Layout found them; the root is first
	byNumber  []uint32          // positions in nodes, sorted by inode number
	body      []bodyPart        // sorted by place
	xattrRefs map[uint32]uint32 // number of inodes that share each block of extended attributes
	used      []blockRange      // blocks of the content in use, sorted
	groups    []group
	meta      []blockmap.Run // runs of stream 0
	data      []blockmap.Run // runs of the other streams, sorted by stream and block; devices counted from the content
}

// node is the placement of an inode. Its block numbers count from the start of the
// content.
type node struct {
	*Inode
	number     uint32
	links      uint32
	parent     uint32 // index of the directory in which Layout found it first
	block      uint32 // of directories and long symlinks: first block of the content
	blocks     uint32
	tree       uint32 // first block of the extent tree without its root
	treeBlocks uint32
	xattr      uint32 // block of extended attributes; may belong to an earlier inode
}

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
		hasher:    newNameHasher(o.HashSeed, false),
		xattrRefs: make(map[uint32]uint32),
	}
	if err := fs.collect(root); err != nil {
		return nil, err
	}
	if err := fs.assignNumbers(); err != nil {
		return nil, err
	}
	blocks, err := fs.placeContent()
	if err != nil {
		return nil, err
	}
	highest := fs.nodes[fs.byNumber[len(fs.byNumber)-1]].number
	if err := fs.geo.fit(o.Size, max(highest, firstInode-1), blocks); err != nil {
		return nil, err
	}
	fs.countGroups()
	fs.mapMeta()
	return fs, nil
}

// Blocks returns the size of the device in blocks.
func (fs *Filesystem) Blocks() uint32 { return fs.geo.blocks }

// Runs returns the map of the device: the sorted runs of stream 0 and of the streams
// that the tree names. Blocks outside of all runs read as zeros.
func (fs *Filesystem) Runs() []blockmap.Run {
	l := slices.Clone(fs.meta)
	for _, r := range fs.data {
		r.Device += fs.geo.content
		l = append(l, r)
	}
	slices.SortFunc(l, func(a, b blockmap.Run) int { return cmp.Compare(a.Device, b.Device) })
	return l
}

// collect fills fs.nodes and counts links. The children of a directory follow one
// another, so that a program that lists the directory and looks at each child reads few
// blocks of the inode table. The children of the first subdirectory follow, and so on
// down.
func (fs *Filesystem) collect(root *Inode) error {
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

// has reports whether in has been collected. If not, in.index may be that of another
// inode.
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
