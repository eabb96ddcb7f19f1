package flatten

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"reflect"
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
	toc, err := openTOC(blob)
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
		{"too many attributes", file(modeFifo, u(1<<30)), "records"},
		{"an attribute of gigabytes", file(modeFifo, u(1), str("user.x"), u(1<<32)), "at most"},
		{"a file beyond ext4", file(modeRegular, u(0, maxFileSize+1)), "at most"},
		{"too many runs", file(modeRegular, u(0, 1, 1<<30)), "records"},
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
			toc, err := openTOC(sealTOC(t, append(bytes.Clone(head), c.body...)))
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
		if err = tr.applyLayer(t.Context(), blob, 1); err == nil {
			err = layOut(t, tr, *tableOf(100))
		}
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("error %v, want one that says %q", err, name)
		}
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
		if _, err := openTOC(blob[:n]); !errors.Is(err, blockmap.ErrCorrupt) {
			t.Errorf("%d of %d bytes: %v", n, len(blob), err)
		}
		b := bytes.Clone(blob)
		b[n] ^= 0x10
		toc, err := openTOC(b)
		for err == nil {
			_, err = toc.read()
		}
		if err != io.EOF && !errors.Is(err, blockmap.ErrCorrupt) {
			t.Errorf("byte %d changed: %v", n, err)
		}
	}
}
