package blockmap_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// leafy is a stream whose chunks have the given numbers of blocks, as a device of its own in
// a cache of its own, and the lists of the chunks' leaves.
type leafy struct {
	t      *testing.T
	dir    string
	fs     *blocktest.FS
	cache  *blockmap.Cache
	index  *blockmap.Index
	image  *blockmap.Image
	stream *blockmap.Stream
	chunks [][]byte
	lists  []*blockmap.LeafList
}

func newLeafy(t *testing.T, quota int64, blocks ...int) *leafy {
	t.Helper()
	x := &leafy{t: t, dir: t.TempDir(), fs: blocktest.NewFS()}
	for i, n := range blocks {
		_, content := chunkOf(uint64(100+i), n)
		x.chunks = append(x.chunks, content)
	}
	table, _ := blocktest.Stream(t, x.chunks)
	x.index = &blockmap.Index{Blocks: table.Blocks(), Streams: []blockmap.Table{*table}, Runs: []blockmap.Run{{Count: table.Blocks()}}}
	must(t, x.index.Seal())
	for i := range x.chunks {
		list, err := blockmap.NewLeafList(&table.Chunks[i], blockmap.LeafDigests(nil, x.chunks[i]))
		must(t, err)
		x.lists = append(x.lists, list)
	}
	x.cache = newCache(t, x.dir, quiet(blockmap.CacheOptions{FS: x.fs, Quota: quota}))
	var err error
	x.image, err = blockmap.NewImage(x.index, x.cache, nil)
	must(t, err)
	x.stream, err = x.cache.Stream(&x.index.Streams[0])
	must(t, err)
	return x
}

// part is the content of count leaves of a chunk.
func (x *leafy) part(chunk, first, count int) []byte {
	p := x.chunks[chunk]
	return p[first*blockmap.LeafSize : min(len(p), (first+count)*blockmap.LeafSize)]
}

func (x *leafy) fill(chunk, first, count int) error {
	return x.stream.FillLeaves(chunk, x.lists[chunk], first, count, x.part(chunk, first, count))
}

// missing lists the leaves of a chunk that Missing lists for all of the device.
func (x *leafy) missing(chunk int) blockmap.LeafSet {
	for _, w := range x.image.Missing(blockmap.Range(0, x.image.Size())) {
		if w.Chunk == chunk {
			return w.Leaves
		}
	}
	return 0
}

// A chunk can be resident in part: views show the part, and Missing lists the rest.
func TestLeaves(t *testing.T) {
	x := newLeafy(t, 0, 50, 40) // of four leaves and of three
	before := x.cache.Used()
	must(t, x.fill(0, 1, 2))
	if got := x.missing(0); got != 0b1001 || x.missing(1) != 0b111 {
		t.Errorf("leaves %b and %b are missing", got, x.missing(1))
	}
	if x.stream.Has(0) || x.stream.Leaves(0) != 0b0110 || !x.stream.HasLeaves(0, 0b0100) || x.stream.HasLeaves(0, 0b0101) {
		t.Errorf("leaves %b are there", x.stream.Leaves(0))
	}
	if n := x.stream.Resident(); n != 2*blockmap.LeafSize {
		t.Errorf("%d bytes are resident", n)
	}
	here := blockmap.Range(blockmap.LeafSize, 2*blockmap.LeafSize)
	got, err := blocktest.Read(t.Context(), x.image, here)
	if err != nil || !bytes.Equal(got, x.part(0, 1, 2)) {
		t.Errorf("wrong bytes, or %v", err)
	}
	if _, ok := x.image.View(blockmap.Range(here.Start-1, 2)); ok {
		t.Error("a view shows a leaf that is absent")
	}
	// A part of a leaf that is absent asks for that leaf.
	for _, c := range []struct {
		e    blockmap.Extent
		want []blockmap.LeafSet
	}{
		{blockmap.Range(100, 1), []blockmap.LeafSet{0b0001}},
		{blockmap.Range(here.Start, 1), nil},
		{blockmap.Range(here.Start-1, 2), []blockmap.LeafSet{0b0001}},
		{blockmap.Range(here.End-1, 2), []blockmap.LeafSet{0b1000}},
		{blockmap.Range(50*blockmap.BlockSize-1, 2), []blockmap.LeafSet{0b1000, 0b001}},
	} {
		var leaves []blockmap.LeafSet
		for _, w := range x.image.Missing(c.e) {
			leaves = append(leaves, w.Leaves)
			if w.Here() || w.Needs() != w.Leaves {
				t.Errorf("%v: leaves %b are missing, and are said to be here", c.e, w.Leaves)
			}
		}
		if !slices.Equal(leaves, c.want) {
			t.Errorf("%v asks for leaves %b, want %b", c.e, leaves, c.want)
		}
	}
	must(t, x.fill(0, 0, 4)) // the last one is short
	must(t, x.stream.Fill(1, x.chunks[1]))
	if x.missing(0) != 0 || x.missing(1) != 0 || !x.stream.Has(0) {
		t.Error("chunks that were filled are missing")
	}
	if n := x.stream.Resident(); n != 90*blockmap.BlockSize || x.cache.Used()-before < n {
		t.Errorf("%d bytes are resident, and %d more are counted", n, x.cache.Used()-before)
	}
}

