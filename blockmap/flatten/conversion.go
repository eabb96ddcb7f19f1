package flatten

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"thaw/blockmap"
)

// converted is a layer that is in the target.
type converted struct {
	toc    []byte
	stream *v1.Descriptor // nil: no file has content
	table  *blockmap.Table
	reused bool
}

// layers converts the layers whose conversions the target does not have, and brings
// what it makes of them to the target. Waiting is not work: all layers are looked up,
// read and pushed side by side, within the bounds of the build, and Jobs of them are
// converted at a time. A layer that the image has twice is converted once.
func (b *builder) layers(parent context.Context) ([]*converted, error) {
	done := make([]*converted, len(b.src.Layers))
	first := make(map[v1.Hash]int)
	g, ctx := errgroup.WithContext(parent)
	for i, id := range b.diffIDs {
		if _, ok := first[id]; ok {
			b.Progress.Done(i, true)
			continue
		}
		first[id] = i
		g.Go(guarded(func() (err error) {
			done[i], err = b.layer(ctx, i)
			if err != nil {
				return fmt.Errorf("layer %d of %d (%s): %w", i+1, len(done), b.src.Layers[i].Digest, err)
			}
			b.Progress.Done(i, done[i].reused)
			return nil
		}))
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for i, id := range b.diffIDs {
		done[i] = done[first[id]]
	}
	return done, nil
}

// layerTag is the tag of a conversion. It names everything that the conversion
// depends on.
func (b *builder) layerTag(i int) string {
	return fmt.Sprintf("thaw-layer-v%d-%dk-z%d-%s", layerVersion, b.ChunkSize>>10, b.Level, b.diffIDs[i].Hex)
}

func (b *builder) layer(ctx context.Context, i int) (*converted, error) {
	tag := b.layerTag(i)
	c, damaged := b.reuse(ctx, i, tag)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if c == nil && !b.anew {
		c = b.adopt(ctx, i, tag)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	if c != nil {
		b.keep(b.diffIDs[i], c.stored())
		return c, nil
	}
	c, err := b.convert(ctx, i)
	if err != nil {
		return nil, err
	}
	err = b.pushConversion(ctx, c, tag)
	if err != nil && damaged && ctx.Err() == nil {
		// The image does not need the tag, and the registry may not let it be
		// moved.
		b.Log.Warn("cannot replace the damaged conversion of the layer", "tag", tag, "err", err)
		return c, nil
	}
	if err != nil {
		return nil, err
	}
	b.keep(b.diffIDs[i], c.stored())
	return c, nil
}

// convert makes the conversion of a layer, and pushes its blobs.
func (b *builder) convert(ctx context.Context, i int) (*converted, error) {
	room, err := b.bounds.room.take(ctx, i, b.sizeOf(i))
	if err != nil {
		return nil, err
	}
	defer b.bounds.room.give(room)
	f, toc, err := b.obtain(ctx, i)
	if err != nil {
		return nil, err
	}
	c := &converted{toc: toc, table: f.Table}
	g, ctx := errgroup.WithContext(ctx)
	if len(c.table.Chunks) > 0 {
		stream := describeBlob(c.table)
		stream.Annotations = map[string]string{AnnotationDiffID: b.diffIDs[i].String()}
		c.stream = &stream
		b.Progress.Push(i, stream.Size)
		g.Go(guarded(func() error { return f.Push(ctx, b.dst, func(n int64) { b.Progress.Pushed(i, n) }) }))
	}
	g.Go(guarded(func() error { return b.dst.PushBytes(ctx, describe(MediaTypeTOC, c.toc), c.toc) }))
	g.Go(guarded(func() error { return b.pushEmpty(ctx) }))
	if err := g.Wait(); err != nil {
		f.release()
		return nil, err
	}
	b.streams.temp.forget(b.layerTag(i))
	if c.stream == nil || b.NoGuess {
		f.Discard()
		return c, nil
	}
	b.streams.temp.keep(c.table.Blob, f.file)
	return c, nil
}

// read reads a layer, and makes its stream and its TOC.
func (b *builder) read(ctx context.Context, i int) (*StreamFile, []byte, error) {
	diffID, err := digestOf(b.diffIDs[i])
	if err != nil {
		return nil, nil, err
	}
	in, end, err := b.open(ctx, i)
	if err != nil {
		return nil, nil, err
	}
	defer end()
	turn, err := b.bounds.work.take(ctx, i, 1)
	if err != nil {
		return nil, nil, err
	}
	defer b.bounds.work.give(turn)
	s, err := b.streams.Create(ctx)
	if err != nil {
		return nil, nil, err
	}
	return b.converter.convert(ctx, in, diffID, s)
}

// pushConversion pushes the manifest of a conversion under its tag.
func (b *builder) pushConversion(ctx context.Context, c *converted, tag string) error {
	m := v1.Manifest{SchemaVersion: 2, MediaType: mediaTypeManifest, ArtifactType: ArtifactTypeLayer}
	m.Config = describe(mediaTypeEmpty, []byte("{}"))
	m.Layers = []v1.Descriptor{describe(MediaTypeTOC, c.toc)}
	if c.stream != nil {
		m.Layers = append(m.Layers, *c.stream)
	}
	err := b.push(ctx, &m, tag)
	return err
}

// pushEmpty pushes the config that all conversions have, once in a build.
func (b *builder) pushEmpty(ctx context.Context) error {
	return b.empty.do(ctx, func() error {
		return b.dst.PushBytes(ctx, describe(mediaTypeEmpty, []byte("{}")), []byte("{}"))
	})
}

// once is a sync.Once for what can fail, and is then done again.
type once struct{ turn chan bool } // holds whether it was done

func newOnce() once {
	o := once{make(chan bool, 1)}
	o.turn <- false
	return o
}

func (o once) do(ctx context.Context, f func() error) (err error) {
	select {
	case done := <-o.turn:
		defer func() { o.turn <- done || err == nil }()
		if done {
			return nil
		}
		return f()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// push marshals and pushes a manifest.
func (b *builder) push(ctx context.Context, m *v1.Manifest, tag string) error {
	raw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	d := describe(m.MediaType, raw)
	d.ArtifactType = m.ArtifactType
	return b.dst.PushManifest(ctx, d, raw, tag)
}

// reuse finds an earlier conversion in the target. It only saves work, so an error
// of the target and a damaged conversion both count as none. damaged reports that
// the tag exists.
func (b *builder) reuse(ctx context.Context, i int, tag string) (c *converted, damaged bool) {
	if b.anew {
		return nil, true
	}
	raw, err := b.dst.Tagged(ctx, tag)
	if err == nil && raw == nil {
		return nil, false
	}
	damaged = err == nil
	if err == nil {
		c, err = b.readLayer(ctx, i, raw, b.dst)
	}
	if err == nil {
		return c, false
	}
	if ctx.Err() == nil {
		b.Log.Warn("cannot reuse an earlier conversion of the layer: converting the layer again", "tag", tag, "err", err)
	}
	return nil, damaged
}

// readLayer reads the parts of a conversion at the same time: the registry answers
// whether it has the stream and sends the TOC, and the target gets the config that the
// manifest names.
func (b *builder) readLayer(ctx context.Context, i int, raw []byte, from source) (*converted, error) {
	c, toc, err := parseConversion(raw, b.diffIDs[i])
	if err != nil {
		return nil, err
	}
	n, err := b.bounds.tocs.take(ctx, i, toc.Size)
	if err != nil {
		return nil, err
	}
	defer b.bounds.tocs.give(n)
	g, gctx := errgroup.WithContext(ctx)
	if c.stream != nil {
		// The length of a stream that exists bounds what the table of contents can
		// claim.
		g.Go(guarded(func() error {
			ok, err := from.HasBlob(gctx, *c.stream)
			if err == nil && !ok {
				err = errors.New("its stream is missing or damaged")
			}
			return err
		}))
	}
	g.Go(guarded(func() (err error) {
		c.toc, err = from.Blob(gctx, toc)
		return err
	}))
	g.Go(guarded(func() error {
		if err := b.pushEmpty(gctx); err != nil && gctx.Err() == nil {
			b.Log.Warn("cannot push the config of the converted layers", "err", err)
		}
		return nil
	}))
	if err := g.Wait(); err != nil {
		return nil, err
	}
	turn, err := b.bounds.work.take(ctx, i, 1)
	if err != nil {
		return nil, err
	}
	defer b.bounds.work.give(turn)
	return c, c.check(ctx)
}

// source is what Target and Place have in common.
type source interface {
	HasBlob(ctx context.Context, d v1.Descriptor) (bool, error)
	Blob(ctx context.Context, d v1.Descriptor) ([]byte, error)
}

// parseConversion reads the manifest of a conversion. It returns the conversion without
// its TOC, and the descriptor of the TOC.
func parseConversion(raw []byte, diffID v1.Hash) (*converted, v1.Descriptor, error) {
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, v1.Descriptor{}, err
	}
	if m.ArtifactType != ArtifactTypeLayer || len(m.Layers) < 1 || len(m.Layers) > 2 || m.Layers[0].MediaType != MediaTypeTOC || m.Layers[0].Size < 0 {
		return nil, v1.Descriptor{}, errors.New("the manifest is not that of a converted layer")
	}
	c := &converted{reused: true}
	if len(m.Layers) == 2 {
		c.stream = &m.Layers[1]
		if c.stream.Digest.Algorithm != "sha256" || c.stream.MediaType != MediaTypeStream || c.stream.Size < 0 {
			return nil, v1.Descriptor{}, errors.New("the manifest is not that of a converted layer: its second part is not a stream")
		}
		if id := c.stream.Annotations[AnnotationDiffID]; id != diffID.String() {
			return nil, v1.Descriptor{}, fmt.Errorf("the manifest is that of another layer: its diff ID is %q", id)
		}
	}
	return c, m.Layers[0], nil
}

// check reads the TOC, sets the table of c, and fails if they do not belong together.
func (c *converted) check(ctx context.Context) (err error) {
	defer recovered(&err)
	t, err := openTOC(c.toc, c.stored())
	if err != nil {
		return err
	}
	defer t.close()
	c.table = &t.table
	// Read all of it: a TOC that cannot be read must be made again now. Later, it
	// would fail this build and every build after it.
	for n := 0; err == nil; n++ {
		if n%4096 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		_, err = t.read()
	}
	if err != io.EOF {
		return err
	}
	if (c.stream != nil) != (len(t.table.Chunks) > 0) {
		return errors.New("the manifest does not match its table of contents")
	}
	if c.stream != nil {
		if c.stream.Digest != hashOf(t.table.Blob) || c.stream.Size != t.table.BlobSize {
			return errors.New("the table of contents is that of another stream")
		}
	}
	return nil
}

// stored is the length of the stream's blob.
func (c *converted) stored() int64 {
	if c.stream == nil {
		return 0
	}
	return c.stream.Size
}
