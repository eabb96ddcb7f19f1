package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap/blocktest"
)

// A server in direct mode serves what one in buffered mode has cached, and the other way
// around, and says its mode.
func TestCacheMode(t *testing.T) {
	need(t, "nbdcopy")
	image := layoutImage(t)
	dir := filepath.Dir(socket(t))
	var first []byte
	for _, mode := range []string{"direct", "buffered", "direct"} {
		s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", dir, "--cache-mode", mode)
		got, err := os.ReadFile(device(t, s.uri()))
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = got
		} else if !bytes.Equal(got, first) {
			t.Errorf("%s: other bytes", mode)
		}
		if out := must(t, "status", "--cache", dir); strings.Contains(out, "cache     "+dir+", by direct I/O\n") != (mode == "direct") {
			t.Errorf("%s: status says\n%s", mode, out)
		}
		if out := must(t, "status", "--json", "--cache", dir); !strings.Contains(out, `"cache_mode":"`+mode+`"`) && !strings.Contains(out, `"cache_mode": "`+mode+`"`) {
			t.Errorf("%s: status says\n%s", mode, out)
		}
		s.term()
	}
	if _, stderr, code := thaw(t, "serve", image, "--cache", dir, "--cache-mode", "none"); code != exitUsage || !strings.Contains(stderr, "buffered or direct") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}

// On a filesystem without direct I/O, direct mode fails before anything is served, and
// says what to do.
func TestCacheModeWithoutDirectIO(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root")
	}
	at := t.TempDir()
	if err := unix.Mount("ramfs", at, "ramfs", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := blocktest.Unmount(at); err != nil {
			t.Error(err)
		}
	})
	dir := filepath.Join(at, "cache")
	_, stderr, code := thaw(t, "serve", layoutImage(t), "--listen", "unix:"+socket(t), "--cache", dir, "--cache-mode", "direct")
	if code != exitError || !strings.Contains(stderr, "does not support direct I/O") || !strings.Contains(stderr, dir) || !strings.Contains(stderr, "another filesystem") {
		t.Errorf("exit %d\n%s", code, stderr)
	}
}
