package host

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"thaw/blockmap"
	"thaw/nbd"
	"thaw/nbd/vhost"
)

// SocketOptions say where virtual machines find their disks.
type SocketOptions struct {
	// Dir is a directory that gets a socket for each device that is added. "" means none.
	Dir string
	// Server serves the sockets by vhost-user. The caller shuts it down before it stops the
	// host.
	Server *vhost.Server
}

// sockets are the sockets of a host's devices: one for each device that was added, since a
// front end of vhost-user names no export.
type sockets struct {
	SocketOptions
	log    *slog.Logger
	failed chan error // has the first error of a socket that cannot be served any more
	wg     sync.WaitGroup

	mu struct {
		sync.Mutex
		open    map[string]*socket // by the name of the file
		serving bool
		stopped bool
	}
}

// socket is the socket of one device.
type socket struct {
	of     *sockets
	name   string // of the file
	path   string
	export string
	l      net.Listener
	once   sync.Once
	closed chan struct{} // by close
}

func newSockets(o SocketOptions, log *slog.Logger) (*sockets, error) {
	x := &sockets{SocketOptions: o, log: log, failed: make(chan error, 1)}
	x.mu.open = make(map[string]*socket)
	if o.Dir == "" {
		return x, nil
	}
	x.Dir = absolute(o.Dir)
	err := os.MkdirAll(x.Dir, 0o700)
	if err == nil {
		err = blockmap.OS.Private(x.Dir) // or else another user could put a socket in the place of one
	}
	if err != nil {
		return nil, fmt.Errorf("directory of sockets for virtual machines: %w", err)
	}
	return x, nil
}

const (
	socketSuffix  = ".sock"
	maxSocketName = 64 // without the suffix; all of the path has at most 107 bytes
	socketHashLen = 16
)

// socketName is the name of the socket of a device, which depends on the name of the device
// alone: a virtual machine connects again to the same path. The socket of IMAGE~CLIENT is
// called CLIENT. In other names, all but letters, digits, dots, dashes and underscores are
// underscores. A long name is cut, and ends in a hash of all of it.
func socketName(device, client string) string {
	if client != "" {
		device = client
	}
	name := strings.Map(func(r rune) rune {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', r == '.', r == '-', r == '_':
			return r
		}
		return '_'
	}, device)
	if name == "" || name[0] == '.' || name[0] == '-' {
		name = "_" + strings.TrimLeft(name, ".-")
	}
	if len(name) > maxSocketName {
		sum := sha256.Sum256([]byte(device))
		name = name[:maxSocketName-1-socketHashLen] + "-" + hex.EncodeToString(sum[:socketHashLen/2])
	}
	return name + socketSuffix
}

// listen makes the socket of a device, which is called name.
func (x *sockets) listen(ctx context.Context, name, export string) (*socket, error) {
	s := &socket{of: x, name: name, path: filepath.Join(x.Dir, name), export: export, closed: make(chan struct{})}
	x.mu.Lock()
	other := x.mu.open[name]
	if other == nil {
		x.mu.open[name] = s
	}
	x.mu.Unlock()
	if other != nil {
		return nil, conflict("%s and %s would have the same socket, %s: give one of them another name", other.export, export, s.path)
	}
	l, err := nbd.ListenPrivate(ctx, s.path)
	if err != nil {
		x.forget(s)
		return nil, fmt.Errorf("socket of %s for virtual machines: %w", export, err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	s.l = l
	if x.mu.serving {
		x.serve(s)
	}
	return s, nil
}

// forget lets another device have the name of s.
func (x *sockets) forget(s *socket) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.mu.open, s.name)
}

// setServing begins to serve the sockets, also those that are made later.
func (x *sockets) setServing() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.mu.serving {
		return
	}
	x.mu.serving = true
	for _, s := range x.mu.open {
		if s.l != nil {
			x.serve(s)
		}
	}
}

// stop waits until no socket is served any more. All of them are closed, or about to be.
func (x *sockets) stop() {
	x.mu.Lock()
	x.mu.stopped = true
	x.mu.Unlock()
	x.wg.Wait()
}

// serve serves s until it is closed, or the server is. x.mu is held.
func (x *sockets) serve(s *socket) {
	if x.mu.stopped {
		return
	}
	x.wg.Go(func() {
		err := x.Server.Serve(s.l, s.export)
		select {
		case <-s.closed:
			return
		default:
		}
		if errors.Is(err, vhost.ErrServerClosed) {
			return
		}
		select {
		case x.failed <- err:
		default:
		}
	})
}

// close removes s, which may be nil. Virtual machines that are connected stay so.
func (s *socket) close() {
	if s == nil {
		return
	}
	s.once.Do(func() {
		close(s.closed)
		s.l.Close()
		s.of.forget(s)
	})
}

// openSockets gives each of the devices, which were just added, its socket.
func (h *Host) openSockets(ctx context.Context, devices []*Device, specs []Spec) error {
	if h.sockets.Dir == "" {
		return nil
	}
	for i, d := range devices {
		name := socketName(d.spec.Name, d.client)
		if specs[i].Socket != "" {
			name = specs[i].Socket + socketSuffix
		}
		s, err := h.sockets.listen(ctx, name, d.spec.Name)
		if err != nil {
			return err
		}
		if !h.devices.setSocket(d, s) {
			s.close()
			return conflict("device %s was removed while it was added", d.spec.Name)
		}
	}
	return nil
}

// setSocket gives d its socket. It reports false if d was removed meanwhile.
func (t *devices) setSocket(d *Device, s *socket) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if d.permanent {
		d.socket = s
	}
	return d.permanent
}

// SocketFailed has an error when virtual machines cannot connect to a socket any more,
// although nobody has removed it.
func (h *Host) SocketFailed() <-chan error { return h.sockets.failed }

// SocketDir is the directory of the sockets, or "".
func (h *Host) SocketDir() string { return h.sockets.Dir }
