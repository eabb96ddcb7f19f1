package blockmap_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// quiet sets o so that no sync runs during a test.
func quiet(o blockmap.CacheOptions) blockmap.CacheOptions {
	o.SyncEvery = time.Hour
	return o
}

func openImage(t *testing.T, dir string, m *blocktest.Image, o blockmap.CacheOptions) (*blockmap.Cache, *blockmap.Image, *blocktest.Origin) {
	t.Helper()
	return openImageBy(t, dir, m, o, false)
}

// openImageBy is openImage with a fetcher that brings leaves, or else chunks.
func openImageBy(t *testing.T, dir string, m *blocktest.Image, o blockmap.CacheOptions, leaves bool) (*blockmap.Cache, *blockmap.Image, *blocktest.Origin) {
	t.Helper()
	c, err := blockmap.OpenCache(dir, quiet(o))
	if err != nil {
		t.Fatal(err)
	}
	origin := blocktest.NewOrigin(m)
	fetch := newDirect(t, origin)
	fetch.leaves = leaves
	image, err := blockmap.NewImage(m.Index, c, fetch)
	if err != nil {
		t.Fatal(err)
	}
	return c, image, origin
}

func readAll(t *testing.T, image *blockmap.Image, m *blocktest.Image) {
	t.Helper()
	got, err := blocktest.Read(t.Context(), image, blockmap.Range(0, image.Size()))
	if err != nil || !bytes.Equal(got, m.Content) {
		t.Fatalf("the image has wrong bytes, or %v", err)
	}
}

// residentBlocks says of each block whether it is resident.
func residentBlocks(image *blockmap.Image) (resident []bool) {
	for at := int64(0); at < image.Size(); {
		s := image.Status(blockmap.Extent{Start: at, End: image.Size()})
		for range s.Len() / blockmap.BlockSize {
			resident = append(resident, s.Resident)
		}
		at = s.End
	}
	return resident
}

