package flatten

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

// regularEntry is a file of size bytes from block 0 of its stream.
func regularEntry(name string, size int64) *entry {
	return &entry{name: name, inode: &ext4.Inode{
		Mode: modeRegular | 0o644, Size: size, Mtime: ext4.Time{Sec: -1, Nsec: 5},
		Data: []ext4.Run{{Block: 0, Count: uint32((size + blockSize - 1) / blockSize)}},
	}}
}

// tableOf is a table of a stream of that many blocks, one chunk.
func tableOf(blocks uint32) *blockmap.Table {
	return &blockmap.Table{BlobSize: 1000, Chunks: []blockmap.Chunk{{Stored: 900, Count: blocks}}}
}

func TestTOCRoundTrip(t *testing.T) {
	entries := []*entry{
		{name: "", inode: &ext4.Inode{Mode: modeDir | 0o1777}},
		{name: "dir", inode: &ext4.Inode{Mode: modeDir, UID: math.MaxUint32, GID: math.MaxUint32, Mtime: ext4.Time{Sec: math.MinInt64, Nsec: 999_999_999},
			Atime: ext4.Time{Sec: math.MaxInt64}, Ctime: ext4.Time{Sec: -1, Nsec: 1}}},
		regularEntry("dir/file", 5*blockSize-1),
		{name: "sparse", inode: &ext4.Inode{Mode: modeRegular | 0o7777, Size: maxFileSize, Data: []ext4.Run{
			{FileBlock: 0, Block: 90, Count: 10}, {FileBlock: 1 << 31, Block: 10, Count: 5}, {FileBlock: math.MaxUint32 - 1, Block: 50, Count: 1},
		}}},
		{name: "empty", inode: &ext4.Inode{Mode: modeRegular}},
		{name: "link\n\xff", link: "../to/../where/ever/", inode: &ext4.Inode{Mode: modeSymlink | 0o777, Target: "../to/../where/ever/"}},
		{name: "null", inode: &ext4.Inode{Mode: modeChar, Major: 4095, Minor: 1<<20 - 1}},
		{name: "disk", inode: &ext4.Inode{Mode: modeBlock}},
		{name: "fifo", inode: &ext4.Inode{Mode: modeFifo, Xattrs: []ext4.Xattr{{Name: "user.empty", Value: []byte{}}, {Name: "user.x", Value: []byte("\x00\xff")}}}},
		{kind: kindHardLink, name: "hard", link: "dir/file"},
		{kind: kindWhiteout, name: "dir/gone"},
		{kind: kindOpaque, name: ""},
	}
	var w tocWriter
	for _, e := range entries {
		w.add(e)
	}
	table := tableOf(100)
	blob, err := w.close(table)
	if err != nil {
		t.Fatal(err)
	}
	toc, err := openTOC(blob, math.MaxInt64)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(toc.table.Chunks, table.Chunks) {
		t.Errorf("chunks %+v", toc.table.Chunks)
	}
	for _, want := range entries {
		got, err := toc.read()
		if err != nil {
			t.Fatalf("%q: %v", want.name, err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v %+v, want %+v %+v", want.name, got, got.inode, want, want.inode)
		}
	}
	if _, err := toc.read(); err != io.EOF {
		t.Errorf("behind the last: %v", err)
	}
}

// TestTOCThatLies reads TOCs whose checksums are right and whose entries are not.
func TestTOCThatLies(t *testing.T) {
	head := tableOf(100).Append(nil)
	u := func(n ...uint64) (b []byte) {
		for _, v := range n {
			b = binary.AppendUvarint(b, v)
		}
		return b
	}
	str := func(s string) []byte { return append(u(uint64(len(s))), s...) }
	file := func(mode uint64, rest ...[]byte) []byte {
		b := append([]byte{byte(kindFile)}, str("f")...)
		b = append(b, u(mode, 0, 0, 0, 0, 0, 0, 0, 0)...)
		return append(append(b, bytes.Join(rest, nil)...), tocEnd)
	}
	zigzag := func(n int64) []byte { return binary.AppendVarint(nil, n) }
	for _, c := range []struct {
		name string
		body []byte
		says string
	}{
		{"no end", nil, "bytes wanted"},
		{"more behind the end", []byte{tocEnd, 0}, "too many"},
		{"an entry of no kind", append([]byte{9}, str("f")...), "kind 9"},
		{"a name that is not clean", append([]byte{byte(kindWhiteout)}, str("a/../b")...), "not clean"},
		{"a name that leads out", append([]byte{byte(kindWhiteout)}, str("../b")...), "not clean"},
		{"an absolute name", append([]byte{byte(kindOpaque)}, str("/b")...), "not clean"},
		{"a hard link that leads out", append(append([]byte{byte(kindHardLink)}, str("a")...), str("../b")...), "not clean"},
		{"a name of gigabytes", append([]byte{byte(kindWhiteout)}, u(1<<40)...), "at most"},
		{"a name that is cut short", append([]byte{byte(kindWhiteout)}, u(100)...), "left"},
		{"no type", file(0o644, u(0)), "mode 644"},
		{"a socket", file(0o140644, u(0)), "mode 140644"},
		{"a mode of more bits", file(1<<17, u(0)), "at most"},
		{"too many attributes", file(modeFifo, u(1<<30)), "at most"},
		{"an attribute of gigabytes", file(modeFifo, u(1), str("user.x"), u(1<<32)), "at most"},
		{"attributes of more than a file can have", file(modeFifo, u(2), str("user.x"), str(strings.Repeat("x", 40_000)), str("user.y"), str(strings.Repeat("x", 40_000))), "attributes of more than"},
		{"a name of more than 4096 bytes", append([]byte{byte(kindWhiteout)}, str(strings.Repeat("x/", 2048)+"x")...), "at most"},
		{"a hard link to more than 4096 bytes", append(append([]byte{byte(kindHardLink)}, str("a")...), str(strings.Repeat("x/", 2048)+"x")...), "at most"},
		{"a block of the stream twice", file(modeRegular, u(0, 300*blockSize, 2, 0), zigzag(0), u(100, 0), zigzag(-100), u(100)), "of more blocks than the 100"},
		{"a file beyond ext4", file(modeRegular, u(0, maxFileSize+1)), "at most"},
		{"too many runs", file(modeRegular, u(0, 1, 1<<30)), "at most"},
		{"a run behind the file's end", file(modeRegular, u(0, blockSize, 1, 1), zigzag(0), u(1)), "of a file of 1"},
		{"a run that is longer than the file", file(modeRegular, u(0, blockSize, 1, 0), zigzag(0), u(2)), "of a file of 1"},
		{"an empty run", file(modeRegular, u(0, blockSize, 1, 0), zigzag(0), u(0)), "of a file of 1"},
		{"a run behind the stream's end", file(modeRegular, u(0, 101*blockSize, 1, 0), zigzag(0), u(101)), "of a stream of 100"},
		{"a run that begins behind the stream's end", file(modeRegular, u(0, blockSize, 1, 0), zigzag(100), u(1)), "of a stream of 100"},
		{"a run before the stream", file(modeRegular, u(0, blockSize, 1, 0), zigzag(-1), u(1)), "of a stream of 100"},
		{"a run beyond 64 bits", file(modeRegular, u(0, 2*blockSize, 2, 0), zigzag(0), u(1, 0), zigzag(math.MaxInt64), u(1)), "of a stream of 100"},
		{"nanoseconds of more than a second", append(append([]byte{byte(kindFile)}, str("f")...), u(modeFifo, 0, 0, 0, 1e9)...), "at most"},
	} {
		t.Run(c.name, func(t *testing.T) {
			toc, err := openTOC(sealTOC(t, append(bytes.Clone(head), c.body...)), 1000)
			for err == nil {
				_, err = toc.read()
			}
			if !errors.Is(err, blockmap.ErrCorrupt) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
		})
	}
	// And these can be read, but not built from.
	for name, entries := range map[string][]*entry{
		"belongs to one file": {regularEntry("a", 100), regularEntry("b", 100)},
		"not a directory":     {{name: "", inode: &ext4.Inode{Mode: modeFifo}}},
		"255":                 {{name: strings.Repeat("x", 256), inode: &ext4.Inode{Mode: modeFifo}}},
		"NUL":                 {{name: "a\x00b", inode: &ext4.Inode{Mode: modeFifo}}},
	} {
		var w tocWriter
		for _, e := range entries {
			w.add(e)
		}
		blob, err := w.close(tableOf(100))
		if err != nil {
			t.Fatal(err)
		}
		tr := newTree()
		if err = tr.applyLayer(t.Context(), blob, 1, math.MaxInt64); err == nil {
			err = layOut(t, tr, *tableOf(100))
		}
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("error %v, want one that says %q", err, name)
		}
	}
}

