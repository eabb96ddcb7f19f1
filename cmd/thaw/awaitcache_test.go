package main

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"thaw/blockmap"
)

// The server that thaw mount has started has the cache for a moment after thaw umount. A
// commit or a server that comes right then waits for its end, and says so. For a server that
// stays, nobody waits.
func TestTheCacheIsAwaited(t *testing.T) {
	const waits = "waiting for the process that uses the cache, which is about to end"
	image := layoutImage(t)
	overlay, cache, dst := filepath.Join(t.TempDir(), "overlay"), cacheDir(t), "oci:"+t.TempDir()+":changed"
	s := serving(t, image, "--listen", "unix:"+socket(t), "--cache", cache, "--overlay", overlay)
	qemuWrite(t, s.as(image), "write -P 3 8M 4k")
	s.term()
	// A server that ends when the other one waits for it: nobody uses it.
	ending := func() *server { return serving(t, "--nodes-only", "--exit-unused", "1h", "--cache", cache) }
	s = ending()
	commit := asProgram("commit", overlay, dst, "--cache", cache, "--crash-consistent")
	var said syncBuffer
	commit.Stderr = &said
	check(t, startWithUs(commit))
	until(t, "the commit waits", func() bool { return strings.Contains(said.String(), waits) })
	time.Sleep(cacheWait + 100*time.Millisecond) // longer than for a process that does not say what it is
	s.term()
	if err := commit.Wait(); err != nil {
		t.Errorf("%v, %s", err, said.String())
	}
	s = ending()
	next := asProgram("serve", image, "--listen", "unix:"+socket(t), "--cache", cache)
	var nextSaid syncBuffer
	next.Stderr = &nextSaid
	check(t, startWithUs(next))
	t.Cleanup(func() { next.Process.Kill() })
	until(t, "the next server waits", func() bool { return strings.Contains(nextSaid.String(), waits) })
	s.term()
	until(t, "the next server serves", func() bool {
		out, _, _ := thaw(t, "status", "--cache", cache)
		return strings.Contains(out, "server    serving")
	})
	check(t, next.Process.Signal(syscall.SIGTERM))
	if err := next.Wait(); err != nil {
		t.Errorf("%v, %s", err, nextSaid.String())
	}

	// A process that has the cache and does not say what it is.
	lock, err := blockmap.OS.Lock(filepath.Join(cache, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	before := cacheWait
	t.Cleanup(func() { cacheWait = before })
	cacheWait = 300 * time.Millisecond
	if _, stderr, code := thaw(t, "commit", overlay, dst+"-2", "--cache", cache); code != exitError || !strings.Contains(stderr, "stop the server that uses it") || !strings.Contains(stderr, waits) {
		t.Errorf("exit %d, %s", code, stderr)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}

	// A server that stays, or that somebody uses.
	cacheWait = time.Hour
	for _, args := range [][]string{
		{"--nodes-only", "--cache", cache},
		{image, "--listen", "unix:" + socket(t), "--exit-unused", "10m", "--cache", cache},
	} {
		s = serving(t, args...)
		for _, c := range [][]string{{"commit", overlay, dst + "-2", "--cache", cache}, {"serve", image, "--cache", cache}} {
			if _, stderr, code := thaw(t, c...); code != exitError || strings.Contains(stderr, "waiting") || !strings.Contains(stderr, "in use by another process; ") {
				t.Errorf("exit %d, %s", code, stderr)
			}
		}
		s.term()
	}
}
