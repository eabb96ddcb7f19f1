package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The client gets a lease from a server that nobody here wrote, in network namespaces.
func TestLease(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("namespaces require root")
	}
	if _, err := exec.LookPath("busybox"); err != nil {
		t.Skip("busybox is not installed")
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), leaseDir+"="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Unshareflags: unix.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

func leaseInside(dir string) error {
	if err := forgetMounts(); err != nil {
		return err
	}
	// What is written to /run and mounted on /etc/resolv.conf stays in this process's namespace.
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return err
	}
	run := func(args ...string) (string, error) {
		out, err := exec.Command("busybox", args...).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("%v: %w: %s", args, err, out)
		}
		return string(out), nil
	}
	config := filepath.Join(dir, "udhcpd.conf")
	os.WriteFile(config, []byte(fmt.Sprintf(`start 10.99.0.20
end 10.99.0.20
interface veth0
min_lease 60
lease_file %[1]s/leases
pidfile %[1]s/pid
option subnet 255.255.255.0
option router 10.99.0.1
option dns 10.99.0.1 10.99.0.3
option domain example.test
option mtu 1400
option lease 100
`, dir)), 0o644)
	os.WriteFile(filepath.Join(dir, "leases"), nil, 0o644)
	server := exec.Command("busybox", "sh", "-c", `until busybox ip link show veth0 >/dev/null 2>&1; do sleep 0.05; done
busybox ip addr add 10.99.0.1/24 dev veth0 && busybox ip link set veth0 up && exec busybox timeout 300 busybox udhcpd -f `+config)
	server.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	server.Stderr = os.Stderr
	if err := server.Start(); err != nil {
		return err
	}
	defer server.Wait()
	defer server.Process.Kill()
	// The kernel calls the other end veth0; busybox cannot name it.
	for _, args := range []string{"link add client type veth", "link set veth0 netns " + strconv.Itoa(server.Process.Pid)} {
		if _, err := run(append([]string{"ip"}, strings.Fields(args)...)...); err != nil {
			return err
		}
	}
	l, err := linkOf("client")
	if err != nil {
		return err
	}
	n := newNetwork(address{}, func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) })
	if err := setUp(l.index, 0); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	ready := make(chan struct{})
	keeping, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		n.keepLease(keeping, l, func() { close(ready) })
	}()
	select {
	case <-ready:
	case <-ctx.Done():
		return errors.New("no lease")
	}
	stop()
	<-done
	shown := ""
	for _, args := range []string{"ip addr show client", "ip route", "cat /etc/resolv.conf", "ip link show client"} {
		out, err := run(strings.Fields(args)...)
		if err != nil {
			return err
		}
		shown += out
	}
	for _, s := range []string{"inet 10.99.0.20/24 brd 10.99.0.255", "default via 10.99.0.1 dev client", "search example.test\nnameserver 10.99.0.1\nnameserver 10.99.0.3\n", "mtu 1400"} {
		if !strings.Contains(shown, s) {
			return fmt.Errorf("%q is not in\n%s", s, shown)
		}
	}
	// The host can be reached, and grants the same again.
	if _, err := run("ping", "-c", "1", "-W", "60", "10.99.0.1"); err != nil {
		return err
	}
	prefix := netip.MustParsePrefix("10.99.0.20/24")
	again, err := n.renew(ctx, l, &lease{prefix: prefix}, time.Now().Add(time.Minute))
	if err != nil {
		return err
	}
	if again.prefix != prefix || again.duration != 100*time.Second || again.renew != 50*time.Second {
		return fmt.Errorf("renewed: %+v", again)
	}
	// It refuses another address.
	_, err = exchange(ctx, l, time.Now().Add(time.Minute), func(s *socket, xid uint32) (*lease, error) {
		return s.ask(message{kind: dhcpRequest, xid: xid, mac: l.mac, wanted: netip.MustParseAddr("10.99.0.77"), server: netip.MustParseAddr("10.99.0.1")}, dhcpAck)
	})
	if !errors.Is(err, errRefused) {
		return fmt.Errorf("a request for an address of nobody: %v", err)
	}
	// A lease that ends takes the address away; a gateway outside of the network is on the link.
	n.drop(l, again)
	if out, err := run("ip", "addr", "show", "client"); err != nil || strings.Contains(out, "10.99.0.20") {
		return fmt.Errorf("after the end: %v\n%s", err, out)
	}
	n.fixed = address{prefix: netip.MustParsePrefix("10.1.1.1/32"), gateway: netip.MustParseAddr("10.1.1.9")}
	if err := n.setFixed(l); err != nil {
		return err
	}
	n.fixed = address{prefix: netip.MustParsePrefix("fd00::2/64"), gateway: netip.MustParseAddr("fd00::1")}
	if err := n.setFixed(l); err != nil {
		return err
	}
	out, err := run("ip", "route")
	if err != nil || !strings.Contains(out, "default via 10.1.1.9 dev client") {
		return fmt.Errorf("fixed address: %v\n%s", err, out)
	}
	return nil
}

// linkOf finds a device that is no hardware.
func linkOf(name string) (link, error) {
	l := link{name: name}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return l, err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq(name)
	if err != nil {
		return l, err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, r); err != nil {
		return l, err
	}
	l.index = r.Uint32()
	out, err := exec.Command("busybox", "ip", "link", "show", name).Output()
	if err != nil {
		return l, err
	}
	_, mac, _ := strings.Cut(string(out), "link/ether ")
	if len(mac) < 17 || !parseMAC(mac[:17], &l.mac) {
		return l, fmt.Errorf("no MAC in %q", out)
	}
	return l, nil
}
