package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap/blocktest"
)

// attached is an export as a block device of this host, by nbdfuse and a loop device.
type attached struct {
	t       testing.TB
	fuse    *exec.Cmd
	fuseDir string
	device  string
	release func()
	dir     string // where its filesystem is mounted; "": nowhere
}

// attach makes the default export of s a block device, which can be written to.
func attach(t testing.TB, s *server) *attached {
	t.Helper()
	need(t, "nbdfuse", "e2fsck")
	if os.Getuid() != 0 {
		t.Skip("not root: cannot mount")
	}
	a := &attached{t: t, fuseDir: t.TempDir()}
	a.fuse = exec.Command("nbdfuse", a.fuseDir, s.uri())
	var said syncBuffer
	a.fuse.Stderr = &said
	if err := startWithUs(a.fuse); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.detach)
	file := filepath.Join(a.fuseDir, "nbd")
	for end := time.Now().Add(atMost); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(file); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("nbdfuse does not mount: %s", said.String())
		}
	}
	a.device, a.release = blocktest.Loop(t, file, false)
	return a
}

// mount mounts the device's ext4.
func (a *attached) mount() string {
	a.t.Helper()
	dir := a.t.TempDir()
	if err := unix.Mount(a.device, dir, "ext4", 0, ""); err != nil {
		a.t.Fatalf("mount: %v", err)
	}
	a.dir = dir
	return dir
}

func (a *attached) unmount() {
	a.t.Helper()
	if a.dir != "" {
		if err := blocktest.Unmount(a.dir); err != nil {
			a.t.Error(err)
			_ = unix.Unmount(a.dir, unix.MNT_DETACH)
		}
		a.dir = ""
	}
}

// check is what e2fsck says of the device.
func (a *attached) check() {
	a.t.Helper()
	if out, err := exec.Command("e2fsck", "-fn", a.device).CombinedOutput(); err != nil {
		a.t.Errorf("e2fsck: %v\n%s", err, out)
	}
}

func (a *attached) detach() {
	if a.fuse == nil {
		return
	}
	a.unmount()
	a.release()
	ended := make(chan error, 1)
	go func() { ended <- a.fuse.Wait() }()
	for end := time.Now().Add(atMost); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Unmount(a.fuseDir, 0) // busy until the loop device is gone
		if err == nil || errors.Is(err, unix.EINVAL) {
			break
		}
		if time.Now().After(end) {
			a.t.Errorf("unmount nbdfuse: %v", err)
			_ = unix.Unmount(a.fuseDir, unix.MNT_DETACH)
			break
		}
	}
	select {
	case <-ended:
	case <-time.After(atMost):
		a.fuse.Process.Kill()
		<-ended
	}
	a.fuse = nil
}

// tree is what a directory is to hold: contents by path.
type tree struct {
	dir   string
	rng   *rand.Rand
	files map[string][]byte
	names []string
	next  int
}

func newTree(dir string, seed uint64) *tree {
	return &tree{dir: dir, rng: rand.New(rand.NewPCG(seed, 3)), files: make(map[string][]byte)}
}

func (x *tree) path(name string) string { return filepath.Join(x.dir, name) }

