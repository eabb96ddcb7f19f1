package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-containerregistry/pkg/v1/layout"
	"golang.org/x/sys/unix"

	"thaw/blockmap/blocktest"
)

// The tests in this file run on each driver that the host has: FUSE as a rule.
// scripts/guest-nodes runs them in a virtual machine whose kernel has ublk and nbd.
var (
	driversFlag = flag.String("drivers", "fuse", "drivers of nodes to test, separated by commas")
	stallFlag   = flag.Duration("stall", 3*time.Second, "how long the registry says nothing in TestNodeStall; less than the minute after which a read fails")
)

// eachDriver runs a test on each driver, with an image in an OCI layout.
func eachDriver(t *testing.T, f func(t *testing.T, b *nodeBed, driver string)) {
	for driver := range strings.SplitSeq(*driversFlag, ",") {
		t.Run(driver, func(t *testing.T) { f(t, newLayoutBed(t), driver) })
	}
}

// nodeLayout is an OCI layout with the image of all layout beds. TestMain removes it.
var nodeLayout nodeStorage

// layoutFiles are the files of this image: 60 small ones, and 12 of 1 MiB.
var layoutFiles = sync.OnceValue(func() []file {
	all := append(files(1, "a", 60), file{name: "data/"})
	for i := range 12 {
		all = append(all, file{name: fmt.Sprint("data/", i), data: random(uint64(i), 1<<20)})
	}
	return all
})

// pushLayout brings the built image from the layout to a registry, as it is: thaw build would
// wait for docker-registry's list of referrers, which a slow machine takes long for.
func pushLayout(t testing.TB, ref string) {
	t.Helper()
	ix, err := layout.ImageIndexFromPath(nodeLayout.dir + "/image")
	if err != nil {
		t.Fatal(err)
	}
	m, err := ix.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range m.Manifests {
		if d.Annotations["org.opencontainers.image.ref.name"] == "app" {
			img, err := ix.Image(d.Digest)
			if err != nil {
				t.Fatal(err)
			}
			push(t, ref, img)
			return
		}
	}
	t.Fatal("the layout has no image")
}

// newLayoutBed is a nodeBed without a registry.
func newLayoutBed(t *testing.T) *nodeBed {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("nodes require root")
	}
	need(t, "e2fsck")
	t.Setenv(asThaw, "1") // for the servers that commands start
	nodeLayout.once.Do(func() {
		var err error
		if nodeLayout.dir, err = os.MkdirTemp("", "thaw"); err != nil {
			t.Fatal(err)
		}
		copyLayout(t, filepath.Join(nodeLayout.dir, "src"), "app", imageOf(t, layerOf(t, layoutFiles()...)))
		must(t, "build", "--size", "96M", "oci:"+nodeLayout.dir+"/src:app", "oci:"+nodeLayout.dir+"/image:app")
	})
	b := &nodeBed{t: t, image: "oci:" + nodeLayout.dir + "/image:app", cache: cacheDir(t), dir: t.TempDir()}
	t.Cleanup(b.clean)
	return b
}

// attach attaches the image of b.
func (b *nodeBed) attach(more ...string) string {
	b.t.Helper()
	return strings.TrimSpace(b.must(append([]string{"attach", b.image}, more...)...))
}

// check is what e2fsck says of the image of b with an overlay. With repair, it first does
// what a boot does: it replays the journal, and puts in order what its end has left.
func (b *nodeBed) check(repair bool, more ...string) {
	b.t.Helper()
	node := b.attach(more...)
	defer b.must("detach", node)
	if repair {
		if out, err := exec.Command("e2fsck", "-fp", node).CombinedOutput(); err != nil && exitCode(err) > 1 {
			b.t.Errorf("e2fsck -fp: %v\n%s", err, out)
		}
	}
	if out, err := exec.Command("e2fsck", "-fn", node).CombinedOutput(); err != nil {
		b.t.Errorf("e2fsck: %v\n%s", err, out)
	}
}

// untilServerEnds waits until the server of b has ended.
func (b *nodeBed) untilServerEnds() {
	b.t.Helper()
	until(b.t, "the server ends", func() bool { return len(b.servers()) == 0 })
}

