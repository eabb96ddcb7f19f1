package flatten

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap/blocktest"
)

// item is all that a directory tree says of one name.
type item struct {
	mode, uid, gid uint32
	size           int64 // of regular files and symlinks
	sec, nsec      int64 // mtime
	rdev           uint64
	links          uint64 // not of directories
	first          string // the first name of the same inode, in the order of the listing
	target         string
	sum            string // of the content: of the blocks that are not zero, and where they are
	xattrs         string
}

func (i item) isDir() bool { return i.mode&modeType == modeDir }

// listing walks a tree by descriptors: paths can be longer than the kernel takes.
func listing(t testing.TB, root string) map[string]item {
	t.Helper()
	l := &lister{t: t, items: make(map[string]item), first: make(map[[2]uint64]string)}
	fd, err := unix.Open(root, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	l.add("", &st, fd, ".")
	l.dir(fd, "")
	return l.items
}

type lister struct {
	t     testing.TB
	items map[string]item
	first map[[2]uint64]string
	buf   [1 << 16]byte
}

// dir lists what is in fd, and closes it.
func (l *lister) dir(fd int, path string) {
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		l.t.Fatalf("list %.200q: %v", path, err)
	}
	slices.Sort(names)
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			l.t.Fatalf("stat %q: %v", name, err)
		}
		full := name
		if path != "" {
			full = path + "/" + name
		}
		l.add(full, &st, fd, name)
		if st.Mode&modeType == modeDir {
			sub, err := unix.Openat(fd, name, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			if err != nil {
				l.t.Fatalf("open %q: %v", name, err)
			}
			l.dir(sub, full)
		}
	}
}

func (l *lister) add(path string, st *unix.Stat_t, at int, name string) {
	i := item{
		mode: st.Mode, uid: st.Uid, gid: st.Gid, sec: st.Mtim.Sec, nsec: st.Mtim.Nsec, rdev: st.Rdev,
		xattrs: l.xattrs(fmt.Sprintf("/proc/self/fd/%d/%s", at, name)),
	}
	if !i.isDir() {
		id := [2]uint64{st.Dev, st.Ino}
		if _, ok := l.first[id]; !ok {
			l.first[id] = path
		}
		i.first, i.links = l.first[id], st.Nlink
	}
	switch st.Mode & modeType {
	case modeSymlink:
		n, err := unix.Readlinkat(at, name, l.buf[:])
		if err != nil {
			l.t.Fatalf("readlink %q: %v", path, err)
		}
		i.size, i.target = st.Size, string(l.buf[:n])
	case modeRegular:
		if i.size = st.Size; i.size == 0 {
			break
		}
		fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			l.t.Fatalf("open %q: %v", path, err)
		}
		f := os.NewFile(uintptr(fd), path)
		defer f.Close()
		i.sum = contentSum(l.t, f)
	}
	l.items[path] = i
}

func (l *lister) xattrs(path string) string {
	b := l.buf[:]
	n, err := unix.Llistxattr(path, b)
	if err != nil {
		l.t.Fatalf("listxattr %q: %v", path, err)
	}
	if n == 0 {
		return ""
	}
	names := strings.FieldsFunc(string(b[:n]), func(r rune) bool { return r == 0 })
	slices.Sort(names)
	var out strings.Builder
	for _, name := range names {
		n, err := unix.Lgetxattr(path, name, b)
		if err != nil {
			l.t.Fatalf("getxattr %q %s: %v", path, name, err)
		}
		fmt.Fprintf(&out, "%s=%x ", name, b[:n])
	}
	return out.String()
}

// contentSum skips holes, so that a file of gigabytes of them takes no time. A
// hole and zeros give the same.
func contentSum(t testing.TB, f *os.File) string {
	t.Helper()
	h := sha256.New()
	b := make([]byte, blockSize)
	for off := int64(0); ; {
		data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return fmt.Sprintf("%x", h.Sum(nil)[:8])
		}
		if err != nil {
			t.Fatal(err)
		}
		end, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			t.Fatal(err)
		}
		for off = data &^ (blockSize - 1); off < end; off += blockSize {
			n, err := f.ReadAt(b, off)
			if err != nil && err != io.EOF {
				t.Fatal(err)
			}
			if p := bytes.TrimRight(b[:n], "\x00"); len(p) > 0 {
				h.Write(binary.LittleEndian.AppendUint64(nil, uint64(off)))
				h.Write(p)
			}
		}
		off = end
	}
}

