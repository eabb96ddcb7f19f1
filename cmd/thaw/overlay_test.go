package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"thaw/blockmap"
	"thaw/cmd/thaw/internal/host"
)

// as is the URI of an export of s by another name.
func (s *server) as(export string) string {
	return "nbd+unix:///" + export + "?socket=" + strings.TrimPrefix(s.ready.Listen[0], "unix:")
}

// qemuWrite runs commands of qemu-io, which is to succeed at all of them: a pattern that does not match
// is only printed.
func qemuWrite(t testing.TB, uri string, commands ...string) {
	t.Helper()
	args := []string{"-f", "raw"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	if out := tool(t, "qemu-io", append(args, uri)...); strings.Contains(out, "Pattern verification failed") {
		t.Errorf("%s: %q\n%s", uri, commands, out)
	}
}

// listed returns what thaw list says of a device.
func listed(t testing.TB, cache, name string) host.DeviceInfo {
	t.Helper()
	for line := range strings.Lines(must(t, "list", "--json", "--cache", cache)) {
		var d listedDevice
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			t.Fatal(err)
		}
		if d.Name == name {
			return d.DeviceInfo
		}
	}
	t.Fatalf("there is no device %s:\n%s", name, must(t, "list", "--cache", cache))
	return host.DeviceInfo{}
}

// cacheDir is a directory whose control socket has a path that is short enough.
func cacheDir(t testing.TB) string { return filepath.Dir(socket(t)) }

// What clients write is there after a restart, in one directory for one image, and the image
// itself is as it was.
func TestServeOverlay(t *testing.T) {
	need(t, "qemu-io", "qemu-img", "nbdinfo", "nbdcopy")
	image := layoutImage(t)
	dir, cache := filepath.Join(t.TempDir(), "new", "overlay"), cacheDir(t)
	serve := func(more ...string) *server {
		return serving(t, append([]string{image, "--listen", "unix:" + socket(t), "--cache", cache}, more...)...)
	}
	s := serve()
	plain := device(t, s.uri())
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 4k", s.uri()).CombinedOutput(); err == nil {
		t.Errorf("a write without --overlay succeeds: %s", out)
	}
	s.term()

	s = serve("--overlay", dir)
	if !s.ready.Exports[0].Writable {
		t.Errorf("%+v", s.ready.Exports[0])
	}
	var info struct {
		Exports []struct {
			ReadOnly  bool `json:"is_read_only"`
			MultiConn bool `json:"can_multi_conn"`
			Flush     bool `json:"can_flush"`
			FUA       bool `json:"can_fua"`
			Trim      bool `json:"can_trim"`
			Zero      bool `json:"can_zero"`
		} `json:"exports"`
	}
	if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", s.uri())), &info); err != nil {
		t.Fatal(err)
	}
	if e := info.Exports[0]; e.ReadOnly || !e.MultiConn || !e.Flush || !e.FUA || !e.Trim || !e.Zero {
		t.Errorf("%+v", e)
	}
	qemuWrite(t, s.uri(), "write -P 0x11 1M 1M", "write -P 0x22 3000 5000", "write -z 30M 1M", "discard 8M 64k", "flush", "read -P 0x11 1M 1M", "read -P 0x22 3000 5000")
	want := device(t, s.uri())
	in := listed(t, cache, image).Overlay
	if in == nil || in.Directory != dir || in.Data != 2<<20+2*4096 || in.Zero != 64<<10 || in.Space < in.Data || in.Flushes == 0 || in.Syncs == 0 || in.Error != "" {
		t.Errorf("%+v", in)
	}
	if out := must(t, "status", "--cache", cache); !strings.Contains(out, "overlays  1; 2.1 MiB changed, which take") || !strings.Contains(out, "changed\n") {
		t.Errorf("the status is\n%s", out)
	}
	// The overlay belongs to one process.
	other := launch(t, nil, image, "--listen", "unix:"+socket(t), "--cache", cacheDir(t), "--overlay", dir)
	if <-other.done; other.isReady() || !other.said("in use by another process") {
		t.Errorf("two servers have one overlay:\n%s", other.stderr.String())
	}
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d:\n%s", code, s.stderr.String())
	}

	s = serve("--overlay", dir)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", want, s.uri())
	s.term()
	s = serve() // the image is as ever
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", plain, s.uri())
	s.term()

	// An overlay that goes with the server, for all its clients.
	s = serve("--ephemeral")
	qemuWrite(t, s.uri(), "write -P 0x33 1M 1M", "flush")
	qemuWrite(t, s.uri(), "read -P 0x33 1M 1M")
	if in := listed(t, cache, image).Overlay; in == nil || in.Directory != "" || in.Data != 1<<20 {
		t.Errorf("%+v", in)
	}
	s.term()
	s = serve("--ephemeral")
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", plain, s.uri())
	s.term()
	for _, e := range dirOf(t, cache) {
		if strings.Contains(e, "overlay") {
			t.Errorf("the cache directory has %s", e)
		}
	}
}

