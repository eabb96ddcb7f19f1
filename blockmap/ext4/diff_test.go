package ext4

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// between are the blocks that differ between two devices.
func between(t testing.TB, a, b io.ReaderAt, size int64) (differ []blockmap.Extent) {
	t.Helper()
	x, y := make([]byte, blockSize), make([]byte, blockSize)
	for at := int64(0); at < size; at += blockSize {
		if _, err := a.ReadAt(x, at); err != nil {
			t.Fatal(err)
		}
		if _, err := b.ReadAt(y, at); err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(x, y) {
			continue
		}
		if n := len(differ); n > 0 && differ[n-1].End == at {
			differ[n-1].End += blockSize
		} else {
			differ = append(differ, blockmap.Range(at, blockSize))
		}
	}
	return differ
}

// within counts the blocks of a range that are in list.
func within(list []blockmap.Extent) func(start, count uint32) uint32 {
	return func(start, count uint32) (n uint32) {
		for _, e := range list {
			n += uint32(e.Intersect(blockmap.Range(int64(start)*blockSize, int64(count)*blockSize)).Len() / blockSize)
		}
		return n
	}
}

// changedByKernel is a filesystem before and after a kernel has changed its files.
func changedByKernel(t testing.TB, stop bool) (before, after diskFile, size int64) {
	t.Helper()
	root, _ := small()
	root.Entries = append(root.Entries, []Dirent{
		{"rewritten", file(3*4096, Run{0, 9, 0, 3})}, {"in place", file(8*4096, Run{0, 9, 3, 8})}, {"cut", file(4*4096, Run{0, 9, 11, 4})},
		{"mode", file(0)}, {"removed", file(4096, Run{0, 9, 15, 1})}, {"renamed", file(4096, Run{0, 9, 16, 1})}, {"kept", file(4096, Run{0, 9, 17, 1})},
		{"kind", file(0)}, {"attr", file(0)}, {"moved", dir(Dirent{"x", file(4096, Run{0, 9, 18, 1})}, Dirent{"y", dir(Dirent{"z", file(0)})})},
		{"gone", dir(Dirent{"a", file(0)}, Dirent{"b", dir()})}, {"read", file(4096, Run{0, 9, 19, 1})},
	}...)
	o := testOptions
	o.Size = 64 << 20
	d := t.TempDir()
	path := d + "/device"
	must0(t, os.Rename(image(t, layout(t, root, o)), path))
	copySparse(t, d+"/before", path)
	mounted, unmount := blocktest.Mount(t, path, "ext4", false)
	at := func(name string) string { return mounted + "/" + name }
	for _, do := range []func() error{
		func() error { return os.WriteFile(at("rewritten"), []byte("shorter"), 0o644) },
		func() error {
			f, err := os.OpenFile(at("in place"), os.O_WRONLY, 0)
			must0(t, err)
			defer f.Close()
			_, err = f.WriteAt([]byte("here"), 5*4096+7)
			return err
		},
		func() error { return os.Truncate(at("cut"), 5000) },
		func() error { return os.Chmod(at("mode"), 0o600) },
		func() error { return os.Remove(at("removed")) },
		func() error { return os.Rename(at("renamed"), at("new name")) },
		func() error { return os.Remove(at("kind")) },
		func() error { return os.Mkdir(at("kind"), 0o755) },
		func() error {
			return os.WriteFile(at("kind/inside"), bytes.Repeat([]byte("inside"), 1667)[:10_000], 0o644)
		},
		func() error { return unix.Setxattr(at("attr"), "user.x", []byte("y"), 0) },
		func() error { return os.Rename(at("moved"), at("elsewhere")) },
		func() error { return os.RemoveAll(at("gone")) },
		func() error { return os.WriteFile(at("added"), bytes.Repeat([]byte("added"), 5000), 0o644) },
		func() error { return os.Symlink("nowhere", at("link")) },
		func() error { _, err := os.ReadFile(at("read")); return err },
		func() error { return os.Chtimes(at("read"), time.Now(), time.Time{}) }, // its mtime stays
	} {
		must0(t, do())
	}
	if stop {
		f, err := os.Open(mounted)
		must0(t, err)
		must0(t, unix.Syncfs(int(f.Fd())))
		f.Close()
		copySparse(t, d+"/after", path)
		unmount()
	} else {
		unmount()
		must0(t, os.Rename(path, d+"/after"))
	}
	before, after = openDisk(t, d+"/before"), openDisk(t, d+"/after")
	return before, after, before.size(t)
}

