package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"thaw/bench"
)

// prepared is an image in all the forms that rows start it from.
type prepared struct {
	bench.Workload
	digest   v1.Hash // of the image's manifest
	registry *bench.Registry
	files    *fileServer // of the flat image
	flat     string      // the same, on the disk
	resident string      // directory of a cache that has served a start
	trace    string      // file
	lacks    map[string]string
	dir      string
	memory   string // a tmpfs in it
}

// Names in the registry, each of a repository of its own, so that one row does
// not find what was put beside the image for another.
const (
	sourceName = "source:latest"
	plainName  = "plain:thaw"
	traceName  = "trace:thaw"
	bundleName = "bundle:thaw"
)

func (p *prepared) at(addr, name string) string { return addr + "/" + p.Name + "-" + name }

// direct is an image as the registry has it, not over a link.
func (p *prepared) direct(name string) string { return p.at(p.registry.Addr, name) }

// prepare makes what the chosen rows want. What is on the far side of a link is
// kept in a tmpfs: it is not of the host whose memory is dropped.
func (b *benchmark) prepare(ctx context.Context, w bench.Workload) (p *prepared, err error) {
	p = &prepared{Workload: w, dir: filepath.Join(b.dir, w.Name), lacks: make(map[string]string)}
	memory := filepath.Join(p.dir, "far")
	if err := os.MkdirAll(memory, 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", memory, "tmpfs", 0, "size=80%"); err != nil {
		return p, fmt.Errorf("mount a tmpfs at %s: %w", memory, err)
	}
	p.memory = memory
	if p.registry, err = bench.StartRegistry(ctx, p.memory); err != nil {
		return p, err
	}
	img, err := bench.Push(ctx, w.Dir, "latest", p.direct(sourceName))
	if err != nil {
		return p, err
	}
	if p.digest, err = img.Digest(); err != nil {
		return p, err
	}
	size, err := pullSize(img)
	if err != nil {
		return p, err
	}
	progress("%s: pushed, %s", w.Name, bench.Bytes(size))
	stored, err := b.build(ctx, p)
	if err != nil {
		return p, err
	}
	if err := b.recordStart(ctx, p); err != nil {
		return p, err
	}
	planned, err := b.planned(ctx, p)
	if err != nil {
		return p, err
	}
	if err := b.bundle(ctx, p); err != nil {
		return p, err
	}
	if err := b.flatten(ctx, p); err != nil {
		return p, err
	}
	if p.files, err = serveFile(filepath.Join(p.memory, "flat")); err != nil {
		return p, err
	}
	if err := b.prepareStargz(ctx, p); err != nil {
		return p, err
	}
	progress("%s: a start reads %s", w.Name, bench.Bytes(planned))
	return p, b.results.addPlan(w.Name, planned, size, stored)
}

func (p *prepared) close() (err error) {
	if p.files != nil {
		err = p.files.close()
	}
	if p.registry != nil {
		p.registry.Close()
	}
	if p.memory != "" {
		err = errors.Join(err, unix.Unmount(p.memory, unix.MNT_DETACH))
	}
	return errors.Join(err, os.RemoveAll(p.dir))
}

// pullSize is what a full pull transfers.
func pullSize(img v1.Image) (int64, error) {
	m, err := img.Manifest()
	if err != nil {
		return 0, err
	}
	n, err := img.Size() // of the manifest
	if err != nil {
		return 0, err
	}
	n += m.Config.Size
	for _, l := range m.Layers {
		n += l.Size
	}
	return n, nil
}

// build makes the block image, and puts it under all its names.
func (b *benchmark) build(ctx context.Context, p *prepared) (stored int64, err error) {
	oci := filepath.Join(p.dir, "oci")
	args := []string{"build", "oci:" + p.Ref(), "oci:" + oci + ":thaw", "--size", b.size, "--temp", p.dir, "--json"}
	out, err := bench.Output(exec.CommandContext(ctx, b.thaw, append(args, strings.Fields(b.buildArgs)...)...))
	if err != nil {
		return 0, err
	}
	var built struct {
		Stored int64 `json:"stored_bytes"`
	}
	if err := json.Unmarshal([]byte(out), &built); err != nil {
		return 0, fmt.Errorf("what thaw build says: %w", err)
	}
	for _, name := range []string{plainName, traceName, bundleName} {
		if _, err := bench.Push(ctx, oci, "thaw", p.direct(name)); err != nil {
			return 0, err
		}
	}
	progress("%s: built, %s", p.Name, bench.Bytes(built.Stored))
	return built.Stored, os.RemoveAll(oci)
}

