package ext4

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"slices"

	"thaw/blockmap"
)

// bodyPart is a run of metadata blocks that belong to a node.
type bodyPart struct {
	block, count uint32 // from the start of the content
	node         uint32
	kind         bodyKind
}

type bodyKind uint8

const (
	bodyContent bodyKind = iota // of a directory or a long symlink
	bodyTree                    // of extents
	bodyXattr
)

type blockRange struct{ start, count uint32 }

// assignNumbers gives every node its inode number: that of the plan, or one behind those
// of all layers, in the order of the nodes.
func (fs *Filesystem) assignNumbers() error {
	plan := fs.plan()
	first := plan.numbers()
	next := first[len(plan.layers)]
	fs.byNumber = make([]uint32, len(fs.nodes))
	for i := range fs.nodes {
		n := &fs.nodes[i]
		fs.byNumber[i] = uint32(i)
		number := next
		switch p := n.place; {
		case i == 0:
			number = rootInode
		case p.layer == 0 || fs.opts.Plan == nil:
			next++
		case int(p.layer) > len(plan.layers) || p.number >= plan.layers[p.layer-1].inodes:
			return fs.fault(uint32(i), fmt.Errorf("has a place in another plan"))
		default:
			number = first[p.layer-1] + uint64(p.number)
		}
		if number > firstInode-1+maxInodes {
			return fmt.Errorf("ext4: the filesystem has no inode left for %q", fs.path(n.Inode))
		}
		n.number = uint32(number)
	}
	slices.SortFunc(fs.byNumber, func(a, b uint32) int { return cmp.Compare(fs.nodes[a].number, fs.nodes[b].number) })
	for i := 1; i < len(fs.byNumber); i++ {
		if a, b := &fs.nodes[fs.byNumber[i-1]], &fs.nodes[fs.byNumber[i]]; a.number == b.number {
			return fmt.Errorf("ext4: %q and %q have the same place in the plan", fs.path(a.Inode), fs.path(b.Inode))
		}
	}
	return nil
}

func (fs *Filesystem) plan() *Plan {
	if fs.opts.Plan == nil {
		return new(Plan)
	}
	return fs.opts.Plan
}

// placeContent places the contents of files and everything that belongs to one inode.
// Block numbers count from the start of the content. Behind the areas of the plan come
// the contents that are not in the plan, and then the rest of the metadata. placeContent
// returns how many blocks there are in all.
func (fs *Filesystem) placeContent() (uint64, error) {
	plan := fs.plan()
	bodies, datas, end := plan.areas()
	if end > maxBlocks {
		return 0, errTooLarge(end)
	}
	streams := make(map[uint32]planStream)
	for i, l := range plan.layers {
		if l.blocks > 0 {
			streams[l.stream] = planStream{datas[i], l.blocks}
		}
	}
	end, err := fs.placeData(streams, end)
	if err != nil {
		return 0, err
	}
	return fs.placeBody(bodies, end)
}

// planStream is the place of a stream's blocks.
type planStream struct {
	start uint64
	count uint32
}

// placeData places the contents of files and fills fs.data. A stream of the plan lies at
// its place, with gaps for blocks that belong to no file. The other streams follow from
// next on, without gaps, in their order. placeData returns where they end.
func (fs *Filesystem) placeData(streams map[uint32]planStream, next uint64) (uint64, error) {
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

	var end uint64
	for i, p := range l {
		stream, block := uint32(p.at>>32), uint32(p.at)
		if i > 0 && p.at < end {
			return 0, fmt.Errorf("ext4: %q and %q both have block %d of stream %d, which belongs to one file",
				fs.path(fs.nodes[l[i-1].node].Inode), fs.path(fs.nodes[p.node].Inode), block, stream)
		}
		device := next
		if s, ok := streams[stream]; ok {
			if uint64(block)+uint64(p.count) > uint64(s.count) {
				return 0, fs.fault(p.node, fmt.Errorf("has blocks %d+%d of stream %d, which has %d in the plan", block, p.count, stream, s.count))
			}
			device = s.start + uint64(block)
		} else if next += uint64(p.count); next > maxBlocks {
			return 0, errTooLarge(next)
		}
		if m := len(fs.data); m > 0 && p.at == end && fs.data[m-1].Stream == stream {
			fs.data[m-1].Count += p.count
		} else {
			fs.data = append(fs.data, blockmap.Run{Device: uint32(device), Stream: stream, Block: block, Count: p.count})
		}
		end = p.at + uint64(p.count)
	}
	return next, nil
}

