package flatten

import (
	"archive/tar"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// noise is content that does not compress.
func noise(seed uint64, n int) string {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte(binary.LittleEndian.AppendUint64(make([]byte, 24), seed))).Read(b) // it has no errors
	return string(b)
}

// deep is a path of n directories.
func deep(n int, part string) string {
	return strings.TrimSuffix(strings.Repeat(part+"/", n), "/")
}

var long = strings.Repeat("n", 255)

var nameCases = []treeCase{
	{
		name: "names of 255 bytes",
		layers: layers(lines(
			dir(long), reg(long+"/"+long, "x"), reg(long+"/"+strings.Repeat("é", 127)+"e", "y"), symlink(long+"/"+long[1:], long), hardlink(long[2:], long+"/"+long),
		)),
	},
	{
		name: "names of any bytes",
		layers: func(t testing.TB) [][]byte {
			l := []line{dir("d")}
			for c := 1; c < 256; c++ {
				if c != '/' && c != '.' {
					l = append(l, reg("d/"+string([]byte{byte(c)}), fmt.Sprint(c)))
				}
			}
			l = append(l, reg("d/...", "three dots"), reg("d/.hidden", "x"), reg("d/new\nline", "x"), reg(`d/back\slash`, "x"), reg(`d/\134\n`, "x"),
				reg("d/\xff\xfe\xfd", "x"), reg("d/\xc3", "half a letter"), reg("d/ space ", "x"), reg("d/-rf", "x"), reg("d/.wh", "x"), reg("d/wh.x", "x"), reg("d/=1", "x"))
			return [][]byte{tarball(t, l...)}
		},
	},
	{
		name: "a first name like a compressed file",
		layers: layers(
			lines(raw(headerBlock('0', "\x1f\x8b\x08 gzip", 0, nil))),
			lines(raw(headerBlock('0', "\x28\xb5\x2f\xfd zstd", 0, nil))),
			lines(raw(headerBlock('0', "\x50\x2a\x4d\x18 a frame to skip", 0, nil))),
		),
		store:   plain,
		implied: []string{"\x28\xb5"},
	},
	{
		name: "a directory whose index has two levels",
		layers: func(t testing.TB) [][]byte {
			l := []line{dir("many")}
			// An index block of ext4 has room for some 500 leaves of 39 such names.
			for i := range 30_000 {
				l = append(l, reg(fmt.Sprintf("many/%095d", i), "").with(func(h *tar.Header) { h.Format, h.ModTime = tar.FormatUSTAR, time.Unix(int64(i), 0) }))
			}
			return [][]byte{tarball(t, l...)}
		},
		store:   plain,
		noUmoci: "two programs take too long: tar is asked",
	},
	{
		name: "deeper than 100",
		layers: func(t testing.TB) [][]byte {
			var l []line
			for n := 1; n <= 300; n++ {
				l = append(l, dir(deep(n, "d")))
			}
			return [][]byte{tarball(t, append(l, reg(deep(300, "d")+"/leaf", "x"))...)}
		},
	},
	{
		name: "paths of almost 4096 bytes",
		layers: func(t testing.TB) [][]byte {
			var l []line
			for n := 1; n <= 15; n++ {
				l = append(l, dir(deep(n, long)))
			}
			return [][]byte{tarball(t, append(l, reg(deep(15, long)+"/leaf", "x"), hardlink("leaf", deep(15, long)+"/leaf"))...)}
		},
		want: map[string]string{"leaf": text("x"), deep(15, long): "dir"},
	},
	{
		name: "dots and slashes",
		layers: layers(lines(
			dir("./"), dir("./d"), reg("./d/dot", "x"), reg("d//double", "x"), reg("././d/./dots", "x"), reg("d/sub/../up", "x"),
		)),
		listed: true,
		noTar:  "it refuses ..",
		want:   map[string]string{"d/up": text("x"), "d/sub": gone},
	},
	{
		name: "absolute names",
		layers: layers(
			lines(dir("/d"), reg("/d/f", "x"), hardlink("/d/h", "/d/f"), symlink("/d/s", "/d/f"), reg("//d//g", "x"), reg("/gone", "x")),
			lines(whiteout("/gone")),
		),
		want: map[string]string{"d/s": "-> /d/f", "gone": gone},
	},
	{
		name: "names that lead out of the root",
		layers: layers(lines(
			reg("../up", "x"), reg("/../../up2", "y"), dir("d"), reg("d/../../../up3", "z"), hardlink("up4", "../../up"),
		)),
		noTar: "it refuses ..",
		want:  map[string]string{"up": text("x"), "up2": text("y"), "up3": text("z"), "up4": text("x")},
	},
	{
		name: "parents that no layer lists",
		layers: layers(
			lines(reg("a/b/c/f", "x"), symlink("l/m/s", "f"), fifo("p/q")),
			lines(reg("a/b2/f", "y"), hardlink("h/i/j", "a/b/c/f")),
		),
		implied: []string{"a", "a/b", "a/b/c", "l", "l/m", "p", "a/b2", "h", "h/i"},
	},
	{
		name: "a parent that is listed behind what is in it",
		layers: layers(lines(
			reg("d/f", "x"), dir("d").with(mode(0o711)).with(owner(7, 8)).with(mtime(9, 10)), reg("d/g", "x"),
		)),
	},
	{
		name: "under a symlinked parent",
		layers: layers(
			lines(dir("usr"), dir("usr/lib"), reg("usr/lib/old", "x"), symlink("lib", "usr/lib"), symlink("lib64", "/usr/lib"),
				symlink("away", "../../../../usr/./lib/../lib"), symlink("twice", "lib64"), reg("usr/lib/gone", "x"), reg("usr/lib/gone2", "x")),
			lines(reg("lib/new", "1"), reg("lib64/abs", "2"), reg("away/up", "3"), dir("twice/sub"), reg("twice/sub/f", "4"), hardlink("lib/hard", "lib64/old"),
				whiteout("lib/gone"), whiteout("twice/gone2")),
		),
		noTar: "it follows absolute links out of the root",
		want: map[string]string{"lib": "-> usr/lib", "usr/lib/new": text("1"), "usr/lib/abs": text("2"), "usr/lib/up": text("3"),
			"usr/lib/sub/f": text("4"), "usr/lib/hard": text("x"), "usr/lib/gone": gone, "usr/lib/gone2": gone},
	},
	{
		name: "a symlink that is replaced by a directory",
		layers: layers(
			lines(dir("usr"), dir("usr/lib"), reg("usr/lib/old", "x"), symlink("lib", "usr/lib")),
			lines(dir("lib"), reg("lib/new", "y")),
		),
		want: map[string]string{"lib": "dir", "lib/new": text("y"), "usr/lib/old": text("x"), "usr/lib/new": gone},
	},
	{
		name: "under a symlink to nothing",
		layers: layers(
			lines(symlink("lib", "usr/lib")),
			lines(reg("lib/f", "x")),
		),
		implied: []string{"usr", "usr/lib"},
		noTar:   "it does not make what a link leads to",
		want:    map[string]string{"lib": "-> usr/lib", "usr/lib/f": text("x")},
	},
	{
		name: "symlinks over symlinks",
		layers: layers(
			lines(dir("a"), dir("b"), reg("a/f", "a"), reg("b/f", "b"), symlink("l", "a")),
			lines(symlink("l", "b"), reg("l/g", "g")),
			lines(reg("l", "a file")),
		),
		want: map[string]string{"b/g": text("g"), "a/g": gone, "l": text("a file")},
	},
	{
		name: "a name with a slash at its end that is no directory",
		layers: layers(lines(
			raw(headerBlock('0', "f/", 3, nil), padded("abc")),
			raw(headerBlock('\x00', "d/", 0, nil)), // a directory, before ustar
			raw(headerBlock('\x00', "old", 3, nil), padded("abc")),
			raw(headerBlock('7', "contiguous", 3, nil), padded("abc")),
		)),
		noTar:   "it takes f/ for a directory",
		noUmoci: "it does not know old directories, nor contiguous files",
		want:    map[string]string{"f": text("abc"), "d": "dir", "old": text("abc"), "contiguous": text("abc")},
	},
	{
		name: "many hard links",
		layers: func(t testing.TB) [][]byte {
			l := []line{reg("f", "x").with(func(h *tar.Header) { h.Uname, h.Gname = "somebody", "users" })}
			for i := range 2000 {
				l = append(l, hardlink(fmt.Sprintf("link %d", i), "f"))
			}
			return [][]byte{tarball(t, l...)}
		},
	},
}
