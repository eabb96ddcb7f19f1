package tracefile_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/tracefile"
)

// A plan has each leaf that the trace touches once, where it is touched first,
// and nothing else.
func TestPlan(t *testing.T) {
	m := blocktest.NewImage(t, 5, 2000)
	index := tracefile.IndexDigest(m.Index)
	rng := rand.New(rand.NewPCG(5, 5))
	for range 20 {
		tr := randomTrace(rng, index, m.Index.Blocks, 1+rng.IntN(200), 1)
		p, err := tracefile.NewPlan(tr, m.Index)
		if err != nil {
			t.Fatal(err)
		}
		type place struct{ stream, chunk, leaf int }
		type content struct {
			digest blockmap.Digest
			leaf   int
		}
		var want, got []place
		var steps []tracefile.Step // of each leaf
		for _, s := range p.Steps {
			for i := range s.Leaves {
				one := s
				one.Leaf, one.Leaves, one.New = s.Leaf+i, 1, s.New && i == 0
				steps = append(steps, one)
				got = append(got, place{s.Stream, s.Chunk, one.Leaf})
			}
		}
		var wanted, size, stored int64
		contents := make(map[content]bool)
		known := make(map[blockmap.Digest]bool)
		chunks := make(map[[2]int]bool)
		for _, x := range tr.Touches {
			for b := x.Block; b < x.Block+x.Count; b++ {
				run, ok := m.Index.Lookup(b)
				if !ok {
					continue
				}
				wanted += blockmap.BlockSize
				table := &m.Index.Streams[run.Stream]
				block := run.Block + b - run.Device
				i := table.Find(block)
				c := &table.Chunks[i]
				at := place{int(run.Stream), i, int(block-c.Block) / 16}
				if slices.Contains(want, at) {
					continue
				}
				s := steps[len(want)]
				this := content{c.Digest, at.leaf}
				chunk := [2]int{at.stream, at.chunk}
				if s.At != x.At || s.Starts != 1 || s.Again != contents[this] || s.New == chunks[chunk] || p.Chunk(s) != c {
					t.Fatalf("step %+v is for %+v", s, x)
				}
				if !contents[this] {
					size += int64(c.LeafSize(at.leaf))
				}
				if !known[c.Digest] {
					stored += int64(c.Stored)
				}
				contents[this], known[c.Digest], chunks[chunk] = true, true, true
				want = append(want, at)
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("planned %v, want %v", got, want)
		}
		if p.Wanted != wanted || p.Size != size || p.Stored != stored {
			t.Fatalf("the plan is said to be of %d, %d, %d bytes, and is of %d, %d, %d", p.Wanted, p.Size, p.Stored, wanted, size, stored)
		}
		// The wants are the chunks in the order of the plan, each with all of its leaves.
		var order []place
		leaves := make(map[place]blockmap.LeafSet)
		for _, x := range want {
			chunk := place{x.stream, x.chunk, 0}
			if leaves[chunk] == 0 {
				order = append(order, chunk)
			}
			leaves[chunk] |= blockmap.LeafRange(x.leaf, 1)
		}
		wants, err := p.Wants(func(*blockmap.Table) (*blockmap.Stream, error) { return new(blockmap.Stream), nil })
		if err != nil || len(wants) != len(order) {
			t.Fatalf("%d wants for %d chunks, %v", len(wants), len(order), err)
		}
		for i, w := range wants {
			if w.Table != &m.Index.Streams[order[i].stream] || w.Chunk != order[i].chunk || w.Leaves != leaves[order[i]] {
				t.Fatalf("want %d is %+v, of %+v", i, w, order[i])
			}
		}
		if again, err := tracefile.NewPlan(tr, m.Index); err != nil || !reflect.DeepEqual(again, p) {
			t.Fatal("the second plan is another")
		}
	}
}

// What a recorded start has read is resident in a fresh cache once the plan's
// wants have been fetched.
func TestPlanServesTheNextStart(t *testing.T) {
	m := blocktest.NewImage(t, 6, 2000)
	image, _ := newImage(t, m)
	var b bytes.Buffer
	r := tracefile.NewRecorder(image, tracefile.IndexDigest(m.Index), &b, tracefile.Options{})
	rng := rand.New(rand.NewPCG(6, 6))
	var reads []blockmap.Extent
	for range 50 {
		e := blockmap.Range(rng.Int64N(image.Size()-100000), 1+rng.Int64N(100000))
		reads = append(reads, e)
		if _, err := blocktest.Read(t.Context(), r, e); err != nil {
			t.Fatal(err)
		}
	}
	tr := stop(t, r, &b)

	ix, err := blockmap.DecodeIndex(m.Index.Encode())
	if err != nil {
		t.Fatal(err)
	}
	again := &blocktest.Image{Index: ix, Blobs: m.Blobs, Content: m.Content}
	image, cache := newImage(t, again)
	if err := replay([][]byte{b.Bytes(), b.Bytes()[:b.Len()-1]}, ix, cache, newDirect(t, again)); err != nil {
		t.Fatal(err)
	}
	for _, e := range reads {
		if v, ok := image.View(e); !ok {
			t.Errorf("%v was read by the first start, and is not here for the second", e)
		} else {
			v.Release()
		}
	}
	p, err := tracefile.NewPlan(tr, ix)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Wants(func(*blockmap.Table) (*blockmap.Stream, error) { return nil, blocktest.ErrDiskFull }); !errors.Is(err, blocktest.ErrDiskFull) {
		t.Errorf("streams that cannot be opened: %v", err)
	}
}

func TestPlanRefuses(t *testing.T) {
	a, b := blocktest.NewImage(t, 1, 200), blocktest.NewImage(t, 2, 200)
	tr := randomTrace(rand.New(rand.NewPCG(1, 1)), tracefile.IndexDigest(a.Index), a.Index.Blocks, 10, 1)
	for name, f := range map[string]func() error{
		"plan":      func() error { _, err := tracefile.NewPlan(tr, b.Index); return err },
		"translate": func() error { _, _, err := tracefile.Translate(tr, b.Index, a.Index); return err },
		"summary":   func() error { _, err := tr.Summarize(b.Index); return err },
		"points":    func() error { _, err := tr.Points(b.Index); return err },
	} {
		if err := f(); !errors.Is(err, tracefile.ErrOtherImage) || !strings.Contains(err.Error(), tr.Index.String()[:12]) {
			t.Errorf("%s with the index of another image: %v", name, err)
		}
	}
	tr.Touches = append(tr.Touches, tracefile.Touch{Block: a.Index.Blocks, Count: 1})
	if _, err := tracefile.NewPlan(tr, a.Index); !errors.Is(err, blockmap.ErrCorrupt) {
		t.Errorf("a touch behind the device: %v", err)
	}
	if _, _, err := tracefile.Translate(tr, a.Index, b.Index); !errors.Is(err, blockmap.ErrCorrupt) {
		t.Errorf("a touch behind the device: %v", err)
	}
}

// lettered is the index of an image whose streams are lists of chunks of ten
// blocks, a letter each. A small letter is a lie: a chunk of five with the
// digest of the large one.
func lettered(t *testing.T, runs []blockmap.Run, streams ...string) *blockmap.Index {
	t.Helper()
	ix := &blockmap.Index{Runs: runs}
	for _, s := range streams {
		var table blockmap.Table
		for i, letter := range strings.ToUpper(s) {
			c := blockmap.Chunk{
				Digest: sha256.Sum256([]byte{byte(letter)}), Offset: int64(i) * 1000, Stored: 1000, Block: table.Blocks(), Count: 10,
			}
			if s[i] != byte(letter) {
				c.Count = 5
			}
			table.Chunks = append(table.Chunks, c)
		}
		table.BlobSize = int64(len(s)) * 1000
		ix.Streams = append(ix.Streams, table)
	}
	ix.Blocks = 1000
	if err := ix.Seal(); err != nil {
		t.Fatal(err)
	}
	return ix
}

func TestTranslate(t *testing.T) {
	old := lettered(t, []blockmap.Run{
		{Device: 0, Stream: 0, Block: 0, Count: 20},    // M N
		{Device: 100, Stream: 1, Block: 0, Count: 40},  // A B C D
		{Device: 200, Stream: 2, Block: 0, Count: 20},  // E F
		{Device: 220, Stream: 2, Block: 25, Count: 15}, // G from its middle, H
	}, "MN", "ABCD", "EFGH")
	next := lettered(t, []blockmap.Run{
		{Device: 0, Stream: 0, Block: 0, Count: 20},    // M X
		{Device: 50, Stream: 1, Block: 0, Count: 5},    // A, its first half
		{Device: 60, Stream: 1, Block: 15, Count: 25},  // B from its middle, C, D
		{Device: 300, Stream: 2, Block: 0, Count: 30},  // F A H
		{Device: 400, Stream: 1, Block: 20, Count: 10}, // C once more
	}, "MX", "ABCD", "FAH")
	tr := &tracefile.Trace{
		Header: tracefile.Header{Index: tracefile.IndexDigest(old), Blocks: 1000, Starts: 2},
		End:    tracefile.End{Why: tracefile.Stopped},
		Touches: []tracefile.Touch{
			{At: 1 * ms, Block: 5, Count: 10, Starts: 2},               // M, and N, which is lost
			{At: 2 * ms, Block: 103, Count: 4, Starts: 1, Miss: true},  // A: two blocks at 53, two in stream 2 only
			{At: 3 * ms, Block: 112, Count: 2, Starts: 1},              // B, where it is no longer on the device
			{At: 4 * ms, Block: 117, Count: 10, Starts: 1},             // B and C
			{At: 5 * ms, Block: 195, Count: 20, Starts: 2},             // a hole, E, which is lost, and F
			{At: 6 * ms, Block: 222, Count: 8, Starts: 2, Miss: false}, // G, which is lost, and H
		},
	}
	got, carried, err := tracefile.Translate(tr, old, next)
	if err != nil {
		t.Fatal(err)
	}
	want := []tracefile.Touch{
		{At: 1 * ms, Block: 5, Count: 5, Starts: 2},
		{At: 2 * ms, Block: 53, Count: 2, Starts: 1, Miss: true},
		{At: 2 * ms, Block: 315, Count: 2, Starts: 1, Miss: true},
		{At: 4 * ms, Block: 62, Count: 10, Starts: 1},
		{At: 5 * ms, Block: 300, Count: 5, Starts: 2},
		{At: 6 * ms, Block: 320, Count: 5, Starts: 2},
	}
	if !reflect.DeepEqual(got.Touches, want) {
		t.Errorf("translated to\n%+v, want\n%+v", got.Touches, want)
	}
	if c := (tracefile.Carried{SharedChunks: 6, SharedBytes: 29 * 4096, LostChunks: 3, LostBytes: 20 * 4096}); carried != c {
		t.Errorf("it says %+v, want %+v", carried, c)
	}
	if s := carried.String(); s != "6 of 9 chunks and 118784 of 200704 bytes of the trace are in this version of the image" {
		t.Errorf("it says: %s", s)
	}
	p, err := tracefile.NewPlan(got, next)
	if err != nil {
		t.Fatal(err)
	}
	var letters []string
	for _, s := range p.Steps {
		letters = append(letters, []string{"MX", "ABCD", "FAH"}[s.Stream][s.Chunk:][:1])
	}
	if s := strings.Join(letters, ""); s != "MAABCFH" || !p.Steps[2].Again {
		t.Errorf("planned %s", s)
	}
}

// Of several places of one content the one in the stream that both images have
// is taken, and none where the chunk cannot be the same.
func TestTranslateChooses(t *testing.T) {
	runs := []blockmap.Run{
		{Device: 0, Stream: 0, Block: 0, Count: 5},
		{Device: 100, Stream: 1, Block: 0, Count: 20},
		{Device: 200, Stream: 2, Block: 0, Count: 20},
	}
	old := lettered(t, runs, "M", "XY", "AB")
	tr := traceOf(1000, tracefile.Touch{Block: 202, Count: 2})
	tr.Index = tracefile.IndexDigest(old)
	for _, c := range []struct {
		name    string
		streams []string
		want    uint32 // block, 0 for lost
	}{
		{"the same stream", []string{"M", "ZA", "AB"}, 202},
		{"another stream", []string{"M", "ZA", "BC"}, 112},
		{"only a lie", []string{"M", "aZC", "BC"}, 0},
	} {
		got, carried, err := tracefile.Translate(tr, old, lettered(t, runs, c.streams...))
		switch {
		case err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.want == 0 && (len(got.Touches) > 0 || carried.LostChunks != 1):
			t.Errorf("%s: %+v, %v", c.name, got.Touches, carried)
		case c.want > 0 && (len(got.Touches) != 1 || got.Touches[0].Block != c.want || carried.SharedChunks != 1):
			t.Errorf("%s: %+v, %v", c.name, got.Touches, carried)
		}
	}
}

// Two real images that share a layer: what they share is carried over, and the
// blocks that it is carried to have the content of those that were touched.
func TestTranslateKeepsContent(t *testing.T) {
	old := blocktest.NewImage(t, 11, 1500)
	other := blocktest.NewImage(t, 12, 1500)
	// The next version: the first two streams of the old image in another
	// order and at other places, and a layer of its own.
	next := &blockmap.Index{Streams: []blockmap.Table{other.Index.Streams[0], old.Index.Streams[2], old.Index.Streams[1]}}
	device := uint32(3)
	for i := range next.Streams {
		n := next.Streams[i].Blocks()
		for at := uint32(0); at < n; at += 150 {
			next.Runs = append(next.Runs, blockmap.Run{Device: device, Stream: uint32(i), Block: at, Count: min(150, n-at)})
			device += 160
		}
	}
	next.Blocks = device
	if err := next.Seal(); err != nil {
		t.Fatal(err)
	}
	content := func(ix *blockmap.Index, block uint32) (blockmap.Digest, uint32) {
		run, ok := ix.Lookup(block)
		if !ok {
			return blockmap.Digest{}, 0
		}
		table := &ix.Streams[run.Stream]
		at := run.Block + block - run.Device
		c := &table.Chunks[table.Find(at)]
		return c.Digest, at - c.Block
	}
	rng := rand.New(rand.NewPCG(7, 7))
	tr := randomTrace(rng, tracefile.IndexDigest(old.Index), old.Index.Blocks, 150, 1)
	got, carried, err := tracefile.Translate(tr, old.Index, next)
	if err != nil {
		t.Fatal(err)
	}
	type where struct {
		digest blockmap.Digest
		at     uint32
	}
	touched := make(map[where]time.Duration)
	chunks, shared := make(map[blockmap.Digest]bool), make(map[blockmap.Digest]bool)
	for i := range next.Streams {
		for _, c := range next.Streams[i].Chunks {
			shared[c.Digest] = true
		}
	}
	var blocks int64
	for _, x := range tr.Touches {
		for b := x.Block; b < x.Block+x.Count; b++ {
			d, at := content(old.Index, b)
			if d == (blockmap.Digest{}) {
				continue
			}
			if _, ok := touched[where{d, at}]; !ok {
				touched[where{d, at}] = x.At
			}
			if chunks[d] = shared[d]; shared[d] {
				blocks++
			}
		}
	}
	for _, x := range got.Touches {
		for b := x.Block; b < x.Block+x.Count; b++ {
			d, at := content(next, b)
			if when, ok := touched[where{d, at}]; !ok || when > x.At {
				t.Fatalf("block %d of the new device has another content than what was touched at %v", b, x.At)
			}
		}
	}
	if carried.SharedBytes != blocks*blockmap.BlockSize || carried.SharedBytes == 0 || carried.LostBytes == 0 {
		t.Errorf("it says %+v, %d blocks are shared", carried, blocks)
	}
	// Every chunk that they share is planned.
	p, err := tracefile.NewPlan(got, next)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range p.Steps {
		delete(chunks, p.Chunk(s).Digest)
	}
	for d, both := range chunks {
		if both {
			t.Errorf("chunk %v is in both and not planned", d)
		}
	}
	same, carried, err := tracefile.Translate(tr, old.Index, old.Index)
	if err != nil || carried.LostChunks != 0 || !reflect.DeepEqual(same.Index, tr.Index) {
		t.Errorf("translated to its own image: %v, %v", carried, err)
	}
}

// FuzzUse uses traces that Read has accepted: what is made of them trusts them
// no further than that.
func FuzzUse(f *testing.F) {
	m, n := blocktest.NewImage(f, 1, 400), blocktest.NewImage(f, 1, 300)
	index := tracefile.IndexDigest(m.Index)
	for i, starts := range []uint32{1, 4} {
		rng := rand.New(rand.NewPCG(uint64(i), 1))
		f.Add(encode(f, randomTrace(rng, index, m.Index.Blocks, 50, starts)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b)
		tracefile.Reseal(b)
		tr, err := tracefile.Read(bytes.NewReader(b))
		if err != nil {
			return
		}
		if merged, err := tracefile.Merge(tr, tr); err == nil && merged.Bytes() != tr.Bytes() {
			t.Fatalf("merged with itself, %d bytes became %d", tr.Bytes(), merged.Bytes())
		}
		if tr.Blocks != m.Index.Blocks {
			return
		}
		tr.Index = index
		if _, err := tracefile.NewPlan(tr, m.Index); err != nil {
			t.Fatalf("a trace that was accepted cannot be planned: %v", err)
		}
		same, carried, err := tracefile.Translate(tr, m.Index, m.Index)
		if err != nil || carried.LostChunks > 0 || same.Bytes() > tr.Bytes() {
			t.Fatalf("translated to its own image: %v, %v", carried, err)
		}
		next, _, err := tracefile.Translate(tr, m.Index, n.Index)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tracefile.NewPlan(next, n.Index); err != nil {
			t.Fatalf("a trace that was translated cannot be planned: %v", err)
		}
	})
}