func dirOf(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// nbdsh runs a script of Python with libnbd, which is to succeed.
func nbdsh(t testing.TB, script string) {
	t.Helper()
	need(t, "nbdsh")
	ctx, cancel := context.WithTimeout(t.Context(), 5*atMost)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nbdsh", "-c", script)
	cmd.Env = append(os.Environ(), "PATH=/usr/bin:/bin:"+os.Getenv("PATH")) // it wants Debian's Python
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s\n%s", err, script, out)
	}
}

// A flush on one connection makes durable what another one has written. That is what thaw
// promises when it lets a client open several.
func TestFlushCoversAllConnections(t *testing.T) {
	image := layoutImage(t)
	dir, cache := filepath.Join(t.TempDir(), "overlay"), cacheDir(t)
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", dir)
	nbdsh(t, fmt.Sprintf(`
a, b = nbd.NBD(), nbd.NBD()
for h in a, b:
    h.connect_uri(%q)
    assert h.can_multi_conn()
a.pwrite(b"w" * 65536, 1 << 20)
assert b.pread(65536, 1 << 20) == b"w" * 65536
b.flush()
`, s.uri()))
	// What is durable is what a power loss would leave. ReadOverlay counts that once no
	// process has the overlay.
	s.kill()
	info, err := blockmap.ReadOverlay(blockmap.OS, dir)
	if err != nil || info.InUse || info.Data != 65536 {
		t.Errorf("durable: %+v, %v", info, err)
	}
}

// When the tag has moved, the overlay is served on its own base, and what is ambiguous is refused by a
// sentence that names the choices.
func TestOverlayAfterTheTagMoved(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io", "nbdcopy")
	reg := startRegistry(t, "", t.TempDir(), "")
	ref := reg.addr + "/team/app:v1"
	build := func(seed uint64) string {
		t.Helper()
		push(t, ref, imageOf(t, layerOf(t, files(seed, "a", 5)...)))
		return withDigest(ref, buildOf(t, ref).Digest)
	}
	first := build(1)
	dir, each, cache := filepath.Join(t.TempDir(), "overlay"), t.TempDir(), cacheDir(t)
	serve := func(image string, more ...string) *server {
		t.Helper()
		return serving(t, append([]string{image, "--listen", "unix:" + socket(t), "--cache", cache}, more...)...)
	}
	s := serve(ref, "--overlay", dir)
	qemuWrite(t, s.uri(), "write -P 0x11 32M 64k")
	want := device(t, s.uri())
	s.term()
	s = serve(ref, "--overlay-each", each)
	qemuWrite(t, s.as("~vm7"), "write -P 0x11 32M 64k")
	s.term()

	second := build(2)
	if first == second {
		t.Fatal("the tag has not moved")
	}
	s = serve(ref, "--overlay", dir)
	if got := s.ready.Exports[0].Image; got != first {
		t.Errorf("the base is %s, want %s", got, first)
	}
	if !s.said("the name means another image by now; the overlay's own base is served") {
		t.Errorf("it does not say so:\n%s", s.stderr.String())
	}
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", want, s.uri())
	s.term()

	s = serve(ref, "--overlay-each", each)
	if got := s.ready.Exports[0].Image; got != second {
		t.Errorf("the image is %s, want %s", got, second)
	}
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", want, s.as("~vm7"))
	qemuWrite(t, s.as("~vm8"), "write -P 0x22 32M 64k") // on the new one
	if !s.said("the name means another image by now; the overlay's own base is served") {
		t.Errorf("it does not say so:\n%s", s.stderr.String())
	}
	s.term()
	for name, want := range map[string]string{"vm7": first, "vm8": second} {
		if info, err := blockmap.ReadOverlay(blockmap.OS, filepath.Join(each, name)); err != nil || info.Image != want {
			t.Errorf("%s: %+v, %v; want %s", name, info, err, want)
		}
	}

	// The registry is not asked for a base that is known: the machine comes up without it.
	reg.stop()
	s = serve(ref, "--overlay", dir)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", want, s.uri())
	s.term()
	startRegistry(t, reg.addr, filepath.Dir(filepath.Dir(dir)), "") // empty

	other := layoutImage(t)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{other, "--overlay", dir}, other + " is another image: serve the former with this overlay, or the latter with another one"},
		{[]string{second, "--overlay", dir}, "is the block image " + second[strings.Index(second, "@")+1:]},
		{[]string{ref, "--overlay", dir, "--pin", second[strings.Index(second, "@")+1:]}, "is pinned to " + second[strings.Index(second, "@")+1:]},
		{[]string{ref, "--overlay-each", dir}, "is an overlay, and not a directory of overlays"},
		{[]string{other, "--overlay", each}, "and no overlay: use an empty directory"},
	} {
		s := launch(t, nil, append(c.args, "--listen", "unix:"+socket(t), "--cache", cache)...)
		if <-s.done; s.isReady() || !s.said(c.want) || strings.Contains(c.want, "another one") && !s.said(first) {
			t.Errorf("%q: want %q\n%s", c.args, c.want, s.stderr.String())
		}
	}
	s = serve(first, "--overlay", dir) // the base by its own name
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", want, s.uri())
	s.term()
}

