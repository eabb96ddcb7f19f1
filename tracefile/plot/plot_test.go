package plot

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/tracefile"
)

// device is an index of n streams of a chunk of 1000 blocks each, one after the
// other from block 0, with free space after the last one up to the end.
func device(t testing.TB, n int, blocks uint32) *blockmap.Index {
	t.Helper()
	const each = 1000
	ix := &blockmap.Index{Blocks: blocks}
	for i := range n {
		ix.Streams = append(ix.Streams, blockmap.Table{
			Blob: blockmap.Digest{byte(i), 1}, BlobSize: 100,
			Chunks: []blockmap.Chunk{{Digest: blockmap.Digest{byte(i), 2}, Stored: 100, Count: each}},
		})
		ix.Runs = append(ix.Runs, blockmap.Run{Device: uint32(i * each), Stream: uint32(i), Count: each})
	}
	if err := ix.Seal(); err != nil {
		t.Fatal(err)
	}
	return ix
}

func traceOf(ix *blockmap.Index, touches ...tracefile.Touch) *tracefile.Trace {
	return &tracefile.Trace{
		Header:  tracefile.Header{Index: tracefile.IndexDigest(ix), Blocks: ix.Blocks, Starts: 1},
		End:     tracefile.End{Why: tracefile.Stopped},
		Touches: touches,
	}
}

func touch(ms int, block, count uint32, miss bool) tracefile.Touch {
	return tracefile.Touch{At: time.Duration(ms) * time.Millisecond, Block: block, Count: count, Miss: miss}
}

