package ext4

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap/blocktest"
)

// fragmented makes a file of n runs that cannot be merged, with a hole after
// every third.
func fragmented(n int, stream uint32) *Inode {
	in := file(0)
	next := uint32(0)
	for i := range n {
		in.Data = append(in.Data, Run{next, stream, uint32(2 * (n - i)), 1 + uint32(i)%2})
		next += in.Data[i].Count
		if i%3 == 2 {
			next += 5
		}
	}
	in.Size = int64(next) * blockSize
	return in
}

func TestFragmented(t *testing.T) {
	root := dir()
	for i, n := range []int{1, 3, 4, 5, 339, 340, 341, 1359, 1360, 1361, 5000, 340*340 + 1} {
		if testing.Short() && n > 10_000 {
			continue
		}
		root.Entries = append(root.Entries, Dirent{fmt.Sprint(n), fragmented(n, uint32(i+1))})
	}
	o := testOptions
	o.Size = 2 << 30
	fs := verify(t, root, o)
	for _, e := range root.Entries {
		n := len(e.Inode.Data)
		if got, want := fs.nodes[e.Inode.index].treeBlocks, treeBlocks(n); got != want {
			t.Errorf("%d runs: %d blocks of tree, want %d", n, got, want)
		}
	}
}

// A tree of depth 3 or 4 takes 40 million extents at the least, so what it looks
// like is tested without a file.
func TestExtentTreeShape(t *testing.T) {
	for n, want := range map[int][]int{
		0: nil, 4: nil, 5: {1}, 340 * 4: {4}, 340*4 + 1: {5, 1}, 340 * 340 * 4: {1360, 4}, 340*340*4 + 1: {1361, 5, 1},
	} {
		if got := treeLevels(n); !slices.Equal(got, want) {
			t.Errorf("levels of %d extents are %v, want %v", n, got, want)
		}
	}
	ext := appendExtent(nil, extent{0, 100, 32768*2 + 5})
	ext = appendExtent(ext, extent{32768*2 + 5, 32768*2 + 105, 10})
	ext = appendExtent(ext, extent{32768*2 + 15, 7, 1})
	want := []extent{{0, 100, 32768}, {32768, 32868, 32768}, {65536, 65636, 15}, {65551, 7, 1}}
	if !slices.Equal(ext, want) {
		t.Errorf("extents %v, want %v", ext, want)
	}
}

// Large files have many extents of the greatest length.
func TestLargeFile(t *testing.T) {
	o := testOptions
	o.Size = 16 << 30
	verify(t, dir(
		Dirent{"6 GiB", file(6<<30, Run{0, 1, 0, 3 << 19})},
		Dirent{"1 GiB", file(1<<30-3, Run{0, 2, 7, 1 << 18})},
	), o)
}

