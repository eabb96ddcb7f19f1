package stargz

import (
	"bytes"
	"context"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"thaw/bench"
	"thaw/bench/benchtest"
)

// The programs take minutes to build, so that scripts/test does without them.
// scripts/stargz --try builds them and sets this flag.
var withPrograms = flag.Bool("programs", false, "run stargz-snapshotter; requires root and the programs that scripts/stargz builds, in PATH")

func TestFind(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	if err := Find(); err == nil || !strings.Contains(err.Error(), "ctr-remote, containerd") || !strings.Contains(err.Error(), "scripts/stargz") {
		t.Errorf("without the programs: %v", err)
	}
	for _, p := range Programs {
		if err := os.WriteFile(filepath.Join(dir, p.Name), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := Find(); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(filepath.Join(dir, "ctr-remote"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := Find(); err == nil {
		t.Error("Find accepts a file that is not executable")
	}
}

func TestConfigure(t *testing.T) {
	h := &Host{dir: t.TempDir()}
	if err := h.configure("127.0.0.1:5000"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"containerd.toml": "root = \"" + h.dir + "/containerd\"\n",
		"stargz.toml":     "[[resolver.host.\"127.0.0.1:5000\".mirrors]]\nhost = \"127.0.0.1:5000\"\ninsecure = true\n",
	} {
		if text, err := os.ReadFile(h.file(name)); err != nil || !strings.Contains(string(text), want) {
			t.Errorf("%s: %v\n%s", name, err, text)
		}
	}
}

// An image is converted, started lazily, and interrupted. Afterwards no process,
// mount or control group is left.
func TestStart(t *testing.T) {
	if !*withPrograms {
		return
	}
	if err := Find(); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	dir, err := os.MkdirTemp("", "stargz-") // not t.TempDir: the path of a socket has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		os.RemoveAll(dir)
		checkNothingLeft(t, dir)
	})
	registry, err := bench.StartRegistry(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer registry.Close()
	w := benchtest.Image(t)
	source, plain, optimized := registry.Addr+"/image:source", registry.Addr+"/image:plain", registry.Addr+"/image:optimized"
	if _, err := bench.Push(ctx, w.Dir, "latest", source); err != nil {
		t.Fatal(err)
	}
	link, err := bench.ListenLink(registry.Addr, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	onHost(t, dir, registry.Addr, func(h *Host) {
		if err := h.Convert(ctx, source, plain); err != nil {
			t.Fatal(err)
		}
		if err := h.Optimize(ctx, source, optimized, bench.Start); err != nil {
			t.Fatal(err)
		}
	})
	for _, tag := range []string{"plain", "optimized"} {
		before := link.Stats()
		onHost(t, dir, link.Addr().String(), func(h *Host) {
			ref := link.Addr().String() + "/image:" + tag
			if err := h.Pull(ctx, ref); err != nil {
				t.Fatal(err)
			}
			// The files that were marked come at once; of the others, only where they are.
			if n := link.Stats().Sub(before).Down; (tag == "plain") != (n < 100<<10) {
				t.Errorf("Pull of %s has transferred %d bytes", tag, n)
			}
			if out, err := h.Exec(ctx, ref, bench.Start); err != nil || w.Check(out) != nil {
				t.Errorf("%s printed %q, %v", ref, out, err)
			}
		})
	}
	// One container is killed with its client, the next one with the Host.
	onHost(t, dir, registry.Addr, func(h *Host) {
		if err := h.Pull(ctx, plain); err != nil {
			t.Fatal(err)
		}
		execUntil := func(ctx context.Context) chan error {
			ended := make(chan error, 1)
			go func() {
				_, err := h.Exec(ctx, plain, bench.Start, "forever")
				ended <- err
			}()
			waitFor(t, "the program to run", func() bool { return running(inContainer) })
			return ended
		}
		short, cancel := context.WithCancel(ctx)
		ended := execUntil(short)
		cancel()
		if err := <-ended; err == nil {
			t.Error("Exec succeeds although its context was cancelled")
		}
		waitFor(t, "the program to end", func() bool { return !running(inContainer) })
		ended = execUntil(ctx)
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		if err := <-ended; err == nil {
			t.Error("Exec succeeds although its Host was closed")
		}
		if running(inContainer) {
			t.Error("a container outlives its Host")
		}
	})
}

// onHost calls f with a Host whose stores are empty.
func onHost(t *testing.T, dir, registry string, f func(*Host)) {
	t.Helper()
	dir, err := os.MkdirTemp(dir, "h")
	if err != nil {
		t.Fatal(err)
	}
	h, err := Start(t.Context(), dir, registry)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if t.Failed() {
			t.Log(h.Log())
		}
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}()
	f(h)
}

func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	for range 1500 {
		if is() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("waited 15 s for %s", what)
}

// inContainer is the whole command line of the program, other than that of the
// client that asks for it.
const inContainer = "\n" + bench.Start + " forever\n"

// running reports whether the list of command lines contains what.
func running(what string) bool {
	out, err := exec.Command("ps", "-ww", "-eo", "args").Output()
	return err == nil && bytes.Contains(out, []byte(what))
}

func checkNothingLeft(t *testing.T, dir string) {
	t.Helper()
	if running(dir) {
		t.Errorf("a process of %s is left", dir)
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(mounts, []byte(dir)) {
		t.Errorf("a mount in %s is left, %v", dir, err)
	}
	for _, pattern := range []string{"/sys/fs/cgroup/thaw-bench-*", "/sys/fs/cgroup/*/thaw-bench-*"} {
		if left, err := filepath.Glob(pattern); err != nil || left != nil {
			t.Errorf("control groups are left: %s, %v", left, err)
		}
	}
}
