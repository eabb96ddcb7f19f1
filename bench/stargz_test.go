package bench

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What it does with the programs is tried by scripts/stargz --try: to build
// them takes minutes.
func TestFindStargz(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	_, err := FindStargz()
	if err == nil || !strings.Contains(err.Error(), "no ctr-remote") || !strings.Contains(err.Error(), "scripts/stargz") {
		t.Errorf("without the programs: %v", err)
	}
	for _, name := range []string{"containerd", "containerd-stargz-grpc", "ctr-remote", "containerd-shim-runc-v2", "runc", "nsenter", "setpriv"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho $0 v1.2.3 abc\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p, err := FindStargz()
	if err != nil {
		t.Fatal(err)
	}
	if v, err := p.Version(t.Context()); err != nil || v != "containerd-stargz-grpc 1.2.3, containerd 1.2.3" {
		t.Errorf("version %q, %v", v, err)
	}
	if err := os.Chmod(filepath.Join(dir, "ctr-remote"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := FindStargz(); err == nil {
		t.Error("a file that is no program is taken for one")
	}
}

func TestStargzConfig(t *testing.T) {
	s := &Stargz{dir: t.TempDir(), registry: "127.0.0.1:5000"}
	if err := s.configure(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"containerd.toml": "root = \"" + s.dir + "/containerd\"\n",
		"stargz.toml":     "[[resolver.host.\"127.0.0.1:5000\".mirrors]]\nhost = \"127.0.0.1:5000\"\ninsecure = true\n",
	} {
		if text, err := os.ReadFile(s.file(name)); err != nil || !strings.Contains(string(text), want) {
			t.Errorf("%s: %v\n%s", name, err, text)
		}
	}
}
