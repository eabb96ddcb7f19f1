package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/blockmap"
	"thaw/fetcher"
	"thaw/fetcher/registry"
	"thaw/tracefile"
)

// A trace or a bundle in a registry is a manifest of its artifact type whose one
// layer is the file, and whose subject is the block image that it is of. The
// layer stands in an annotation as well, "DIGEST SIZE", for lists of referrers
// have the annotations: so a start has one request less to wait for.
const (
	artifactTypeTrace  = "application/vnd.thaw.trace.v1"
	artifactTypeBundle = "application/vnd.thaw.bundle.v1"
	mediaTypeTrace     = types.MediaType("application/vnd.thaw.trace.v1")
	mediaTypeBundle    = types.MediaType("application/vnd.thaw.bundle.v1+zstd")

	annotationLayer = "vnd.thaw.layer"

	// maxTraces is how many traces of an image are looked at, the last ones.
	maxTraces = 32
	// maxBundles is how many of its bundles are tried, the last one first.
	maxBundles = 8
)

// beside is what lies beside an image for its starts: descriptors of manifests,
// the last one pushed last where a list keeps the order.
type beside struct{ traces, bundles []v1.Descriptor }

// findBeside lists them.
func findBeside(ctx context.Context, b *blockImage) (beside, error) {
	var found beside
	all, err := b.repo.Referrers(ctx, v1.Descriptor{Digest: b.digest}, artifactTypeTrace, artifactTypeBundle)
	for _, d := range all {
		if d.ArtifactType == artifactTypeTrace {
			found.traces = append(found.traces, d)
		} else {
			found.bundles = append(found.bundles, d)
		}
	}
	found.traces = found.traces[max(0, len(found.traces)-maxTraces):]
	found.bundles = found.bundles[max(0, len(found.bundles)-maxBundles):]
	return found, err
}

// storedLayer is the descriptor of what a manifest beside an image is about.
func storedLayer(ctx context.Context, repo *registry.Repo, d v1.Descriptor, mediaType types.MediaType) (v1.Descriptor, error) {
	var hash string
	var size int64
	if n, _ := fmt.Sscanf(d.Annotations[annotationLayer], "%s %d", &hash, &size); n == 2 && size > 0 {
		if h, err := v1.NewHash(hash); err == nil && h.Algorithm == "sha256" {
			return v1.Descriptor{MediaType: mediaType, Digest: h, Size: size}, nil
		}
	}
	raw, err := repo.Manifest(ctx, d)
	if err != nil {
		return v1.Descriptor{}, err
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return v1.Descriptor{}, err
	}
	if len(m.Layers) != 1 || m.Layers[0].MediaType != mediaType || m.Layers[0].Size <= 0 || !isSHA256(m.Layers[0].Digest) {
		return v1.Descriptor{}, fmt.Errorf("its manifest is not that of a %s", mediaType)
	}
	return m.Layers[0], nil
}

// storedTraces reads traces that are beside an image.
func storedTraces(ctx context.Context, b *blockImage, manifests []v1.Descriptor, log *slog.Logger) (traces []*tracefile.Trace) {
	for _, d := range manifests {
		trace, err := storedTrace(ctx, b, d)
		if ctx.Err() != nil {
			return nil // nobody has a use for any
		}
		if err != nil {
			log.Warn("a stored trace is of no use", "image", b.name, "manifest", d.Digest.String(), "err", err)
			continue
		}
		if trace.Cut != nil {
			log.Warn("a stored trace ends early; what there is of it is used", "image", b.name, "manifest", d.Digest.String(), "err", trace.Cut)
		}
		traces = append(traces, trace)
	}
	return traces
}

func storedTrace(ctx context.Context, b *blockImage, d v1.Descriptor) (*tracefile.Trace, error) {
	layer, err := storedLayer(ctx, b.repo, d, mediaTypeTrace)
	if err != nil {
		return nil, err
	}
	if layer.Size > tracefile.MaxSize {
		return nil, fmt.Errorf("it has %d bytes, a trace at most %d", layer.Size, tracefile.MaxSize)
	}
	blob, err := b.repo.Blob(ctx, layer)
	if err != nil {
		return nil, err
	}
	trace, err := tracefile.Read(bytes.NewReader(blob))
	if err == nil && trace.Index != b.indexDigest() {
		err = tracefile.ErrOtherImage
	}
	return trace, err
}

// recordedTrace is a trace with what is known of the image that it is of.
type recordedTrace struct {
	*tracefile.Trace
	name string
	of   *blockmap.Index // nil: not known
}

// readTraces reads the traces that words on the command line stand for: each a
// file, or an image for those beside it.
func (f *finder) readTraces(ctx context.Context, names []string) (traces []recordedTrace, err error) {
	for _, name := range names {
		found, err := f.readNamed(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("trace %s: %w", name, err)
		}
		traces = append(traces, found...)
	}
	return traces, nil
}

func (f *finder) readNamed(ctx context.Context, name string) (traces []recordedTrace, err error) {
	raw, err := readInput(ctx, name, tracefile.MaxSize)
	if err == nil {
		trace, err := tracefile.Read(bytes.NewReader(raw))
		if err != nil {
			return nil, err
		}
		return []recordedTrace{{trace, name, nil}}, nil
	}
	if !isNoFile(err) {
		return nil, err
	}
	b, err := f.find(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("it is no file, and as an image: %w", err)
	}
	found, err := findBeside(ctx, b)
	if err != nil {
		return nil, err
	}
	for _, trace := range storedTraces(ctx, b, found.traces, f.log) {
		traces = append(traces, recordedTrace{trace, name, b.index})
	}
	if len(traces) == 0 {
		return nil, errors.New("there are no traces beside that image")
	}
	return traces, nil
}

