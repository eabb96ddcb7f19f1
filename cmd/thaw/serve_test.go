package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// device brings what an export reads as to a file.
func device(t testing.TB, uri string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "device")
	tool(t, "nbdcopy", uri, out)
	return out
}

// sample is an image of two layers. Nothing changes it, so it is made once.
func sample(t testing.TB) v1.Image {
	t.Helper()
	sampleImage.Lock()
	defer sampleImage.Unlock()
	if sampleImage.Image == nil {
		sampleImage.Image = imageOf(t,
			layerOf(t, files(1, "base", 150)...),
			layerOf(t, append(files(2, "app", 60), file{name: "big", data: random(3, 3<<20)})...))
	}
	return sampleImage.Image
}

var sampleImage struct {
	sync.Mutex
	v1.Image
}

// The whole way, with programs that others wrote: an ordinary image in a
// registry, built beside itself, served by its ordinary name, read by nbdcopy
// and qemu-img, and sound to e2fsck.
func TestBuildAndServe(t *testing.T) {
	t.Parallel()
	need(t, "nbdcopy", "nbdinfo", "qemu-img", "e2fsck")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, sample(t))
	must(t, "build", ref)
	p.take()

	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--fetch-ahead", "none")
	var blobs []string
	for _, r := range p.take() {
		if strings.HasPrefix(r, "GET") && strings.Contains(r, "/blobs/") {
			blobs = append(blobs, r)
		}
	}
	if len(blobs) > 2 {
		t.Errorf("before the export was ready these blobs were fetched, not just the index and the config:\n%s", strings.Join(blobs, "\n"))
	}
	if e := s.ready.Exports[0]; e.Name != ref || e.Size != 8<<30 {
		t.Errorf("%+v", e)
	}
	info := tool(t, "nbdinfo", "--list", "--json", strings.Replace(s.uri(), "///", "///", 1))
	if !strings.Contains(info, ref) {
		t.Errorf("nbdinfo does not list the image by its name:\n%s", info)
	}
	before := p.fetched()
	if before != 0 {
		t.Errorf("%d bytes of chunks were fetched before the first read", before)
	}
	img := device(t, s.uri())
	if out := tool(t, "e2fsck", "-fn", img); strings.Contains(out, "Fix") {
		t.Error(out)
	}
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", img, s.uri())
	var in inspected
	if err := json.Unmarshal([]byte(must(t, "inspect", "--json", ref)), &in); err != nil {
		t.Fatal(err)
	}
	if n := p.fetched(); n > in.Stored {
		t.Errorf("%d bytes were fetched, the image has %d", n, in.Stored)
	}
	sum, code := s.term()
	p.settle(t)
	if n := p.fetched(); code != exitOK || int64(sum["fetched_bytes"].(float64)) != n {
		t.Errorf("exit %d, %v; the proxy has seen %d bytes", code, sum, n)
	}
	must(t, "verify", ref)
}

