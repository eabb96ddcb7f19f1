package ext4

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// What the tests share: a device assembled from a Filesystem and made-up
// streams, e2fsck, the kernel, and a comparison of a mounted filesystem with the
// tree that it was made from.

var testOptions = Options{
	Size:     1 << 30,
	UUID:     [16]byte{0x74, 0x68, 0x61, 0x77, 1, 2, 0x43, 4, 0x85, 6, 7, 8, 9, 10, 11, 12},
	HashSeed: [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16},
	Time:     Time{Sec: 1_700_000_000, Nsec: 123_456_789},
	Label:    "thaw-test",
}

func dir(entries ...Dirent) *Inode { return &Inode{Mode: modeDir | 0o755, Entries: entries} }

func file(size int64, runs ...Run) *Inode {
	return &Inode{Mode: modeRegular | 0o644, Size: size, Data: runs}
}

func symlink(target string) *Inode { return &Inode{Mode: modeSymlink | 0o777, Target: target} }

func layout(t testing.TB, root *Inode, o Options) *Filesystem {
	t.Helper()
	fs, err := Layout(root, o)
	if err != nil {
		t.Fatal(err)
	}
	checkRuns(t, fs)
	return fs
}

// checkRuns holds the map to what Runs says of it.
func checkRuns(t testing.TB, fs *Filesystem) {
	t.Helper()
	var device, meta uint64
	runs := fs.Runs()
	for i, r := range runs {
		if r.Count == 0 || uint64(r.Device) < device {
			t.Fatalf("run %d, %v, is empty or does not start after block %d", i, r, device)
		}
		device = uint64(r.Device) + uint64(r.Count)
		if r.Stream == 0 {
			if uint64(r.Block) != meta {
				t.Fatalf("run %d, %v, does not go on at block %d of stream 0", i, r, meta)
			}
			meta += uint64(r.Count)
		}
		if i > 0 {
			p := runs[i-1]
			if p.Stream == r.Stream && p.Device+p.Count == r.Device && p.Block+p.Count == r.Block {
				t.Fatalf("runs %d and %d, %v and %v, should be one run", i-1, i, p, r)
			}
			if p.Stream == r.Stream && p.Block+p.Count > r.Block {
				t.Fatalf("runs %d and %d, %v and %v, are not in stream order", i-1, i, p, r)
			}
		}
	}
	if device > uint64(fs.Blocks()) || meta != uint64(fs.metaBlocks()) {
		t.Fatalf("the map ends at block %d of %d, and stream 0 at %d of %d", device, fs.Blocks(), meta, fs.metaBlocks())
	}
}

// fillStream makes up one block of a stream.
func fillStream(b []byte, stream, block uint32) {
	for i := 0; i < len(b); i += 16 {
		binary.LittleEndian.PutUint32(b[i:], stream)
		binary.LittleEndian.PutUint32(b[i+4:], block)
		binary.LittleEndian.PutUint32(b[i+8:], uint32(i)^0x5A5A5A5A)
		binary.LittleEndian.PutUint32(b[i+12:], ^block)
	}
}

// image assembles a device in a sparse file. Runs of more than wholeRun blocks
// get their first and last blocks only.
func image(t testing.TB, fs *Filesystem) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "device"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(fs.Blocks()) * blockSize); err != nil {
		t.Fatal(err)
	}
	if err := fs.WriteMeta(&metaPlacer{f: f, runs: fs.Runs()}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, blockSize)
	for _, r := range fs.Runs() {
		for i := uint32(0); i < r.Count && r.Stream != 0; i++ {
			if r.Count > wholeRun && i == wholeRun/2 {
				i = r.Count - wholeRun/2
			}
			fillStream(b, r.Stream, r.Block+i)
			if _, err := f.WriteAt(b, int64(r.Device+i)*blockSize); err != nil {
				t.Fatal(err)
			}
		}
	}
	return f.Name()
}

const wholeRun = 1 << 16

// metaPlacer writes stream 0 to its places on a device.
type metaPlacer struct {
	f    io.WriterAt
	runs []blockmap.Run
	at   int64 // in the stream
}

