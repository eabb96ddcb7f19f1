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

// layers converts the layers whose conversions the target does not have, several at
// once. A layer that the image has twice is converted once.
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
			defer recovered(&err)
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
		// All conversions have the same config, so one look-up is enough.
		if err := b.dst.PushBytes(parent, describe(mediaTypeEmpty, []byte("{}")), []byte("{}")); err != nil && parent.Err() == nil {
			b.Log.Warn("cannot push the config of the converted layers", "err", err)
		}
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
	c, damaged := b.reuse(ctx, tag)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
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
	diffID, err := digestOf(b.diffIDs[i])
	if err != nil {
		return nil, err
	}
	in, err := b.src.Layers[i].Open(ctx)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	s, err := b.streams.Create(ctx)
	if err != nil {
		return nil, err
	}
	f, toc, err := b.converter.convert(ctx, &counter{in, b.Progress, i}, diffID, s)
	if err != nil {
		return nil, err
	}
	c := &converted{toc: toc, table: f.Table}
	if len(c.table.Chunks) == 0 {
		f.Discard()
	} else {
		stream := describeBlob(c.table)
		stream.Annotations = map[string]string{AnnotationDiffID: b.diffIDs[i].String()}
		c.stream = &stream
		b.Progress.Push(i, stream.Size)
		if err := f.Push(ctx, b.dst, func(n int64) { b.Progress.Pushed(i, n) }); err != nil {
			f.Discard()
			return nil, err
		}
		if b.NoGuess {
			f.Discard()
		} else {
			b.streams.temp.keep(c.table.Blob, f.file)
		}
	}
	if err := b.dst.PushBytes(ctx, describe(MediaTypeTOC, c.toc), c.toc); err != nil {
		return nil, err
	}
	return c, b.pushEmpty(ctx, describe(mediaTypeEmpty, []byte("{}")))
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

// pushEmpty pushes the config that all conversions have. It allows one push at a
// time: docker-registry can lose a blob of which it gets two uploads at once.
func (b *builder) pushEmpty(ctx context.Context, d v1.Descriptor) error {
	b.empty.Lock()
	defer b.empty.Unlock()
	return b.dst.PushBytes(ctx, d, []byte("{}"))
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
		b.Log.Warn("cannot reuse an earlier conversion of the layer: converting the layer again", "tag", tag, "err", err)
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
			return nil, errors.New("the manifest is not that of a converted layer: its second part is not a stream")
		}
		// The length of a stream that exists bounds what the table of contents can
		// claim.
		ok, err := b.dst.HasBlob(ctx, *c.stream)
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, errors.New("its stream is missing or damaged")
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
	// Read all of it: a TOC that cannot be read must be made again now. Later, it
	// would fail this build and every build after it.
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
		return nil, errors.New("the manifest does not match its table of contents")
	}
	if c.stream != nil {
		if c.stream.Digest != hashOf(t.table.Blob) || c.stream.Size != t.table.BlobSize {
			return nil, errors.New("the table of contents is that of another stream")
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
