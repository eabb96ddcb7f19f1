//go:build baddisk

// By hand, as root: go test -tags baddisk ./blockmap -run BadSectors -timeout 2m
// It passes on some runs and goes on reading one bad sector on others.

package blockmap_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// Sectors that cannot be read cost chunks, which are fetched again; sectors that
// cannot be written, too.
func TestRealBadSectors(t *testing.T) {
	for _, command := range []string{"nbdkit", "nbdfuse", "fusermount3"} {
		if _, err := exec.LookPath(command); err != nil {
			t.Skip(err)
		}
	}
	m := blocktest.NewImage(t, 82, 4000)
	// A disk that fails while a file is there: nbdkit's, through FUSE.
	mnt := t.TempDir()
	broken := filepath.Join(t.TempDir(), "broken")
	file := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, os.Truncate(file, 96<<20))
	serve := exec.Command("nbdfuse", mnt, "[", "nbdkit", "--exit-with-parent", "--filter=error", "file", file,
		"error=EIO", "error-pread-rate=100%", "error-pwrite-rate=50%", "error-file="+broken, "]")
	var stderr bytes.Buffer
	serve.Stderr = &stderr
	must(t, serve.Start())
	t.Cleanup(func() {
		if out, err := exec.Command("fusermount3", "-u", mnt).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
			serve.Process.Kill()
		}
		if err := serve.Wait(); err != nil {
			t.Logf("nbdfuse: %v: %s", err, stderr.String())
		}
	})
	nbd := filepath.Join(mnt, "nbd")
	eventually(t, "nbdfuse does not come up", func() bool {
		fi, err := os.Stat(nbd)
		return err == nil && fi.Size() == 96<<20
	})
	d := newDiskOn(t, nbd, "mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0")
	dir := filepath.Join(d.at, "cache")
	c, image, _ := openImage(t, dir, m, blockmap.CacheOptions{Boot: blockmap.BootID{1}})
	readAll(t, image, m)
	must(t, c.Close())
	d.run("sync", "-f", d.at)
	for _, path := range dataFiles(t, dir) {
		f, err := os.Open(path)
		must(t, err)
		must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		// What the guard and the metadata are in is in memory.
		fi, err := f.Stat()
		must(t, err)
		_, err = f.ReadAt(make([]byte, 8), fi.Size()-8)
		must(t, err)
		must(t, f.Close())
	}
	c, err := blockmap.OpenCache(dir, quiet(blockmap.CacheOptions{Boot: blockmap.BootID{1}}))
	must(t, err)
	fetch := newDirect(t, blocktest.NewOrigin(m))
	fetch.hold = true
	image, err = blockmap.NewImage(m.Index, c, fetch)
	must(t, err)
	check := func() {
		t.Helper()
		for at := int64(0); at < image.Size(); at += 256 << 10 {
			e := blockmap.Range(at, min(256<<10, image.Size()-at))
			got, err := blocktest.Read(t.Context(), image, e)
			if err != nil || !bytes.Equal(got, m.Content[e.Start:e.End]) {
				t.Fatalf("read %v: wrong bytes, or %v", e, err)
			}
		}
	}
	must(t, os.WriteFile(broken, nil, 0o600))
	for range 3 {
		check()
		if err := c.Sync(); err != nil {
			t.Logf("sync to a disk that is broken: %v", err)
		}
	}
	if c.Damaged() == 0 {
		t.Error("no chunk was damaged: this tests nothing")
	}
	must(t, os.Remove(broken))
	check()
	_ = c.Close()
	for _, path := range dataFiles(t, dir) {
		f, err := os.Open(path)
		must(t, err)
		must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		must(t, f.Close())
	}
	c, image, _ = openImage(t, dir, m, blockmap.CacheOptions{Boot: blockmap.BootID{1}})
	readAll(t, image, m)
	must(t, c.Close())
}