// Leaves get in only with the list of their chunk and their own content.
func TestFillLeavesRefusesWrongContent(t *testing.T) {
	x := newLeafy(t, 0, 50, 40)
	for name, fill := range map[string]func() error{
		"another leaf":     func() error { return x.stream.FillLeaves(0, x.lists[0], 1, 1, x.part(0, 0, 1)) },
		"another list":     func() error { return x.stream.FillLeaves(0, x.lists[1], 0, 1, x.part(0, 0, 1)) },
		"a leaf cut short": func() error { return x.stream.FillLeaves(0, x.lists[0], 0, 1, x.part(0, 0, 1)[4096:]) },
		"nothing":          func() error { return x.stream.FillLeaves(0, x.lists[0], 0, 0, nil) },
		"a leaf before":    func() error { return x.stream.FillLeaves(0, x.lists[0], -1, 1, x.part(0, 0, 1)) },
		"a leaf behind":    func() error { return x.stream.FillLeaves(0, x.lists[0], 4, 1, x.part(0, 0, 1)) },
		"a wrong one among them": func() error {
			return x.stream.FillLeaves(0, x.lists[0], 0, 2, append(slices.Clone(x.part(0, 0, 1)), x.part(0, 0, 1)...))
		},
		"held: another leaf": func() error { return x.stream.HoldLeaves(0, x.lists[0], 1, 1, x.part(0, 0, 1)) },
		"held: another list": func() error { return x.stream.HoldLeaves(0, x.lists[1], 0, 1, x.part(0, 0, 1)) },
	} {
		if err := fill(); !errors.Is(err, blockmap.ErrDigest) || x.stream.Resident() != 0 || x.cache.Held() != 0 {
			t.Errorf("%s: %v, and %d bytes are stored", name, err, x.stream.Resident())
		}
	}
}

// What is resident is not written again: views may show it.
func TestFillWritesOnlyWhatIsAbsent(t *testing.T) {
	x := newLeafy(t, 0, 50)
	must(t, x.fill(0, 1, 1))
	path := dataFiles(t, x.dir)[0]
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	mark := []byte("as it was")
	_, err = f.WriteAt(mark, blockmap.LeafSize+100)
	must(t, err)
	must(t, x.fill(0, 0, 2))
	must(t, x.stream.Fill(0, x.chunks[0]))
	got, err := os.ReadFile(path)
	must(t, err)
	want := bytes.Clone(x.chunks[0])
	copy(want[blockmap.LeafSize+100:], mark)
	if !bytes.Equal(got[:len(want)], want) {
		t.Error("a leaf that was resident was written again, or another was not written")
	}
	// It is not verified either: a leaf that is here costs nothing.
	must(t, x.stream.FillLeaves(0, x.lists[0], 1, 1, make([]byte, blockmap.LeafSize)))
}

