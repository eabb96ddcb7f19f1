package flatten

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

// Source is the image that a block image is built from.
type Source struct {
	Manifest v1.Descriptor // of the image manifest
	Config   []byte        // the image config, as it is
	Layers   []Layer       // from the lowest up
}

// Layer is one layer of a Source.
type Layer struct {
	v1.Descriptor
	// Open reads the layer as it is stored. What it returns fails, rather
	// than ends, where the bytes are not those of the descriptor.
	Open func(ctx context.Context) (io.ReadCloser, error)
}

// Target is where a block image goes: a repository or an OCI layout. Push
// methods return once the thing is there for good, and do nothing for what is
// there already.
type Target interface {
	HasBlob(ctx context.Context, d v1.Descriptor) (bool, error)
	Blob(ctx context.Context, d v1.Descriptor) ([]byte, error)
	// PushFile may move the file away.
	PushFile(ctx context.Context, d v1.Descriptor, path string, progress func(sent int64)) error
	PushBytes(ctx context.Context, d v1.Descriptor, b []byte) error
	// Tagged returns the manifest under a tag, or nil.
	Tagged(ctx context.Context, tag string) ([]byte, error)
	// PushManifest puts it under its digest, and under tag unless that is
	// empty.
	PushManifest(ctx context.Context, d v1.Descriptor, raw []byte, tag string) error
	// OpenRange reads n bytes of a blob from off, or ends in an error. They are
	// checked by who reads them.
	OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error)
}

// Options are the settings of a build. What is built depends on the first four
// and the source alone.
type Options struct {
	Size      int64 // of the device in bytes; grown where the content needs more
	ChunkSize int   // bytes of a full chunk, a power of two
	Level     int   // zstd, 1 to 22
	NoGuess   bool  // do without AnnotationGuess

	Jobs     int    // layers converted at once; 0: as many as processors, 8 at most
	TempDir  string // for the streams until they are pushed; "": the system's
	Tag      string // of the block image; "": ImageTag of the source's digest
	Pin      string // the digest that the block image must have, or nothing is pushed under its name; "": any
	Progress Progress
	Log      *slog.Logger
}

// Defaults of a build.
const (
	DefaultSize = 8 << 30
	// DefaultChunkSize is what won in bench/build on four real images: a first
	// start over a slow link takes half the time that it takes with a quarter
	// of this, for 13 to 30 % more bytes.
	DefaultChunkSize = 1 << 20
	DefaultLevel     = 3
)

// Decompressing 8 layers keeps the compressors of many processors busy.
const maxJobs = 8

// Progress hears how a build goes. Its methods are called from several
// goroutines, layer by layer in order.
type Progress interface {
	// Read: n more bytes of a layer's blob, as it is stored, were read.
	Read(layer int, n int64)
	// Push: the layer is converted, and its stream of size bytes is on its way.
	Push(layer int, size int64)
	// Pushed: n bytes of the stream have been sent so far.
	Pushed(layer int, n int64)
	// Done: the layer is in the target; reused says that it was before.
	Done(layer int, reused bool)
}

// Result says what was built.
type Result struct {
	Manifest   v1.Descriptor
	Raw        []byte
	Index      *blockmap.Index
	IndexBytes int64
	Layers     []LayerResult
	Guess      GuessReport
}

// LayerResult says what became of a layer.
type LayerResult struct {
	DiffID  v1.Hash
	Reused  bool // its stream was in the target already
	Content int64
	Stored  int64
}

// converted is a layer that is in the target.
type converted struct {
	toc    []byte
	stream *v1.Descriptor // nil: no file has content
	table  *blockmap.Table
	reused bool
}

type builder struct {
	Options
	src       *Source
	dst       Target
	diffIDs   []v1.Hash
	converter *converter
	temp      string
	anew      bool       // conversions that are there already are of no use
	empty     sync.Mutex // of pushEmpty
}

