package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"thaw/tracefile"
)

// readBlocks reads some blocks of an export, here and there.
func readBlocks(t testing.TB, uri string) {
	t.Helper()
	args := []string{"-r", "-f", "raw"}
	for i := range 12 {
		args = append(args, "-c", fmt.Sprintf("read %d 4096", (i*7%12)*600<<10))
	}
	tool(t, "qemu-io", append(args, uri)...)
}

// A start is recorded, kept beside the image, and fetched ahead of the next
// one, which then reads without a request of its own; and so is the next
// version's.
func TestRecordAndReplay(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	base := layerOf(t, append(files(1, "base", 100), file{name: "big", data: random(3, 6<<20)})...)
	one, two := p.host()+"/team/app:v1", p.host()+"/team/app:v2"
	push(t, one, imageOf(t, base, layerOf(t, files(2, "app", 20)...)))
	push(t, two, imageOf(t, base, layerOf(t, files(3, "app", 30)...)))
	must(t, "build", "--size", "128M", one)
	must(t, "build", "--size", "128M", two)
	dir := t.TempDir()
	path := filepath.Join(dir, "start.trace")

	s := serving(t, one, "--listen", "unix:"+socket(t), "--cache", dir+"/c1", "--record", path)
	readBlocks(t, s.uri())
	if out := must(t, "trace", "stop", "--cache", dir+"/c1"); !strings.Contains(out, "1 recording ended") {
		t.Errorf("trace stop: %s", out)
	}
	recorded := p.fetched()
	tool(t, "qemu-io", "-r", "-f", "raw", "-c", "read 20M 1M", s.uri()) // not in it any more
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d", code)
	}
	var sum tracefile.Summary
	if err := json.Unmarshal([]byte(must(t, "trace", "show", "--json", path, "--image", one)), &sum); err != nil {
		t.Fatal(err)
	}
	if sum.Bytes != 12*4096 || sum.Ended != "stopped" || len(sum.Streams) == 0 {
		t.Errorf("%+v", sum)
	}
	must(t, "trace", "push", one, path)
	if _, stderr, code := thaw(t, "trace", "push", two, path); code != exitError || !strings.Contains(stderr, "another image") {
		t.Errorf("a trace is stored beside another image: exit %d, %s", code, stderr)
	}

	// qemu probes more than it is told to read, so what it asks for the
	// second time is compared, not what the test does.
	p.settle(t)
	before := p.fetched()
	s = serving(t, one, "--listen", "unix:"+socket(t), "--cache", dir+"/c2", "--trace", "auto", "--prefetch-wait", "100")
	ahead := p.fetched() - before
	if ahead == 0 || ahead > recorded {
		t.Errorf("%d bytes were fetched ahead, the start that was recorded took %d", ahead, recorded)
	}
	readBlocks(t, s.uri())
	if n := p.fetched() - before; n != ahead {
		t.Errorf("with all fetched ahead the start took %d bytes more", n-ahead)
	}
	if _, code := s.term(); code != exitOK || !s.said("replayed") {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}

	s = serving(t, two, "--listen", "unix:"+socket(t), "--cache", dir+"/c3", "--trace", one, "--prefetch-wait", "100")
	if !s.said("a trace of another version is used") {
		t.Errorf("it does not say how much is shared:\n%s", s.stderr.String())
	}
	s.term()
}