// A program that checksums what it wrote finds it on the device: fio.
func TestFioVerify(t *testing.T) {
	t.Parallel()
	need(t, "fio")
	const size = 8 << 20
	dir := t.TempDir()
	make := func(content []byte) (string, int64) {
		t.Helper()
		src, dst := filepath.Join(dir, "src.tar"), "oci:"+filepath.Join(dir, "dst")+":x"
		saveArchive(t, src, imageOf(t, layerOf(t, file{name: "fio", data: content})))
		must(t, "build", "--size", "128M", "docker-archive:"+src, dst)
		b, err := finderOf(t).Find(t.Context(), dst)
		if err != nil {
			t.Fatal(err)
		}
		last := b.Index.Runs[len(b.Index.Runs)-1]
		if last.Stream != 1 || int64(last.Count)*blockmap.BlockSize != size {
			t.Fatalf("the file is not one run: %+v", last)
		}
		return dst, int64(last.Device) * blockmap.BlockSize
	}
	// The layout depends on sizes alone, so the place is known beforehand.
	_, at := make(random(1, size))
	written := filepath.Join(dir, "written")
	job := []string{"--name=v", "--bs=4k", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", fmt.Sprintf("--offset=%d", at), fmt.Sprintf("--size=%d", size), "--minimal"}
	tool(t, "fio", append(job, "--filename="+written, "--rw=write", "--do_verify=0", "--ioengine=psync")...)
	b, err := os.ReadFile(written)
	if err != nil {
		t.Fatal(err)
	}
	dst, again := make(b[at : at+size])
	if again != at {
		t.Fatalf("the file has moved from %d to %d", at, again)
	}
	s := serving(t, dst, "--listen", "unix:"+socket(t), "--cache", t.TempDir())
	tool(t, "fio", append(job, "--ioengine=nbd", "--uri="+s.uri(), "--rw=read", "--iodepth=32", "--do_verify=1", "--verify_only")...)
}

// kill -9 at any point loses nothing that was complete, and nothing is ever
// wrong.
func TestKillAndRestart(t *testing.T) {
	t.Parallel()
	need(t, "nbdcopy", "qemu-img")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, imageOf(t, layerOf(t, append(files(1, "base", 150), file{name: "big", data: random(3, 24<<20)})...)))
	const chunk = 128 << 10
	must(t, "build", "--size", "128M", "--chunk-size", "128K", ref)
	var in inspected
	if err := json.Unmarshal([]byte(must(t, "inspect", "--json", ref)), &in); err != nil {
		t.Fatal(err)
	}
	p.set(func(http.ResponseWriter, *http.Request) bool { time.Sleep(5 * time.Millisecond); return true })
	cache := t.TempDir()
	rng := rand.New(rand.NewPCG(1, 1))
	const kills = 8
	for range kills {
		s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache, "--fetch-ahead", "none")
		// One request at a time, and nothing ahead of it, so that it is known how much is under way.
		read := exec.Command("nbdcopy", "--connections=1", "--requests=1", s.uri(), "null:")
		if err := read.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rng.IntN(200)) * time.Millisecond) // the point that it is killed at
		s.kill()
		read.Wait()
	}
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", device(t, s.uri()), s.uri())
	s.term()
	// What was under way at a kill may come again: a request of nbdcopy, of
	// 256 KiB, and the rest of the chunks that it touches. What was complete
	// does not.
	p.settle(t)
	fetched := p.fetched()
	if most := in.Stored + kills*(256<<10+2*chunk); fetched > most {
		t.Errorf("%d bytes were fetched for an image of %d and %d kills", fetched, in.Stored, kills)
	}
	t.Logf("%d bytes were fetched for an image of %d and %d kills", fetched, in.Stored, kills)
	s = serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache)
	tool(t, "nbdcopy", s.uri(), "null:")
	s.kill()
	s = serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache)
	tool(t, "nbdcopy", s.uri(), "null:")
	if sum, code := s.term(); code != exitOK || sum["requests"].(float64) != 0 {
		t.Errorf("all was here, and %v chunks were fetched again (exit %d)", sum["requests"], code)
	}
	if n := p.fetched(); n != fetched {
		t.Errorf("%d bytes were fetched again", n-fetched)
	}
}

