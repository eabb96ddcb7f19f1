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

// prepared is an image in all forms that the rows start.
type prepared struct {
	bench.Workload
	digest   v1.Hash // of the manifest
	registry *bench.Registry
	files    *fileServer       // serves the flat image
	flat     string            // file with the flat image, on the disk
	resident string            // directory of a cache that has served a start
	trace    string            // file with the trace of a start
	planned  int64             // compressed bytes that a start reads
	size     int64             // of a full pull
	stored   int64             // of the block image
	read     string            // how many bytes the files have, once expect has found out
	lacks    map[string]string // rows that cannot run, and why
	dir      string
	memory   string // tmpfs in dir
}

// Names in the registry. Each has its own repository, so that a row does not find
// what lies beside the image for another row.
const (
	sourceName = "source:latest"
	plainName  = "plain:thaw"
	traceName  = "trace:thaw"
	bundleName = "bundle:thaw"
)

func (p *prepared) at(addr, name string) string { return addr + "/" + p.Name + "-" + name }

// direct returns a reference to the registry itself, not over a link.
func (p *prepared) direct(name string) string { return p.at(p.registry.Addr, name) }

// prepare makes what the chosen rows need. What is on the far side of a link lies
// in a tmpfs, because only the host's page cache is to be dropped.
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
	if p.size, err = pullSize(img); err != nil {
		return p, err
	}
	progress("%s: pushed, %s", w.Name, bench.Bytes(p.size))
	if p.stored, err = b.build(ctx, p); err != nil {
		return p, err
	}
	if err := b.recordStart(ctx, p); err != nil {
		return p, err
	}
	if p.planned, err = b.bundle(ctx, p); err != nil {
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
	progress("%s: a start reads %s", w.Name, bench.Bytes(p.planned))
	return p, nil
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

// pullSize returns how many bytes a full pull transfers.
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

// build builds the block image, and pushes it under all its names.
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
		return 0, fmt.Errorf("output of thaw build: %w", err)
	}
	for _, name := range []string{plainName, traceName, bundleName} {
		if _, err := bench.Push(ctx, oci, "thaw", p.direct(name)); err != nil {
			return 0, err
		}
	}
	progress("%s: built, %s", p.Name, bench.Bytes(built.Stored))
	return built.Stored, os.RemoveAll(oci)
}

// recordStart records a trace of a start, pushes it beside the images that have
// one, and keeps the cache.
func (b *benchmark) recordStart(ctx context.Context, p *prepared) error {
	p.resident, p.trace = filepath.Join(p.dir, "resident"), filepath.Join(p.dir, "trace")
	if err := os.Mkdir(p.resident, 0o755); err != nil {
		return err
	}
	// Twice: the reads of two starts differ a little, and the cache is to have all.
	for _, args := range [][]string{{"--record", p.trace}, nil} {
		c := &clock{}
		if _, err := b.serveAndRun(ctx, p, byNode, p.direct(traceName), p.resident, start, c, args...); err != nil {
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

// bundle packs the bundle of the trace, and returns how many compressed bytes the leaves
// have that a start touches: those of the bundle without its head.
func (b *benchmark) bundle(ctx context.Context, p *prepared) (int64, error) {
	out, err := bench.Output(exec.CommandContext(ctx, b.thaw, "trace", "pack", p.direct(bundleName), "--json"))
	if err != nil {
		return 0, err
	}
	return leafBytes([]byte(out))
}

// leafBytes reads the output of `thaw trace pack`.
func leafBytes(packed []byte) (int64, error) {
	var s struct {
		Bytes int64 `json:"bytes"`
		Head  int64 `json:"head_bytes"` // 0 from versions whose bundles have whole chunks
	}
	if err := json.Unmarshal(packed, &s); err != nil {
		return 0, fmt.Errorf("output of thaw trace pack: %w", err)
	}
	n := s.Bytes - s.Head
	if n <= 0 {
		return 0, errors.New("thaw trace pack lists no bytes that a start reads")
	}
	return n, nil
}

// flatten copies the device to a file on the disk and to one in memory, both
// sparse.
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

// fileServer serves one file over HTTP, with range requests.
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