// What a trace has from all over a layer comes in a few requests where the registry
// gives several ranges in one answer; where it does not, it is asked once, and
// the start goes on by one range a request.
func TestReplayInRanges(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, imageOf(t, layerOf(t, append(files(1, "base", 10), file{name: "big", data: random(3, 12<<20)})...)))
	must(t, "build", "--size", "128M", "--chunk-size", "16K", ref)
	dir := t.TempDir()
	path := filepath.Join(dir, "start.trace")
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", dir+"/c", "--record", path)
	args := []string{"-r", "-f", "raw"}
	const places = 200 // none beside another
	for i := range places {
		args = append(args, "-c", fmt.Sprintf("read %d 4k", 18<<20+i*37%places*(48<<10)))
	}
	tool(t, "qemu-io", append(args, s.uri())...)
	must(t, "trace", "stop", "--cache", dir+"/c")
	s.term()
	must(t, "trace", "push", ref, path)

	replay := func(cache string) (several, one int) {
		t.Helper()
		p.settle(t)
		p.take()
		s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", filepath.Join(dir, cache), "--trace", "auto", "--prefetch-wait", "100")
		for _, r := range p.take() {
			switch method, span, _ := strings.Cut(r, "bytes="); {
			case !strings.HasPrefix(method, "GET") || span == "":
			case strings.Contains(span, ","):
				several++
			default:
				one++
			}
		}
		tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", device(t, s.uri()), s.uri())
		s.term()
		return several, one
	}
	several, one := replay("c1")
	if several < 3 || several+one > places/2 { // some go before the first answer has come
		t.Errorf("%d requests for several ranges and %d for one, for %d places", several, one, places)
	}
	p.set(func(_ http.ResponseWriter, r *http.Request) bool {
		if span, _, more := strings.Cut(r.Header.Get("Range"), ","); more {
			r.Header.Set("Range", span)
		}
		return true
	})
	if several, one := replay("c2"); several != 1 || one < places*9/10 { // some places may be beside the file
		t.Errorf("%d requests for several ranges and %d for one, of a registry that gives one", several, one)
	}
}

// With --trace auto an image without traces gets its first.
func TestAutoTrace(t *testing.T) {
	need(t, "qemu-io")
	reg := startRegistry(t, "", t.TempDir(), "")
	ref := reg.addr + "/team/app:v1"
	push(t, ref, sample(t))
	must(t, "build", "--size", "128M", ref)
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", "auto", "--trace-push", "--record-quiet", "100ms")
	readBlocks(t, s.uri())
	if !s.said("stored the recording beside its image") {
		t.Fatalf("%s", s.stderr.String())
	}
	s.term()
	s = serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--trace", "auto")
	if !s.said("replaying a trace") {
		t.Errorf("%s", s.stderr.String())
	}
	s.term()
}

// What is wrong with a trace costs speed and a line in the log.
func TestBadTraces(t *testing.T) {
	need(t, "qemu-io")
	dir := t.TempDir()
	saveArchive(t, dir+"/src.tar", sample(t))
	image := "oci:" + dir + "/dst:x"
	must(t, "build", "--size", "64M", "docker-archive:"+dir+"/src.tar", image)
	junk := filepath.Join(dir, "junk")
	if err := os.WriteFile(junk, []byte("not a trace at all"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", dir+"/c", "--trace", junk, "--trace", dir+"/none")
	if !s.said("a trace cannot be used") {
		t.Errorf("%s", s.stderr.String())
	}
	tool(t, "qemu-io", "-r", "-f", "raw", "-c", "read 0 4096", s.uri())
	s.term()
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"trace", "show", junk}, 1, "junk"},
		{[]string{"trace", "show", dir + "/none"}, 1, "no such file"},
		{[]string{"trace", "push", image, junk}, 1, "junk"},
		{[]string{"trace", "melt"}, 2, "no command"},
		{[]string{"trace", "stop", "--cache", dir + "/none"}, 1, "no server uses the cache"},
		{[]string{"serve", image, image + "2", "--record", dir + "/r", "--cache", dir + "/c"}, 2, "serve one"},
		{[]string{"serve", image, "--trace-push", "--cache", dir + "/c"}, 2, "needs a recording"},
		{[]string{"serve", image, "--prefetch-wait", "101", "--cache", dir + "/c"}, 2, "percentage"},
	} {
		if _, stderr, code := thaw(t, c.args...); code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("thaw %s: exit %d, want %d and %q:\n%s", strings.Join(c.args, " "), code, c.code, c.want, stderr)
		}
	}
}

// The exports are what the programs read that they are for.
func TestTraceExport(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io", "fio")
	dir := t.TempDir()
	saveArchive(t, dir+"/src.tar", sample(t))
	image := "oci:" + dir + "/dst:x"
	must(t, "build", "--size", "64M", "docker-archive:"+dir+"/src.tar", image)
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", dir+"/c", "--record", dir+"/t")
	readBlocks(t, s.uri())
	disk := device(t, s.uri())
	s.term()
	must(t, "trace", "export", dir+"/t", "--device", disk, "-o", dir+"/log")
	out, err := exec.Command("fio", "--name=r", "--ioengine=psync", "--readonly", "--read_iolog="+dir+"/log", "--replay_no_stall=1").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "read: IOPS") {
		t.Errorf("fio: %v\n%s", err, out)
	}
	if text := must(t, "trace", "export", dir+"/t", "--format", "blkparse"); !strings.Contains(text, " R ") {
		t.Errorf("%.200s", text)
	}
	if _, stderr, code := thaw(t, "trace", "export", dir+"/t", "--format", "xml"); code != exitUsage {
		t.Errorf("exit %d, %s", code, stderr)
	}
}

