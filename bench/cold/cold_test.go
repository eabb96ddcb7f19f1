package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"thaw/bench"
	"thaw/bench/benchtest"
)

func TestMain(m *testing.M) { benchtest.Main(m) }

func testBenchmark(t *testing.T, out *bytes.Buffer, o options) *benchmark {
	t.Helper()
	chosen, err := chooseRows(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := bench.Need(needsOf(chosen)...); err != nil {
		t.Skip(err)
	}
	// Not t.TempDir: the path of a socket has at most 107 bytes.
	dir, err := os.MkdirTemp("", "cold-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	o.links = []link{{"quick", time.Millisecond, 1e9}}
	if o.loads == nil {
		o.loads = []load{start}
	}
	o.rounds, o.size, o.readAhead, o.nbdkit = 1, "64M", 128, nbdkitArgs
	b := &benchmark{options: o, dir: dir, chosen: chosen, out: out, results: newResults(out)}
	if b.thaw, err = bench.BuildThaw(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	return b
}

// All rows but those of stargz start a small image.
func TestRowsStart(t *testing.T) {
	wanted := []string{
		localWarm, localCold, resident, fullPull, nbdkitCurl, thawPlain, thawTrace, thawBundle,
		resident + overNBD, thawPlain + overNBD, thawTrace + overNBD, thawBundle + overNBD,
	}
	v, err := parseVariant("slow-ahead=thaw-trace --prefetch-rate 100M")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	b := testBenchmark(t, &out, options{rows: strings.Join(wanted, ","), variants: []variant{v}})
	w := benchtest.Image(t)
	if err := b.image(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	for _, row := range append(wanted, v.name) {
		name := startName(w.Name, "quick", row)
		if b.results.rec.Rounds(name, bench.Wall) != 1 || b.results.rec.Median(name, bench.Wall) <= 0 {
			t.Errorf("no time of %s", row)
		}
		local := row == localWarm || row == localCold || strings.HasPrefix(row, resident)
		if n := b.results.rec.Median(name, requests); local != (n == 0) {
			t.Errorf("%s: %v requests", row, n)
		}
	}
	pulled, size := b.results.rec.Median(startName(w.Name, "quick", fullPull), wireBytes), b.results.rec.Median(planName(w.Name), imageUnit)
	if pulled < size || pulled > size+10e3 {
		t.Errorf("a full pull of %v bytes transferred %v", size, pulled)
	}
	if b.results.timelines[startName(w.Name, "quick", thawBundle)] == nil {
		t.Error("no timeline")
	}
	file := filepath.Join(t.TempDir(), "lines")
	if err := os.WriteFile(file, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := readResults([]string{file})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := again.limit(w.Name, b.links[0]), b.results.limit(w.Name, b.links[0]); got != want {
		t.Errorf("the limit is %v, and %v when read from the file", want, got)
	}
	leftNothing(t, b)
}

// The rows that have the load read every file of a small image.
func TestEverything(t *testing.T) {
	var out bytes.Buffer
	loads, err := parseLoads("everything")
	if err != nil {
		t.Fatal(err)
	}
	v, err := parseVariant("ahead=thaw --prefetch-rate 100M")
	if err != nil {
		t.Fatal(err)
	}
	b := testBenchmark(t, &out, options{loads: loads, rows: "local-warm,local-cold,full-pull,nbdkit-curl,thaw,thaw-trace", variants: []variant{v}})
	w := benchtest.Image(t)
	if err := b.image(t.Context(), w); err != nil {
		t.Fatal(err)
	}
	for row, has := range map[string]bool{localWarm: false, localCold: true, fullPull: true, nbdkitCurl: true, thawPlain: true, thawTrace: false, "ahead": true} {
		if n := b.results.rec.Rounds(startName("small-everything", "quick", row), bench.Wall); (n == 1) != has {
			t.Errorf("%d rounds of %s", n, row)
		}
	}
	pulled, came := b.results.rec.Median(startName("small-everything", "quick", fullPull), wireBytes), b.results.rec.Median(startName("small-everything", "quick", thawPlain), wireBytes)
	if came < pulled/4 {
		t.Errorf("thaw fetched %v bytes of an image of %v", came, pulled)
	}
	leftNothing(t, b)
	if _, err := parseLoads("start,nothing"); err == nil {
		t.Error("an unknown load is accepted")
	}
}

// A load that reads too little fails the benchmark.
func TestReadsTooLittle(t *testing.T) {
	p := &prepared{read: "100"}
	if err := p.check(everything, "99"); err == nil {
		t.Error("99 of 100 bytes are enough")
	}
	if err := p.check(everything, "100"); err != nil {
		t.Error(err)
	}
}

// A program with a wrong answer fails the benchmark, which still cleans up.
func TestWrongAnswer(t *testing.T) {
	var out bytes.Buffer
	b := testBenchmark(t, &out, options{rows: thawPlain})
	w := benchtest.Image(t)
	w.Answer = "something else"
	if err := b.image(t.Context(), w); err == nil || !strings.Contains(err.Error(), `printed "hello"`) {
		t.Errorf("error %v", err)
	}
	leftNothing(t, b)
}

// leftNothing fails the test if the benchmark has left anything but the program:
// files or mounts.
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
}

// A new mount namespace has no copies of the loop devices' mounts, which would keep the
// devices in use.
func TestIsolateForgetsMounts(t *testing.T) {
	const variable = "THAW_TEST_MOUNT"
	if at := os.Getenv(variable); at != "" {
		mounts, err := os.ReadFile("/proc/self/mounts")
		if err != nil || strings.Contains(string(mounts), at) {
			t.Errorf("still mounted: %v\n%s", err, mounts)
		}
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("only root can mount")
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 4<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := bench.Output(exec.Command("mke2fs", "-q", file)); err != nil {
		t.Fatal(err)
	}
	root, err := bench.MountFile(t.Context(), file, dir, 128)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := root.Close(); err != nil {
			t.Error(err)
		}
	}()
	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestIsolateForgetsMounts$")
	cmd.Args[0] = "cold.test" // and not that of a process that is isolated already
	cmd.Env = append(os.Environ(), variable+"="+root.Dir)
	if out, err := bench.Output(cmd); err != nil || !strings.Contains(out, "PASS") {
		t.Errorf("%v: %s", err, out)
	}
}
