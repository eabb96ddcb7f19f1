package attach

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// A node reads as its device does: through the page cache and past it, aligned to blocks
// and to sectors, what is in memory, what is on the disk and what must be fetched.
func TestReads(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		before := count(t)
		dev := newDevice(testSize)
		dev.Evict(blockmap.Range(testSize/2, testSize/4))
		dev.Chill(blockmap.Range(testSize*3/4, testSize/4))
		n := attachTo(t, d, readOnly{dev}, Options{Queues: 2, Depth: 16})
		if n.Driver != by(d, Options{}).Driver || n.Why == "" || n.State().Path != n.Path || !n.State().ReadOnly {
			t.Errorf("%+v, state %+v", n, n.State())
		}
		f := open(t, n.Path, unix.O_RDONLY)
		f.mustRead(blockmap.Range(0, testSize), dev.Content(blockmap.Range(0, testSize)))
		f.close()
		dev.Evict(blockmap.Range(testSize/2, testSize/4))
		dev.Chill(blockmap.Range(testSize*3/4, testSize/4))
		direct := open(t, n.Path, unix.O_RDONLY|unix.O_DIRECT)
		var wg sync.WaitGroup
		for i := range uint64(8) {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(i, 1))
				for range 30 {
					off := rng.Int64N(testSize/512) * 512
					n := min(testSize-off, 512<<rng.IntN(13)) // up to 2 MiB
					e := blockmap.Range(off, 512*(1+rng.Int64N(n/512)))
					got, err := direct.read(e)
					if err != nil || !bytes.Equal(got, dev.Content(e)) {
						t.Errorf("read %v: wrong bytes, or %v", e, err)
						return
					}
				}
			})
		}
		wg.Wait()
		if fd, err := unix.Open(n.Path, unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
			if _, err := unix.Pwrite(fd, make([]byte, 4096), 0); err == nil {
				t.Error("a read-only node takes a write")
			}
			unix.Close(fd)
		}
		if st := n.Stats(); st.Hits == 0 || st.Misses == 0 || st.Errors != 0 {
			t.Errorf("%+v", st)
		}
		direct.close()
		detach(t, n)
		if err := n.Wait(); err != nil {
			t.Errorf("Wait: %v", err)
		}
		dev.NoPins(t)
		noLeak(t, before)
	})
}

// Writes, zeros and discards arrive, and fsync makes them durable.
func TestWrites(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		dev := newDevice(testSize)
		dev.Evict(blockmap.Range(0, testSize/2))
		n := attachTo(t, d, dev, Options{Queues: 2, Depth: 16})
		f := open(t, n.Path, unix.O_RDWR|unix.O_DIRECT)
		dev.Calls()
		var wg sync.WaitGroup
		for i := range int64(4) {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(i), 2))
				content := rand.NewChaCha8([32]byte{byte(i)})
				mine := blockmap.Range(i*testSize/4, testSize/4)
				for range 30 {
					off := mine.Start + rng.Int64N(mine.Len()/512)*512
					n := min(mine.End-off, 512<<rng.IntN(12)) // up to 1 MiB
					p := make([]byte, 512*(1+rng.Int64N(n/512)))
					content.Read(p)
					e := blockmap.Range(off, int64(len(p)))
					if err := f.write(p, off); err != nil {
						t.Errorf("write %v: %v", e, err)
						return
					}
					if got, err := f.read(e); err != nil || !bytes.Equal(got, p) || !bytes.Equal(dev.Content(e), p) {
						t.Errorf("after a write of %v: wrong bytes, or %v", e, err)
						return
					}
				}
			})
		}
		wg.Wait()
		if dev.Dirty() == 0 {
			t.Error("the writes were flushed, although nobody has asked for that")
		}
		if err := unix.Fsync(f.fd); err != nil {
			t.Fatalf("fsync: %v", err)
		}
		if n := dev.Dirty(); n != 0 {
			t.Errorf("after fsync, %d writes are not flushed", n)
		}
		// A write with O_DSYNC is durable when it returns.
		sync := open(t, n.Path, unix.O_RDWR|unix.O_DIRECT|unix.O_DSYNC)
		if err := sync.write(pattern(7, 8192), 4096); err != nil {
			t.Fatalf("write with O_DSYNC: %v", err)
		}
		if n := dev.Dirty(); n != 0 {
			t.Errorf("after a write with O_DSYNC, %d writes are not flushed", n)
		}
		sync.close()
		for name, req := range map[string]uintptr{"BLKDISCARD": unix.BLKDISCARD, "BLKZEROOUT": unix.BLKZEROOUT} {
			e := blockmap.Range(1<<20, 3<<20)
			if err := f.write(pattern(3, e.Len()), e.Start); err != nil {
				t.Fatal(err)
			}
			dev.Calls()
			if err := f.rangeIoctl(req, e); err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if got, err := f.read(e); err != nil || !bytes.Equal(got, make([]byte, e.Len())) {
				t.Errorf("after %s: it does not read as zeros, or %v", name, err)
			}
			if calls := dev.Calls(); slices.Contains(calls, "write") || len(calls) == 0 {
				t.Errorf("%s became %q", name, calls)
			}
		}
		f.close()
		// What the kernel holds of a node is written back before it goes.
		cached := open(t, n.Path, unix.O_RDWR)
		p := pattern(11, 1<<20)
		if err := cached.write(p, 2<<20); err != nil {
			t.Fatal(err)
		}
		cached.close()
		detach(t, n)
		if !bytes.Equal(dev.Content(blockmap.Range(2<<20, 1<<20)), p) {
			t.Error("a write through the page cache was lost by Detach")
		}
		if n := dev.Dirty(); n != 0 {
			t.Errorf("Detach has left %d writes that are not flushed", n)
		}
		dev.NoPins(t)
	})
}