// A table of contents that says little, and much of it: it is not held in memory,
// and what it says of its stream is no more than there is.
func TestTOCBomb(t *testing.T) {
	spent := func(f func()) uint64 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f()
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}
	read := func(blob []byte, stored int64) (n int, err error) {
		toc, err := openTOC(blob, stored)
		if err != nil {
			return 0, err
		}
		defer toc.close()
		for ; err == nil; n++ {
			_, err = toc.read()
		}
		return n - 1, err
	}
	empty := new(blockmap.Table).Append(nil)

	// 64 MiB of zeros are as many files of no name, as far as that goes.
	zeros := sealTOC(t, append(bytes.Clone(empty), make([]byte, 64<<20)...))
	if n := spent(func() {
		if _, err := read(zeros, 0); !errors.Is(err, blockmap.ErrCorrupt) {
			t.Errorf("zeros: %v", err)
		}
	}); n > 32<<20 {
		t.Errorf("zeros: %d bytes are read with %d MiB of memory", len(zeros), n>>20)
	}
	// Whiteouts: 3 bytes each, and more than any layer has.
	whiteouts := sealTOC(t, append(append(bytes.Clone(empty), bytes.Repeat([]byte{byte(kindWhiteout), 1, 'x'}, maxEntries+1)...), tocEnd))
	if n, err := read(whiteouts, 0); !errors.Is(err, blockmap.ErrCorrupt) || n != maxEntries || !strings.Contains(err.Error(), "entries") {
		t.Errorf("%d whiteouts: %v", n, err)
	}
	// A table of a million chunks, for a stream of a few.
	table := &blockmap.Table{BlobSize: 1 << 40, Chunks: make([]blockmap.Chunk, 1<<20)}
	for i := range table.Chunks {
		table.Chunks[i] = blockmap.Chunk{Stored: 20, Count: 1, Block: uint32(i), Offset: 20 * int64(i)}
	}
	chunks := sealTOC(t, append(table.Append(nil), tocEnd))
	for _, stored := range []int64{0, 1 << 20} {
		table.BlobSize = stored
		for name, blob := range map[string][]byte{"a blob that is larger": chunks, "a blob that is too small": sealTOC(t, append(table.Append(nil), tocEnd))} {
			if n := spent(func() {
				if _, err := read(blob, stored); !errors.Is(err, blockmap.ErrCorrupt) {
					t.Errorf("%s than %d bytes: %v", name, stored, err)
				}
			}); n > 8<<20 {
				t.Errorf("%s than %d bytes: %d MiB of memory", name, stored, n>>20)
			}
		}
	}
	table.BlobSize = 1 << 40
	if n, err := read(chunks, 1<<40); err != io.EOF || n != 0 {
		t.Errorf("%d entries, %v", n, err)
	}
	// Runs that are not there.
	runs := append(tableOf(1024).Append(nil), byte(kindFile), 1, 'f')
	for _, v := range []uint64{modeRegular, 0, 0, 0, 0, 0, 0, 0, 0, 0, maxFileSize, 1024} {
		runs = binary.AppendUvarint(runs, v)
	}
	if _, err := read(sealTOC(t, runs), 1000); !errors.Is(err, blockmap.ErrCorrupt) {
		t.Errorf("runs: %v", err)
	}
	// More bytes than a TOC may have, in few entries: each of 60 KB.
	attribute := append([]byte{byte(kindFile), 1, 'f'}, 0x80, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 1)
	attribute = append(binary.AppendUvarint(append(binary.AppendUvarint(attribute, 6), "user.x"...), 60_000), make([]byte, 60_000)...)
	large := sealTOC(t, append(append(bytes.Clone(empty), bytes.Repeat(attribute, 100)...), tocEnd))
	toc, err := openTOC(large, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer toc.close()
	toc.left = 3 << 20
	n := 0
	for ; err == nil; n++ {
		_, err = toc.read()
	}
	if !errors.Is(err, errTOCLimit) || !errors.Is(err, blockmap.ErrCorrupt) || n > 60 {
		t.Errorf("%d entries: %v", n, err)
	}
}

// TestTOCDamaged reads a TOC that was cut or changed.
func TestTOCDamaged(t *testing.T) {
	var w tocWriter
	w.add(regularEntry("f", 1))
	blob, err := w.close(tableOf(100))
	if err != nil {
		t.Fatal(err)
	}
	for n := range blob {
		cut, err := openTOC(blob[:n], math.MaxInt64)
		for err == nil {
			_, err = cut.read()
		}
		if !errors.Is(err, blockmap.ErrCorrupt) {
			t.Errorf("%d of %d bytes: %v", n, len(blob), err)
		}
		b := bytes.Clone(blob)
		b[n] ^= 0x10
		toc, err := openTOC(b, math.MaxInt64)
		for err == nil {
			_, err = toc.read()
		}
		if err != io.EOF && !errors.Is(err, blockmap.ErrCorrupt) {
			t.Errorf("byte %d changed: %v", n, err)
		}
	}
}
