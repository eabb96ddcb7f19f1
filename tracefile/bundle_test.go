package tracefile_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/tracefile"
)

// resealBundle makes the checksum of a head be right, if there is one.
func resealBundle(b []byte) {
	if len(b) < 24 {
		return
	}
	n := int64(binary.LittleEndian.Uint32(b[4:])) - 16
	if n >= 0 && n <= int64(len(b)-24) {
		binary.LittleEndian.PutUint32(b[20:], crc32.Checksum(b[24:24+n], crc32.MakeTable(crc32.Castagnoli)))
	}
}

// leafBundle is a bundle of three chunks: one of a block, one of three leaves that come in
// two parts, and one of which the bundle has a leaf.
func leafBundle(t testing.TB) *tracefile.Bundle {
	t.Helper()
	b := &tracefile.Bundle{
		Chunks: []tracefile.BundleChunk{{Blocks: 1}, {Blocks: 33}, {Blocks: 1024}},
		Frames: []tracefile.Frame{
			{Stored: 5, Parts: []tracefile.Part{{Chunk: 0, Leaf: 0, Count: 1}, {Chunk: 1, Leaf: 2, Count: 1}}},
			{Stored: 300, Parts: []tracefile.Part{{Chunk: 2, Leaf: 63, Count: 1}, {Chunk: 1, Leaf: 0, Count: 2}}},
		},
	}
	for i := range b.Chunks {
		c := blockmap.Chunk{Count: b.Chunks[i].Blocks}
		list := make([]blockmap.Digest, c.Leaves())
		for j := range list {
			list[j] = blockmap.Digest{byte(i), byte(j)}
		}
		c.Digest = blockmap.ListDigest(list)
		b.Chunks[i].Digest = c.Digest
		if i == 0 {
			continue // one part has all of it
		}
		var err error
		if b.Chunks[i].List, err = blockmap.NewLeafList(&c, list); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// The head of a small bundle, made by hand from the layout that is written down.
func TestBundleHead(t *testing.T) {
	b := leafBundle(t)
	body := []byte{3, 1}
	body = append(body, b.Chunks[0].Digest[:]...)
	body = append(append(body, 33), b.Chunks[1].Digest[:]...)
	body = append(append(body, 0x80, 8), b.Chunks[2].Digest[:]...) // 1024 is 8<<7
	body = append(body, 2,
		5, 2, 0, 0, 1, 1, 2, 1,
		0xac, 2, 2, 2, 63, 1, 1, 0, 2) // 300 is 0x2c + 2<<7
	for chunk, leaves := range []int{0, 3, 64} {
		for leaf := range leaves {
			body = append(body, byte(chunk), byte(leaf))
			body = append(body, make([]byte, 30)...)
		}
	}
	want := []byte{0x5b, 0x2a, 0x4d, 0x18, 0, 0, 0, 0, 't', 'h', 'a', 'w', 'b', 'n', 'd', 'l', 2, 0, 0, 0}
	binary.LittleEndian.PutUint32(want[4:], uint32(16+len(body)))
	want = binary.LittleEndian.AppendUint32(want, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
	want = append(want, body...)
	if got := b.Head(); !bytes.Equal(got, want) {
		t.Errorf("the head is\n%x, want\n%x", got, want)
	}
	file := filepath.Join("testdata", "v2.bundle")
	if *update {
		if err := os.WriteFile(file, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if kept, err := os.ReadFile(file); err != nil || !bytes.Equal(kept, want) {
		t.Errorf("%s would be written differently today: %v", file, err)
	}
	leaves, size := b.Leaves()
	if b.Stored() != 305 || leaves != 5 || size != 2*4096+3*65536 || b.FrameSize(&b.Frames[0]) != 2*4096 || b.PartSize(b.Frames[1].Parts[1]) != 2*65536 {
		t.Errorf("its frames are said to have %d bytes for %d leaves of %d", b.Stored(), leaves, size)
	}
	// A Reader is left at the first frame.
	for _, r := range []io.Reader{bytes.NewReader(append(want, "frames"...)), iotest.OneByteReader(bytes.NewReader(append(want, "frames"...)))} {
		got, err := tracefile.ReadBundle(r)
		rest, _ := io.ReadAll(r)
		if err != nil || !reflect.DeepEqual(got, b) || string(rest) != "frames" {
			t.Errorf("%+v, %v, and %q is left", got, err, rest)
		}
	}
	none := new(tracefile.Bundle)
	if got, err := tracefile.ReadBundle(bytes.NewReader(none.Head())); err != nil || len(got.Frames) != 0 {
		t.Errorf("a bundle of nothing: %+v, %v", got, err)
	}
}

// No head can be cut or altered unnoticed.
func TestHostileBundleHeads(t *testing.T) {
	head := leafBundle(t).Head()
	for n := range head {
		if _, err := tracefile.ReadBundle(bytes.NewReader(head[:n])); !errors.Is(err, blockmap.ErrCorrupt) {
			t.Errorf("%d bytes of %d: %v", n, len(head), err)
		}
	}
	long := append(bytes.Clone(head), make([]byte, 1000)...)
	for bit := range len(head) * 8 {
		bad := bytes.Clone(long)
		bad[bit/8] ^= 1 << (bit % 8)
		if got, err := tracefile.ReadBundle(bytes.NewReader(bad)); err == nil {
			t.Errorf("bit %d altered: %+v", bit, got)
		}
	}
	set := func(off int, p ...byte) []byte {
		bad := bytes.Clone(long)
		copy(bad[off:], p)
		resealBundle(bad)
		return bad
	}
	altered := func(alter func(*tracefile.Bundle)) []byte {
		b := leafBundle(t)
		alter(b)
		return b.Head()
	}
	for _, c := range []struct {
		name, want string
		b          []byte
	}{
		{"nothing", "ends within", nil},
		{"other frame", "not one", set(0, 0x5c)},
		{"zstd", "not one", set(0, 0x28, 0xb5, 0x2f, 0xfd)},
		{"version 1", "pack it again", set(16, 1)},
		{"other version", "version 3", set(16, 3)},
		{"no body", "a head of 0", set(4, 16, 0, 0, 0)},
		{"less than its own head", "a head of -16", set(4, 0, 0, 0, 0)},
		{"huge", "a head of 4294967279", set(4, 0xff, 0xff, 0xff, 0xff)},
		{"a count that is not there", "records", set(24, 0xff, 0x7f)},
		{"a huge count", "records", set(24, 0xff, 0xff, 0xff, 0xff, 0x7f)},
		{"an endless number", "too long", set(24, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)},
		{"fewer chunks than there are", "records", set(24, 2)},
		{"an empty chunk", "is empty", set(25, 0)},
		{"a huge chunk", "where at most", set(25, 0xff, 0xff)},
		{"a chunk twice", "twice", altered(func(b *tracefile.Bundle) { b.Chunks[2].Digest = b.Chunks[0].Digest })},
		{"a frame too long", "for a content of", altered(func(b *tracefile.Bundle) { b.Frames[0].Stored = 2*4096 + 1<<17 + 1 })},
		{"a frame of nothing", "has nothing", altered(func(b *tracefile.Bundle) { b.Frames = append(b.Frames, tracefile.Frame{Stored: 9}, b.Frames[0]) })},
		{"a chunk that is not there", "and there are 3", altered(func(b *tracefile.Bundle) { b.Frames[0].Parts[0].Chunk = 3 })},
		{"no leaf", "leaves 0+0", altered(func(b *tracefile.Bundle) { b.Frames[0].Parts[0].Count = 0 })},
		{"a leaf that is not there", "leaves 2+2 of a chunk of 3", altered(func(b *tracefile.Bundle) { b.Frames[0].Parts[1].Count = 2 })},
		{"a leaf twice", "there already", altered(func(b *tracefile.Bundle) { b.Frames[0].Parts[1].Leaf = 1 })},
		{"a chunk without leaves", "no frame has leaves of chunk 2", altered(func(b *tracefile.Bundle) { b.Frames[1].Parts = b.Frames[1].Parts[1:] })},
		{"a list of other leaves", "the list of the leaves of chunk 2", altered(func(b *tracefile.Bundle) { b.Chunks[2].Digest[5]++ })},
		{"no list", "cut short", altered(func(b *tracefile.Bundle) { b.Chunks[2].List = nil })},
		{"a list too many", "the list of the leaves of chunk 2", altered(func(b *tracefile.Bundle) { b.Chunks[0].List = b.Chunks[1].List })},
		{"bytes behind the lists", "too many", set(4, byte(len(head)-8+1), byte((len(head)-8+1)>>8))},
		{"too much content", "for a content of", altered(func(b *tracefile.Bundle) {
			b.Frames[1].Parts[0] = tracefile.Part{Chunk: 2, Leaf: 0, Count: 64}
			b.Chunks[2].List = nil
		})},
	} {
		_, err := tracefile.ReadBundle(bytes.NewReader(c.b))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if _, err := tracefile.ReadBundle(iotest.ErrReader(blocktest.ErrInjected)); !errors.Is(err, blocktest.ErrInjected) {
		t.Errorf("a blob that cannot be read: %v", err)
	}
	broken := io.MultiReader(bytes.NewReader(head[:40]), iotest.ErrReader(blocktest.ErrInjected))
	if _, err := tracefile.ReadBundle(broken); !errors.Is(err, blocktest.ErrInjected) || errors.Is(err, blockmap.ErrCorrupt) {
		t.Errorf("a blob that breaks off with an error: %v", err)
	}
	// 16 MiB are promised, and nothing comes: nothing is allocated for them.
	liar := bytes.Clone(head[:24])
	binary.LittleEndian.PutUint32(liar[4:], 16<<20+16)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 20 {
		tracefile.ReadBundle(bytes.NewReader(liar))
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
		t.Errorf("%d bytes were allocated for what was promised", n)
	}
}

// FuzzReadBundle: what is accepted is written back as it was.
func FuzzReadBundle(f *testing.F) {
	kept, err := os.ReadFile(filepath.Join("testdata", "v2.bundle"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(kept)
	f.Add(new(tracefile.Bundle).Head())
	f.Add(append(leafBundle(f).Head(), 1, 2, 3))
	m := blocktest.NewImage(f, 1, 300)
	ix := blocktest.NewImage(f, 1, 300).Index
	_, packedHead, _, err := packed(f, m, everything(m), blocktest.NewOrigin(m).OpenRange)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packedHead.Head())
	f.Fuzz(func(t *testing.T, in []byte) {
		in = bytes.Clone(in)
		resealBundle(in)
		b, err := tracefile.ReadBundle(bytes.NewReader(in))
		if err != nil {
			return
		}
		again, err := tracefile.ReadBundle(bytes.NewReader(b.Head()))
		if err != nil || !reflect.DeepEqual(again, b) {
			t.Fatalf("%+v came back as %+v, %v", b, again, err)
		}
		wants, err := b.Wants(ix, func(*blockmap.Table) (*blockmap.Stream, error) { return nil, nil })
		if err != nil || len(wants) != len(b.Chunks) {
			t.Fatalf("%d of %d chunks have places, %v", len(wants), len(b.Chunks), err)
		}
		for i := range b.Frames {
			if n := b.FrameSize(&b.Frames[i]); n <= 0 || n > 4<<20 {
				t.Fatalf("frame %d has a content of %d bytes", i, n)
			}
		}
	})
}

// everything is a trace that touches all of an image.
func everything(m *blocktest.Image) *tracefile.Trace {
	return &tracefile.Trace{
		Header:  tracefile.Header{Index: tracefile.IndexDigest(m.Index), Blocks: m.Index.Blocks, Starts: 1},
		Touches: []tracefile.Touch{{Count: m.Index.Blocks, Starts: 1}},
	}
}

// packed makes the bundle of a trace.
func packed(t testing.TB, m *blocktest.Image, tr *tracefile.Trace, open func(context.Context, blockmap.Digest, int64, int64) (io.ReadCloser, error)) (*tracefile.Plan, *tracefile.Bundle, []byte, error) {
	t.Helper()
	return packedFrom(t, m, tr, tracefile.Contents{Open: open})
}

func packedFrom(t testing.TB, m *blocktest.Image, tr *tracefile.Trace, from tracefile.Contents) (*tracefile.Plan, *tracefile.Bundle, []byte, error) {
	t.Helper()
	p, err := tracefile.NewPlan(tr, m.Index)
	if err != nil {
		t.Fatal(err)
	}
	scratch, err := os.Create(filepath.Join(t.TempDir(), "scratch"))
	if err != nil {
		t.Fatal(err)
	}
	defer scratch.Close()
	var out bytes.Buffer
	b, err := p.Pack(t.Context(), &out, scratch, from)
	return p, b, out.Bytes(), err
}

// A bundle is a zstd file of the leaves of the plan in its order, each content once, with
// what it takes to verify each leaf by itself; and the same every time, wherever the
// chunks come from.
func TestPack(t *testing.T) {
	m := blocktest.NewImage(t, 70, 1500)
	rng := rand.New(rand.NewPCG(70, 1))
	for _, tr := range []*tracefile.Trace{everything(m), randomTrace(rng, tracefile.IndexDigest(m.Index), m.Index.Blocks, 40, 1)} {
		origin := blocktest.NewOrigin(m)
		p, b, file, err := packed(t, m, tr, origin.OpenRange)
		if err != nil {
			t.Fatal(err)
		}
		if n := origin.Most(); n > 8 || origin.Alive() != 0 {
			t.Errorf("%d requests at once, %d bodies left", n, origin.Alive())
		}
		head, err := tracefile.ReadBundle(bytes.NewReader(file))
		if err != nil || !reflect.DeepEqual(head, b) {
			t.Fatalf("the head reads as another: %v", err)
		}
		if int64(len(file)) != int64(len(b.Head()))+b.Stored() {
			t.Errorf("%d bytes, its head says %d", len(file), int64(len(b.Head()))+b.Stored())
		}
		dec, err := zstd.NewReader(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer dec.Close()
		type leaf struct {
			digest blockmap.Digest
			leaf   int
		}
		var want, got []leaf
		for _, s := range p.Steps {
			for i := range s.Leaves {
				if !s.Again {
					want = append(want, leaf{p.Chunk(s).Digest, s.Leaf + i})
				}
			}
		}
		var all []byte
		parts, lists := make([]int, len(b.Chunks)), 0
		at := int64(len(b.Head()))
		for i := range b.Frames {
			f := &b.Frames[i]
			content, err := dec.DecodeAll(file[at:at+int64(f.Stored)], nil)
			if err != nil || len(content) != b.FrameSize(f) || len(content) > 1<<20 || i == 0 && len(content) > 64<<10 {
				t.Fatalf("frame %d has %d bytes, its head says %d: %v", i, len(content), b.FrameSize(f), err)
			}
			all = append(all, content...)
			at += int64(f.Stored)
			for _, part := range f.Parts {
				chunk := &b.Chunks[part.Chunk]
				c := blockmap.Chunk{Digest: chunk.Digest, Count: chunk.Blocks}
				parts[part.Chunk]++
				if chunk.List == nil && (part.Count != c.Leaves() || c.Verify(content[:b.PartSize(part)]) != nil) {
					t.Fatalf("part %+v of frame %d is not the whole chunk, and there is no list", part, i)
				}
				for n := range part.Count {
					got = append(got, leaf{chunk.Digest, part.Leaf + n})
					size := c.LeafSize(part.Leaf + n)
					if chunk.List != nil {
						lists++
						if err := c.VerifyLeaf(chunk.List, part.Leaf+n, content[:size]); err != nil {
							t.Fatalf("leaf %d of frame %d: %v", part.Leaf+n, i, err)
						}
					}
					content = content[size:]
				}
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("the bundle has leaves\n%v, the plan\n%v", got, want)
		}
		leaves, size := b.Leaves()
		if leaves != len(want) || size != int64(len(all)) || size != p.Size {
			t.Errorf("%d leaves of %d bytes; it says %d of %d, and the plan %d", len(want), len(all), leaves, size, p.Size)
		}
		if lists == 0 || !slices.ContainsFunc(b.Chunks, func(c tracefile.BundleChunk) bool { return c.List == nil }) {
			t.Error("all chunks have a list, or none has: this tests nothing")
		}
		for range 3 {
			if _, _, twice, err := packed(t, m, tr, origin.OpenRange); err != nil || !bytes.Equal(twice, file) {
				t.Fatalf("packed again it is another file: %v", err)
			}
		}
		testPackLocal(t, m, tr, file)
		if _, err := exec.LookPath("zstd"); err != nil {
			t.Skip("zstd is not installed")
		}
		cmd := exec.Command("zstd", "-dc")
		cmd.Stdin = bytes.NewReader(file)
		out, err := cmd.Output()
		if err != nil || !bytes.Equal(out, all) {
			t.Errorf("zstd -d gives %d bytes instead of %d: %v", len(out), len(all), err)
		}
	}
}

// testPackLocal packs from chunks that are on this host: only those that are not, and those
// that are damaged, come from the origin.
func testPackLocal(t *testing.T, m *blocktest.Image, tr *tracefile.Trace, file []byte) {
	t.Helper()
	dec := blockmap.NewChunkDecoder(1)
	defer dec.Close()
	for name, c := range map[string]struct {
		here   func(chunk int) bool
		damage bool
		all    bool
	}{
		"all":     {func(int) bool { return true }, false, true},
		"some":    {func(chunk int) bool { return chunk%2 == 0 }, false, false},
		"damaged": {func(chunk int) bool { return chunk%3 == 0 }, true, false},
	} {
		origin := blocktest.NewOrigin(m)
		jobs := make(chan struct{}, 1000)
		_, _, got, err := packedFrom(t, m, tr, tracefile.Contents{
			Open: origin.OpenRange,
			Local: func(_ context.Context, stream, chunk int, p []byte) bool {
				if !c.here(chunk) {
					return false
				}
				x := &m.Index.Streams[stream].Chunks[chunk]
				content, err := dec.Decode(x, m.Blobs[m.Index.Streams[stream].Blob][x.Offset:x.Offset+int64(x.Stored)], nil)
				if err != nil || copy(p, content) != len(content) {
					t.Error(err)
				}
				if c.damage {
					p[len(p)-1]++
				}
				return true
			},
			Do: func(job func()) { jobs <- struct{}{}; job() },
		})
		if err != nil || !bytes.Equal(got, file) {
			t.Errorf("%s: another file, or %v", name, err)
		}
		if n := origin.Requests(); (n == 0) != c.all || len(jobs) == 0 {
			t.Errorf("%s: %d requests, %d jobs", name, n, len(jobs))
		}
	}
}

// Nothing is written where not every chunk is what it should be.
func TestPackRefuses(t *testing.T) {
	m := blocktest.NewImage(t, 71, 800)
	for name, c := range map[string]struct {
		faults blocktest.Faults
		want   error
	}{
		"lies":   {blocktest.Faults{Flip: true, Left: 1}, blockmap.ErrDigest},
		"cut":    {blocktest.Faults{Cut: true, Left: 1}, io.ErrUnexpectedEOF},
		"breaks": {blocktest.Faults{Break: blocktest.ErrInjected, Left: 1}, blocktest.ErrInjected},
		"fails":  {blocktest.Faults{Err: blocktest.ErrInjected, ErrEach: 2}, blocktest.ErrInjected},
	} {
		origin := blocktest.NewOrigin(m)
		origin.Set(c.faults)
		_, b, file, err := packed(t, m, everything(m), origin.OpenRange)
		if !errors.Is(err, c.want) || b != nil || len(file) > 0 || origin.Alive() != 0 {
			t.Errorf("%s: %v, %d bytes written, %d bodies open", name, err, len(file), origin.Alive())
		}
	}
	// An origin whose chunks are sound, and others.
	other := blocktest.NewImage(t, 72, 800)
	lying := blocktest.NewOrigin(m)
	_, _, file, err := packed(t, m, everything(m), func(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error) {
		for d, b := range other.Blobs {
			if int64(len(b)) >= off+n {
				return blocktest.NewOrigin(other).OpenRange(ctx, d, off, n)
			}
		}
		return lying.OpenRange(ctx, blob, off, n)
	})
	if !errors.Is(err, blockmap.ErrDigest) || len(file) > 0 {
		t.Errorf("chunks of another image: %v, %d bytes written", err, len(file))
	}
	p, err := tracefile.NewPlan(everything(m), m.Index)
	if err != nil {
		t.Fatal(err)
	}
	good := blocktest.NewOrigin(m)
	for _, c := range []struct {
		w       io.Writer
		scratch tracefile.Scratch
	}{
		{failing{}, scratchFile(t)},
		{io.Discard, failing{}},
	} {
		if _, err := p.Pack(t.Context(), c.w, c.scratch, tracefile.Contents{Open: good.OpenRange}); !errors.Is(err, blocktest.ErrInjected) {
			t.Errorf("a disk that fails: %v", err)
		}
	}
	// One that does not answer is given up with the context.
	good.Set(blocktest.Faults{Hang: true})
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := p.Pack(ctx, io.Discard, scratchFile(t), tracefile.Contents{Open: good.OpenRange}); !errors.Is(err, context.Canceled) || good.Alive() != 0 {
		t.Errorf("cancelled: %v, %d bodies open", err, good.Alive())
	}
}

func scratchFile(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "scratch"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// failing is a disk that does.
type failing struct{}

func (failing) Write([]byte) (int, error)          { return 0, blocktest.ErrInjected }
func (failing) WriteAt([]byte, int64) (int, error) { return 0, blocktest.ErrInjected }
func (failing) ReadAt([]byte, int64) (int, error)  { return 0, blocktest.ErrInjected }

// A chunk is wanted wherever an image has its content, and nowhere if it cannot
// be that.
func TestBundleWants(t *testing.T) {
	m, other := blocktest.NewImage(t, 73, 600), blocktest.NewImage(t, 74, 600)
	p, b, _, err := packed(t, m, everything(m), blocktest.NewOrigin(m).OpenRange)
	if err != nil {
		t.Fatal(err)
	}
	opened := 0
	_, cache := newImage(t, m)
	open := func(table *blockmap.Table) (*blockmap.Stream, error) { opened++; return cache.Stream(table) }
	wants, err := b.Wants(m.Index, open)
	if err != nil || opened != len(m.Index.Streams) {
		t.Fatalf("%v; %d streams opened", err, opened)
	}
	places, planned := 0, 0
	for i, ws := range wants {
		for _, w := range ws {
			places++
			if w.Table.Chunks[w.Chunk].Digest != b.Chunks[i].Digest || w.Stream.ID() != w.Table.ID() {
				t.Errorf("chunk %d is wanted where another content is", i)
			}
		}
	}
	for _, s := range p.Steps {
		if s.New {
			planned++
		}
	}
	if places != planned || places == len(b.Chunks) {
		t.Errorf("%d places of %d chunks; the image has %d", places, len(b.Chunks), planned)
	}
	// Of another image: nowhere, and no stream is made for it.
	opened = 0
	if wants, err = b.Wants(other.Index, open); err != nil || opened != 0 || slices.ContainsFunc(wants, func(w []blockmap.Want) bool { return len(w) > 0 }) {
		t.Errorf("another image wants %v, %v; %d streams opened", wants, err, opened)
	}
	// The digest of a chunk, and another length.
	lie := &tracefile.Bundle{Chunks: slices.Clone(b.Chunks), Frames: b.Frames}
	lie.Chunks[0].Blocks++
	if wants, err = lie.Wants(m.Index, open); err != nil || len(wants[0]) != 0 || len(wants[1]) == 0 {
		t.Errorf("a chunk of another length is wanted at %v, %v", wants[0], err)
	}
	if _, err := b.Wants(m.Index, func(*blockmap.Table) (*blockmap.Stream, error) { return nil, blocktest.ErrInjected }); !errors.Is(err, blocktest.ErrInjected) {
		t.Errorf("a cache that fails: %v", err)
	}
}
