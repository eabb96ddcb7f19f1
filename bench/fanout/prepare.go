package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/bench"
	"thaw/blockmap"
	"thaw/blockmap/flatten"
	"thaw/tracefile"
)

// site is a registry with a block image, and what a start of it reads.
type site struct {
	bench.Workload
	dir                  string
	registry             *bench.Registry
	source               v1.Image
	trace                *tracefile.Trace
	index                *blockmap.Index
	bundle               int64 // its bytes
	manifest, indexBytes int64
	script               script
	variants             []variant
}

// variant is an image that shares all layers with the workload's but the last one.
type variant struct {
	tag    string
	index  *blockmap.Index
	script script
	opens  int64 // bytes of its manifest and index
}

// Tags in the repository of the site. Each has its own repository where what lies beside the
// image matters.
const (
	plainTag  = "plain:thaw"
	tracedTag = "traced:thaw"
	bundleTag = "bundle:thaw"
	variants  = "variants"
)

// at returns the reference of an image behind an address of the registry.
func (s *site) at(addr, tag string) string { return addr + "/" + s.Name + "-" + tag }

// direct returns the reference of an image in the registry itself.
func (s *site) direct(tag string) string { return s.at(s.registry.Addr, tag) }

// prepare pushes and builds the image, records a start, and makes n variants.
func (b *benchmark) prepare(ctx context.Context, w bench.Workload, n int) (s *site, err error) {
	s = &site{Workload: w, dir: filepath.Join(b.dir, w.Name)}
	if err := os.MkdirAll(filepath.Join(s.dir, "registry"), 0o755); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.registry, err = bench.StartRegistry(ctx, filepath.Join(s.dir, "registry")); err != nil {
		return nil, err
	}
	for _, tag := range []string{"plain:source", variants + ":source"} {
		if s.source, err = bench.Push(ctx, w.Dir, "latest", s.direct(tag)); err != nil {
			return nil, err
		}
	}
	oci := filepath.Join(s.dir, "oci")
	if err := b.thawBuild(ctx, "oci:"+w.Ref(), "oci:"+oci+":thaw"); err != nil {
		return nil, err
	}
	for _, tag := range []string{plainTag, tracedTag, bundleTag, variants + ":thaw"} {
		if _, err := bench.Push(ctx, oci, "thaw", s.direct(tag)); err != nil {
			return nil, err
		}
	}
	if err := os.RemoveAll(oci); err != nil {
		return nil, err
	}
	var opens int64
	if s.index, opens, err = indexOf(ctx, s.direct(plainTag)); err != nil {
		return nil, err
	}
	s.indexBytes = int64(len(s.index.Encode()))
	s.manifest = opens - s.indexBytes
	file := b.trace
	if file == "" {
		file = filepath.Join(s.dir, "trace")
		if err := b.record(ctx, s, file); err != nil {
			return nil, fmt.Errorf("record a start: %w", err)
		}
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if s.trace, err = tracefile.Read(bytes.NewReader(raw)); err != nil {
		return nil, err
	}
	for _, tag := range []string{tracedTag, bundleTag} {
		if _, err := bench.Output(exec.CommandContext(ctx, b.thaw, "trace", "push", s.direct(tag), file)); err != nil {
			return nil, err
		}
	}
	packed, err := bench.Output(exec.CommandContext(ctx, b.thaw, "trace", "pack", s.direct(bundleTag), "--json"))
	if err != nil {
		return nil, err
	}
	var p struct {
		Bytes int64 `json:"bytes"`
	}
	if err := json.Unmarshal([]byte(packed), &p); err != nil {
		return nil, fmt.Errorf("output of thaw trace pack: %w", err)
	}
	s.bundle = p.Bytes
	for i := range n {
		v, err := b.variant(ctx, s, i)
		if err != nil {
			return nil, fmt.Errorf("variant %d: %w", i, err)
		}
		s.variants = append(s.variants, v)
	}
	progress("%s: pushed, built, recorded; %d variants", w.Name, n)
	return s, nil
}

func (s *site) close() error {
	if s.registry != nil {
		s.registry.Close()
	}
	return os.RemoveAll(s.dir)
}

func (b *benchmark) thawBuild(ctx context.Context, from, to string, more ...string) error {
	_, err := bench.Output(exec.CommandContext(ctx, b.thaw, append([]string{"build", from, to, "--size", b.size, "--temp", b.dir}, more...)...))
	return err
}

// record records a start with everything resident, so that the trace has the times of the
// program alone.
func (b *benchmark) record(ctx context.Context, s *site, file string) error {
	dir := filepath.Join(s.dir, "record")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, args := range [][]string{nil, {"--record", file}} {
		if err := b.mountAndRun(ctx, s, dir, args); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

func (b *benchmark) mountAndRun(ctx context.Context, s *site, dir string, args []string) (err error) {
	server, err := bench.Serve(ctx, b.thaw, s.direct(plainTag), dir, append([]string{"--complete", "off"}, args...)...)
	if err != nil {
		return err
	}
	defer server.Kill()
	root, err := bench.Mount(ctx, server.Socket, dir, readAhead>>10)
	if err != nil {
		return err
	}
	out, _, err := root.Run(ctx, bench.Start)
	if err == nil {
		err = s.Check(out)
	}
	err = errors.Join(err, root.Close(), os.Remove(filepath.Join(dir, "root")), os.Remove(filepath.Join(dir, "nbd")))
	if err != nil {
		return err
	}
	_, err = server.Stop()
	return err
}

// variant makes an image with one more layer, which has a file of its own.
func (b *benchmark) variant(ctx context.Context, s *site, i int) (v variant, err error) {
	v.tag = fmt.Sprintf("%s:v%d", variants, i)
	layer, err := ownLayer(i)
	if err != nil {
		return v, err
	}
	img, err := mutate.AppendLayers(s.source, layer)
	if err != nil {
		return v, err
	}
	source := s.direct(fmt.Sprintf("%s:source%d", variants, i))
	ref, err := name.ParseReference(source, name.Insecure)
	if err != nil {
		return v, err
	}
	if err := remote.Write(ref, img, remote.WithContext(ctx)); err != nil {
		return v, err
	}
	if err := b.thawBuild(ctx, source, s.direct(v.tag)); err != nil {
		return v, err
	}
	if v.index, v.opens, err = indexOf(ctx, s.direct(v.tag)); err != nil {
		return v, err
	}
	t, _, err := tracefile.Translate(s.trace, s.index, v.index)
	if err != nil {
		return v, err
	}
	v.script = scriptOf(withOwnFile(t, v.index))
	return v, nil
}

// withOwnFile returns a trace that also reads what the last stream has.
func withOwnFile(t *tracefile.Trace, ix *blockmap.Index) *tracefile.Trace {
	more := *t
	more.Touches = append([]tracefile.Touch(nil), t.Touches...)
	var at = t.Touches[len(t.Touches)-1].At
	for _, r := range ix.Runs {
		if int(r.Stream) == len(ix.Streams)-1 {
			more.Touches = append(more.Touches, tracefile.Touch{At: at, Block: r.Device, Count: r.Count})
		}
	}
	return &more
}

// ownLayer makes a layer with a file of 64 KiB that no other variant has.
func ownLayer(i int) (v1.Layer, error) {
	data := make([]byte, 64<<10)
	rng := rand.NewChaCha8([32]byte{byte(i), byte(i >> 8), 1})
	_, _ = rng.Read(data) // never fails
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	h := &tar.Header{Name: "app/own", Mode: 0o644, Size: int64(len(data)), Typeflag: tar.TypeReg}
	err := w.WriteHeader(h)
	if err == nil {
		_, err = w.Write(data)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil },
		tarball.WithMediaType(types.OCILayer))
}

// indexOf reads the index of a block image, and says how many bytes that and the manifest have.
func indexOf(ctx context.Context, image string) (*blockmap.Index, int64, error) {
	ref, err := name.ParseReference(image, name.Insecure)
	if err != nil {
		return nil, 0, err
	}
	got, err := remote.Get(ref, remote.WithContext(ctx))
	if err != nil {
		return nil, 0, err
	}
	m, err := flatten.ParseImage(got.Manifest)
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w", image, err)
	}
	layer, err := remote.Layer(ref.Context().Digest(m.Index.Digest.String()), remote.WithContext(ctx))
	if err != nil {
		return nil, 0, err
	}
	body, err := layer.Compressed()
	if err != nil {
		return nil, 0, err
	}
	defer body.Close()
	raw, err := io.ReadAll(io.LimitReader(body, m.Index.Size+1))
	if err != nil {
		return nil, 0, err
	}
	ix, err := m.ParseIndex(raw)
	return ix, int64(len(got.Manifest) + len(raw)), err
}

// needed returns the chunks that scripts need, by their digest: each with its stored bytes.
func needed(all map[blockmap.Digest]int64, s script, ix *blockmap.Index) {
	for _, r := range s {
		for block, end := uint32(r.off/blockmap.BlockSize), uint32((r.off+int64(r.n))/blockmap.BlockSize); block < end; {
			run, ok := ix.Lookup(block)
			skip := block - run.Device
			n := min(end-block, run.Count-skip)
			if ok {
				table := &ix.Streams[run.Stream]
				first, last := run.Block+skip, run.Block+skip+n-1
				for i := table.Find(first); i < len(table.Chunks) && table.Chunks[i].Block <= last; i++ {
					c := &table.Chunks[i]
					all[c.Digest] = int64(c.Stored)
				}
			}
			block += n
		}
	}
}

func sum(all map[blockmap.Digest]int64) (n int64) {
	for _, b := range all {
		n += b
	}
	return n
}
