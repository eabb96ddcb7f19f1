package flatten

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"strings"
	"testing"

	"thaw/blockmap/ext4"
)

// The names and steps that entries cost are counted, not timed.

func (n *node) dirs() int {
	total := 0
	if n.isDir() {
		total = 1
	}
	for _, child := range n.names {
		total += child.dirs()
	}
	return total
}

func entryOf(name string, mode uint32) *entry {
	return &entry{name: name, inode: &ext4.Inode{Mode: mode}}
}

// applyAll applies entries of the next layer, and says at which it failed.
func applyAll(t *tree, entries ...*entry) (int, error) {
	t.begin()
	for i, e := range entries {
		if err := t.apply(e, 1); err != nil {
			return i, err
		}
	}
	return len(entries), nil
}

// Names of as many directories as fit in one: a tar of megabytes, of which kilobytes
// are left when it is compressed, would make millions of them.
func TestImpliedDirectories(t *testing.T) {
	tr := newTree()
	var entries []*entry
	for i := range 10_000 {
		entries = append(entries, entryOf(fmt.Sprintf("%d/", i)+strings.Repeat("x/", 2040)+"f", modeRegular))
	}
	n, err := applyAll(tr, entries...)
	if !errors.Is(err, errImplied) || n > 100 {
		t.Errorf("after %d entries: %v", n, err)
	}
	if dirs := tr.root.dirs(); dirs > impliedBase+1+100*impliedEntry {
		t.Errorf("%d directories", dirs)
	}
	// Layers that list only files are honest.
	tr, entries = newTree(), nil
	for i := range 100_000 {
		entries = append(entries, entryOf(fmt.Sprintf("usr/lib/app/%d/a/b/c/d/e/f/g/h/file", i), modeRegular))
	}
	if n, err := applyAll(tr, entries...); err != nil {
		t.Errorf("after %d entries: %v", n, err)
	}
	if tr.names != 100_000*10+3 {
		t.Errorf("%d names", tr.names)
	}
}

// Entries that each walk as many symbolic links as one can, of the greatest length.
func TestFollowedLinks(t *testing.T) {
	tr := newTree()
	var entries []*entry
	target := strings.Repeat("./", 2040)
	for i := range 39 {
		entries = append(entries, &entry{name: fmt.Sprint("l", i), inode: &ext4.Inode{Mode: modeSymlink, Target: target + fmt.Sprint("l", i+1)}})
	}
	entries = append(entries, entryOf("l39", modeDir))
	for i := range 10_000 {
		entries = append(entries, entryOf(fmt.Sprint("l0/", i), modeRegular))
	}
	n, err := applyAll(tr, entries...)
	if !errors.Is(err, errFollowed) || n > 2000 {
		t.Errorf("after %d entries: %v", n, err)
	}
	// And a lookup finds nothing, rather than to walk on.
	if _, found := tr.find("/l0"); found != nil {
		t.Error("found")
	}
	// /bin and the like are honest, and so are links to links.
	tr, entries = newTree(), nil
	for i := range 10 {
		entries = append(entries, &entry{name: fmt.Sprint("l", i), inode: &ext4.Inode{Mode: modeSymlink, Target: fmt.Sprint("/usr/share/../l", i+1)}})
		entries = append(entries, &entry{name: fmt.Sprint("usr/l", i+1), inode: &ext4.Inode{Mode: modeSymlink, Target: fmt.Sprint("../l", i+1)}})
	}
	entries = append(entries, entryOf("usr/share", modeDir), entryOf("l10", modeDir))
	for i := range 200_000 {
		entries = append(entries, entryOf(fmt.Sprint("l0/", i), modeRegular))
	}
	if n, err := applyAll(tr, entries...); err != nil {
		t.Errorf("after %d entries: %v", n, err)
	}
}

// The tree is no deeper than the paths that Linux takes, whatever links lead down.
func TestDepth(t *testing.T) {
	tr := newTree()
	deepest := strings.TrimSuffix(strings.Repeat("x/", 2040), "/")
	if n, err := applyAll(tr, entryOf(deepest, modeDir),
		&entry{name: "down", inode: &ext4.Inode{Mode: modeSymlink, Target: deepest}},
		entryOf("down/"+strings.Repeat("y/", 100)+"f", modeRegular)); n != 2 || err == nil || !strings.Contains(err.Error(), "deep") {
		t.Errorf("entry %d: %v", n, err)
	}
	if err := layOut(t, tr); err != nil {
		t.Error(err)
	}
}

