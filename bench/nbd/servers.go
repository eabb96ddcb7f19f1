package main

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"thaw/bench"
)

type benchmark struct {
	options
	rec *bench.Recorder

	image  string // the block image
	device string // file with the same bytes, for the peers
	offset int64  // of the content on the device

	group *bench.Cgroup // of the thaw that is being started; nil for none
}

// prepare builds an image with one large file of random bytes, copies its device
// to a file, and fills thaw's cache with it.
func (b *benchmark) prepare(ctx context.Context) error {
	src := filepath.Join(b.dir, "src")
	b.image = "oci:" + filepath.Join(b.dir, "dst") + ":bench"
	b.device = filepath.Join(b.dir, "device")
	size := int64(b.sizeMiB) << 20
	if _, err := os.Stat(b.device); err != nil {
		if err := randomImage(src, size); err != nil {
			return err
		}
		if _, err := bench.Run(exec.CommandContext(ctx, b.thaw, "build", "--level", "1", "--size", strconv.FormatInt(size+size/4+64<<20, 10), "oci:"+src+":src", b.image)); err != nil {
			return err
		}
		s, err := b.startThaw("thaw", "unix", b.cache())
		if err != nil {
			return err
		}
		_, err = bench.Run(exec.CommandContext(ctx, "nbdcopy", s.uri, b.device+".new"))
		if err := errors.Join(err, s.stop(), os.RemoveAll(src)); err != nil {
			return err
		}
		if err := os.Rename(b.device+".new", b.device); err != nil {
			return err
		}
	}
	// The content is the last part of the device that is not a hole.
	f, err := os.Open(b.device)
	if err != nil {
		return err
	}
	defer f.Close()
	end, err := lastData(f)
	if err != nil {
		return err
	}
	b.offset = end - size
	// Read it into the page cache, for all servers.
	_, err = io.Copy(io.Discard, f)
	return err
}

// lastData returns where the last data of a sparse file ends.
func lastData(f *os.File) (int64, error) {
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

// randomImage writes an OCI layout with an image of one file.
func randomImage(dir string, size int64) error {
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

// server is a server to measure.
type server struct {
	name string
	uri  string
	cmd  *exec.Cmd
	dir  string

	group *bench.Cgroup
}

func (s *server) stop() error {
	s.cmd.Process.Signal(syscall.SIGTERM)
	err := s.cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = nil // some of them do not exit with 0 after SIGTERM
	}
	return errors.Join(err, os.RemoveAll(s.dir), s.group.Close())
}

func stopAll(servers []*server) error {
	var errs []error
	for _, s := range servers {
		errs = append(errs, s.stop())
	}
	return errors.Join(errs...)
}

// place is where a server listens: a socket in its own directory, or a port that
// was free a moment ago.
type place struct{ dir, sock, port string }

func newPlace() (p place, err error) {
	if p.dir, err = os.MkdirTemp("", "nbd"); err != nil {
		return p, err
	}
	p.sock = filepath.Join(p.dir, "s")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return p, err
	}
	_, p.port, err = net.SplitHostPort(l.Addr().String())
	return p, errors.Join(err, l.Close())
}

func (p place) uri(transport string) string {
	if transport == "unix" {
		return "nbd+unix:///?socket=" + p.sock
	}
	return "nbd://127.0.0.1:" + p.port + "/"
}

func (p place) listen(transport string) string {
	if transport == "unix" {
		return "unix:" + p.sock
	}
	return "tcp:127.0.0.1:" + p.port
}

