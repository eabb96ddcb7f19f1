package attach

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
)

// The tests run on each driver that this host has: FUSE as a rule. scripts/guest-attach
// runs them in a virtual machine whose kernel has ublk and nbd.
var driversFlag = flag.String("drivers", "fuse", "drivers to test, separated by commas")

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == serveVerb {
		serveMain(os.Args[2:])
		return
	}
	flag.Parse()
	os.Exit(m.Run())
}

// nbdByIoctl is the driver NBD in tests that do without netlink.
const nbdByIoctl Driver = "nbd-ioctl"

// by returns o with a driver.
func by(d Driver, o Options) Options {
	o.Driver = d
	if d == nbdByIoctl {
		o.Driver, o.ioctl = NBD, true
	}
	return o
}

// each runs a test on each driver.
func each(t *testing.T, f func(t *testing.T, d Driver)) {
	if os.Geteuid() != 0 {
		t.Skip("nodes require root")
	}
	for _, name := range strings.Split(*driversFlag, ",") {
		d := Driver(name)
		if _, err := ParseDriver(name); err != nil && d != nbdByIoctl {
			t.Fatal(err)
		}
		t.Run(name, func(t *testing.T) { f(t, d) })
	}
}

const testSize = 16 << 20

// pattern is what is at off of a test's device. It must not be written to.
func pattern(off, n int64) []byte { return allPattern()[off : off+n : off+n] }

// allPattern is made once: that takes seconds where the processor is emulated.
var allPattern = sync.OnceValue(func() []byte {
	p := make([]byte, testSize+4096)
	for i := range p {
		p[i] = byte(uint64(i)*2654435761>>13) | 1
	}
	return p
})

// newDevice is full of the pattern, but for holes in every fourth block.
func newDevice(size int64) *blocktest.Memory {
	d := blocktest.NewMemory(size)
	p := pattern(0, size)
	for off := int64(0); off < size; off += blockmap.BlockSize {
		if off/blockmap.BlockSize%4 != 3 {
			d.Fill(p[off:off+blockmap.BlockSize], off)
		}
	}
	return d
}

type readOnly struct{ blockmap.Device }

// long is a bound for what should take much less.
const long = time.Minute

func aCtx(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), long)
	t.Cleanup(cancel)
	return ctx
}

// testLog passes a log to the test.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// attachTo attaches dev until the test ends.
func attachTo(t testing.TB, d Driver, dev blockmap.Device, o Options) *Node {
	t.Helper()
	if o.Log == nil {
		o.Log = testLog(t)
	}
	n, err := Attach(aCtx(t), dev, by(d, o))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { detach(t, n) })
	return n
}

func detach(t testing.TB, n *Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), long)
	defer cancel()
	if err := detachUnused(ctx, n); err != nil {
		t.Errorf("detach: %v", err)
	}
}

// detachUnused detaches a node that is not mounted any more. A process that began while it was
// mounted, in a mount namespace of its own, has a copy of the mount until it ends.
func detachUnused(ctx context.Context, n *Node) error {
	for {
		err := n.Detach(ctx)
		if !errors.Is(err, ErrBusy) || sleep(ctx, 10*time.Millisecond) != nil {
			return err
		}
	}
}

// aligned is memory for O_DIRECT.
func aligned(n int) []byte {
	p := make([]byte, n+4096)
	skip := -int(uintptr(unsafe.Pointer(&p[0]))) & 4095
	return p[skip : skip+n : skip+n]
}

// node is an open node.
type node struct {
	t  testing.TB
	fd int
}

func open(t testing.TB, path string, flags int) *node {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	n := &node{t, fd}
	t.Cleanup(n.close)
	return n
}

func (n *node) close() {
	if n.fd >= 0 {
		unix.Close(n.fd)
		n.fd = -1
	}
}

