package tracefile_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/tracefile"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestMain(m *testing.M) { blocktest.Main(m) }

const us = time.Microsecond

// randomTrace is a trace of a device, whose touches are n disjoint ranges.
func randomTrace(rng *rand.Rand, index blockmap.Digest, blocks uint32, n int, starts uint32) *tracefile.Trace {
	t := &tracefile.Trace{
		Header: tracefile.Header{Index: index, Blocks: blocks, Starts: starts},
		End:    tracefile.End{Why: tracefile.Stopped, After: time.Hour, Dropped: rng.Uint64N(100)},
	}
	slot := blocks / uint32(n)
	var at time.Duration
	for _, i := range rng.Perm(n) {
		at += time.Duration(rng.Int64N(20000)) * us
		first := rng.Uint32N(slot)
		t.Touches = append(t.Touches, tracefile.Touch{
			At: at, Block: uint32(i)*slot + first, Count: 1 + rng.Uint32N(slot-first),
			Starts: 1 + rng.Uint32N(starts), Miss: rng.IntN(2) == 0,
		})
	}
	return t
}

func encode(t testing.TB, tr *tracefile.Trace) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := tr.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func decode(t testing.TB, b []byte) *tracefile.Trace {
	t.Helper()
	tr, err := tracefile.Read(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func TestRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, starts := range []uint32{1, 10} {
		for _, n := range []int{1, 2, 100, 5000} {
			want := randomTrace(rng, blockmap.Digest{1, 2, 3}, 1<<20, n, starts)
			if got := decode(t, encode(t, want)); !reflect.DeepEqual(got, want) {
				t.Errorf("%d touches of %d starts do not survive a round trip", n, starts)
			}
		}
	}
	none := &tracefile.Trace{Header: tracefile.Header{Starts: 1}, End: tracefile.End{Why: tracefile.WentQuiet}}
	if got := decode(t, encode(t, none)); !reflect.DeepEqual(got, none) {
		t.Errorf("a trace of nothing became %+v", got)
	}
	// The largest device, touched at its ends.
	edge := &tracefile.Trace{Header: tracefile.Header{Blocks: 1<<32 - 1, Starts: 1}, Touches: []tracefile.Touch{
		{Block: 1<<32 - 2, Count: 1, Starts: 1}, {Block: 0, Count: 1<<32 - 2, Starts: 1, At: 5 * us},
	}}
	if got := decode(t, encode(t, edge)); !reflect.DeepEqual(got, edge) {
		t.Errorf("the largest device's trace became %+v", got)
	}
}

// goldenTrace is what testdata/v1.trace holds.
func goldenTrace() *tracefile.Trace {
	return &tracefile.Trace{
		Header: tracefile.Header{Index: blockmap.Digest{0xaa, 0xbb}, Blocks: 1000, Starts: 3},
		End:    tracefile.End{Why: tracefile.Merged, After: 2 * time.Second, Dropped: 7},
		Touches: []tracefile.Touch{
			{At: 0, Block: 0, Count: 1, Starts: 3, Miss: true},
			{At: 150 * us, Block: 500, Count: 32, Starts: 3, Miss: true},
			{At: 90 * time.Millisecond, Block: 2, Count: 300, Starts: 2},
			{At: 70 * us, Block: 999, Count: 1, Starts: 1},
		},
	}
}

// Files that were written once stay readable, byte by byte the same.
func TestGolden(t *testing.T) {
	file := filepath.Join("testdata", "v1.trace")
	want := encode(t, goldenTrace())
	if *update {
		if err := os.WriteFile(file, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, want) {
		t.Errorf("%s would be written differently today:\n%x\n%x", file, b, want)
	}
	if got := decode(t, b); !reflect.DeepEqual(got, goldenTrace()) {
		t.Errorf("%s reads as %+v", file, got)
	}
}

// A file that was cut anywhere is what its complete frames say, and says that it
// was cut.
func TestCutAnywhere(t *testing.T) {
	rng := rand.New(rand.NewPCG(2, 1))
	want := randomTrace(rng, blockmap.Digest{}, 1<<20, 1000, 1)
	b := encode(t, want)
	most := 0
	for n := range len(b) {
		got, err := tracefile.Read(bytes.NewReader(b[:n]))
		if n < tracefile.HeaderLen {
			if !errors.Is(err, blockmap.ErrCorrupt) {
				t.Fatalf("%d bytes: %v", n, err)
			}
			continue
		}
		if err != nil || !errors.Is(got.Cut, tracefile.ErrCut) || got.Why != tracefile.Unfinished {
			t.Fatalf("%d bytes: %v, cut %v", n, err, got.Cut)
		}
		if len(got.Touches) < most || len(got.Touches) > 0 && !reflect.DeepEqual(got.Touches, want.Touches[:len(got.Touches)]) {
			t.Fatalf("%d bytes: %d touches, which are not those written", n, len(got.Touches))
		}
		most = len(got.Touches)
	}
	if most != len(want.Touches) {
		t.Errorf("without its last byte the trace has %d of %d touches", most, len(want.Touches))
	}
}

// No byte of a file can be altered unnoticed.
func TestAlteredAnywhere(t *testing.T) {
	want := randomTrace(rand.New(rand.NewPCG(3, 1)), blockmap.Digest{}, 1<<20, 300, 1)
	b := encode(t, want)
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1 << (i % 8)
		got, err := tracefile.Read(bytes.NewReader(bad))
		if err == nil {
			err = got.Cut
			if len(got.Touches) > 0 && !reflect.DeepEqual(got.Touches, want.Touches[:len(got.Touches)]) {
				t.Fatalf("byte %d altered: wrong touches", i)
			}
		}
		// A length that was altered may point behind the end of the file.
		if !errors.Is(err, blockmap.ErrCorrupt) && !errors.Is(err, tracefile.ErrCut) {
			t.Fatalf("byte %d altered: %v", i, err)
		}
	}
}

// Frames of another file, or out of their place, do not pass.
func TestFramesAreChained(t *testing.T) {
	tr := goldenTrace()
	b := encode(t, tr)
	first := b[tracefile.HeaderLen:][:6+int(binary.LittleEndian.Uint16(b[tracefile.HeaderLen:]))]
	twice := append(append(bytes.Clone(b[:tracefile.HeaderLen]), first...), b[tracefile.HeaderLen:]...)
	if got := decode(t, twice); len(got.Touches) != 3 || !errors.Is(got.Cut, blockmap.ErrCorrupt) {
		t.Errorf("a frame that is there twice: %d touches, cut %v", len(got.Touches), got.Cut)
	}
	tr.Index[5]++
	other := append(bytes.Clone(b[:tracefile.HeaderLen]), encode(t, tr)[tracefile.HeaderLen:]...)
	if got := decode(t, other); len(got.Touches) != 0 || !errors.Is(got.Cut, blockmap.ErrCorrupt) {
		t.Errorf("frames of another file: %d touches, cut %v", len(got.Touches), got.Cut)
	}
}

func TestRefused(t *testing.T) {
	good := encode(t, goldenTrace())
	frame := func(body ...byte) []byte {
		b := append(bytes.Clone(good[:tracefile.HeaderLen]), byte(len(body)), 0, 0, 0, 0, 0)
		return append(b, body...)
	}
	set := func(off int, p ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[off:], p)
		return b
	}
	for _, c := range []struct {
		name, want string
		b          []byte
	}{
		{"empty", "not a thaw trace", nil},
		{"other file", "not a thaw trace", []byte("#!/bin/sh\n")},
		{"header cut", "ends in its header", good[:20]},
		{"other version", "version 2, this program reads 1", set(8, 2)},
		{"no starts", "0 starts", set(48, 0)},
		{"many starts", "16777219 starts", set(48, 3, 0, 0, 1)},
		{"empty frame", "a number is cut short", frame()},
		{"kind 0", "kind 0", frame(0)},
		{"kind 3", "3 where at most 2", frame(3)},
		{"empty range", "empty", frame(1, 0, 0, 0, 1)},
		{"range before the device", "of 1000", frame(1, 0, 1, 2, 1)},
		{"range behind the device", "blocks 0+1001 of 1000", frame(1, 0, 0, 0xd2, 0x0f, 1)},
		{"more blocks than there are", "more blocks than", frame(1, 0, 0, 0xd0, 0x0f, 1, 0, 0xcf, 0x0f, 2, 1)},
		{"a block twice", "touched twice", frame(1, 0, 0, 2, 1, 0, 1, 2, 1)},
		{"no start touched it", "no start", frame(1, 0, 0, 2, 0)},
		{"more starts than there are", "4 where at most 3", frame(1, 0, 0, 2, 4)},
		{"range cut short", "cut short", frame(1, 0, 0)},
		{"time overflows", "at most 1099511627776", frame(1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 2, 1)},
		{"unknown reason", "at most 6", frame(2, 7, 0, 0)},
		{"long end", "too many", frame(2, 1, 0, 0, 0)},
		{"bytes behind the end", "bytes follow its end", append(frame(2, 1, 0, 0), 0)},
	} {
		tracefile.Reseal(c.b)
		tr, err := tracefile.Read(bytes.NewReader(c.b))
		if err == nil {
			err = tr.Cut
		}
		if !errors.Is(err, blockmap.ErrCorrupt) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	broken := io.MultiReader(bytes.NewReader(good[:80]), iotest.ErrReader(blocktest.ErrInjected))
	if _, err := tracefile.Read(broken); !errors.Is(err, blocktest.ErrInjected) {
		t.Errorf("a file that cannot be read: %v", err)
	}
	if _, err := tracefile.Read(iotest.ErrReader(blocktest.ErrInjected)); !errors.Is(err, blocktest.ErrInjected) {
		t.Errorf("a file that cannot be read at all: %v", err)
	}
}

func TestWriterRefuses(t *testing.T) {
	h := tracefile.Header{Blocks: 10, Starts: 1}
	for _, x := range []tracefile.Touch{
		{Block: 10, Count: 1}, {Block: 0, Count: 11}, {Block: 1 << 31, Count: 1 << 31}, {Count: 0},
		{Count: 1, At: -1}, {Count: 1, At: 1 << 62}, {Count: 1, Starts: 2},
	} {
		w, err := tracefile.NewWriter(io.Discard, h)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Add(x); err == nil {
			t.Errorf("%+v was written", x)
		}
		if err := (&tracefile.Trace{Header: h, Touches: []tracefile.Touch{x}}).Write(io.Discard); err == nil {
			t.Errorf("a trace of %+v was written", x)
		}
	}
	if _, err := tracefile.NewWriter(io.Discard, tracefile.Header{}); err == nil {
		t.Error("a trace of no start was begun")
	}
	twice := []tracefile.Touch{{Block: 1, Count: 2}, {Block: 2, Count: 1}}
	if err := (&tracefile.Trace{Header: h, Touches: twice}).Write(io.Discard); err == nil {
		t.Error("a trace that touches a block twice was written")
	}
}

// A file never becomes longer than a Reader takes, and one that is full can
// still be closed.
func TestMaxSize(t *testing.T) {
	if testing.Short() {
		t.Skip("writes 4 MiB")
	}
	var b bytes.Buffer
	w, err := tracefile.NewWriter(&b, tracefile.Header{Blocks: 1<<32 - 1, Starts: 1})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for ; err == nil; n++ {
		// Far apart in space and time: long numbers.
		block := uint32(n)
		if n%2 == 1 {
			block = 1<<32 - 2 - block
		}
		err = w.Add(tracefile.Touch{At: time.Duration(n) * 300 * time.Millisecond % (1 << 49), Block: block, Count: 1})
	}
	if !errors.Is(err, tracefile.ErrFull) {
		t.Fatal(err)
	}
	if err := w.Close(tracefile.End{Why: tracefile.TooLong}); err != nil {
		t.Fatal(err)
	}
	if b.Len() > tracefile.MaxSize {
		t.Errorf("the file has %d bytes", b.Len())
	}
	got, err := tracefile.Read(bytes.NewReader(b.Bytes()))
	if err != nil || got.Cut != nil || len(got.Touches) != n-1 {
		t.Fatalf("%v; read back %d of %d touches", err, len(got.Touches), n-1)
	}
	long := append(b.Bytes()[:b.Len()-10], make([]byte, tracefile.MaxSize)...)
	tracefile.Reseal(long)
	if got, err := tracefile.Read(bytes.NewReader(long)); err == nil && got.Cut == nil {
		t.Error("a file that is too long was read without a word")
	}
}

func FuzzRead(f *testing.F) {
	for i, starts := range []uint32{1, 4} {
		rng := rand.New(rand.NewPCG(uint64(i), 1))
		f.Add(encode(f, randomTrace(rng, blockmap.Digest{1}, 1000, 50, starts)))
	}
	f.Add(encode(f, goldenTrace()))
	f.Add(encode(f, goldenTrace())[:70])
	f.Fuzz(func(t *testing.T, b []byte) {
		// Past the checksums, which would keep the fuzzer from everything
		// that lies behind them.
		b = bytes.Clone(b)
		tracefile.Reseal(b)
		tr, err := tracefile.Read(bytes.NewReader(b))
		if err != nil {
			return
		}
		var again bytes.Buffer
		if err := tr.Write(&again); err != nil {
			t.Fatalf("a trace that was read cannot be written: %v", err)
		}
		back, err := tracefile.Read(&again)
		if err != nil || !reflect.DeepEqual(back.Touches, tr.Touches) || back.End != tr.End || back.Header != tr.Header {
			t.Fatalf("a trace that was accepted does not survive a round trip: %v", err)
		}
	})
}

// start500MB makes up the start of a program that reads 500 MB: libraries
// mapped and touched in places, large files read in sequence by several
// threads, small files, and the metadata of all of them. Reads are those of
// Linux, at most 128 KiB of readahead.
func start500MB(rng *rand.Rand, latency time.Duration) []tracefile.Touch {
	const blocks = 900 << 20 / blockmap.BlockSize
	taken := make([]bool, blocks)
	var touches []tracefile.Touch
	var at time.Duration
	total := 0
	touch := func(block, count int) {
		for ; count > 0 && block < blocks && taken[block]; block, count = block+1, count-1 {
		}
		n := 0
		for ; n < count && block+n < blocks && !taken[block+n]; n++ {
			taken[block+n] = true
		}
		if n == 0 {
			return
		}
		at += time.Duration(10+rng.Int64N(150)) * us
		miss := latency > 0 && rng.IntN(3) > 0
		if miss {
			at += time.Duration(rng.ExpFloat64() * float64(latency))
		}
		touches = append(touches, tracefile.Touch{At: at, Block: uint32(block), Count: uint32(n), Miss: miss, Starts: 1})
		total += n
	}
	type reader struct{ block, left int }
	var readers []reader
	for total < 500<<20/blockmap.BlockSize {
		switch p := rng.IntN(100); {
		case p < 8: // a large file is opened
			if len(readers) < 4 {
				readers = append(readers, reader{rng.IntN(blocks), 256 << rng.IntN(6)})
			}
		case p < 60 && len(readers) > 0: // a thread reads on
			r := &readers[rng.IntN(len(readers))]
			touch(r.block, 32)
			r.block, r.left = r.block+32, r.left-32
			if r.left <= 0 {
				*r = readers[len(readers)-1]
				readers = readers[:len(readers)-1]
			}
		case p < 75: // a page fault, and what is read around it
			touch(rng.IntN(blocks)&^15, 16)
		case p < 90: // a small file
			touch(rng.IntN(blocks), 1+rng.IntN(8))
		default: // metadata
			touch(rng.IntN(blocks/100), 1)
		}
	}
	return touches
}

func TestSize(t *testing.T) {
	for _, c := range []struct {
		name    string
		latency time.Duration
	}{{"resident", 0}, {"2 ms away", 2 * time.Millisecond}, {"20 ms away", 20 * time.Millisecond}} {
		touches := start500MB(rand.New(rand.NewPCG(1, 1)), c.latency)
		var b bytes.Buffer
		w, err := tracefile.NewWriter(&b, tracefile.Header{Blocks: 900 << 20 / blockmap.BlockSize, Starts: 1})
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range touches {
			if err := w.Add(x); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(tracefile.End{}); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: 500 MB in %d reads within %v: %d bytes, %.2f a read, nothing merged",
			c.name, len(touches), touches[len(touches)-1].At.Round(time.Millisecond), b.Len(), float64(b.Len())/float64(len(touches)))
		if b.Len() >= 64<<10 {
			t.Errorf("%s: %d bytes", c.name, b.Len())
		}
	}
}

func ExampleRead() {
	f, err := os.Open("testdata/v1.trace")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer f.Close()
	t, err := tracefile.Read(f)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, x := range t.Touches {
		fmt.Println(x.At, x.Extent())
	}
	// Output:
	// 0s [0, 4096)
	// 150µs [2048000, 2179072)
	// 90ms [8192, 1236992)
	// 70µs [4091904, 4096000)
}
