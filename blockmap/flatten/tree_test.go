package flatten

import (
	"archive/tar"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// treeCase is an image, and what it means. It is unpacked by two other programs
// unless a reason is given why one of them cannot be asked.
type treeCase struct {
	name    string
	layers  func(t testing.TB) [][]byte
	store   func(testing.TB, []byte) []byte // how layers are stored; nil: gzip
	want    map[string]string               // names and, as describe writes it, what they are
	noUmoci string
	noTar   string

	// implied directories are listed by no layer, so programs differ in what
	// they make of them: here, root's, 0755 and of 1970. The root is one unless
	// listed is set.
	implied []string
	listed  bool

	// touched directories get a new time by umoci where it takes something
	// out of them.
	touched []string
}

// layers is for cases whose layers are plain lists.
func layers(all ...[]line) func(testing.TB) [][]byte {
	return func(t testing.TB) (tars [][]byte) {
		t.Helper()
		for _, l := range all {
			tars = append(tars, tarball(t, l...))
		}
		return tars
	}
}

func lines(l ...line) []line { return l }

// text is what a regular file is in want; gone what is not there.
func text(s string) string { return "file " + s }

const gone = ""

// brief describes an item for want.
func brief(t testing.TB, root, path string, i item) string {
	t.Helper()
	switch i.mode & modeType {
	case modeDir:
		return "dir"
	case modeSymlink:
		return "-> " + i.target
	case modeRegular:
		b, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			t.Fatal(err)
		}
		return text(string(b))
	case modeFifo:
		return "fifo"
	}
	return fmt.Sprintf("%d:%d", unix.Major(i.rdev), unix.Minor(i.rdev))
}

func TestTree(t *testing.T) {
	for _, set := range [][]treeCase{metadataCases, nameCases, layerCases, formatCases} {
		for _, c := range set {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				c.test(t)
			})
		}
	}
}

func (c *treeCase) test(t *testing.T) {
	need(t, "root", "e2fsck", "mount")
	if c.store == nil {
		c.store = gzipped
	}
	src := newSource(t, c.store, c.layers(t)...)
	dst := newTarget(t)
	res := build(t, src, dst, testOptions)
	device := assemble(t, res.Index, dst)
	fsck(t, device)
	root := mount(t, device)
	got := listing(t, root)
	delete(got, "lost+found")

	implied := c.implied
	if !c.listed {
		implied = append(implied, "")
	}
	for _, path := range implied {
		if i := got[path]; i.mode != modeDir|0o755 || i.uid != 0 || i.gid != 0 || i.sec != 0 || i.nsec != 0 {
			t.Errorf("%q, which no layer lists, is %+v", path, i)
		}
	}
	for path, want := range c.want {
		i, ok := got[path]
		if !ok && want != gone || ok && brief(t, root, path, i) != want {
			t.Errorf("%q is %.300q (%+v), want %.300q", path, brief(t, root, path, i), i, want)
		}
	}
	if c.noUmoci == "" {
		compareTrees(t, "umoci", umoci(t, src), got, implied, c.touched)
	}
	if c.noTar == "" {
		compareTrees(t, "tar", tarred(t, src), got, implied, nil)
	}
	if c.noUmoci != "" && c.noTar != "" && c.want == nil {
		t.Error("compared with nothing")
	}
}

func pax(key, value string) func(*tar.Header) {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = make(map[string]string)
		}
		h.PAXRecords[key] = value
	}
}

func mode(m int64) func(*tar.Header) { return func(h *tar.Header) { h.Mode = m } }

func owner(uid, gid int) func(*tar.Header) {
	return func(h *tar.Header) { h.Uid, h.Gid = uid, gid }
}

func mtime(sec, nsec int64) func(*tar.Header) {
	return func(h *tar.Header) { h.ModTime = time.Unix(sec, nsec) }
}

// capability is the value of security.capability that gives cap_net_raw.
const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

