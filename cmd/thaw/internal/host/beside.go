package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"thaw/blockmap"
	"thaw/blockmap/flatten"
	"thaw/fetcher"
	"thaw/fetcher/registry"
	"thaw/tracefile"
)

const (
	// maxTraces bounds how many traces of an image are read, the newest first.
	maxTraces = 32
	// maxBundles bounds how many bundles of an image are tried, the newest first.
	maxBundles = 8
)

// Beside lists what is stored beside an image for its starts: the manifests of traces
// and of bundles. The newest is last, if the registry's list keeps the order.
type Beside struct{ Traces, Bundles []v1.Descriptor }

// Beside finds what is stored beside the image.
func (b *BlockImage) Beside(ctx context.Context) (Beside, error) {
	var found Beside
	all, err := b.Repo.Referrers(ctx, v1.Descriptor{Digest: b.Digest}, tracefile.ArtifactTypeTrace, tracefile.ArtifactTypeBundle)
	for _, d := range all {
		if d.ArtifactType == tracefile.ArtifactTypeTrace {
			if d.Annotations[tracefile.AnnotationAnew] == "true" {
				found.Traces = nil // it replaces them
			}
			found.Traces = append(found.Traces, d)
		} else {
			found.Bundles = append(found.Bundles, d)
		}
	}
	found.Traces = found.Traces[max(0, len(found.Traces)-maxTraces):]
	found.Bundles = found.Bundles[max(0, len(found.Bundles)-maxBundles):]
	return found, err
}

// storedLayer finds the trace or bundle that a listed manifest stores.
func storedLayer(ctx context.Context, repo *registry.Repo, d v1.Descriptor, mediaType types.MediaType) (v1.Descriptor, error) {
	if layer, ok := tracefile.AnnotatedLayer(d, mediaType); ok {
		return layer, nil
	}
	raw, err := repo.Manifest(ctx, d)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return tracefile.ArtifactLayer(raw, mediaType)
}

// readBlob reads and verifies a blob of an image's repository.
type readBlob func(ctx context.Context, b *BlockImage, d v1.Descriptor) ([]byte, error)

// fromRegistry is a readBlob.
func fromRegistry(ctx context.Context, b *BlockImage, d v1.Descriptor) ([]byte, error) {
	return b.Repo.Blob(ctx, d)
}

// StoredTraces reads the traces that are stored beside the image. It logs traces that
// it cannot use and omits them.
func (b *BlockImage) StoredTraces(ctx context.Context, manifests []v1.Descriptor, log *slog.Logger) []*tracefile.Trace {
	return b.storedTraces(ctx, manifests, fromRegistry, log)
}

// storedTraces is StoredTraces by way of read.
func (b *BlockImage) storedTraces(ctx context.Context, manifests []v1.Descriptor, read readBlob, log *slog.Logger) (traces []*tracefile.Trace) {
	for _, d := range manifests {
		trace, err := storedTrace(ctx, b, d, read)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			log.Warn("a stored trace cannot be used", "image", b.Name, "manifest", d.Digest.String(), "err", err)
			continue
		}
		if trace.Cut != nil {
			log.Warn("a stored trace ends early; thaw uses the part that is there", "image", b.Name, "manifest", d.Digest.String(), "err", trace.Cut)
		}
		traces = append(traces, trace)
	}
	return traces
}

func storedTrace(ctx context.Context, b *BlockImage, d v1.Descriptor, read readBlob) (*tracefile.Trace, error) {
	layer, err := storedLayer(ctx, b.Repo, d, tracefile.MediaTypeTrace)
	if err != nil {
		return nil, err
	}
	if layer.Size > tracefile.MaxSize {
		return nil, fmt.Errorf("it has %d bytes, and a trace has at most %d", layer.Size, tracefile.MaxSize)
	}
	blob, err := read(ctx, b, layer)
	if err != nil {
		return nil, err
	}
	trace, err := tracefile.Read(bytes.NewReader(blob))
	if err == nil && trace.Index != b.IndexDigest() {
		err = tracefile.ErrOtherImage
	}
	return trace, err
}

// RecordedTrace is a trace, with the index of the image that it was recorded from, if
// that is known.
type RecordedTrace struct {
	*tracefile.Trace
	name string
	of   *blockmap.Index // nil: unknown
}

// ReadTraces reads the traces that names stand for. A name is a file, or an image,
// which stands for the traces beside it.
func (f *Finder) ReadTraces(ctx context.Context, names []string) (traces []RecordedTrace, err error) {
	for _, name := range names {
		found, err := f.readNamed(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("trace %s: %w", name, err)
		}
		traces = append(traces, found...)
	}
	return traces, nil
}