// fio writes to a node, verifies what it reads, discards, and finds all of it again when the
// node is attached anew.
func TestNodeFio(t *testing.T) {
	need(t, "fio")
	size := int64(12 << 20)
	if testing.Short() {
		size = 4 << 20
	}
	eachDriver(t, func(t *testing.T, b *nodeBed, driver string) {
		more := []string{"--driver", driver, "--overlay", filepath.Join(t.TempDir(), "overlay")}
		node := b.attach(more...)
		fio := func(args ...string) {
			t.Helper()
			args = append([]string{"--name=v", "--filename=" + node, "--direct=1", "--ioengine=libaio", "--iodepth=16", fmt.Sprint("--size=", size), "--thread"}, args...)
			cmd := exec.Command("fio", args...)
			cmd.Dir = t.TempDir() // it leaves a file there
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("fio %s: %v\n%s", strings.Join(args, " "), err, out)
			}
		}
		verify := []string{"--bsrange=4k-128k", "--verify=crc32c", "--verify_fatal=1"}
		fio(append(verify, "--rw=write", "--do_verify=1")...)
		fio("--rw=randtrim", "--bs=64k")
		f, err := os.OpenFile(node, os.O_RDONLY|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		p := directBuffer(1 << 20)
		for off := int64(0); off < size; off += int64(len(p)) {
			if _, err := f.ReadAt(p, off); err != nil || slices.ContainsFunc(p, func(c byte) bool { return c != 0 }) {
				t.Errorf("discarded bytes at %d are not zeros, or %v", off, err)
				break
			}
		}
		f.Close()
		fio(append(verify, "--rw=randwrite", "--do_verify=1", "--fsync=32")...)
		b.must("detach", node)
		b.untilServerEnds()
		node = b.attach(more...)
		fio(append(verify, "--rw=randwrite", "--verify_only=1")...)
		b.must("detach", node)
	})
}

// directBuffer is memory for O_DIRECT.
func directBuffer(n int) []byte {
	p := make([]byte, n+4096)
	skip := -int(uintptr(unsafe.Pointer(&p[0]))) & 4095
	return p[skip : skip+n : skip+n]
}

// The filesystem of a node is used as others are: files change at random, stress-ng verifies
// what it does, and all is there when it is mounted again.
func TestNodeFilesystem(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *nodeBed, driver string) {
		more := []string{"--driver", driver, "--overlay", filepath.Join(t.TempDir(), "overlay")}
		b.mount(more...)
		x := newTree(filepath.Join(b.dir, "new"), 5)
		if err := os.Mkdir(x.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		steps, lasts := 300, 3*time.Second
		if testing.Short() {
			steps, lasts = 100, time.Second
		}
		for range steps {
			if err := x.step(); err != nil {
				t.Fatal(err)
			}
		}
		stress(t, b.dir, lasts)
		b.must("umount", b.dir)
		b.untilServerEnds()
		b.check(false, more...)
		b.mount(more...)
		x.compare(t, x.dir)
		for _, f := range layoutFiles() {
			if got, err := os.ReadFile(filepath.Join(b.dir, f.name)); !strings.HasSuffix(f.name, "/") && (err != nil || !bytes.Equal(got, f.data)) {
				t.Errorf("%s of the image: %v", f.name, err)
			}
		}
		b.must("umount", b.dir)
	})
}

// serve starts a server for the nodes of b that is not the one of a command.
func (b *nodeBed) serve(more ...string) *exec.Cmd {
	b.t.Helper()
	cmd := asProgram(append([]string{"serve", "--nodes-only", "--complete", "off", "--cache", b.cache}, more...)...)
	cmd.Stderr = new(syncBuffer)
	if err := startWithUs(cmd); err != nil {
		b.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	b.t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		if b.t.Failed() {
			b.t.Logf("a server:\n%s", cmd.Stderr)
		}
	})
	until(b.t, "the server answers", func() bool { _, _, code := b.run("status"); return code == exitOK })
	return cmd
}

// churn is a load on a mounted filesystem: readers that read past the page cache, and
// writers that flush.
type churn struct {
	wg      sync.WaitGroup
	stop    chan struct{}
	done    atomic.Int64
	longest atomic.Int64 // ns
	mu      sync.Mutex
	errs    []error
}

func newChurn(dir string) *churn {
	c := &churn{stop: make(chan struct{})}
	for i := range 2 {
		c.run(func(int) error {
			f, err := os.OpenFile(filepath.Join(dir, layoutFiles()[1+i].name), os.O_RDONLY|unix.O_DIRECT, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.Read(directBuffer(64 << 10))
			return err
		})
		c.run(func(n int) error {
			f, err := os.Create(filepath.Join(dir, fmt.Sprintf("w%d-%d", i, n%4)))
			if err != nil {
				return err
			}
			_, err = f.Write(bytes.Repeat([]byte{byte(n)}, 100_000))
			return errors.Join(err, f.Sync(), f.Close())
		})
	}
	return c
}

func (c *churn) run(op func(n int) error) {
	c.wg.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-c.stop:
				return
			default:
			}
			began := time.Now()
			err := op(n)
			took := int64(time.Since(began))
			for old := c.longest.Load(); took > old && !c.longest.CompareAndSwap(old, took); old = c.longest.Load() {
			}
			if err != nil {
				c.mu.Lock()
				c.errs = append(c.errs, err)
				c.mu.Unlock()
				return
			}
			c.done.Add(1)
		}
	})
}

