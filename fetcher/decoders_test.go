package fetcher_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// nice counts the threads of this process that have a low priority.
func nice(t *testing.T) (n int) {
	t.Helper()
	own, err := unix.Getpriority(unix.PRIO_PROCESS, os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	stats, err := filepath.Glob("/proc/self/task/*/stat")
	if err != nil || len(stats) == 0 {
		t.Fatal("the test cannot see threads", err)
	}
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		// After the name in brackets: proc(5) counts the name as field 2, and the
		// niceness as 19.
		fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		var value int
		if _, err := fmt.Sscan(fields[19-3], &value); err != nil {
			t.Fatal(err)
		}
		if value > 20-own { // the test may have been started with that niceness
			n++
		}
	}
	return n
}

// The decoders' threads have a low priority, no others have, and they end with the
// Fetcher.
func TestDecodersAreNice(t *testing.T) {
	settled(t, "those of earlier tests end", func() bool { return nice(t) == 0 })
	m := blocktest.NewImage(t, 70, 1500)
	w := newWorld(t, m, fetcher.Options{Decoders: 3})
	settled(t, "three nice threads", func() bool { return nice(t) == 3 })
	w.device.Prefetch(blockmap.Range(0, w.device.Size()))
	var wg sync.WaitGroup
	for _, e := range w.places(t, 20) {
		wg.Go(func() {
			if err := w.read(t.Context(), e); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	// On a busy machine a job may take so long that another thread replaces its own until it
	// is done.
	settled(t, "still three nice threads", func() bool { return nice(t) == 3 })
	w.fetcher.Close()
	settled(t, "they end", func() bool { return nice(t) == 0 })
}

// A reader does not wait for the decoders, which may get no processor.
func TestDemandDoesNotWaitForDecoders(t *testing.T) {
	m := blocktest.NewImage(t, 71, 1500)
	w := newWorld(t, m, fetcher.Options{Decoders: 2})
	places := w.places(t, 20)
	until := make(chan struct{})
	release := sync.OnceFunc(func() { close(until) })
	defer release()
	w.fetcher.OccupyDecoders(until)
	w.device.Prefetch(places[0]) // its decoding hangs
	for _, e := range places[1:] {
		if err := w.read(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	release()
	if err := w.read(t.Context(), places[0]); err != nil {
		t.Error(err)
	}
}