func picture(t testing.TB, x *tracefile.Trace, o Options) *Picture {
	t.Helper()
	p, err := New(x, o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// drawn draws p both ways and fails unless the results are what their formats
// say. It returns the SVG, its texts, and the colours of the PNG's pixels.
func drawn(t testing.TB, p *Picture) (svg string, texts []string, pixels map[color.NRGBA]int) {
	t.Helper()
	var b bytes.Buffer
	if err := p.WriteSVG(&b); err != nil {
		t.Fatal(err)
	}
	svg = b.String()
	if strings.Contains(svg, "NaN") || strings.Contains(svg, "Inf") {
		t.Error("the SVG has numbers that are none")
	}
	for d := xml.NewDecoder(&b); ; {
		token, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if text, ok := token.(xml.CharData); ok && strings.TrimSpace(string(text)) != "" {
			texts = append(texts, string(text))
		}
	}
	if err := p.WritePNG(&b); err != nil {
		t.Fatal(err)
	}
	img, err := png.Decode(&b)
	if err != nil {
		t.Fatal(err)
	}
	if size := img.Bounds().Size(); size.X != p.width || size.Y != p.height {
		t.Errorf("a PNG of %v, wanted %d x %d", size, p.width, p.height)
	}
	rgba, ok := img.(*image.RGBA)
	if !ok {
		t.Fatalf("a PNG with pixels of %T: is it not opaque?", img)
	}
	pixels = make(map[color.NRGBA]int)
	for p := range slices.Chunk(rgba.Pix, 4) {
		pixels[color.NRGBA{p[0], p[1], p[2], p[3]}]++
	}
	return svg, texts, pixels
}

func TestSeries(t *testing.T) {
	ix := device(t, 4, 1<<21)
	x := traceOf(ix,
		touch(0, 0, 10, true),       // metadata
		touch(10, 1990, 20, true),   // the end of stream 1 and the start of stream 2
		touch(20, 2500, 100, false), // stream 2
		touch(300, 1<<20, 5, false), // a hole
	)
	p := picture(t, x, Options{Title: "an <image> & more", Index: ix, Metadata: []int{0}, Names: []string{"metadata", "layer 1", "layer 2"}})
	type line struct {
		name, about  string
		hits, misses int
		bytes        int64
	}
	var got []line
	for _, s := range p.series {
		got = append(got, line{s.name, s.about, len(s.hits), len(s.misses), s.curve[len(s.curve)-1].Bytes})
	}
	want := []line{
		{"layer 2", "440 KiB of 3.9 MiB read", 1, 1, 110 * 4096},
		{"metadata", "40 KiB of 3.9 MiB read", 0, 1, 10 * 4096},
		{"layer 1", "40 KiB of 3.9 MiB read", 0, 1, 10 * 4096},
		{"holes, all zeros", "20 KiB read", 1, 0, 5 * 4096},
	}
	if !slices.Equal(got, want) {
		t.Errorf("series %v, want %v", got, want)
	}
	if n := p.all[len(p.all)-1]; n.Bytes != 135*4096 || n.At != 300*time.Millisecond {
		t.Errorf("all: %v", n)
	}
	if n := p.missed[len(p.missed)-1]; n.Bytes != 30*4096 {
		t.Errorf("missed: %v", n)
	}
	m := p.series[0].misses[0]
	if m.at != 0.01 || m.from != p.fold.at(2000*4096) || m.to != p.fold.at(2010*4096) || m.from >= m.to {
		t.Errorf("the miss of stream 2 is drawn as %+v", m)
	}
	// The strip shows the streams in their places, the one that nothing was
	// read of left out.
	var strip []int
	for _, s := range p.strip {
		strip = append(strip, s.series)
	}
	if !slices.Equal(strip, []int{1, 2, 0}) {
		t.Errorf("strip %v", p.strip)
	}
	svg, texts, pixels := drawn(t, p)
	for _, want := range []string{"an <image> & more", "layer 2", "metadata", "offset on the device", "bytes read until then", "time since the first read (ms)"} {
		if !slices.Contains(texts, want) {
			t.Errorf("no text %q among %q", want, texts)
		}
	}
	for _, s := range p.series {
		if pixels[s.colour] == 0 {
			t.Errorf("nothing has the colour of %s", s.name)
		}
	}
	if c := pale(p.series[0].colour); !strings.Contains(svg, fmt.Sprintf("stroke:#%02X%02X%02X", c.R, c.G, c.B)) {
		t.Error("the hits of layer 2 are not there")
	}
}

// Each layer has a colour of its own as long as there are some; then the
// smallest ones share one, and the metadata never does.
func TestManyStreams(t *testing.T) {
	ix := device(t, 30, 100000)
	var touches []tracefile.Touch
	for i := range uint32(30) {
		touches = append(touches, touch(int(i), i*1000, i+1, true))
	}
	p := picture(t, traceOf(ix, touches...), Options{Index: ix, Metadata: []int{0}, Width: 800, Height: 600})
	if len(p.series) != len(palette)+2 {
		t.Fatalf("%d series", len(p.series))
	}
	colours := make(map[color.NRGBA]bool)
	for _, s := range p.series {
		colours[s.colour] = true
	}
	if len(colours) != len(p.series) {
		t.Errorf("%d series have %d colours", len(p.series), len(colours))
	}
	if s := p.series[0]; s.name != "stream 29" || s.colour != palette[0] {
		t.Errorf("first is %s", s.name)
	}
	if s := p.series[len(p.series)-1]; s.name != "23 other streams" || s.bytes != 299*4096 { // 2 + 3 + ... + 24 blocks
		t.Errorf("last is %s of %d streams", s.name, len(s.streams))
	}
	var bytes int64
	for _, s := range p.series {
		bytes += s.curve[len(s.curve)-1].Bytes
	}
	if all := p.all[len(p.all)-1].Bytes; bytes != all {
		t.Errorf("the series sum up to %d bytes of %d", bytes, all)
	}
	drawn(t, p)
}

// However many touches there are, marks, curves and files stay small, and what
// is drawn covers every touch.
func TestThinning(t *testing.T) {
	for _, n := range []int{1000, 50_000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			const blocks = 1 << 21
			random := rand.New(rand.NewPCG(1, 2))
			var touches []tracefile.Touch
			for i := range n {
				touches = append(touches, touch(random.IntN(60_000), uint32(i)*(blocks/uint32(n)), 1+random.Uint32N(2), random.IntN(2) == 0))
			}
			x := &tracefile.Trace{Header: tracefile.Header{Blocks: blocks, Starts: 1}, Touches: touches}
			p := picture(t, x, Options{Width: 500, Height: 400})
			s := &p.series[0]
			if marks := len(s.hits) + len(s.misses); marks > maxMarks || marks < min(n, maxMarks)/20 {
				t.Errorf("%d marks of %d touches", marks, n)
			}
			if len(p.all) > maxCurve+1 || p.all[len(p.all)-1].Bytes != x.Bytes() {
				t.Errorf("%d points, up to %d bytes of %d", len(p.all), p.all[len(p.all)-1].Bytes, x.Bytes())
			}
			for _, x := range touches[:100] { // some
				marks := s.hits
				if x.Miss {
					marks = s.misses
				}
				at := p.fold.at(x.Extent().Start)
				near := slices.ContainsFunc(marks, func(m mark) bool {
					return m.from <= at && at <= m.to && math.Abs(m.at-x.At.Seconds()) < 60./8
				})
				if !near {
					t.Errorf("nothing is drawn of block %d at %v", x.Block, x.At)
				}
			}
			svg, _, _ := drawn(t, p)
			if len(svg) > 1<<20 {
				t.Errorf("the SVG has %d bytes", len(svg))
			}
		})
	}
}

