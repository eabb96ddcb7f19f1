package ext4

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap/blocktest"
)

// Every name of a large directory is found and listed, and after a mount to
// write, the kernel can add to it and take away.
func TestLargeDirectory(t *testing.T) {
	root := dir()
	shared := file(0)
	n := 100_000
	if testing.Short() {
		n /= 10
	}
	for _, name := range names("a name of middling length ", n) {
		in := shared
		if len(root.Entries)%10 != 0 && len(root.Entries) < 60_000 {
			in = file(0)
		}
		root.Entries = append(root.Entries, Dirent{name, in})
	}
	fs := verify(t, dir(Dirent{"d", root}), testOptions)

	path := image(t, fs)
	mounted, unmount := blocktest.Mount(t, path, "ext4", false)
	for i, e := range root.Entries {
		if i%4 == 0 {
			if err := os.Remove(mounted + "/d/" + e.Name); err != nil {
				t.Fatal(err)
			}
		}
		if i%4 == 1 {
			if err := unix.Mknod(fmt.Sprint(mounted, "/d/new ", i), unix.S_IFIFO, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	unmount()
	fsck(t, path)
}

// Names that are not text hash as unsigned bytes.
func TestDirectoryOfBytes(t *testing.T) {
	root := dir()
	for i := 0; i < 1<<16; i++ {
		if testing.Short() {
			i += 12
		}
		name := string([]byte{byte(i >> 8), byte(i)})
		if strings.ContainsAny(name, "/\x00") || name == ".." {
			continue
		}
		if i%3 == 0 {
			name = strings.Repeat(name, 20)
		}
		root.Entries = append(root.Entries, Dirent{name, file(0)})
	}
	o := testOptions
	o.HashSeed = [16]byte{} // the algorithm's own
	verify(t, root, o)
}

func TestLongNames(t *testing.T) {
	root := dir()
	for _, name := range names("", 8000) {
		root.Entries = append(root.Entries, Dirent{name + strings.Repeat("\xfe", 255-len(name)), file(0)})
	}
	fs := verify(t, root, testOptions)
	if n := fs.nodes[0].blocks; n != 1+2+534 {
		t.Errorf("%d blocks", n)
	}
}

func TestManySubdirectories(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes seconds")
	}
	for _, n := range []int{maxLinks - 2, maxLinks - 1, 70_000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			root := dir()
			for _, name := range names("d", n) {
				root.Entries = append(root.Entries, Dirent{name, dir()})
			}
			tree := dir(Dirent{"many", root})
			if n == 70_000 {
				verify(t, tree, testOptions)
			} else {
				fsck(t, image(t, layout(t, tree, testOptions)))
			}
		})
	}
}

// The size at which a directory gets its second block.
func TestDirectorySizes(t *testing.T) {
	root := dir()
	for n := 330; n < 350; n++ { // (4084-24)/12 is 338
		d := dir()
		for _, name := range names("x", n) {
			d.Entries = append(d.Entries, Dirent{fmt.Sprintf("%.4s", name+"..."), file(0)})
		}
		root.Entries = append(root.Entries, Dirent{fmt.Sprint("entries ", n), d})
	}
	fs := verify(t, root, testOptions)
	for _, e := range root.Entries {
		want := uint32(1) // without an index; with one, a leaf has no "." and ".."
		if len(e.Inode.Entries) > 338 {
			want = 2 + uint32(len(e.Inode.Entries)-1)/340
		}
		if got := fs.nodes[e.Inode.index].blocks; got != want {
			t.Errorf("%q has %d blocks, want %d", e.Name, got, want)
		}
	}
}

// Names of one hash that end up in two leaves are all found.
func TestHashCollisions(t *testing.T) {
	h := newNameHasher(testOptions.HashSeed, false)
	pad := strings.Repeat("p", 240)
	seen := make(map[uint32]string)
	root := dir(Dirent{lastName, file(0)})
	for i := range 600_000 {
		name := fmt.Sprint(pad, i)
		hash, _ := h.hash(name)
		if other, ok := seen[hash]; ok && len(root.Entries) < 200 {
			root.Entries = append(root.Entries, Dirent{name, file(0)})
			if other != "" {
				root.Entries = append(root.Entries, Dirent{other, file(0)})
			}
			name = "" // it is in already
		}
		seen[hash] = name
	}
	if len(root.Entries) < 100 {
		t.Fatalf("only %d names collide", len(root.Entries))
	}
	for _, fan := range []int{0, 3, 4} {
		o := testOptions
		o.dxFan = fan
		verify(t, root, o)
	}
}