func (f *Finder) readNamed(ctx context.Context, name string) (traces []RecordedTrace, err error) {
	raw, err := f.ReadFile(ctx, name, tracefile.MaxSize)
	if err == nil {
		trace, err := tracefile.Read(bytes.NewReader(raw))
		if err != nil {
			return nil, err
		}
		return []RecordedTrace{{trace, name, nil}}, nil
	}
	if pathErr := (*fs.PathError)(nil); !errors.As(err, &pathErr) || pathErr.Op != "open" {
		return nil, err
	}
	b, err := f.Find(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("there is no such file, and it cannot be opened as an image: %w", err)
	}
	found, err := b.Beside(ctx)
	if err != nil {
		return nil, err
	}
	for _, trace := range b.StoredTraces(ctx, found.Traces, f.Log) {
		traces = append(traces, RecordedTrace{trace, name, b.Index})
	}
	if len(traces) == 0 {
		return nil, errors.New("no traces are stored beside that image")
	}
	return traces, nil
}

// Fit translates the trace to b. If the trace was recorded from another version of the
// image, carried says how much of it b has.
func (r RecordedTrace) Fit(b *BlockImage) (*tracefile.Trace, *tracefile.Carried, error) {
	if r.Index == b.IndexDigest() {
		return r.Trace, nil, nil
	}
	if r.of == nil {
		return nil, nil, fmt.Errorf("%s: %w: name the image that it was recorded of instead of the file", r.name, tracefile.ErrOtherImage)
	}
	t, carried, err := tracefile.Translate(r.Trace, r.of, b.Index)
	return t, &carried, err
}

// storedBundle is a bundle beside an image whose download has begun.
type storedBundle struct {
	head  *tracefile.Bundle
	from  blobReader
	layer v1.Descriptor
	begin int64 // offset of the first frame
	body  io.ReadCloser
	end   context.CancelFunc // ends body
	asked time.Time          // when body was requested
}

// blobReader reads blobs: from the registry, or through the zone.
type blobReader interface {
	// OpenBlob reads a blob of size bytes from off to its end.
	OpenBlob(ctx context.Context, blob blockmap.Digest, size, off int64) (io.ReadCloser, error)
}