// A trace of nothing, and one of one touch, are drawn too.
func TestSmall(t *testing.T) {
	ix := device(t, 2, 1<<20)
	for name, x := range map[string]*tracefile.Trace{
		"empty": traceOf(ix),
		"one":   traceOf(ix, touch(0, 1000, 1, true)),
		"last":  traceOf(ix, touch(0, 1<<20-1, 1, false)),
		"long":  traceOf(ix, touch(0, 0, 1, false), touch(3600*1000, 1, 1, true)),
	} {
		for _, o := range []Options{{Index: ix, Metadata: []int{0}, Width: 600, Height: 400}, {Width: MinSize, Height: MinSize}, {Width: 700, Height: 320}} {
			p := picture(t, x, o)
			_, texts, _ := drawn(t, p)
			if empty := slices.Contains(texts, "nothing was read"); empty != (name == "empty") {
				t.Errorf("%s: %q", name, texts)
			}
			marks := 0
			for _, s := range p.series {
				marks += len(s.hits) + len(s.misses)
			}
			if marks != len(x.Touches) {
				t.Errorf("%s: %d marks", name, marks)
			}
		}
	}
}

// In a merged trace time goes back; the curves do not.
func TestMerged(t *testing.T) {
	ix := device(t, 2, 1<<20)
	merged, err := tracefile.Merge(
		traceOf(ix, touch(0, 0, 4, true), touch(5, 1500, 4, true), touch(100, 1100, 8, true)),
		traceOf(ix, touch(0, 0, 4, true), touch(110, 1100, 8, true)),
	)
	if err != nil {
		t.Fatal(err)
	}
	back := slices.IsSortedFunc(merged.Touches, func(a, b tracefile.Touch) int { return int(a.At - b.At) })
	if back {
		t.Fatal("time does not go back: this tests nothing")
	}
	p := picture(t, merged, Options{Index: ix, Metadata: []int{0}})
	for _, c := range [][]tracefile.Sum{p.all, p.series[0].curve} {
		if !slices.IsSortedFunc(c, func(a, b tracefile.Sum) int { return int(a.At - b.At) }) {
			t.Errorf("the curve goes back: %v", c)
		}
	}
	if p.missed != nil {
		t.Error("all were misses, and have a line of their own")
	}
	if !strings.HasPrefix(p.about, "2 starts, median times: 64 KiB of a device of 4 GiB read in 3 ranges within 100 ms") {
		t.Errorf("about: %s", p.about)
	}
	drawn(t, p)
}

// Same trace, same bytes.
func TestSame(t *testing.T) {
	ix := device(t, 20, 1<<20)
	var touches []tracefile.Touch
	for i := range uint32(2000) {
		touches = append(touches, touch(int(i*7%501), i*10, 1+i%9, i%3 == 0))
	}
	one, _, _ := drawn(t, picture(t, traceOf(ix, touches...), Options{Index: ix, Metadata: []int{0}, Width: 400, Height: 400}))
	for range 3 {
		if two, _, _ := drawn(t, picture(t, traceOf(ix, touches...), Options{Index: ix, Metadata: []int{0}, Width: 400, Height: 400})); one != two {
			t.Fatal("two pictures of the same trace differ")
		}
	}
}

