package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"thaw/bench"
	"thaw/bench/benchtest"
)

func TestMain(m *testing.M) { benchtest.Main(m) }

func testBenchmark(t *testing.T, out io.Writer, needs ...bench.Program) *benchmark {
	t.Helper()
	if err := bench.Need(needs...); err != nil {
		t.Skip(err)
	}
	// Not t.TempDir: the path of a socket has at most 107 bytes.
	dir, err := os.MkdirTemp("", "thaw-bench-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &benchmark{
		options: options{rounds: 2, size: "64M", sizes: "64K,128K", rtt: 2 * time.Millisecond, mbits: 1000, readAhead: 128},
		dir:     dir, rec: bench.NewRecorder(out), out: out, verified: make(map[string]bool),
	}
	if b.thaw, err = bench.BuildThaw(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestAgainst(t *testing.T) {
	var out bytes.Buffer
	b := testBenchmark(t, &out, umoci, mke2fs)
	if err := b.against(t.Context(), []bench.Workload{benchtest.Image(t)}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"BenchmarkBuild/image=small/tool=thaw 1 ", "BenchmarkBuild/image=small/tool=umoci-unpack+mke2fs 1 ", "\n| small |"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, out.String())
		}
	}
	leftNothing(t, b)
}

func TestChunkSizes(t *testing.T) {
	var out bytes.Buffer
	b := testBenchmark(t, &out, nbdfuse, fuse3, losetup, registry)
	m := benchtest.Image(t)
	if err := b.chunkSizes(t.Context(), []bench.Workload{m}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"BenchmarkChunks/image=small/chunk=64K 1 ", "BenchmarkStart/image=small/chunk=128K/origin=link 1 ", "\n| all   |"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, out.String())
		}
	}
	link, local := startName(m, "64K", "link"), startName(m, "64K", "layout")
	if got := b.rec.Median(link, fetched); got <= 0 || got > b.rec.Median(link, wire) {
		t.Errorf("%v bytes fetched, %v on the link", got, b.rec.Median(link, wire))
	}
	if got := b.rec.Median(local, requests); got <= 0 {
		t.Errorf("%v requests", got)
	}
	leftNothing(t, b)
}

// A program with a wrong answer fails the benchmark, which still cleans up.
func TestWrongAnswer(t *testing.T) {
	b := testBenchmark(t, io.Discard, nbdfuse, fuse3, losetup, registry)
	m := benchtest.Image(t)
	m.Answer = "something else"
	err := b.chunkSizes(t.Context(), []bench.Workload{m})
	if err == nil || !strings.Contains(err.Error(), `printed "hello"`) {
		t.Errorf("error %v", err)
	}
	leftNothing(t, b)
}

// leftNothing fails the test if the benchmark has left anything but the program:
// files, mounts or loop devices.
func leftNothing(t *testing.T, b *benchmark) {
	t.Helper()
	entries, err := os.ReadDir(b.dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "thaw" {
		t.Errorf("left in %s: %v, %v", b.dir, entries, err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), b.dir) {
		t.Errorf("left mounted: %s, %v", mounts, err)
	}
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range backing {
		// A device that has disappeared was not this test's.
		if file, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(file), b.dir) {
			t.Errorf("left attached: %s from %s", f, file)
		}
	}
}
