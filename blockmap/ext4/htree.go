package ext4

// A directory of more than one block is a hash tree. Its leaves are ordinary directory
// blocks; each leaf holds the names of one range of hashes. A driver that does not know
// hash trees sees the index blocks above the leaves as empty directory blocks. The root
// is block 0:
const (
	dxDot        = 0x00 // 12: the entry "."
	dxDotDot     = 0x0C // 12: the entry "..", as long as the rest of the block
	dxHash       = 0x1C // 1: hash version, after 4 bytes of zeros
	dxInfoLength = 0x1D // 1: 8, the length of these fields from 0x18
	dxIndirect   = 0x1E // 1: levels of nodes between the root and the leaves
	dxRoot       = 0x20 // entries of 8 bytes

	// The other nodes are:
	dxFake = 0x00 // 8: an entry of inode 0, as long as the block
	dxNode = 0x08 // entries of 8 bytes

	// An entry is a hash and a block number: the names from that hash on are below that
	// block of the directory. The lowest bit of the hash is set if the preceding block
	// ends in names of the same hash. The first entry of a node has no hash, because
	// the entry above gives it. In its place are:
	dxLimit = 0x0 // 2: capacity in entries
	dxCount = 0x2 // 2: entries in use
	dxBlock = 0x4 // 4: the first entry's block

	// The space after the last possible entry holds:
	dxTailSize = 8 // 4: zero; 4: crc32c(inode seed, block up to the end of the entries, 8 zero bytes)

	dxEntrySize = 8
	dxRootLimit = (blockSize - dxRoot - dxTailSize) / dxEntrySize
	dxNodeLimit = (blockSize - dxNode - dxTailSize) / dxEntrySize

	dxContinued = 1
	maxIndirect = 2 // with large_dir; 1 without
)

// hashTree is the shape of a tree: the number of blocks of each level, from the root to
// the leaves. The blocks of a level are consecutive in the directory, and so are the
// levels.
type hashTree struct {
	levels []int
	fan    int // children of a full node that is not the root
}

// newHashTree makes the lowest tree with this number of leaves. A fan other than 0
// limits the children of a node to fewer than fit.
func newHashTree(leaves, fan int) hashTree {
	rootFan, nodeFan := dxRootLimit, dxNodeLimit
	if fan > 0 {
		rootFan, nodeFan = fan, fan
	}
	up := []int{leaves}
	n := leaves
	for n > rootFan {
		n = (n + nodeFan - 1) / nodeFan
		up = append(up, n)
	}
	t := hashTree{levels: []int{1}, fan: nodeFan}
	for i := len(up) - 1; i >= 0; i-- {
		t.levels = append(t.levels, up[i])
	}
	return t
}

func (t *hashTree) indirect() int { return len(t.levels) - 2 }

func (t *hashTree) blocks() int {
	sum := 0
	for _, n := range t.levels {
		sum += n
	}
	return sum
}

// leafEntries returns how many of entries fit in one leaf. entries must not be empty.
func leafEntries(entries []Dirent) int {
	size, n := 0, 0
	for n < len(entries) {
		if size += direntSize(len(entries[n].Name)); size > dirTail {
			break
		}
		n++
	}
	return n
}

// hashTree emits the blocks of a directory whose entries are sorted by hash.
func (w *dirWriter) hashTree(entries []Dirent, emit func(b []byte) error) error {
	// The key of each leaf is the hash of its first name. The continuation bit is set
	// if the preceding leaf ends in a name of the same hash.
	var keys []uint32
	for at := 0; at < len(entries); {
		hash, _ := w.fs.hasher.hash(entries[at].Name)
		key := hash
		if at > 0 {
			if before, _ := w.fs.hasher.hash(entries[at-1].Name); before == hash {
				key |= dxContinued
			}
		}
		keys = append(keys, key)
		at += leafEntries(entries[at:])
	}

	t := newHashTree(len(keys), w.fs.opts.dxFan)
	below := 1 // first block of the level below
	for level := range len(t.levels) - 1 {
		span := 1 // leaves below a full child
		for range t.indirect() - level {
			span *= t.fan
		}
		children := t.levels[level+1]
		for n := range t.levels[level] {
			first, count := 0, children
			if level > 0 {
				first = n * t.fan
				count = min(t.fan, children-first)
			}
			if err := emit(w.index(level, &t, keys, span, first, count, below)); err != nil {
				return err
			}
		}
		below += children
	}

	for len(entries) > 0 {
		n := leafEntries(entries)
		w.begin()
		at, last := 0, 0
		for i := range entries[:n] {
			at, last = w.putEntry(at, &entries[i]), at
		}
		if err := emit(w.end(last)); err != nil {
			return err
		}
		entries = entries[n:]
	}
	return nil
}

// index makes a node of level with count children. The first child is number first of
// the level below, and that level starts at block below.
func (w *dirWriter) index(level int, t *hashTree, keys []uint32, span, first, count, below int) []byte {
	w.begin()
	b := w.buf[:]
	start, limit := dxNode, dxNodeLimit
	if level == 0 {
		start, limit = dxRoot, dxRootLimit
		w.put(dxDot, ".", w.number, modeDir)
		w.put(dxDotDot, "..", w.parent, modeDir)
		le.PutUint16(b[dxDotDot+deLength:], blockSize-dxDotDot)
		b[dxHash] = hashHalfMD4
		b[dxInfoLength] = 8
		b[dxIndirect] = byte(t.indirect())
	} else {
		le.PutUint16(b[dxFake+deLength:], blockSize)
	}
	for i := range count {
		e := b[start+i*dxEntrySize:]
		if i > 0 {
			le.PutUint32(e, keys[(first+i)*span])
		}
		le.PutUint32(e[dxBlock:], uint32(below+first+i))
	}
	le.PutUint16(b[start+dxLimit:], uint16(limit))
	le.PutUint16(b[start+dxCount:], uint16(count))
	tail := start + limit*dxEntrySize
	le.PutUint32(b[tail+4:], dxChecksum(w.seed, b, start, count, limit))
	return b
}

// dxChecksum is the checksum of an index node whose entries begin at start.
func dxChecksum(seed uint32, b []byte, start, count, limit int) uint32 {
	tail := start + limit*dxEntrySize
	c := crc32c(seed, b[:start+count*dxEntrySize])
	c = crc32c(c, b[tail:tail+4])
	return crc32cHole(c, 4)
}
