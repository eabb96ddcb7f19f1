package flatten

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// configured gives an image the settings of its container.
func (s *testSource) configured(t testing.TB, change func(c *v1.Config)) *testSource {
	t.Helper()
	var c v1.ConfigFile
	if err := json.Unmarshal(s.Config, &c); err != nil {
		t.Fatal(err)
	}
	change(&c.Config)
	var err error
	if s.Config, err = json.Marshal(c); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestGuessEncoding(t *testing.T) {
	g := new(guess)
	for _, r := range []blockRange{{100, 5}, {105, 1}, {10, 3}, {101, 7}, {0, 1}, {12, 1}, {1<<32 - 3, 2}} {
		g.add(r.start, r.count)
	}
	l, err := decodeGuess(g.encode(), math.MaxUint32)
	if err != nil {
		t.Fatal(err)
	}
	var want []blockmap.Extent
	for _, r := range []blockRange{{100, 6}, {10, 3}, {106, 2}, {0, 1}, {1<<32 - 3, 2}} {
		want = append(want, blockmap.Range(int64(r.start)*blockSize, int64(r.count)*blockSize))
	}
	if !slices.Equal(l, want) {
		t.Errorf("read back %v, want %v", l, want)
	}

	// Blocks far apart take the most room; the last ones wanted are left out.
	g = new(guess)
	for i := range uint32(10_000) {
		g.add(i%2*(1<<31)+i*8, 1)
	}
	text := g.encode()
	if len(text) > maxGuessText || len(text) < maxGuessText-40 {
		t.Errorf("%d bytes of text", len(text))
	}
	if l, err := decodeGuess(text, math.MaxUint32); err != nil || len(l) != len(g.ranges) {
		t.Errorf("%d of %d ranges, %v", len(l), len(g.ranges), err)
	}
	g = new(guess)
	for i := range uint32(10_000) {
		g.add(i*2, 1)
	}
	if l, err := decodeGuess(g.encode(), 20_000); err != nil || len(l) != maxGuessRanges {
		t.Errorf("%d ranges, %v", len(l), err)
	}
}

// encodeRanges writes what a builder would not.
func encodeRanges(version uint64, numbers ...int64) string {
	b := binary.AppendUvarint(nil, version)
	for i, n := range numbers {
		if i%2 == 0 {
			b = binary.AppendVarint(b, n)
		} else {
			b = binary.AppendUvarint(b, uint64(n))
		}
	}
	return base64.RawStdEncoding.EncodeToString(b)
}

func TestBadGuess(t *testing.T) {
	many := make([]int64, 2*(maxGuessRanges+1))
	for i := range many {
		many[i] = 1
	}
	for name, text := range map[string]string{
		"nothing":               "",
		"not base64":            "A!",
		"padded":                "AQ==",
		"stray bits":            "AR",
		"another version":       encodeRanges(2, 1, 1),
		"an empty range":        encodeRanges(1, 1, 0),
		"before the device":     encodeRanges(1, -1, 1),
		"behind the device":     encodeRanges(1, 100_000, 1),
		"across its end":        encodeRanges(1, 99_999, 2),
		"back too far":          encodeRanges(1, 10, 1, -12, 1),
		"a skip that overflows": encodeRanges(1, 10, 1, math.MaxInt64, 1),
		"and the other way":     encodeRanges(1, 10, 1, math.MinInt64, 1),
		"a count of 2^63":       encodeRanges(1, 1, math.MinInt64),
		"more than is bounded":  encodeRanges(1, 0, maxGuessBlocks, 0, 1),
		"the same over again":   encodeRanges(1, 0, maxGuessBlocks, -maxGuessBlocks, 1),
		"cut short":             encodeRanges(1, 10, 1, 10),
		"too many ranges":       encodeRanges(1, many...),
		"too long":              encodeRanges(1) + strings.Repeat("A", maxGuessText),
	} {
		m := &Image{Manifest: v1.Manifest{Annotations: map[string]string{AnnotationGuess: text}}}
		if l, err := m.Guess(100_000); !errors.Is(err, blockmap.ErrCorrupt) || l != nil {
			t.Errorf("%s: %d ranges, %v", name, len(l), err)
		}
	}
	if l, err := new(Image).Guess(100); l != nil || err != nil {
		t.Errorf("no guess: %v, %v", l, err)
	}
	m := &Image{Manifest: v1.Manifest{Annotations: map[string]string{AnnotationGuess: encodeRanges(1)}}}
	if l, err := m.Guess(100); l != nil || err != nil {
		t.Errorf("an empty guess: %v, %v", l, err)
	}
}

func FuzzGuess(f *testing.F) {
	f.Add(encodeRanges(1, 0, 5, 10, 3, -15, 1), uint32(100))
	f.Add(encodeRanges(1, 10, 1, math.MaxInt64, 1), uint32(100))
	f.Add(encodeRanges(1, 0, maxGuessBlocks), uint32(math.MaxUint32))
	f.Add("", uint32(0))
	f.Fuzz(func(t *testing.T, text string, blocks uint32) {
		l, err := decodeGuess(text, blocks)
		if err != nil {
			if !errors.Is(err, blockmap.ErrCorrupt) {
				t.Fatalf("%v is not ErrCorrupt", err)
			}
			return
		}
		total := int64(0)
		g := new(guess)
		for _, e := range l {
			if err := e.Check(int64(blocks) * blockSize); err != nil || e.Len() <= 0 || e.Aligned() != e {
				t.Fatalf("%v: %v", e, err)
			}
			total += e.Len()
			g.add(uint32(e.Start/blockSize), uint32(e.Len()/blockSize))
		}
		if total > maxGuessBlocks*blockSize || len(l) > maxGuessRanges {
			t.Fatalf("%d bytes in %d ranges", total, len(l))
		}
		// What is taken is written again, each block once.
		if _, err := decodeGuess(g.encode(), blocks); err != nil {
			t.Fatal(err)
		}
	})
}

// guessable is an image of a program with libraries in two layers.
func guessable(t testing.TB) *testSource {
	t.Helper()
	prog := madeELF{interp: "/lib/ld.so", needed: []string{"liba.so"}}
	return newSource(t, gzipped,
		tarball(t, dir("lib"), exe("lib/ld.so", madeELF{}.bytes()), reg("lib/liba.so", madeELF{needed: []string{"libb.so"}, pad: 100_000}.bytes()),
			reg("unread", noise(1, 3_000_000))),
		tarball(t, exe("run", "#!/bin/prog -x\n"), dir("bin"), exe("bin/prog", prog.bytes()), reg("lib/libb.so", madeELF{pad: 50_000}.bytes()), reg("unread2", noise(2, 3_000_000))),
	).configured(t, func(c *v1.Config) { c.Entrypoint = []string{"/run"} })
}

// TestGuessIsOfTheDevice looks at a whole device where the guess says.
func TestGuessIsOfTheDevice(t *testing.T) {
	src, dst := guessable(t), newTarget(t)
	res := build(t, src, dst, testOptions)
	m, ix := readBack(t, res, dst)
	l, err := m.Guess(ix.Blocks)
	if err != nil {
		t.Fatal(err)
	}
	device, err := os.Open(assemble(t, ix, dst))
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	var all []byte
	var total int64
	for _, e := range l {
		b := make([]byte, e.Len())
		if _, err := device.ReadAt(b, e.Start); err != nil {
			t.Fatal(err)
		}
		all, total = append(all, b...), total+e.Len()
	}
	at := 0
	for _, want := range []string{
		"#!/bin/prog -x\n",
		madeELF{interp: "/lib/ld.so", needed: []string{"liba.so"}}.bytes(),
		madeELF{}.bytes(),
		madeELF{needed: []string{"libb.so"}, pad: 100_000}.bytes(),
		madeELF{pad: 50_000}.bytes(),
	} {
		i := bytes.Index(all[at:], []byte(want))
		if i < 0 {
			t.Fatalf("%.20q… is not guessed, or not in its place", want)
		}
		at += i
	}
	if bytes.Contains(all, []byte(noise(1, 3_000_000)[:blockSize])) {
		t.Error("a file that nothing reads is guessed")
	}
	if r := res.Guess; r.Files != 5 || r.Bytes != total || r.Chunks < 2 || r.Stored <= 0 {
		t.Errorf("reported: %+v, and the guess has %d bytes", r, total)
	}
}

// TestGuessReadsWhatWasPushed guesses from the streams that the build has made,
// without asking the target for a part of them. Of a layer that the target had
// before, it asks for the parts.
func TestGuessReadsWhatWasPushed(t *testing.T) {
	src, dst := guessable(t), newTarget(t)
	asked := make(map[string]int)
	dst.ranged = func(h v1.Hash) error { asked[h.Hex]++; return nil }
	res := build(t, src, dst, testOptions)
	if len(asked) > 0 || res.Guess.Files != 5 {
		t.Errorf("a fresh build asks for parts of %v, and guesses %+v", asked, res.Guess)
	}
	// The lower layer is there, the upper one is not.
	half := newTarget(t)
	build(t, newSource(t, gzipped, src.tars[0]), half, testOptions)
	half.ranged = dst.ranged
	again := build(t, src, half, testOptions)
	if !bytes.Equal(again.Raw, res.Raw) {
		t.Errorf("built on a layer that was there:\n%s\nwant\n%s", again.Raw, res.Raw)
	}
	if lower := res.Index.Streams[1].Blob.String(); len(asked) != 1 || asked[lower] == 0 {
		t.Errorf("the guess asks for parts of %v, and only %s was not at hand", asked, lower)
	}
}

// TestGuessAgain builds from layers that the target has: they are not read, and
// the guess is the same. What it cannot have of the target makes it fail no
// build, and no half of a guess.
func TestGuessAgain(t *testing.T) {
	src, dst := guessable(t), newTarget(t)
	first := build(t, src, dst, testOptions)
	src.opened.Store(0)
	if again := build(t, src, dst, testOptions); !bytes.Equal(again.Raw, first.Raw) || again.Guess != first.Guess {
		t.Errorf("built again:\n%s\nwant\n%s", again.Raw, first.Raw)
	}
	if n := src.opened.Load(); n > 0 {
		t.Errorf("%d layers were opened", n)
	}
	o := testOptions
	o.NoGuess = true
	without := build(t, src, dst, o)
	if m, _ := readBack(t, without, dst); m.Annotations != nil || without.Guess != (GuessReport{}) {
		t.Errorf("without a guess: %s", without.Raw)
	}
	reads := 0
	dst.ranged = func(v1.Hash) error { reads++; return nil }
	build(t, src, dst, testOptions)
	if reads == 0 || reads > 4 {
		t.Errorf("%d reads", reads)
	}
	// A moment of weakness is got over, more is not.
	for fail, want := range map[int][]byte{1: first.Raw, 2: first.Raw, 3: without.Raw, 1000: without.Raw} {
		n := 0
		dst.ranged = func(v1.Hash) error {
			if n++; n <= fail {
				return errPush
			}
			return nil
		}
		if res := build(t, src, dst, testOptions); !bytes.Equal(res.Raw, want) {
			t.Errorf("%d reads that fail:\n%s\nwant\n%s", fail, res.Raw, want)
		}
	}
	dst.ranged = nil
	stream := dst.path("blobs", first.Index.Streams[2].Blob.String())
	b, err := os.ReadFile(stream)
	if err != nil {
		t.Fatal(err)
	}
	b[20] ^= 1
	writeFile(t, stream, b)
	// Where the target does not tell, there is no guess; where it does, the
	// layer is converted again.
	for blind, want := range map[bool][]byte{true: without.Raw, false: first.Raw} {
		writeFile(t, stream, b)
		dst.blind = blind
		res, err := Build(t.Context(), &src.Source, dst, testOptions)
		if err != nil || !bytes.Equal(res.Raw, want) {
			t.Errorf("a chunk that is not what it was, blind %t: %v\n%s", blind, err, res.Raw)
		}
	}
}

// checkFlaskGuess looks at the guess for Debian with flask, whose program is a
// script of python.
func checkFlaskGuess(t *testing.T, res *Result, dst *dirTarget, device string) {
	t.Helper()
	need(t, "debugfs")
	m, ix := readBack(t, res, dst)
	l, err := m.Guess(ix.Blocks)
	if err != nil {
		t.Fatal(err)
	}
	// An independent reading of the file system says where files are.
	last := -1
	for _, file := range []string{
		"/app/run", "/usr/bin/python3.11", "/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "/etc/ld.so.cache",
		"/lib/x86_64-linux-gnu/libm.so.6", "/lib/x86_64-linux-gnu/libz.so.1.2.13", "/lib/x86_64-linux-gnu/libexpat.so.1.8.10", "/lib/x86_64-linux-gnu/libc.so.6",
	} {
		found := -1
		for _, b := range strings.Fields(string(run(t, "debugfs", "-R", "blocks "+file, device))) {
			for i, e := range l {
				if n := blockOf(t, b); n >= 0 && n >= e.Start && n < e.End && found < 0 {
					found = i
				}
			}
		}
		if found < 0 {
			t.Errorf("%s is not guessed", file)
		} else if found < last {
			t.Errorf("%s is guessed before what comes before it", file)
		}
		last = max(last, found)
	}
	t.Logf("%+v", res.Guess)
	if res.Guess.Files != 8 || res.Guess.Stored > 8<<20 {
		t.Errorf("%+v", res.Guess)
	}
}

// blockOf is the byte at which a block begins that debugfs names, -1 for
// another word of its output.
func blockOf(t testing.TB, word string) int64 {
	t.Helper()
	var n int64
	for _, c := range word {
		if c < '0' || c > '9' {
			return -1
		}
		n = n*10 + int64(c-'0')
	}
	return n * blockSize
}

func TestGuessBuildFails(t *testing.T) {
	src, dst := guessable(t), newTarget(t)
	o := testOptions
	o.TempDir = filepath.Join(t.TempDir())
	// A build that ends while it guesses has made no image, and says that all layers
	// are done.
	ctx, cancel := cancelled(t)
	o.NoGuess = true
	build(t, src, dst, o)
	o.NoGuess = false
	made := dst.manifests(ArtifactTypeImage)
	dst.ranged = func(v1.Hash) error { cancel(errPush); return errPush }
	_, err := Build(ctx, &src.Source, dst, o)
	var u *Unfinished
	if !errors.Is(err, errPush) || !errors.As(err, &u) || u.Kept != 2 || u.Layers != 2 {
		t.Errorf("error %v: %+v", err, u)
	}
	if dst.manifests(ArtifactTypeImage) != made {
		t.Error("a manifest is there")
	}
}
