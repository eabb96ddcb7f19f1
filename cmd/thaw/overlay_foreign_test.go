package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// fio writes at random by four connections, with trims and flushes, and verifies what it has
// written by checksums: at once, and again on a server that was started anew.
func TestFioVerifiesOverlay(t *testing.T) {
	t.Parallel()
	need(t, "fio", "nbdcopy", "qemu-io")
	image := layoutImage(t)
	dir, cache := filepath.Join(t.TempDir(), "overlay"), cacheDir(t)
	serve := func() *server {
		t.Helper()
		return serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", dir)
	}
	state := t.TempDir() // where fio keeps what it has written
	args := func(s *server, more ...string) []string {
		return append([]string{
			"--name=v", "--ioengine=nbd", "--uri=" + s.uri(), "--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned=0", "--iodepth=32", "--numjobs=4", "--thread",
			"--offset=8M", "--size=12M", "--offset_increment=12M", "--verify=crc32c", "--verify_fatal=1", "--randseed=7", "--fsync=32", "--minimal",
			"--aux-path=" + state,
		}, more...)
	}
	job := func(s *server, more ...string) { t.Helper(); tool(t, "fio", args(s, more...)...) }
	s := serve()
	job(s, "--do_verify=1", "--verify_async=1")
	// What was written and then trimmed reads as zeros, before a crash and after it. Trims among
	// the writes of a job that verifies are no test: fio 3.33 makes none of them, or aborts.
	other := func(rw string, more ...string) {
		t.Helper()
		tool(t, "fio", append([]string{"--name=t", "--ioengine=nbd", "--uri=" + s.uri(), "--rw=" + rw, "--bs=4k", "--iodepth=16", "--offset=56M", "--size=6M", "--minimal", "--aux-path=" + state}, more...)...)
	}
	other("randwrite", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1")
	other("randtrim")
	qemuRead(t, s.uri(), "read -P 0 56M 6M")
	s.kill()
	s = serve()
	job(s, "--verify_only")
	qemuRead(t, s.uri(), "read -P 0 56M 6M")
	s.term()
	dir = filepath.Join(t.TempDir(), "other")
	s = serve()
	if out, err := exec.Command("fio", args(s, "--verify_only")...).CombinedOutput(); err == nil {
		t.Errorf("fio is content with an image that it has not written to: %s", out)
	}
	s.term()
}

// libnbd's own requests, among them those that fio does not make, by four connections of
// several processes: writes with and without FUA, zeroes with and without holes, trims and
// flushes. Each keeps a copy of its part, and reads it all the time.
func TestLibnbdWritesOverlay(t *testing.T) {
	t.Parallel()
	image := layoutImage(t)
	dir, cache := filepath.Join(t.TempDir(), "overlay"), cacheDir(t)
	serve := func() *server {
		t.Helper()
		return serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", dir)
	}
	s := serve()
	copies := t.TempDir()
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			nbdsh(t, fmt.Sprintf(`
import random
h = nbd.NBD()
h.connect_uri(%q)
rng = random.Random(%d)
base, size = %d << 20, 4 << 20
have = bytearray(h.pread(size, base))
for step in range(1500):
    n = rng.choice([512, 4096, 4096, 65536, rng.randrange(1, 300000)])
    at = rng.randrange(0, size - n)
    if rng.random() < 0.5:
        at &= ~4095
    k = rng.randrange(12)
    if k < 5:
        p = rng.randbytes(n)
        h.pwrite(p, base + at, nbd.CMD_FLAG_FUA if k == 0 else 0)
        have[at:at+n] = p
    elif k < 8:
        h.zero(n, base + at, [0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA][k - 5])
        have[at:at+n] = bytes(n)
    elif k == 8:
        h.trim(n, base + at, 0)
        have[at:at+n] = h.pread(n, base + at) # zeros, or what was there
    elif k == 9:
        h.flush()
    else:
        assert h.pread(n, base + at) == have[at:at+n], (step, at, n)
assert h.pread(size, base) == have
h.flush()
open(%q, "wb").write(have)
`, s.uri(), i, 8+4*i, filepath.Join(copies, fmt.Sprint(i))))
		})
	}
	wg.Wait()
	s.kill()
	s = serve()
	for i := range 4 {
		nbdsh(t, fmt.Sprintf(`
h = nbd.NBD()
h.connect_uri(%q)
assert h.pread(4 << 20, %d << 20) == open(%q, "rb").read()
`, s.uri(), 8+4*i, filepath.Join(copies, fmt.Sprint(i))))
	}
	s.term()
}

// Whole images are copied into an overlay, by nbdcopy's four connections and by qemu-img.
func TestCopyIntoOverlay(t *testing.T) {
	t.Parallel()
	need(t, "nbdcopy", "qemu-img")
	image := layoutImage(t)
	cache := cacheDir(t)
	content := filepath.Join(t.TempDir(), "content")
	p := random(5, 64<<20)
	clear(p[8<<20 : 20<<20])
	if err := os.WriteFile(content, p, 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "fallocate", "--dig-holes", content)
	for _, copier := range [][]string{
		{"nbdcopy", "--connections=4", "--requests=32", "--flush", content},
		{"nbdcopy", "--connections=4", "--destination-is-zero", "--synchronous", content},
		{"qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "16", content},
	} {
		dir := filepath.Join(t.TempDir(), "overlay")
		s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", dir)
		uri := s.uri()
		if copier[0] == "nbdcopy" && copier[2] == "--destination-is-zero" {
			qemuWrite(t, uri, "write -z 0 64M")
		}
		tool(t, copier[0], append(copier[1:], uri)...)
		s.kill()
		s = serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", dir)
		tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", content, s.uri())
		s.term()
	}
}