// Build flattens src and pushes the result to dst. The manifest goes last: a
// build that fails leaves none, only layers that were complete, which the next
// one finds.
func Build(ctx context.Context, src *Source, dst Target, o Options) (*Result, error) {
	if err := CheckChunkSize(o.ChunkSize); err != nil {
		return nil, err
	}
	if o.Jobs <= 0 {
		o.Jobs = min(runtime.GOMAXPROCS(0), maxJobs)
	}
	if o.Progress == nil {
		o.Progress = silent{}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	b := &builder{Options: o, src: src, dst: dst}
	var err error
	if b.diffIDs, err = diffIDs(src); err != nil {
		return nil, err
	}
	if b.converter, err = newConverter(o.ChunkSize, o.Level, o.Log); err != nil {
		return nil, err
	}
	if b.temp, err = os.MkdirTemp(o.TempDir, "thaw-build-"); err != nil {
		return nil, fmt.Errorf("make a temporary directory for streams in %s: %w", cmp.Or(o.TempDir, os.TempDir()), err)
	}
	defer os.RemoveAll(b.temp)
	layers, err := b.layers(ctx)
	if err != nil {
		return nil, err
	}
	a, err := b.assemble(ctx, layers)
	if err != nil && b.reconvert(ctx, layers, err) {
		if layers, err = b.layers(ctx); err != nil {
			return nil, err
		}
		a, err = b.assemble(ctx, layers)
	}
	if err != nil {
		return nil, err
	}
	return b.image(ctx, layers, a)
}

// reconvert gives up the conversions that were there before, where an image could
// not be put together with them: what they say may be damaged in a way that shows
// in no checksum. It says whether there is anything to do again.
func (b *builder) reconvert(ctx context.Context, layers []*converted, cause error) bool {
	again := false
	for _, c := range layers {
		again = again || c.reused
	}
	if !again || ctx.Err() != nil {
		return false
	}
	b.Log.Warn("the image cannot be put together from earlier conversions of its layers; they are made again", "err", cause)
	b.anew = true
	return true
}

// diffIDs are the digests of the layers' tars, which the config lists.
func diffIDs(src *Source) ([]v1.Hash, error) {
	var c v1.ConfigFile
	if err := json.Unmarshal(src.Config, &c); err != nil {
		return nil, fmt.Errorf("image config: %w", err)
	}
	if len(c.RootFS.DiffIDs) != len(src.Layers) {
		return nil, fmt.Errorf("the image has %d layers, and its config lists %d: it is not a container image, or damaged",
			len(src.Layers), len(c.RootFS.DiffIDs))
	}
	for _, d := range c.RootFS.DiffIDs {
		if _, err := digestOf(d); err != nil {
			return nil, fmt.Errorf("image config: diff ID: %w", err)
		}
	}
	return c.RootFS.DiffIDs, nil
}

// digestOf turns a descriptor's hash into a Digest.
func digestOf(h v1.Hash) (blockmap.Digest, error) {
	if h.Algorithm != "sha256" {
		return blockmap.Digest{}, fmt.Errorf("%q is not a SHA-256 digest", h)
	}
	return blockmap.ParseDigest(h.Hex)
}

func hashOf(d blockmap.Digest) v1.Hash { return v1.Hash{Algorithm: "sha256", Hex: d.String()} }

// layers converts what the target does not have, several layers at once. A
// layer that the image has twice is converted once.
func (b *builder) layers(parent context.Context) ([]*converted, error) {
	done := make([]*converted, len(b.src.Layers))
	first := make(map[v1.Hash]int)
	g, ctx := errgroup.WithContext(parent)
	g.SetLimit(b.Jobs)
	for i, id := range b.diffIDs {
		if _, ok := first[id]; ok {
			b.Progress.Done(i, true)
			continue
		}
		first[id] = i
		g.Go(func() (err error) {
			done[i], err = b.layer(ctx, i)
			if err != nil {
				return fmt.Errorf("layer %d of %d (%s): %w", i+1, len(done), b.src.Layers[i].Digest, err)
			}
			b.Progress.Done(i, done[i].reused)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	reused := false
	for i, id := range b.diffIDs {
		done[i] = done[first[id]]
		reused = reused || done[i].reused
	}
	if reused {
		// All conversions have this for a config, so it is looked for once.
		if err := b.dst.PushBytes(parent, describe(mediaTypeEmpty, []byte("{}")), []byte("{}")); err != nil && parent.Err() == nil {
			b.Log.Warn("the config of the converted layers is not there, and could not be pushed", "err", err)
		}
	}
	return done, nil
}

// layerTag is the tag under which a conversion is kept: what it depends on.
func (b *builder) layerTag(i int) string {
	return fmt.Sprintf("thaw-layer-v%d-%dk-z%d-%s", layerVersion, b.ChunkSize>>10, b.Level, b.diffIDs[i].Hex)
}

func (b *builder) layer(ctx context.Context, i int) (*converted, error) {
	tag := b.layerTag(i)
	c, damaged := b.reuse(ctx, tag)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if c != nil {
		return c, nil
	}
	in, err := b.src.Layers[i].Open(ctx)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	path := fmt.Sprintf("%s/%d", b.temp, i)
	out, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer os.Remove(path)
	defer out.Close()
	diffID, err := digestOf(b.diffIDs[i])
	if err != nil {
		return nil, err
	}
	c = new(converted)
	c.table, c.toc, err = b.converter.convert(ctx, &counter{in, b.Progress, i}, diffID, out)
	if err != nil {
		return nil, err
	}
	if err := out.Close(); err != nil {
		return nil, err
	}
	m := v1.Manifest{SchemaVersion: 2, MediaType: mediaTypeManifest, ArtifactType: ArtifactTypeLayer}
	m.Config = describe(mediaTypeEmpty, []byte("{}"))
	m.Layers = []v1.Descriptor{describe(MediaTypeTOC, c.toc)}
	if len(c.table.Chunks) > 0 {
		c.stream = streamDescriptor(c.table, b.diffIDs[i])
		m.Layers = append(m.Layers, *c.stream)
		b.Progress.Push(i, c.stream.Size)
		if err := b.dst.PushFile(ctx, *c.stream, path, func(n int64) { b.Progress.Pushed(i, n) }); err != nil {
			return nil, err
		}
	}
	if err := b.dst.PushBytes(ctx, m.Layers[0], c.toc); err != nil {
		return nil, err
	}
	if err := b.pushEmpty(ctx, m.Config); err != nil {
		return nil, err
	}
	_, err = b.push(ctx, &m, tag)
	if err != nil && damaged && ctx.Err() == nil {
		// The image does not need it, and tags can be immutable.
		b.Log.Warn("the damaged conversion of the layer could not be replaced", "tag", tag, "err", err)
		err = nil
	}
	return c, err
}

// pushEmpty pushes the config that all converted layers have, one push at a time:
// of two uploads of a blob at once, docker-registry can lose both.
func (b *builder) pushEmpty(ctx context.Context, d v1.Descriptor) error {
	b.empty.Lock()
	defer b.empty.Unlock()
	return b.dst.PushBytes(ctx, d, []byte("{}"))
}

// push marshals and pushes a manifest.
func (b *builder) push(ctx context.Context, m *v1.Manifest, tag string) (raw []byte, err error) {
	if raw, err = json.Marshal(m); err != nil {
		return nil, err
	}
	d := describe(m.MediaType, raw)
	d.ArtifactType = m.ArtifactType
	return raw, b.dst.PushManifest(ctx, d, raw, tag)
}

// reuse finds an earlier conversion in the target. It only saves work: whatever
// the target says, and one that is not whole any more, is as if there were none.
// damaged says that something is under the tag.
func (b *builder) reuse(ctx context.Context, tag string) (c *converted, damaged bool) {
	if b.anew {
		return nil, true
	}
	raw, err := b.dst.Tagged(ctx, tag)
	if err == nil && raw == nil {
		return nil, false
	}
	damaged = err == nil
	if err == nil {
		c, err = b.readLayer(ctx, raw)
	}
	if err == nil {
		return c, false
	}
	if ctx.Err() == nil {
		b.Log.Warn("an earlier conversion of the layer is of no use; the layer is converted again", "tag", tag, "err", err)
	}
	return nil, damaged
}

func (b *builder) readLayer(ctx context.Context, raw []byte) (*converted, error) {
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, err
	}
	if m.ArtifactType != ArtifactTypeLayer || len(m.Layers) < 1 || len(m.Layers) > 2 || m.Layers[0].MediaType != MediaTypeTOC {
		return nil, errors.New("the manifest is not that of a converted layer")
	}
	c := &converted{reused: true}
	if len(m.Layers) == 2 {
		c.stream = &m.Layers[1]
		if c.stream.Digest.Algorithm != "sha256" || c.stream.MediaType != MediaTypeStream || c.stream.Size < 0 {
			return nil, errors.New("the manifest is not that of a converted layer: its second part is no stream")
		}
		// Whether it is there bounds what the table of contents can say of it.
		ok, err := b.dst.HasBlob(ctx, *c.stream)
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, errors.New("its stream is gone or damaged")
		}
	}
	var err error
	if c.toc, err = b.dst.Blob(ctx, m.Layers[0]); err != nil {
		return nil, err
	}
	t, err := openTOC(c.toc, c.stored())
	if err != nil {
		return nil, err
	}
	defer t.close()
	c.table = &t.table
	// All of it: one that cannot be read is to be made again, not to fail every
	// build from now on.
	for n := 0; err == nil; n++ {
		if n%4096 == 0 && ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		_, err = t.read()
	}
	if err != io.EOF {
		return nil, err
	}
	if (c.stream != nil) != (len(t.table.Chunks) > 0) {
		return nil, errors.New("the manifest does not fit its table of contents")
	}
	if c.stream != nil {
		if c.stream.Digest != hashOf(t.table.Blob) || c.stream.Size != t.table.BlobSize {
			return nil, errors.New("the stream is not the one of its table of contents")
		}
	}
	return c, nil
}

// stored is the length of the stream's blob.
func (c *converted) stored() int64 {
	if c.stream == nil {
		return 0
	}
	return c.stream.Size
}

// assembly is what layers add up to.
type assembly struct {
	fs      *ext4.Filesystem
	wants   []want
	streams []blockmap.Table // of all layers in order, stream 0 left empty
}

// assemble puts the layers together. Nothing is pushed.
func (b *builder) assemble(ctx context.Context, layers []*converted) (*assembly, error) {
	a := &assembly{streams: make([]blockmap.Table, 1, len(layers)+1)}
	t := newTree()
	for i, c := range layers {
		stream := uint32(len(a.streams))
		if c.stream != nil {
			a.streams = append(a.streams, *c.table)
		}
		if err := t.applyLayer(ctx, c.toc, stream, c.stored()); err != nil {
			return nil, fmt.Errorf("layer %d of %d (%s): %w", i+1, len(layers), b.src.Layers[i].Digest, err)
		}
	}
	var err error
	if !b.NoGuess {
		if a.wants, err = b.guess(ctx, t, a.streams); err != nil {
			return nil, err
		}
	}
	if a.fs, err = ext4.Layout(t.inodes(), b.ext4Options()); err != nil {
		return nil, fmt.Errorf("lay out the filesystem of all layers: %w", err)
	}
	return a, nil
}

// image pushes the image of the layers.
func (b *builder) image(ctx context.Context, layers []*converted, a *assembly) (*Result, error) {
	ix := &blockmap.Index{Streams: a.streams}
	m := v1.Manifest{
		SchemaVersion: 2, MediaType: mediaTypeManifest, ArtifactType: ArtifactTypeImage,
		Config:  describe(mediaTypeConfig, b.src.Config),
		Layers:  make([]v1.Descriptor, 2, len(layers)+2),
		Subject: &v1.Descriptor{MediaType: b.src.Manifest.MediaType, Size: b.src.Manifest.Size, Digest: b.src.Manifest.Digest},
	}
	res := &Result{}
	seen := make(map[v1.Hash]bool)
	twice := make(map[*converted]bool)
	for i, c := range layers {
		if c.stream != nil && !seen[c.stream.Digest] {
			m.Layers = append(m.Layers, *c.stream)
			seen[c.stream.Digest] = true
		}
		res.Layers = append(res.Layers, LayerResult{
			DiffID: b.diffIDs[i], Reused: c.reused || twice[c],
			Content: int64(c.table.Blocks()) * blockSize, Stored: c.table.BlobSize,
		})
		twice[c] = true
	}
	meta, err := b.metadata(ctx, a.fs)
	if err != nil {
		return nil, err
	}
	ix.Blocks, ix.Runs, ix.Streams[0] = a.fs.Blocks(), a.fs.Runs(), *meta
	if err := ix.Seal(); err != nil {
		return nil, err
	}
	if len(a.wants) > 0 {
		var g *guess
		g, res.Guess = locate(ix, a.wants)
		m.Annotations = map[string]string{AnnotationGuess: g.encode()}
	}
	encoded := ix.Encode()
	m.Layers[0] = describe(MediaTypeIndex, encoded)
	m.Layers[1] = *streamDescriptor(meta, v1.Hash{})
	if err := b.dst.PushBytes(ctx, m.Layers[0], encoded); err != nil {
		return nil, err
	}
	if err := b.dst.PushBytes(ctx, m.Config, b.src.Config); err != nil {
		return nil, err
	}
	if res.Raw, err = json.Marshal(&m); err != nil {
		return nil, err
	}
	res.Manifest = describe(mediaTypeManifest, res.Raw)
	res.Manifest.ArtifactType = ArtifactTypeImage
	if got := res.Manifest.Digest.String(); b.Pin != "" && got != b.Pin {
		return nil, fmt.Errorf("the block image is %s, and %s was pinned: its manifest is not pushed", got, b.Pin)
	}
	if err := b.dst.PushManifest(ctx, res.Manifest, res.Raw, b.Tag); err != nil {
		return nil, err
	}
	if b.Tag == "" {
		b.tagImage(ctx, res)
	}
	res.Index, res.IndexBytes = ix, int64(len(encoded))
	return res, nil
}

// ImageTag is the tag of the block image of a source image, for block images
// without a name of their own. They are found by their subject; the tag is for
// registries that have lost an entry of a list of referrers.
func ImageTag(subject v1.Hash) string { return "thaw-image-" + subject.Hex }

// tagImage pushes ImageTag. Without it the image is found all the same.
func (b *builder) tagImage(ctx context.Context, res *Result) {
	tag := ImageTag(b.src.Manifest.Digest)
	// Registries with immutable tags refuse even what the tag means already.
	if raw, err := b.dst.Tagged(ctx, tag); err == nil && bytes.Equal(raw, res.Raw) {
		return
	}
	if err := b.dst.PushManifest(ctx, res.Manifest, res.Raw, tag); err != nil && ctx.Err() == nil {
		b.Log.Warn("the block image has no tag of its own; it is found by the list of referrers alone", "tag", tag, "err", err)
	}
}

// ext4Options are a function of the image, so that every build of it gives the
// same bytes.
func (b *builder) ext4Options() ext4.Options {
	o := ext4.Options{Size: b.Size}
	h := sha256.New()
	fmt.Fprintf(h, "thaw filesystem %d\n", layerVersion)
	for _, id := range b.diffIDs {
		fmt.Fprintln(h, id)
	}
	sum := h.Sum(nil)
	copy(o.UUID[:], sum)
	copy(o.HashSeed[:], sum[16:])
	for _, id := range []*[16]byte{&o.UUID, &o.HashSeed} {
		id[6] = id[6]&0x0f | 0x80 // RFC 9562: version 8, made by a rule of its own
		id[8] = id[8]&0x3f | 0x80
	}
	var c v1.ConfigFile
	if json.Unmarshal(b.src.Config, &c) == nil && !c.Created.IsZero() {
		o.Time = timeOf(c.Created.Time)
	}
	return o
}

// metadata makes and pushes stream 0.
func (b *builder) metadata(ctx context.Context, fs *ext4.Filesystem) (*blockmap.Table, error) {
	path := b.temp + "/metadata"
	out, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p := newPacker(ctx, b.converter.compressor, out)
	table, err := p.close(fs.WriteMeta(p))
	if err == nil {
		err = out.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("write the filesystem's metadata: %w", err)
	}
	return table, b.dst.PushFile(ctx, *streamDescriptor(table, v1.Hash{}), path, func(int64) {})
}

// counter tells Progress what is read.
type counter struct {
	r     io.Reader
	p     Progress
	layer int
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.p.Read(c.layer, int64(n))
	return n, err
}

type silent struct{}

func (silent) Read(int, int64)   {}
func (silent) Push(int, int64)   {}
func (silent) Pushed(int, int64) {}
func (silent) Done(int, bool)    {}