// A file in the place of a directory takes away what was in it, from the number of
// names too, and so do whiteouts.
func TestCountedNames(t *testing.T) {
	tr := newTree()
	l := []*entry{entryOf("d", modeDir), entryOf("d/e/f", modeRegular), entryOf("g", modeRegular), {kind: kindHardLink, name: "d/h", link: "g"}}
	for range 3 {
		if _, err := applyAll(tr, l...); err != nil || tr.names != 5 || tr.root.count() != 6 {
			t.Errorf("%d names, counted %d: %v", tr.names, tr.root.count()-1, err)
		}
	}
	for _, x := range []struct {
		*entry
		want int
	}{
		{&entry{kind: kindWhiteout, name: "d/e"}, 3}, {entryOf("d", modeRegular), 2}, {entryOf("d", modeDir), 2},
		{entryOf("d/1/2/3", modeDir), 5}, {&entry{kind: kindOpaque, name: "d"}, 2}, {&entry{kind: kindWhiteout, name: "d"}, 1},
	} {
		if _, err := applyAll(tr, x.entry); err != nil || tr.names != x.want || tr.root.count() != x.want+1 {
			t.Errorf("%d %s: %d names, counted %d, want %d: %v", x.kind, x.name, tr.names, tr.root.count()-1, x.want, err)
		}
	}
	tr.names = maxNames
	if _, err := applyAll(tr, entryOf("one more", modeRegular)); err == nil || !strings.Contains(err.Error(), "files") {
		t.Errorf("%v", err)
	}
}

// Whiteouts of a large directory again and again, of it and of what it is in: each
// name is looked at once. The loop would be 10^11 steps otherwise, which no test
// survives.
func TestRepeatedWhiteouts(t *testing.T) {
	tr := newTree()
	const files, whiteouts = 200_000, 500_000
	var entries []*entry
	for i := range files {
		entries = append(entries, entryOf(fmt.Sprint("a/b/c/", i), modeRegular))
	}
	if _, err := applyAll(tr, entries...); err != nil {
		t.Fatal(err)
	}
	for i := range files {
		entries = append(entries, entryOf(fmt.Sprint("a/b/c/new", i), modeRegular))
	}
	entries = entries[files:]
	for i := range whiteouts {
		kind := kindOpaque
		if i%2 == 0 {
			kind = kindWhiteout
		}
		entries = append(entries, &entry{kind: kind, name: []string{"a/b/c", "a/b", "a"}[i%3]})
	}
	if _, err := applyAll(tr, entries...); err != nil {
		t.Fatal(err)
	}
	if tr.names != files+3 || tr.root.count() != files+4 {
		t.Errorf("%d names, counted %d", tr.names, tr.root.count()-1)
	}
}

// What a whiteout says of a directory does not depend on where in the layer it
// stands, nor on how often it comes, nor on what came in the layer before.
func TestWhiteoutsInAnyOrder(t *testing.T) {
	lower := []*entry{entryOf("d", modeDir|0o700), entryOf("d/old", modeRegular), entryOf("d/e", modeDir|0o700), entryOf("d/e/old", modeRegular)}
	own := []*entry{entryOf("d/e/new", modeRegular), entryOf("d/f/new", modeRegular)}
	for _, w := range []*entry{{kind: kindOpaque, name: "d"}, {kind: kindWhiteout, name: "d"}} {
		for at := range len(own) + 1 {
			for again := range len(own) + 1 {
				tr := newTree()
				upper := append(append(append([]*entry{}, own[:at]...), w), own[at:]...)
				upper = append(append(append([]*entry{}, upper[:again]...), w), upper[again:]...)
				for _, l := range [][]*entry{lower, upper} {
					if _, err := applyAll(tr, l...); err != nil {
						t.Fatal(err)
					}
				}
				_, d := tr.find("/d")
				mode := uint32(modeDir | 0o700)
				if w.kind == kindWhiteout {
					mode = modeDir | 0o755
				}
				if tr.names != 5 || d == nil || d.inode.Mode != mode {
					t.Errorf("%d at %d and %d: %d names, mode %o", w.kind, at, again, tr.names, d.inode.Mode)
				}
			}
		}
	}
}