// more waits until the load has done more.
func (c *churn) more(t *testing.T, limit time.Duration) {
	t.Helper()
	was := c.done.Load()
	for end := time.Now().Add(limit); c.done.Load() < was+40; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d operations in %v", c.done.Load()-was, limit)
		}
	}
}

// end returns the longest time that an operation took, and fails the test if one failed.
func (c *churn) end(t *testing.T) time.Duration {
	t.Helper()
	close(c.stop)
	c.wg.Wait()
	for _, err := range c.errs {
		t.Errorf("an operation failed: %v", err)
	}
	return time.Duration(c.longest.Load())
}

// The server is killed, and then told to end, under readers and writers of a mounted
// filesystem. Another server goes on, and nobody sees an error. With ublk everybody waits a
// moment; with nbd, what was in flight waits for the node's timeout, 70 s. (With fuse a
// mount is healed: see TestMountHealsWritable.)
func TestNodeRecovers(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *nodeBed, driver string) {
		if driver == "fuse" {
			return
		}
		// From when another server answers: how long a program takes to start is not its matter.
		limit := map[string]time.Duration{"ublk": 2 * time.Second, "nbd": 75 * time.Second}[driver]
		var without time.Duration
		more := []string{"--driver", driver, "--overlay", filepath.Join(t.TempDir(), "overlay")}
		b.mount(more...)
		c := newChurn(b.dir)
		c.more(t, atMost)
		signals := []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM}
		if driver == "nbd" {
			signals = signals[:1] // it waits for the timeout again
		}
		for _, signal := range signals {
			pids := b.servers()
			if len(pids) != 1 {
				t.Fatalf("%d servers", len(pids))
			}
			began := time.Now()
			if err := syscall.Kill(pids[0], signal); err != nil {
				t.Fatal(err)
			}
			b.untilServerEnds()
			b.serve("--exit-unused", "1s", "--grace", "100ms")
			without = max(without, time.Since(began))
			c.more(t, limit+atMost)
		}
		longest := c.end(t)
		t.Logf("%d operations, the longest took %v; without a server for %v", c.done.Load(), longest.Round(time.Millisecond), without.Round(time.Millisecond))
		if longest > without+limit {
			t.Errorf("an operation took %v: more than %v after the next server was there", longest, limit)
		}
		b.must("umount", b.dir)
		b.untilServerEnds()
		b.check(false, more...)
	})
}

// A server that attaches and detaches a hundred nodes is as it was before: it has no more
// files and sockets open, and the kernel has no more devices. (nbd/attach has such a test
// for its goroutines.)
func TestNodeRounds(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *nodeBed, driver string) {
		server := b.serve() // it does not complete the image meanwhile, which opens files
		pid := server.Process.Pid
		stays := b.attach("--driver", driver)
		round := func() {
			node := b.attach("--driver", driver)
			f, err := os.Open(node)
			if err == nil {
				_, err = f.ReadAt(make([]byte, 4096), 1024)
				f.Close()
			}
			if err != nil {
				t.Error(err)
			}
			b.must("detach", node)
		}
		for range 5 {
			round()
		}
		rounds := 100
		if testing.Short() {
			rounds = 25
		}
		before := counts(t, pid)
		began := time.Now()
		for range rounds {
			round()
		}
		t.Logf("%v a round", (time.Since(began) / time.Duration(rounds)).Round(100*time.Microsecond))
		var now map[string]int
		for end := time.Now().Add(atMost); ; time.Sleep(10 * time.Millisecond) {
			now = counts(t, pid)
			more := ""
			for what, n := range now {
				// Threads come and go as Go likes, on a busy machine more than on an idle one.
				if n > before[what] && (what != "threads" || n > before[what]+rounds/2) {
					more += " " + what
				}
			}
			if more == "" {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("there are more%s: %v before, %v now", more, before, now)
			}
		}
		b.must("detach", stays)
		b.terminate()
	})
}

// terminate ends a server of b.serve in order.
func (b *nodeBed) terminate() {
	b.t.Helper()
	for _, pid := range b.servers() {
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			b.t.Error(err)
		}
	}
	b.untilServerEnds()
}

