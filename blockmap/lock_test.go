package blockmap

import (
	"errors"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// A lock ends when it is closed, even if a child of this process has its descriptor, as
// every child has from fork to exec.
func TestLockEndsWithClose(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	l, err := OS.Lock(path)
	if err != nil {
		t.Fatal(err)
	}
	of, err := unix.Dup(int(l.(*fileLock).f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(of)
	if _, err := OS.Lock(path); !errors.Is(err, ErrLocked) {
		t.Errorf("it is locked again: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := OS.Lock(path)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}