// openBundle requests a whole bundle from a source and reads its head.
func openBundle(ctx context.Context, b *BlockImage, d v1.Descriptor, from blobReader) (s *storedBundle, err error) {
	ctx, end := context.WithCancel(ctx)
	s = &storedBundle{from: from, end: end}
	defer func() {
		if err != nil {
			end()
		}
	}()
	if s.layer, err = storedLayer(ctx, b.Repo, d, tracefile.MediaTypeBundle); err != nil {
		return nil, err
	}
	s.asked = time.Now()
	if s.body, err = from.OpenBlob(ctx, digestOf(s.layer.Digest), s.layer.Size, 0); err != nil {
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

// BundleInfo says how much of a bundle an image has. The bundle may have been packed for
// another version of the image.
type BundleInfo struct {
	Leaves      int   `json:"leaves"`
	Shared      int   `json:"shared_leaves"` // those of chunks that the image has
	Bytes       int64 `json:"content_bytes"` // of the leaves
	SharedBytes int64 `json:"shared_content_bytes"`
	Stored      int64 `json:"bundle_bytes"`
	Other       bool  `json:"of_another_version"` // it was packed for another image of the repository
}

// of maps the leaves of the bundle to chunks of an image. The caller then downloads the
// bundle, or closes it.
func (s *storedBundle) of(image *blockmap.Image) (*fetcher.Bundle, *BundleInfo, error) {
	wants, err := s.head.Wants(image.Index(), image.Stream)
	if err != nil {
		return nil, nil, err
	}
	in := &BundleInfo{Stored: s.layer.Size}
	f := &fetcher.Bundle{Open: s.open, Asked: s.asked, Close: s.close}
	for i := range s.head.Frames {
		x := &s.head.Frames[i]
		frame := fetcher.Frame{Stored: int64(x.Stored)}
		for _, p := range x.Parts {
			size := s.head.PartSize(p)
			frame.Parts = append(frame.Parts, fetcher.Part{
				Leaf: p.Leaf, Count: p.Count, Size: size, List: s.head.Chunks[p.Chunk].List, Wants: wants[p.Chunk],
			})
			in.Leaves += p.Count
			in.Bytes += int64(size)
			if len(wants[p.Chunk]) > 0 {
				in.Shared += p.Count
				in.SharedBytes += int64(size)
			}
		}
		f.Frames = append(f.Frames, frame)
	}
	if in.Shared == 0 {
		return nil, nil, fmt.Errorf("none of its %d leaves is in the image", in.Leaves)
	}
	return f, in, nil
}

// open continues the download that openBundle has begun, or begins another one at off.
func (s *storedBundle) open(ctx context.Context, off int64) (io.ReadCloser, error) {
	if body := s.body; body != nil {
		s.body = nil
		if off == 0 {
			context.AfterFunc(ctx, s.end)
			return body, nil
		}
		body.Close()
	}
	return s.from.OpenBlob(ctx, digestOf(s.layer.Digest), s.layer.Size, s.begin+off)
}

func (s *storedBundle) close() {
	if s.body != nil {
		s.body.Close()
		s.body = nil
	}
	s.end()
}

// predecessor finds the last bundle that was stored in the image's repository: as a rule
// that of the version before.
func (b *BlockImage) predecessor(ctx context.Context) (v1.Descriptor, error) {
	ctx, cancel := context.WithTimeout(ctx, findTimeout)
	defer cancel()
	return b.Repo.Lookup(ctx, b.Repo.Ref().WithTag(tracefile.BundleTag))
}

// PushTrace stores a trace file beside its image. If anew is set, it replaces the traces
// that are there.
func (b *BlockImage) PushTrace(ctx context.Context, file []byte, anew bool) (v1.Descriptor, error) {
	layer, err := b.Repo.PushBytes(ctx, file, tracefile.MediaTypeTrace)
	if err != nil {
		return v1.Descriptor{}, err
	}
	d, _, err := pushBeside(ctx, b, tracefile.ArtifactTypeTrace, layer, anew)
	return d, err
}

// ErrEmptyPlan is the error of Pack if there is nothing to pack.
var ErrEmptyPlan = errors.New("the traces touch nothing that the image stores")

// PackOptions are the settings of Pack.
type PackOptions struct {
	Temp  string // its temporary files are in a directory below this one
	Least int    // percent of the starts that have to touch what is packed, see tracefile.Trace.Common

	local func(ctx context.Context, stream, chunk int, p []byte) bool // as in tracefile.Contents
	do    func(job func())
}

// Packed describes a bundle that was stored beside its image.
type Packed struct {
	Reference string // to the bundle's manifest
	Starts    uint32 // number of starts in the traces
	Chunks    int    // of which the bundle has leaves
	Leaves    int
	Wanted    int64 // bytes that the traces touch, without the rare ones
	Rare      int64 // bytes that too few of the starts touched
	Content   int64 // bytes of the leaves
	Head      int64 // bytes of the head of the bundle
	Bytes     int64 // of the bundle
}

// Pack makes a bundle of the leaves that traces of the image touch, and stores it
// beside the image.
func (b *BlockImage) Pack(ctx context.Context, traces []*tracefile.Trace, o PackOptions) (*Packed, error) {
	merged, err := tracefile.Merge(traces...)
	if err != nil {
		return nil, err
	}
	common, rare := merged.Common(o.Least)
	plan, err := tracefile.NewPlan(common, b.Index)
	if err != nil {
		return nil, err
	}
	if len(plan.Steps) == 0 {
		return nil, ErrEmptyPlan
	}
	d, head, size, err := pushBundle(ctx, b, plan, o.Temp, tracefile.Contents{Open: b.Repo.OpenRange, Local: o.local, Do: o.do})
	if err != nil {
		return nil, err
	}
	leaves, content := head.Leaves()
	return &Packed{
		Reference: b.Repo.Ref().WithDigest(d.Digest).String(), Starts: merged.Starts, Chunks: len(head.Chunks), Leaves: leaves,
		Wanted: plan.Wanted, Rare: rare, Content: content, Head: size - head.Stored(), Bytes: size,
	}, nil
}

// pushBundle packs a plan's bundle in a directory below temp, and stores it beside the
// image.
func pushBundle(ctx context.Context, b *BlockImage, plan *tracefile.Plan, temp string, from tracefile.Contents) (d v1.Descriptor, head *tracefile.Bundle, size int64, err error) {
	dir, err := flatten.NewTempDir(temp, "thaw-bundle-")
	if err != nil {
		return d, nil, 0, fmt.Errorf("pack the bundle: %w", err)
	}
	defer func() { _ = dir.Remove() }()
	scratch, err := os.Create(filepath.Join(dir.Path(), "frames"))
	if err != nil {
		return d, nil, 0, err
	}
	defer scratch.Close()
	f, err := os.Create(filepath.Join(dir.Path(), "bundle"))
	if err != nil {
		return d, nil, 0, err
	}
	defer f.Close()
	if head, err = plan.Pack(ctx, f, scratch, from); err != nil {
		return d, nil, 0, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return d, nil, 0, err
	}
	layer := v1.Descriptor{MediaType: tracefile.MediaTypeBundle}
	if layer.Digest, layer.Size, err = v1.SHA256(f); err != nil {
		return d, nil, 0, err
	}
	if _, err = b.Repo.PushBlob(ctx, layer, f.Name(), nil); err != nil {
		return d, nil, 0, err
	}
	d, raw, err := pushBeside(ctx, b, tracefile.ArtifactTypeBundle, layer, false)
	if err == nil {
		// It only saves work, and some registries let no tag be moved.
		_, _ = b.Repo.PushManifest(ctx, raw, types.OCIManifestSchema1, tracefile.BundleTag)
	}
	return d, head, layer.Size, err
}

func pushBeside(ctx context.Context, b *BlockImage, artifactType string, layer v1.Descriptor, anew bool) (d v1.Descriptor, raw []byte, err error) {
	if _, err := b.Repo.PushBytes(ctx, []byte(tracefile.EmptyConfig), tracefile.EmptyConfigType); err != nil {
		return d, nil, err
	}
	raw, err = tracefile.ArtifactManifest(artifactType, layer, v1.Descriptor{Digest: b.Digest, Size: int64(len(b.Raw))}, anew)
	if err != nil {
		return d, nil, err
	}
	d, err = b.Repo.PushManifest(ctx, raw, types.OCIManifestSchema1, "")
	return d, raw, err
}
