package attach

import (
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"thaw/blockmap"
	"thaw/nbd"
)

// Both ends of a connection have room for a reply of 1 MiB, whatever net.core.wmem_max says,
// and still have it when the server serves the connection.
func TestPairRoom(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("more room than net.core.wmem_max requires root")
	}
	p, err := newPair()
	if err != nil {
		t.Fatal(err)
	}
	kernel := os.NewFile(uintptr(p.kernel), "kernel")
	defer kernel.Close()
	rc, err := p.server.(*net.UnixConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	room := func() (n int) {
		if e := rc.Control(func(fd uintptr) { n, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF) }); e != nil || err != nil {
			t.Fatal(e, err)
		}
		return n
	}
	if n := room(); n < 1<<20 {
		t.Errorf("the server's end has room for %d bytes", n)
	}
	if n, err := unix.GetsockoptInt(p.kernel, unix.SOL_SOCKET, unix.SO_SNDBUF); err != nil || n < 1<<20 {
		t.Errorf("the kernel's end has room for %d bytes: %v", n, err)
	}
	var srv nbd.Server
	ended := make(chan error, 1)
	go func() {
		ended <- srv.ServeTransmission(t.Context(), p.server, &nbd.Export{Name: "test", Device: newDevice(testSize)})
	}()
	request := make([]byte, 28) // a READ of one block
	copy(request, "\x25\x60\x95\x13")
	request[26] = blockmap.BlockSize >> 8
	if _, err := kernel.Write(request); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(kernel, make([]byte, 16+blockmap.BlockSize)); err != nil {
		t.Fatal(err)
	}
	if n := room(); n < 1<<20 {
		t.Errorf("the server has left room for %d bytes", n)
	}
	kernel.Close()
	select {
	case <-ended:
	case <-time.After(long):
		t.Error("the server goes on")
	}
}
