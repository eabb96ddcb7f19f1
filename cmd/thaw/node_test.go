package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"thaw/cmd/thaw/internal/host"
)

// needNodes skips a test where nodes cannot be made.
func needNodes(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("nodes require root")
	}
	for _, path := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(path); err != nil {
			t.Skip(err)
		}
	}
	need(t, "docker-registry", "ldd")
}

// debian is an image with a shell and some programs of this Debian, and what they are linked with, and
// larger files.
func debian(t testing.TB) v1.Image {
	t.Helper()
	at := make(map[string]bool)
	var all []file
	add := func(path string, exec bool) {
		if at[path] {
			return
		}
		at[path] = true
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		mode := int64(0o644)
		if exec {
			mode = 0o755
		}
		for dir := filepath.Dir(path); dir != "/" && !at[dir]; dir = filepath.Dir(dir) {
			at[dir] = true
			all = append(all, file{name: strings.TrimPrefix(dir, "/") + "/"})
		}
		all = append(all, file{name: strings.TrimPrefix(path, "/"), data: data, mode: mode})
	}
	for _, name := range []string{"sh", "cat", "ls", "sha256sum"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !at["bin/"+name] {
			all = append(all, file{name: "bin/" + name, data: data, mode: 0o755})
		}
		for _, lib := range regexp.MustCompile(`/\S+`).FindAllString(tool(t, "ldd", path), -1) {
			if strings.HasPrefix(lib, "/") && !strings.HasSuffix(lib, ":") {
				add(lib, true)
			}
		}
	}
	all = append([]file{{name: "bin/"}, {name: "data/"}}, all...)
	all = append(all, file{name: "etc/"}, file{name: "etc/motd", data: []byte("thawed\n")})
	for i := range 24 {
		all = append(all, file{name: fmt.Sprintf("data/%d", i), data: random(uint64(i), 1<<20)})
	}
	return imageOf(t, layerOf(t, all...))
}

// nodeBed is a registry with an image, a cache directory, and a mount point. The test ends
// with nothing left of its nodes.
type nodeBed struct {
	t     testing.TB
	proxy *proxy
	image string
	cache string
	dir   string
}

func newNodeBed(t testing.TB) *nodeBed {
	t.Helper()
	needNodes(t)
	t.Setenv(asThaw, "1") // for the servers that commands start
	nodeImage.once.Do(func() { nodeImage.make(t) })
	p := startProxy(t, startRegistry(t, "", nodeImage.dir, "").addr)
	b := &nodeBed{t: t, proxy: p, image: p.host() + "/team/app:v1", cache: cacheDir(t), dir: t.TempDir()}
	t.Cleanup(b.clean)
	return b
}

// nodeImage is a registry's storage with the image of all nodeBeds. TestMain removes it.
var nodeImage nodeStorage

type nodeStorage struct {
	once sync.Once
	dir  string
}

func (s *nodeStorage) make(t testing.TB) {
	t.Helper()
	var err error
	if s.dir, err = os.MkdirTemp("", "thaw"); err != nil {
		t.Fatal(err)
	}
	r := startRegistry(t, "", s.dir, "")
	push(t, r.addr+"/team/app:v1", debian(t))
	must(t, "build", "--size", "128M", r.addr+"/team/app:v1")
	r.stop()
}

