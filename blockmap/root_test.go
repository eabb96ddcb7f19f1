package blockmap_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

var update = flag.Bool("update", false, "write the frozen bytes in testdata anew")

// frozen fails unless b is the content of a file in testdata, and returns it. These
// files never change: they are what earlier versions of the program wrote.
func frozen(t *testing.T, name string, b []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		must(t, os.MkdirAll("testdata", 0o755))
		must(t, os.WriteFile(path, b, 0o644))
	}
	want, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(b, want) {
		t.Fatalf("%s: encoded\n%x\nfrozen\n%x", name, b, want)
	}
	return want
}

func someRoot() blockmap.Root {
	return blockmap.Root{
		Image:   blockmap.Digest{1, 2, 3},
		Streams: []blockmap.Digest{{4}, {5, 1}, {5, 2}},
		Blobs:   []blockmap.Digest{{6}, {7}},
		Refs:    []string{"linux/amd64 registry.example/a:v1", "linux/amd64 registry.example/a:v2"},
	}
}

func TestFrozenRoot(t *testing.T) {
	r := someRoot()
	got, err := blockmap.DecodeRoot(frozen(t, "root", r.Encode()))
	must(t, err)
	if !reflect.DeepEqual(*got, r) {
		t.Errorf("decoded %+v, encoded %+v", got, r)
	}
	// The order of lists, and duplicates in them, make no difference.
	r.Streams = []blockmap.Digest{{5, 2}, {4}, {5, 1}, {4}}
	r.Refs = []string{r.Refs[1], r.Refs[0], r.Refs[1]}
	frozen(t, "root", r.Encode())
}

func TestRootAltered(t *testing.T) {
	r := someRoot()
	b := r.Encode()
	for i := range b {
		c := bytes.Clone(b)
		c[i] ^= 1 << (i % 8)
		if _, err := blockmap.DecodeRoot(c); !errors.Is(err, blockmap.ErrCorrupt) {
			t.Fatalf("a bit of byte %d was changed: %v", i, err)
		}
		if _, err := blockmap.DecodeRoot(b[:i]); !errors.Is(err, blockmap.ErrCorrupt) {
			t.Fatalf("cut to %d bytes: %v", i, err)
		}
	}
}

// sealRoot gives b the length and the checksum of a right root.
func sealRoot(b []byte) []byte {
	b = bytes.Clone(b)
	binary.LittleEndian.PutUint32(b[12:], uint32(len(b)-20))
	table := crc32.MakeTable(crc32.Castagnoli)
	binary.LittleEndian.PutUint32(b[16:], crc32.Update(crc32.Checksum(b[:16], table), table, b[20:]))
	return b
}

