package blockmap

import (
	"bytes"
	"compress/gzip"
	"errors"
	"flag"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
)

// A bitmap gives the same answers as a slice of bools.
func TestBitmap(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, n := range []uint32{1, 63, 64, 65, 200, 1000} {
		m, model := newBitmap(n), make([]bool, n)
		for range 500 {
			b := rng.Uint32N(n)
			k := 1 + rng.Uint32N(n-b)
			part := model[b : b+k]
			set := 0
			for _, x := range part {
				if x {
					set++
				}
			}
			if m.has(b, k) != (set == int(k)) || m.any(b, k) != (set > 0) {
				t.Fatalf("bits %d+%d of %d: has %v, any %v, and %d are set", b, k, n, m.has(b, k), m.any(b, k), set)
			}
			end := slices.Index(part, !part[0])
			if end < 0 {
				end = len(part)
			}
			if length, is := m.run(b, k); int(length) != end || is != part[0] {
				t.Fatalf("the run from %d of %d is %d times %v, not %d times %v", b, n, length, is, end, part[0])
			}
			value := rng.IntN(2) == 0
			if value {
				if added := m.set(b, k); int(added) != int(k)-set {
					t.Fatalf("set %d+%d: %d were added, not %d", b, k, added, int(k)-set)
				}
			} else if gone := m.clear(b, k); int(gone) != set {
				t.Fatalf("clear %d+%d: %d are gone, not %d", b, k, gone, set)
			}
			all := 0
			for i := range part {
				part[i] = value
			}
			for _, x := range model {
				if x {
					all++
				}
			}
			if m.count() != int64(all) {
				t.Fatalf("%d bits are counted, %d are set", m.count(), all)
			}
		}
	}
}

// someMap writes the map of a stream of 70,000 blocks: some are durable, some are only
// live.
func someMap(t testing.TB) (path string, id Digest, data FileID) {
	t.Helper()
	path, id = filepath.Join(t.TempDir(), "map"), Digest{1, 2, 3}
	data = FileID{Inode: 11, Born: 12, Device: 13, Superblock: 14}
	r := newResidency(id, 70_000)
	r.set(3, 200)
	if err := r.file.attach(OS, path, BootID{7}, data); err != nil {
		t.Fatal(err)
	}
	if err := r.sync(func() error { return nil }, nil); err != nil {
		t.Fatal(err)
	}
	r.set(69_000, 1000)
	r.clear(100, 10)
	if err := r.file.detach(); err != nil {
		t.Fatal(err)
	}
	return path, id, data
}

// updating says whether the frozen bytes are to be written anew.
func updating() bool {
	f := flag.Lookup("update")
	return f != nil && f.Value.String() == "true"
}

// frozenGzip returns the content of a compressed file in testdata, which b should be.
func frozenGzip(t *testing.T, name string, b []byte) []byte {
	t.Helper()
	if updating() {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		_, err := w.Write(b)
		if err = errors.Join(err, w.Close(), os.WriteFile(name, z.Bytes(), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	want, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return want
}

// The program reads maps of earlier versions, and writes the same bytes.
func TestFrozenMap(t *testing.T) {
	path, id, data := someMap(t)
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := frozenGzip(t, "testdata/map.gz", got)
	if !bytes.Equal(got, want) {
		t.Fatal("the map that is written is not the frozen one")
	}
	if err := os.WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		boot BootID
		data FileID
		live bool
	}{
		{"the same boot", BootID{7}, data, true},
		{"another boot", BootID{8}, data, false},
		{"boot not known", BootID{}, data, false},
		{"mounted anew", BootID{7}, FileID{11, 12, 13, 15}, false},
		{"superblock not known", BootID{7}, FileID{11, 12, 13, 0}, false},
	} {
		r := newResidency(id, 70_000)
		if err := r.file.load(OS, path, c.boot, c.data); err != nil {
			t.Fatal(err)
		}
		durable := r.has(3, 97) && !r.any(100, 10) && r.has(110, 93) && !r.any(203, 60_000)
		if !durable || r.has(69_000, 1000) != c.live || !c.live && r.any(69_000, 1000) {
			t.Errorf("%s: durable bits are right: %v; live ones are believed: %v", c.name, durable, r.has(69_000, 1000))
		}
	}
	for what, err := range map[string]error{
		"another stream's": newResidency(Digest{9}, 70_000).file.load(OS, path, BootID{7}, data),
		"another length":   newResidency(id, 70_001).file.load(OS, path, BootID{7}, data),
		"another file's":   newResidency(id, 70_000).file.load(OS, path, BootID{7}, FileID{99, 12, 13, 14}),
	} {
		if err == nil {
			t.Errorf("%s map was believed", what)
		}
	}
}

func FuzzMap(f *testing.F) {
	path, _, _ := someMap(f)
	b, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:mapHeader])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= mapHeader { // with a right checksum the fuzzer reaches the code behind the check
			var h mapHead
			copy(h.id[:], b[16:])
			h.blocks = uint32(b[48]) | uint32(b[49])<<8 | uint32(b[50])<<16
			b = append(residencyMap.head(&h), b[mapHeadLen:]...)
		}
		h, copies, err := residencyMap.decode(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		for _, m := range copies {
			if m := bitmap(m); m.count() > int64(h.blocks) {
				t.Fatalf("%d of %d blocks are resident", m.count(), h.blocks)
			}
		}
	})
}