// An error of the device is the errno of its request, and of no other one.
func TestErrors(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		dev := newDevice(testSize)
		bad := blockmap.Range(8<<20, 1<<20)
		broken := true
		var mu sync.Mutex
		dev.OnFault = func(_ context.Context, e blockmap.Extent) error {
			mu.Lock()
			defer mu.Unlock()
			if broken && e.Intersect(bad).Len() > 0 {
				return errors.New("fetch chunk 8: connection refused")
			}
			return nil
		}
		dev.Evict(bad)
		full := blockmap.Range(4<<20, 1<<20)
		dev.OnWrite = func(_ context.Context, e blockmap.Extent) error {
			if e.Intersect(full).Len() > 0 {
				return blockmap.ErrNoSpace
			}
			return nil
		}
		n := attachTo(t, d, dev, Options{Queues: 1})
		f := open(t, n.Path, unix.O_RDWR|unix.O_DIRECT)
		for range 3 {
			if _, err := f.read(blockmap.Range(bad.Start, 4096)); err != unix.EIO {
				t.Errorf("read what cannot be fetched: %v", err)
			}
			noSpace := unix.ENOSPC
			if d == NBD || d == nbdByIoctl {
				noSpace = unix.EIO // the kernel's driver makes EIO of every error
			}
			if err := f.write(make([]byte, 4096), full.Start); err != noSpace {
				t.Errorf("write where there is no space: %v", err)
			}
			f.mustRead(blockmap.Range(0, 1<<20), dev.Content(blockmap.Range(0, 1<<20)))
			if err := f.write(pattern(1, 4096), 0); err != nil {
				t.Errorf("write where there is space: %v", err)
			}
		}
		if st := n.Stats(); st.Errors == 0 {
			t.Errorf("%+v", st)
		}
		mu.Lock()
		broken = false
		mu.Unlock()
		f.mustRead(bad, dev.Content(bad))
	})
}

// Requests that wait for an origin hold up no others, as many as there may be, and a
// detach does not wait for them.
func TestStall(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		before := count(t)
		dev := newDevice(testSize)
		const stalled = 40
		dev.Evict(blockmap.Range(testSize/2, testSize/2))
		waiting := make(chan struct{}, 1000)
		dev.OnFault = func(ctx context.Context, _ blockmap.Extent) error {
			waiting <- struct{}{}
			<-ctx.Done()
			return context.Cause(ctx)
		}
		n := attachTo(t, d, dev, Options{Queues: 1, Depth: 64})
		f := open(t, n.Path, unix.O_RDONLY|unix.O_DIRECT)
		failed := make(chan error, stalled)
		for i := range int64(stalled) {
			go func() {
				_, err := f.read(blockmap.Range(testSize/2+i*16384, 4096))
				failed <- err
			}()
		}
		for range stalled {
			within(t, "a read that misses", waiting)
		}
		begin := time.Now()
		for i := range int64(200) {
			e := blockmap.Range(i*16384, 4096)
			f.mustRead(e, dev.Content(e))
		}
		t.Logf("200 hits during %d misses took %v", stalled, time.Since(begin).Round(time.Millisecond))
		begin = time.Now()
		detached := make(chan error, 1)
		go func() { detached <- n.Detach(context.Background()) }()
		for range stalled {
			if err := within(t, "a read of a node that is detached", failed); err == nil {
				t.Error("a read succeeds whose bytes were never fetched")
			}
		}
		f.close()
		if err := within(t, "Detach", detached); err != nil {
			t.Errorf("detach: %v", err)
		}
		t.Logf("detached in %v", time.Since(begin).Round(time.Millisecond))
		dev.NoPins(t)
		noLeak(t, before)
	})
}