// counts are what a leak would add to, of a server and of the kernel.
func counts(t *testing.T, pid int) map[string]int {
	t.Helper()
	n := make(map[string]int)
	for what, dir := range map[string]string{"descriptors": "fd", "threads": "task"} {
		all, err := os.ReadDir(fmt.Sprintf("/proc/%d/%s", pid, dir))
		if err != nil {
			t.Fatal(err)
		}
		n[what] = len(all)
		for _, e := range all {
			if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name())); what == "descriptors" && err == nil && strings.HasPrefix(to, "socket:") {
				n["sockets"]++
			}
		}
	}
	// Other programs of this host may have loop devices; nbd and ublk belong to the tests alone.
	for what, pattern := range map[string]string{"nbd": "/sys/block/nbd*/pid", "ublk": "/sys/block/ublkb*", "loop": "/sys/block/loop*/loop/backing_file"} {
		all, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range all {
			if what == "loop" {
				name, err := os.ReadFile(path)
				if err != nil || !strings.HasPrefix(string(name), fmt.Sprintf("/thaw-%d", pid)) {
					continue
				}
			}
			n[what]++
		}
	}
	return n
}

// A registry stops answering. Reads of what thaw has not fetched wait, others do not, a node
// whose reads wait is detached at once, and when the registry answers again, the reads that
// have waited get their bytes.
func TestNodeStall(t *testing.T) {
	need(t, "docker-registry")
	eachDriver(t, func(t *testing.T, b *nodeBed, driver string) {
		reg := startRegistry(t, "", t.TempDir(), "")
		b.proxy = startProxy(t, reg.addr)
		b.image = b.proxy.host() + "/team/app:v1"
		pushLayout(t, b.image)
		b.serve("--fetch-ahead", "none")
		b.mount("--driver", driver)
		other := b.attach("--driver", driver)
		if got, err := os.ReadFile(filepath.Join(b.dir, "data/1")); err != nil || !bytes.Equal(got, random(1, 1<<20)) {
			t.Fatalf("read: %v", err)
		}
		// The kernel has the inodes by then, and only the content has to be fetched.
		slow, err := os.Open(filepath.Join(b.dir, "data/9"))
		if err != nil {
			t.Fatal(err)
		}
		defer slow.Close()
		at := dataAt(t, b, "data/6")
		f, err := os.OpenFile(other, os.O_RDONLY|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()

		lift := b.proxy.silence()
		defer lift()
		b.proxy.take()
		asked := func() bool { return len(b.proxy.take()) > 0 }
		began := time.Now()
		waited := make(chan error, 1)
		go func() {
			got, err := io.ReadAll(slow)
			if err == nil && !bytes.Equal(got, random(9, 1<<20)) {
				err = errors.New("wrong bytes")
			}
			waited <- err
		}()
		until(t, "the registry is asked", asked)
		if _, err := f.ReadAt(directBuffer(4096), 0); err != nil {
			t.Errorf("a hit while others wait: %v", err)
		}
		b.proxy.take()
		failed := make(chan error, 1)
		go func() {
			_, err := f.ReadAt(directBuffer(4096), at)
			failed <- err
		}()
		until(t, "the registry is asked for another node", asked)
		leaving := time.Now()
		detached := make(chan string, 1)
		go func() {
			_, said, code := b.run("detach", other)
			if code == exitOK {
				said = ""
			}
			detached <- said
		}()
		select {
		case err := <-failed:
			if !errors.Is(err, unix.EIO) {
				t.Errorf("a read of a node that was detached: %v", err)
			}
		case <-time.After(atMost):
			t.Error("a read of a node that is being detached goes on waiting")
		}
		f.Close() // a loop device goes with its last user
		if said := <-detached; said != "" {
			t.Errorf("detach a node whose reads wait: %s", said)
		}
		if took := time.Since(leaving); took > 30*time.Second { // the read would wait for a minute
			t.Errorf("a node whose reads wait was detached in %v", took)
		}
		select {
		case err := <-waited:
			t.Errorf("a read did not wait for the registry: %v, after %v", err, time.Since(began))
		case <-time.After(*stallFlag - time.Since(began)):
		}
		lift()
		select {
		case err := <-waited:
			t.Logf("a read has waited for %v", time.Since(began).Round(time.Millisecond))
			if err != nil {
				t.Errorf("it fails: %v", err)
			}
		case <-time.After(atMost):
			t.Error("a read goes on waiting although the registry answers")
		}
		slow.Close()
		b.must("umount", b.dir)
		b.terminate()
	})
}

// dataAt is where the bytes of a file of b's filesystem are on its node: FIBMAP says.
func dataAt(t *testing.T, b *nodeBed, name string) int64 {
	f, err := os.Open(filepath.Join(b.dir, name))
	if err != nil {
		t.Error(err)
		return 0
	}
	defer f.Close()
	var block int32
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), 1 /* FIBMAP */, uintptr(unsafe.Pointer(&block))); e != 0 {
		t.Errorf("FIBMAP: %v", e)
	}
	return int64(block) * 4096
}

