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
	"strconv"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"thaw/bench"
)

// layerContent is the size of the one file of a layer of the images that -layers
// compares: small enough for the link to matter little, so that what grows with the
// number of layers is round trips.
const layerContent = 8 << 10

// layerSides are what -layers measures, in the order of a round: each needs what the
// one before has left.
var layerSides = []string{"first", "unchanged", "elsewhere", "ready"}

// layerCounts measures what grows with the number of layers: it builds images of
// small layers over a slow link, for the first time, again, and in another repository
// of the registry, and serves them.
func (b *benchmark) layerCounts(ctx context.Context) (err error) {
	reg, err := bench.StartRegistry(ctx, b.dir)
	if err != nil {
		return err
	}
	defer reg.Close()
	defer func() {
		err = errors.Join(err, os.Remove(filepath.Join(b.dir, "registry.yml")), os.RemoveAll(filepath.Join(b.dir, "storage")))
	}()
	link, err := bench.ListenLink(reg.Addr, b.rtt, b.mbits*1e6)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, link.Close()) }()
	var counts []int
	for s := range strings.SplitSeq(b.counts, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			return fmt.Errorf("-counts %s: %q is not a number of layers", b.counts, s)
		}
		counts = append(counts, n)
	}
	var sides []func(context.Context, int) error
	for _, n := range counts {
		img, err := layeredImage(n)
		if err != nil {
			return err
		}
		sides = append(sides, func(ctx context.Context, round int) error {
			return b.layerRound(ctx, reg, link, img, n, round)
		})
	}
	if err := bench.Alternate(ctx, b.rounds, sides...); err != nil {
		return err
	}
	return b.layerTable(counts)
}

// layeredImage is an image of n small layers.
func layeredImage(n int) (v1.Image, error) {
	rng := rand.New(rand.NewPCG(uint64(n), 1))
	layers := make([]v1.Layer, n)
	for i := range layers {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		content := make([]byte, layerContent)
		for k := range content {
			content[k] = byte(rng.Uint32())
		}
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("file-%d", i), Mode: 0o644, Size: layerContent}); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
		if err := w.Close(); err != nil {
			return nil, err
		}
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
		if err != nil {
			return nil, err
		}
		layers[i] = l
	}
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		return nil, err
	}
	c, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	c = c.DeepCopy()
	c.OS, c.Architecture = "linux", "amd64"
	return mutate.ConfigFile(img, c)
}

func layerName(n int, side string) string { return fmt.Sprintf("Layers/layers=%d/%s", n, side) }

// layerRound builds and serves one image in repositories of its own.
func (b *benchmark) layerRound(ctx context.Context, reg *bench.Registry, link *bench.Link, img v1.Image, n, round int) error {
	repo := func(kind string) string { return fmt.Sprintf("layers/%d-%d-%s:v1", n, round, kind) }
	for _, kind := range []string{"one", "other"} {
		ref, err := name.ParseReference(reg.Addr+"/"+repo(kind), name.Insecure)
		if err != nil {
			return err
		}
		if err := remote.Write(ref, img, remote.WithContext(ctx)); err != nil {
			return err
		}
	}
	for _, side := range layerSides {
		if err := b.calm(ctx); err != nil {
			return err
		}
		at := link.Addr().String() + "/"
		before := link.Stats()
		var ms []bench.Measure
		var err error
		switch side {
		case "first", "unchanged":
			ms, err = b.buildLayers(ctx, at+repo("one"))
		case "elsewhere":
			var more []string
			if b.reuse {
				more = []string{"--reuse", at + repo("one")}
			}
			ms, err = b.buildLayers(ctx, at+repo("other"), more...)
		case "ready":
			ms, err = b.serveLayers(ctx, at+repo("one"))
		}
		if err != nil {
			return err
		}
		used := link.Stats().Sub(before)
		ms = append(ms, bench.Measure{Value: float64(used.Up), Unit: "up-B"}, bench.Measure{Value: float64(used.Down), Unit: wire},
			bench.Measure{Value: float64(used.Connections), Unit: "connections"})
		if err := b.rec.Add(layerName(n, side), ms...); err != nil {
			return err
		}
		progress("%d layers, round %d, %s: %s", n, round+1, side, bench.Seconds(ms[0].Value))
	}
	return nil
}

func (b *benchmark) buildLayers(ctx context.Context, ref string, more ...string) ([]bench.Measure, error) {
	args := append([]string{"build", ref, "--size", "1G", "--temp", b.dir, "--json"}, more...)
	if b.jobs > 0 {
		args = append(args, "--jobs", strconv.Itoa(b.jobs))
	}
	cmd := exec.CommandContext(ctx, b.thaw, args...)
	var out strings.Builder
	cmd.Stdout = &out
	u, err := bench.Run(cmd)
	if err != nil {
		return nil, err
	}
	var built struct {
		Seconds float64 `json:"seconds"`
	}
	if err := json.Unmarshal([]byte(out.String()), &built); err != nil {
		return nil, fmt.Errorf("output of thaw build: %w", err)
	}
	return u.Measures(), nil
}

func (b *benchmark) serveLayers(ctx context.Context, ref string) (ms []bench.Measure, err error) {
	dir, err := os.MkdirTemp(b.dir, "serve-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s, err := bench.Serve(ctx, b.thaw, ref, dir)
	if err != nil {
		return nil, err
	}
	defer s.Kill()
	first := s.Ready
	if _, err := s.Stop(); err != nil {
		return nil, err
	}
	again, err := bench.Serve(ctx, b.thaw, ref, dir) // from the cache
	if err != nil {
		return nil, err
	}
	defer again.Kill()
	if _, err := again.Stop(); err != nil {
		return nil, err
	}
	return []bench.Measure{{Value: float64(first), Unit: bench.Wall}, {Value: float64(again.Ready), Unit: "again-ns"}}, nil
}

func (b *benchmark) layerTable(counts []int) error {
	t := bench.Table{Columns: []string{"layers", "first build", "unchanged", "in another repository", "bytes sent there", "serve is ready", "serve is ready again"}}
	for _, n := range counts {
		med := func(side, unit string) float64 { return b.rec.Median(layerName(n, side), unit) }
		t.Row(strconv.Itoa(n), bench.Seconds(med("first", bench.Wall)), bench.Seconds(med("unchanged", bench.Wall)), bench.Seconds(med("elsewhere", bench.Wall)),
			bench.Bytes(med("elsewhere", "up-B")), bench.Seconds(med("ready", bench.Wall)), bench.Seconds(med("ready", "again-ns")))
	}
	fmt.Fprintln(b.out)
	_, err := t.WriteTo(b.out)
	return err
}