// step changes a file, and the model with it.
func (x *tree) step() error {
	if k := x.rng.IntN(10); len(x.names) < 20 || k < 3 && len(x.names) < 400 {
		x.next++
		name := fmt.Sprintf("d%d/f%d", x.rng.IntN(16), x.next)
		if err := os.MkdirAll(filepath.Dir(x.path(name)), 0o755); err != nil {
			return err
		}
		p := random(x.rng.Uint64(), x.rng.IntN(128<<10))
		if err := os.WriteFile(x.path(name), p, 0o644); err != nil {
			return err
		}
		x.files[name], x.names = p, append(x.names, name)
		return nil
	}
	i := x.rng.IntN(len(x.names))
	name := x.names[i]
	switch x.rng.IntN(6) {
	case 0:
		if err := os.Remove(x.path(name)); err != nil {
			return err
		}
		delete(x.files, name)
		x.names = slices.Delete(x.names, i, i+1)
		return nil
	case 1:
		x.next++
		to := fmt.Sprintf("d%d/r%d", x.rng.IntN(16), x.next)
		if err := os.MkdirAll(filepath.Dir(x.path(to)), 0o755); err != nil {
			return err
		}
		if err := os.Rename(x.path(name), x.path(to)); err != nil {
			return err
		}
		x.files[to], x.names[i] = x.files[name], to
		delete(x.files, name)
		return nil
	case 2:
		n := x.rng.IntN(200 << 10)
		if err := os.Truncate(x.path(name), int64(n)); err != nil {
			return err
		}
		p := make([]byte, n)
		copy(p, x.files[name])
		x.files[name] = p
		return nil
	}
	f, err := os.OpenFile(x.path(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	p := random(x.rng.Uint64(), 1+x.rng.IntN(20<<10))
	at := x.rng.IntN(len(x.files[name]) + 1)
	_, err = f.WriteAt(p, int64(at))
	if err == nil && x.rng.IntN(8) == 0 {
		err = f.Sync()
	}
	content := make([]byte, max(len(x.files[name]), at+len(p)))
	copy(content, x.files[name])
	copy(content[at:], p)
	x.files[name] = content
	return errors.Join(err, f.Close())
}

// compare fails where the directory holds something else than the model.
func (x *tree) compare(t testing.TB, dir string) {
	t.Helper()
	found := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		found++
		name, _ := filepath.Rel(dir, path)
		got, err := os.ReadFile(path)
		if err == nil && !bytes.Equal(got, x.files[name]) {
			err = fmt.Errorf("%s has other content than was written", name)
		}
		return err
	})
	if err != nil || found != len(x.files) {
		t.Errorf("%d files, want %d: %v", found, len(x.files), err)
	}
}

// An ordinary filesystem lives in an overlay: the image's own ext4 is mounted, churned,
// unmounted, checked, and mounted again on a server that was killed meanwhile.
func TestFilesystemInOverlay(t *testing.T) {
	t.Parallel()
	dir, cache := filepath.Join(t.TempDir(), "overlay"), cacheDir(t)
	src := filepath.Join(t.TempDir(), "src.tar")
	original := files(1, "a", 60)
	saveArchive(t, src, imageOf(t, layerOf(t, original...)))
	image := "oci:" + t.TempDir() + "/dst:x"
	must(t, "build", "--size", "256M", "docker-archive:"+src, image)
	serve := func() *server {
		t.Helper()
		return serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", dir)
	}
	s := serve()
	a := attach(t, s)
	root := a.mount()
	x := newTree(filepath.Join(root, "new"), 1)
	if err := os.Mkdir(x.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	lasts := max(5*time.Second, *soak)
	steps := 0
	for end := time.Now().Add(lasts / 2); time.Now().Before(end); steps++ {
		if err := x.step(); err != nil {
			t.Fatal(err)
		}
	}
	stress(t, root, lasts/2)
	a.unmount()
	a.check()
	a.detach()
	s.kill()
	t.Logf("%d steps, %d files", steps, len(x.files))

	s = serve()
	a = attach(t, s)
	root = a.mount()
	x.compare(t, filepath.Join(root, "new"))
	for _, f := range original {
		if got, err := os.ReadFile(filepath.Join(root, f.name)); !strings.HasSuffix(f.name, "/") && (err != nil || !bytes.Equal(got, f.data)) {
			t.Errorf("%s of the image: %v", f.name, err)
		}
	}
	// And the image's files can be changed and removed.
	if err := errors.Join(os.Remove(filepath.Join(root, "a/1")), os.WriteFile(filepath.Join(root, "a/2"), []byte("changed"), 0o644)); err != nil {
		t.Error(err)
	}
	a.unmount()
	a.check()
	root = a.mount()
	if _, err := os.Stat(filepath.Join(root, "a/1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a removed file: %v", err)
	}
	if got, err := os.ReadFile(filepath.Join(root, "a/2")); string(got) != "changed" {
		t.Errorf("a changed file: %q, %v", got, err)
	}
	a.detach()
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d\n%s", code, s.stderr.String())
	}
}

// stress has stress-ng, which others wrote, churn a filesystem, if it is installed.
func stress(t testing.TB, root string, lasts time.Duration) {
	t.Helper()
	if _, err := exec.LookPath("stress-ng"); err != nil {
		t.Logf("stress-ng is not installed")
		return
	}
	dir := filepath.Join(root, "stress")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	out := tool(t, "stress-ng", "--temp-path", dir, "--timeout", fmt.Sprintf("%ds", max(1, int(lasts.Seconds()))), "--verify",
		"--hdd", "1", "--hdd-bytes", "16M", "--dentry", "1", "--rename", "1", "--fallocate", "1", "--fallocate-bytes", "16M", "--link", "1")
	if strings.Contains(out, "fail:") {
		t.Error(out)
	}
}