// smallDisk is an ext4 filesystem for an overlay, most of which is full.
func smallDisk(t *testing.T) (dir string, room func() error) {
	t.Helper()
	need(t, "mkfs.ext4")
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 48<<20); err != nil {
		t.Fatal(err)
	}
	tool(t, "mkfs.ext4", "-q", "-m", "0", file)
	disk, _ := blocktest.Mount(t, file, "ext4", false)
	other := filepath.Join(disk, "other")
	if err := os.WriteFile(other, random(1, 28<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(disk, "overlay"), func() error { return os.Remove(other) }
}

// The disk of an overlay gets full. A writer of the node is told so: with ENOSPC, or, where
// the kernel's driver has only that, with EIO. What was written before stays.
func TestNodeFullDisk(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *nodeBed, driver string) {
		overlay, room := smallDisk(t)
		more := []string{"--driver", driver, "--overlay", overlay}
		node := b.attach(more...)
		f, err := os.OpenFile(node, os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		const piece = 1 << 20
		block := func(i int64) []byte {
			p := directBuffer(piece)
			copy(p, random(uint64(i), piece))
			return p
		}
		at := int64(32 << 20) // behind the filesystem's metadata
		var n int64
		for ; n < 60; n++ {
			if _, err = f.WriteAt(block(n), at+n*piece); err != nil {
				break
			}
		}
		want := unix.ENOSPC
		if driver == "nbd" {
			want = unix.EIO
		}
		if !errors.Is(err, want) || n < 4 {
			t.Errorf("after %d MiB, a writer sees %v; want %v", n, err, want)
		}
		check := func() {
			t.Helper()
			for i := range n {
				p := directBuffer(piece)
				if _, err := f.ReadAt(p, at+i*piece); err != nil || !bytes.Equal(p, block(i)) {
					t.Errorf("MiB %d was written: wrong bytes, or %v", i, err)
				}
			}
		}
		check()
		if err := room(); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(block(n), at+n*piece); err != nil {
			t.Errorf("a write with room again: %v", err)
		}
		n++
		check()
		if err := f.Sync(); err != nil {
			t.Errorf("flush: %v", err)
		}
		f.Close()
		b.must("detach", node)
		b.untilServerEnds()
		node = b.attach(more...)
		if f, err = os.OpenFile(node, os.O_RDWR|unix.O_DIRECT, 0); err != nil {
			t.Fatal(err)
		}
		check()
		f.Close()
		b.must("detach", node)
	})
}

// The disk of an overlay gets full under a mounted filesystem: the writer gets an error, what
// was durable stays, and with more room the filesystem is mounted again and goes on.
func TestNodeFilesystemFullDisk(t *testing.T) {
	eachDriver(t, func(t *testing.T, b *nodeBed, driver string) {
		overlay, room := smallDisk(t)
		more := []string{"--driver", driver, "--overlay", overlay}
		b.mount(more...)
		durable := full(t, b.dir)
		if len(durable) < 10 {
			t.Errorf("only %d files were durable", len(durable))
		}
		b.giveUp()
		if err := room(); err != nil {
			t.Fatal(err)
		}
		b.check(true, more...)
		b.mount(more...)
		b.has(durable)
		if err := os.WriteFile(filepath.Join(b.dir, "more"), random(9, 4<<20), 0o644); err != nil {
			t.Error(err)
		}
		b.must("umount", b.dir)
		b.check(false, more...)
	})
}

// giveUp unmounts a filesystem whose disk has failed: what was not durable may be lost, and
// umount says so.
func (b *nodeBed) giveUp() {
	b.t.Helper()
	_, said, code := b.run("umount", b.dir)
	if _, mounted, err := mountedAt(b.dir); mounted || err != nil {
		b.t.Fatalf("umount: exit %d, it is still mounted: %s", code, said)
	}
	b.untilServerEnds()
}

// has fails unless the mounted filesystem has these files.
func (b *nodeBed) has(files map[string][]byte) {
	b.t.Helper()
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(b.dir, name)); err != nil || !bytes.Equal(got, want) {
			b.t.Errorf("%s was durable: %d bytes of %d, %v", name, len(got), len(want), err)
		}
	}
}