// With everything here, a restart needs neither registry nor credentials; with
// something missing it serves what there is while the registry is down.
func TestServeWithoutTheRegistry(t *testing.T) {
	t.Parallel()
	need(t, "nbdcopy")
	storage := t.TempDir()
	reg := startRegistry(t, "", storage, "")
	ref := reg.addr + "/team/app:v1"
	push(t, ref, sample(t))
	must(t, "build", "--size", "128M", ref)
	cache := t.TempDir()
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache)
	s.term()
	reg.stop()

	s = serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache)
	if !s.said("serving from the cache alone") {
		t.Errorf("it does not say so:\n%s", s.stderr.String())
	}
	back := startRegistry(t, reg.addr, storage, "")
	img := device(t, s.uri()) // fetched now that the registry is back
	s.term()
	back.stop()

	s = serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", img, s.uri())
	s.term()

	// The registry is there again and knows us no more.
	htpasswd := filepath.Join(t.TempDir(), "htpasswd")
	// bcrypt of "secret"
	if err := os.WriteFile(htpasswd, []byte("thaw:$2y$05$VHq8SJMhV1KQs5eJJVQTcOQZPXJ7KVXX8lOQvGXd/1xTZgqc2XEwi\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	startRegistry(t, reg.addr, storage, htpasswd)
	s = serving(t, ref, "--listen", "unix:"+socket(t), "--cache", cache)
	tool(t, "nbdcopy", s.uri(), "null:")
	s.term()
	if s := launch(t, nil, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir()); s.isReady() {
		t.Error("an image that may not be read is served from an empty cache")
	} else if <-s.done; !s.said("not authorized") {
		t.Errorf("unauthorised: %s", s.stderr.String())
	}
}

// What the registry has lost or cannot give in time is an I/O error for who
// reads it, and everything else is served.
func TestReadErrors(t *testing.T) {
	t.Parallel()
	need(t, "nbdcopy", "qemu-io")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, sample(t))
	must(t, "build", "--size", "128M", ref)
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--fetch-ahead", "none")
	lost := true
	p.set(func(w http.ResponseWriter, r *http.Request) bool {
		if lost && r.Header.Get("Range") != "" {
			http.Error(w, "gone", http.StatusNotFound)
			return false
		}
		return true
	})
	out, err := exec.Command("qemu-io", "-r", "-f", "raw", "-c", "read 0 4096", s.uri()).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "Input/output error") {
		t.Errorf("a read of what is lost: %v\n%s", err, out)
	}
	p.set(nil)
	tool(t, "qemu-io", "-r", "-f", "raw", "-c", "read 0 4096", s.uri())
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d", code)
	}
}

// A full disk is an error for who reads more, not the end of the server.
func TestFullCacheDisk(t *testing.T) {
	need(t, "nbdcopy", "qemu-io", "mount")
	if os.Getuid() != 0 {
		t.Skip("not root: cannot make a small disk")
	}
	dir := t.TempDir()
	oci := "oci:" + filepath.Join(dir, "dst") + ":x"
	saveArchive(t, filepath.Join(dir, "src.tar"), sample(t))
	must(t, "build", "--size", "128M", "docker-archive:"+filepath.Join(dir, "src.tar"), oci)
	cache := filepath.Join(dir, "cache")
	if err := os.Mkdir(cache, 0o700); err != nil {
		t.Fatal(err)
	}
	tool(t, "mount", "-t", "tmpfs", "-o", "size=3m,mode=700", "tmpfs", cache)
	t.Cleanup(func() { exec.Command("umount", "-l", cache).Run() })
	s := serving(t, oci, "--listen", "unix:"+socket(t), "--cache", cache)
	// The disk of 3 MiB makes room again and again: nothing is lost, since
	// what was read longest ago goes.
	tool(t, "qemu-io", "-r", "-f", "raw", "-c", "read 0 4096", s.uri())
	out, err := exec.Command("nbdcopy", s.uri(), "null:").CombinedOutput()
	tool(t, "qemu-io", "-r", "-f", "raw", "-c", "read 0 4096", s.uri())
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d:\n%s", code, s.stderr.String())
	}
	// With many reads at once there may have been no room for one of them.
	if err != nil && !strings.Contains(s.stderr.String(), "the disk of the cache is full") {
		t.Errorf("%s\n%s", out, s.stderr.String())
	}
}