// A bundle is made with the image: of the starts of that very image, or of those
// of the version before.
func TestBuildWithTrace(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	base := layerOf(t, append(files(1, "base", 100), file{name: "big", data: random(3, 6<<20)})...)
	one, two := p.host()+"/team/app:v1", p.host()+"/team/app:v2"
	push(t, one, imageOf(t, base, layerOf(t, files(2, "app", 20)...)))
	push(t, two, imageOf(t, base, layerOf(t, files(3, "app", 30)...)))
	must(t, "build", "--size", "128M", one)
	dir := t.TempDir()
	path := filepath.Join(dir, "start.trace")
	s := serving(t, one, "--listen", "unix:"+socket(t), "--cache", dir+"/c1", "--record", path, "--fetch-ahead", "none")
	tool(t, "qemu-io", "-r", "-f", "raw", "-c", "read 0 64M", "-c", "read 64M 64M", s.uri())
	s.term()

	var b struct {
		Bundle *packed `json:"bundle"`
	}
	if err := json.Unmarshal([]byte(must(t, "build", "--size", "128M", one, "--trace", path, "--json")), &b); err != nil {
		t.Fatal(err)
	}
	if b.Bundle == nil || b.Bundle.Chunks == 0 || b.Bundle.Wanted < 6<<20 {
		t.Fatalf("%+v", b.Bundle)
	}
	// A file says nothing of the image that it is of; the image does.
	if _, stderr, code := thaw(t, "build", "--size", "128M", two, "--trace", path); code != exitError ||
		!strings.Contains(stderr, "was built") || !strings.Contains(stderr, "name the image") {
		t.Errorf("a trace of another image is packed: exit %d, %s", code, stderr)
	}
	must(t, "trace", "push", one, path)
	must(t, "build", "--size", "128M", two, "--trace", one)
	for i, ref := range []string{one, two} {
		s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", fmt.Sprintf("%s/d%d", dir, i), "--trace", "auto", "--prefetch-wait", "100")
		if !s.said("bundle_leaves") {
			t.Errorf("%s has no bundle:\n%s", ref, s.stderr.String())
		}
		s.term()
	}
	for _, none := range []string{filepath.Join(dir, "none"), two + "x"} {
		if _, stderr, code := thaw(t, "build", "--size", "128M", one, "--trace", none); code == exitOK || strings.Contains(stderr, "was built") {
			t.Errorf("--trace %s: exit %d, %s", none, code, stderr)
		}
	}
}

// Recordings can be ended while clients open images that begin some: the race
// detector watches the server.
func TestTraceStopWhileImagesOpen(t *testing.T) {
	need(t, "qemu-io")
	dir := t.TempDir()
	saveArchive(t, dir+"/src.tar", sample(t))
	image := "oci:" + dir + "/dst:x"
	must(t, "build", "--size", "64M", "docker-archive:"+dir+"/src.tar", image)
	s := serving(t, "--allow", "oci:"+dir+"/**", "--listen", "unix:"+socket(t), "--cache", dir+"/c", "--trace", "auto")
	uri := "nbd+unix:///" + image + "?socket=" + strings.TrimPrefix(s.ready.Listen[0], "unix:")
	opened := make(chan struct{})
	go func() {
		defer close(opened)
		for range 10 {
			if out, err := exec.CommandContext(t.Context(), "qemu-io", "-r", "-f", "raw", "-c", "read 0 4096", uri).CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		}
	}()
	for done := false; !done; {
		must(t, "trace", "stop", "--cache", dir+"/c")
		select {
		case <-opened:
			done = true
		default:
		}
	}
	if _, code := s.term(); code != exitOK || strings.Contains(s.stderr.String(), "DATA RACE") {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
}
