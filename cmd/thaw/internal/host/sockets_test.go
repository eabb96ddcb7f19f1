package host

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"thaw/blockmap/blocktest"
	"thaw/nbd/vhost"
)

// The name of a socket is one of a file that is not hidden, and short; a device keeps it.
func TestSocketNames(t *testing.T) {
	digest := "registry.example/team/app@sha256:" + strings.Repeat("0123456789abcdef", 4)
	for _, c := range []struct{ device, client, want string }{
		{"vm7", "", "vm7.sock"},
		{"registry.example/team/app:v1", "", "registry.example_team_app_v1.sock"},
		{"registry.example:5000/app", "", "registry.example_5000_app.sock"},
		{"oci:/srv/images:x", "", "oci__srv_images_x.sock"},
		{"registry.example/team/app:v1~vm-7.host", "vm-7.host", "vm-7.host.sock"},
		{"..", "", "_.sock"},
		{".hidden", "", "_hidden.sock"},
		{"-rf", "", "_rf.sock"},
		{"", "", "_.sock"},
		{"\x00\n/ü,=", "", "______.sock"},
		{strings.Repeat("a", 64), "", strings.Repeat("a", 64) + ".sock"},
		{strings.Repeat("a", 65), "", strings.Repeat("a", 47) + "-635361c48bb9eab1.sock"},
	} {
		if got := socketName(c.device, c.client); got != c.want {
			t.Errorf("the socket of %q is %s, want %s", c.device, got, c.want)
		}
	}
	one, two := socketName(digest, ""), socketName(digest+"0", "")
	if one == two || len(one) != maxSocketName+len(socketSuffix) || len(two) != len(one) {
		t.Errorf("%s, %s", one, two)
	}
}

// Devices get and lose their sockets while others do. A host that stops leaves none.
func TestSocketsOfDevices(t *testing.T) {
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 20))
	dir := shortDir(t)
	server := new(vhost.Server)
	h := r.open(Options{Sockets: SocketOptions{Dir: dir, Server: server}, Overlay: OverlayOptions{Ephemeral: true}})
	server.Exports = NewExports(h, nil, nil, false)

	// Before the host serves, there are sockets, and nobody answers.
	first, err := h.Add(t.Context(), Spec{Name: image, Socket: "default"})
	if err != nil {
		t.Fatal(err)
	}
	if in := first[0].Info(); in.Socket != filepath.Join(dir, "default.sock") {
		t.Errorf("%+v", in)
	}
	nc, err := net.Dial("unix", filepath.Join(dir, "default.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if n := server.Stats().Accepted; n != 0 {
		t.Errorf("%d connections were accepted too early", n)
	}
	h.SetServing()
	h.SetServing()
	await(t, "the connection is accepted", func() bool { return server.Stats().Accepted == 1 })
	nc.Close()

	// All devices of a request, or none: one of them would have the socket of another.
	if _, err := h.Add(t.Context(), Spec{Name: "a/b", Image: image}, Spec{Name: "a:b", Image: image}); !errors.As(err, new(ConflictError)) {
		t.Errorf("two devices with one socket: %v", err)
	}
	await(t, "neither is added", func() bool { return len(h.Devices()) == 1 })
	if names := names(t, dir); names != "default.sock" {
		t.Errorf("%s", names)
	}

	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for range 10 {
				spec := Spec{Name: fmt.Sprint("vm", i), Image: image}
				if i%2 == 0 {
					spec = Spec{Name: fmt.Sprint(image, "~vm", i)}
				}
				added, err := h.Add(t.Context(), spec)
				if err != nil {
					t.Error(err)
					return
				}
				in := added[0].Info()
				if in.Socket != filepath.Join(dir, fmt.Sprint("vm", i, ".sock")) || in.Overlay == nil || !in.Permanent {
					t.Errorf("%+v", in)
				}
				if nc, err := net.Dial("unix", in.Socket); err != nil {
					t.Error(err)
				} else {
					nc.Close()
				}
				if err := h.Remove(t.Context(), in.ID); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if names := names(t, dir); names != "default.sock" {
		t.Errorf("left behind: %s", names)
	}
	if err := server.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := h.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if names := names(t, dir); names != "" {
		t.Errorf("left behind: %s", names)
	}
	select {
	case err := <-h.SocketFailed():
		t.Errorf("a socket has failed: %v", err)
	default:
	}
}

// A socket that cannot be served any more is a failure of the server, which is told.
func TestSocketFails(t *testing.T) {
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 20))
	server := new(vhost.Server)
	h := r.open(Options{Sockets: SocketOptions{Dir: shortDir(t), Server: server}})
	server.Exports = NewExports(h, nil, nil, false)
	h.SetServing()
	added, err := h.Add(t.Context(), Spec{Name: image})
	if err != nil {
		t.Fatal(err)
	}
	added[0].socket.l.Close()
	select {
	case err := <-h.SocketFailed():
		if !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	case <-time.After(atMost):
		t.Error("nobody is told")
	}
}

// A host that never serves removes its sockets, too.
func TestSocketsUnserved(t *testing.T) {
	r := newRegistry(t)
	image := r.push("team/app:v1", blocktest.NewImage(t, 1, 20))
	dir := shortDir(t)
	h := r.open(Options{Sockets: SocketOptions{Dir: dir, Server: new(vhost.Server)}})
	if _, err := h.Add(t.Context(), Spec{Name: image}); err != nil {
		t.Fatal(err)
	}
	h.Close()
	if names := names(t, dir); names != "" {
		t.Errorf("left behind: %s", names)
	}
}

// shortDir is a directory in which the path of a socket is short enough.
func shortDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "thaw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func names(t *testing.T, dir string) string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}
