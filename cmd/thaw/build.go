package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"

	"thaw/blockmap"
	"thaw/blockmap/flatten"
	"thaw/cmd/thaw/internal/host"
	"thaw/fetcher/registry"
	"thaw/tracefile"
)

func buildCommand(a *app) *cobra.Command {
	deviceSize, chunkSize := size(flatten.DefaultSize), size(flatten.DefaultChunkSize)
	var o flatten.Options
	var traces, pin, reuse []string
	c := &cobra.Command{
		Use:   "build SRC [DST]",
		Short: "Build a block image from a container image",
		Long: `build flattens a container image into a block image, and pushes it.

SRC is the container image: any IMAGE that "thaw help" lists. DST is where the
block image goes: a registry reference with a tag, or oci:DIR:TAG. Without DST
it becomes a referrer of SRC, in the same repository or layout, so that the name
of SRC finds it. It gets the tag "thaw-image-…" as well, for registries that
lose referrers.

build converts several layers at once. It keeps each converted layer in the
target under the tag "thaw-layer-…". Later builds neither download nor push a
layer that is there. An interrupted build leaves no image, only the layers that
were complete.

--reuse REPO names another repository or layout in which earlier builds have
left converted layers. build takes from there what the target lacks: a registry
mounts it from one of its repositories in another, and build copies it from
elsewhere. If SRC has no digest, build looks in the repository of SRC as well.
Whoever may push to such a repository decides what the files of these layers
contain.

build predicts which files startup will read: the program that the image runs,
the libraries that it is linked with, and the interpreter of a script. The
prediction is part of the block image. "thaw serve" uses it when it has no
trace.

With --trace, build also packs recorded starts into a bundle, as "thaw trace
pack" does. They may be starts of an earlier version of the image: thaw finds
the content that both versions have.`,
		Example: `  thaw build registry.example/team/app:v1
  thaw build registry.example/team/app:v1 oci:/srv/images:app
  thaw build docker-archive:app.tar registry.example/team/app:v1-thaw --size 20G
  thaw build registry.example/team/app:v2 --trace registry.example/team/app:v1`,
		Args: args(cobra.RangeArgs(1, 2)),
		RunE: func(c *cobra.Command, args []string) error {
			o.Size, o.ChunkSize = int64(deviceSize), int(chunkSize)
			if err := flatten.CheckChunkSize(o.ChunkSize); err != nil {
				return usageError{err}
			}
			if o.Requests < 0 {
				return usageError{fmt.Errorf("--requests %d: it must be at least 1, or 0 for the default", o.Requests)}
			}
			if o.Jobs < 0 {
				return usageError{fmt.Errorf("--jobs %d: it must be at least 1, or 0 for as many as there are processors, 8 at most", o.Jobs)}
			}
			if o.Size >= tooLargeDevice {
				return usageError{fmt.Errorf("--size %s: it must be less than %s", deviceSize.String(), sizeString(tooLargeDevice))}
			}
			if o.Level < 1 || o.Level > 22 {
				return usageError{fmt.Errorf("--level %d: it must be from 1 to 22", o.Level)}
			}
			o.TempDir = a.temp
			return a.build(c.Context(), args, o, traces, pin, reuse)
		},
	}
	f := c.Flags()
	f.Var(&deviceSize, "size", "`SIZE` of the device in bytes, or with K, M, G or T; the free space in it costs nothing")
	f.Var(&chunkSize, "chunk-size", "`SIZE` of a chunk, which is what one fetch brings: a power of two from 16K to 4M")
	f.IntVar(&o.Level, "level", flatten.DefaultLevel, "compress chunks at the zstd level `N`, 1 to 22")
	f.IntVar(&o.Jobs, "jobs", 0, "convert `N` layers at once; this bounds the work of processors, not waiting (default: the number of processors, at most 8)")
	f.IntVar(&o.Requests, "requests", flatten.DefaultRequests, "have at most `N` requests for layers in flight; lower it on lines below 4 Mbit/s")
	f.StringArrayVar(&reuse, "reuse", nil, "take converted layers from `REPO` that the target lacks: REGISTRY/REPOSITORY or oci:DIR (repeatable)")
	f.BoolVar(&o.NoGuess, "no-guess", false, "do not predict what startup will read")
	f.StringArrayVar(&traces, "trace", nil, "pack a bundle of `TRACE`: a trace file, or an image for the traces beside it (repeatable)")
	f.StringVar(&a.temp, "temp", "", "keep temporary files in `DIR`: streams until they are pushed, decompressed archives (default: $TMPDIR, or /tmp)")
	f.StringArrayVar(&pin, "pin", nil, "fail before the block image is pushed unless its digest is `DIGEST`: sha256:HEX")
	f.BoolVar(&a.json, "json", false, "print the result as JSON")
	return c
}

// tooLargeDevice is the size at which the numbers of 4 KiB blocks no longer have 32
// bits.
const tooLargeDevice = 16 << 40

// buildMemory is the size of the heap from which on the garbage collector works
// harder: builds run beside other programs.
const buildMemory = 384 << 20