// clean removes all that a failed test has left, and fails the test if a good one has left
// something.
func (b *nodeBed) clean() {
	for range 20 {
		m, ok, err := mountedAt(b.dir)
		if err != nil || !ok {
			break
		}
		b.t.Errorf("%s is still mounted at %s", m.source, b.dir)
		unix.Unmount(b.dir, unix.MNT_DETACH)
	}
	for end := time.Now().Add(atMost); ; time.Sleep(10 * time.Millisecond) {
		left := b.left()
		if left == "" {
			return
		}
		if time.Now().After(end) {
			b.t.Errorf("left behind: %s\n%s", left, b.log())
			for _, pid := range b.servers() {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			for _, n := range kept(b.t, b.cache) {
				host.RemoveKept(context.Background(), b.cache, n)
			}
			return
		}
	}
}

// left is what there is of the nodes of b.
func (b *nodeBed) left() string {
	var left []string
	for _, pid := range b.servers() {
		left = append(left, fmt.Sprintf("process %d", pid))
	}
	for _, name := range []string{"control.sock", "state.json"} {
		if _, err := os.Lstat(filepath.Join(b.cache, name)); err == nil {
			left = append(left, name)
		}
	}
	if e, _ := os.ReadDir(filepath.Join(b.cache, "ephemeral")); len(e) > 0 {
		left = append(left, "an ephemeral overlay")
	}
	return strings.Join(left, ", ")
}

// servers are the processes that serve the cache of b.
func (b *nodeBed) servers() (pids []int) {
	b.t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		b.t.Fatal(err)
	}
	for _, path := range all {
		text, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(text, []byte("\x00--cache\x00"+b.cache+"\x00")) || !bytes.Contains(text, []byte("\x00serve\x00")) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (b *nodeBed) log() string {
	text, _ := os.ReadFile(filepath.Join(b.cache, serverLog))
	return string(text)
}

// run runs thaw with the cache of b.
func (b *nodeBed) run(args ...string) (stdout, stderr string, code int) {
	b.t.Helper()
	return thaw(b.t, append(args, "--cache", b.cache)...)
}

// must runs a command that is to succeed.
func (b *nodeBed) must(args ...string) string {
	b.t.Helper()
	out, errOut, code := b.run(args...)
	if code != exitOK {
		b.t.Fatalf("thaw %s: exit %d\n%s\nserver:\n%s", strings.Join(args, " "), code, errOut, b.log())
	}
	return out
}

// fails runs a command that is to fail and to say all these words.
func (b *nodeBed) fails(code int, args []string, words ...string) {
	b.t.Helper()
	_, errOut, got := b.run(args...)
	if got != code {
		b.t.Errorf("thaw %q: exit %d instead of %d", args, got, code)
	}
	for _, w := range words {
		if !strings.Contains(errOut, w) {
			b.t.Errorf("thaw %q does not say %q:\n%s", args, w, errOut)
		}
	}
}

// mount mounts the image of b at its directory.
func (b *nodeBed) mount(more ...string) host.NodeInfo {
	b.t.Helper()
	var r nodeResult
	out := b.must(append([]string{"mount", "--json", b.image, b.dir}, more...)...)
	if err := json.Unmarshal([]byte(out), &r); err != nil || r.Type != "mounted" {
		b.t.Fatalf("%s: %v", out, err)
	}
	return r.NodeInfo
}

// inside runs a shell in the mounted image.
func (b *nodeBed) inside(script string) string {
	b.t.Helper()
	return tool(b.t, "chroot", b.dir, "/bin/sh", "-c", script)
}

// kept are the nodes in the state file of a cache directory.
func kept(t testing.TB, cache string) (paths []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(cache, "state.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var s struct {
		Nodes []struct {
			Node struct {
				Path string `json:"path"`
			} `json:"node"`
		} `json:"nodes"`
	}
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range s.Nodes {
		paths = append(paths, n.Node.Path)
	}
	return paths
}

// An image is mounted without a server, a program runs from it, and nothing is left when it
// is unmounted: no mount, no node, no process, no socket.
func TestMount(t *testing.T) {
	b := newNodeBed(t)
	n := b.mount()
	if n.Writable || n.Mount != b.dir || n.State != host.NodeAttached || n.Driver == "" || n.Why == "" {
		t.Errorf("%+v", n)
	}
	if got := b.inside("cat /etc/motd && ls /data && sha256sum /data/7"); !strings.Contains(got, "thawed") || !strings.Contains(got, sha(random(7, 1<<20))) {
		t.Errorf("the program says %s", got)
	}
	if fetched := b.proxy.fetched(); fetched == 0 || fetched > 24<<20 {
		t.Errorf("fetched %d bytes", fetched)
	}
	if err := os.WriteFile(filepath.Join(b.dir, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to a read-only mount: %v", err)
	}
	if ahead, err := os.ReadFile("/sys/block/" + filepath.Base(n.Node) + "/queue/read_ahead_kb"); err != nil || strings.TrimSpace(string(ahead)) != "128" {
		t.Errorf("readahead %s, %v", ahead, err)
	}
	if out := b.must("list"); !regexp.MustCompile(`(?m)^` + n.Node + `\s+` + b.image + `\s+` + string(n.Driver) + `\s+read-only\s+attached\s+` + b.dir + `$`).MatchString(out) {
		t.Errorf("thaw list:\n%s", out)
	}
	// The same again is no error, and another image is one.
	if again := b.mount(); again.Node != n.Node {
		t.Errorf("%s, and again %s", n.Node, again.Node)
	}
	b.fails(exitError, []string{"mount", b.image, b.dir, "--ephemeral"}, "is mounted at "+b.dir+" already", "thaw umount")
	b.fails(exitError, []string{"detach", n.Node}, "it is mounted", "unmount it first")

	busy, err := os.Open(filepath.Join(b.dir, "etc/motd"))
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	b.fails(exitError, []string{"umount", b.dir}, "programs use files in it", "fuser -vm", "--lazy")
	busy.Close()
	if out := b.must("umount", "--json", b.dir); !strings.Contains(out, `"detached":true`) {
		t.Errorf("thaw umount: %s", out)
	}
	if _, err := os.ReadFile("/sys/block/" + filepath.Base(n.Node) + "/loop/backing_file"); err == nil && n.Driver == "fuse" {
		// Another test may have the number by now.
		for _, p := range kept(t, b.cache) {
			t.Errorf("%s is still there", p)
		}
	}
	b.fails(exitError, []string{"umount", b.dir}, "nothing is mounted at "+b.dir)
}

func sha(p []byte) string { return fmt.Sprintf("%x", sha256.Sum256(p)) }

// What is written to a mount with an overlay is there when it is mounted again, and the image
// is as it was. An ephemeral mount forgets.
func TestMountOverlay(t *testing.T) {
	b := newNodeBed(t)
	overlay := filepath.Join(t.TempDir(), "new", "overlay")
	n := b.mount("--overlay", overlay)
	if !n.Writable || n.Overlay == nil || n.Overlay.Directory != overlay {
		t.Errorf("%+v", n)
	}
	b.inside("echo changed >/etc/motd && cat /data/1 /data/2 >/data/both")
	// Nobody else gets the overlay.
	other := t.TempDir()
	b.fails(exitError, []string{"mount", b.image, other, "--overlay", overlay}, "overlay "+overlay+" is in use by "+n.Node)
	if _, errOut, code := thaw(t, "serve", b.image, "--overlay", overlay, "--cache", cacheDir(t), "--listen", "unix:"+socket(t)); code == exitOK || !strings.Contains(errOut, "in use by another process") {
		t.Errorf("another server: exit %d, %s", code, errOut)
	}
	b.must("umount", b.dir)

	// Another process, after the server has ended.
	until(t, "the server ends", func() bool { return len(b.servers()) == 0 })
	b.mount("--overlay", overlay)
	if got := b.inside("cat /etc/motd; sha256sum </data/both"); !strings.Contains(got, "changed") || !strings.Contains(got, sha(append(random(1, 1<<20), random(2, 1<<20)...))) {
		t.Errorf("mounted again: %s", got)
	}
	b.must("umount", b.dir)
	// It can be committed, served and mounted elsewhere as soon as it is unmounted.
	b.mount("--ephemeral", "--overlay-size", "8M")
	if got := b.inside("cat /etc/motd; echo forgotten >/etc/motd; cat /etc/motd"); got != "thawed\nforgotten\n" {
		t.Errorf("ephemeral: %q", got)
	}
	if e, err := os.ReadDir(filepath.Join(b.cache, "ephemeral")); err != nil || len(e) != 1 {
		t.Errorf("%v, %v", e, err)
	}
	b.must("umount", b.dir)
	if e, err := os.ReadDir(filepath.Join(b.cache, "ephemeral")); err != nil || len(e) != 0 {
		t.Errorf("left of an ephemeral mount: %v, %v", e, err)
	}
	b.mount("--ephemeral")
	if got := b.inside("cat /etc/motd"); got != "thawed\n" {
		t.Errorf("ephemeral, again: %q", got)
	}
	b.must("umount", b.dir)
}

// Two mounts of an image share one server and what it has fetched, and the server lives as
// long as one of them, however it is unmounted.
func TestMountsShare(t *testing.T) {
	b := newNodeBed(t)
	other := t.TempDir()
	n := b.mount()
	b.inside("cat /data/* | sha256sum")
	all := b.proxy.fetched()
	two := b.must("mount", b.image, other, "--ephemeral")
	t.Cleanup(func() { unix.Unmount(other, unix.MNT_DETACH) })
	if !regexp.MustCompile(`^/dev/\S+ on ` + other + `, writable\n$`).MatchString(two) {
		t.Errorf("thaw mount says %q", two)
	}
	tool(t, "chroot", other, "/bin/sh", "-c", "cat /data/* | sha256sum")
	if again := b.proxy.fetched() - all; again > 1<<20 {
		t.Errorf("the second mount has fetched %d bytes, the first %d", again, all)
	}
	if s := b.servers(); len(s) != 1 {
		t.Errorf("%d servers", len(s))
	}
	// By another program: the server sees it.
	if err := unix.Unmount(b.dir, 0); err != nil {
		t.Fatal(err)
	}
	until(t, "the node is detached", func() bool { return len(kept(t, b.cache)) == 1 })
	if s := b.servers(); len(s) != 1 {
		t.Errorf("%d servers", len(s))
	}
	// Lazily: its node goes with the last file.
	f, err := os.Open(filepath.Join(other, "data/3"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if out := b.must("umount", "--lazy", "--json", other); !strings.Contains(out, `"detached":false`) {
		t.Errorf("thaw umount --lazy: %s", out)
	}
	if _, err := f.ReadAt(make([]byte, 4096), 1<<19); err != nil {
		t.Errorf("a file of a lazily unmounted mount: %v", err)
	}
	if len(kept(t, b.cache)) != 1 {
		t.Error("the node of an open file is gone")
	}
	f.Close()
	until(t, "the server ends", func() bool { return len(b.servers()) == 0 })
	_ = n
}

// A node stays until it is detached, with its server.
func TestAttach(t *testing.T) {
	b := newNodeBed(t)
	node := strings.TrimSpace(b.must("attach", b.image))
	if st, err := os.Stat(node); err != nil || st.Mode()&os.ModeDevice == 0 {
		t.Fatalf("%q: %v", node, err)
	}
	f, err := os.Open(node)
	if err != nil {
		t.Fatal(err)
	}
	super := make([]byte, 2048)
	if _, err := f.ReadAt(super, 0); err != nil || super[1024+0x38] != 0x53 {
		t.Errorf("the superblock: %v", err)
	}
	f.Close()
	if err := unix.Mount(node, b.dir, "ext4", unix.MS_RDONLY, "noload"); err != nil {
		t.Fatal(err)
	}
	b.fails(exitError, []string{"detach", node}, "it is mounted")
	if err := unix.Unmount(b.dir, 0); err != nil {
		t.Fatal(err)
	}
	// It is not a node of thaw mount: it stays although it was mounted. The server has looked
	// at it when it has detached a node that was unmounted later.
	b.mount()
	if err := unix.Unmount(b.dir, 0); err != nil {
		t.Fatal(err)
	}
	until(t, "the other node is detached", func() bool { return len(kept(t, b.cache)) == 1 })
	if got := kept(t, b.cache); got[0] != node {
		t.Errorf("nodes: %v", got)
	}
	if out := b.must("detach", "--json", filepath.Base(node)); out != fmt.Sprintf("{\"type\":\"detached\",\"node\":%q}\n", node) {
		t.Errorf("thaw detach: %s", out)
	}
	until(t, "the server ends", func() bool { return len(b.servers()) == 0 })
	b.fails(exitError, []string{"detach", node}, "no server uses the cache", node)
}

// killServer kills the server of b, and returns when it is gone.
func (b *nodeBed) killServer() {
	b.t.Helper()
	pids := b.servers()
	if len(pids) != 1 {
		b.t.Fatalf("%d servers", len(pids))
	}
	if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
		b.t.Fatal(err)
	}
	until(b.t, "the server is gone", func() bool { return len(b.servers()) == 0 })
}

// failsSoon fails unless a read of a file that was not read before fails with EIO.
func (b *nodeBed) failsSoon(name string) {
	b.t.Helper()
	got := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(filepath.Join(b.dir, name))
		got <- err
	}()
	select {
	case err := <-got:
		if !errors.Is(err, unix.EIO) {
			b.t.Errorf("read after the server was killed: %v", err)
		}
	case <-time.After(atMost):
		b.t.Error("a read after the server was killed waits")
	}
}

// The server is killed under a read-only mount: reads fail at once, and thaw mount has the
// image there again, although a program still has a file of the dead mount open.
func TestMountHealsReadOnly(t *testing.T) {
	b := newNodeBed(t)
	b.mount("--driver", "fuse")
	open, err := os.Open(filepath.Join(b.dir, "data/5"))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	b.killServer()
	b.failsSoon("data/4")
	healed := b.mount("--driver", "fuse")
	if healed.State != host.NodeAttached {
		t.Errorf("%+v", healed)
	}
	if got := b.inside("sha256sum </data/4"); !strings.Contains(got, sha(random(4, 1<<20))) {
		t.Errorf("after the recovery: %s", got)
	}
	if _, err := open.ReadAt(make([]byte, 4096), 512<<10); !errors.Is(err, unix.EIO) {
		t.Errorf("a file of the dead mount: %v", err)
	}
	open.Close()
	until(t, "what is left of the dead node is removed", func() bool { k := kept(t, b.cache); return len(k) == 1 && k[0] == healed.Node })
	b.must("umount", b.dir)
}

// The server is killed while nobody has mounted its node, but a program has it open: the next
// server goes on serving it, and the program goes on reading.
func TestAttachGoesOn(t *testing.T) {
	b := newNodeBed(t)
	node := strings.TrimSpace(b.must("attach", b.image, "--driver", "fuse"))
	f, err := os.Open(node)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 1<<20)
	b.killServer()
	if _, err := f.ReadAt(p, 16<<20); !errors.Is(err, unix.EIO) {
		t.Errorf("read after the server was killed: %v", err)
	}
	other := strings.TrimSpace(b.must("attach", b.image)) // starts a server
	until(t, "the node is recovered", func() bool { return strings.Count(b.must("list"), " attached ") == 2 })
	if _, err := f.ReadAt(p, 16<<20); err != nil {
		t.Errorf("read after the recovery: %v", err)
	}
	f.Close()
	b.must("detach", node)
	b.must("detach", other)
}

// The server is killed under a writable mount: thaw mount mounts it anew, and all that was
// flushed is there, although a program still has a file of the dead mount open.
func TestMountHealsWritable(t *testing.T) {
	b := newNodeBed(t)
	overlay := t.TempDir()
	more := []string{"--overlay", overlay, "--driver", "fuse"}
	b.mount(more...)
	content := random(99, 3<<20)
	path := filepath.Join(b.dir, "data/new")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	b.killServer()
	b.failsSoon("data/4")
	// The overlay is not in use any more, and the dead mount is in the way of nothing else.
	b.fails(exitError, []string{"list"}, "no server uses the cache", "1 node", "thaw mount "+b.image+" "+b.dir)
	n := b.mount(more...)
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes of %d are there: %v", len(got), len(content), err)
	}
	if out := tool(t, "sh", "-c", "grep -c ' "+b.dir+" ' /proc/self/mountinfo"); strings.TrimSpace(out) != "1" {
		t.Errorf("%s mounts", out)
	}
	if _, err := f.Write([]byte("x")); err == nil {
		if err = f.Sync(); err == nil {
			t.Error("a file of the dead mount takes writes")
		}
	}
	f.Close()
	until(t, "what is left of the dead node is removed", func() bool { k := kept(t, b.cache); return len(k) == 1 && k[0] == n.Node })
	b.inside("echo more >>/etc/motd")
	b.must("umount", b.dir)
	// The filesystem is good.
	tool(t, "e2fsck", "-fn", overlayImage(t, b, overlay))
}

// overlayImage copies a device with an overlay to a file.
func overlayImage(t testing.TB, b *nodeBed, overlay string) string {
	t.Helper()
	node := strings.TrimSpace(b.must("attach", b.image, "--overlay", overlay))
	path := filepath.Join(t.TempDir(), "device")
	tool(t, "cp", "--sparse=always", node, path)
	b.must("detach", node)
	return path
}

// The server of a mount is killed, and nobody starts another one: umount and detach remove
// what is left.
func TestUmountWithoutServer(t *testing.T) {
	b := newNodeBed(t)
	n := b.mount("--driver", "fuse", "--ephemeral")
	node := strings.TrimSpace(b.must("attach", b.image, "--driver", "fuse"))
	file := fmt.Sprintf("/thaw-%d", b.servers()[0]) // of its loop devices
	if name, err := os.ReadFile("/sys/block/" + filepath.Base(node) + "/loop/backing_file"); err != nil || !strings.HasPrefix(string(name), file) {
		t.Errorf("the file of %s is %s, %v", node, name, err)
	}
	b.killServer()
	if out := b.must("umount", "--json", b.dir); !strings.Contains(out, `"detached":true`) {
		t.Errorf("thaw umount: %s", out)
	}
	b.must("detach", node)
	for _, path := range []string{n.Node, node} {
		if name, err := os.ReadFile("/sys/block/" + filepath.Base(path) + "/loop/backing_file"); err == nil && strings.HasPrefix(string(name), file) {
			t.Errorf("%s is there, of %s", path, name)
		}
	}
	// The next server finds nothing to recover, and ends.
	b.mount()
	b.must("umount", b.dir)
	until(t, "the server ends", func() bool { return len(b.servers()) == 0 })
	if e, _ := os.ReadDir(filepath.Join(b.cache, "ephemeral")); len(e) > 0 {
		t.Errorf("%d ephemeral overlays are left", len(e))
	}
}

// A server that is told to end waits for the mount, and names it when it cannot wait longer.
func TestTerminateUnderMount(t *testing.T) {
	b := newNodeBed(t)
	serve := func(grace string) *exec.Cmd {
		cmd := asProgram("serve", "--nodes-only", "--cache", b.cache, "--grace", grace)
		var log syncBuffer
		cmd.Stderr = &log
		if err := startWithUs(cmd); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		until(t, "the server answers", func() bool { _, _, code := thaw(t, "status", "--cache", b.cache); return code == exitOK })
		return cmd
	}
	said := func(cmd *exec.Cmd) string { return cmd.Stderr.(*syncBuffer).String() }
	cmd := serve("10m")
	b.mount("--driver", "fuse")
	cmd.Process.Signal(syscall.SIGTERM)
	until(t, "it says why it waits", func() bool { return strings.Contains(said(cmd), "a node is in use") })
	// It serves meanwhile, and attaches nothing new.
	if got := b.inside("cat /etc/motd"); got != "thawed\n" {
		t.Errorf("%q", got)
	}
	b.must("umount", b.dir)
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, said(cmd))
	}

	cmd = serve("300ms")
	b.mount("--driver", "fuse")
	cmd.Process.Signal(syscall.SIGTERM)
	if cmd.Wait(); cmd.ProcessState.ExitCode() != exitError || !strings.Contains(said(cmd), "is still in use at "+b.dir) || !strings.Contains(said(cmd), "thaw mount "+b.image+" "+b.dir) {
		t.Errorf("exit %d: %s", cmd.ProcessState.ExitCode(), said(cmd))
	}
	b.failsSoon("data/4")
	b.mount("--driver", "fuse") // which heals it
	if got := b.inside("sha256sum </data/4"); !strings.Contains(got, sha(random(4, 1<<20))) {
		t.Errorf("healed: %s", got)
	}
	b.must("umount", b.dir)
}