// Leaves that could not be written, or not be read, cost neither the other leaves of
// their chunk nor space that counts for nothing.
func TestTornLeaves(t *testing.T) {
	x := newLeafy(t, 2<<20, 64, 64, 64)
	must(t, x.fill(0, 0, 1))
	full := true
	x.fs.Fail(func(op, path string) error {
		if full && op == "write" && filepath.Base(path) == "data" {
			return syscall.EIO
		}
		return nil
	})
	if err := x.fill(0, 1, 3); !errors.Is(err, syscall.EIO) {
		t.Fatalf("a disk that fails: %v", err)
	}
	full = false
	if x.missing(0) != 0b1110 {
		t.Errorf("leaves %b are missing", x.missing(0))
	}
	// An eviction gives the space of what was torn back, and leaves the rest alone.
	must(t, x.stream.Fill(1, x.chunks[1]))
	x.cache.Evict(1)
	if x.missing(0) != 0b1110 || x.missing(1) == 0 && x.cache.Evicted() != 0 {
		t.Errorf("leaves %b are missing, and %d bytes were evicted", x.missing(0), x.cache.Evicted())
	}
	must(t, x.fill(0, 1, 3))
	got, err := blocktest.Read(t.Context(), x.image, blockmap.Range(0, 64*blockmap.BlockSize))
	if err != nil || !bytes.Equal(got, x.chunks[0]) {
		t.Errorf("wrong bytes, or %v", err)
	}
}

// A chunk that is resident in part is evicted, and can be filled in part again.
func TestEvictsLeaves(t *testing.T) {
	blocks := slices.Repeat([]int{64}, 40)
	x := newLeafy(t, 16<<20/8, blocks...) // for 8 of 40 chunks
	for round := range 3 {
		for i := range blocks {
			first := (i + round) % 4
			must(t, x.fill(i, first, min(2, 4-first)))
			got, err := blocktest.Read(t.Context(), x.image, blockmap.Range(int64(i*64*blockmap.BlockSize+first*blockmap.LeafSize), blockmap.LeafSize))
			if err != nil || !bytes.Equal(got, x.part(i, first, 1)) {
				t.Fatalf("leaf %d of chunk %d has wrong bytes, or %v", first, i, err)
			}
			if n := x.cache.Used(); n > 2<<20 {
				t.Fatalf("%d bytes are used of %d", n, 2<<20)
			}
		}
	}
	if x.cache.Evicted() == 0 {
		t.Error("nothing was evicted: this tests nothing")
	}
	must(t, x.cache.Sync())
	if n := spaceOf(t, x.dir); n > 2<<20 || n > x.cache.Used() {
		t.Errorf("%d bytes are on disk, %d are counted", n, x.cache.Used())
	}
}

// A leaf that cannot be read is absent, with what is resident of its chunk.
func TestDamagedLeaf(t *testing.T) {
	x := newLeafy(t, 0, 64, 64)
	must(t, x.fill(0, 1, 2))
	must(t, x.fill(1, 0, 1))
	v, ok := x.image.View(blockmap.Range(blockmap.LeafSize, 4096))
	if !ok {
		t.Fatal("a leaf that was filled is not resident")
	}
	v.Segments()[0].Damaged()
	v.Release()
	if x.missing(0) != 0b1111 || x.missing(1) != 0b1110 || x.stream.Resident() != blockmap.LeafSize {
		t.Errorf("leaves %b and %b are missing", x.missing(0), x.missing(1))
	}
	must(t, x.fill(0, 1, 1))
	if got, err := blocktest.Read(t.Context(), x.image, blockmap.Range(blockmap.LeafSize, blockmap.LeafSize)); err != nil || !bytes.Equal(got, x.part(0, 1, 1)) {
		t.Errorf("wrong bytes, or %v", err)
	}
}

