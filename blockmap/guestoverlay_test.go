//go:build guest

package blockmap_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// These tests run in a virtual machine, which scripts/guest-overlay boots: the disks that
// they write to are the machine's. The overlay lies on ext4, and the kernel loses or
// refuses what is written to the disk below.
var (
	loggedDisk = flag.String("logged", "", "disk with an ext4 file system, whose writes are logged")
	logDisk    = flag.String("log", "", "disk for the log")
	replayDisk = flag.String("replay", "", "disk to replay the log to, as large as the logged one")
	flakyDisk  = flag.String("flaky", "", "disk with an ext4 file system, which is made to fail")
	seedFlag   = flag.Uint64("seed", 1, "seed of all that is random")
)

const (
	powerWriters = 2
	powerBlocks  = 1100 // of each writer: the words of the map fill more than a sector
	powerFlushes = 40   // of each writer
)

// flushed is what the sectors of a writer may have when the power fails.
type flushed struct {
	mark   string     // in the log, put there once the flush had returned
	before [][]uint32 // since the flush before, and until this one has returned
	after  [][]uint32 // once it has, and before the next write
}

// history is what a writer has done to its part of the device.
type history struct {
	writer
	flushes []flushed
	seen    int // marks of it in the log so far
}

// flush makes durable what was written, by f, and remembers it.
func (h *history) flush(mark func(string) error, f func() error) error {
	before := slices.Clone(h.m.since)
	if err := f(); err != nil {
		return err
	}
	h.m.flush()
	name := fmt.Sprintf("%d-%d", h.m.from, len(h.flushes))
	h.flushes = append(h.flushes, flushed{name, before, slices.Clone(h.m.now)})
	return mark(name)
}