func (m *metaPlacer) Write(p []byte) (int, error) {
	written := len(p)
	for len(p) > 0 {
		for len(m.runs) > 0 && m.runs[0].Stream != 0 {
			m.runs = m.runs[1:]
		}
		if len(m.runs) == 0 {
			return 0, errors.New("more metadata than runs of it")
		}
		r := m.runs[0]
		in := m.at - int64(r.Block)*blockSize
		n := min(int64(len(p)), int64(r.Count)*blockSize-in)
		if n == 0 {
			m.runs = m.runs[1:]
			continue
		}
		if _, err := m.f.WriteAt(p[:n], int64(r.Device)*blockSize+in); err != nil {
			return 0, err
		}
		p, m.at = p[n:], m.at+n
	}
	return written, nil
}

var fsckLine = regexp.MustCompile(`^(e2fsck 1\.\d.*|Pass \d: .*|.*: \d+/\d+ files \(.*\), \d+/\d+ blocks|)$`)

// fsck fails unless e2fsck has nothing at all to say, and neither has Check.
func fsck(t testing.TB, path string) {
	t.Helper()
	if _, err := exec.LookPath("e2fsck"); err != nil {
		t.Skip("e2fsck is not installed")
	}
	out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput()
	if err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, head(out))
	}
	for line := range strings.Lines(string(out)) {
		if !fsckLine.MatchString(strings.TrimSuffix(line, "\n")) {
			t.Fatalf("e2fsck complains: %s\n%s", line, head(out))
		}
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if err := Check(f, st.Size()); err != nil {
		t.Fatalf("Check: %v", err)
	}
}

func head(b []byte) []byte { return b[:min(len(b), 4000)] }

// verify puts a tree through everything: e2fsck, a mount to read with the
// comparison, a mount to write, and e2fsck again.
func verify(t *testing.T, root *Inode, o Options) *Filesystem {
	t.Helper()
	fs := layout(t, root, o)
	path := image(t, fs)
	fsck(t, path)
	mounted, unmount := blocktest.Mount(t, path, "ext4", true)
	compare(t, root, mounted)
	unmount()

	mounted, unmount = blocktest.Mount(t, path, "ext4", false)
	if err := os.WriteFile(mounted+"/written later", []byte("by the kernel"), 0o600); err != nil && !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	unmount()
	fsck(t, path)
	return fs
}

// compare walks a mounted filesystem beside the tree.
func compare(t testing.TB, root *Inode, mounted string) {
	t.Helper()
	c := comparison{t: t, numbers: make(map[*Inode]uint64), links: make(map[*Inode]uint64)}
	c.count(root)
	c.links[root] += 2
	c.inode(root, mounted)
}

type comparison struct {
	t       testing.TB
	numbers map[*Inode]uint64
	links   map[*Inode]uint64
}

func (c *comparison) count(dir *Inode) {
	for _, e := range dir.Entries {
		c.links[e.Inode]++
		if e.Inode.is(modeDir) {
			c.links[dir]++
			c.links[e.Inode]++
			c.count(e.Inode)
		}
	}
}

func (c *comparison) inode(in *Inode, path string) {
	t := c.t
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("stat %.300q: %v", path, err)
	}
	if number, ok := c.numbers[in]; ok {
		if number != st.Ino {
			t.Errorf("%q is inode %d, and its other name is %d", path, st.Ino, number)
		}
		return
	}
	c.numbers[in] = st.Ino

	links := c.links[in]
	if links > maxLinks {
		links = 1
	}
	if st.Mode != in.Mode || st.Uid != in.UID || st.Gid != in.GID || uint64(st.Nlink) != links {
		t.Errorf("%q: mode %#o, owner %d:%d, %d links; want %#o, %d:%d, %d",
			path, st.Mode, st.Uid, st.Gid, st.Nlink, in.Mode, in.UID, in.GID, links)
	}
	for _, tm := range []struct {
		name string
		got  unix.Timespec
		want Time
	}{{"atime", st.Atim, in.Atime}, {"mtime", st.Mtim, in.Mtime}, {"ctime", st.Ctim, in.Ctime}} {
		want := Time{min(max(tm.want.Sec, minSeconds), maxSeconds), min(tm.want.Nsec, maxNsec)}
		if got := (Time{tm.got.Sec, uint32(tm.got.Nsec)}); got != want {
			t.Errorf("%q: %s %v, want %v", path, tm.name, got, want)
		}
	}
	c.xattrs(in, path)

	switch in.Mode & modeType {
	case modeRegular:
		c.content(in, path)
	case modeSymlink:
		if target, err := os.Readlink(path); err != nil || target != in.Target || st.Size != int64(len(in.Target)) {
			t.Errorf("readlink %q: %q, %v; want %q", path, target, err, in.Target)
		}
	case modeChar, modeBlock:
		if unix.Major(st.Rdev) != in.Major || unix.Minor(st.Rdev) != in.Minor {
			t.Errorf("%q: device %d:%d, want %d:%d", path, unix.Major(st.Rdev), unix.Minor(st.Rdev), in.Major, in.Minor)
		}
	case modeDir:
		c.directory(in, path)
	}
}

