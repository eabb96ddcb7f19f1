package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"thaw/blockmap"
	"thaw/tracefile"
)

// line is the last line of a log with that message, which may be on its way.
func (s *server) line(t testing.TB, msg string) (fields map[string]any) {
	t.Helper()
	s.said(`"msg":"` + msg + `"`)
	for l := range strings.Lines(s.stderr.String()) {
		if strings.Contains(l, `"msg":"`+msg+`"`) {
			fields = nil
			if err := json.Unmarshal([]byte(l), &fields); err != nil {
				t.Fatal(err)
			}
		}
	}
	if fields == nil {
		t.Fatalf("it does not say %q:\n%s", msg, s.stderr.String())
	}
	return fields
}

// stopTrace ends the recording. That it ends by itself when all is quiet takes a machine on which
// a client that reads is never quiet.
func (s *server) stopTrace() {
	s.t.Helper()
	if out := must(s.t, "trace", "stop", "--cache", s.cache()); !strings.HasPrefix(out, "1 recording") {
		s.t.Errorf("thaw trace stop: %s", out)
	}
}

// cache is the cache directory.
func (s *server) cache() string { return s.cmd.Args[slices.Index(s.cmd.Args, "--cache")+1] }

const (
	saidStored   = "stored the recording beside its image"
	saidPacked   = "packed a bundle and stored it beside its image"
	saidCompared = "compared the start with what was stored for it"
	saidReplay   = "replaying a trace"
)

// largestRun is where on the device of an image the most consecutive content lies.
func largestRun(t testing.TB, ref string) (run blockmap.Run) {
	t.Helper()
	b, _ := blockImageOf(t, ref)
	for _, r := range b.Index.Runs {
		if r.Count > run.Count {
			run = r
		}
	}
	return run
}

// reads are commands that read n pieces of 64 KiB of a run, from piece first on.
func reads(run blockmap.Run, first, n int) (commands []string) {
	for i := first; i < first+n; i++ {
		commands = append(commands, fmt.Sprintf("read %d 64k", int64(run.Device)*blockmap.BlockSize+int64(i)<<16))
	}
	return commands
}

// Nobody has to know of bundles: the first start is recorded, stored and packed of what is in
// the cache; the next start anywhere uses the bundle; and so does the first start of the next
// version, for what it shares.
func TestAutoBundle(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	base := layerOf(t, file{name: "big", data: random(3, 8<<20)})
	one, two := p.host()+"/team/app:v1", p.host()+"/team/app:v2"
	push(t, one, imageOf(t, base, layerOf(t, files(2, "app", 20)...)))
	push(t, two, imageOf(t, base, layerOf(t, files(3, "app", 30)...)))
	must(t, "build", "--size", "64M", one)
	must(t, "build", "--size", "64M", two)
	run := largestRun(t, one)
	auto := func(ref string, args ...string) *server {
		t.Helper()
		return serving(t, append([]string{ref, "--listen", "unix:" + socket(t), "--cache", t.TempDir(), "--trace", "auto", "--fetch-ahead", "none"}, args...)...)
	}
	s := auto(one, "--trace-push", "--record-quiet", "1h")
	qemuRead(t, s.uri(), reads(run, 0, 40)...)
	s.stopTrace()
	if !s.said(saidStored) || !s.said(saidPacked) {
		t.Fatalf("%s", s.stderr.String())
	}
	if l := s.line(t, saidPacked); l["fetched_bytes"].(float64) != 0 || l["starts"].(float64) != 1 || l["leaves"].(float64) < 40 {
		t.Errorf("it was packed: %v", l)
	}
	s.term()

	p.take()
	s = auto(one, "--prefetch-wait", "100")
	qemuRead(t, s.uri(), reads(run, 0, 40)...)
	sum, _ := s.term()
	if sum["requests"].(float64) != 1 || sum["fetched_leaves"].(float64) < 40 || sum["fetched_chunks"].(float64) != 0 {
		t.Errorf("the next start: %v", sum)
	}
	if l := s.line(t, saidReplay); l["shared_leaves"] != l["bundle_leaves"] || l["of_another_version"] != nil {
		t.Errorf("it replays %v", l)
	}

	// The next version: nothing is stored beside it yet.
	run = largestRun(t, two)
	s = auto(two, "--trace-push", "--record-quiet", "1h", "--prefetch-wait", "100")
	l := s.line(t, saidReplay)
	if l["of_another_version"] != true || l["shared_leaves"].(float64) < 40 || l["shared_leaves"].(float64) > l["bundle_leaves"].(float64) {
		t.Errorf("it replays %v", l)
	}
	bundle := bundleOf(t, one).Digest
	p.take()
	qemuRead(t, s.uri(), reads(run, 0, 40)...)
	if n := ranges(p.take(), bundle, true); len(n) != 0 {
		t.Errorf("reads of what both versions have made requests: %v", n)
	}
	s.stopTrace()
	if !s.said(saidStored) || !s.said(saidPacked) {
		t.Fatalf("%s", s.stderr.String())
	}
	s.term()
	s = auto(two, "--prefetch-wait", "100")
	if l := s.line(t, saidReplay); l["of_another_version"] != nil || l["shared_leaves"] != l["bundle_leaves"] {
		t.Errorf("the second start of the next version replays %v", l)
	}
	s.term()
}

