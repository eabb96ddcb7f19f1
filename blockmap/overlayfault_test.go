package blockmap_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// Where the disk has no room for an operation, that write fails with ErrNoSpace, nothing
// else is lost, and later writes succeed once there is room.
func TestOverlayOnAFullDisk(t *testing.T) {
	base, stamps := stampedBase(70)
	for seed := range uint64(2) {
		total := int64(1)
		for n := int64(0); n < total; n++ {
			rng := rand.New(rand.NewPCG(seed, 120))
			x := newMachine(t, base)
			var ops atomic.Int64
			d, err := x.open()
			must(t, err)
			x.fsys.Fail(func(op, _ string) error {
				if op == "write" || op == "zero" {
					if i := ops.Add(1); n > 0 && i >= n && i < n+3 {
						return blocktest.ErrDiskFull
					}
				}
				return nil
			})
			w := &writer{t: t, d: d, m: newSectors(stamps), rng: rng}
			for i := range 40 {
				err := w.write()
				if i%8 == 7 {
					err = errors.Join(err, w.flush())
				}
				if err != nil && !errors.Is(err, blockmap.ErrNoSpace) {
					t.Fatalf("on a full disk: %v", err)
				}
			}
			total = max(total, ops.Load())
			x.fsys.Fail(x.step)
			w.check("after a disk was full")
			must(t, w.flush())
			must(t, w.write())
			if err := d.Stats().Err; err != nil {
				t.Fatal(err)
			}
			x.restart(d, true, rng)
			d, err = x.open()
			must(t, err)
			w.m.crash(t, d, true, fmt.Sprint("full at write ", n))
			must(t, d.Close())
		}
		if total < 30 {
			t.Fatalf("%d writes: this tests too little", total)
		}
	}
}

// A really full disk takes writes to what has space, and others once something was
// discarded.
func TestOverlayFillsTheDisk(t *testing.T) {
	disk := newDisk(t, 24<<20, "mkfs.ext4", "-q", "-m", "0")
	base := blocktest.NewMemory(64 << 20)
	d := openOverlay(t, filepath.Join(disk.at, "overlay"), base, blockmap.OverlayOptions{})
	p := make([]byte, 64<<10)
	for i := range p {
		p[i] = byte(i%255 + 1)
	}
	at := int64(0)
	var err error
	for ; at < base.Size() && err == nil; at += int64(len(p)) {
		err = d.WriteAt(t.Context(), p, at)
	}
	if !errors.Is(err, blockmap.ErrNoSpace) {
		t.Fatalf("a write to a full disk: %v", err)
	}
	for again := int64(0); again < at-int64(len(p)); again += int64(len(p)) {
		must(t, d.WriteAt(t.Context(), p, again))
	}
	must(t, d.Flush(t.Context()))
	must(t, d.Discard(t.Context(), blockmap.Range(0, 8<<20))) // its space comes back with a flush
	for n := range int64(64) {
		must(t, d.WriteAt(t.Context(), p, base.Size()-(n+1)*int64(len(p))))
	}
	must(t, d.Flush(t.Context()))
	got, err := blocktest.Read(t.Context(), d, blockmap.Range(base.Size()-int64(len(p)), int64(len(p))))
	if err != nil || string(got) != string(p) {
		t.Errorf("wrong bytes, or %v", err)
	}
	must(t, d.Close())
}

// What a write has taken of the disk before it failed is given back.
func TestOverlayGivesBack(t *testing.T) {
	base, stamps := stampedBase(70)
	fsys := blocktest.NewFS()
	d := openOverlay(t, t.TempDir(), base, blockmap.OverlayOptions{FS: fsys})
	m := newSectors(stamps)
	fsys.Shrink(4)
	if err := d.WriteAt(t.Context(), stamped(1, 8*5), 0); !errors.Is(err, blockmap.ErrNoSpace) {
		t.Fatalf("a write of 5 blocks where there is room for 4: %v", err)
	}
	must(t, d.WriteAt(t.Context(), stamped(2, 8*3), 40*4096)) // and a page of the map
	m.write(40*8, 8*3, 2, false)
	m.check(t, d, 0, len(m.now), "after a write that had no room")
	if st := d.Stats(); st.Data != 3*4096 {
		t.Errorf("%d bytes are counted", st.Data)
	}
}