func (n *node) read(e blockmap.Extent) ([]byte, error) {
	p := aligned(int(e.Len()))
	for {
		m, err := unix.Pread(n.fd, p, e.Start)
		if err == unix.EINTR {
			continue
		}
		if err == nil && m < len(p) {
			err = fmt.Errorf("%d of %d bytes", m, len(p))
		}
		return p, err
	}
}

func (n *node) write(p []byte, off int64) error {
	q := aligned(len(p))
	copy(q, p)
	m, err := unix.Pwrite(n.fd, q, off)
	if err == nil && m < len(p) {
		err = fmt.Errorf("%d of %d bytes", m, len(p))
	}
	return err
}

// mustRead fails unless e reads as want.
func (n *node) mustRead(e blockmap.Extent, want []byte) {
	n.t.Helper()
	got, err := n.read(e)
	if err != nil {
		n.t.Fatalf("read %v: %v", e, err)
	}
	if !bytes.Equal(got, want) {
		n.t.Fatalf("read %v: wrong bytes", e)
	}
}

func (n *node) rangeIoctl(req uintptr, e blockmap.Extent) error {
	r := [2]uint64{uint64(e.Start), uint64(e.Len())}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(n.fd), req, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return errno
	}
	return nil
}

// within waits for a value.
func within[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(long):
		t.Fatalf("%s takes more than %v", what, long)
		panic("unreachable")
	}
}

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(long); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it takes more than %v until %s", long, what)
		}
	}
}

// mkfs makes an ext4 file system of the size of a test's device.
func mkfs(t testing.TB) []byte {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ext4")
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-b", "4096", file, fmt.Sprintf("%dk", testSize>>10)).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	p, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(p) != testSize {
		t.Fatalf("%s has %d bytes", file, len(p))
	}
	return p
}

// mountNode mounts a node until unmount is called, or the test ends.
func mountNode(t testing.TB, path string, flags uintptr, data string) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount(path, dir, "ext4", flags, data); err != nil {
		t.Fatalf("mount %s: %v", path, err)
	}
	mounted := true
	unmount = func() {
		t.Helper()
		if !mounted {
			return
		}
		mounted = false
		for end := time.Now().Add(long); ; time.Sleep(5 * time.Millisecond) {
			err := unix.Unmount(dir, 0)
			if err == nil {
				return
			}
			if err != unix.EBUSY || time.Now().After(end) {
				t.Errorf("unmount %s: %v", dir, err)
				unix.Unmount(dir, unix.MNT_DETACH)
				return
			}
		}
	}
	t.Cleanup(unmount)
	return dir, unmount
}

// left is what a leak would add to.
type left struct{ goroutines, fds, loops, mounts, ublks, nbds, threads int }

func count(t testing.TB) (l left) {
	t.Helper()
	l.goroutines = runtime.NumGoroutine()
	l.fds = entries(t, "/proc/self/fd")
	l.threads = entries(t, "/proc/self/task")
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range loops {
		// Other programs may have loop devices, those of thaw included; ours have this file.
		if text, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(text)) == "/"+fuseFileName() {
			l.loops++
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	l.mounts = bytes.Count(mounts, []byte("fuse.thaw"))
	for pattern, n := range map[string]*int{"/sys/block/ublkb*": &l.ublks, "/sys/block/nbd*/pid": &l.nbds} {
		devices, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		*n = len(devices)
	}
	return l
}

func entries(t testing.TB, dir string) int {
	t.Helper()
	d, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// noLeak fails t unless all is as it was before. Threads come and go as Go likes.
func noLeak(t testing.TB, before left) {
	t.Helper()
	var now left
	for end := time.Now().Add(long); ; time.Sleep(10 * time.Millisecond) {
		now = count(t)
		if now.goroutines <= before.goroutines && now.fds <= before.fds && now.loops <= before.loops && now.mounts <= before.mounts && now.ublks <= before.ublks && now.nbds <= before.nbds {
			break
		}
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("before %+v, now %+v\n%s", before, now, buf[:runtime.Stack(buf, true)])
		}
	}
}