func TestReadyIsAnnounced(t *testing.T) {
	dir := t.TempDir()
	oci := "oci:" + filepath.Join(dir, "dst") + ":x"
	saveArchive(t, filepath.Join(dir, "src.tar"), imageOf(t, layerOf(t, files(1, "a", 3)...)))
	must(t, "build", "--size", "128M", "docker-archive:"+filepath.Join(dir, "src.tar"), oci)
	notify := socket(t)
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	sock := socket(t)
	s := launch(t, []string{"NOTIFY_SOCKET=" + notify}, oci, "--listen", "unix:"+sock, "--listen", "tcp:127.0.0.1:0", "--cache", filepath.Join(dir, "cache"))
	if !s.isReady() || len(s.ready.Listen) != 2 || s.ready.Listen[0] != "unix:"+sock {
		t.Errorf("%+v\n%s", s.ready, s.stderr.String())
	}
	hear := func(want string) {
		t.Helper()
		b := make([]byte, 100)
		l.SetReadDeadline(time.Now().Add(atMost))
		n, err := l.Read(b)
		if err != nil || string(b[:n]) != want {
			t.Errorf("systemd hears %q, %v; want %q", b[:n], err, want)
		}
	}
	hear("READY=1")
	if _, code := s.term(); code != exitOK {
		t.Errorf("exit %d", code)
	}
	hear("STOPPING=1")
	if _, err := os.Stat(sock); err == nil {
		t.Error("the socket is left behind")
	}
}

// A read under way at SIGTERM is answered.
func TestTermFinishesWhatIsInFlight(t *testing.T) {
	need(t, "qemu-io")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, sample(t))
	must(t, "build", "--size", "128M", ref)
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--fetch-ahead", "none")
	asked, release := make(chan bool, 100), make(chan bool)
	p.set(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") != "" {
			asked <- true
			<-release
		}
		return true
	})
	var out bytes.Buffer
	read := exec.Command("qemu-io", "-r", "-f", "raw", "-c", "read 0 4096", s.uri())
	read.Stdout, read.Stderr = &out, &out
	if err := read.Start(); err != nil {
		t.Fatal(err)
	}
	<-asked
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(atMost); ; time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial("unix", strings.TrimPrefix(s.ready.Listen[0], "unix:")); err != nil {
			break // it listens no more: the signal has arrived
		} else if c.Close(); time.Now().After(deadline) {
			t.Fatal("the server takes connections after SIGTERM")
		}
	}
	close(release)
	if err := read.Wait(); err != nil || !strings.Contains(out.String(), "read 4096/4096") {
		t.Errorf("the read in flight: %v\n%s", err, out.String())
	}
	<-s.done
	if code := s.cmd.ProcessState.ExitCode(); code != exitOK {
		t.Errorf("exit %d", code)
	}
}

// The requests that a client has under way on one connection are under way at
// the origin as well: it answers none before it has 28 of the 32.
func TestManyInFlightOnOneConnection(t *testing.T) {
	t.Parallel()
	need(t, "fio")
	reg := startRegistry(t, "", t.TempDir(), "")
	p := startProxy(t, reg.addr)
	ref := p.host() + "/team/app:v1"
	push(t, ref, imageOf(t, layerOf(t, file{name: "big", data: random(1, 16<<20)})))
	must(t, "build", "--size", "64M", "--chunk-size", "64K", ref)
	s := serving(t, ref, "--listen", "unix:"+socket(t), "--cache", t.TempDir(), "--fetch-ahead", "none")
	var now atomic.Int64
	enough := make(chan struct{})
	p.set(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") != "" {
			if now.Add(1) == 28 {
				close(enough)
			}
			select {
			case <-enough:
			case <-time.After(atMost):
				t.Errorf("%d requests are under way, and no more come", now.Load())
			}
		}
		return true
	})
	// A block of each chunk, in no order.
	tool(t, "fio", "--name=x", "--ioengine=nbd", "--uri="+s.uri(), "--rw=randread", "--bs=4k", "--blockalign=64k",
		"--iodepth=32", "--offset=8M", "--size=8M", "--io_size=512k", "--minimal")
}
