package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/blockmap/flatten"
	"thaw/tracefile"
)

// nbdFile makes the default export of s a file, by nbdfuse.
func nbdFile(t testing.TB, s *server, readOnly bool) (path string, end func()) {
	t.Helper()
	need(t, "nbdfuse", "fusermount3")
	dir := t.TempDir()
	args := []string{dir, "--unix", strings.TrimPrefix(s.ready.Listen[0], "unix:")}
	if readOnly {
		args = append([]string{"-r"}, args...)
	}
	cmd := exec.Command("nbdfuse", args...)
	var stderr syncBuffer
	cmd.Stderr = &stderr
	if err := startWithUs(cmd); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	path = filepath.Join(dir, "nbd")
	until(t, "nbdfuse starts", func() bool { _, err := os.Stat(path); return err == nil || t.Context().Err() != nil })
	done := false
	end = func() {
		t.Helper()
		if done {
			return
		}
		done = true
		for i := 0; ; i++ {
			out, err := exec.Command("fusermount3", "-u", dir).CombinedOutput()
			if err == nil || strings.Contains(string(out), "not found in") || strings.Contains(string(out), "not mounted") {
				break
			}
			if i == 6000 {
				t.Errorf("fusermount3: %v: %s", err, out)
				cmd.Process.Kill()
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		<-ended
	}
	t.Cleanup(end)
	return path, end
}

// mountExport mounts the filesystem of the default export of s.
func mountExport(t testing.TB, s *server, readOnly bool) (dir string, end func()) {
	t.Helper()
	path, unfuse := nbdFile(t, s, readOnly)
	dir, unmount := blocktest.Mount(t, path, "ext4", readOnly)
	return dir, func() {
		t.Helper()
		unmount()
		unfuse()
	}
}

// mountLost is mountExport for a server that will be killed. lose takes away what is left
// of the mount.
func mountLost(t testing.TB, s *server) (dir string, lose func()) {
	t.Helper()
	path, _ := nbdFile(t, s, false)
	device, release := blocktest.Loop(t, path, false)
	dir = t.TempDir()
	if err := unix.Mount(device, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	lose = sync.OnceFunc(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
		release()
	})
	t.Cleanup(lose)
	return dir, lose
}

// logText are n bytes that compress as a log does.
func logText(n int) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "%d: request %d from 10.0.%d.%d took %d us\n", i, i*7919%10007, i%7, i%251, i*i%99991)
	}
	return b.Bytes()[:n]
}

// decoded is the JSON that a command prints in one line.
func decoded[T any](t testing.TB, out string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return v
}

func asRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a mount requires root")
	}
}

