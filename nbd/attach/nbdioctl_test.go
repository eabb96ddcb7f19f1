package attach

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/genetlink"
	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// A node that was made by ioctl ends with its server: its requests fail at once, nobody can
// go on with it, and what is left of it can be removed when nobody uses it any more. The
// next node has another number until then.
func TestRecoverIoctl(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		if d != nbdByIoctl {
			return // see TestRecover
		}
		file := newFile(t)
		first, err := startServer(t, d, file, "rw")
		if err != nil {
			t.Fatal(err)
		}
		if s := first.state; s.Driver != NBD || s.Task == 0 || s.Outlives() {
			t.Errorf("state %+v", s)
		}
		l := rawLoad(t, first.state.Path, 2)
		l.more(t, 200)
		first.kill()
		l.more(t, 20)
		l.end(t)
		if len(l.errs) == 0 || !errors.Is(l.errs[0], unix.EIO) {
			t.Errorf("%d errors: %v", len(l.errs), l.errs)
		}
		t.Logf("%d operations, the longest took %v", l.ops.Load(), l.longest.Round(time.Millisecond))

		second, err := startServer(t, d, file, "rw")
		if err != nil {
			t.Fatal(err)
		}
		f := open(t, second.state.Path, unix.O_RDONLY|unix.O_DIRECT) // some program that has the node open
		second.kill()
		if _, err := f.read(blockmap.Range(0, 4096)); err != unix.EIO {
			t.Errorf("read without a server: %v", err)
		}
		if _, err := startServer(t, d, file, "rw", string(second.state.Encode())); err == nil || !strings.Contains(err.Error(), "attach again") {
			t.Errorf("recover it: %v", err)
		}
		third, err := startServer(t, d, file, "rw")
		if err != nil {
			t.Fatal(err)
		}
		if third.state.Path == second.state.Path {
			t.Errorf("another node has become %s, which a program has open", second.state.Path)
		}
		if err := Remove(aCtx(t), second.state); err != nil {
			t.Errorf("remove what is left of it: %v", err)
		}
		f.close()
		eventually(t, "it is gone", func() bool { return errors.Is(Remove(aCtx(t), second.state), ErrGone) })
		third.stop()
	})
}

// One of several connections dies: its requests go to another one.
func TestConnectionDiesIoctl(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		if d != nbdByIoctl {
			return // see TestConnectionDies
		}
		dev := newDevice(testSize)
		dev.Fill(pattern(0, testSize), 0)
		n := attachTo(t, d, dev, Options{Queues: 3, FaultTimeout: time.Second})
		if n.driver.(*nbdDevice).holder == nil {
			t.Fatal("it was made by netlink")
		}
		l := rawLoad(t, n.Path, 0)
		l.more(t, 50)
		killed := 0
		for fd := range 256 { // of the sockets of this process, a server's end
			if ok, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); ok == unix.AF_UNIX && killed == 0 {
				if err := unix.Shutdown(fd, unix.SHUT_RDWR); err == nil {
					killed++
				}
			}
		}
		if killed == 0 {
			t.Fatal("no connection is found")
		}
		l.more(t, 500)
		l.end(t)
		if len(l.errs) > 0 {
			t.Errorf("%d operations failed, the first one with: %v", len(l.errs), l.errs[0])
		}
	})
}

// In another network namespace some kernels have no netlink for nbd. The node is made by ioctl
// there, without being asked for, and works.
func TestNoNetlink(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		if d != nbdByIoctl {
			return
		}
		file := newFile(t)
		s, err := startServerIn(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}, NBD, file, "ro")
		if err != nil {
			t.Fatal(err)
		}
		if has := familyElsewhere(t); has != (s.state.Task == 0) {
			t.Errorf("the kernel has netlink in other network namespaces: %t; the node: %+v", has, s.state)
		}
		f := open(t, s.state.Path, unix.O_RDONLY|unix.O_DIRECT)
		f.mustRead(blockmap.Range(0, testSize), pattern(0, testSize))
		f.close()
		s.stop()
	})
}

// familyElsewhere reports whether the kernel has the netlink family nbd in a new network
// namespace. 7.3 has it; 6.12 has it or not, which depends on its patches.
func familyElsewhere(t *testing.T) bool {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocks: the thread ends with the namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			result <- err
			return
		}
		c, err := genetlink.Dial(nil)
		if err == nil {
			_, err = c.GetFamily("nbd")
			c.Close()
		}
		result <- err
	}()
	err := <-result
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

// A signal does not end the command that holds the node.
func TestIoctlSignals(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		if d != nbdByIoctl {
			return
		}
		s, err := startServer(t, d, newFile(t), "ro")
		if err != nil {
			t.Fatal(err)
		}
		f := open(t, s.state.Path, unix.O_RDONLY|unix.O_DIRECT)
		for i := range 200 {
			// To the very thread. Go ignores it, and the kernel would end the command.
			if err := unix.Tgkill(s.state.PID, int(s.state.Task), unix.SIGURG); err != nil {
				t.Fatal(err)
			}
			if i%20 == 0 {
				f.mustRead(blockmap.Range(int64(i)*4096, 4096), pattern(int64(i)*4096, 4096))
			}
		}
		f.close()
		s.stop()
	})
}

// When all devices are in use, the error says how to have more.
func TestIoctlAllInUse(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		if d != nbdByIoctl {
			return
		}
		numbers, err := numbered("/sys/block", "nbd")
		if err != nil {
			t.Fatal(err)
		}
		dev := newDevice(testSize)
		for range numbers {
			n, err := Attach(aCtx(t), readOnly{dev}, by(d, Options{Queues: 1}))
			if err != nil {
				break // an earlier test has left one open
			}
			t.Cleanup(func() { detach(t, n) })
		}
		_, err = Attach(aCtx(t), readOnly{dev}, by(d, Options{Queues: 1}))
		if !errors.Is(err, ErrUnavailable) || !strings.Contains(fmt.Sprint(err), "nbds_max") {
			t.Errorf("attach with no device left: %v", err)
		}
	})
}