// Errors say what is wrong and what helps.
func TestNodeErrors(t *testing.T) {
	b := newNodeBed(t)
	b.fails(exitUsage, []string{"mount", b.image}, "mount takes IMAGE DIR")
	b.fails(exitUsage, []string{"attach", b.image, "--driver", "floppy"}, "unknown driver", "auto, ublk, nbd or fuse")
	b.fails(exitUsage, []string{"attach", b.image, "--ephemeral", "--overlay", "x"}, "exclude each other")
	b.fails(exitUsage, []string{"attach", b.image, "--overlay-size", "1G"}, "add --overlay DIR or --ephemeral")
	b.fails(exitUsage, []string{"attach", b.image, "--queues", "65"}, "from 1 to 64")
	b.fails(exitUsage, []string{"attach", "not a name"}, "not a name")
	b.fails(exitUsage, []string{"serve", "--nodes-only", b.image}, "--nodes-only takes no IMAGE")
	if s := b.servers(); len(s) > 0 {
		t.Errorf("a wrong command line has started %d servers", len(s))
	}
	b.fails(exitError, []string{"umount", b.dir}, "nothing is mounted at "+b.dir)
	b.fails(exitError, []string{"umount", "/proc"}, "is no node of the cache", "use umount")
	file := filepath.Join(b.dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	b.fails(exitError, []string{"mount", b.image, file}, file+": it is not a directory")
	b.fails(exitError, []string{"mount", b.image, b.dir + "/none"}, "there is no such directory", "mkdir -p")
	os.Remove(file)
	b.fails(exitError, []string{"mount", b.proxy.host() + "/team/none:v1", b.dir}, "team/none:v1", "not found")
	b.fails(exitError, []string{"detach", "/dev/loop99"}, "no node /dev/loop99", "thaw list")
	for driver, module := range map[string]string{"ublk": "ublk_drv", "nbd": "nbd"} {
		if _, err := os.Stat("/sys/module/" + module); err != nil {
			b.fails(exitError, []string{"attach", b.image, "--driver", driver}, "modprobe "+module)
		}
	}
	// No user but root.
	cmd := asProgram("attach", b.image, "--cache", "/tmp/none")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if exe, err := copyProgram(t); err != nil {
		t.Fatal(err)
	} else {
		cmd.Path = exe
	}
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "attach requires root") {
		t.Errorf("as nobody: %v: %s", err, out)
	}
	// A host whose kernel lacks FUSE: the device file is another one in a namespace of its own.
	hidden := exec.Command("unshare", "--mount", "sh", "-c", `mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec "$@"`, "sh", os.Args[0], "attach", b.image, "--driver", "fuse", "--cache", cacheDir(t))
	hidden.Env = append(os.Environ(), asThaw+"=1")
	if out, err := hidden.CombinedOutput(); err == nil || !strings.Contains(string(out), "modprobe fuse") {
		t.Errorf("without /dev/fuse: %v: %s", err, out)
	}
	// A server that cannot start says why at once.
	cache := cacheDir(t)
	if err := os.Chmod(cache, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, errOut, code := thaw(t, "attach", b.image, "--cache", cache); code != exitError || !strings.Contains(errOut, "start a server") || !strings.Contains(errOut, serverLog) {
		t.Errorf("exit %d: %s", code, errOut)
	}
	// A server that knows no nodes.
	old := cacheDir(t)
	serveOld(t, old)
	if _, errOut, code := thaw(t, "attach", b.image, "--cache", old); code != exitError || !strings.Contains(errOut, "is thaw v0.9.0, which attaches no nodes: stop it, or pass another --cache") {
		t.Errorf("exit %d: %s", code, errOut)
	}
}

// copyProgram copies the program to where every user can run it.
func copyProgram(t testing.TB) (string, error) {
	t.Helper()
	dir, err := os.MkdirTemp("", "thaw")
	if err != nil {
		return "", err
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	data, err := os.ReadFile(os.Args[0])
	if err != nil {
		return "", err
	}
	return dir + "/thaw", os.WriteFile(dir+"/thaw", data, 0o755)
}

// serveOld answers for a server of before there were nodes.
func serveOld(t testing.TB, cache string) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(cache, "control.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/status" {
			io.WriteString(w, `{"state": "serving", "version": "v0.9.0", "pid": 7}`)
			return
		}
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprintf(w, `{"error": "there is no %s: see /v1/openapi.yaml"}`, r.URL.Path)
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
}

// The flags for registries reach the server that a command starts.
func TestBackgroundServerFlags(t *testing.T) {
	hosts := filepath.Join(t.TempDir(), "hosts")
	t.Chdir(filepath.Dir(hosts))
	a := &app{logFormat: "json", verbose: true, insecure: []string{"one.example", "two.example:5000"}, hosts: "hosts", platform: "linux/arm64"}
	got, err := a.serverArgs("/cache", new(zoneFlags))
	want := []string{
		"serve", "--nodes-only", "--exit-unused", exitUnused.String(), "--cache", "/cache", "--log-format", "json", "--platform", "linux/arm64", "--verbose",
		"--plain-http", "one.example", "--plain-http", "two.example:5000", "--hosts", hosts,
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
}

// A server knows the nodes of the last one when it answers for the first time. Otherwise a
// mount would not be healed, and a node that is attached in this moment would take the place
// of the others in the state file.
func TestServerKnowsNodesFirst(t *testing.T) {
	cache := t.TempDir()
	// It takes a while to see that this is damaged.
	state := append(append([]byte(`{"nodes":[`), bytes.Repeat([]byte("[1],"), 1<<20-16)...), '[')
	if err := os.WriteFile(filepath.Join(cache, "state.json"), state, 0o600); err != nil {
		t.Fatal(err)
	}
	client, err := control(cache)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	cmd := asProgram("serve", "--nodes-only", "--cache", cache)
	if err := startWithUs(cmd); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	until(t, "the server answers", func() bool { _, err := client.Status(t.Context()); return err == nil })
	if _, err := os.Stat(filepath.Join(cache, "state.json.damaged")); err != nil {
		t.Errorf("the server answers before it has read the state file: %v", err)
	}
}

// Commands at once start one server.
func TestMountsStartOneServer(t *testing.T) {
	b := newNodeBed(t)
	var wg sync.WaitGroup
	nodes := make([]string, 4)
	for i := range nodes {
		wg.Go(func() {
			out, errOut, code := b.run("attach", b.image)
			if code != exitOK {
				t.Errorf("exit %d: %s", code, errOut)
			}
			nodes[i] = strings.TrimSpace(out)
		})
	}
	wg.Wait()
	if s := b.servers(); len(s) != 1 {
		t.Errorf("%d servers", len(s))
	}
	for _, n := range nodes {
		b.must("detach", n)
	}
}

func FuzzParseMountInfo(f *testing.F) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte("36 35 98:0 /mnt1 /mnt\\0402\\134 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"))
	f.Add([]byte("1 2 3:4 / / - \\"))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, m := range parseMountInfo(text) {
			if strings.ContainsAny(m.device, " \n") {
				t.Errorf("%+v", m)
			}
		}
	})
}