// A filesystem works on a node, and a node with a filesystem is not detached.
func TestExt4(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		dev := newDevice(testSize)
		dev.Fill(mkfs(t), 0)
		dev.Evict(blockmap.Range(0, testSize))
		n := attachTo(t, d, dev, Options{ReadAhead: 256 << 10})
		dir, unmount := mountNode(t, n.Path, 0, "")
		files := useFiles(t, dir)
		if err := n.Detach(aCtx(t)); !errors.Is(err, ErrBusy) {
			t.Errorf("detach a node that is mounted: %v", err)
		}
		files.check(dir)
		unmount()
		detach(t, n)
		if n := dev.Dirty(); n != 0 {
			t.Errorf("after unmount and detach, %d writes are not flushed", n)
		}
		fsck(t, dev)
		dev.Evict(blockmap.Range(0, testSize))
		n = attachTo(t, d, readOnly{dev}, Options{})
		dir, _ = mountNode(t, n.Path, unix.MS_RDONLY, "noload")
		files.check(dir)
	})
}

// Rounds of attach and detach leave nothing behind, some of them at the same time.
func TestRounds(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		dev := newDevice(testSize)
		o := by(d, Options{Queues: 2, Depth: 16})
		round := func() {
			n, err := Attach(aCtx(t), dev, o)
			if err != nil {
				t.Errorf("attach: %v", err)
				return
			}
			fd, err := unix.Open(n.Path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Errorf("open: %v", err)
			} else {
				p := aligned(4096)
				if _, err := unix.Pread(fd, p, 4096); err != nil || !bytes.Equal(p, dev.Content(blockmap.Range(4096, 4096))) {
					t.Errorf("read: wrong bytes, or %v", err)
				}
				unix.Close(fd)
			}
			if err := n.Detach(aCtx(t)); err != nil {
				t.Errorf("detach: %v", err)
			}
		}
		round()
		before := count(t)
		begin := time.Now()
		for range 60 {
			round()
		}
		t.Logf("%v a round", (time.Since(begin) / 60).Round(100*time.Microsecond))
		for range 10 {
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(round)
			}
			wg.Wait()
		}
		dev.NoPins(t)
		noLeak(t, before)
		// Each of the 100 rounds would leave at least one. Go keeps those that it has made.
		if n := entries(t, "/proc/self/task"); n > before.threads+50 {
			t.Errorf("there were %d threads before, and there are %d now", before.threads, n)
		}
	})
}

// A node with the number of an earlier one shows nothing of that.
func TestNotStale(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		for i := range int64(3) {
			dev := newDevice(testSize)
			dev.Fill(pattern(i, testSize), 0)
			n := attachTo(t, d, readOnly{dev}, Options{})
			f := open(t, n.Path, unix.O_RDONLY)
			f.mustRead(blockmap.Range(0, testSize), pattern(i, testSize))
			f.close()
			detach(t, n)
		}
	})
}

// A driver that this host lacks is a sentence with the command that helps.
func TestUnavailable(t *testing.T) {
	for d, file := range map[Driver]string{UBLK: "/dev/ublk-control", NBD: "/sys/block/nbd0"} {
		if unix.Access(file, unix.F_OK) == nil {
			continue // the other tests have it
		}
		_, err := Attach(aCtx(t), newDevice(testSize), Options{Driver: d})
		if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "modprobe "+map[Driver]string{UBLK: "ublk_drv", NBD: "nbd"}[d]) {
			t.Errorf("%s: %v", d, err)
		}
	}
}

// Auto takes the best driver that there is, and says why not a better one.
func TestAuto(t *testing.T) {
	n := attachTo(t, Auto, newDevice(testSize), Options{})
	want := FUSE
	if unix.Access("/dev/ublk-control", unix.F_OK) == nil {
		want = UBLK
	} else if unix.Access("/sys/block/nbd0", unix.F_OK) == nil {
		want = NBD
	}
	if n.Driver != want || want != UBLK && (!strings.HasPrefix(n.Why, "ublk: ") || !strings.Contains(n.Why, "modprobe ublk_drv")) || strings.Contains(n.Why, ErrUnavailable.Error()) {
		t.Errorf("driver %s, because %q; want %s", n.Driver, n.Why, want)
	}
}

func TestOptions(t *testing.T) {
	for field, o := range map[string]Options{
		"Queues": {Queues: -1}, "Depth": {Depth: 5000}, "ReadAhead": {ReadAhead: -1}, "FaultTimeout": {FaultTimeout: -1}, "driver": {Driver: "iscsi"},
	} {
		if _, err := Attach(aCtx(t), newDevice(testSize), o); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
}