// compareTrees compares two listings. Of the directories in implied, which no
// layer lists, owner, mode and time are not compared; of those in touched the
// time is not.
func compareTrees(t *testing.T, program string, want, got map[string]item, implied, touched []string) {
	t.Helper()
	wrong := 0
	fail := func(format string, args ...any) {
		t.Helper()
		if wrong++; wrong <= 20 {
			t.Errorf(format, args...)
		}
	}
	for path, w := range want {
		g, ok := got[path]
		if !ok {
			fail("%.300q is missing; %s has %+.300v", path, program, w)
			continue
		}
		if w.isDir() && g.isDir() && slices.Contains(implied, path) {
			continue
		}
		if slices.Contains(touched, path) {
			w.sec, w.nsec = g.sec, g.nsec
		}
		if w != g {
			fail("%.300q\n is    %+v\n %s has %+v", path, g, program, w)
		}
	}
	for path, g := range got {
		if _, ok := want[path]; !ok {
			fail("%.300q is there, and not with %s: %+v", path, program, g)
		}
	}
}

// mount mounts a device until the test ends.
func mount(t testing.TB, device string) string {
	t.Helper()
	need(t, "root")
	dir, _ := blocktest.Mount(t, device, "ext4", true)
	return dir
}

// fsck fails unless e2fsck has nothing to say.
func fsck(t testing.TB, device string) {
	t.Helper()
	need(t, "e2fsck")
	for line := range strings.Lines(string(run(t, "e2fsck", "-fn", device))) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "Pass ") && !strings.HasPrefix(line, "e2fsck 1.") && !strings.Contains(line, " files (") {
			t.Fatalf("e2fsck complains: %s", line)
		}
	}
}

// umoci unpacks an image by umoci.
func umoci(t testing.TB, src *testSource) map[string]item {
	t.Helper()
	need(t, "root", "umoci")
	bundle := filepath.Join(t.TempDir(), "bundle")
	run(t, "umoci", "unpack", "--image", src.layout(t)+":image", bundle)
	return listing(t, filepath.Join(bundle, "rootfs"))
}

// tarred unpacks the layers by GNU tar, one over the other. Before each, what
// the layer's whiteouts name is removed, as are directories that it has something
// else for; behind it, directories that were there and that the layer does not
// list get their times back.
func tarred(t testing.TB, src *testSource) map[string]item {
	t.Helper()
	need(t, "root", "tar")
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i, b := range src.tars {
		before := listing(t, dir)
		listed := make(map[string]bool)
		for r := tar.NewReader(bytes.NewReader(b)); ; {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			name := clean(h.Name)
			listed[name] = true
			parent, base := filepath.Split(filepath.Join(dir, name))
			if base == ".wh..wh..opq" {
				entries, _ := os.ReadDir(parent) // it need not be there
				for _, e := range entries {
					if err := os.RemoveAll(filepath.Join(parent, e.Name())); err != nil {
						t.Fatal(err)
					}
				}
			} else if hidden, ok := strings.CutPrefix(base, ".wh."); ok {
				if err := os.RemoveAll(filepath.Join(parent, hidden)); err != nil {
					t.Fatal(err)
				}
			} else if before[name].isDir() && h.Typeflag != tar.TypeDir {
				if err := os.RemoveAll(filepath.Join(parent, base)); err != nil {
					t.Fatal(err)
				}
			}
		}
		path := filepath.Join(t.TempDir(), fmt.Sprint(i))
		writeFile(t, path, b)
		cmd := exec.Command("tar", "-C", dir, "-xpf", path, "--numeric-owner", "--same-owner", "--delay-directory-restore",
			"--xattrs", "--xattrs-include=*", "--exclude=.wh.*")
		cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("tar: %v\n%.4000s", err, out)
		}
		for path, old := range before {
			if full := filepath.Join(dir, path); old.isDir() && !listed[path] {
				times := []unix.Timespec{{Sec: old.sec, Nsec: old.nsec}, {Sec: old.sec, Nsec: old.nsec}}
				if st, err := os.Lstat(full); err == nil && st.IsDir() {
					if err := unix.UtimesNanoAt(unix.AT_FDCWD, full, times, 0); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	}
	return listing(t, dir)
}
