package blockmap_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// All files of an overlay are removed, also those of its second level, and no others.
func TestRemoveOverlay(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "overlay")
	base := blocktest.NewMemory(1 << 20)
	open := func() *blockmap.Overlay {
		t.Helper()
		o, err := blockmap.OpenOverlay(dir, base, blockmap.OverlayOptions{Image: "image", Digest: blockmap.Digest{1}})
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	for name, stranger := range map[string]bool{"alone": false, "with another file": true} {
		o := open()
		if _, err := o.Freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := o.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 2*blockmap.BlockSize), 0); err != nil {
			t.Fatal(err)
		}
		if err := blockmap.RemoveOverlay(blockmap.OS, dir); !errors.Is(err, blockmap.ErrLocked) {
			t.Errorf("%s: an overlay in use: %v", name, err)
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
		if stranger {
			if err := os.WriteFile(dir+"/notes", []byte("keep"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err := blockmap.RemoveOverlay(blockmap.OS, dir)
		left, dirErr := os.ReadDir(dir)
		if !stranger && (err != nil || !errors.Is(dirErr, fs.ErrNotExist)) {
			t.Errorf("%s: %v, %v: %v", name, err, dirErr, left)
		}
		if stranger && (err == nil || !strings.Contains(err.Error(), "notes") || len(left) != 1) {
			t.Errorf("%s: %v, %v", name, err, left)
		}
		if err := blockmap.RemoveOverlay(blockmap.OS, dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: removed twice: %v", name, err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	// A damaged header does not keep an overlay.
	if err := open().Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/header", []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := blockmap.RemoveOverlay(blockmap.OS, dir); err != nil {
		t.Error(err)
	}
}

// Who lists or removes what somebody else has made writes nothing elsewhere: a lock that is
// a link is refused.
func TestOverlayLockIsALink(t *testing.T) {
	dir := t.TempDir()
	o := openOverlay(t, dir, blocktest.NewMemory(1<<20), blockmap.OverlayOptions{})
	must(t, o.Close())
	elsewhere := filepath.Join(t.TempDir(), "made")
	must(t, os.Remove(filepath.Join(dir, "lock")))
	must(t, os.Symlink(elsewhere, filepath.Join(dir, "lock")))
	_, err := blockmap.ReadOverlay(blockmap.OS, dir)
	for what, err := range map[string]error{"read": err, "remove": blockmap.RemoveOverlay(blockmap.OS, dir)} {
		if !errors.Is(err, syscall.ELOOP) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := os.Lstat(elsewhere); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file was made where the link leads: %v", err)
	}
}

// An overlay can be listed while a freeze makes its second level, of which the map comes
// last.
func TestReadOverlayDuringFreeze(t *testing.T) {
	dir := t.TempDir()
	o := openOverlay(t, dir, blocktest.NewMemory(1<<20), blockmap.OverlayOptions{})
	must(t, o.WriteAt(t.Context(), make([]byte, blockmap.BlockSize), 0))
	for _, name := range []string{"data.1", "map.1.new", "live.1"} {
		must(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
		if info, err := blockmap.ReadOverlay(blockmap.OS, dir); err != nil || info.Levels != 1 || info.Data != blockmap.BlockSize || !info.InUse {
			t.Errorf("with %s: %+v, %v", name, info, err)
		}
	}
}