// A limit is exact, whoever writes at the same time.
func TestOverlayLimit(t *testing.T) {
	const blocks, limit, writers = 400, 100, 8
	base, _ := stampedBase(blocks)
	d := openOverlay(t, t.TempDir(), base, blockmap.OverlayOptions{Limit: limit * blockmap.BlockSize})
	var taken atomic.Int64
	done := make(chan error, writers)
	for i := range int64(writers) {
		go func() {
			for b := i; b < blocks; b += writers {
				switch err := d.WriteAt(context.Background(), stamped(1, 8), b*blockmap.BlockSize); {
				case err == nil:
					taken.Add(1)
				case !errors.Is(err, blockmap.ErrNoSpace):
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range writers {
		must(t, <-done)
	}
	st := d.Stats()
	if taken.Load() != limit || st.Data != limit*blockmap.BlockSize || st.Limit != st.Data {
		t.Errorf("%d blocks were written, %d bytes are counted, %d blocks are allowed", taken.Load(), st.Data, limit)
	}
	for c := range d.Changes() { // what has space takes writes, and a discard makes room
		must(t, d.WriteAt(t.Context(), stamped(2, int(c.Len()/sectorSize)), c.Start))
	}
	for c := range d.Changes() {
		must(t, d.Discard(t.Context(), c.Extent))
		must(t, d.WriteAt(t.Context(), stamped(3, int(c.Len()/sectorSize)), c.Start))
		break
	}
	if _, err := blockmap.OpenOverlay(t.TempDir(), base, blockmap.OverlayOptions{Limit: 100}); err == nil || !strings.Contains(err.Error(), "at least 4096") {
		t.Errorf("a limit below a block: %v", err)
	}
}

// A sync that fails poisons the overlay: writes and flushes fail and say what to do, reads
// go on, and the next open finds what was durable before.
func TestOverlayPoisoned(t *testing.T) {
	base, stamps := stampedBase(70)
	for seed := range uint64(3) {
		syncs := int64(0)
		for n := int64(0); n <= syncs; n++ {
			rng := rand.New(rand.NewPCG(seed, 121))
			x := newMachine(t, base)
			d, err := x.open()
			must(t, err)
			var count atomic.Int64
			x.fsys.Fail(func(op, path string) error {
				if op == "sync" && count.Add(1) == n {
					return syscall.EIO
				}
				return nil
			})
			w := &writer{t: t, d: d, m: newSectors(stamps), rng: rng}
			var failed error
			var frozen *blockmap.Frozen
			for i := 0; i < 60 && failed == nil; i++ {
				failed = w.write()
				if failed == nil && i%7 == 6 {
					failed = w.flush()
				}
				if failed == nil && i == 20 {
					if frozen, failed = d.Freeze(t.Context()); failed == nil {
						w.m.flush()
					}
				}
				if failed == nil && i == 40 {
					failed = frozen.Merge(t.Context())
				}
			}
			syncs = max(syncs, count.Load())
			x.fsys.Fail(x.step)
			if failed == nil {
				must(t, d.Close())
				continue
			}
			if !errors.Is(failed, syscall.EIO) {
				t.Fatalf("the sync failed with EIO, and the caller gets %v", failed)
			}
			w.check("after a sync has failed")
			if d.Stats().Err != nil { // a level that cannot be made, or removed, costs nothing
				for what, err := range map[string]error{"write": w.write(), "flush": w.flush(), "zero": d.Zero(t.Context(), blockmap.Range(0, 4096), true)} {
					if err == nil || !strings.Contains(err.Error(), "open the overlay again") || !errors.Is(err, syscall.EIO) {
						t.Errorf("%s after a sync has failed: %v", what, err)
					}
				}
				if _, err := d.Freeze(t.Context()); err == nil {
					t.Error("an overlay was frozen after a sync has failed")
				}
			}
			_ = d.Close()
			x.fsys.Kill()
			// The machine goes on, but what it has in memory was not all written.
			d, err = x.open()
			must(t, err)
			what := fmt.Sprintf("sync %d of seed %d failed", n, seed)
			w.m.crash(t, d, true, what)
			w.d = d
			must(t, w.flush())
			x.restart(d, true, rng)
			d, err = x.open()
			must(t, err)
			w.m.crash(t, d, true, what+", and then the power")
			must(t, d.Close())
		}
		if syncs < 10 {
			t.Fatalf("%d syncs: this tests too little", syncs)
		}
	}
}

// Data that the disk cannot read fails, and never reads as something else. A write of
// whole blocks heals it.
func TestOverlayUnreadable(t *testing.T) {
	base, stamps := stampedBase(70)
	fsys := blocktest.NewFS()
	d := openOverlay(t, t.TempDir(), base, blockmap.OverlayOptions{FS: fsys})
	m := newSectors(stamps)
	ctx := t.Context()
	must(t, d.WriteAt(ctx, stamped(7, 8*20), 0))
	m.write(0, 8*20, 7, false)
	fsys.Fail(func(op, path string) error {
		if op == "read" && filepath.Base(path) == "data" {
			return syscall.EIO
		}
		return nil
	})
	bad := blockmap.Range(5*blockmap.BlockSize, blockmap.BlockSize)
	if v, ok := d.Load(ctx, bad); ok {
		v.Release()
		t.Fatal("a block that cannot be read was loaded")
	}
	if v, ok := d.View(bad); ok {
		v.Release()
		t.Error("a block that cannot be read is viewed")
	}
	for what, e := range map[string]blockmap.Extent{"a part": {Start: bad.Start + 5, End: bad.Start + 6}, "the block": bad, "around it": around(bad)} {
		_, err := blocktest.Read(ctx, d, e)
		if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "write whole blocks again") {
			t.Errorf("read %s: %v", what, err)
		}
	}
	fsys.Fail(nil) // it was a passing failure
	m.check(t, d, 0, len(m.now), "after a failure that has passed")
	// One that stays is over when the block is written.
	fsys.Fail(func(op, path string) error {
		if op == "read" && filepath.Base(path) == "data" {
			return syscall.EIO
		}
		return nil
	})
	if _, ok := d.Load(ctx, bad); ok {
		t.Fatal("a block that cannot be read was loaded")
	}
	must(t, d.WriteAt(ctx, stamped(8, 8), bad.Start))
	if v, ok := d.View(bad); !ok {
		t.Error("a block that was written again cannot be viewed")
	} else {
		v.Release()
	}
	must(t, d.Close())
}

func around(e blockmap.Extent) blockmap.Extent {
	return blockmap.Extent{Start: e.Start - 2*blockmap.BlockSize, End: e.End + 2*blockmap.BlockSize}
}

// If the data file is cut short under a running overlay, what was there fails to be read
// until it is written again. It does so after a restart, too. Nothing else is lost.
func TestOverlayCutShort(t *testing.T) {
	base, stamps := stampedBase(70)
	for _, frozen := range []bool{false, true} {
		for _, left := range []int64{0, 4096, 7 * 4096, 100_000} {
			t.Run(fmt.Sprintf("frozen %v, %d bytes left", frozen, left), func(t *testing.T) {
				dir := t.TempDir()
				boot := blockmap.OverlayOptions{Boot: blockmap.BootID{1}}
				d := openOverlay(t, dir, base, boot)
				m := newSectors(stamps)
				ctx := t.Context()
				must(t, d.WriteAt(ctx, stamped(7, 8*20), 0))
				must(t, d.Discard(ctx, blockmap.Range(30*4096, 4*4096)))
				m.write(30*8, 4*8, 0, false)
				must(t, d.Flush(ctx))
				file := filepath.Join(dir, "data")
				if frozen {
					f, err := d.Freeze(ctx)
					must(t, err)
					defer func() { _ = f.Merge(context.Background()) }()
				}
				v, ok := d.View(blockmap.Range(19*4096, 4096))
				if !ok {
					t.Fatal("what was just written cannot be viewed")
				}
				must(t, os.Truncate(file, left))
				must(t, os.Truncate(file, 71*4096)) // it is as long as it was, and has holes
				for b := range int64(20) {
					got, err := blocktest.Read(ctx, d, blockmap.Range(b*4096, 4096))
					if err == nil {
						t.Fatalf("block %d reads as %x...; it was cut off", b, got[:8])
					}
					if !errors.Is(err, blockmap.ErrDamaged) || !strings.Contains(err.Error(), "restore the overlay") {
						t.Fatalf("block %d: %v", b, err)
					}
				}
				if err := d.WriteAt(ctx, stamped(8, 1), 3*4096); err == nil {
					t.Error("a part of a block that is lost was written")
				}
				must(t, d.WriteAt(ctx, stamped(9, 8*10), 0))
				m.write(0, 8*10, 9, false)
				m.check(t, d, 0, 8*10, "what was written again")
				m.check(t, d, 8*20, len(m.now)-8*20, "what was not cut off")
				must(t, d.Zero(ctx, blockmap.Range(10*4096, 2*4096), true))
				must(t, d.Zero(ctx, blockmap.Range(12*4096, 2*4096), false))
				m.write(10*8, 4*8, 0, false)
				m.check(t, d, 0, 8*14, "what was made zeros")
				if _, err := blocktest.Read(ctx, d, blockmap.Range(15*4096, 4096)); !errors.Is(err, blockmap.ErrDamaged) {
					t.Errorf("what was cut off, after other writes: %v", err)
				}
				if frozen {
					v.Release()
					return
				}
				got := make([]byte, 4096)
				if err := v.CopyTo(got); err == nil && left < 19*4096 && string(got) != string(stamped(7, 8)) && string(got) != string(make([]byte, 4096)) {
					t.Error("a view that was held shows other bytes")
				}
				v.Release()
				must(t, d.Close())
				d = openOverlay(t, dir, base, boot)
				m.check(t, d, 0, 8*14, "after a restart")
				m.check(t, d, 8*20, len(m.now)-8*20, "after a restart")
				if _, err := blocktest.Read(ctx, d, blockmap.Range(15*4096, 4096)); !errors.Is(err, blockmap.ErrDamaged) {
					t.Errorf("what was cut off, after a restart: %v", err)
				}
				must(t, d.Close())
			})
		}
	}
}

// What is not the overlay of this device is refused, and the refusal says what to do.
func TestOverlayRefusals(t *testing.T) {
	base, _ := stampedBase(20)
	bigger, _ := stampedBase(21)
	here := blockmap.OverlayOptions{Digest: blockmap.Digest{1}, Image: "registry.example/a@sha256:01"}
	refused := func(what, dir string, base blockmap.Device, o blockmap.OverlayOptions, why ...string) {
		t.Helper()
		d, err := blockmap.OpenOverlay(dir, base, o)
		if err == nil {
			d.Close()
			t.Errorf("%s was opened", what)
			return
		}
		for _, w := range append(why, dir) {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q does not say %q", what, err, w)
			}
		}
	}
	made := func() string {
		dir := filepath.Join(t.TempDir(), "overlay")
		d, err := blockmap.OpenOverlay(dir, base, here)
		must(t, err)
		must(t, d.WriteAt(t.Context(), make([]byte, 4096), 0))
		must(t, d.Close())
		return dir
	}
	dir := made()
	other := here
	other.Digest = blockmap.Digest{2}
	refused("the overlay of another image", dir, base, other, "registry.example/a@sha256:01", "use another directory")
	refused("the overlay of another device", dir, bigger, here, "81920", "use another directory")
	d, err := blockmap.OpenOverlay(dir, base, here)
	must(t, err)
	if _, err := blockmap.OpenOverlay(dir, base, here); !errors.Is(err, blockmap.ErrLocked) {
		t.Errorf("an overlay that is open: %v", err)
	}
	must(t, d.Close())

	foreign := t.TempDir()
	must(t, os.WriteFile(filepath.Join(foreign, "data"), []byte("somebody's"), 0o600))
	refused("the directory of something else", foreign, base, here, "other files", "data")
	if b, err := os.ReadFile(filepath.Join(foreign, "data")); err != nil || string(b) != "somebody's" {
		t.Errorf("the file of something else has %q, %v", b, err)
	}
	if left, _ := os.ReadDir(foreign); len(left) != 1 {
		t.Errorf("a refused directory has %d entries", len(left))
	}
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	refused("a file", file, base, here)
	open := filepath.Join(t.TempDir(), "open")
	must(t, os.Mkdir(open, 0o700))
	must(t, os.Chmod(open, 0o777))
	refused("a directory of everybody's", open, base, here, "chmod go-w")

	for name, why := range map[string]string{"data": "missing, or was cut short", "map": "restore it from a copy", "header": "use an empty directory"} {
		dir := made()
		must(t, os.Remove(filepath.Join(dir, name)))
		refused("an overlay without "+name, dir, base, here, why)
		refused("an overlay without "+name+", once more", dir, base, here, why)
	}
	for name, why := range map[string]string{"data": "missing, or was cut short", "map": "restore it from a copy", "header": "restore it from a copy"} {
		for _, left := range []int64{0, 20} {
			dir := made()
			must(t, os.Truncate(filepath.Join(dir, name), left))
			refused(fmt.Sprintf("an overlay with %d bytes of %s", left, name), dir, base, here, why)
		}
	}
	// Only the page cache has these data, of which nothing is durable.
	fsys, lost := blocktest.NewFS(), t.TempDir()
	killed := here
	killed.FS, killed.Boot = fsys, blockmap.BootID{1}
	d, err = blockmap.OpenOverlay(lost, base, killed)
	must(t, err)
	must(t, d.WriteAt(t.Context(), make([]byte, 4096), 0))
	fsys.Fail(func(string, string) error { return errDead })
	_ = d.Close()
	fsys.Kill()
	fsys.Fail(nil)
	must(t, os.Remove(filepath.Join(lost, "data")))
	refused("an overlay whose data was removed after its process was killed", lost, base, killed, "missing, or was cut short")

	_, err = blockmap.OpenOverlay(dir, blocktest.NewGrainy(1024, 512), here)
	if err == nil || !strings.Contains(err.Error(), "multiple of 4096") {
		t.Errorf("a device of 1024 bytes: %v", err)
	}
}

// A copy of an overlay that was closed has all of it, and of one that is in use what a
// flush has covered.
func TestOverlayCopied(t *testing.T) {
	base, stamps := stampedBase(70)
	dir := t.TempDir()
	o := blockmap.OverlayOptions{Boot: blockmap.BootID{1}, Image: "registry.example/a@sha256:01", Digest: blockmap.Digest{1}}
	d := openOverlay(t, dir, base, o)
	w := &writer{t: t, d: d, m: newSectors(stamps), rng: rand.New(rand.NewPCG(1, 122))}
	for range 50 {
		must(t, w.write())
	}
	must(t, w.flush())
	copied := filepath.Join(t.TempDir(), "copy")
	copyTo := func(to string) {
		must(t, os.CopyFS(to, os.DirFS(dir)))
		must(t, os.Chmod(to, 0o700))
	}
	check := func(to string) {
		c := openOverlay(t, to, base, o)
		w.m.check(t, c, 0, len(w.m.now), "a copy")
		must(t, c.Close())
	}
	copyTo(copied)
	check(copied)
	must(t, w.write())
	must(t, d.Close())
	copied += "2"
	copyTo(copied)
	check(copied)
	info, err := blockmap.ReadOverlay(blockmap.OS, copied)
	must(t, err)
	st := d.Stats()
	if want := (blockmap.OverlayInfo{Image: o.Image, Digest: o.Digest, Size: base.Size(), Data: st.Data, Zero: st.Zero, Space: info.Space, Levels: 1}); info != want {
		t.Errorf("the directory says %+v, want %+v", info, want)
	}
	if info.Space < st.Data {
		t.Errorf("%d bytes of data take %d", st.Data, info.Space)
	}
}

func TestReadOverlay(t *testing.T) {
	base, _ := stampedBase(70)
	dir := filepath.Join(t.TempDir(), "overlay")
	if _, err := blockmap.ReadOverlay(blockmap.OS, dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory that does not exist: %v", err)
	}
	must(t, os.Mkdir(dir, 0o700))
	if _, err := blockmap.ReadOverlay(blockmap.OS, dir); err == nil || !strings.Contains(err.Error(), "not the directory of an overlay") {
		t.Errorf("an empty directory: %v", err)
	}
	d := openOverlay(t, dir, base, blockmap.OverlayOptions{})
	must(t, d.WriteAt(t.Context(), make([]byte, 3*4096), 4096))
	f, err := d.Freeze(t.Context())
	must(t, err)
	must(t, d.WriteAt(t.Context(), make([]byte, 2*4096), 0))
	must(t, d.Discard(t.Context(), blockmap.Range(3*4096, 2*4096)))
	info, err := blockmap.ReadOverlay(blockmap.OS, dir)
	must(t, err)
	if info.Levels != 2 || !info.InUse || info.Data != 3*4096 || info.Zero != 2*4096 {
		t.Errorf("of two levels: %+v", info)
	}
	if st := d.Stats(); st.Data != info.Data || st.Zero != info.Zero {
		t.Errorf("%+v are counted, the directory says %+v", st, info)
	}
	must(t, f.Merge(t.Context()))
	must(t, d.Close())
	info, err = blockmap.ReadOverlay(blockmap.OS, dir)
	must(t, err)
	if info.Levels != 1 || info.InUse || info.Data != 3*4096 || info.Zero != 2*4096 {
		t.Errorf("after a merge: %+v", info)
	}
}

// What an attempt to make an overlay has left is in no later attempt's way, whatever image
// it was for.
func TestOverlayMadeAfterAFailure(t *testing.T) {
	base, _ := stampedBase(70)
	fsys := blocktest.NewFS()
	dir := t.TempDir()
	fsys.Fail(func(op, path string) error {
		if op == "rename" && filepath.Base(path) == "header" {
			return blocktest.ErrDiskFull
		}
		return nil
	})
	if _, err := blockmap.OpenOverlay(dir, base, blockmap.OverlayOptions{FS: fsys, Image: "registry.example/team/a-longer-name"}); err == nil {
		t.Fatal("an overlay without a header")
	}
	fsys.Fail(nil)
	for range 2 {
		d, err := blockmap.OpenOverlay(dir, base, blockmap.OverlayOptions{FS: fsys, Image: "registry.example/app"})
		must(t, err)
		must(t, d.WriteAt(t.Context(), stamped(1, 8), 0))
		must(t, d.Close())
	}
}

// Space that could not be given back is given back by the next flush.
func TestOverlayGivesBackLater(t *testing.T) {
	base, _ := stampedBase(70)
	fsys := blocktest.NewFS()
	d := openOverlay(t, t.TempDir(), base, blockmap.OverlayOptions{FS: fsys})
	e := blockmap.Range(0, 64*blockmap.BlockSize)
	must(t, d.WriteAt(t.Context(), stamped(1, 64*8), e.Start))
	must(t, d.Flush(t.Context()))
	with := d.Stats().Space
	must(t, d.Discard(t.Context(), e))
	fsys.Fail(func(op, _ string) error {
		if op == "punch" {
			return syscall.EIO
		}
		return nil
	})
	must(t, d.Flush(t.Context()))
	fsys.Fail(nil)
	must(t, d.Flush(t.Context()))
	if now := d.Stats().Space; now > with-e.Len() {
		t.Errorf("%d of %d bytes are still taken", now, with)
	}
}

// A write that does not fit the limit fails, and no other with it.
func TestOverlayLimitOfOthers(t *testing.T) {
	base := blocktest.NewMemory(8 << 20)
	d, err := blockmap.OpenEphemeral(t.TempDir(), base, blockmap.OverlayOptions{Limit: 100 * blockmap.BlockSize})
	must(t, err)
	var end atomic.Bool
	tooMuch := make(chan error, 1)
	go func() {
		p := make([]byte, 200*blockmap.BlockSize)
		var err error
		for !end.Load() && err == nil {
			if err = d.WriteAt(context.Background(), p, 0); errors.Is(err, blockmap.ErrNoSpace) {
				err = nil
			}
		}
		tooMuch <- err
	}()
	p := make([]byte, blockmap.BlockSize)
	at := blockmap.Range(4<<20, blockmap.BlockSize)
	for range 20_000 {
		if err = d.WriteAt(t.Context(), p, at.Start); err == nil {
			err = d.Discard(t.Context(), at)
		}
		if err != nil {
			break
		}
	}
	end.Store(true)
	if err := errors.Join(err, <-tooMuch); err != nil {
		t.Error(err)
	}
	must(t, d.Close())
}
