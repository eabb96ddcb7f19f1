package attach

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/edsrzf/mmap-go"
	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// fileDevice is a device in a file: what outlives its server.
type fileDevice struct {
	f *os.File
	m mmap.MMap

	mu      sync.Mutex
	damaged []blockmap.Extent // reported by a reader
}

func openFile(path string) (*fileDevice, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	m, err := mmap.Map(f, mmap.RDWR, 0)
	return &fileDevice{f: f, m: m}, err
}

// newFile makes a file with the pattern of a test's device.
func newFile(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(path, pattern(0, testSize), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (d *fileDevice) Size() int64 { return int64(len(d.m)) }

func (d *fileDevice) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	if e.Check(d.Size()) != nil {
		return v, false
	}
	v.Append(d.m[e.Start:e.End], d, uint64(e.Start))
	return v, true
}

func (d *fileDevice) Unpin(uint64)        {}
func (d *fileDevice) Pinned(uint64) int64 { return blockmap.BlockSize }
func (d *fileDevice) Damaged(at uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.damaged = append(d.damaged, blockmap.Range(int64(at), 1))
}

func (d *fileDevice) Load(_ context.Context, e blockmap.Extent) (blockmap.View, bool) {
	return d.View(e)
}
func (d *fileDevice) Fault(context.Context, blockmap.Extent) error { return nil }
func (d *fileDevice) Prefetch(blockmap.Extent)                     {}
func (d *fileDevice) Status(e blockmap.Extent) blockmap.Status {
	return blockmap.Status{Extent: e, Resident: true}
}

func (d *fileDevice) WriteAt(_ context.Context, p []byte, off int64) error {
	_, err := d.f.WriteAt(p, off)
	return err
}

func (d *fileDevice) Zero(ctx context.Context, e blockmap.Extent, _ bool) error {
	return d.WriteAt(ctx, make([]byte, e.Len()), e.Start)
}
func (d *fileDevice) Discard(ctx context.Context, e blockmap.Extent) error {
	return d.Zero(ctx, e, true)
}
func (d *fileDevice) Flush(context.Context) error { return unix.Fdatasync(int(d.f.Fd())) }

// serveVerb makes this program a server: its arguments are DRIVER FILE MODE, or DRIVER
// FILE MODE STATE to recover a node, or DRIVER FILE MODE "" TOKEN. It prints the state, and
// serves until SIGTERM.
const serveVerb = "attach-serve"

// serverTimeout is the FaultTimeout of such a server.
const serverTimeout = 2 * time.Second

func serveMain(args []string) {
	if err := serveNode(args); err != nil {
		fmt.Fprintln(os.Stderr, "server:", err)
		os.Exit(1)
	}
}

func serveNode(args []string) error {
	dev, err := openFile(args[1])
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	o := by(Driver(args[0]), Options{ReadOnly: args[2] == "ro", Queues: 2, FaultTimeout: serverTimeout})
	var n *Node
	if len(args) > 4 {
		o.Token = args[4]
	}
	if len(args) > 3 && args[3] != "" {
		s, err := ParseState([]byte(args[3]))
		if err != nil {
			return err
		}
		n, err = Recover(ctx, s, dev, o)
		if err != nil {
			return err
		}
	} else if n, err = Attach(ctx, dev, o); err != nil {
		return err
	}
	os.Stdout.Write(n.State().Encode())
	select {
	case <-ctx.Done():
		ctx, cancel := context.WithTimeout(context.Background(), long)
		defer cancel()
		return detachUnused(ctx, n)
	case <-n.Gone():
		return n.Wait()
	}
}

// server is a process that serves a node.
type server struct {
	t     testing.TB
	cmd   *exec.Cmd
	said  bytes.Buffer // on stderr; read it after the end
	state State
	ended bool
}

// startServer starts one, and waits until its node is there. It fails with what the
// process says where that ends instead.
func startServer(t testing.TB, d Driver, args ...string) (*server, error) {
	t.Helper()
	return startServerIn(t, nil, d, args...)
}

func startServerIn(t testing.TB, attr *syscall.SysProcAttr, d Driver, args ...string) (*server, error) {
	t.Helper()
	s := &server{t: t, cmd: exec.Command("/proc/self/exe", append([]string{serveVerb, string(d)}, args...)...)}
	s.cmd.SysProcAttr = attr
	s.cmd.Stderr = &s.said
	// The death signal comes when the thread ends that has started the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	out, err := s.cmd.StdoutPipe()
	if err == nil {
		err = s.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.kill()
		if s.state.Driver == "" {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), long)
		defer cancel()
		if err := Remove(ctx, s.state); err != nil && !errors.Is(err, ErrGone) {
			t.Errorf("remove: %v", err)
		}
	})
	timer := time.AfterFunc(long, func() { s.cmd.Process.Kill() })
	defer timer.Stop()
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err != nil {
		s.kill()
		if err == io.EOF {
			err = errors.New(s.said.String())
		}
		return nil, err
	}
	if s.state, err = ParseState(line); err != nil {
		t.Fatal(err)
	}
	if again := s.state.Encode(); !bytes.Equal(again, line) {
		t.Errorf("%q becomes %q", line, again)
	}
	return s, nil
}

// kill is SIGKILL, and waits for the end.
func (s *server) kill() {
	if s.ended {
		return
	}
	s.ended = true
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

// stop is SIGTERM: the server detaches its node.
func (s *server) stop() {
	s.t.Helper()
	if s.ended {
		return
	}
	s.ended = true
	s.cmd.Process.Signal(syscall.SIGTERM)
	timer := time.AfterFunc(long, func() { s.cmd.Process.Kill() })
	defer timer.Stop()
	if err := s.cmd.Wait(); err != nil {
		s.t.Errorf("the server: %v: %s", err, s.said.String())
	}
}
