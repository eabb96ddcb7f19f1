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

func smallBundle() *tracefile.Bundle {
	b := &tracefile.Bundle{Parts: []tracefile.Part{{Stored: 5}, {Stored: 300}, {Stored: 0}}}
	for i := range b.Parts {
		for j := range b.Parts[i].Digest {
			b.Parts[i].Digest[j] = byte(i<<6 + j)
		}
	}
	return b
}

// The head of a small bundle, made by hand from the layout that is written down.
func TestBundleHead(t *testing.T) {
	b := smallBundle()
	body := []byte{3, 5, 0xac, 2, 0} // 300 is 0x2c + 2<<7
	for _, p := range b.Parts {
		body = append(body, p.Digest[:]...)
	}
	want := []byte{0x5b, 0x2a, 0x4d, 0x18, byte(16 + len(body)), 0, 0, 0, 't', 'h', 'a', 'w', 'b', 'n', 'd', 'l', 1, 0, 0, 0}
	want = binary.LittleEndian.AppendUint32(want, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
	want = append(want, body...)
	if got := b.Head(); !bytes.Equal(got, want) {
		t.Errorf("the head is\n%x, want\n%x", got, want)
	}
	file := filepath.Join("testdata", "v1.bundle")
	if *update {
		if err := os.WriteFile(file, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if kept, err := os.ReadFile(file); err != nil || !bytes.Equal(kept, want) {
		t.Errorf("%s would be written differently today: %v", file, err)
	}
	if b.Stored() != 305 {
		t.Errorf("its frames are said to have %d bytes", b.Stored())
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
	if got, err := tracefile.ReadBundle(bytes.NewReader(none.Head())); err != nil || len(got.Parts) != 0 {
		t.Errorf("a bundle of nothing: %+v, %v", got, err)
	}
}

// No head can be cut or altered unnoticed.
func TestHostileBundleHeads(t *testing.T) {
	b := smallBundle()
	head := b.Head()
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
	for _, c := range []struct {
		name, want string
		b          []byte
	}{
		{"nothing", "ends within", nil},
		{"other frame", "not one", set(0, 0x5c)},
		{"zstd", "not one", set(0, 0x28, 0xb5, 0x2f, 0xfd)},
		{"other version", "version 2", set(16, 2)},
		{"no body", "a head of 0", set(4, 16)},
		{"less than its own head", "a head of -16", set(4, 0)},
		{"huge", "a head of 4294967279", set(4, 0xff, 0xff, 0xff, 0xff)},
		{"a count that is not there", "records", set(24, 0xff, 0x7f)},
		{"a huge count", "records", set(24, 0xff, 0xff, 0xff, 0xff, 0x7f)},
		{"an endless number", "too long", set(24, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)},
		{"fewer parts than there are", "too many", set(24, 2)},
		{"a frame too long", "at most", set(25, 0xff, 0xff, 0xff, 0x7f)},
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
	kept, err := os.ReadFile(filepath.Join("testdata", "v1.bundle"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(kept)
	f.Add(new(tracefile.Bundle).Head())
	f.Add(append(smallBundle().Head(), 1, 2, 3))
	m := blocktest.NewImage(f, 1, 300)
	ix := blocktest.NewImage(f, 1, 300).Index
	p, err := tracefile.NewPlan(everything(m), m.Index)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(p.Bundle().Head())
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
		if err != nil || len(wants) != len(b.Parts) {
			t.Fatalf("%d of %d parts have places, %v", len(wants), len(b.Parts), err)
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
func packed(t *testing.T, m *blocktest.Image, tr *tracefile.Trace, open func(context.Context, blockmap.Digest, int64, int64) (io.ReadCloser, error)) (*tracefile.Plan, *tracefile.Bundle, []byte, error) {
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
	b, err := p.Pack(t.Context(), &out, scratch, open)
	return p, b, out.Bytes(), err
}

// A bundle is a zstd file of the chunks in the order of the plan, each content
// once, none longer than it was; and the same every time.
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
		var all []byte
		i, again := 0, 0
		at := int64(len(b.Head()))
		for _, s := range p.Steps {
			if s.Again {
				again++
				continue
			}
			c, part := p.Chunk(s), b.Parts[i]
			content, err := dec.DecodeAll(file[at:at+int64(part.Stored)], nil)
			if err != nil || blockmap.ChunkDigest(content) != c.Digest || part.Digest != c.Digest || part.Stored > c.Stored {
				t.Fatalf("part %d, %+v, is not chunk %+v: %v", i, part, c, err)
			}
			all = append(all, content...)
			at += int64(part.Stored)
			i++
		}
		if i != len(b.Parts) || len(p.Steps) != i+again || len(p.Bundle().Parts) != i {
			t.Errorf("%d parts of %d steps, %d of which are there already", len(b.Parts), len(p.Steps), again)
		}
		for range 3 {
			if _, _, twice, err := packed(t, m, tr, origin.OpenRange); err != nil || !bytes.Equal(twice, file) {
				t.Fatalf("packed again it is another file: %v", err)
			}
		}
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
		if _, err := p.Pack(t.Context(), c.w, c.scratch, good.OpenRange); !errors.Is(err, blocktest.ErrInjected) {
			t.Errorf("a disk that fails: %v", err)
		}
	}
	// One that does not answer is given up with the context.
	good.Set(blocktest.Faults{Hang: true})
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := p.Pack(ctx, io.Discard, scratchFile(t), good.OpenRange); !errors.Is(err, context.Canceled) || good.Alive() != 0 {
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

// A part is wanted wherever an image has its content, and nowhere if it cannot
// be that.
func TestBundleWants(t *testing.T) {
	m, other := blocktest.NewImage(t, 73, 600), blocktest.NewImage(t, 74, 600)
	p, err := tracefile.NewPlan(everything(m), m.Index)
	if err != nil {
		t.Fatal(err)
	}
	b := p.Bundle()
	opened := 0
	_, cache := newImage(t, m)
	open := func(table *blockmap.Table) (*blockmap.Stream, error) { opened++; return cache.Stream(table) }
	wants, err := b.Wants(m.Index, open)
	if err != nil || opened != len(m.Index.Streams) {
		t.Fatalf("%v; %d streams opened", err, opened)
	}
	places := 0
	for i, ws := range wants {
		for _, w := range ws {
			places++
			if w.Table.Chunks[w.Chunk].Digest != b.Parts[i].Digest || w.Stream.ID() != w.Table.ID() {
				t.Errorf("part %d is wanted where another content is", i)
			}
		}
	}
	if places != len(p.Steps) || places == len(b.Parts) {
		t.Errorf("%d places of %d parts; the image has %d chunks", places, len(b.Parts), len(p.Steps))
	}
	// Of another image: nowhere, and no stream is made for it.
	opened = 0
	if wants, err = b.Wants(other.Index, open); err != nil || opened != 0 || slices.ContainsFunc(wants, func(w []blockmap.Want) bool { return len(w) > 0 }) {
		t.Errorf("another image wants %v, %v; %d streams opened", wants, err, opened)
	}
	// Twice in a bundle, and longer than any such frame.
	twice := &tracefile.Bundle{Parts: append(slices.Clone(b.Parts), b.Parts[0])}
	twice.Parts[1].Stored = 65*blockmap.BlockSize + 1<<17
	wants, err = twice.Wants(m.Index, open)
	if err != nil || len(wants[0]) == 0 || len(wants[len(wants)-1]) != 0 || len(wants[1]) != 0 {
		t.Errorf("%v %v %v, %v", wants[0], wants[1], wants[len(wants)-1], err)
	}
	if _, err := b.Wants(m.Index, func(*blockmap.Table) (*blockmap.Stream, error) { return nil, blocktest.ErrInjected }); !errors.Is(err, blocktest.ErrInjected) {
		t.Errorf("a cache that fails: %v", err)
	}
}