// A sync that runs while blocks are set makes all of them durable or none.
func TestSyncTakesAllOrNone(t *testing.T) {
	const words, each = 400, 64
	for range 30 {
		r := newResidency(Digest{1}, words*64)
		var wg sync.WaitGroup
		wg.Go(func() {
			for b := uint32(32); b+each <= words*64; b += each { // each across two words
				r.set(b, each)
			}
		})
		for range 50 {
			if err := r.sync(func() error { return nil }, nil); err != nil {
				t.Fatal(err)
			}
			for b := uint32(32); b+each <= words*64; b += each {
				if d := r.file.durable; d.any(b, each) != d.has(b, each) {
					t.Fatalf("a part of blocks %d+%d is durable", b, each)
				}
			}
		}
		wg.Wait()
	}
}

// The order of held chunks lists each chunk once, and their bytes stay within the
// limit.
func TestHeldIsBounded(t *testing.T) {
	h := held{limit: 10 * BlockSize}
	// Chunks 0 to 6 have a block, and so has chunk 7; the last two have nine.
	s := &Stream{table: &Table{Chunks: make([]Chunk, 10)}, res: newResidency(Digest{1}, 26)}
	for i := range s.table.Chunks {
		s.table.Chunks[i].Block, s.table.Chunks[i].Count = uint32(i), 1
	}
	s.table.Chunks[8].Count, s.table.Chunks[9].Block, s.table.Chunks[9].Count = 9, 17, 9
	stays := chunkRef{s, 7}
	h.put(stays, 0, make([]byte, BlockSize))
	for i := range 1000 {
		x := chunkRef{s, i % 7}
		h.put(x, 0, make([]byte, BlockSize))
		if i%3 == 0 {
			s.res.file.live.set(uint32(x.chunk), 1)
			h.dropStored(x)
			s.res.file.live.clear(uint32(x.chunk), 1)
			if h.has(x, 1) {
				t.Fatalf("chunk %d is on disk, and still held", x.chunk)
			}
		} else if h.dropStored(x); !h.has(x, 1) {
			t.Fatalf("chunk %d is not on disk, and was dropped", x.chunk)
		}
		if len(h.mu.order) != len(h.mu.chunks) || h.size() > h.limit || h.n.Load() != int64(len(h.mu.chunks)) {
			t.Fatalf("%d entries in order, %d chunks counted, for %d chunks of %d bytes", len(h.mu.order), h.n.Load(), len(h.mu.chunks), h.size())
		}
	}
	if !h.has(stays, 1) {
		t.Error("a chunk was dropped although there was room")
	}
	big := make([]byte, 9*BlockSize)
	h.put(chunkRef{s, 8}, 0, big)
	h.put(chunkRef{s, 9}, 0, big)
	if h.has(chunkRef{s, 8}, 1) || h.has(stays, 1) || !h.has(chunkRef{s, 9}, 1) {
		t.Error("the oldest chunks were not dropped first")
	}
	h.dropAll(s)
	if h.any() || h.size() != 0 || len(h.mu.order) != 0 {
		t.Errorf("%d bytes of a removed stream are held", h.size())
	}
}

// Leaves of a chunk can come one by one. What is shown of the chunk meanwhile stays.
func TestHeldLeaves(t *testing.T) {
	h := held{limit: 1 << 20}
	s := &Stream{table: &Table{Chunks: []Chunk{{Count: 2*LeafBlocks + 1}}}, res: newResidency(Digest{1}, 2*LeafBlocks+1)}
	x := chunkRef{s, 0}
	h.put(x, 1, bytes.Repeat([]byte{1}, LeafSize))
	shown := h.get(x, LeafRange(1, 1))
	if h.has(x, LeafRange(0, 2)) || h.get(x, LeafRange(2, 1)) != nil || h.leaves(x) != LeafRange(1, 1) {
		t.Errorf("leaves %b are held", h.leaves(x))
	}
	h.put(x, 0, bytes.Repeat([]byte{2}, 2*LeafSize+BlockSize))
	all := h.get(x, LeafRange(0, 3))
	if all == nil || &all[0] != &shown[0] || all[0] != 2 || all[LeafSize] != 1 || all[2*LeafSize] != 2 || h.size() != int64(len(all)) {
		t.Error("the leaves are not those that came first")
	}
}

// A pinned chunk cannot be evicted, and a chunk that is being evicted cannot be
// pinned.
func TestPins(t *testing.T) {
	p := make(pins, 2)
	if !p.pin(1) || !p.any() || p.beginEvict(1) {
		t.Error("a pinned chunk can be evicted")
	}
	p.unpin(1)
	if p.any() || !p.beginEvict(1) || !p.any() {
		t.Error("a chunk that is not pinned cannot be evicted")
	}
	if p.pin(1) || !p.pin(0) {
		t.Error("a chunk that is being evicted can be pinned, or another cannot")
	}
	p.unpin(0)
	p.endEvict(1)
	if p.any() || !p.pin(1) {
		t.Error("a chunk cannot be pinned after an eviction")
	}
}
