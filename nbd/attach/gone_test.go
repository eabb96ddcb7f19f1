package attach

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
)

// A node that another program removes ends with a reason, and nothing of it is left.
func TestRemovedByOthers(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		before := count(t)
		dev := newDevice(testSize)
		n := attachTo(t, d, dev, Options{})
		switch d {
		case UBLK:
			c, err := openUBLK()
			if err != nil {
				t.Fatal(err)
			}
			if err := c.stop(aCtx(t), n.State().Number); err != nil {
				t.Error(err)
			}
			if err := c.remove(aCtx(t), n.State().Number); err != nil {
				t.Error(err)
			}
			c.close()
		case NBD:
			if err := disconnect(aCtx(t), n.State().Number); err != nil {
				t.Error(err)
			}
		case nbdByIoctl: // as nbd-client -d does
			f := open(t, n.Path, unix.O_RDONLY)
			if err := nbdClear(f.fd); err != nil {
				t.Error(err)
			}
			f.close()
		case FUSE:
			l, err := openLoop(n.State(), false)
			if err != nil {
				t.Fatal(err)
			}
			if err := l.clear(); err != nil {
				t.Error(err)
			}
			l.f.Close()
		}
		<-within(t, "the end of the node", gone(n))
		if err := n.Wait(); err == nil || !strings.Contains(err.Error(), "another program") {
			t.Errorf("it ended with %v", err)
		}
		if err := n.Detach(aCtx(t)); err != nil {
			t.Errorf("detach a node that has gone: %v", err)
		}
		dev.NoPins(t)
		noLeak(t, before)
	})
}

func gone(n *Node) <-chan (<-chan struct{}) {
	c := make(chan (<-chan struct{}), 1)
	go func() { <-n.Gone(); c <- n.Gone() }()
	return c
}

// A connection that dies is replaced, while the node works.
func TestConnectionDies(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		if d != NBD {
			return // they have no connections, or the kernel takes no other ones
		}
		sockets := func() map[string]bool {
			m := make(map[string]bool)
			for i := range 256 {
				if to, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", i)); err == nil && strings.HasPrefix(to, "socket:") {
					m[fmt.Sprint(i, " ", to)] = true
				}
			}
			return m
		}
		before := sockets()
		dev := newDevice(testSize)
		n := attachTo(t, d, dev, Options{Queues: 2})
		var ours []string
		eventually(t, "there are two connections", func() bool {
			ours = nil
			for s := range sockets() {
				if !before[s] {
					ours = append(ours, s)
				}
			}
			return len(ours) == 2
		})
		var fd int
		fmt.Sscan(ours[0], &fd)
		if err := unix.Shutdown(fd, unix.SHUT_RDWR); err != nil {
			t.Fatal(err)
		}
		f := open(t, n.Path, unix.O_RDONLY|unix.O_DIRECT)
		eventually(t, "there is another connection", func() bool {
			now := sockets()
			return !now[ours[0]] && len(now) == len(before)+2
		})
		for i := range int64(50) {
			e := blockmap.Range(i*65536, 8192)
			f.mustRead(e, dev.Content(e))
		}
		f.close()
	})
}

// An attach whose context ends leaves nothing behind, and says why.
func TestAttachCancelled(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		before := count(t)
		dev := newDevice(testSize)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if n, err := Attach(ctx, dev, by(d, Options{Log: testLog(t)})); err == nil {
			detach(t, n) // it was fast enough not to ask
		}
		// The device does not answer, and somebody reads during the attach.
		dev.Evict(blockmap.Range(0, testSize))
		dev.OnFault = func(ctx context.Context, _ blockmap.Extent) error {
			<-ctx.Done()
			return context.Cause(ctx)
		}
		ctx, cancel = context.WithTimeout(context.Background(), 300*time.Millisecond)
		defer cancel()
		if n, err := Attach(ctx, dev, by(d, Options{Log: testLog(t)})); err == nil {
			detach(t, n)
		}
		noLeak(t, before)
	})
}

// A detach whose time is up while the device does not take what the kernel holds says that
// this is lost, and the node goes.
func TestDetachLosesWrites(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		before := count(t)
		dev := newDevice(testSize)
		waiting := make(chan struct{}, 1000)
		dev.OnWrite = func(ctx context.Context, _ blockmap.Extent) error {
			waiting <- struct{}{}
			<-ctx.Done()
			return context.Cause(ctx)
		}
		n, err := Attach(aCtx(t), dev, by(d, Options{Queues: 1}))
		if err != nil {
			t.Fatal(err)
		}
		f := open(t, n.Path, unix.O_RDWR)
		if err := f.write(pattern(5, 8192), 8192); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		detached := make(chan error, 1)
		go func() { detached <- n.Detach(ctx) }()
		within(t, "a write back", waiting)
		f.close()
		cancel()
		if err := within(t, "Detach", detached); err == nil || !strings.Contains(err.Error(), "lost") {
			t.Errorf("detach: %v", err)
		}
		<-within(t, "the end of the node", gone(n))
		dev.NoPins(t)
		noLeak(t, before)
	})
}

// fio writes, and verifies what it has written.
func TestFio(t *testing.T) {
	each(t, func(t *testing.T, d Driver) {
		dev := newDevice(testSize)
		n := attachTo(t, d, dev, Options{})
		for _, rw := range []string{"write", "randwrite"} {
			cmd := exec.Command("fio", "--name=v", "--filename="+n.Path, "--direct=1", "--ioengine=libaio", "--iodepth=32", "--bsrange=4k-256k", "--rw="+rw,
				"--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randrepeat=0", fmt.Sprint("--size=", testSize))
			cmd.Dir = t.TempDir() // it leaves a file there
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("fio %s: %v\n%s", rw, err, out)
			}
		}
		out, err := exec.Command("fio", "--name=t", "--filename="+n.Path, "--direct=1", "--ioengine=libaio", "--iodepth=8", "--bs=64k", "--rw=randtrim",
			fmt.Sprint("--size=", testSize)).CombinedOutput()
		if err != nil {
			t.Errorf("fio trim: %v\n%s", err, out)
		}
	})
}