// Diff names what the kernel has changed, on a filesystem that was unmounted and on one
// whose machine has stopped.
func TestDiff(t *testing.T) {
	for _, stop := range []bool{false, true} {
		t.Run(fmt.Sprintf("stopped=%v", stop), func(t *testing.T) {
			before, after, size := changedByKernel(t, stop)
			list, err := Diff(before, after, size, within(between(t, before, after, size)))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, d := range list {
				line := fmt.Sprintf("%s %s %d %d %d", d.Change, d.Path, d.Before, d.After, d.Written)
				if d.From != "" {
					line += " from " + d.From
				}
				if d.Metadata {
					line += " metadata"
				}
				got = append(got, line)
			}
			want := `A /added 0 25000 28672
M /attr 0 0 0 metadata
M /cut 16384 5000 4096
R /elsewhere 0 4096 0 from /moved
D /gone 0 0 0
D /gone/a 0 0 0
D /gone/b 0 0 0
M /in place 32768 32768 4096
D /kind 0 0 0
A /kind 0 4096 0
A /kind/inside 0 10000 12288
A /link 0 7 0
M /mode 0 0 0 metadata
R /new name 4096 4096 0 from /renamed
M /read 4096 4096 0 metadata
D /removed 4096 0 0
M /rewritten 12288 7 4096`
			var lines []string
			for _, l := range got {
				// The sizes and writes of directories are those of their blocks.
				if f := strings.Fields(l); f[1] == "/kind" || strings.HasPrefix(f[1], "/gone") || f[1] == "/elsewhere" {
					l = f[0] + " " + f[1]
				}
				lines = append(lines, l)
			}
			var wanted []string
			for l := range strings.Lines(want) {
				l = strings.TrimSpace(l)
				if f := strings.Fields(l); f[1] == "/kind" || strings.HasPrefix(f[1], "/gone") || f[1] == "/elsewhere" {
					l = f[0] + " " + f[1]
				}
				wanted = append(wanted, l)
			}
			if g, w := strings.Join(lines, "\n"), strings.Join(wanted, "\n"); g != w {
				t.Errorf("it is\n%s\nand should be\n%s", g, w)
			}
			if list, err := Diff(after, after, size, within(nil)); err != nil || len(list) != 0 {
				t.Errorf("nothing has changed, but %v, %v", list, err)
			}
		})
	}
}

