package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"thaw/blockmap"
	"thaw/tracefile"
)

// Traces of starts that vary are merged, and their bundle leaves out what few of them read
// unless it is told otherwise.
func TestTraceMerge(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	saveArchive(t, dir+"/src.tar", imageOf(t, layerOf(t, file{name: "big", data: random(3, 4<<20)})))
	image := "oci:" + dir + "/dst:x"
	must(t, "build", "--size", "32M", "docker-archive:"+dir+"/src.tar", image)
	b, _ := blockImageOf(t, image)
	var data blockmap.Run // what all starts read a part of
	for _, r := range b.Index.Runs {
		if r.Count > data.Count {
			data = r
		}
	}
	if data.Count < 640 {
		t.Fatalf("the largest run has %d blocks", data.Count)
	}
	write := func(name string, starts ...int) string {
		t.Helper()
		path := filepath.Join(dir, name)
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		x := &tracefile.Trace{Header: tracefile.Header{Index: b.IndexDigest(), Blocks: b.Index.Blocks, Starts: 1}, End: tracefile.End{Why: tracefile.Stopped}}
		for i, part := range starts {
			x.Touches = append(x.Touches, tracefile.Touch{At: time.Duration(i) * time.Millisecond, Block: data.Device + uint32(part)*64, Count: 64, Starts: 1})
		}
		if err := x.Write(f); err != nil {
			t.Fatal(err)
		}
		return path
	}
	paths := []string{write("a", 0, 1, 9), write("b", 0, 2), write("c", 0, 2), write("d", 0, 2), write("e", 1, 0)}
	out := filepath.Join(dir, "merged")
	var merged mergedTrace
	args := append(append([]string{"trace", "merge", "--json"}, paths...), "-o", out)
	if err := json.Unmarshal([]byte(must(t, args...)), &merged); err != nil {
		t.Fatal(err)
	}
	if want := (mergedTrace{"merged", out, 5, 4, 4 * 64 * 4096, 64 * 4096}); merged != want {
		t.Errorf("%+v, want %+v", merged, want)
	}
	if s := must(t, "trace", "merge", out, "-o", out); !strings.Contains(s, "5 starts") || !strings.Contains(s, "256 KiB of it") {
		t.Errorf("merged with itself alone it says: %s", s)
	}
	sizes := make(map[string]packed)
	for name, args := range map[string][]string{
		"default": {out}, "of the parts": paths, "all": {"--least", "0", out}, "half": {"--least", "50", out}, "few": paths[:3],
	} {
		var p packed
		if err := json.Unmarshal([]byte(must(t, append([]string{"trace", "pack", "--json", image}, args...)...)), &p); err != nil {
			t.Fatal(err)
		}
		sizes[name] = p
	}
	for name, want := range map[string]int64{"default": 3, "of the parts": 3, "all": 4, "half": 2, "few": 4} {
		if p := sizes[name]; p.Wanted != want*64*4096 || p.Rare != map[string]int64{"default": 1, "of the parts": 1, "half": 2}[name]*64*4096 {
			t.Errorf("%s: %+v, want %d parts", name, p, want)
		}
	}
	for _, args := range [][]string{
		{"trace", "merge", out}, {"trace", "merge", "-o", out}, {"trace", "pack", "--least", "101", image, out}, {"trace", "pack", "--least", "-1", image, out},
	} {
		if _, stderr, code := thaw(t, args...); code != exitUsage || stderr == "" {
			t.Errorf("%v: exit %d, %s", args, code, stderr)
		}
	}
	// A trace of another image is refused, and what is there stays.
	other := filepath.Join(dir, "other")
	if f, err := os.Create(other); err != nil {
		t.Fatal(err)
	} else {
		x := &tracefile.Trace{Header: tracefile.Header{Index: blockmap.Digest{1}, Blocks: 10, Starts: 1}}
		if err := x.Write(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	before, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if _, stderr, code := thaw(t, "trace", "merge", paths[0], other, "-o", out); code != exitError || !strings.Contains(stderr, "another image") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	if after, err := os.ReadFile(out); err != nil || string(after) != string(before) {
		t.Errorf("a merge that failed has changed its file (%v)", err)
	}
}