// fit makes the trace one of b, and says what of it b has, where it was of
// another version.
func (r recordedTrace) fit(b *blockImage) (*tracefile.Trace, *tracefile.Carried, error) {
	if r.Index == b.indexDigest() {
		return r.Trace, nil, nil
	}
	if r.of == nil {
		return nil, nil, fmt.Errorf("%s: %w: name the image that it was recorded of instead", r.name, tracefile.ErrOtherImage)
	}
	t, carried, err := tracefile.Translate(r.Trace, r.of, b.index)
	return t, &carried, err
}

// storedBundle is a bundle beside an image, about to be downloaded.
type storedBundle struct {
	head  *tracefile.Bundle
	repo  *registry.Repo
	layer v1.Descriptor
	begin int64 // of the first frame
	body  io.ReadCloser
	end   context.CancelFunc // of body
	asked time.Time          // for body
}

// openBundle asks for the whole of a bundle and reads its head.
func openBundle(ctx context.Context, b *blockImage, d v1.Descriptor) (s *storedBundle, err error) {
	ctx, end := context.WithCancel(ctx)
	s = &storedBundle{repo: b.repo, end: end}
	defer func() {
		if err != nil {
			end()
		}
	}()
	if s.layer, err = storedLayer(ctx, b.repo, d, mediaTypeBundle); err != nil {
		return nil, err
	}
	s.asked = time.Now()
	if s.body, err = b.repo.OpenRange(ctx, digestOf(s.layer.Digest), 0, s.layer.Size); err != nil {
		return nil, err
	}
	if s.head, err = tracefile.ReadBundle(s.body); err == nil {
		if s.begin = s.layer.Size - s.head.Stored(); s.begin != int64(len(s.head.Head())) {
			err = fmt.Errorf("bundle: %w: %d bytes, of which its head accounts for %d",
				blockmap.ErrCorrupt, s.layer.Size, int64(len(s.head.Head()))+s.head.Stored())
		}
	}
	if err != nil {
		return nil, errors.Join(err, s.body.Close())
	}
	return s, nil
}

// of says what the bundle has of an image. It is to be downloaded then, or
// closed.
func (s *storedBundle) of(image *blockmap.Image) (*fetcher.Bundle, error) {
	wants, err := s.head.Wants(image.Index(), image.Stream)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(wants, func(places []blockmap.Want) bool { return len(places) > 0 }) {
		return nil, fmt.Errorf("none of its %d parts is in the image", len(wants))
	}
	f := &fetcher.Bundle{Open: s.open, Asked: s.asked, Close: s.close}
	for i, p := range s.head.Parts {
		f.Parts = append(f.Parts, fetcher.Part{Stored: int64(p.Stored), Wants: wants[i]})
	}
	return f, nil
}

// open goes on with the download that is under way, or begins another one.
func (s *storedBundle) open(ctx context.Context, off int64) (io.ReadCloser, error) {
	if body := s.body; body != nil {
		s.body = nil
		if off == 0 {
			context.AfterFunc(ctx, s.end)
			return body, nil
		}
		body.Close()
	}
	return s.repo.OpenRange(ctx, digestOf(s.layer.Digest), s.begin+off, s.layer.Size-s.begin-off)
}

func (s *storedBundle) close() {
	if s.body != nil {
		s.body.Close()
		s.body = nil
	}
	s.end()
}

// pushTrace stores a trace beside its image.
func pushTrace(ctx context.Context, b *blockImage, file []byte) (v1.Descriptor, error) {
	layer, err := b.repo.PushBytes(ctx, file, mediaTypeTrace)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return pushBeside(ctx, b, artifactTypeTrace, layer)
}

// pushBundle packs the bundle of a plan in a directory below temp, and stores it
// beside the image.
func pushBundle(ctx context.Context, b *blockImage, plan *tracefile.Plan, temp string) (d v1.Descriptor, size int64, err error) {
	dir, err := os.MkdirTemp(temp, "thaw-bundle-")
	if err != nil {
		return d, 0, fmt.Errorf("no place to pack the bundle: %w; name a directory with --temp, or by TMPDIR", err)
	}
	defer os.RemoveAll(dir)
	scratch, err := os.Create(filepath.Join(dir, "frames"))
	if err != nil {
		return d, 0, err
	}
	defer scratch.Close()
	f, err := os.Create(filepath.Join(dir, "bundle"))
	if err != nil {
		return d, 0, err
	}
	defer f.Close()
	if _, err := plan.Pack(ctx, f, scratch, b.repo.OpenRange); err != nil {
		return d, 0, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return d, 0, err
	}
	layer := v1.Descriptor{MediaType: mediaTypeBundle}
	if layer.Digest, layer.Size, err = v1.SHA256(f); err != nil {
		return d, 0, err
	}
	if _, err = b.repo.PushBlob(ctx, layer, f.Name(), nil); err != nil {
		return d, 0, err
	}
	d, err = pushBeside(ctx, b, artifactTypeBundle, layer)
	return d, layer.Size, err
}

func pushBeside(ctx context.Context, b *blockImage, artifactType string, layer v1.Descriptor) (v1.Descriptor, error) {
	config, err := b.repo.PushBytes(ctx, []byte("{}"), "application/vnd.oci.empty.v1+json")
	if err != nil {
		return v1.Descriptor{}, err
	}
	raw, err := json.Marshal(v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1, ArtifactType: artifactType, Config: config,
		Layers:      []v1.Descriptor{layer},
		Subject:     &v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: b.digest, Size: b.size},
		Annotations: map[string]string{annotationLayer: fmt.Sprintf("%s %d", layer.Digest, layer.Size)},
	})
	if err != nil {
		return v1.Descriptor{}, err
	}
	return b.repo.PushManifest(ctx, raw, types.OCIManifestSchema1, "")
}