// A trace has what was read of the image, and none of what clients have written.
func TestRecordBelowOverlay(t *testing.T) {
	need(t, "qemu-io")
	image := layoutImage(t)
	file := t.TempDir() + "/trace"
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", cacheDir(t), "--record", file, "--overlay", filepath.Join(t.TempDir(), "o"))
	qemuWrite(t, s.uri(), "write -P 0x11 32M 1M", "read -P 0x11 32M 1M", "read 0 64k", "write 4M 100", "read 4M 4k")
	if _, code := s.term(); code != exitOK {
		t.Fatalf("exit %d\n%s", code, s.stderr.String())
	}
	var sum struct {
		Bytes int64 `json:"bytes"`
	}
	out := must(t, "trace", "show", "--json", file)
	if err := json.Unmarshal([]byte(out), &sum); err != nil {
		t.Fatal(err)
	}
	// The rest of the block that was written in part is read, too.
	if sum.Bytes != 64<<10+4096 {
		t.Errorf("the trace has %d bytes: %s", sum.Bytes, out)
	}
}

// --overlay-size is ENOSPC for the writer, and nothing that was written is lost.
func TestOverlaySize(t *testing.T) {
	need(t, "qemu-io")
	image := layoutImage(t)
	dir, cache := filepath.Join(t.TempDir(), "overlay"), cacheDir(t)
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", dir, "--overlay-size", "1M")
	qemuWrite(t, s.uri(), "write -P 0x11 32M 1M")
	out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write -P 0x22 34M 64k", s.uri()).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "No space left on device") {
		t.Errorf("beyond the limit: %v\n%s", err, out)
	}
	qemuWrite(t, s.uri(), "read -P 0x11 32M 1M", "write -P 0x33 32M 64k", "flush", "discard 32M 512k", "write -P 0x44 40M 512k")
	if in := listed(t, cache, image).Overlay; in.Limit != 1<<20 || in.Data != 1<<20 {
		t.Errorf("%+v", in)
	}
	if out := must(t, "list", "--cache", cache); !strings.Contains(out, "1.0 MiB of 1.0 MiB") {
		t.Errorf("%s", out)
	}
	s.term()
	s = serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", dir, "--overlay-size", "2M")
	qemuWrite(t, s.uri(), "write -P 0x22 34M 64k", "read -P 0x44 40M 512k")
	s.term()
}
