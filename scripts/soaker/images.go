package main

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// registry is a running docker-registry.
type registry struct {
	host string
	cmd  *exec.Cmd
}

func startRegistry(dir string) (*registry, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	host := l.Addr().String()
	l.Close()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "config.yml")
	err = os.WriteFile(config, fmt.Appendf(nil, "version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %q}\n", dir, host), 0o600)
	if err != nil {
		return nil, err
	}
	r := &registry{host: host, cmd: exec.Command("docker-registry", "serve", config)}
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	for range 200 {
		c, err := net.Dial("tcp", host)
		if err == nil {
			c.Close()
			return r, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	r.stop()
	return nil, fmt.Errorf("docker-registry does not listen on %s within 10 s", host)
}

func (r *registry) stop() {
	r.cmd.Process.Kill()
	r.cmd.Wait()
}

// command runs a program to its end.
func command(ctx context.Context, program string, args ...string) error {
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %v: %w\n%s", program, args, err, out)
	}
	return nil
}

// image is a block image, and the content of its device.
type image struct {
	name    string // repository and tag
	content []byte
}

// buildImages builds images that share a layer, and reads each once from a server
// without faults.
func buildImages(ctx context.Context, thaw, dir, host string, rng *rand.Rand) ([]*image, error) {
	base, err := layer(rng, 2<<20)
	if err != nil {
		return nil, err
	}
	var set []*image
	for i := range images {
		own, err := layer(rng, 6<<20)
		if err != nil {
			return nil, err
		}
		img, err := mutate.AppendLayers(empty.Image, base, own)
		if err != nil {
			return nil, err
		}
		m := &image{name: fmt.Sprintf("soak/image%d:v1", i)}
		ref, err := name.ParseReference(host + "/" + m.name)
		if err != nil {
			return nil, err
		}
		if err := remote.Write(ref, img, remote.WithContext(ctx)); err != nil {
			return nil, err
		}
		if err := command(ctx, thaw, "build", ref.String(), "--size", "32M"); err != nil {
			return nil, err
		}
		s := &server{thaw: thaw, cache: filepath.Join(dir, "clean"), socket: filepath.Join(dir, "clean.sock"), log: filepath.Join(dir, "clean.log"),
			args: []string{"--allow", host + "/**"}}
		if err := s.start(); err != nil {
			return nil, err
		}
		m.content, err = copyOut(ctx, s.socket, ref.String(), dir)
		s.kill()
		if err != nil {
			return nil, err
		}
		set = append(set, m)
	}
	return set, os.RemoveAll(filepath.Join(dir, "clean"))
}

// layer returns a layer with files of random bytes that compress a little.
func layer(rng *rand.Rand, size int) (v1.Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; b.Len() < size; i++ {
		content := make([]byte, 1+rng.IntN(400_000))
		for k := range content {
			if k%3 > 0 {
				content[k] = byte(rng.Uint32())
			}
		}
		h := &tar.Header{Name: fmt.Sprintf("f%d-%d", size, i), Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
}

// copyOut reads an export with nbdcopy.
func copyOut(ctx context.Context, socket, export, dir string) ([]byte, error) {
	out := filepath.Join(dir, "copied")
	defer os.Remove(out)
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	if err := command(ctx, "nbdcopy", uri(socket, export), out); err != nil {
		return nil, err
	}
	return os.ReadFile(out)
}

func uri(socket, export string) string { return "nbd+unix:///" + export + "?socket=" + socket }

// nbdcopyWhole reads every image with nbdcopy, and compares it.
func nbdcopyWhole(ctx context.Context, socket, host string, set []*image, dir string) error {
	for _, m := range set {
		got, err := copyOut(ctx, socket, host+"/"+m.name, dir)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, m.content) {
			return fmt.Errorf("nbdcopy of %s: %w", m.name, errWrong)
		}
	}
	return nil
}
