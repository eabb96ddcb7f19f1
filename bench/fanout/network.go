package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"thaw/bench"
)

// network is hosts in network namespaces of their own, each with a link to one switch. The
// registry is behind the switch. Nothing of it is in the namespace of this machine.
type network struct {
	sw    *namespace
	hosts []*namespace
}

// namespace is a network namespace. It lasts as long as the process that holds it.
type namespace struct {
	name   string
	holder *exec.Cmd
	addr   string // of eth0
	rate   int64  // of its link, bits per second; 0: no limit
}

// newNamespace makes a namespace, with loopback.
func newNamespace(ctx context.Context, name string) (*namespace, error) {
	n := &namespace{name: name, holder: exec.Command("sleep", "infinity")}
	n.holder.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := n.holder.Start(); err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	if err := n.run(ctx, "ip", "link", "set", "lo", "up"); err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

func (n *namespace) close() {
	n.holder.Process.Kill() // fails only if it has ended
	n.holder.Wait()
}

func (n *namespace) path() string { return fmt.Sprintf("/proc/%d/ns/net", n.holder.Process.Pid) }

// command returns a program that runs in the namespace. The process is the program's own.
func (n *namespace) command(program string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + n.path(), program}, args...)...)
}

func (n *namespace) run(ctx context.Context, program string, args ...string) error {
	cmd := n.command(program, args...)
	_, err := bench.Output(exec.CommandContext(ctx, cmd.Path, cmd.Args[1:]...))
	return err
}

// script writes a program that starts another one in the namespace with its own arguments.
func (n *namespace) script(dir, program string) (path string, err error) {
	path = filepath.Join(dir, n.name+".sh")
	text := fmt.Sprintf("#!/bin/sh\nexec nsenter --net=%s %s \"$@\"\n", n.path(), program)
	return path, os.WriteFile(path, []byte(text), 0o755)
}

// do runs f in the namespace. Sockets that it makes stay there. The thread comes back: if it ended,
// the kernel would end the programs that it has started.
func (n *namespace) do(f func() error) (err error) {
	runtime.LockOSThread()
	here, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer unix.Close(here)
	there, err := unix.Open(n.path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Setns(there, unix.CLONE_NEWNET)
		unix.Close(there)
	}
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter the namespace of %s: %w", n.name, err)
	}
	err = f()
	if back := unix.Setns(here, unix.CLONE_NEWNET); back != nil {
		// The thread stays locked: nothing else may run on it.
		return errors.Join(err, fmt.Errorf("leave the namespace of %s: %w", n.name, back))
	}
	runtime.UnlockOSThread()
	return err
}

// listen listens on a port of the namespace.
func (n *namespace) listen(addr string) (l net.Listener, err error) {
	err = n.do(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	return l, err
}

// dial connects from the namespace.
func (n *namespace) dial(addr string) (c net.Conn, err error) {
	err = n.do(func() (err error) {
		c, err = net.Dial("tcp", addr)
		return err
	})
	return c, err
}

// traffic returns how many bytes have left the namespace by eth0, headers included.
func (n *namespace) traffic() (sent int64, err error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", n.holder.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		name, rest, ok := strings.Cut(line, ":")
		if f := strings.Fields(rest); ok && strings.TrimSpace(name) == "eth0" && len(f) >= 9 {
			return strconv.ParseInt(f[8], 10, 64)
		}
	}
	return 0, errors.New("the namespace has no eth0")
}

const (
	switchAddr = "10.77.0.254"
	cacheAddr  = "10.77.0.253"
)

// newNetwork makes a switch and n hosts, whose links have this rate in each direction.
func newNetwork(ctx context.Context, n int, rate int64) (w *network, err error) {
	w = new(network)
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.sw, err = newNamespace(ctx, "switch"); err != nil {
		return w, err
	}
	for _, args := range [][]string{
		{"link", "add", "br0", "type", "bridge"}, {"addr", "add", switchAddr + "/24", "dev", "br0"}, {"link", "set", "br0", "up"},
	} {
		if err := w.sw.run(ctx, "ip", args...); err != nil {
			return w, err
		}
	}
	for i := range n {
		if _, err := w.add(ctx, fmt.Sprintf("host-%d", i+1), fmt.Sprintf("10.77.0.%d", i+1), rate); err != nil {
			return w, err
		}
	}
	return w, nil
}

// add connects one more host to the switch.
func (w *network) add(ctx context.Context, name, addr string, rate int64) (*namespace, error) {
	h, err := newNamespace(ctx, name)
	if err != nil {
		return nil, err
	}
	h.addr = addr
	w.hosts = append(w.hosts, h)
	pid := strconv.Itoa(h.holder.Process.Pid)
	for _, args := range [][]string{
		{"link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", pid}, {"link", "set", name, "master", "br0"}, {"link", "set", name, "up"},
	} {
		if err := w.sw.run(ctx, "ip", args...); err != nil {
			return nil, err
		}
	}
	for _, args := range [][]string{{"addr", "add", addr + "/24", "dev", "eth0"}, {"link", "set", "eth0", "up"}} {
		if err := h.run(ctx, "ip", args...); err != nil {
			return nil, err
		}
	}
	return h, w.limit(ctx, h, rate)
}

// limit sets the rate of a host's link, in both directions; 0 for no limit. The queue holds
// what the link sends in 50 ms, as a router's without much bufferbloat.
func (w *network) limit(ctx context.Context, h *namespace, rate int64) error {
	h.rate = rate
	if rate <= 0 {
		return nil
	}
	for _, x := range []struct {
		n   *namespace
		dev string
	}{{h, "eth0"}, {w.sw, h.name}} {
		burst := max(rate/8/250, 64<<10)
		if err := x.n.run(ctx, "tc", "qdisc", "replace", "dev", x.dev, "root", "tbf", "rate", strconv.FormatInt(rate, 10)+"bit",
			"burst", strconv.FormatInt(burst, 10), "latency", "50ms"); err != nil {
			return err
		}
	}
	return nil
}

// separate makes two hosts lose each other's packets, silently; both reach the switch and what
// is behind it. join ends that.
func (w *network) separate(ctx context.Context, a, b *namespace) error {
	return errors.Join(
		a.run(ctx, "ip", "neigh", "replace", b.addr, "lladdr", nobody, "dev", "eth0", "nud", "permanent"),
		b.run(ctx, "ip", "neigh", "replace", a.addr, "lladdr", nobody, "dev", "eth0", "nud", "permanent"))
}

// nobody is an Ethernet address that no host has.
const nobody = "02:00:00:00:00:99"

func (w *network) close() {
	for _, h := range w.hosts {
		h.close()
	}
	if w.sw != nil {
		w.sw.close()
	}
}
