package blocktest_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap/blocktest"
)

// A file of this process that keeps a mount busy is named.
func TestUnmountNamesWhatIsOpen(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root")
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "open"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := blocktest.Unmount(dir); err == nil || !strings.Contains(err.Error(), f.Name()) {
		t.Errorf("unmount: %v", err)
	}
	if err := unix.Unmount(dir, 0); err == nil {
		t.Error("it was still mounted")
	}
}
