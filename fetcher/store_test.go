package fetcher_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// roomless is a world whose cache stores no chunk from now on.
func roomless(t *testing.T, m *blocktest.Image, fault error, log *warnings) (*world, *fetcher.Bound) {
	t.Helper()
	fs := blocktest.NewFS()
	cache, err := blockmap.OpenCache(t.TempDir(), blockmap.CacheOptions{FS: fs})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cache.Close() })
	w := &world{Image: m, origin: blocktest.NewOrigin(m), cache: cache, fetcher: fetcher.New(fetcher.Options{MaxRequest: 1, Log: log.log()})}
	t.Cleanup(w.fetcher.Close)
	bound := w.fetcher.From(w.origin)
	if w.device, err = blockmap.NewImage(m.Index, cache, bound); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.device.Close)
	w.wants(t) // makes the streams
	fs.Fail(func(op, path string) error {
		if op == "write" && strings.HasSuffix(path, "data") {
			return fault
		}
		return nil
	})
	return w, bound
}

var diskFaults = map[string]error{"full": unix.ENOSPC, "quota": unix.EDQUOT, "bad": unix.EIO, "read-only": unix.EROFS, "no files": unix.EMFILE}

// Whatever is wrong with the disk, readers get the right bytes.
func TestReadersOfABadDisk(t *testing.T) {
	m := blocktest.NewImage(t, 170, 2000)
	for name, fault := range diskFaults {
		t.Run(name, func(t *testing.T) {
			var log warnings
			w, _ := roomless(t, m, fault, &log)
			began := time.Now()
			var readers sync.WaitGroup
			for range 4 {
				readers.Go(func() {
					for at := int64(0); at < w.device.Size(); at += 1 << 20 {
						if err := w.read(t.Context(), blockmap.Extent{Start: at, End: min(at+1<<20, w.device.Size())}); err != nil {
							t.Error(err)
						}
					}
				})
			}
			readers.Wait()
			if st := w.stats(t); st.Held == 0 || st.Failed != 0 || st.Wrong != 0 {
				t.Errorf("%+v", st)
			}
			// The warning is repeated each 10 s, and this may take longer.
			most := 1 + int(time.Since(began)/(10*time.Second))
			if lines := log.lines(); len(lines) == 0 || len(lines) > most || !strings.Contains(lines[0], "memory") {
				t.Errorf("it says:\n%s", strings.Join(lines, "\n"))
			}
		})
	}
}