// full writes files and makes them durable until there is no room, and returns those that
// were durable before.
func full(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	durable := make(map[string][]byte)
	for i := range 2000 {
		p := random(uint64(i), 64<<10)
		name := filepath.Join(dir, fmt.Sprint("f", i))
		f, err := os.Create(name)
		if err == nil {
			_, err = f.Write(p)
			err = errors.Join(err, f.Sync(), f.Close())
		}
		if err != nil {
			// What the writer sees depends on what ext4 was about to write: data, or its
			// journal, which makes it read-only.
			if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.EROFS) {
				t.Errorf("a full overlay is %v", err)
			}
			return durable
		}
		durable[filepath.Base(name)] = p
	}
	t.Fatal("the overlay never gets full")
	return nil
}

// An overlay without room: the writer gets an error, what was durable stays, and with more
// room the filesystem goes on.
func TestFilesystemInFullOverlay(t *testing.T) {
	t.Parallel()
	need(t, "mkfs.ext4", "e2fsck")
	if os.Getuid() != 0 {
		t.Skip("not root: cannot mount")
	}
	src := filepath.Join(t.TempDir(), "src.tar")
	saveArchive(t, src, imageOf(t, layerOf(t, files(1, "a", 20)...)))
	image := "oci:" + t.TempDir() + "/dst:x"
	must(t, "build", "--size", "256M", "docker-archive:"+src, image)
	cache := cacheDir(t)
	small := filepath.Join(t.TempDir(), "small")
	for name, c := range map[string]struct {
		dir         func() string
		args, later []string
		room        func(dir string) error // makes room
	}{
		"--overlay-size": {
			func() string { return filepath.Join(t.TempDir(), "overlay") },
			[]string{"--overlay-size", "12M"}, []string{"--overlay-size", "64M"}, func(string) error { return nil },
		},
		"disk": {
			func() string {
				if err := os.WriteFile(small, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(small, 48<<20); err != nil {
					t.Fatal(err)
				}
				tool(t, "mkfs.ext4", "-q", "-m", "0", small)
				dir, _ := blocktest.Mount(t, small, "ext4", false)
				if err := os.WriteFile(filepath.Join(dir, "other"), random(1, 28<<20), 0o600); err != nil {
					t.Fatal(err)
				}
				return filepath.Join(dir, "overlay")
			},
			nil, nil, func(dir string) error { return os.Remove(filepath.Join(filepath.Dir(dir), "other")) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := c.dir()
			serve := func(args []string) *server {
				return serving(t, append([]string{image, "--listen", "unix:" + socket(t), "--cache", cache, "--overlay", dir}, args...)...)
			}
			s := serve(c.args)
			a := attach(t, s)
			root := a.mount()
			durable := full(t, root)
			if len(durable) < 10 {
				t.Errorf("only %d files were durable", len(durable))
			}
			a.detach()
			if !s.said("no space left") {
				t.Errorf("no write has failed for lack of space:\n%s", s.stderr.String())
			}
			if _, code := s.term(); code != exitOK {
				t.Errorf("exit %d\n%s", code, s.stderr.String())
			}

			if err := c.room(dir); err != nil {
				t.Fatal(err)
			}
			s = serve(c.later)
			a = attach(t, s)
			// As at each boot: the journal is replayed, and what its end has left is put in order.
			if out, err := exec.Command("e2fsck", "-fp", a.device).CombinedOutput(); err != nil && exitCode(err) > 1 {
				t.Errorf("e2fsck -fp: %v\n%s", err, out)
			}
			a.check()
			root = a.mount()
			for name, want := range durable {
				if got, err := os.ReadFile(filepath.Join(root, name)); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s was durable: %v", name, err)
				}
			}
			if err := os.WriteFile(filepath.Join(root, "more"), random(9, 4<<20), 0o644); err != nil {
				t.Error(err)
			}
			a.unmount()
			a.check()
			a.detach()
			if _, code := s.term(); code != exitOK {
				t.Errorf("exit %d\n%s", code, s.stderr.String())
			}
		})
	}
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return -1
}