// recordStart makes a trace of a start, puts it beside the images that have
// one, and keeps the cache.
func (b *benchmark) recordStart(ctx context.Context, p *prepared) error {
	p.resident, p.trace = filepath.Join(p.dir, "resident"), filepath.Join(p.dir, "trace")
	if err := os.Mkdir(p.resident, 0o755); err != nil {
		return err
	}
	// Twice: reads differ a little, and the cache is to have them all.
	for _, args := range [][]string{{"--record", p.trace}, nil} {
		c := &clock{}
		if _, err := b.serveAndRun(ctx, p, p.direct(traceName), p.resident, c, args...); err != nil {
			return fmt.Errorf("record a start: %w", err)
		}
	}
	for _, name := range []string{traceName, bundleName} {
		if _, err := bench.Output(exec.CommandContext(ctx, b.thaw, "trace", "push", p.direct(name), p.trace)); err != nil {
			return err
		}
	}
	return nil
}

// planned is what a start reads, as compressed in the registry.
func (b *benchmark) planned(ctx context.Context, p *prepared) (int64, error) {
	out, err := bench.Output(exec.CommandContext(ctx, b.thaw, "trace", "show", p.trace, "--image", p.direct(traceName), "--json"))
	if err != nil {
		return 0, err
	}
	return planBytes([]byte(out))
}

// planBytes sums the streams of what `thaw trace show` says. The plan fetches
// each chunk once, though several of its ranges be touched.
func planBytes(show []byte) (int64, error) {
	var s struct {
		Streams []struct {
			Stored int64 `json:"stored_bytes"`
		} `json:"streams"`
	}
	if err := json.Unmarshal(show, &s); err != nil {
		return 0, fmt.Errorf("what thaw trace show says: %w", err)
	}
	var n int64
	for _, x := range s.Streams {
		n += x.Stored
	}
	if n <= 0 {
		return 0, errors.New("thaw trace show knows of no bytes that a start reads")
	}
	return n, nil
}

func (b *benchmark) bundle(ctx context.Context, p *prepared) error {
	if !b.wants(thawBundle) {
		return nil
	}
	_, err := bench.Output(exec.CommandContext(ctx, b.thaw, "trace", "pack", p.direct(bundleName)))
	return err
}

// flatten copies the device to a file on the disk and to one in memory, holes
// as holes.
func (b *benchmark) flatten(ctx context.Context, p *prepared) (err error) {
	dir := filepath.Join(p.dir, "flatten")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s, err := bench.Serve(ctx, b.thaw, p.direct(plainName), dir)
	if err != nil {
		return err
	}
	defer s.Kill()
	p.flat = filepath.Join(p.dir, "flat")
	if _, err := bench.Output(exec.CommandContext(ctx, "nbdcopy", "nbd+unix:///?socket="+s.Socket, p.flat)); err != nil {
		return err
	}
	if _, err := s.Stop(); err != nil {
		return err
	}
	_, err = bench.Output(exec.CommandContext(ctx, "nbdcopy", p.flat, filepath.Join(p.memory, "flat")))
	return err
}

// fileServer serves one file over HTTP, in ranges.
type fileServer struct {
	l    net.Listener
	http *http.Server
	wg   sync.WaitGroup
}

func serveFile(path string) (*fileServer, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &fileServer{l: l, http: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, path) })}}
	s.wg.Go(func() { s.http.Serve(l) }) // until close
	return s, nil
}

func (s *fileServer) Addr() string { return s.l.Addr().String() }

func (s *fileServer) close() error {
	err := s.http.Close()
	s.wg.Wait()
	return err
}