// ACLs as getxattr gives them.
func acl(entries ...[3]uint32) []byte {
	b := []byte{2, 0, 0, 0}
	for _, e := range entries {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return b
}

const noID = 1<<32 - 1

var (
	accessACL = acl([3]uint32{aclUserObj, 7, noID}, [3]uint32{aclUser, 6, 1000}, [3]uint32{aclUser, 4, 70000},
		[3]uint32{aclGroupObj, 5, noID}, [3]uint32{aclGroup, 4, 50}, [3]uint32{aclMask, 7, noID}, [3]uint32{aclOther, 5, noID})
	defaultACL = acl([3]uint32{aclUserObj, 7, noID}, [3]uint32{aclGroupObj, 5, noID}, [3]uint32{aclOther, 0, noID})
	capability = []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
)

func withXattrs(in *Inode, l ...Xattr) *Inode {
	in.Xattrs = l
	return in
}

func TestXattrs(t *testing.T) {
	big := bytes.Repeat([]byte("big."), 300)
	root := withXattrs(dir(),
		Xattr{"user.on the root", []byte("x")})
	add := func(name string, in *Inode, l ...Xattr) {
		root.Entries = append(root.Entries, Dirent{name, withXattrs(in, l...)})
	}
	add("ping", file(0), Xattr{"security.capability", capability})
	add("acl", &Inode{Mode: modeRegular | 0o775}, Xattr{"system.posix_acl_access", accessACL})
	add("acl dir", &Inode{Mode: modeDir | 0o775},
		Xattr{"system.posix_acl_default", defaultACL}, Xattr{"system.posix_acl_access", accessACL})
	add("all namespaces", &Inode{Mode: modeRegular | 0o775},
		Xattr{"user.mime_type", []byte("text/plain")}, Xattr{"trusted.overlay.opaque", []byte("y")},
		Xattr{"security.selinux", []byte("system_u:object_r:etc_t:s0\x00")}, Xattr{"security.capability", capability},
		Xattr{"system.posix_acl_access", accessACL})
	add("empty value", file(0), Xattr{"user.empty", nil})
	add("empty and large", file(0), Xattr{"user.empty", nil}, Xattr{"user.large", big}, Xattr{"user.none", nil})
	add("not ASCII", file(0), Xattr{"user.\xff\xfe\x80", []byte("in the inode")})
	add("not ASCII, block", file(0), Xattr{"user.\xff\xfe\x80\xc3\xa4", big}, Xattr{"user.\xc3", []byte("\xff\xff\xff")})
	add("long name", file(0), Xattr{"user." + strings.Repeat("n", 250), []byte("v")})
	add("symlink", symlink("somewhere"), Xattr{"trusted.link", []byte("l")}, Xattr{"security.big", big})
	add("long symlink", symlink(strings.Repeat("s", 1000)), Xattr{"trusted.link", []byte("l")}, Xattr{"security.big", big})
	add("fifo", &Inode{Mode: modeFifo | 0o600}, Xattr{"trusted.fifo", big})
	add("device", &Inode{Mode: modeChar | 0o600, Major: 1, Minor: 5}, Xattr{"security.dev", []byte("d")})
	// In the inode: 4 + 16 + 4 + 68 + 4 bytes; one more and it is in a block.
	for n := 60; n <= 72; n++ {
		add(fmt.Sprint("value of ", n), file(0), Xattr{"user.abcd", bytes.Repeat([]byte{'v'}, n)})
	}
	for i := range 3000 {
		add(fmt.Sprint("shared ", i), file(0), Xattr{"user.same", big}, Xattr{"user.other", []byte("o")})
	}
	// A block that is full to the last byte, and one that needs the inode too.
	add("full", file(0), Xattr{"user.abcd", bytes.Repeat([]byte("f"), 4096-32-4-20)})
	add("fuller", file(0), Xattr{"user.abcd", bytes.Repeat([]byte("f"), 4096-32-4-20)}, Xattr{"user.small", []byte("s")})
	var many []Xattr
	for _, name := range names("user.many", 120) {
		many = append(many, Xattr{name, []byte("value of " + name)[:8]})
	}
	rand.New(rand.NewPCG(5, 6)).Shuffle(len(many), func(i, j int) { many[i], many[j] = many[j], many[i] })
	add("many", file(0), many...)

	fs := verify(t, root, testOptions)
	if n := len(fs.xattrRefs); n != 3+13 {
		t.Errorf("%d blocks of attributes", n) // 3000 / 1024, and the ones of a kind
	}
	for _, e := range root.Entries {
		if n, ok := 0, strings.HasPrefix(e.Name, "value of "); ok {
			fmt.Sscanf(e.Name, "value of %d", &n)
			if inBlock := fs.nodes[e.Inode.index].xattr != 0; inBlock != (n > 68) {
				t.Errorf("%q is in a block: %v", e.Name, inBlock)
			}
		}
	}
}

// What the layout leaves free is free: the kernel writes to it until there is no
// more, and the content of the image is as it was.
func TestFill(t *testing.T) {
	root := everything()
	root.Entries = append(root.Entries, Dirent{"fragments", fragmented(3000, 9)})
	o := testOptions
	o.Size = 400 << 20
	fs := layout(t, root, o)
	path := image(t, fs)
	mounted, unmount := blocktest.Mount(t, path, "ext4", false)
	var st unix.Statfs_t
	if err := unix.Statfs(mounted, &st); err != nil {
		t.Fatal(err)
	}
	used := fs.geo.end
	if free := uint64(fs.Blocks() - used); st.Bfree != free || st.Bavail > free || st.Ffree != uint64(fs.geo.groups*fs.geo.inodesPerGroup-fs.usedInodes()) {
		t.Errorf("statfs: %d free blocks, %d available, %d free inodes; %d blocks are free", st.Bfree, st.Bavail, st.Ffree, free)
	}
	written := int64(0)
	b := bytes.Repeat([]byte("filling."), 1<<17)
	for i := 0; ; i++ {
		f, err := os.Create(fmt.Sprint(mounted, "/fill ", i))
		if err == nil {
			var n int
			n, err = f.Write(b)
			written += int64(n)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
			break
		}
	}
	if written < int64(st.Bfree)*blockSize*8/10 {
		t.Errorf("%d bytes written to %d free", written, st.Bfree*blockSize)
	}
	unmount()
	fsck(t, path)
	mounted, unmount = blocktest.Mount(t, path, "ext4", true)
	for i := 0; int64(i) < written/int64(len(b)); i++ {
		if got, err := os.ReadFile(fmt.Sprint(mounted, "/fill ", i)); err != nil || !bytes.Equal(got, b) {
			t.Fatalf("file %d does not have the written bytes: %v", i, err)
		}
	}
	unmount()
	mounted, unmount = blocktest.Mount(t, path, "ext4", false)
	for i := 0; ; i++ {
		if err := os.Remove(fmt.Sprint(mounted, "/fill ", i)); err != nil {
			break
		}
	}
	if err := os.Remove(mounted + "/fragments"); err != nil {
		t.Fatal(err)
	}
	unmount()
	fsck(t, path)
	mounted, _ = blocktest.Mount(t, path, "ext4", true)
	root.Entries = slices.DeleteFunc(root.Entries, func(e Dirent) bool { return e.Name == "fragments" })
	root.Mtime, root.Ctime = timesOf(t, mounted)
	compare(t, root, mounted)
}

func timesOf(t *testing.T, path string) (mtime, ctime Time) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return Time{st.Mtim.Sec, uint32(st.Mtim.Nsec)}, Time{st.Ctim.Sec, uint32(st.Ctim.Nsec)}
}

// Large devices cost descriptors, and no more.
func TestHugeDevices(t *testing.T) {
	for _, test := range []struct {
		name string
		size int64
	}{{"64 GiB", 64 << 30}, {"200 GiB", 200 << 30}, {"16 TiB", maxBlocks * blockSize}} {
		t.Run(test.name, func(t *testing.T) {
			o := testOptions
			o.Size = test.size
			fs := layout(t, everything(), o)
			if int64(fs.Blocks())*blockSize != test.size {
				t.Errorf("%d blocks", fs.Blocks())
			}
			if testing.Short() && test.size > 1<<40 {
				if err := fs.WriteMeta(io.Discard); err != nil {
					t.Fatal(err)
				}
				return
			}
			path := image(t, fs)
			fsck(t, path)
			mounted, unmount := blocktest.Mount(t, path, "ext4", true)
			compare(t, everything(), mounted)
			unmount()
		})
	}
}