func TestParseMountInfo(t *testing.T) {
	got := parseMountInfo([]byte("36 35 98:0 /mnt1 /mnt\\0402\\134 rw,noatime master:1 - ext3 /dev/root rw\n\nx\n1 2 3 4 5 6\n7 6 0:5 / /a rw - tmpfs none rw"))
	want := []mountPoint{{`/mnt 2\`, "/dev/root", "98:0", "ext3"}, {"/a", "none", "0:5", "tmpfs"}}
	if !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
}

// What scripts read of nodes has the fields that it had.
func TestGoldenNodeJSON(t *testing.T) {
	b := newNodeBed(t)
	overlay := filepath.Join(b.cache, "overlay")
	same := func(name, line string) {
		t.Helper()
		line = strings.NewReplacer(b.proxy.host(), "HOST", b.dir, "MOUNT").Replace(line)
		line = regexp.MustCompile(`/dev/loop\d+`).ReplaceAllString(line, "NODE")
		line = regexp.MustCompile(`"(hits|misses|others|flushes|syncs|data_bytes|zero_bytes|space_bytes)":\d+`).ReplaceAllString(line, `"$1":0`)
		line = regexp.MustCompile(`"(id|device)":"\d+"`).ReplaceAllString(line, `"$1":"1"`)
		goldenJSON(t, name, line, b.cache)
	}
	out := b.must("attach", "--json", "--driver", "fuse", b.image)
	same("attach", out)
	var n nodeResult
	if err := json.Unmarshal([]byte(out), &n); err != nil {
		t.Fatal(err)
	}
	same("detach", b.must("detach", "--json", n.Node))
	same("mount", b.must("mount", "--json", "--driver", "fuse", b.image, b.dir, "--overlay", overlay))
	for line := range strings.Lines(b.must("list", "--json")) {
		if strings.Contains(line, `"type":"node"`) {
			same("list-node", line)
		}
	}
	same("umount", b.must("umount", "--json", b.dir))
}