func TestRefused(t *testing.T) {
	ix, other := device(t, 2, 1<<20), device(t, 3, 1<<20)
	if _, err := New(traceOf(ix), Options{Index: other}); !errors.Is(err, tracefile.ErrOtherImage) {
		t.Errorf("a trace of another image: %v", err)
	}
	for _, o := range []Options{{Width: 10}, {Height: 1 << 20}, {Width: -1}} {
		if _, err := New(traceOf(ix), o); err == nil {
			t.Errorf("%+v is no size", o)
		}
	}
}

// Free space is folded, what was only not read is not where an index says so.
func TestFold(t *testing.T) {
	const mib = 256 // blocks
	ix := device(t, 4, 2048*mib)
	points, err := traceOf(ix, touch(0, 0, 1, true), touch(1, 3999, 1, true), touch(2, 2048*mib-1, 1, true)).Points(ix)
	if err != nil {
		t.Fatal(err)
	}
	f := newFold(points, ix)
	if len(f.gaps) != 1 || f.gaps[0].Start != 4000*4096 || f.gaps[0].End != (2048*mib-1)*4096 {
		t.Errorf("with an index %v are folded", f.gaps)
	}
	if g := newFold(points, nil); len(g.gaps) != 2 {
		t.Errorf("without one %v are folded", g.gaps)
	}
	last := -1.0
	for off := int64(0); off <= f.end; off += 1 << 20 {
		at := f.at(off)
		if at <= last || at > 1 {
			t.Fatalf("offset %d is at %v, after %v", off, at, last)
		}
		last = at
	}
	if f.at(0) != 0 || math.Abs(f.at(f.end)-1) > 1e-9 {
		t.Errorf("from %v to %v", f.at(0), f.at(f.end))
	}
	if from, to := f.at(f.gaps[0].Start), f.at(f.gaps[0].End); math.Abs(to-from-gapWidth) > 1e-9 {
		t.Errorf("the folded stretch is from %v to %v", from, to)
	}
	for _, n := range []int{2, 5, 12} {
		ticks := f.ticks(n)
		if len(ticks) < 2 || len(ticks) > 2*n+2 || ticks[0].label != "0" {
			t.Errorf("%d ticks: %v", n, ticks)
		}
		for _, x := range ticks {
			if x.at > f.at(f.gaps[0].Start)+1e-9 && x.at < f.at(f.gaps[0].End)-1e-9 {
				t.Errorf("a tick %v in a folded stretch", x)
			}
		}
	}
}

func TestTicks(t *testing.T) {
	labels := func(ticks []tick) string {
		var s []string
		for _, x := range ticks {
			s = append(s, x.label)
		}
		return strings.Join(s, " ")
	}
	for _, c := range []struct {
		span time.Duration
		n    int
		want string
	}{
		{time.Millisecond, 5, "0.0 0.2 0.4 0.6 0.8 1.0"},
		{123 * time.Millisecond, 5, "0 50 100"},
		{800 * time.Millisecond, 10, "0.0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8"},
		{7500 * time.Millisecond, 8, "0 1 2 3 4 5 6 7"},
		{90 * time.Second, 5, "0 20 40 60 80"},
	} {
		if got := labels(timeTicks(c.span, c.n)); got != c.want {
			t.Errorf("%v in %d: %s, want %s", c.span, c.n, got, c.want)
		}
	}
	if got, want := labels(byteTicks(200<<20, 5)), "0 64 MiB 128 MiB 192 MiB"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func BenchmarkPicture(b *testing.B) {
	random := rand.New(rand.NewPCG(1, 2))
	x := &tracefile.Trace{Header: tracefile.Header{Blocks: 1 << 21, Starts: 1}}
	for i := range uint32(100_000) {
		x.Touches = append(x.Touches, touch(random.IntN(60_000), i*20, 1+random.Uint32N(20), i%2 == 0))
	}
	for b.Loop() {
		p, err := New(x, Options{})
		if err != nil {
			b.Fatal(err)
		}
		if err := p.WriteSVG(io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}
