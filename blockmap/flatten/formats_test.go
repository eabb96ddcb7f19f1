package flatten

import (
	"archive/tar"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// sparseTree makes files with holes of several sorts.
func sparseTree(t testing.TB) func(dir string) {
	return func(dir string) {
		for name, at := range map[string][]int64{
			"start and end": {0, 3 << 20}, "within": {1 << 20, 2<<20 + 5}, "hole only": nil, "one byte": {5 << 20},
			"many":                             {0, 1 << 18, 1 << 19, 3 << 18, 1 << 20, 5 << 18, 6 << 18, 7 << 18, 2 << 20, 3 << 20, 4 << 20},
			strings.Repeat("a long name ", 20): {1 << 20},
		} {
			f, err := os.Create(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			for _, off := range at {
				if _, err := f.WriteAt([]byte(noise(uint64(off), 5000)), off); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.Truncate(6<<20 + 7); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func gnuCase(name string, setup func(t testing.TB) func(dir string), args ...string) treeCase {
	return treeCase{name: name, listed: true, layers: func(t testing.TB) [][]byte {
		return [][]byte{gnuTar(t, setup(t), append(args, ".")...)}
	}}
}

// longTree has names and link targets beyond what a ustar header holds.
func longTree(t testing.TB) func(dir string) {
	return func(dir string) {
		d := filepath.Join(dir, deep(5, strings.Repeat("d", 90)))
		writeFile(t, filepath.Join(d, long), []byte("x"))
		if err := os.Symlink(strings.Repeat("target/", 300), filepath.Join(d, "link")); err != nil {
			t.Fatal(err)
		}
		if err := os.Link(filepath.Join(d, long), filepath.Join(d, "hard")); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(filepath.Join(d, "hard"), time.Time{}, someTime); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(filepath.Join(d, "hard"), 3_000_000, 4_000_000); err != nil {
			t.Fatal(err)
		}
	}
}

var mixed = lines(dir("d"), reg("d/f", noise(5, 200_000)), symlink("d/s", "f"), hardlink("d/h", "d/f"), reg("text", strings.Repeat("text ", 10_000)))

var formatCases = []treeCase{
	gnuCase("GNU long names", longTree, "--format=gnu"),
	gnuCase("pax long names", longTree, "--format=pax"),
	func() treeCase {
		c := gnuCase("GNU sparse", sparseTree, "--sparse", "--format=gnu")
		c.noUmoci = "it does not know them"
		return c
	}(),
	gnuCase("pax sparse 0.0", sparseTree, "--sparse", "--format=pax", "--sparse-version=0.0"),
	gnuCase("pax sparse 0.1", sparseTree, "--sparse", "--format=pax", "--sparse-version=0.1"),
	gnuCase("pax sparse 1.0", sparseTree, "--sparse", "--format=pax", "--sparse-version=1.0"),
	gnuCase("old GNU", func(t testing.TB) func(string) {
		return func(dir string) { writeFile(t, filepath.Join(dir, "d", "f"), []byte("x")) }
	}, "--format=oldgnu"),
	gnuCase("v7", func(t testing.TB) func(string) {
		return func(dir string) { writeFile(t, filepath.Join(dir, "d", "f"), []byte("x")) }
	}, "--format=v7"),
	{
		name: "ustar with a prefix",
		layers: layers(lines(
			line{Header: tar.Header{Typeflag: tar.TypeReg, Name: deep(3, strings.Repeat("p", 50)) + "/name", Mode: 0o600, ModTime: time.Unix(5, 0), Format: tar.FormatUSTAR}},
		)),
		implied: []string{deep(1, strings.Repeat("p", 50)), deep(2, strings.Repeat("p", 50)), deep(3, strings.Repeat("p", 50))},
	},
	{
		name: "a global pax header",
		layers: layers(lines(
			line{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "0123"}, Format: tar.FormatPAX}},
			reg("f", "x"),
		)),
		noUmoci: "it fails",
	},
	{
		name: "pax records that override the header",
		layers: layers(lines(
			raw(headerBlock('x', "pax", int64(len(overriding)), nil), padded(overriding), headerBlock('0', "short", 0, nil), padded("twelve bytes")),
		)),
		want: map[string]string{"the real name": text("twelve bytes"), "short": gone},
	},
	{
		name: "no end mark",
		layers: func(t testing.TB) [][]byte {
			return [][]byte{append(headerBlock('0', "f", 3, nil), padded("abc")...)}
		},
		want:  map[string]string{"f": text("abc")},
		noTar: "it fails",
	},
	{
		name: "bytes behind the end mark",
		layers: func(t testing.TB) [][]byte {
			return [][]byte{append(tarball(t, reg("f", "abc")), noise(1, 50_000)...)}
		},
		want: map[string]string{"f": text("abc")},
	},
	{name: "plain", layers: layers(mixed), store: plain},
	{name: "gzip", layers: layers(mixed), store: gzipped},
	{name: "gzip of several members", layers: layers(mixed), store: inParts(gzipped)},
	{name: "zstd", layers: layers(mixed), store: zstdded},
	{name: "zstd of several frames", layers: layers(mixed), store: inParts(zstdded)},
	{
		name: "zstd behind a frame to skip", layers: layers(mixed),
		store: func(t testing.TB, b []byte) []byte {
			return append([]byte("\x5a\x2a\x4d\x18\x04\x00\x00\x00abcd"), zstdded(t, b)...)
		},
	},
	{
		name: "zstd of the tool, with a long window", layers: layers(mixed),
		store: func(t testing.TB, b []byte) []byte { return pipe(t, b, "zstd", "-c", "--long=27", "-5") },
	},
	{
		name: "gzip of the tool", layers: layers(mixed),
		store: func(t testing.TB, b []byte) []byte { return pipe(t, b, "gzip", "-c", "-9") },
	},
}

var overriding = paxRecords("path", "the real name", "mtime", "1700000000.5", "uid", "100000", "gid", "200000", "size", "12")