func (a *app) build(ctx context.Context, args []string, o flatten.Options, traces []string, pin pinFlags, reuse []string) error {
	debug.SetMemoryLimit(buildMemory)
	began := time.Now()
	srcRef, err := registry.ParseRef(args[0])
	if err != nil {
		return usageError{err}
	}
	dstRef := srcRef
	if len(args) == 2 {
		if dstRef, err = registry.ParseRef(args[1]); err != nil {
			return usageError{err}
		}
		if dstRef.Archive != "" {
			return usageError{fmt.Errorf("%s: archives cannot be written: give a registry reference or oci:DIR:TAG", args[1])}
		}
		if dstRef.Digest != (v1.Hash{}) {
			return usageError{fmt.Errorf("%s: a digest cannot be pushed to: give a tag", dstRef)}
		}
		if o.Tag = dstRef.Tag; o.Tag == "" {
			return usageError{fmt.Errorf("%s: DST needs a tag", dstRef)}
		}
	} else if srcRef.Archive != "" {
		return usageError{fmt.Errorf("%s: archives cannot be written: give a DST for the block image", srcRef)}
	}
	if s := a.screen(); s != nil {
		a.stderr = s // logs are written above the progress
	}
	find, err := a.access(ctx, pin, args[len(args)-1])
	if err != nil {
		return err
	}
	defer find.Close()
	if h, ok := find.Pins.Of(dstRef); ok {
		o.Pin = h.String()
	}
	find.Pins = nil // block images of earlier builds may have other digests
	src, err := find.Client.Open(srcRef)
	if err != nil {
		return err
	}
	dst, err := find.Client.Open(dstRef)
	if err != nil {
		return err
	}
	if o.Reuse, err = reusePlaces(find, srcRef, dstRef, reuse); err != nil {
		return err
	}
	// Missing rights are to be known before the work. A registry is asked while the
	// source is read; a layout would be created.
	pushes := make(chan error, 1)
	if dstRef.Registry != "" {
		go func() { pushes <- dst.CheckPush(ctx) }()
	}
	source, err := readSource(ctx, src, find.Platform)
	var recorded []host.RecordedTrace
	if err == nil {
		recorded, err = find.ReadTraces(ctx, traces)
	}
	var pushErr error
	if dstRef.Registry != "" {
		pushErr = <-pushes
	} else if err == nil {
		pushErr = dst.CheckPush(ctx)
	}
	if err = cmp.Or(err, pushErr); err != nil {
		find.Client.FinishUploads()
		return err
	}
	p := newProgress(a, find.Log, source, srcRef, dstRef)
	o.Log, o.Progress = find.Log, p
	res, err := flatten.Build(ctx, source, host.NewTarget(dst), o)
	p.end()
	find.Client.FinishUploads()
	if err != nil {
		return fmt.Errorf("build %s: %w", srcRef, err)
	}
	var bundle *packed
	if len(recorded) > 0 {
		bundle, err = packBuilt(ctx, dst, res, recorded, o.TempDir)
		if errors.Is(err, host.ErrEmptyPlan) {
			find.Log.Warn("the build makes no bundle", "err", err)
		} else if err != nil {
			return fmt.Errorf("%s was built, but its bundle was not: %w", dst.Ref().WithDigest(res.Manifest.Digest), err)
		}
	}
	took := time.Since(began)
	name := srcRef
	if len(args) == 2 {
		name = dstRef
	}
	return a.printBuilt(srcRef, dst, o.Tag, res, bundle, a.serveLine(ctx, find, name, dst.Ref(), res.Manifest.Digest), took)
}

// packBuilt packs recorded starts for the image that was just built.
func packBuilt(ctx context.Context, dst *registry.Repo, res *flatten.Result, recorded []host.RecordedTrace, temp string) (*packed, error) {
	b, err := host.NewBlockImage(dst, res.Manifest.Digest, res.Raw, res.Index)
	if err != nil {
		return nil, err
	}
	var fitting []*tracefile.Trace
	for _, r := range recorded {
		trace, _, err := r.Fit(b)
		if err != nil {
			return nil, err
		}
		fitting = append(fitting, trace)
	}
	return packTraces(ctx, b, fitting, host.PackOptions{Temp: temp, Least: tracefile.DefaultLeast})
}

// readSource finds the image to build from.
func readSource(ctx context.Context, repo *registry.Repo, platform *v1.Platform) (*flatten.Source, error) {
	img, err := repo.Resolve(ctx, platform)
	if err != nil {
		return nil, err
	}
	if flatten.IsImage(img.ArtifactType) {
		return nil, fmt.Errorf("%s is a block image already: name the container image that it was built from", repo.Ref())
	}
	config, err := repo.Blob(ctx, img.Manifest.Config)
	if err != nil {
		return nil, err
	}
	s := &flatten.Source{Manifest: img.Descriptor, Config: config}
	for _, d := range img.Manifest.Layers {
		l := flatten.Layer{Descriptor: d, Open: func(ctx context.Context) (io.ReadCloser, error) {
			return repo.OpenBlob(ctx, d)
		}}
		if repo.Ref().Registry != "" {
			l.OpenFrom = func(ctx context.Context, off int64, before io.Reader) (io.ReadCloser, error) {
				return repo.OpenBlobFrom(ctx, d, off, before)
			}
		}
		s.Layers = append(s.Layers, l)
	}
	return s, nil
}