// The last bundle of a repository only saves work: what is under its tag can be anything.
func TestForgedBundleTag(t *testing.T) {
	need(t, "qemu-io")
	reg := startRegistry(t, "", t.TempDir(), "")
	ref := reg.addr + "/team/app:v1"
	img := imageOf(t, layerOf(t, file{name: "big", data: random(3, 2<<20)}))
	push(t, ref, img)
	must(t, "build", "--size", "32M", ref)
	run := largestRun(t, ref)
	push(t, reg.addr+"/team/app:"+tracefile.BundleTag, img)
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", "auto", "--prefetch-wait", "100")
	qemuRead(t, s.uri(), reads(run, 0, 10)...)
	if _, code := s.term(); code != exitOK || s.lines("WARN")+s.lines("ERROR")+s.lines(saidReplay) > 0 {
		t.Errorf("exit %d, it says\n%s", code, s.stderr.String())
	}
}

// A server that is stopped before the bundle is packed leaves it to a later one.
func TestBundleIsPackedLater(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	dir := t.TempDir()
	saveArchive(t, dir+"/src.tar", imageOf(t, layerOf(t, file{name: "big", data: random(3, 4<<20)})))
	image := "oci:" + dir + "/dst:x"
	must(t, "build", "--size", "32M", "docker-archive:"+dir+"/src.tar", image)
	run := largestRun(t, image)
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", dir+"/c", "--trace", "auto", "--trace-push", "--record-quiet", "1h")
	qemuRead(t, s.uri(), reads(run, 0, 20)...)
	s.term()
	if s.lines(saidStored) != 1 || s.lines(saidPacked) != 0 {
		t.Fatalf("%s", s.stderr.String())
	}
	if _, found := blockImageOf(t, image); len(found.Traces) != 1 || len(found.Bundles) != 0 {
		t.Fatalf("%d traces, %d bundles", len(found.Traces), len(found.Bundles))
	}
	s = serving(t, image, "--listen", "unix:"+socket(t), "--cache", dir+"/c", "--trace", "auto", "--trace-push", "--record-quiet", "200ms")
	qemuRead(t, s.uri(), reads(run, 0, 20)...)
	if !s.said(saidPacked) || s.lines(saidStored) != 0 {
		t.Fatalf("%s", s.stderr.String())
	}
	s.term()
	if _, found := blockImageOf(t, image); len(found.Traces) != 1 || len(found.Bundles) != 1 {
		t.Errorf("%d traces, %d bundles", len(found.Traces), len(found.Bundles))
	}
	if left := filesIn(t, dir+"/c/traces"); len(left) != 0 {
		t.Errorf("recordings that were compared are left: %v", left)
	}
}

// Three starts in a row that read something else replace what is stored; one that reads the
// same ends the row, and one that reads hardly anything does not count.
func TestStaleTrace(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	dir := t.TempDir()
	saveArchive(t, dir+"/src.tar", imageOf(t, layerOf(t, file{name: "big", data: random(3, 8<<20)})))
	image := "oci:" + dir + "/dst:x"
	must(t, "build", "--size", "32M", "docker-archive:"+dir+"/src.tar", image)
	run := largestRun(t, image)
	start := func(first, n int, said string) *server {
		t.Helper()
		s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", dir+"/c", "--trace", "auto", "--trace-push", "--record-quiet", "1h", "--fetch-ahead", "none")
		qemuRead(t, s.uri(), reads(run, first, n)...)
		s.stopTrace()
		if !s.said(said) {
			t.Fatalf("%s", s.stderr.String())
		}
		return s
	}
	start(0, 30, saidPacked).term()
	for i, c := range []struct {
		first, n, unlike int
		replace          bool
	}{
		{0, 30, 0, false}, {60, 30, 1, false}, {0, 1, 1, false}, {0, 25, 0, false}, // much of it
		{60, 30, 1, false}, {65, 30, 2, false}, {60, 30, 3, true},
	} {
		s := start(c.first, c.n, saidCompared)
		l := s.line(t, saidCompared)
		if int(l["unlike_starts"].(float64)) != c.unlike || l["replace"] != c.replace {
			t.Errorf("start %d: %v, want %d in a row, replaced: %v", i, l, c.unlike, c.replace)
		}
		if c.replace && (!s.said(saidStored) || !s.said(saidPacked)) {
			t.Errorf("nothing new was stored:\n%s", s.stderr.String())
		}
		s.term()
		if !c.replace && s.lines(saidStored)+s.lines(saidPacked) > 0 {
			t.Errorf("start %d has stored something:\n%s", i, s.stderr.String())
		}
	}
	// The old trace counts no more, and the new bundle has nothing of it.
	if _, found := blockImageOf(t, image); len(found.Traces) != 1 || len(found.Bundles) != 2 {
		t.Errorf("%d traces, %d bundles", len(found.Traces), len(found.Bundles))
	}
	s := start(60, 30, saidCompared)
	if l := s.line(t, saidCompared); l["unlike_starts"].(float64) != 0 || l["hit_leaves"].(float64) < 30 {
		t.Errorf("with the new bundle: %v", l)
	}
	s.term()
}