// The path bomb: names of a MiB each, which a few KiB of gzip hold, cost nothing.
func TestPathBomb(t *testing.T) {
	var l []line
	for i := range 4 {
		l = append(l, reg(fmt.Sprint(i, "/")+strings.Repeat("x/", 500_000)+"f", ""))
	}
	src := newSource(t, gzipped, tarball(t, l...))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	o := testOptions
	o.TempDir = t.TempDir()
	_, err := Build(t.Context(), &src.Source, newTarget(t), o)
	runtime.ReadMemStats(&after)
	if err == nil || !strings.Contains(err.Error(), "the limit of Linux is 4096") || len(err.Error()) > 1000 {
		t.Errorf("%.2000v", err)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 128<<20 {
		t.Errorf("%d MiB", n>>20)
	}
}

// A header of 512 bytes that asks for 16 TiB of zeros. (The limit is lower here: to
// pack the 64 GiB that a layer may have takes long.)
func TestHoleBomb(t *testing.T) {
	sparseOf := func(size string) []byte {
		return headerBlock('S', "sparse", 0, map[int]string{257: "ustar  \x00", 386: size + "00000000000\x00", 483: size})
	}
	c, err := newCompressor(DefaultChunkSize, 1, 1)
	if err != nil {
		t.Fatal(err)
	}
	p := newPacker(newStreamWriter(t.Context(), c, io.Discard))
	var toc tocWriter
	// 15 TiB, in base 256.
	err = readTar(t.Context(), bytes.NewReader(sparseOf("\x80\x00\x00\x00\x00\x00\x0f\x00\x00\x00\x00\x00")), p, &toc, 1<<30, slog.New(slog.DiscardHandler))
	if _, closed := p.finish(err); closed == nil || !strings.Contains(closed.Error(), "holes") {
		t.Errorf("%v", closed)
	}
}

// sparseFile counts holes over the files of a layer, and nothing else.
func TestHoles(t *testing.T) {
	in := &tally{r: bytes.NewReader(make([]byte, 1000))}
	s := &sparseFile{r: in, in: in, left: 150}
	if b, err := io.ReadAll(io.LimitReader(s.next(), 500)); err != nil || len(b) != 500 || s.holes != 0 {
		t.Errorf("%d bytes, %d of holes: %v", len(b), s.holes, err)
	}
	s.r = bytes.NewReader(make([]byte, 1000)) // which reads nothing from the tar
	for i := range 3 {
		_, err := io.ReadAll(io.LimitReader(s.next(), 60))
		if (err != nil) != (i == 2) {
			t.Errorf("%d: %v", i, err)
		}
	}
}

// What an ELF file names is kept up to a bound, however many times it names it.
func TestELFNames(t *testing.T) {
	var needed []string
	for range maxNeeded {
		needed = append(needed, strings.Repeat("x", maxString))
	}
	c, in := elfOf(t, []byte(madeELF{needed: needed}.bytes()))
	f, err := readELF(t.Context(), c, in)
	if err != nil {
		t.Fatal(err)
	}
	total := 0
	for _, s := range f.needed {
		total += len(s)
	}
	if total == 0 || total > maxStrings {
		t.Errorf("%d bytes of names", total)
	}
	l := &linker{machine: f}
	f.rpath = strings.Repeat("$ORIGIN:", 500)
	total = 0
	for _, dir := range l.object(f, strings.Repeat("y", 4000), nil).rpath {
		total += len(dir)
	}
	if total == 0 || total > maxStrings {
		t.Errorf("%d bytes of directories", total)
	}
}

// Layers of aufs hard-link to what it keeps aside.
func TestPseudoLinks(t *testing.T) {
	tr := newTree()
	in := &ext4.Inode{Mode: modeRegular, Size: 7}
	if _, err := applyAll(tr, &entry{name: ".wh..wh.plnk/1.2", inode: in},
		&entry{kind: kindHardLink, name: ".wh..wh.plnk/3.4", link: ".wh..wh.plnk/1.2"},
		&entry{kind: kindHardLink, name: "usr/bin/a", link: ".wh..wh.plnk/1.2"},
		&entry{kind: kindHardLink, name: "usr/bin/b", link: ".wh..wh.plnk/3.4"}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"/usr/bin/a", "/usr/bin/b"} {
		if _, n := tr.find(name); n == nil || n.inode != in {
			t.Errorf("%s is %v", name, n)
		}
	}
	if tr.root.count() != 5 {
		t.Errorf("%d names", tr.root.count()-1)
	}
	// They are of one layer.
	if n, err := applyAll(tr, &entry{kind: kindHardLink, name: "c", link: ".wh..wh.plnk/1.2"}); n != 0 || err == nil {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := applyAll(tr, entryOf(".wh..wh.plnk/d", modeDir)); err == nil {
		t.Error("a directory is a pseudo-link")
	}
	// In a tar they come with all that aufs leaves.
	drop := func(string, string) {}
	for name, want := range map[string]bool{
		".wh..wh.plnk/1.2": true, "./.wh..wh.plnk/1.2": true, "/.wh..wh.plnk/.wh.x": true,
		".wh..wh.plnk": false, ".wh..wh.plnk/d/e": false, ".wh..wh.aufs": false, ".wh..wh.orph/1": false, "d/.wh..wh.plnk/1": false,
	} {
		e, err := fromHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, drop)
		if err != nil || (e != nil) != want || e != nil && !isPlink(e.name) {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
	}
	if e, err := fromHeader(&tar.Header{Typeflag: tar.TypeDir, Name: ".wh..wh.plnk/d/"}, drop); e != nil || err != nil {
		t.Errorf("%v, %v", e, err)
	}
}