// reusePlaces are the places where a build looks for converted layers beside the target:
// those that the user names, and the source's own repository. A source with a digest is
// not to depend on who may push to its repository, so that one has to be named.
func reusePlaces(find *host.Finder, src, dst registry.Ref, names []string) (places []flatten.Place, err error) {
	seen := map[string]bool{dst.Place(): true}
	add := func(ref registry.Ref) error {
		if seen[ref.Place()] {
			return nil
		}
		seen[ref.Place()] = true
		r, err := find.Client.Open(ref)
		if err != nil {
			return err
		}
		places = append(places, host.NewPlace(r))
		return nil
	}
	for _, name := range names {
		ref, err := registry.ParseRef(name)
		if err == nil && ref.Archive != "" {
			err = fmt.Errorf("%s: an archive has no converted layers: give a repository or oci:DIR", name)
		}
		if err != nil {
			return nil, usageError{fmt.Errorf("--reuse: %w", err)}
		}
		if err := add(ref); err != nil {
			return nil, err
		}
	}
	if src.Archive == "" && src.Digest == (v1.Hash{}) {
		return places, add(src)
	}
	return places, nil
}

// built is the result as --json prints it.
type built struct {
	Type       string       `json:"type"`
	Source     string       `json:"source"`
	Target     string       `json:"target"`
	Digest     string       `json:"digest"`
	DeviceSize int64        `json:"device_bytes"`
	IndexBytes int64        `json:"index_bytes"`
	Chunks     int          `json:"chunks"`
	Content    int64        `json:"content_bytes"`
	Stored     int64        `json:"stored_bytes"`
	Layers     []builtLayer `json:"layers"`
	Guess      builtGuess   `json:"guess"`
	Bundle     *packed      `json:"bundle,omitempty"`
	Seconds    float64      `json:"seconds"`
	Serve      string       `json:"serve"` // a command for a shell
}

// builtGuess is what startup is predicted to read; zero without a prediction.
type builtGuess struct {
	Files  int   `json:"files"`
	Bytes  int64 `json:"bytes"`
	Chunks int   `json:"chunks"`
	Stored int64 `json:"stored_bytes"`
}

type builtLayer struct {
	DiffID  string `json:"diff_id"`
	Reused  bool   `json:"reused"`
	Content int64  `json:"content_bytes"`
	Stored  int64  `json:"stored_bytes"`
}

func (a *app) printBuilt(src registry.Ref, dst *registry.Repo, tag string, res *flatten.Result, bundle *packed, serve string, took time.Duration) error {
	place := dst.Ref().WithDigest(res.Manifest.Digest)
	if tag != "" {
		place = dst.Ref().WithTag(tag)
	}
	b := built{
		Type: "built", Source: src.String(), Target: place.String(), Digest: res.Manifest.Digest.String(),
		DeviceSize: int64(res.Index.Blocks) * blockmap.BlockSize, IndexBytes: res.IndexBytes, Seconds: took.Seconds(),
		Guess: builtGuess(res.Guess), Bundle: bundle, Serve: serve,
	}
	reused := 0
	for _, l := range res.Layers {
		b.Layers = append(b.Layers, builtLayer{l.DiffID.String(), l.Reused, l.Content, l.Stored})
		if l.Reused {
			reused++
		}
	}
	for i := range res.Index.Streams {
		t := &res.Index.Streams[i]
		b.Chunks += len(t.Chunks)
		b.Content += int64(t.Blocks()) * blockmap.BlockSize
		b.Stored += t.BlobSize
	}
	if a.json {
		return a.printJSON(b)
	}
	fmt.Fprintf(a.stdout, "%s\n", b.Target)
	fmt.Fprintf(a.stdout, "digest   %s\n", b.Digest)
	fmt.Fprintf(a.stdout, "layers   %d, %d of them reused\n", len(b.Layers), reused)
	fmt.Fprintf(a.stdout, "content  %s in %s, stored as %s; index %s\n",
		bytesString(b.Content), count(b.Chunks, "chunk"), bytesString(b.Stored), bytesString(b.IndexBytes))
	if g := b.Guess; g.Files > 0 {
		fmt.Fprintf(a.stdout, "guess    startup reads %s: %s in %s, stored as %s\n",
			count(g.Files, "file"), bytesString(g.Bytes), count(g.Chunks, "chunk"), bytesString(g.Stored))
	}
	if bundle != nil {
		bundle.print(a.stdout)
	}
	fmt.Fprintf(a.stdout, "time     %.1f s\n", b.Seconds)
	fmt.Fprintf(a.stdout, "serve    %s\n", serve)
	return nil
}
