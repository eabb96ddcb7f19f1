package ext4

import (
	"crypto/sha256"
	"math/bits"
	"slices"
)

// Plan gives the inodes of a tree places that do not depend on what is added to the tree
// later. It is for trees that grow layer by layer. Two trees that share their lower
// layers then share the metadata of these layers, except for the blocks that the upper
// layers change.
//
// Each layer has an area of inode numbers and an area of blocks. The layer's inodes and
// directories have fixed places in these areas, and the contents of its files lie in the
// order of the layer's stream. If an upper layer removes a file, the file's places stay
// free. If an upper layer adds names to a directory and the directory outgrows its place,
// the directory moves to the area of that layer. The areas have spare room at the end, so
// that a layer that is replaced by a similar one does not move the layers above it.
//
// A caller begins each layer by Layer, from the lowest up, and passes to Add each inode
// that the layer has added to the tree and each directory that has received names. The
// order of the calls within a layer decides the order of the inodes.
type Plan struct {
	layers []planLayer
}

// planLayer is what a layer takes of its areas.
type planLayer struct {
	inodes uint32 // numbers
	body   uint32 // blocks of directories, long symlinks, extent trees and attributes
	stream uint32 // the stream with the contents of its files
	blocks uint32 // of the stream

	xattrs map[[sha256.Size]byte]sharedXattr // blocks of attributes, by content
}

// sharedXattr is a block of extended attributes that several inodes share.
type sharedXattr struct{ block, refs uint32 }

// place is where a plan has put an inode. Layers count from 1; 0 means that the plan has
// no place for it.
type place struct {
	layer, number uint32    // of the inode
	body          bodyPlace // of its content, if that is a directory or a long symlink, or of its extent tree
	xattr         bodyPlace // of its block of extended attributes
}

// bodyPlace is a range of blocks in the area of a layer.
type bodyPlace struct{ layer, block, count uint32 }

// Layer begins the next layer. The contents of its files are the first blocks of a
// stream, which belongs to no other layer. A layer without contents has no blocks.
func (p *Plan) Layer(stream, blocks uint32) {
	if n := len(p.layers); n > 0 {
		p.layers[n-1].xattrs = nil
	}
	p.layers = append(p.layers, planLayer{stream: stream, blocks: blocks, xattrs: make(map[[sha256.Size]byte]sharedXattr)})
}

// Add plans the places of in as it is after the current layer. An inode that has places
// keeps them, unless it is a directory that has outgrown its place. entries is the sum of
// EntrySize over the names of a directory; in.Entries need not be filled.
func (p *Plan) Add(in *Inode, entries int64) {
	layer := uint32(len(p.layers))
	l := &p.layers[layer-1]
	if in.place.layer == 0 {
		in.place.layer, in.place.number = layer, l.inodes
		l.inodes++
	}
	if need := in.bodyBlocks(entries); need > in.place.body.count {
		in.place.body = bodyPlace{layer, l.body, need}
		l.body += need
	}
	if in.place.xattr.layer == 0 && len(in.Xattrs) > 0 {
		// Attributes that ext4 cannot store may be those of a file that an upper layer
		// hides. Layout refuses the others.
		if _, block, err := splitXattrs(in); err == nil && len(block) > 0 {
			sum := xattrSum(block)
			s, ok := l.xattrs[sum]
			if !ok || s.refs == maxXattrRefs {
				s = sharedXattr{block: l.body}
				l.body++
			}
			s.refs++
			l.xattrs[sum] = s
			in.place.xattr = bodyPlace{layer, s.block, 1}
		}
	}
}

// Planned reports whether a plan has places for in.
func (in *Inode) Planned() bool { return in.place.layer != 0 }

// TakePlace gives a directory the places of another one that it replaces, for example
// because an upper layer has changed its metadata.
func (in *Inode) TakePlace(of *Inode) {
	in.place = of.place
	if !slices.EqualFunc(in.Xattrs, of.Xattrs, func(a, b Xattr) bool { return a.Name == b.Name && slices.Equal(a.Value, b.Value) }) {
		in.place.xattr = bodyPlace{}
	}
}

// EntrySize returns the bytes that a name takes in a directory.
func EntrySize(name string) int64 { return int64(direntSize(len(name))) }

// bodyBlocks returns how many blocks a plan reserves for in, besides its attributes. For
// a directory it may be a few more than Layout needs: how well names fill blocks is known
// only once they are sorted by hash.
func (in *Inode) bodyBlocks(entries int64) uint32 {
	switch {
	case in.is(modeDir):
		if entries+int64(direntSize(1)+direntSize(2)) <= dirTail {
			return 1
		}
		const fullest = dirTail - (deName + maxName + 1) // every leaf but the last is fuller
		tree := newHashTree(int((entries+fullest-1)/fullest), 0)
		return uint32(tree.blocks())
	case len(in.Target) > maxFastLink:
		return 1
	case len(in.Data) <= rootExtents && in.Size <= rootExtents*maxExtent*blockSize:
		return 0
	}
	// Contents are placed in the order of their stream, so the number of extents is known.
	var l []extent
	for _, r := range in.Data {
		l = appendExtent(l, extent{r.FileBlock, r.Block, r.Count})
	}
	return treeBlocks(len(l))
}

// spare rounds n up, to leave room for about an eighth more.
func spare(n uint64) uint64 {
	step := uint64(16)
	if n >= 16*8 {
		step = 1 << (bits.Len64(n) - 4)
	}
	return (n/step + 1) * step
}

// numbers returns the first inode number of each layer, and the first behind all layers.
// A layer begins with a block of the inode table.
func (p *Plan) numbers() []uint64 {
	next := uint64(firstInode)
	l := []uint64{next}
	for i := range p.layers {
		next += spare(uint64(p.layers[i].inodes))
		next = (next-1+inodesPerBlock-1)/inodesPerBlock*inodesPerBlock + 1
		l = append(l, next)
	}
	return l
}

// areas returns where the body and the contents of each layer begin, counted from the
// start of the content, and where all areas end.
func (p *Plan) areas() (body, data []uint64, end uint64) {
	for i := range p.layers {
		body = append(body, end)
		end += spare(uint64(p.layers[i].body))
		data = append(data, end)
		end += spare(uint64(p.layers[i].blocks))
	}
	return body, data, end
}