// A replay that finds no room ends soon, with a line or two in the log.
func TestReplayOnABadDisk(t *testing.T) {
	m := blocktest.NewImage(t, 171, 8000)
	for name, fault := range diskFaults {
		for _, bundle := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, bundle %v", name, bundle), func(t *testing.T) {
				var log warnings
				w, bound := roomless(t, m, fault, &log)
				wants := w.wants(t)
				var o fetcher.ReplayOptions
				if bundle {
					o.Bundle = &w.bundle(t, wants).Bundle
				}
				r := bound.Replay(t.Context(), wants, o)
				if err := r.Wait(t.Context(), 1); !errors.Is(err, fault) && !errors.Is(err, blockmap.ErrNoSpace) {
					t.Errorf("%v", err)
				}
				r.Stop()
				if n := w.origin.Requests(); n > 60 {
					t.Errorf("%d requests for %d chunks that have no place", n, len(wants))
				}
				if st := w.stats(t); st.Failed != 0 || st.Held != 0 {
					t.Errorf("%+v", st)
				}
				if lines := log.lines(); len(lines) == 0 || len(lines) > 2 || !strings.Contains(lines[len(lines)-1], "leaves out") {
					t.Errorf("it says:\n%s", strings.Join(lines, "\n"))
				}
				// The reader is served all the same.
				if err := w.read(t.Context(), w.places(t, 9)[8]); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// Hints that find no room log nothing.
func TestHintsOnABadDisk(t *testing.T) {
	m := blocktest.NewImage(t, 172, 1000)
	var log warnings
	w, bound := roomless(t, m, unix.ENOSPC, &log)
	bound.Prefetch(w.wants(t))
	settled(t, "all are over", func() bool { return w.fetcher.Fetches() == 0 })
	if lines := log.lines(); len(lines) != 0 {
		t.Errorf("it says:\n%s", strings.Join(lines, "\n"))
	}
}

// A reader gets a part of a bundle that the disk has no room for.
func TestBundleOnAFullDisk(t *testing.T) {
	m := blocktest.NewImage(t, 173, 2000)
	synctest.Test(t, func(t *testing.T) {
		var log warnings
		w, bound := roomless(t, m, unix.ENOSPC, &log)
		l := w.bundle(t, w.wants(t))
		l.let(0, nil)
		r := w.replay(t, l, nil)
		synctest.Wait()
		x := l.part(1).Wants[0]
		read := make(chan error)
		go func() { read <- bound.Fetch(t.Context(), []blockmap.Want{x}) }()
		synctest.Wait()
		l.let(l.ends[1], nil)
		if err := <-read; err != nil || !x.Stream.Has(x.Chunk) {
			t.Errorf("%v", err)
		}
		if n := w.origin.Requests(); n != 0 {
			t.Errorf("%d requests", n)
		}
		r.Stop()
	})
}

// When all of the quota is in use, a reader of something else still gets it.
func TestQuotaInUse(t *testing.T) {
	m := blocktest.NewImage(t, 174, 3000)
	cache, err := blockmap.OpenCache(t.TempDir(), blockmap.CacheOptions{Quota: 2 << 20, FS: threads{blockmap.OS}})
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	w := &world{Image: m, origin: blocktest.NewOrigin(m), cache: cache, fetcher: fetcher.New(fetcher.Options{})}
	defer w.fetcher.Close()
	if w.device, err = blockmap.NewImage(m.Index, cache, w.fetcher.From(w.origin)); err != nil {
		t.Fatal(err)
	}
	defer w.device.Close()
	// Views that a client does not release.
	var held []blockmap.View
	for _, e := range w.places(t, 60) {
		if v, err := blockmap.Read(t.Context(), w.device, e); err != nil {
			t.Fatal(err)
		} else {
			held = append(held, v)
		}
	}
	defer func() {
		for i := range held {
			held[i].Release()
		}
	}()
	for at := int64(0); at < w.device.Size(); at += 1 << 20 {
		if err := w.read(t.Context(), blockmap.Extent{Start: at, End: min(at+1<<20, w.device.Size())}); err != nil {
			t.Error(err)
		}
	}
	if st := w.stats(t); st.Held == 0 || st.Failed != 0 {
		t.Errorf("%+v", st)
	}
}

// A replay is bounded by what the cache has room for, in the order of its list, and is done
// then.
func TestReplayWithinBounds(t *testing.T) {
	m := blocktest.NewImage(t, 175, 2000)
	for _, bundle := range []bool{false, true} {
		for _, share := range []int64{0, 1, 3, 10, 1000} { // of ten
			t.Run(fmt.Sprintf("bundle %v, %d of 10", bundle, share), func(t *testing.T) {
				var log warnings
				w := newWorld(t, m, fetcher.Options{MaxRequest: 1, Log: log.log()})
				wants := w.wants(t)
				var all int64
				for _, x := range wants {
					all += int64(x.Table.Chunks[x.Chunk].Size())
				}
				o := fetcher.ReplayOptions{MaxBytes: all * share / 10}
				list := append(wants[5:], wants...) // some chunks twice
				order := append(wants[5:], wants[:5]...)
				if bundle {
					half := w.bundle(t, wants[len(wants)/2:])
					o.Bundle = &half.Bundle
					seen := make(map[blockmap.Want]bool)
					order = nil
					for _, p := range half.Frames {
						p := p.Parts[0]
						for _, x := range p.Wants {
							seen[x] = true
							order = append(order, x)
						}
					}
					for _, x := range list {
						if !seen[x] {
							seen[x] = true
							order = append(order, x)
						}
					}
				}
				r := w.fetcher.From(w.origin).Replay(t.Context(), list, o)
				checkDone(t, r)
				left, want := o.MaxBytes, 0
				for _, x := range order {
					if left -= int64(x.Table.Chunks[x.Chunk].Size()); left < 0 && share > 0 {
						break
					}
					want++
					if !x.Stream.Has(x.Chunk) {
						t.Error("a chunk is omitted although a later one is not")
						break
					}
				}
				if n := resident(wants); n != want {
					t.Errorf("%d chunks are resident, want %d", n, want)
				}
				if lines := log.lines(); len(lines) != map[bool]int{true: 0, false: 1}[want == len(wants)] {
					t.Errorf("it says:\n%s", strings.Join(lines, "\n"))
				}
			})
		}
	}
}