func (c *comparison) directory(in *Inode, path string) {
	t := c.t
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	names, err := f.Readdirnames(-1)
	f.Close()
	if err != nil {
		t.Fatalf("readdir %q: %v", path, err)
	}
	var want []string
	for _, e := range in.Entries {
		want = append(want, e.Name)
	}
	slices.Sort(names)
	slices.Sort(want)
	if !slices.Equal(names, want) {
		t.Errorf("readdir %q: %d names, want %d", path, len(names), len(want))
	}
	for _, e := range in.Entries {
		c.inode(e.Inode, path+"/"+e.Name)
	}
}

func (c *comparison) xattrs(in *Inode, path string) {
	t := c.t
	buf := make([]byte, 1<<16)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		t.Errorf("listxattr %q: %v", path, err)
	}
	names := strings.FieldsFunc(string(buf[:n]), func(r rune) bool { return r == 0 })
	if len(names) != len(in.Xattrs) {
		t.Errorf("listxattr %q: %q, want %d", path, names, len(in.Xattrs))
	}
	for _, x := range in.Xattrs {
		n, err := unix.Lgetxattr(path, x.Name, buf)
		if err != nil || !bytes.Equal(buf[:max(n, 0)], x.Value) {
			t.Errorf("getxattr %q %q: %x, %v; want %x", path, x.Name, buf[:max(n, 0)], err, x.Value)
		}
	}
}

// content compares a file with its runs: all of a small one, the ends of every
// run and of every hole of a large one.
func (c *comparison) content(in *Inode, path string) {
	t := c.t
	f, err := os.Open(path)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || st.Size() != in.Size {
		t.Errorf("%q: %v bytes, want %d", path, st.Size(), in.Size)
		return
	}
	got, want := make([]byte, blockSize), make([]byte, blockSize)
	block := func(n int64, stream, streamBlock uint32) {
		t.Helper()
		off := n * blockSize
		l := min(blockSize, in.Size-off)
		if stream == 0 {
			clear(want)
		} else {
			fillStream(want, stream, streamBlock)
		}
		if _, err := f.ReadAt(got[:l], off); err != nil || !bytes.Equal(got[:l], want[:l]) {
			t.Fatalf("%q: block %d is not block %d of stream %d (%v)", path, n, streamBlock, stream, err)
		}
	}
	var next int64
	hole := func(to int64) {
		if to > next {
			block(next, 0, 0)
			block(to-1, 0, 0)
		}
	}
	for _, r := range in.Data {
		hole(int64(r.FileBlock))
		for i := uint32(0); i < r.Count; i++ {
			if r.Count > 64 && i == 32 {
				i = r.Count - 32
			}
			block(int64(r.FileBlock+i), r.Stream, r.Block+i)
		}
		next = int64(r.FileBlock) + int64(r.Count)
	}
	hole(blocksOf(in.Size))
}

// debugfs runs one command on an image.
func debugfs(t testing.TB, path, command string) string {
	t.Helper()
	if _, err := exec.LookPath("debugfs"); err != nil {
		t.Skip("debugfs is not installed")
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.Command("debugfs", "-R", command, path)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("debugfs %s: %v: %s", command, err, stderr.String())
	}
	return stdout.String()
}

// names makes n names, all different.
func names(prefix string, n int) []string {
	l := make([]string, n)
	for i := range l {
		l[i] = fmt.Sprintf("%s%d", prefix, i)
	}
	return l
}

// metaBlocks is the length of stream 0 in blocks.
func (fs *Filesystem) metaBlocks() uint32 {
	last := fs.meta[len(fs.meta)-1]
	return last.Block + last.Count
}