// Trees of two and three levels, made from few entries by leaving nodes emptier
// than they could be.
func TestDeepHashTree(t *testing.T) {
	for _, test := range []struct {
		fan, entries, indirect int
	}{{3, 40, 0}, {3, 100, 1}, {3, 400, 2}, {7, 4000, 2}} {
		t.Run(fmt.Sprint(test.fan, test.entries), func(t *testing.T) {
			root := dir()
			for _, name := range names(strings.Repeat("deep", 50), test.entries) {
				root.Entries = append(root.Entries, Dirent{name, file(0)})
			}
			o := testOptions
			o.dxFan = test.fan
			fs := verify(t, root, o)
			if fs.largeDir != (test.indirect == 2) {
				t.Errorf("large_dir is %v", fs.largeDir)
			}
		})
	}
}

func TestTooDeepHashTree(t *testing.T) {
	root := dir()
	for _, name := range names(strings.Repeat("deep", 50), 1000) {
		root.Entries = append(root.Entries, Dirent{name, file(0)})
	}
	o := testOptions
	o.dxFan = 2
	if _, err := Layout(root, o); err == nil || !strings.Contains(err.Error(), "hash tree") {
		t.Errorf("a tree of many levels: %v", err)
	}
}

// Paths that are deeper than the kernel takes in one call.
func TestDeepPath(t *testing.T) {
	const depth = 300
	root := dir()
	for i, d := 0, root; i < depth; i++ {
		next := dir()
		d.Entries = []Dirent{{fmt.Sprint("directory at depth ", i), next}, {"f", file(int64(i))}}
		d = next
	}
	fs := layout(t, root, testOptions)
	path := image(t, fs)
	fsck(t, path)
	mounted, _ := blocktest.Mount(t, path, "ext4", true)
	fd, err := unix.Open(mounted, unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range depth {
		var st unix.Stat_t
		if err := unix.Fstatat(fd, "f", &st, 0); err != nil || st.Size != int64(i) {
			t.Fatalf("depth %d: size %d, %v", i, st.Size, err)
		}
		next, err := unix.Openat(fd, fmt.Sprint("directory at depth ", i), unix.O_DIRECTORY, 0)
		if err = errors.Join(err, unix.Close(fd)); err != nil {
			t.Fatal(err)
		}
		fd = next
	}
	unix.Close(fd)

	// Nothing here recurses, so neither does a tree of any depth.
	d := root
	for range 100_000 {
		next := dir()
		d.Entries = []Dirent{{"d", next}}
		d = next
	}
	fs = layout(t, root, testOptions)
	fsck(t, image(t, fs))
}

// lastName has under the seed of testOptions the hash that is kept for the end of
// the directory, so that it gets the one below.
const lastName = "eof-iheyqaaa"

func TestHash(t *testing.T) {
	h := newNameHasher(testOptions.HashSeed, false)
	if hash, _ := h.hash(lastName); hash != 0xFFFFFFFC {
		t.Errorf("the hash of %q is %#x", lastName, hash)
	}
	path := image(t, layout(t, dir(), testOptions))
	long := strings.Repeat("0123456789abcdef", 16)
	for n := 1; n < 255; n += 1 + n/8 {
		for _, seed := range []string{"", "01020304-0506-0708-090a-0b0c0d0e0f10"} {
			h := newNameHasher([16]byte{}, true)
			command := "dx_hash -h half_md4 "
			if seed != "" {
				h = newNameHasher(testOptions.HashSeed, true)
				command += "-s " + seed + " "
			}
			hash, minor := h.hash(long[:n])
			want := fmt.Sprintf("0x%x (minor 0x%x)", hash, minor)
			if out := debugfs(t, path, command+long[:n]); !strings.Contains(out, want) {
				t.Fatalf("hash of %q is %s, and debugfs says %s", long[:n], want, out)
			}
		}
	}
}