// Views show leaves in memory beside leaves on disk.
func TestHeldLeavesBesideStored(t *testing.T) {
	x := newLeafy(t, 0, 50)
	must(t, x.fill(0, 0, 1))
	must(t, x.stream.HoldLeaves(0, x.lists[0], 2, 1, x.part(0, 2, 1)))
	must(t, x.stream.HoldLeaves(0, x.lists[0], 0, 2, x.part(0, 0, 2)))
	if x.missing(0) != 0b1000 {
		t.Errorf("leaves %b are missing", x.missing(0))
	}
	got, err := blocktest.Read(t.Context(), x.image, blockmap.Range(10, 3*blockmap.LeafSize-20))
	if err != nil || !bytes.Equal(got, x.part(0, 0, 3)[10:3*blockmap.LeafSize-10]) {
		t.Errorf("wrong bytes, or %v", err)
	}
	x.cache.StoreHeld()
	if n := x.cache.Held(); n != 0 || x.stream.Resident() != 3*blockmap.LeafSize {
		t.Errorf("%d bytes are held, and %d are on disk", n, x.stream.Resident())
	}
	// A chunk that is held in part and then comes whole is held no more.
	must(t, x.stream.HoldLeaves(0, x.lists[0], 3, 1, x.part(0, 3, 1)))
	must(t, x.stream.Fill(0, x.chunks[0]))
	if x.cache.Held() != 0 || !x.stream.Has(0) {
		t.Errorf("%d bytes are held", x.cache.Held())
	}
}

// Leaves are copied from a chunk of the same content that is resident in part.
func TestFillLeavesLocal(t *testing.T) {
	x := newLeafy(t, 0, 50, 20)
	must(t, x.fill(0, 1, 2))
	// The same content in another stream.
	other, _ := blocktest.Stream(t, [][]byte{x.chunks[1], x.chunks[0]})
	ix := &blockmap.Index{Blocks: other.Blocks(), Streams: []blockmap.Table{*other}, Runs: []blockmap.Run{{Count: other.Blocks()}}}
	must(t, ix.Seal())
	s, err := x.cache.Stream(&ix.Streams[0])
	must(t, err)
	if s.FillLocal(1) {
		t.Error("a chunk was copied from one that is not whole")
	}
	if got := s.FillLeavesLocal(1, x.lists[0], 0b1011); got != 0b0010 || s.Leaves(1) != 0b0010 {
		t.Errorf("leaves %b came, and %b are there", got, s.Leaves(1))
	}
	if got := s.FillLeavesLocal(1, x.lists[1], 0b0100); got != 0 {
		t.Errorf("leaves %b came with the list of another chunk", got)
	}
	image, err := blockmap.NewImage(ix, x.cache, nil)
	must(t, err)
	at := int64(20*blockmap.BlockSize + blockmap.LeafSize)
	if got, err := blocktest.Read(t.Context(), image, blockmap.Range(at, blockmap.LeafSize)); err != nil || !bytes.Equal(got, x.part(0, 1, 1)) {
		t.Errorf("wrong bytes, or %v", err)
	}
}

// The streams of a cache of format 1 are not used: their tables have other names now.
func TestCacheOfFormat1(t *testing.T) {
	x := newLeafy(t, 0, 50)
	must(t, x.stream.Fill(0, x.chunks[0]))
	must(t, x.cache.Close())
	now := filepath.Dir(dataFiles(t, x.dir)[0])
	old := filepath.Join(filepath.Dir(now), strings.Repeat("5", 64))
	must(t, os.Rename(now, old))
	c, err := blockmap.OpenCache(x.dir, quiet(blockmap.CacheOptions{}))
	must(t, err)
	defer c.Close()
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) || c.Dropped() != 1 {
		t.Errorf("the stream of another name is still there (%v), and %d were dropped", err, c.Dropped())
	}
	s, err := c.Stream(&x.index.Streams[0])
	must(t, err)
	if s.Resident() != 0 {
		t.Error("bytes of the old cache are resident")
	}
}