func TestKilledProcessLosesNothing(t *testing.T) {
	m := blocktest.NewImage(t, 20, 1500)
	dir, fsys := t.TempDir(), blocktest.NewFS()
	boot := blockmap.BootID{1}
	_, image, _ := openImageBy(t, dir, m, blockmap.CacheOptions{FS: fsys, Boot: boot}, true)
	part := blockmap.Range(image.Size()/3+4096, image.Size()/3)
	if _, err := blocktest.Read(t.Context(), image, part); err != nil {
		t.Fatal(err)
	}
	leaves := residentBlocks(image)
	fsys.Kill()
	// The leaves are there, also where others of their chunks are not.
	_, image, origin := openImage(t, dir, m, blockmap.CacheOptions{FS: fsys, Boot: boot})
	if got := residentBlocks(image); !slices.Equal(got, leaves) {
		t.Error("other blocks are resident than before the process was killed")
	}
	if got, err := blocktest.Read(t.Context(), image, part); err != nil || !bytes.Equal(got, m.Content[part.Start:part.End]) {
		t.Errorf("wrong bytes, or %v", err)
	}
	if n := origin.Requests(); n != 0 {
		t.Errorf("%d chunks were fetched again", n)
	}
	readAll(t, image, m)
	fsys.Kill()
	c, image, origin := openImage(t, dir, m, blockmap.CacheOptions{FS: fsys, Boot: boot})
	readAll(t, image, m)
	if n := origin.Requests(); n != 0 {
		t.Errorf("%d chunks were fetched again", n)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// After a power cut, and after a forced remount, every resident block has the right
// bytes, after any order of fetches, evictions and syncs.
func TestPowerCut(t *testing.T) {
	m := blocktest.NewImage(t, 21, 1200)
	kept := 0
	for seed := range uint64(24) {
		rng := rand.New(rand.NewPCG(seed, 21))
		dir, fsys := t.TempDir(), blocktest.NewFS()
		boot := byte(1)
		for range 5 {
			c, image, origin := openImageBy(t, dir, m, blockmap.CacheOptions{
				FS: fsys, Boot: blockmap.BootID{boot}, Quota: int64(len(m.Content)) / 2,
			}, rng.IntN(2) == 0)
			for at := int64(0); at < image.Size(); {
				s := image.Status(blockmap.Extent{Start: at, End: image.Size()})
				if s.Resident && !s.Zero {
					kept++
				}
				if s.Resident {
					got, err := blocktest.Read(t.Context(), image, s.Extent)
					if err != nil || !bytes.Equal(got, m.Content[s.Start:s.End]) {
						t.Fatalf("seed %d, boot %d: %v is resident and has wrong bytes, or %v", seed, boot, s.Extent, err)
					}
				}
				at = s.End
			}
			if origin.Requests() != 0 {
				t.Fatal("a read of resident blocks sent requests")
			}
			var wg sync.WaitGroup
			for range rng.IntN(40) {
				switch rng.IntN(5) {
				case 0:
					wg.Go(func() {
						if err := c.Sync(); err != nil {
							t.Error(err)
						}
					})
				default:
					at := rng.Int64N(image.Size() - 1<<18)
					if _, err := blocktest.Read(t.Context(), image, blockmap.Range(at, 1+rng.Int64N(1<<18))); err != nil {
						t.Fatal(err)
					}
				}
			}
			wg.Wait()
			fsys.Kill()
			var err error
			if rng.IntN(2) == 0 {
				boot++
				err = fsys.PowerCut(rng)
			} else {
				err = fsys.Remount(rng)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if kept == 0 {
		t.Error("no block ever survived: this tests nothing")
	}
}

// A power cut can tear the map, so that a chunk is partly resident. Blocks that count
// as resident can be read without a fetch.
func TestTornMap(t *testing.T) {
	m := blocktest.NewImage(t, 23, 1200)
	dir := t.TempDir()
	c, image, _ := openImage(t, dir, m, blockmap.CacheOptions{Boot: blockmap.BootID{1}})
	readAll(t, image, m)
	must(t, c.Close())
	for _, path := range dataFiles(t, dir) {
		path = filepath.Join(filepath.Dir(path), "map")
		b, err := os.ReadFile(path)
		must(t, err)
		for at := 4096; at < len(b); at += 3 * 8 {
			clear(b[at : at+8])
		}
		must(t, os.WriteFile(path, b, 0o600))
	}
	c, image, origin := openImage(t, dir, m, blockmap.CacheOptions{Boot: blockmap.BootID{1}})
	defer c.Close()
	kept := 0
	for at := int64(0); at < image.Size(); {
		s := image.Status(blockmap.Extent{Start: at, End: image.Size()})
		if s.Resident {
			got, err := blocktest.Read(t.Context(), image, s.Extent)
			if err != nil || !bytes.Equal(got, m.Content[s.Start:s.End]) {
				t.Fatalf("%v is resident and has wrong bytes, or %v", s.Extent, err)
			}
			if !s.Zero {
				kept++
			}
		}
		at = s.End
	}
	if n := origin.Requests(); n != 0 || kept == 0 {
		t.Errorf("%d requests for %d resident runs", n, kept)
	}
	readAll(t, image, m)
}

func TestReboot(t *testing.T) {
	m := blocktest.NewImage(t, 22, 800)
	dir := t.TempDir()
	c, image, _ := openImage(t, dir, m, blockmap.CacheOptions{Boot: blockmap.BootID{1}})
	readAll(t, image, m)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c, image, origin := openImage(t, dir, m, blockmap.CacheOptions{Boot: blockmap.BootID{2}})
	defer c.Close()
	readAll(t, image, m)
	if n := origin.Requests(); n != 0 {
		t.Errorf("%d chunks were fetched again after an orderly reboot", n)
	}
}

func TestSecondProcess(t *testing.T) {
	dir := t.TempDir()
	newCache(t, dir, blockmap.CacheOptions{})
	if _, err := blockmap.OpenCache(dir, blockmap.CacheOptions{}); !errors.Is(err, blockmap.ErrLocked) || !strings.Contains(err.Error(), dir) {
		t.Errorf("a second cache on one directory: %v", err)
	}
}

// Each kind of damage costs only a refetch.
func TestDamagedCache(t *testing.T) {
	m := blocktest.NewImage(t, 23, 600)
	each := func(name string, damage func(t *testing.T, stream string)) {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c, image, _ := openImage(t, dir, m, blockmap.CacheOptions{})
			readAll(t, image, m)
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			streams, err := filepath.Glob(filepath.Join(dir, "streams/*"))
			if err != nil || len(streams) != 3 {
				t.Fatal(streams, err)
			}
			damage(t, streams[0])
			c, image, origin := openImage(t, dir, m, blockmap.CacheOptions{})
			defer c.Close()
			readAll(t, image, m)
			if c.Dropped() != 1 || origin.Requests() == 0 {
				t.Errorf("%d streams were dropped, and %d chunks fetched again", c.Dropped(), origin.Requests())
			}
		})
	}
	flip := func(path string, at int64) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b[at] ^= 1
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	each("map header", func(t *testing.T, s string) { flip(filepath.Join(s, "map"), 50) })
	each("map cut", func(t *testing.T, s string) { must(t, os.Truncate(filepath.Join(s, "map"), 5000)) })
	each("data cut", func(t *testing.T, s string) { must(t, os.Truncate(filepath.Join(s, "data"), 8192)) })
	each("data gone", func(t *testing.T, s string) { must(t, os.Remove(filepath.Join(s, "data"))) })
	each("table altered", func(t *testing.T, s string) { flip(filepath.Join(s, "table"), 80) })
	each("table gone", func(t *testing.T, s string) { must(t, os.Remove(filepath.Join(s, "table"))) })
	each("map of another", func(t *testing.T, s string) {
		others, _ := filepath.Glob(filepath.Join(filepath.Dir(s), "*"))
		b, err := os.ReadFile(filepath.Join(others[1], "map"))
		must(t, err)
		must(t, os.WriteFile(filepath.Join(s, "map"), b, 0o600))
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestFillRefusesWrongContent(t *testing.T) {
	m := blocktest.NewImage(t, 24, 300)
	c := newCache(t, t.TempDir(), blockmap.CacheOptions{})
	s, err := c.Stream(&m.Index.Streams[0])
	must(t, err)
	for _, p := range [][]byte{nil, make([]byte, m.Index.Streams[0].Chunks[0].Size()), make([]byte, 4096*2000)} {
		if err := s.Fill(0, p); !errors.Is(err, blockmap.ErrDigest) || s.Has(0) {
			t.Errorf("%d wrong bytes: %v", len(p), err)
		}
	}
}

func TestFullDisk(t *testing.T) {
	m := blocktest.NewImage(t, 25, 600)
	fsys := blocktest.NewFS()
	c, image, _ := openImage(t, t.TempDir(), m, blockmap.CacheOptions{FS: fsys})
	defer c.Close()
	fsys.Fail(func(op, path string) error {
		if op == "write" && filepath.Base(path) == "data" {
			return blocktest.ErrDiskFull
		}
		return nil
	})
	_, err := blocktest.Read(t.Context(), image, blockmap.Range(0, image.Size()))
	if !errors.Is(err, blockmap.ErrNoSpace) || !strings.Contains(err.Error(), "disk of the cache is full") {
		t.Errorf("a full disk: %v", err)
	}
	for i := range m.Index.Streams {
		if s, err := c.Stream(&m.Index.Streams[i]); err != nil || s.Resident() != 0 {
			t.Errorf("%d bytes are resident, but no write succeeded (%v)", s.Resident(), err)
		}
	}
	if c.Used() > 64<<10 {
		t.Errorf("%d bytes are counted, but only tables and maps are stored", c.Used())
	}
	fsys.Fail(nil)
	readAll(t, image, m)
}

// fillable opens a stream whose chunks have the given numbers of blocks, as a device of
// its own, on a disk with space for room blocks.
func fillable(t *testing.T, room int64, blocks ...int) (image *blockmap.Image, fill func(i int) error) {
	t.Helper()
	var chunks [][]byte
	for i, n := range blocks {
		chunks = append(chunks, bytes.Repeat([]byte{byte(i + 1)}, n*blockmap.BlockSize))
	}
	table, _ := blocktest.Stream(t, chunks)
	ix := &blockmap.Index{Blocks: table.Blocks(), Streams: []blockmap.Table{*table},
		Runs: []blockmap.Run{{Count: table.Blocks()}}}
	must(t, ix.Seal())
	fsys := blocktest.NewFS()
	c := newCache(t, t.TempDir(), blockmap.CacheOptions{FS: fsys})
	image, err := blockmap.NewImage(ix, c, nil)
	must(t, err)
	s, err := c.Stream(&ix.Streams[0])
	must(t, err)
	const tablePages, mapPages = 1, 3 // pages that the stream uses as well
	fsys.Shrink(room + tablePages + mapPages)
	return image, func(i int) error { return s.Fill(i, chunks[i]) }
}

// A chunk that was partly written before the disk was full makes room for the next one.
func TestTornChunkLeavesTheDisk(t *testing.T) {
	image, fill := fillable(t, 15, 6, 10, 10)
	must(t, fill(0))
	v, ok := image.View(blockmap.Range(0, blockmap.BlockSize))
	if !ok {
		t.Fatal("a chunk that was just filled is not resident")
	}
	// The view pins chunk 0, so there is no room, and 9 of the 10 blocks of chunk 1
	// are written.
	if err := fill(1); !errors.Is(err, blockmap.ErrNoSpace) {
		t.Errorf("10 blocks with room for 9: %v", err)
	}
	v.Release()
	// The cache does not write to a full disk for a second.
	eventually(t, "the disk has room again, and the cache does not use it", func() bool { return fill(2) == nil })
	must(t, fill(1))
	must(t, fill(0))
}

// Chunks that fit on the disk only one at a time are all stored, though all are filled
// at once.
func TestFillsTakeTurnsOnAFullDisk(t *testing.T) {
	_, fill := fillable(t, 150, 100, 100, 100, 100)
	for range 50 {
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				if err := fill(i); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
}

// While views pin the whole quota, a reader that needs more gets an error. When the
// views are released, every read succeeds.
func TestQuotaInUse(t *testing.T) {
	m := blocktest.NewImage(t, 26, 1500)
	c, image, _ := openImage(t, t.TempDir(), m, blockmap.CacheOptions{Quota: 1 << 20})
	defer c.Close()
	var held []blockmap.View
	var err error
	for at := int64(0); at < image.Size() && err == nil; at += 4096 {
		if err = image.Fault(t.Context(), blockmap.Range(at, 4096)); err == nil {
			if v, ok := image.View(blockmap.Range(at, 4096)); ok {
				held = append(held, v)
			}
		}
	}
	if !errors.Is(err, blockmap.ErrNoSpace) {
		t.Errorf("a read while all of the quota is in use: %v", err)
	}
	for i := range held {
		held[i].Release()
	}
	for at := int64(0); at < image.Size(); at += 4096 {
		got, err := blocktest.Read(t.Context(), image, blockmap.Range(at, 4096))
		if err != nil || !bytes.Equal(got, m.Content[at:at+4096]) {
			t.Fatalf("read at %d: wrong bytes, or %v", at, err)
		}
	}
}

// In a small cache that is still larger than all fills in progress, every fill finds
// room.
func TestFillsAtOnceUnderAQuota(t *testing.T) {
	var chunks [][]byte
	for i := range 96 {
		chunks = append(chunks, bytes.Repeat([]byte{byte(i), 1}, 64<<10))
	}
	table, _ := blocktest.Stream(t, chunks)
	c := newCache(t, t.TempDir(), quiet(blockmap.CacheOptions{Quota: 4 << 20})) // 32 chunks
	s, err := c.Stream(table)
	must(t, err)
	var wg sync.WaitGroup
	for g := range 12 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(g), 1))
			for range 200 {
				i := rng.IntN(len(chunks))
				if err := s.Fill(i, chunks[i]); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if c.Evicted() == 0 || c.Used() > c.Quota() {
		t.Errorf("%d bytes were evicted, %d are used, %d are allowed", c.Evicted(), c.Used(), c.Quota())
	}
}

// spaceOf returns the space that the files of a cache and the directories of its
// streams take on disk.
func spaceOf(t *testing.T, dir string) (n int64) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() && filepath.Base(filepath.Dir(path)) != "streams" {
			return err
		}
		info, err := d.Info()
		if err == nil {
			n += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	}))
	return n
}

// Data that cannot be punched still counts, so that the disk never holds more than the
// quota.
func TestQuotaCountsWhatCannotBePunched(t *testing.T) {
	for name, leaves := range map[string]bool{"chunks": false, "leaves": true} {
		t.Run(name, func(t *testing.T) { testUnpunched(t, leaves) })
	}
}

func testUnpunched(t *testing.T, leaves bool) {
	m := blocktest.NewImage(t, 28, 3000)
	fsys, dir := blocktest.NewFS(), t.TempDir()
	quota := int64(len(m.Content)) / 2
	c := newCache(t, dir, quiet(blockmap.CacheOptions{FS: fsys, Quota: quota}))
	fetch := newDirect(t, blocktest.NewOrigin(m))
	fetch.hold, fetch.leaves = true, leaves
	image, err := blockmap.NewImage(m.Index, c, fetch)
	must(t, err)
	read := func() {
		t.Helper()
		for at := int64(0); at < image.Size(); at += 64 << 10 {
			e := blockmap.Range(at, min(64<<10, image.Size()-at))
			got, err := blocktest.Read(t.Context(), image, e)
			if err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
				t.Fatalf("read %v: wrong bytes, or %v", e, err)
			}
		}
	}
	fsys.Fail(func(op, path string) error {
		if op == "punch" {
			return syscall.EIO
		}
		return nil
	})
	for range 3 {
		read()
	}
	must(t, c.Sync())
	if n := spaceOf(t, dir); n > quota+64<<10 || c.Used() < n {
		t.Errorf("%d bytes are on disk and %d are counted, %d are allowed", n, c.Used(), quota)
	}
	if c.Held() == 0 {
		t.Error("no chunk is held in memory: this tests nothing")
	}
	fsys.Fail(nil)
	for range 2 {
		read()
	}
	c.StoreHeld()
	must(t, c.Sync())
	if n := spaceOf(t, dir); n > quota || c.Used() < n || c.Used() > quota {
		t.Errorf("punching works again: %d bytes are on disk and %d are counted, %d are allowed", n, c.Used(), quota)
	}
}

// A part of a chunk that was written before the disk was full also counts.
func TestTornChunkCounts(t *testing.T) {
	chunk := bytes.Repeat([]byte{1, 2}, 64<<10)
	table, _ := blocktest.Stream(t, [][]byte{chunk})
	fsys, dir := blocktest.NewFS(), t.TempDir()
	c := newCache(t, dir, quiet(blockmap.CacheOptions{FS: fsys}))
	s, err := c.Stream(table)
	must(t, err)
	fsys.Shrink(24) // pages, of 32
	if err := s.Fill(0, chunk); !errors.Is(err, blockmap.ErrNoSpace) || s.Has(0) {
		t.Fatalf("a chunk that does not fit: %v", err)
	}
	must(t, c.Sync())
	if n := spaceOf(t, dir); n < 64<<10 || c.Used() < n {
		t.Errorf("%d bytes are on disk, and %d are counted", n, c.Used())
	}
}

// If a file is in the place of a directory of the cache, the error gives the remedy.
func TestFileInPlaceOfDirectory(t *testing.T) {
	for _, name := range []string{"", "streams", "blobs", "blobs/sha256", "refs", "roots"} {
		dir := filepath.Join(t.TempDir(), "cache")
		path := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		must(t, os.WriteFile(path, []byte("a file"), 0o600))
		c, err := blockmap.OpenCache(dir, blockmap.CacheOptions{})
		if err == nil {
			c.Close()
			t.Fatalf("%s is a file, and OpenCache succeeded", path)
		}
		for _, want := range []string{path + " is not a directory", "remove it"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q does not say %q", err, want)
			}
		}
		must(t, os.Remove(path))
		newCache(t, dir, blockmap.CacheOptions{})
	}
}

// Recently used chunks stay, and the disk gets back the space of evicted ones.
func TestEvictsTheCold(t *testing.T) {
	m := blocktest.NewImage(t, 27, 6000)
	dir := t.TempDir()
	quota := int64(len(m.Content)) / 2
	c, image, origin := openImage(t, dir, m, blockmap.CacheOptions{Quota: quota})
	defer c.Close()
	hot := blockmap.Range(16<<10, 256<<10)
	for at := int64(0); at < image.Size(); at += 64 << 10 {
		for _, e := range []blockmap.Extent{hot, blockmap.Range(at, min(64<<10, image.Size()-at))} {
			if _, err := blocktest.Read(t.Context(), image, e); err != nil {
				t.Fatal(err)
			}
		}
	}
	if c.Evicted() == 0 {
		t.Fatal("nothing was evicted")
	}
	before := origin.Requests()
	if _, err := blocktest.Read(t.Context(), image, hot); err != nil || origin.Requests() != before {
		t.Errorf("chunks that were read all the time were evicted (%v)", err)
	}
	var allocated int64
	err := filepath.WalkDir(filepath.Join(dir, "streams"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "data" {
			f, err := blockmap.OS.Open(path, false)
			if err != nil {
				return err
			}
			defer f.Close()
			_, n, err := f.Stat()
			allocated += n
			return err
		}
		return err
	})
	if err != nil || allocated > quota+quota/8 {
		t.Errorf("%d bytes are allocated, %d are allowed (%v)", allocated, quota, err)
	}
}

func TestBlobsAndRefs(t *testing.T) {
	dir := t.TempDir()
	c := newCache(t, dir, blockmap.CacheOptions{})
	b := []byte("a manifest")
	must(t, c.PutBlob(b))
	must(t, c.PutRef("registry.example/a:v1", []byte("first")))
	must(t, c.PutRef("registry.example/a:v1", []byte("second")))
	d := blockmap.Digest(sha256.Sum256(b))
	if got, err := c.Blob(d); err != nil || !bytes.Equal(got, b) {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := c.Ref("registry.example/a:v1"); err != nil || string(got) != "second" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := c.Ref("registry.example/a:v2"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	must(t, os.WriteFile(filepath.Join(dir, "blobs/sha256", d.String()), []byte("another"), 0o600))
	if _, err := c.Blob(d); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a damaged blob: %v", err)
	}
	if c.Dropped() != 1 {
		t.Error("the damaged blob was not counted")
	}
}

// Several exports of one image store the same files at once.
func TestPutsAtOnce(t *testing.T) {
	c := newCache(t, t.TempDir(), blockmap.CacheOptions{})
	const name = "registry.example/a:v1"
	for i := range 50 {
		b := bytes.Repeat([]byte{byte(i)}, 10_000)
		var wg sync.WaitGroup
		for n := range 8 {
			wg.Go(func() {
				if err := errors.Join(c.PutBlob(b), c.PutRef(name, bytes.Repeat([]byte{byte(n)}, 1000+n))); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if got, err := c.Blob(sha256.Sum256(b)); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if ref, err := c.Ref(name); err != nil || len(ref) < 1000 || !bytes.Equal(ref, bytes.Repeat(ref[:1], 1000+int(ref[0]))) {
			t.Errorf("mixed bytes of two writes, %d bytes, or %v", len(ref), err)
		}
	}
}