// start starts all servers of a row.
func (b *benchmark) start(ctx context.Context, transport string, delayed bool) (servers []*server, err error) {
	add := func(name string, command func(p place) []string) {
		if err != nil {
			return
		}
		var s *server
		if s, err = launch(name, transport, command); err == nil {
			servers = append(servers, s)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	nbdkit := func(plugin ...string) func(p place) []string {
		return func(p place) []string {
			at := []string{"nbdkit", "-f", "-r", "--unix", p.sock}
			if transport == "tcp" {
				at = []string{"nbdkit", "-f", "-r", "-i", "127.0.0.1", "-p", p.port}
			}
			return append(at, plugin...)
		}
	}
	if delayed {
		add("thaw", func(p place) []string {
			return []string{self, serveVerb, "delayed", p.listen(transport), b.device}
		})
		add("nbdkit-file", nbdkit("--filter=delay", "file", b.device, "rdelay=5ms"))
		add("go-nbd", func(p place) []string {
			return []string{self, serveVerb, "go-nbd-delayed", p.listen(transport), b.device}
		})
		return servers, err
	}
	s, err := b.startThaw("thaw", transport, b.cache())
	if err != nil {
		return nil, err
	}
	servers = append(servers, s)
	// Its cache may not be in memory any more.
	if _, err := bench.Run(exec.CommandContext(ctx, "nbdcopy", s.uri, "null:")); err != nil {
		return nil, errors.Join(err, stopAll(servers))
	}
	if b.record {
		if s, err = b.startRecording(ctx, transport); err != nil {
			return nil, errors.Join(err, stopAll(servers))
		}
		servers = append(servers, s)
	}
	add("nbdkit-file", nbdkit("file", b.device))
	add("nbdkit-memory", func(p place) []string {
		// Not -r: the plugin starts empty, and is filled below.
		at := []string{"nbdkit", "-f", "--unix", p.sock}
		if transport == "tcp" {
			at = []string{"nbdkit", "-f", "-i", "127.0.0.1", "-p", p.port}
		}
		fi, err := os.Stat(b.device)
		if err != nil {
			return nil
		}
		return append(at, "memory", strconv.FormatInt(fi.Size(), 10))
	})
	if err == nil {
		_, err = bench.Run(exec.CommandContext(ctx, "nbdcopy", b.device, servers[len(servers)-1].uri))
	}
	add("qemu-nbd", func(p place) []string {
		at := []string{"qemu-nbd", "-r", "-f", "raw", "--aio=io_uring", "-t", "-e", "16", "-k", p.sock}
		if transport == "tcp" {
			at = []string{"qemu-nbd", "-r", "-f", "raw", "--aio=io_uring", "-t", "-e", "16", "-b", "127.0.0.1", "-p", p.port}
		}
		return append(at, b.device)
	})
	add("go-nbd", func(p place) []string {
		return []string{self, serveVerb, "go-nbd", p.listen(transport), b.device}
	})
	return servers, err
}

// launch starts a server, and waits until it accepts connections.
func launch(name, transport string, command func(p place) []string) (*server, error) {
	p, err := newPlace()
	if err != nil {
		return nil, err
	}
	args := command(p)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &server{name: name, uri: p.uri(transport), cmd: cmd, dir: p.dir}
	network, addr := "unix", p.sock
	if transport == "tcp" {
		network, addr = "tcp", "127.0.0.1:"+p.port
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial(network, addr); err == nil {
			return s, c.Close()
		}
	}
	return nil, errors.Join(fmt.Errorf("%s does not accept connections within 20 s", name), s.stop())
}

func (b *benchmark) cache() string { return filepath.Join(b.dir, "cache") }

// recording is the name of a thaw that records a start throughout.
const recording = "thaw-recording"

// startRecording starts a thaw that records, on a copy of the cache, because a
// cache belongs to one process.
func (b *benchmark) startRecording(ctx context.Context, transport string) (*server, error) {
	cache := b.cache() + "-recording"
	if _, err := os.Stat(cache); errors.Is(err, os.ErrNotExist) {
		if _, err := bench.Run(exec.CommandContext(ctx, "cp", "-a", "--sparse=always", b.cache(), cache)); err != nil {
			return nil, err
		}
	}
	return b.startThaw(recording, transport, cache, "--record", filepath.Join(b.dir, "trace"), "--record-for", "1h", "--record-quiet", "1h")
}

// startThaw starts thaw on a cache that has everything.
func (b *benchmark) startThaw(name, transport, cache string, args ...string) (*server, error) {
	p, err := newPlace()
	if err != nil {
		return nil, err
	}
	command := b.group.Args(append([]string{b.thaw, "serve", b.image, "--cache", cache, "--listen", p.listen(transport), "--log-format", "json"}, args...)...)
	cmd := exec.Command(command[0], command[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &server{name: name, uri: p.uri(transport), cmd: cmd, dir: p.dir}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.HasPrefix(line, "ready") {
		return nil, errors.Join(fmt.Errorf("thaw serve is not ready: %q", line), err, s.stop())
	}
	return s, nil
}

// startMixed starts a server with a part that takes 5 ms per read.
func (b *benchmark) startMixed(context.Context) (*server, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return launch("thaw", "unix", func(p place) []string {
		return []string{self, serveVerb, "mixed", p.listen("unix"), b.device}
	})
}