// load writes and flushes. If the writer is the first, it also freezes the overlay and
// merges it again.
func (h *history) load(mark func(string) error, first bool) error {
	ctx := h.t.Context()
	for len(h.flushes) < powerFlushes {
		for range 1 + h.rng.IntN(12) {
			if err := h.write(); err != nil {
				return err
			}
		}
		if !first || h.rng.IntN(6) > 0 {
			if err := h.flush(mark, func() error { return h.d.Flush(ctx) }); err != nil {
				return err
			}
			continue
		}
		var frozen *blockmap.Frozen
		err := h.flush(mark, func() (err error) {
			frozen, err = h.d.Freeze(ctx)
			return err
		})
		for i := 0; i < 5 && err == nil; i++ {
			err = h.write()
		}
		if err == nil {
			err = frozen.Merge(ctx)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// allowed is what the sectors of the writer may have, where the log is replayed up to its
// last mark exactly, or to somewhere between that and the next one.
func (h *history) allowed(exactly bool) *sectors {
	m := &sectors{from: h.m.from}
	switch {
	case exactly:
		m.now = h.flushes[h.seen-1].after
	case h.seen < len(h.flushes):
		m.now = h.flushes[h.seen].before
	default:
		m.now = h.m.since
	}
	return m
}

// The power fails at each point of what the kernel writes to the disk: what a flush has
// covered that had returned by then is there; of later writes each block is old or new.
func TestOverlayWithoutPower(t *testing.T) {
	began := time.Now()
	rng := rand.New(rand.NewPCG(*seedFlag, 200))
	base, all := stampedBase(powerWriters * powerBlocks)
	image := readDisk(t, *loggedDisk)

	dm := blocktest.NewDM(t, "logged", "log-writes", *loggedDisk, *logDisk)
	dir := t.TempDir()
	unmount := blocktest.MountDisk(t, dm.Path, dir)
	d := openOverlay(t, filepath.Join(dir, "overlay"), base, blockmap.OverlayOptions{Boot: blockmap.BootID{1}})
	var writers []*history
	var wg sync.WaitGroup
	for i := range powerWriters {
		const n = powerBlocks * blockmap.BlockSize / sectorSize
		m := newSectors(all[i*n:][:n])
		m.from = i * n
		h := &history{writer: writer{t: t, d: d, m: m, rng: rand.New(rand.NewPCG(*seedFlag, 201+uint64(i)))}}
		writers = append(writers, h)
		wg.Go(func() {
			if err := h.load(dm.Mark, i == 0); err != nil {
				t.Errorf("writer %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	must(t, d.Close())
	unmount()
	dm.Remove()
	if t.Failed() {
		return
	}

	log := openLog(t, *logDisk, int64(len(image)))
	t.Logf("%v: recorded %d entries", time.Since(began).Round(time.Second), len(log.entries))
	marks := make(map[string]*history)
	for _, h := range writers {
		for _, f := range h.flushes {
			marks[f.mark] = h
		}
	}
	r := replay{t: t, log: log, base: base, writers: writers, dir: dir, buf: diskImage(t, int64(len(image))), rng: rng}
	var points, between int
	for i := range log.entries {
		e := &log.entries[i]
		log.apply(t, image, e, always)
		h := marks[e.mark]
		switch {
		case h != nil:
			if want := h.flushes[h.seen].mark; e.mark != want {
				t.Fatalf("the log has the mark %s before %s", e.mark, want)
			}
			h.seen++
			r.check(image, i, h)
			r.check(image, i, nil)
			points++
		case e.durable() && (i+1 == len(log.entries) || log.entries[i+1].mark == ""):
			r.check(image, i, nil)
			between++
		default:
			continue
		}
		points++
	}
	for i, h := range writers {
		if h.seen != len(h.flushes) {
			t.Errorf("the log has %d marks of %d of writer %d", h.seen, len(h.flushes), i)
		}
	}
	t.Logf("%v: the power has failed at %d points, %d of them between marks; %d blocks that were not flushed were lost, and %d kept",
		time.Since(began).Round(time.Second), points, between, r.lost, r.kept)
	if between < powerFlushes || r.lost < 100 || r.kept < 100 {
		t.Error("this tests too little")
	}
}

func always() bool { return true }

// replay is what the points of a log have in common.
type replay struct {
	t          *testing.T
	log        *writeLog
	base       blockmap.Device
	writers    []*history
	dir        string
	buf        []byte
	rng        *rand.Rand
	lost, kept int
}

// check replays the log up to entry i, which image is, to a disk, mounts it, opens the
// overlay as after a reboot, and compares. If exact has just put its mark there, nothing
// later is on the disk; otherwise, any of the writes up to the next flush or mark may be, in
// part.
func (r *replay) check(image []byte, i int, exact *history) {
	t := r.t
	t.Helper()
	copy(r.buf, image)
	if exact == nil {
		percent := []int{0, 20, 50, 80, 100}[r.rng.IntN(5)]
		keep := func() bool {
			if r.rng.IntN(100) >= percent {
				r.lost++
				return false
			}
			r.kept++
			return true
		}
		for k := i + 1; k < len(r.log.entries); k++ {
			e := &r.log.entries[k]
			if e.durable() || e.mark != "" {
				break
			}
			r.log.apply(t, r.buf, e, keep)
		}
	}
	writeDisk(t, *replayDisk, r.buf)
	what := fmt.Sprintf("after entry %d of %d, %+v", i, len(r.log.entries), r.log.entries[i])
	defer blocktest.MountDisk(t, *replayDisk, r.dir)()
	d, err := blockmap.OpenOverlay(filepath.Join(r.dir, "overlay"), r.base, blockmap.OverlayOptions{Boot: blockmap.BootID{2}})
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	defer d.Close()
	for _, h := range r.writers {
		m := h.allowed(h == exact)
		m.check(t, d, 0, len(m.now), what)
	}
	name := filepath.Base(*replayDisk)
	if n, err := os.ReadFile("/sys/fs/ext4/" + name + "/errors_count"); err != nil || strings.TrimSpace(string(n)) != "0" {
		t.Fatalf("%s: ext4 has counted %q errors, %v", what, n, err)
	}
}

// A disk that fails under a load costs nothing that was flushed before: neither where it
// refuses all writes, which poisons the overlay, nor where it loses them and says nothing.
func TestOverlayOnAFlakyDisk(t *testing.T) {
	const rounds = 12
	rng := rand.New(rand.NewPCG(*seedFlag, 210))
	base, stamps := stampedBase(powerBlocks)
	m := newSectors(stamps)
	dir := t.TempDir()
	boot := byte(1)
	for round := range rounds {
		refuse := round%2 == 0
		dm := blocktest.NewDM(t, "flaky", "flakey", *flakyDisk, "0 3600 0")
		unmount := blocktest.MountDisk(t, dm.Path, dir)
		if rng.IntN(2) == 0 {
			boot++ // or the live copy of the map must not be believed because of the new mount
		}
		d := openOverlay(t, filepath.Join(dir, "overlay"), base, blockmap.OverlayOptions{Boot: blockmap.BootID{boot}})
		m.crash(t, d, true, fmt.Sprintf("before round %d", round))
		f := &flaky{w: writer{t: t, d: d, m: m, rng: rng}, refuse: refuse}
		f.fail(dm, int64(20+rng.IntN(150)))
		_ = d.Close() // if it is not poisoned, it fails to sync
		unmount()
		dm.Remove()
		if t.Failed() {
			return
		}
		t.Logf("round %d: %d writes before the disk failed, refusing writes: %v; %v", round, f.before, refuse, f.end)
	}
	blocktest.MountDisk(t, *flakyDisk, dir)
	d := openOverlay(t, filepath.Join(dir, "overlay"), base, blockmap.OverlayOptions{Boot: blockmap.BootID{boot}})
	m.crash(t, d, true, "at the end")
}

// A disk refuses some writes and then works again. The kernel says so once, by the next sync,
// and has what was written in memory only, as if it were on the disk. So the flush fails, and
// the overlay, opened again on the same mount, shows what the disk has.
func TestOverlayOnADiskThatRecovers(t *testing.T) {
	rng := rand.New(rand.NewPCG(*seedFlag, 220))
	base, stamps := stampedBase(powerBlocks)
	m := newSectors(stamps)
	dir := t.TempDir()
	path, opt := filepath.Join(dir, "recovers"), blockmap.OverlayOptions{Boot: blockmap.BootID{1}}
	for round := range 6 {
		what := fmt.Sprintf("round %d: ", round)
		dm := blocktest.NewDM(t, "flaky", "flakey", *flakyDisk, "0 3600 0")
		unmount := blocktest.MountDisk(t, dm.Path, dir)
		d := openOverlay(t, path, base, opt)
		m.crash(t, d, true, what+"after the power has failed")
		// Where ext4 keeps the space of zeros, Linux 6.12 shows what the disk has had there before,
		// once it has failed to write to them.
		w := &writer{t: t, d: d, m: m, rng: rng, holes: true}
		for range 40 {
			must(t, w.write())
		}
		must(t, w.flush())

		for range 20 {
			must(t, w.write())
		}
		must(t, dm.Become("flakey", *flakyDisk+" 0 0 3600 1 error_writes"))
		refuseData(t, w, filepath.Join(path, "data"))
		must(t, dm.Become("flakey", *flakyDisk+" 0 3600 0"))
		f := &flaky{w: *w}
		if f.poisoned(); t.Failed() {
			return
		}
		_ = d.Close()

		d = openOverlay(t, path, base, opt)
		m.crash(t, d, true, what+"after the disk has refused writes")
		w.d = d
		for range 10 {
			must(t, w.write())
		}
		must(t, w.flush())
		must(t, dm.Become("flakey", *flakyDisk+" 0 0 3600 1 drop_writes"))
		for range 10 {
			_ = w.write()
		}
		_ = d.Close()
		unmount()
		dm.Remove()
	}
	blocktest.MountDisk(t, *flakyDisk, dir)
	m.crash(t, openOverlay(t, path, base, opt), true, "at the end")
}

// refuseData writes until the kernel has found that it cannot write back what was written to
// a data file. It asks for that by a descriptor of its own, and commits nothing.
func refuseData(t *testing.T, w *writer, path string) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	for range 20 {
		const write, wait = unix.SYNC_FILE_RANGE_WRITE, unix.SYNC_FILE_RANGE_WAIT_AFTER
		if err := unix.SyncFileRange(int(f.Fd()), 0, 0, write|wait); err == unix.EIO {
			return
		}
		must(t, w.write())
	}
	t.Fatal("the disk refuses nothing")
}

// flaky is a load during which the disk begins to fail.
type flaky struct {
	w       writer
	refuse  bool        // writes fail; or else they are lost
	failing atomic.Bool // set before the disk fails
	writes  atomic.Int64
	before  int64 // how many writes there were
	end     error // of the load
}

// fail has the disk fail after some writes, and returns once the load has ended.
func (f *flaky) fail(dm *blocktest.DM, after int64) {
	t := f.w.t
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan error, 1)
	failed := make(chan struct{})
	go func() { done <- f.load(ctx, failed) }()
	for f.writes.Load() < after {
		select {
		case err := <-done:
			t.Errorf("the load ends before the disk fails: %v", err)
			return
		case <-time.After(time.Millisecond):
		}
	}
	f.failing.Store(true)
	f.before = f.writes.Load()
	feature := "drop_writes"
	if f.refuse {
		feature = "error_writes"
	}
	if err := dm.Become("flakey", *flakyDisk+" 0 0 3600 1 "+feature); err != nil {
		t.Error(err)
	}
	close(failed)
	f.end = <-done
	if ctx.Err() != nil {
		t.Errorf("the load does not end once the disk has failed: %v", f.end)
	} else if f.refuse {
		f.poisoned()
	}
}

// load writes and flushes until an error ends it, or, where writes are lost, for a while
// after the disk has failed.
func (f *flaky) load(ctx context.Context, failed <-chan struct{}) error {
	for more := 40; more > 0 && ctx.Err() == nil; {
		err := f.w.write()
		f.writes.Add(1)
		if err == nil && f.w.rng.IntN(8) == 0 {
			// Where writes are lost without a word, only a flush counts that has ended before.
			if err = f.w.d.Flush(ctx); err == nil && (f.refuse || !f.failing.Load()) {
				f.w.m.flush()
			}
		}
		if err != nil {
			if !f.failing.Load() {
				f.w.t.Errorf("before the disk fails: %v", err)
			}
			return err
		}
		select {
		case <-failed:
			if !f.refuse {
				more--
			}
		default:
		}
	}
	return nil
}

// poisoned fails the test unless the overlay takes no more writes, and says so.
func (f *flaky) poisoned() {
	t, d := f.w.t, f.w.d
	first := d.Flush(t.Context())
	err := d.Stats().Err
	if first == nil && err == nil && d.WriteAt(t.Context(), make([]byte, blockmap.BlockSize), 0) != nil {
		return // the kernel refuses writes, and there was nothing to sync
	}
	const sentence = "could not be made durable, and what was written since the last flush may be lost: check the disk, then open the overlay again"
	if first == nil || err == nil || !strings.Contains(err.Error(), sentence) {
		t.Errorf("the load has ended with %v, a flush with %v, and the overlay says: %v", f.end, first, err)
		return
	}
	for what, got := range map[string]error{
		"flush":   first,
		"write":   d.WriteAt(t.Context(), make([]byte, blockmap.BlockSize), 0),
		"zero":    d.Zero(t.Context(), blockmap.Range(0, blockmap.BlockSize), true),
		"discard": d.Discard(t.Context(), blockmap.Range(0, blockmap.BlockSize)),
	} {
		if !errors.Is(got, err) {
			t.Errorf("%s: %v", what, got)
		}
	}
}