// A container image becomes a device, a kernel writes to it, and what it has written
// becomes an image, which is served, verified, and committed again.
func TestCommit(t *testing.T) {
	t.Parallel()
	asRoot(t)
	reg := startRegistry(t, "", t.TempDir(), "")
	source, image := reg.addr+"/team/app:v1", reg.addr+"/team/app:v1-changed"
	push(t, source, imageOf(t, layerOf(t, files(1, "base", 40)...), layerOf(t, append(files(2, "app", 20), file{name: "etc/"}, file{name: "etc/conf", data: logText(30_000)})...)))
	base := decoded[built](t, must(t, "build", "--json", "--size", "256M", source))
	overlay, cache := filepath.Join(t.TempDir(), "overlay"), cacheDir(t)
	serve := func(name string, more ...string) *server {
		return serving(t, append([]string{name, "--listen", "unix:" + socket(t), "--cache", cache}, more...)...)
	}
	s := serve(source, "--overlay", overlay, "--record", filepath.Join(cache, "start.trace"))
	dir, unmount := mountExport(t, s, false)
	added := logText(3 << 20)
	for _, err := range []error{
		os.WriteFile(dir+"/added", added, 0o644),
		os.WriteFile(dir+"/etc/conf", []byte("short"), 0o644),
		os.Remove(dir + "/base/1"),
		os.Rename(dir+"/base/2", dir+"/app/renamed"),
		os.Chmod(dir+"/base/3", 0o600),
		os.WriteFile(dir+"/zeros", make([]byte, 1<<20), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(dir + "/app/renamed")
	if err != nil {
		t.Fatal(err)
	}
	if out, _, code := thaw(t, "overlay", "rm", overlay); code != exitError || out != "" {
		t.Errorf("an overlay in use is removed: exit %d, %s", code, out)
	}
	if o := decoded[shownOverlay](t, must(t, "overlay", "inspect", "--json", overlay)); !o.InUse || o.Data == 0 {
		t.Errorf("%+v", o)
	}
	if _, stderr, code := thaw(t, "commit", overlay, image, "--cache", cacheDir(t)); code != exitError || !strings.Contains(stderr, "--live") {
		t.Errorf("an overlay in use is committed: exit %d, %s", code, stderr)
	}
	unmount()
	s.term()

	// What has changed.
	if o := decoded[shownOverlay](t, must(t, "overlay", "ls", "--json", filepath.Dir(overlay))); o.InUse || o.Overlay != overlay || o.Levels != 1 || !strings.HasSuffix(o.Image, base.Digest) {
		t.Errorf("%+v", o)
	}
	out := must(t, "overlay", "diff", overlay, "--cache", cache)
	for _, line := range []string{"A   3.0 MiB  /added\n", "A   1.0 MiB  /zeros\n", "/app/renamed <- /base/2\n", "M       5 B  /etc/conf\n", "m ", "  /base/3\n", "D ", "  /base/1\n"} {
		if !strings.Contains(out, line) {
			t.Errorf("overlay diff lacks %q:\n%s", line, out)
		}
	}
	if strings.Contains(out, "/base/4") {
		t.Errorf("overlay diff:\n%s", out)
	}
	lines := strings.Split(strings.TrimSpace(must(t, "overlay", "diff", "--json", "--exact", overlay, "--cache", cache)), "\n")
	goldenJSON(t, "overlay-diff-file", lines[0]+"\n", cache)
	sum := decoded[diffSum](t, lines[len(lines)-1])
	if sum.Type != "sum" || sum.Added != 2 || sum.Deleted != 1 || sum.Renamed != 1 || sum.Filesystem != "clean" || sum.Uses["data"] < 3<<20 || sum.Uses["journal"] == 0 || !sum.Exact {
		t.Errorf("%+v", sum)
	}

	// The source image is not replaced by accident.
	if _, stderr, code := thaw(t, "commit", overlay, source, "--cache", cache); code != exitUsage || !strings.Contains(stderr, "a tag of its own") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	// The image.
	c := decoded[committed](t, must(t, "commit", "--json", overlay, image, "--cache", cache))
	if c.Filesystem != "clean" || c.Copied != 0 || c.Uploaded >= c.Changed || c.Stored != sum.Stored || c.Content < 3<<20 || c.Base != reg.addr+"/team/app@"+base.Digest {
		t.Errorf("%+v, estimated %+v", c, sum)
	}
	t.Logf("%.3f bytes uploaded per changed byte: %+v", float64(c.Uploaded)/float64(c.Changed), c)
	must(t, "verify", image)
	in := decoded[inspected](t, must(t, "inspect", "--json", image))
	if in.BaseDigest != base.Digest || in.BaseName != c.Base || in.Overlays != c.Stored || in.Subject != base.Digest || in.Streams[len(in.Streams)-1].Kind != "overlay" {
		t.Errorf("%+v", in)
	}
	if out := must(t, "inspect", image); !strings.Contains(out, "base    "+c.Base+"\n") || !strings.Contains(out, "in overlays\n") {
		t.Errorf("inspect:\n%s", out)
	}
	// The source image is still what it was.
	s = serve(source)
	if got := s.ready.Exports[0].Digest; got != base.Digest {
		t.Errorf("the source image is served as %s, and was built as %s", got, base.Digest)
	}
	s.term()
	check := func(name string) {
		t.Helper()
		s := serving(t, name, "--listen", "unix:"+socket(t), "--cache", cacheDir(t))
		dir, unmount := mountExport(t, s, true)
		for path, want := range map[string][]byte{"added": added, "etc/conf": []byte("short"), "app/renamed": want, "zeros": make([]byte, 1<<20)} {
			if got, err := os.ReadFile(filepath.Join(dir, path)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %s has %d bytes: %v", name, path, len(got), err)
			}
		}
		if _, err := os.Stat(dir + "/base/1"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the deleted file: %v", name, err)
		}
		unmount()
		s.term()
	}
	check(image)

	// A trace of the base is one of the new image, as far as both have the content.
	carried(t, filepath.Join(cache, "start.trace"), source, image)

	// On top of it.
	second := filepath.Join(t.TempDir(), "second")
	s = serve(image, "--overlay", second)
	dir, unmount = mountExport(t, s, false)
	if err := os.WriteFile(dir+"/second", []byte("again"), 0o644); err != nil {
		t.Fatal(err)
	}
	unmount()
	s.term()
	elsewhere := reg.addr + "/team/other:v1"
	again := decoded[committed](t, must(t, "commit", "--json", second, elsewhere, "--cache", cache))
	if again.Mounted != len(in.Streams) || again.Copied != 0 {
		t.Errorf("the other repository has mounted %d of %d streams, %d bytes were copied", again.Mounted, len(in.Streams), again.Copied)
	}
	must(t, "verify", elsewhere)
	check(elsewhere)
	// Foreign tools copy it, and another registry gets a copy of what it lacks.
	need(t, "skopeo")
	tool(t, "skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false", "docker://"+elsewhere, "docker://"+reg.addr+"/copies/app:v1")
	must(t, "verify", reg.addr+"/copies/app:v1")
	other := startRegistry(t, "", t.TempDir(), "")
	away := decoded[committed](t, must(t, "commit", "--json", second, other.addr+"/team/app:v1", "--cache", cache))
	if away.Mounted != 0 || away.Copied == 0 || away.Digest != again.Digest {
		t.Errorf("%+v", away)
	}
	must(t, "verify", other.addr+"/team/app:v1")

	out = must(t, "overlay", "rm", overlay)
	if _, err := os.Stat(overlay); !errors.Is(err, os.ErrNotExist) || !strings.HasPrefix(out, "removed "+overlay) {
		t.Errorf("%v, %s", err, out)
	}
	for _, what := range []string{cache, filepath.Dir(overlay), overlay} {
		if _, stderr, code := thaw(t, "overlay", "rm", what); code != exitError || !strings.Contains(stderr, "not the directory of an overlay") {
			t.Errorf("removing %s: exit %d, %s", what, code, stderr)
		}
	}
}

// carried checks that a trace of one image, translated to another, has what both have.
func carried(t testing.TB, path, from, to string) {
	t.Helper()
	find, err := (&app{stderr: new(syncBuffer), logFormat: "text", platform: defaultPlatform}).access(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer find.Close()
	var index [2]*blockmap.Index
	for i, name := range []string{from, to} {
		b, err := find.Find(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		index[i] = b.Index
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	trace, err := tracefile.Read(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	translated, c, err := tracefile.Translate(trace, index[0], index[1])
	if err != nil || len(translated.Touches) == 0 || c.SharedBytes == 0 {
		t.Errorf("%d touches of %d, %v, %v", len(translated.Touches), len(trace.Touches), c, err)
	}
}

// holdPushes has pushes to p wait until release is called. Each is told to holding.
func holdPushes(p *proxy) (holding <-chan struct{}, release func()) {
	seen, held := make(chan struct{}, 64), make(chan struct{})
	p.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPatch && r.Method != http.MethodPut {
			return true
		}
		select {
		case seen <- struct{}{}:
		default:
		}
		select {
		case <-held:
		case <-r.Context().Done():
		}
		return false
	})
	return seen, func() {
		close(held)
		p.set(nil)
	}
}

// A filesystem that is mounted is dirty. It is committed while it is in use, with its
// journal replayed or as it is, and goes on as if nothing had happened.
func TestCommitLive(t *testing.T) {
	t.Parallel()
	asRoot(t)
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	source := p.host() + "/team/app:v1"
	push(t, source, imageOf(t, layerOf(t, files(1, "base", 20)...)))
	must(t, "build", "--size", "256M", source)
	overlay, cache := filepath.Join(t.TempDir(), "overlay"), cacheDir(t)
	s := serving(t, source, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", overlay)
	dir, lose := mountLost(t, s)
	flush := func() {
		f, err := os.Open(dir)
		if err == nil {
			err = errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	first := logText(2 << 20)
	if err := os.WriteFile(dir+"/first", first, 0o644); err != nil {
		t.Fatal(err)
	}
	deleted, err := os.Create(dir + "/deleted") // and open: an orphan
	if err != nil {
		t.Fatal(err)
	}
	if _, err := deleted.Write(first[:100_000]); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(dir + "/deleted"); err != nil {
		t.Fatal(err)
	}
	flush()
	wait := func(c <-chan struct{}) {
		t.Helper()
		select {
		case <-c:
		case <-time.After(atMost):
			t.Fatalf("nothing is pushed:\n%s", s.stderr.String())
		}
	}
	live := func(tag string, more ...string) (string, string, int) {
		return thaw(t, append([]string{"commit", "--live", "--json", "--cache", cache, overlay, p.host() + "/team/app:" + tag}, more...)...)
	}
	if _, stderr, code := live("refused"); code != exitError || !strings.Contains(stderr, "--replay") || !strings.Contains(stderr, "the filesystem is dirty") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	for tag, flag := range map[string]string{"replayed": "--replay", "as-it-is": "--crash-consistent"} {
		out, stderr, code := live(tag, flag)
		if code != exitOK {
			t.Fatalf("%s: exit %d, %s", flag, code, stderr)
		}
		c := decoded[committed](t, out)
		if want := map[string]string{"replayed": "replayed", "as-it-is": "dirty"}[tag]; c.Filesystem != want || (c.Replayed > 0) != (tag == "replayed") {
			t.Errorf("%+v", c)
		}
		if err := os.WriteFile(dir+"/after "+tag, first, 0o644); err != nil {
			t.Fatal(err)
		}
		must(t, "verify", p.host()+"/team/app:"+tag)
		other := serving(t, p.host()+"/team/app:"+tag, "--listen", "unix:"+socket(t), "--cache", cacheDir(t), "--ephemeral")
		// A mount to write recovers what is to recover, and e2fsck has nothing to say then.
		path, unfuse := nbdFile(t, other, false)
		mounted, end := blocktest.Mount(t, path, "ext4", false)
		if got, err := os.ReadFile(mounted + "/first"); err != nil || !bytes.Equal(got, first) {
			t.Errorf("%s: %d bytes, %v", tag, len(got), err)
		}
		end()
		if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
			t.Errorf("%s: e2fsck: %v\n%s", tag, err, out)
		}
		unfuse()
		other.kill()
	}
	// One at a time; and what is cut off leaves one overlay, which goes on.
	holding, release := holdPushes(p)
	client := asProgram("commit", "--live", "--cache", cache, overlay, p.host()+"/team/app:cut", "--replay")
	var stderr syncBuffer
	client.Stderr = &stderr
	if err := startWithUs(client); err != nil {
		t.Fatal(err)
	}
	wait(holding)
	if _, stderr, code := live("second", "--replay"); code != exitError || !strings.Contains(stderr, "another commit") {
		t.Errorf("a second commit: exit %d, %s", code, stderr)
	}
	if d := listed(t, cache, source); d.Commit == nil || d.Commit.Changed == 0 || !strings.HasSuffix(d.Commit.Target, ":cut") {
		t.Errorf("%+v", d.Commit)
	}
	if o := decoded[shownOverlay](t, must(t, "overlay", "inspect", "--json", overlay)); o.Levels != 2 {
		t.Errorf("%+v", o)
	}
	if err := os.WriteFile(dir+"/meanwhile", first[:5000], 0o644); err != nil {
		t.Fatal(err)
	}
	flush()
	if err := client.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := client.Wait(); err == nil || !strings.Contains(stderr.String(), "interrupted") {
		t.Errorf("%v, %s", err, stderr.String())
	}
	until(t, "the levels are merged", func() bool {
		o := decoded[shownOverlay](t, must(t, "overlay", "inspect", "--json", overlay))
		return o.Levels == 1 && listed(t, cache, source).Commit == nil
	})
	release()
	if raw, err := http.Get(p.URL + "/v2/team/app/manifests/cut"); err != nil || raw.StatusCode != 404 {
		t.Errorf("a commit that was cut off has an image: %v", err)
	}

	// The server is told to stop in the middle of a commit, and does. The next one merges.
	holding, release = holdPushes(p)
	stopped := make(chan string, 1)
	go func() {
		_, stderr, _ := live("stopped", "--replay")
		stopped <- stderr
	}()
	wait(holding)
	deleted.Close()
	lose()
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d:\n%s", code, s.stderr.String())
	}
	if said := <-stopped; !strings.Contains(said, "thaw: commit") {
		t.Errorf("the client says %s", said)
	}
	release()
	s = serving(t, source, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", overlay)
	dir, lose = mountLost(t, s)

	// The server is killed in the middle of a commit. The overlay opens, and has it all.
	holding, release = holdPushes(p)
	killed := make(chan int, 1)
	go func() {
		_, _, code := live("killed", "--replay")
		killed <- code
	}()
	wait(holding)
	if err := os.WriteFile(dir+"/last", first[:7000], 0o644); err != nil {
		t.Fatal(err)
	}
	flush()
	s.kill()
	if code := <-killed; code != exitError {
		t.Errorf("exit %d of a commit whose server was killed", code)
	}
	release()
	lose()
	if _, stderr, code := thaw(t, "commit", overlay, p.host()+"/team/app:dirty", "--cache", cache); code != exitError || !strings.Contains(stderr, "--replay") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	c := decoded[committed](t, must(t, "commit", "--json", "--replay", overlay, p.host()+"/team/app:after", "--cache", cache))
	if c.Filesystem != "replayed" {
		t.Errorf("%+v", c)
	}
	must(t, "verify", p.host()+"/team/app:after")
	other := serving(t, p.host()+"/team/app:after", "--listen", "unix:"+socket(t), "--cache", cacheDir(t))
	dir, unmount := mountExport(t, other, true)
	for name, n := range map[string]int{"first": len(first), "meanwhile": 5000, "last": 7000} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, first[:n]) {
			t.Errorf("%s has %d bytes, %v", name, len(got), err)
		}
	}
	unmount()
	other.kill()
}

// Content that is no ext4 is committed as it is.
func TestCommitOfOtherContent(t *testing.T) {
	need(t, "qemu-io")
	image := layoutImage(t)
	overlay, cache := filepath.Join(t.TempDir(), "overlay"), cacheDir(t)
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", overlay)
	qemuWrite(t, s.uri(), "write -P 0x11 0 64k", "write -P 0x22 1M 2M", "write -z 4M 1M", "flush")
	want := device(t, s.uri())
	s.term()
	dst := "oci:" + t.TempDir() + "/changed:v1"
	out, stderr, code := thaw(t, "commit", overlay, dst, "--cache", cache)
	if code != exitOK || !strings.Contains(stderr, "no ext4") || !strings.Contains(out, "filesystem  none") {
		t.Fatalf("exit %d, %s\n%s", code, out, stderr)
	}
	if _, stderr, code := thaw(t, "overlay", "diff", overlay, "--cache", cache); code != exitOK || !strings.Contains(stderr, "no ext4") || !strings.Contains(stderr, "a commit would store") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	s = serving(t, dst, "--listen", "unix:"+socket(t), "--cache", cacheDir(t))
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", want, s.uri())
	s.term()
	for _, wrong := range [][]string{
		{"commit", overlay, "oci:" + t.TempDir()}, {"commit", overlay, "oci-archive:x.tar:v1"}, {"commit", overlay, "registry.example/app@sha256:" + strings.Repeat("a", 64)},
		{"commit", overlay, dst, "--replay", "--crash-consistent"}, {"commit", overlay, dst, "--level", "0"}, {"commit", overlay},
	} {
		if _, stderr, code := thaw(t, wrong...); code != exitUsage {
			t.Errorf("%q: exit %d, %s", wrong, code, stderr)
		}
	}
	for image, want := range map[string]string{
		"oci:" + dst: "names no image by digest", strings.Repeat("a", 300): "names no image by digest", "registry.example/app@sha256:" + strings.Repeat("b", 64): "names no image by digest",
	} {
		bad := filepath.Join(t.TempDir(), "bad")
		o, err := blockmap.OpenOverlay(bad, blocktest.NewMemory(1<<20), blockmap.OverlayOptions{Image: image, Digest: blockmap.Digest{1}})
		if err == nil {
			err = o.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, stderr, code := thaw(t, "commit", bad, dst, "--cache", cache); code != exitError || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit %d, %s", image, code, stderr)
		}
	}
	if _, stderr, code := thaw(t, "commit", cache, dst); code != exitError || !strings.Contains(stderr, "not the directory of an overlay") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	if _, stderr, code := thaw(t, "commit", "--live", overlay, dst, "--cache", cache); code != exitError || !strings.Contains(stderr, "no server uses the cache") {
		t.Errorf("exit %d, %s", code, stderr)
	}
}

// A committed image whose manifest or index says what is not so is refused, or harmless.
func TestHostileCommittedImages(t *testing.T) {
	need(t, "qemu-io")
	image := layoutImage(t)
	overlay, cache, dir := filepath.Join(t.TempDir(), "overlay"), cacheDir(t), t.TempDir()
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", overlay)
	qemuWrite(t, s.uri(), "write -P 0x22 20M 1M", "flush")
	s.term()
	must(t, "commit", overlay, "oci:"+dir+"/good:v1", "--cache", cache)
	find, err := (&app{stderr: new(syncBuffer), logFormat: "text", platform: defaultPlatform}).access(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer find.Close()
	good, err := find.Find(t.Context(), "oci:"+dir+"/good:v1")
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		plant func(m *v1.Manifest, ix *blockmap.Index)
		want  string // in the error of verify; "": it is harmless
	}{
		"a base that is none": {func(m *v1.Manifest, _ *blockmap.Index) {
			m.Annotations[flatten.AnnotationBaseName], m.Annotations[flatten.AnnotationBaseDigest] = "\x1b[2Jnothing", "sha256:wrong"
		}, ""},
		"an overlay run beyond its stream": {func(_ *v1.Manifest, ix *blockmap.Index) {
			for i := range ix.Runs {
				if r := &ix.Runs[i]; int(r.Stream) == len(ix.Streams)-1 {
					r.Block += 1 << 20
				}
			}
		}, "blocks"},
		"an overlay run beyond the device": {func(_ *v1.Manifest, ix *blockmap.Index) {
			for i := range ix.Runs {
				if r := &ix.Runs[i]; int(r.Stream) == len(ix.Streams)-1 {
					r.Device = ix.Blocks - 1
				}
			}
		}, "device"},
		"an overlay that is a layer": {func(m *v1.Manifest, _ *blockmap.Index) {
			m.Layers[len(m.Layers)-1].Annotations[flatten.AnnotationRole] = "layer"
		}, "diff ID"},
		"another subject": {func(m *v1.Manifest, _ *blockmap.Index) { m.Subject.Digest.Hex = strings.Repeat("0", 64) }, ""},
	} {
		var m v1.Manifest
		if err := json.Unmarshal(good.Raw, &m); err != nil {
			t.Fatal(err)
		}
		ix, err := blockmap.DecodeIndex(good.Index.Encode())
		if err != nil {
			t.Fatal(err)
		}
		c.plant(&m, ix)
		repo := good.Repo
		d, err := repo.PushBytes(t.Context(), ix.Encode(), flatten.MediaTypeIndex)
		if err != nil {
			t.Fatal(err)
		}
		m.Layers[0].Digest, m.Layers[0].Size = d.Digest, d.Size
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := repo.PushManifest(t.Context(), raw, m.MediaType, "bad"); err != nil {
			t.Fatal(err)
		}
		_, stderr, code := thaw(t, "verify", "oci:"+dir+"/good:bad")
		if c.want == "" && code != exitOK || c.want != "" && (code != exitError || !strings.Contains(stderr, c.want)) {
			t.Errorf("%s: exit %d, %s", name, code, stderr)
		}
		if out, _, _ := thaw(t, "inspect", "oci:"+dir+"/good:bad"); strings.Contains(out, "\x1b") {
			t.Errorf("%s: inspect prints %q", name, out)
		}
	}
}
