package bench

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A program in a cgroup has the memory that it is given, and not more.
func TestCgroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("cgroups require root")
	}
	g, err := NewCgroup(fmt.Sprint("bench-test-", os.Getpid()), 64<<20) // another run may be under way
	if err != nil {
		t.Skipf("this machine has no cgroups to use: %v", err)
	}
	defer func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}()
	// tail keeps a line without an end in memory.
	for size, fits := range map[string]bool{"8M": true, "256M": false} {
		args := g.Args("sh", "-c", "head -c "+size+" /dev/zero | tail | wc -c")
		out, err := exec.Command(args[0], args[1:]...).Output()
		if got := err == nil && strings.TrimSpace(string(out)) != "0"; got != fits {
			t.Errorf("%s of memory in a cgroup of 64 MiB: %v\n%s", size, err, out)
		}
	}
	if out, err := exec.Command("echo", "x").Output(); err != nil || string(out) != "x\n" {
		t.Error("no process can be started any more")
	}
}

// The files that each version of cgroups wants.
func TestCgroupVersions(t *testing.T) {
	for version, controllers := range map[string]string{"1": "hugetlb\n", "2": "cpu memory pids\n"} {
		root := t.TempDir()
		dir, limit := filepath.Join(root, "memory", "x"), "memory.limit_in_bytes"
		if version == "2" {
			dir, limit = filepath.Join(root, "x"), "memory.max"
		}
		for _, err := range []error{
			os.WriteFile(filepath.Join(root, "cgroup.controllers"), []byte(controllers), 0o600),
			os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), nil, 0o600),
			os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, limit), nil, 0o600),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		g, err := newCgroup(root, "x", 12345)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, limit)); err != nil || string(b) != "12345" {
			t.Errorf("version %s: %s has %q, %v", version, limit, b, err)
		}
		if args := g.Args("true"); args[len(args)-1] != "true" || !strings.HasPrefix(args[3], dir) {
			t.Errorf("version %s: %q", version, args)
		}
		if b, _ := os.ReadFile(filepath.Join(root, "cgroup.subtree_control")); (string(b) == "+memory") != (version == "2") {
			t.Errorf("version %s: subtree_control has %q", version, b)
		}
	}
	if args := (*Cgroup)(nil).Args("true"); len(args) != 1 {
		t.Errorf("without a cgroup: %q", args)
	}
}
