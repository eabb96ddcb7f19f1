package ext4

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"thaw/blockmap"
)

// everything is a tree with at least one of each kind of thing.
func everything() *Inode {
	shared := file(9000, Run{0, 2, 100, 3})
	shared.UID, shared.GID = 1<<31+5, 1<<32-2
	root := dir(
		Dirent{"empty", file(0)},
		Dirent{"one byte", file(1, Run{0, 1, 0, 1})},
		Dirent{"exactly two blocks", file(8192, Run{0, 1, 1, 2})},
		Dirent{"hard link", shared},
		Dirent{"sub", dir(Dirent{"the same file", shared}, Dirent{"empty dir", dir()})},
		Dirent{"all hole", file(1 << 20)},
		Dirent{"hole first", file(5*4096, Run{3, 1, 3, 2})},
		Dirent{"hole last", file(100*4096+17, Run{0, 1, 5, 2})},
		Dirent{"holes", file(40*4096, Run{1, 1, 7, 1}, Run{3, 1, 20, 1}, Run{5, 3, 7, 10}, Run{15, 1, 9, 1})},
		Dirent{"5 GiB", file(5<<30+1, Run{0, 1, 30, 1}, Run{5 << 18, 1, 31, 1})},
		Dirent{"16 TiB", file(maxFileSize, Run{0, 1, 33, 1}, Run{1<<32 - 2, 1, 32, 1})},
		Dirent{"fifo", &Inode{Mode: modeFifo | 0o640}},
		Dirent{"socket", &Inode{Mode: modeSocket | 0o600, UID: 65536, GID: 65537}},
		Dirent{"null", &Inode{Mode: modeChar | 0o666, Major: 1, Minor: 3}},
		Dirent{"disk", &Inode{Mode: modeBlock | 0o660, Major: 259, Minor: 1<<20 - 1}},
		Dirent{"high major", &Inode{Mode: modeChar | 0o660, Major: 4095}},
		Dirent{"high minor", &Inode{Mode: modeChar | 0o660, Minor: 256}},
		Dirent{"setuid", &Inode{Mode: modeRegular | 0o4755}},
		Dirent{"setgid", &Inode{Mode: modeRegular | 0o2711}},
		Dirent{"tmp", &Inode{Mode: modeDir | 0o1777}},
		Dirent{"all bits", &Inode{Mode: modeDir | 0o7777}},
		Dirent{"no bits", &Inode{Mode: modeRegular}},
		Dirent{strings.Repeat("n", 255), file(0)},
		Dirent{"\xff\xfe\x01\n\\\"", file(0)},
	)
	for _, n := range []int{1, 59, 60, 61, 255, 4095} {
		root.Entries = append(root.Entries, Dirent{fmt.Sprint("symlink of ", n), symlink(strings.Repeat("s", n))})
	}
	for i, sec := range []int64{0, 1, -1, -1 << 31, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32, 1 << 33, 1<<33 + 1<<32, maxSeconds,
		-1<<31 - 1, maxSeconds + 1, -1 << 62, 1<<63 - 1} {
		in := file(0)
		in.Mtime = Time{sec, uint32(i)}
		in.Atime = Time{-sec, 999_999_999}
		in.Ctime = Time{sec + 1, 4_000_000_000}
		if sec == 1<<63-1 {
			in.Ctime.Sec = sec
		}
		root.Entries = append(root.Entries, Dirent{fmt.Sprint("time ", sec), in})
	}
	return root
}

func TestEverything(t *testing.T) {
	verify(t, everything(), testOptions)
}

// The device may have any size, and every part of the map follows it.
func TestSizes(t *testing.T) {
	for _, blocks := range []int64{0, 1, 2047, 2048, 2049, 32767, 32768, 32769, 32768*2 + 1, 32768*4 - 7,
		262144, 524288, 2097152 + 12345} {
		t.Run(fmt.Sprint(blocks), func(t *testing.T) {
			o := testOptions
			o.Size = blocks * blockSize
			fs := verify(t, everything(), o)
			if int64(fs.Blocks()) < blocks {
				t.Errorf("%d blocks", fs.Blocks())
			}
		})
	}
	t.Run("odd", func(t *testing.T) {
		o := testOptions
		o.Size = 200_000_001
		if fs := layout(t, dir(), o); fs.Blocks() != 48829 {
			t.Errorf("%d blocks", fs.Blocks())
		}
	})
}

// An empty filesystem of the usual size is a few blocks.
func TestCost(t *testing.T) {
	o := testOptions
	o.Size = 8 << 30
	fs := layout(t, dir(), o)
	// superblock, descriptors, two block bitmaps, inode bitmap, inode table,
	// journal superblock, root directory
	if n := fs.metaBlocks(); n != 8 {
		t.Errorf("%d blocks of metadata: %v", n, fs.Runs())
	}
	if fs.Blocks() != 2<<20 {
		t.Errorf("%d blocks", fs.Blocks())
	}
}

// Files that are neighbours in a stream are one run, whatever their names.
func TestPlacement(t *testing.T) {
	root := dir()
	r := rand.New(rand.NewPCG(1, 2))
	perm := r.Perm(1000)
	for i, p := range perm {
		sub := dir(Dirent{"f", file(3*4096, Run{0, 1 + uint32(p)%2, uint32(p) / 2 * 3, 3})})
		root.Entries = append(root.Entries, Dirent{fmt.Sprint(i), sub})
	}
	fs := layout(t, root, testOptions)
	var data []blockmap.Run
	for _, r := range fs.Runs() {
		if r.Stream != 0 {
			data = append(data, r)
		}
	}
	start := data[0].Device
	want := []blockmap.Run{{Device: start, Stream: 1, Count: 1500}, {Device: start + 1500, Stream: 2, Count: 1500}}
	if !slices.Equal(data, want) {
		t.Errorf("data runs %v, want %v", data, want)
	}
	verify(t, root, testOptions)
}

func TestDeterminism(t *testing.T) {
	write := func(shuffle bool) ([]byte, []blockmap.Run) {
		root := everything()
		for i := range 5000 {
			root.Entries = append(root.Entries, Dirent{fmt.Sprint("many ", i), file(0)})
		}
		if shuffle {
			rand.New(rand.NewPCG(3, 4)).Shuffle(len(root.Entries), func(i, j int) {
				root.Entries[i], root.Entries[j] = root.Entries[j], root.Entries[i]
			})
		}
		fs := layout(t, root, testOptions)
		// Laying out the same tree again changes nothing either.
		layout(t, root, Options{UUID: [16]byte{9}, HashSeed: [16]byte{9}})
		fs2 := layout(t, root, testOptions)
		var b, b2 bytes.Buffer
		if err := fs2.WriteMeta(&b2); err != nil {
			t.Fatal(err)
		}
		if err := fs.WriteMeta(&b); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b.Bytes(), b2.Bytes()) {
			t.Error("a second layout of the same tree has other bytes")
		}
		return b.Bytes(), fs.Runs()
	}
	b1, r1 := write(false)
	b2, r2 := write(true)
	if !bytes.Equal(b1, b2) || !slices.Equal(r1, r2) {
		t.Error("the order of the entries makes a difference")
	}
}