// A root may be wrong in spite of a right checksum.
func TestRootHostile(t *testing.T) {
	empty := blockmap.Root{Image: blockmap.Digest{1}}
	head := empty.Encode()[:20+32]
	digest := func(b byte) string { return string(append([]byte{b}, make([]byte, 31)...)) }
	for name, body := range map[string]string{
		"no lists":          "",
		"too many streams":  "\xff\xff\x03" + strings.Repeat("x", 100),
		"count of nothing":  "\x05" + digest(1),
		"unsorted streams":  "\x02" + digest(2) + digest(1) + "\x00\x00",
		"a stream twice":    "\x02" + digest(1) + digest(1) + "\x00\x00",
		"unsorted names":    "\x00\x00\x02\x01b\x01a",
		"a long name":       "\x00\x00\x01\x81\x20" + strings.Repeat("n", 4097),
		"more than it says": "\x00\x00\x00\x00",
		"a long number":     "\x80\x00\x00\x00",
		"many names":        "\x00\x00\x81\x08" + strings.Repeat("\x00", 1025),
	} {
		if _, err := blockmap.DecodeRoot(sealRoot(append(bytes.Clone(head), body...))); !errors.Is(err, blockmap.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := blockmap.DecodeRoot(sealRoot(append(bytes.Clone(head), 0, 0, 0))); err != nil {
		t.Error(err)
	}
}

func FuzzRoot(f *testing.F) {
	r := someRoot()
	f.Add(r.Encode())
	f.Add((&blockmap.Root{}).Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) >= 20 {
			b = sealRoot(b) // so that the fuzzer reaches the code behind the check
		}
		r, err := blockmap.DecodeRoot(b)
		if err != nil {
			if !errors.Is(err, blockmap.ErrCorrupt) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(r.Encode(), b) {
			t.Fatal("an accepted root encodes to other bytes")
		}
	})
}

// Roots outlive the process. Damaged roots are dropped.
func TestRootsAreKept(t *testing.T) {
	dir := t.TempDir()
	c := newCache(t, dir, blockmap.CacheOptions{})
	r := someRoot()
	other := blockmap.Root{Image: blockmap.Digest{9}, Streams: []blockmap.Digest{{5, 1}}, Refs: []string{r.Refs[1]}}
	must(t, c.AddRoot(other))
	must(t, c.AddRoot(blockmap.Root{Image: r.Image, Streams: r.Streams[1:], Refs: r.Refs}))
	must(t, c.AddRoot(blockmap.Root{Image: r.Image, Streams: r.Streams[:2], Blobs: r.Blobs}))
	other.Refs = nil // the name leads to r now
	want := []blockmap.Root{r, other}
	for _, when := range []string{"now", "after a restart"} {
		got := c.Roots()
		for i := range got { // an empty list is equal to none
			if len(got[i].Blobs) == 0 {
				got[i].Blobs = nil
			}
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: roots %+v, want %+v", when, got, want)
		}
		must(t, c.Close())
		c = newCache(t, dir, blockmap.CacheOptions{})
	}
	must(t, c.RemoveRoot(r.Image))
	must(t, c.Close())
	c = newCache(t, dir, blockmap.CacheOptions{})
	if got := c.Roots(); len(got) != 1 || got[0].Image != other.Image {
		t.Errorf("one root was removed: %+v", got)
	}
	must(t, c.Close())
	path := filepath.Join(dir, "roots", other.Image.String())
	must(t, os.WriteFile(path, []byte("damaged"), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "roots", blockmap.Digest{8}.String()), r.Encode(), 0o600))
	c = newCache(t, dir, blockmap.CacheOptions{})
	if got := c.Roots(); len(got) != 0 || c.Dropped() != 2 {
		t.Errorf("roots %+v, %d dropped: one is damaged, one has another's name", got, c.Dropped())
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a damaged root is still on disk: %v", err)
	}
	for _, tooLarge := range []blockmap.Root{
		{Streams: make([]blockmap.Digest, blockmap.MaxStreams+1)},
		{Refs: []string{strings.Repeat("x", 5000)}},
	} {
		for i := range tooLarge.Streams {
			tooLarge.Streams[i] = blockmap.Digest{byte(i), byte(i >> 8)}
		}
		if err := c.AddRoot(tooLarge); err == nil {
			t.Error("a root beyond the limits was accepted")
		}
	}
}

func first(t *blockmap.Table, _ []byte) *blockmap.Table { return t }

// Chunks of streams that no root holds are evicted before those of streams that a
// root holds, even if they were used later.
func TestUnrootedStreamsGoFirst(t *testing.T) {
	c := newCache(t, t.TempDir(), quiet(blockmap.CacheOptions{Quota: 4 << 20}))
	var tables []*blockmap.Table
	var streams []*blockmap.Stream
	chunks := make([][][]byte, 3)
	for i := range chunks {
		for n := range 24 { // 1.5 MiB
			chunks[i] = append(chunks[i], bytes.Repeat([]byte{byte(i + 1), byte(n)}, 32<<10))
		}
		table := first(blocktest.Stream(t, chunks[i]))
		s, err := c.Stream(table)
		must(t, err)
		tables, streams = append(tables, table), append(streams, s)
	}
	must(t, c.AddRoot(blockmap.Root{Image: blockmap.Digest{1}, Streams: []blockmap.Digest{streams[0].ID(), streams[2].ID()}}))
	// a root holds 0, the oldest chunk; no root holds 1, which was added later
	for i, s := range streams {
		for n := range tables[i].Chunks {
			must(t, s.Fill(n, chunks[i][n]))
		}
	}
	if c.Evicted() == 0 {
		t.Fatal("nothing was evicted: this tests nothing")
	}
	for i, s := range streams {
		all := s.Resident() == int64(tables[i].Blocks())*blockmap.BlockSize
		if rooted := i != 1; all != rooted {
			t.Errorf("stream %d has %d bytes; a root holds it: %v", i, s.Resident(), rooted)
		}
	}
}

