package ext4

import (
	"fmt"
	"math/bits"
)

// geometry holds the places of the parts, in blocks of the device. All numbers are
// rounded so that a tree that grows a little does not move them.
type geometry struct {
	blocks         uint32
	groups         uint32
	inodesPerGroup uint32
	logFlex        uint8 // log2 of the groups in a flex group, which contains all groups

	// In this order. Each part extends to the next one.
	blockBitmaps uint32 // descriptors come before, from block 1
	inodeBitmaps uint32
	journal      uint32
	journalTree  uint32
	inodeTables  uint32
	content      uint32 // directories, file data and so on: see placeContent
	end          uint32

	journalBlocks uint32
}

// tableBlocks returns the size of one group's inode table.
func (g *geometry) tableBlocks() uint32 { return g.inodesPerGroup / inodesPerBlock }

// fit decides the size of the device and the starts of its parts. highest is the highest
// inode number in use, and content the number of blocks behind the inode tables.
func (g *geometry) fit(size int64, highest uint32, content uint64) error {
	blocks := uint64(max(blocksOf(size), 1))
	for {
		// In steps of a half: where the content begins depends on it, and inodes that are
		// not in use are not stored.
		inodes := uint64(highest) + uint64(highest)/4 + 256
		step := uint64(1) << (bits.Len64(inodes) - 2)
		inodes = max((inodes/step+1)*step, blocks/4)
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
			{&g.journal, uint64(g.journalBlocks)},
			{&g.journalTree, uint64(treeBlocks(len(g.journalExtents())))},
			{&g.inodeTables, groups * uint64(g.tableBlocks())},
			{&g.content, content},
			{&g.end, 0},
		} {
			*part.start = uint32(next)
			next += part.size
		}
		if next <= blocks {
			break
		}
		blocks = next
		if room := spare(next); room <= maxBlocks {
			blocks = room
		}
	}
	g.logFlex = uint8(max(4, bits.Len32(g.groups-1)))
	return nil
}

func errTooLarge(blocks uint64) error {
	return fmt.Errorf("ext4: the content needs %d blocks of 4 KiB: a device has at most %d", blocks, uint64(maxBlocks))
}