// device returns the place of a stream's block, from the start of the content.
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
		l = appendExtent(l, extent{r.FileBlock, fs.geo.content + fs.device(r.Stream, r.Block), r.Count})
	}
	if n.blocks > 0 {
		l = appendExtent(l, extent{0, fs.geo.content + n.block, n.blocks})
	}
	return l
}

// placeBody places directories, long symlinks, extent trees and blocks of extended
// attributes, and fills fs.body. Each lies at its place in the plan, in the bodies of the
// layers; those without a place follow from next on, in the order of the nodes. placeBody
// returns where they end.
func (fs *Filesystem) placeBody(bodies []uint64, next uint64) (uint64, error) {
	unplanned := make(map[[sha256.Size]byte]sharedXattr)
	var ext []extent
	take := func(p bodyPlace, count uint32) uint32 {
		if p.layer > 0 && int(p.layer) <= len(bodies) && count <= p.count {
			return uint32(bodies[p.layer-1]) + p.block
		}
		at := uint32(next)
		next += uint64(count)
		return at
	}
	for i := range fs.nodes {
		n := &fs.nodes[i]
		add := func(block, count uint32, kind bodyKind) {
			if count > 0 {
				fs.body = append(fs.body, bodyPart{block, count, uint32(i), kind})
			}
		}
		if n.is(modeDir) {
			var err error
			if n.blocks, err = fs.dirBlocks(n.Inode); err != nil {
				return 0, fs.fault(uint32(i), err)
			}
		} else if len(n.Target) > maxFastLink {
			n.blocks = 1
		}
		if n.blocks > 0 { // then its content is one extent, and has no tree
			n.block = take(n.place.body, n.blocks)
			add(n.block, n.blocks, bodyContent)
		}
		// The number of extents does not depend on the start of the content.
		ext = fs.extents(n, ext[:0])
		if n.treeBlocks = treeBlocks(len(ext)); n.treeBlocks > 0 {
			n.tree = take(n.place.body, n.treeBlocks)
			add(n.tree, n.treeBlocks, bodyTree)
		}

		_, block, err := splitXattrs(n.Inode)
		if err != nil {
			return 0, fs.fault(uint32(i), err)
		}
		if len(block) > 0 {
			if n.place.xattr.layer > 0 {
				n.xattr = take(n.place.xattr, 1)
			} else {
				sum := xattrSum(block)
				s, ok := unplanned[sum]
				if !ok || s.refs == maxXattrRefs {
					s = sharedXattr{block: take(bodyPlace{}, 1)}
				}
				s.refs++
				unplanned[sum] = s
				n.xattr = s.block
			}
			if fs.xattrRefs[n.xattr]++; fs.xattrRefs[n.xattr] == 1 {
				add(n.xattr, 1, bodyXattr)
			}
		}
		if next > maxBlocks {
			return 0, errTooLarge(next)
		}
	}
	slices.SortFunc(fs.body, func(a, b bodyPart) int { return cmp.Compare(a.block, b.block) })
	return next, nil
}

// xattrSum names the content of a block of attributes.
func xattrSum(l []diskXattr) [sha256.Size]byte {
	var b [blockSize]byte
	xattrBlock(b[:], l)
	return sha256.Sum256(b[:])
}