var metadataCases = []treeCase{
	{
		name: "modes",
		layers: layers(lines(
			dir("d"), reg("d/setuid", "x").with(mode(0o4755)), reg("d/setgid", "x").with(mode(0o2711)), reg("d/none", "x").with(mode(0)),
			reg("d/all", "x").with(mode(0o7777)), dir("tmp").with(mode(0o1777)), dir("shared").with(mode(0o2775)), dir("locked").with(mode(0o000)),
		)),
	},
	{
		name: "mode with type bits",
		layers: layers(lines(reg("file", "x").with(mode(0o100600)), dir("dir").with(mode(0o40711)),
			symlink("link", "file").with(mode(0o120777)))),
	},
	{
		name:   "the root",
		listed: true,
		layers: layers(lines(dir(".").with(mode(0o1750)).with(owner(5, 6)), reg("x", "x")), lines(reg("y", "y"))),
	},
	{
		name: "owners",
		layers: layers(lines(
			reg("65535", "").with(owner(65535, 65535)), reg("65536", "").with(owner(65536, 65537)), reg("million", "x").with(owner(1_000_000, 2_000_000)),
			reg("octal", "x").with(owner(0o7777777, 0o7777777)), dir("most").with(owner(math.MaxUint32-1, math.MaxUint32-1)),
			symlink("link", "x").with(owner(70000, 80000)), fifo("fifo").with(owner(3_000_000_000, 1)),
		)),
	},
	{
		name: "times",
		layers: layers(lines(
			reg("nanoseconds", "x").with(mtime(1_600_000_000, 999_999_999)), reg("before 1970", "x").with(mtime(-1, 500_000_000)),
			reg("1902", "x").with(mtime(-1<<31+1, 1)), reg("epoch", "x").with(mtime(0, 0)), reg("one nanosecond", "x").with(mtime(0, 1)),
			reg("2039", "x").with(mtime(1<<31+5, 7)), reg("2107", "x").with(mtime(1<<32+9, 11)),
			symlink("link", "x").with(mtime(1_234_567_890, 123_456_789)), dir("dir").with(mtime(1_111_111_111, 111_111_111)), reg("dir/in", "x"),
		)),
	},
	{
		name:    "a time beyond 2262",
		layers:  layers(lines(reg("2300", "x").with(mtime(10_413_792_000, 13)))),
		noUmoci: "it counts nanoseconds in 64 bits",
	},
	{
		name: "a time in base 256",
		layers: layers(lines(
			raw(headerBlock('0', "old", 0, map[int]string{136: "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00"})),
			raw(headerBlock('0', "new", 0, map[int]string{136: "\x80\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00"})),
		)),
	},
	{
		name: "extended attributes",
		layers: layers(lines(
			reg("ping", "x").with(pax("SCHILY.xattr.security.capability", capability)),
			reg("user", "x").with(pax("SCHILY.xattr.user.one", "1")).with(pax("SCHILY.xattr.user.two", "a value\nof two lines")),
			reg("large", "x").with(pax("SCHILY.xattr.user.large", strings.Repeat("large ", 600))),
			reg("shared", "x").with(pax("SCHILY.xattr.user.large", strings.Repeat("large ", 600))),
			dir("dir").with(pax("SCHILY.xattr.trusted.thing", "v")),
			symlink("link", "x").with(pax("SCHILY.xattr.trusted.link", "of a symlink")),
			fifo("fifo").with(pax("SCHILY.xattr.security.test", "v")),
			reg("name with spaces", "x").with(pax("SCHILY.xattr.user.a name, with all: sorts", "v")),
		)),
	},
	{
		name:    "extended attributes of GNU tar",
		noUmoci: "it drops empty ones",
		layers: func(t testing.TB) [][]byte {
			return [][]byte{gnuTar(t, func(dir string) {
				path := filepath.Join(dir, "f")
				writeFile(t, path, []byte("x"))
				for name, v := range map[string]string{"user.empty": "", "user.binary": "a\x00b\n=", "security.capability": capability} {
					if err := unix.Setxattr(path, name, []byte(v), 0); err != nil {
						t.Skipf("setxattr: %v", err)
					}
				}
			}, "--xattrs", "--xattrs-include=*", "f")}
		},
	},
	{
		name: "extended attributes of libarchive",
		layers: layers(lines(
			reg("both", "x").with(pax("LIBARCHIVE.xattr.user.v", "b3RoZXI")).with(pax("SCHILY.xattr.user.v", "value")),
			reg("alone", "x").with(pax("LIBARCHIVE.xattr.user.sp%20ace", "dmFsdWU")),
		)),
		noUmoci: "it knows SCHILY's alone", noTar: "it knows SCHILY's alone",
		want: map[string]string{"both": text("x"), "alone": text("x")},
	},
	{
		name: "attributes of a directory that a layer lists anew",
		layers: layers(
			lines(dir("d").with(pax("SCHILY.xattr.user.old", "1")).with(mode(0o700)).with(owner(1, 2)), reg("d/f", "x")),
			lines(dir("d").with(pax("SCHILY.xattr.user.new", "2")).with(mode(0o755)).with(mtime(5, 6))),
		),
		noTar: "it leaves the old attributes in place",
	},
	{
		name: "types",
		layers: layers(lines(
			dir("dev"), device(tar.TypeChar, "dev/null", 1, 3), device(tar.TypeBlock, "dev/sda", 8, 0), device(tar.TypeChar, "dev/255", 255, 255),
			device(tar.TypeChar, "dev/256", 256, 256), device(tar.TypeBlock, "dev/most", 4095, 1<<20-1), device(tar.TypeChar, "dev/zero", 0, 0),
			fifo("fifo"), reg("empty", ""), dir("empty dir"), symlink("dangling", "/nowhere"),
		)),
	},
	{
		name: "symlinks of any length",
		layers: func(t testing.TB) [][]byte {
			var l []line
			for _, n := range []int{1, 2, 58, 59, 60, 61, 99, 100, 101, 255, 256, 1000, 4094, 4095} {
				l = append(l, symlink(fmt.Sprint("to ", n), strings.Repeat("t", n)))
			}
			l = append(l, symlink("bytes", "\xff\xfe\n\\ \"' \x01"), symlink("up", "../../../etc"), symlink("slashes", "a//b/./c/"))
			return [][]byte{tarball(t, l...)}
		},
	},
	{
		name: "contents",
		layers: func(t testing.TB) [][]byte {
			l := []line{dir("sizes")}
			for _, n := range []int{0, 1, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 65537, 262143, 262144, 262145, 1<<20 + 1} {
				l = append(l, reg(fmt.Sprint("sizes/", n), noise(uint64(n), n)))
			}
			zeros := strings.Repeat("\x00", 1<<20)
			l = append(l, reg("zeros", zeros), reg("one zero", "\x00"), reg("hole first", zeros+"end"),
				reg("hole last", "start"+zeros), reg("hole within", noise(1, 300_000)+zeros+noise(2, 70_000)+zeros+"x"))
			return [][]byte{tarball(t, l...)}
		},
	},
	{
		name:    "over 4 GiB",
		listed:  true,
		noUmoci: "it writes all of the zeros",
		layers: func(t testing.TB) [][]byte {
			return [][]byte{gnuTar(t, func(dir string) {
				f, err := os.Create(filepath.Join(dir, "large"))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				for _, off := range []int64{0, 1<<32 - 3, 5<<30 - 1} {
					if _, err := f.WriteAt([]byte("data"), off); err != nil {
						t.Fatal(err)
					}
				}
				if err := f.Truncate(5<<30 + 12345); err != nil {
					t.Fatal(err)
				}
			}, "--sparse", "--format=pax", ".")}
		},
	},
}
