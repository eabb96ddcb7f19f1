package bench

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// NBDServer is a running NBD server.
type NBDServer struct {
	Name string
	URI  string
	Cmd  *exec.Cmd

	// Group bounds its memory, if that is not nil. Stop closes it.
	Group *Cgroup

	dir string // of its socket
}

// Stop ends the server with SIGTERM.
func (s *NBDServer) Stop() error {
	s.Cmd.Process.Signal(syscall.SIGTERM)
	err := s.Cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = nil // some of them do not exit with 0 after SIGTERM
	}
	return errors.Join(err, os.RemoveAll(s.dir), s.Group.Close())
}

// Place is where a server listens: a socket in a directory of its own, or a port that
// was free a moment ago.
type Place struct{ dir, Sock, Port string }

func newPlace() (p Place, err error) {
	if p.dir, err = os.MkdirTemp("", "nbd"); err != nil {
		return p, err
	}
	p.Sock = filepath.Join(p.dir, "s")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return p, err
	}
	_, p.Port, err = net.SplitHostPort(l.Addr().String())
	return p, errors.Join(err, l.Close())
}

// uri returns the URI of the default export, over unix or tcp.
func (p Place) uri(transport string) string {
	if transport == "unix" {
		return "nbd+unix:///?socket=" + p.Sock
	}
	return "nbd://127.0.0.1:" + p.Port + "/"
}

// Listen is the address as thaw takes it.
func (p Place) Listen(transport string) string {
	if transport == "unix" {
		return "unix:" + p.Sock
	}
	return "tcp:127.0.0.1:" + p.Port
}

// LaunchNBD starts a server, and waits until it accepts connections. command returns its
// arguments; env is added to its environment.
func LaunchNBD(name, transport string, env []string, command func(p Place) []string) (*NBDServer, error) {
	p, err := newPlace()
	if err != nil {
		return nil, err
	}
	args := command(p)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = os.Stderr
	dieWithUs(cmd)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &NBDServer{Name: name, URI: p.uri(transport), Cmd: cmd, dir: p.dir}
	network, addr := "unix", p.Sock
	if transport == "tcp" {
		network, addr = "tcp", "127.0.0.1:"+p.Port
	}
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial(network, addr); err == nil {
			return s, c.Close()
		}
	}
	return nil, errors.Join(fmt.Errorf("%s does not accept connections within a minute", name), s.Stop())
}

// LaunchThaw starts thaw serve, in group unless that is nil, and waits until it is ready.
func LaunchThaw(name, transport string, group *Cgroup, thaw, image, cache string, more ...string) (*NBDServer, error) {
	p, err := newPlace()
	if err != nil {
		return nil, err
	}
	command := group.Args(append([]string{thaw, "serve", image, "--cache", cache, "--listen", p.Listen(transport), "--log-format", "json"}, more...)...)
	cmd := exec.Command(command[0], command[1:]...)
	dieWithUs(cmd)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &NBDServer{Name: name, URI: p.uri(transport), Cmd: cmd, dir: p.dir}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.HasPrefix(line, "ready") {
		return nil, errors.Join(fmt.Errorf("thaw serve is not ready: %q", line), err, s.Stop())
	}
	return s, nil
}

// LastData returns where the last data of a sparse file ends.
func LastData(f *os.File) (int64, error) {
	const seekData, seekHole = 3, 4
	var end int64
	for {
		at, err := f.Seek(end, seekData)
		if errors.Is(err, syscall.ENXIO) {
			_, err := f.Seek(0, io.SeekStart)
			return end, err
		}
		if err != nil {
			return 0, err
		}
		if end, err = f.Seek(at, seekHole); err != nil {
			return 0, err
		}
	}
}

// RandomImage writes an OCI layout with an image of one file of random bytes, tagged src.
func RandomImage(dir string, size int64) error {
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		r, w := io.Pipe()
		go func() {
			t := tar.NewWriter(w)
			err := t.WriteHeader(&tar.Header{Name: "data", Mode: 0o644, Size: size, Typeflag: tar.TypeReg})
			if err == nil {
				_, err = io.CopyN(t, rand.NewChaCha8([32]byte{1}), size)
			}
			w.CloseWithError(errors.Join(err, t.Close()))
		}()
		return r, nil
	}, tarball.WithCompressionLevel(0))
	if err != nil {
		return err
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return err
	}
	c, err := img.ConfigFile()
	if err != nil {
		return err
	}
	c = c.DeepCopy()
	c.OS, c.Architecture = "linux", "amd64"
	if img, err = mutate.ConfigFile(img, c); err != nil {
		return err
	}
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "src"}),
		layout.WithPlatform(v1.Platform{OS: "linux", Architecture: "amd64"}))
}