// Owners names the users of all blocks: what nobody uses is as much as the superblock
// says is free.
func TestOwners(t *testing.T) {
	before, after, size := changedByKernel(t, false)
	for name, d := range map[string]diskFile{"before": before, "after": after} {
		all, err := Owners(d, size, []blockmap.Extent{{Start: 0, End: size}})
		if err != nil {
			t.Fatal(err)
		}
		sums := make(map[Use]int64)
		paths := make(map[string]int64)
		at := int64(0)
		for _, o := range all {
			if o.Start != at || o.Len() <= 0 {
				t.Fatalf("%s: %v follows byte %d", name, o, at)
			}
			at = o.End
			sums[o.Use] += o.Len()
			paths[string(o.Use)+" "+o.Path] += o.Len()
		}
		var s [superblockSize]byte
		if _, err := d.ReadAt(s[:], superblockOffset); err != nil {
			t.Fatal(err)
		}
		if free := int64(le.Uint32(s[sbFreeBlocks:])) * blockSize; at != size || sums[UseFree] != free {
			t.Errorf("%s: up to byte %d of %d; %d bytes free, the superblock says %d", name, at, size, sums[UseFree], free)
		}
		for _, u := range []Use{UseData, UseDirectory, UseTree, UseXattrs, UseSuper, UseBitmap, UseInodes, UseJournal} {
			if sums[u] == 0 {
				t.Errorf("%s: nothing has the use %s", name, u)
			}
		}
		if n := paths["data /in place"]; n != 8*blockSize {
			t.Errorf("%s: /in place has %d bytes", name, n)
		}
		if _, ok := paths["data /added"]; ok != (name == "after") {
			t.Errorf("%s: /added is there: %v", name, ok)
		}
	}
	// Ranges within and across what files have.
	differ := between(t, before, after, size)
	parts, err := Owners(after, size, differ)
	if err != nil {
		t.Fatal(err)
	}
	var sum, want int64
	for _, o := range parts {
		sum += o.Len()
	}
	for _, e := range differ {
		want += e.Len()
	}
	if sum != want {
		t.Errorf("the owners have %d of %d bytes", sum, want)
	}
}

// A walk of a directory that contains itself ends.
func TestWalkOfALoop(t *testing.T) {
	b := newBroken(t)
	sub := b.inode("sub")
	block := b.blocks[le.Uint32(sub[inBlock+ehSize+eeStart:])]
	e := block[24:] // behind "." and ".."
	le.PutUint32(e[deInode:], rootInode)
	if _, err := Diff(b.memory, b.memory, b.size, within(nil)); err == nil || !strings.Contains(err.Error(), "two directories have it") {
		t.Error(err)
	}
	// Owners takes a second name of a directory for a hard link.
	if _, err := Owners(b.memory, b.size, []blockmap.Extent{{Start: 0, End: b.size}}); err != nil {
		t.Error(err)
	}
}

// FuzzWalk breaks a filesystem and walks it, with checksums and without.
func FuzzWalk(f *testing.F) {
	b := newBroken(f)
	order := make([]uint32, 0, len(b.blocks))
	for _, r := range b.fs.Runs() {
		for i := uint32(0); r.Stream == 0 && i < r.Count; i++ {
			order = append(order, r.Device+i)
		}
	}
	f.Add([]byte{})
	for i := range len(order) {
		for _, at := range []int{0, 2, 4, 6, 8, 12, 24, 32, 40, 1024, 1028} {
			f.Add([]byte{byte(i), byte(at >> 8), byte(at), byte(at), 0})
		}
	}
	f.Fuzz(func(t *testing.T, edits []byte) {
		d := b.clone()
		for ; len(edits) >= 5; edits = edits[5:] {
			at := (int(edits[1])<<8 | int(edits[2])) % (blockSize - 1)
			copy(d.blocks[order[int(edits[0])%len(order)]][at:], edits[3:5])
		}
		_, _ = Diff(b.memory, d, d.size, within(nil))
		_, _ = Owners(d, d.size, []blockmap.Extent{{Start: 0, End: 1 << 20}, {Start: 2 << 20, End: d.size}})
		reads := &counting{memory: d}
		fs := &files{&checker{r: reads, size: d.size, used: true, lax: true}, make(map[uint32]struct{})}
		if fs.checkSuperblock() != nil || fs.checkDescriptors() != nil {
			return
		}
		o := &owners{files: fs, ranges: []blockmap.Extent{{Start: 0, End: d.size}}, seen: make(map[uint32]struct{})}
		if root, err := fs.inode(rootInode); err == nil && o.filesystem() == nil {
			_ = o.file("/", root, 0)
		}
		if most := 16 * d.size; reads.bytes > most {
			t.Errorf("%d bytes read of a device of %d", reads.bytes, d.size)
		}
	})
}