// The cache first evicts small files that no root holds, then the least recently used
// roots with what only they hold, and last the roots of images in use.
func TestUnrootedSmallFilesGoFirst(t *testing.T) {
	dir := t.TempDir()
	const quota = 8 << 20 // of which 1 MiB is for small files
	c := newCache(t, dir, quiet(blockmap.CacheOptions{Quota: quota}))
	table := first(blocktest.Stream(t, [][]byte{make([]byte, blockmap.BlockSize)}))
	used, err := c.Stream(table)
	must(t, err)
	content := func(image, n int) []byte { return bytes.Repeat([]byte{byte(image), byte(n)}, 50<<10) }
	digest := func(b []byte) blockmap.Digest { return sha256.Sum256(b) }
	var images []blockmap.Root
	add := func(image int) {
		r := blockmap.Root{Image: blockmap.Digest{byte(image)}, Refs: []string{fmt.Sprint("name ", image)}}
		if image == 1 {
			r.Streams = []blockmap.Digest{used.ID()}
		}
		for n := range 2 {
			r.Blobs = append(r.Blobs, digest(content(image, n)))
		}
		images = append(images, r)
		must(t, c.AddRoot(r))
		for n := range 2 {
			must(t, c.PutBlob(content(image, n)))
		}
		must(t, c.PutRef(r.Refs[0], []byte("leads there")))
	}
	whole := func(r blockmap.Root) bool {
		for _, d := range r.Blobs {
			if _, err := c.Blob(d); err != nil {
				return false
			}
		}
		_, err := c.Ref(r.Refs[0])
		return err == nil
	}
	add(1)
	add(2)
	loose := [][]byte{content(100, 0), content(100, 1), content(100, 2)}
	for _, b := range loose {
		must(t, c.PutBlob(b))
	}
	add(3)
	add(4) // 8 blobs of images are 800 KiB, and 3 others 300 KiB
	for _, r := range images {
		if !whole(r) {
			t.Errorf("image %v has lost small files although there were some that no root holds", r.Image)
		}
	}
	if _, err := c.Blob(digest(loose[0])); err == nil {
		t.Error("the oldest blob that no root holds is still there: this tests nothing")
	}
	for image := 5; image < 12; image++ {
		add(image)
	}
	last := len(images) - 1
	if !whole(images[last]) || !whole(images[last-1]) || !whole(images[0]) {
		t.Error("an image that was opened last, or is in use, has lost small files")
	}
	if whole(images[1]) || len(c.Roots()) == len(images) {
		t.Error("the images that were opened long ago have all of their small files, beyond the share")
	}
	for _, r := range c.Roots() {
		if !whole(r) {
			t.Errorf("the root of %v exists but the files that it holds do not", r.Image)
		}
	}
	files, err := filepath.Glob(filepath.Join(dir, "roots/*"))
	if err != nil || len(files) != len(c.Roots()) {
		t.Errorf("%d files of roots for %d roots (%v)", len(files), len(c.Roots()), err)
	}
	used.Release()
}

// A root that cannot be written is valid until the process ends.
func TestRootOnAFailingDisk(t *testing.T) {
	fsys := blocktest.NewFS()
	c := newCache(t, t.TempDir(), blockmap.CacheOptions{FS: fsys})
	fsys.Fail(func(op, path string) error {
		if op == "write" && strings.Contains(path, "roots") {
			return blocktest.ErrInjected
		}
		return nil
	})
	if err := c.AddRoot(someRoot()); !errors.Is(err, blocktest.ErrInjected) {
		t.Errorf("the root could not be written: %v", err)
	}
	if len(c.Roots()) != 1 {
		t.Error("the root is not known")
	}
	fsys.Fail(nil)
	must(t, c.AddRoot(someRoot()))
}

// Roots, small files and chunks are added and removed at once under a small quota. No
// goroutine waits forever, and each remaining root has its file.
func TestRootsAtOnce(t *testing.T) {
	dir := t.TempDir()
	c := newCache(t, dir, blockmap.CacheOptions{Quota: 1 << 20, SyncEvery: time.Millisecond})
	var chunks [][]byte
	for i := range 40 {
		chunks = append(chunks, bytes.Repeat([]byte{byte(i), 7}, 32<<10))
	}
	table := first(blocktest.Stream(t, chunks))
	s, err := c.Stream(table)
	must(t, err)
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 5))
			for n := range 60 {
				image := blockmap.Digest{byte(rng.IntN(8))}
				b := bytes.Repeat([]byte{byte(g), byte(n)}, 8<<10)
				name := fmt.Sprint("name ", rng.IntN(10))
				i := rng.IntN(len(chunks))
				err := errors.Join(
					c.AddRoot(blockmap.Root{Image: image, Streams: []blockmap.Digest{s.ID()}, Blobs: []blockmap.Digest{sha256.Sum256(b)}, Refs: []string{name}}),
					c.PutBlob(b), c.PutRef(name, b[:100]), s.Fill(i, chunks[i]))
				if rng.IntN(4) == 0 {
					err = errors.Join(err, c.RemoveRoot(image))
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	s.Release()
	must(t, c.Sync())
	if c.Used() > c.Quota() {
		t.Errorf("%d bytes are used, %d are allowed", c.Used(), c.Quota())
	}
	files, err := filepath.Glob(filepath.Join(dir, "roots/*"))
	must(t, err)
	if len(files) != len(c.Roots()) {
		t.Errorf("%d files of roots for %d roots", len(files), len(c.Roots()))
	}
}
