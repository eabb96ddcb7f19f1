package attach

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// files are files that a test has written to a mounted node.
type files struct {
	t    testing.TB
	want map[string][]byte
}

// useFiles makes, changes and removes files in dir.
func useFiles(t testing.TB, dir string) *files {
	t.Helper()
	f := &files{t, make(map[string][]byte)}
	rng := rand.New(rand.NewPCG(1, 3))
	content := rand.NewChaCha8([32]byte{3})
	for i := range 40 {
		name := fmt.Sprintf("file%d", i%25)
		p := make([]byte, rng.IntN(200_000))
		content.Read(p)
		if err := os.WriteFile(filepath.Join(dir, name), p, 0o600); err != nil {
			t.Fatal(err)
		}
		f.want[name] = p
		if i%7 == 3 {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
			delete(f.want, name)
		}
	}
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		t.Fatalf("fsync: %v", err)
	}
	return f
}

// check fails unless the files are in dir.
func (f *files) check(dir string) {
	f.t.Helper()
	for name, want := range f.want {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(got, want) {
			f.t.Errorf("%s: wrong bytes, or %v", name, err)
		}
	}
}

// fsck checks the file system on a device.
func fsck(t testing.TB, dev *blocktest.Memory) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "fs")
	if err := os.WriteFile(file, dev.Content(blockmap.Range(0, dev.Size())), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("e2fsck", "-fn", file).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}
