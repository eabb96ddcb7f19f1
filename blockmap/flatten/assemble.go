package flatten

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"thaw/blockmap"
)

// AssembleOptions are what an image has beside its streams.
type AssembleOptions struct {
	Config      []byte            // of the image: that of the source image, as it is
	Guess       []blockmap.Extent // see AnnotationGuess; none: the image has no guess
	Annotations map[string]string // of the manifest, beside the guess
	Tag         string            // "": ImageTag of the subject's digest
	Pin         string            // the digest that the image must have, or its manifest is not pushed; "": any
	Log         *slog.Logger      // nil: none

	// Pending, if not nil, waits for pushes of streams that have begun: it is called
	// before the manifest is pushed.
	Pending func() error
}

// Assembled is a block image that was pushed.
type Assembled struct {
	Manifest   v1.Descriptor
	Raw        []byte
	IndexBytes int64
}

// NewIndex makes the index of a device of that many blocks: runs say where its
// blocks lie in streams.
func NewIndex(blocks uint32, runs []blockmap.Run, streams []Stream) (*blockmap.Index, error) {
	ix := &blockmap.Index{Blocks: blocks, Runs: runs}
	for i := range streams {
		ix.Streams = append(ix.Streams, *streams[i].Table)
	}
	if err := ix.Seal(); err != nil {
		return nil, err
	}
	return ix, nil
}

// Assemble makes a block image of streams, and pushes it to dst: the index, the
// config and the manifest, whose subject dst lists it under. The blobs of the
// streams are in dst, or under way (AssembleOptions.Pending): they were pushed, or
// are those of an image that is there. ix is made of the same streams by NewIndex. The manifest is pushed last.
func Assemble(ctx context.Context, dst Target, streams []Stream, ix *blockmap.Index, subject v1.Descriptor, o AssembleOptions) (*Assembled, error) {
	m := v1.Manifest{
		SchemaVersion: 2, MediaType: mediaTypeManifest, ArtifactType: ArtifactTypeImage,
		Config:  describe(mediaTypeConfig, o.Config),
		Layers:  make([]v1.Descriptor, 1, 1+len(streams)),
		Subject: &v1.Descriptor{MediaType: subject.MediaType, Size: subject.Size, Digest: subject.Digest},
	}
	if len(ix.Streams) != len(streams) {
		return nil, fmt.Errorf("the index has %d streams, and the image has %d", len(ix.Streams), len(streams))
	}
	for i := range streams {
		if streams[i].Role == RoleUnknown {
			return nil, fmt.Errorf("stream %d has no role", i)
		}
		if streams[i].Table.Blob != ix.Streams[i].Blob {
			return nil, fmt.Errorf("stream %d of the index is another one than stream %d of the image", i, i)
		}
		m.Layers = append(m.Layers, streams[i].descriptor())
	}
	m.Annotations = maps.Clone(o.Annotations)
	if len(o.Guess) > 0 {
		if m.Annotations == nil {
			m.Annotations = make(map[string]string)
		}
		m.Annotations[AnnotationGuess] = guessOf(o.Guess).encode()
	}
	encoded := ix.Encode()
	m.Layers[0] = describe(MediaTypeIndex, encoded)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(guarded(func() error { return dst.PushBytes(gctx, m.Layers[0], encoded) }))
	g.Go(guarded(func() error { return dst.PushBytes(gctx, m.Config, o.Config) }))
	err := g.Wait()
	if o.Pending != nil {
		err = cmp.Or(o.Pending(), err)
	}
	if err != nil {
		return nil, err
	}
	raw, err := json.Marshal(&m)
	if err != nil {
		return nil, err
	}
	a := &Assembled{Manifest: describe(mediaTypeManifest, raw), Raw: raw, IndexBytes: int64(len(encoded))}
	a.Manifest.ArtifactType = ArtifactTypeImage
	if got := a.Manifest.Digest.String(); o.Pin != "" && got != o.Pin {
		return nil, fmt.Errorf("the block image is %s, and %s was pinned: its manifest is not pushed", got, o.Pin)
	}
	if err := dst.PushManifest(ctx, a.Manifest, raw, o.Tag); err != nil {
		return nil, err
	}
	if o.Tag == "" {
		tagImage(ctx, dst, subject, a, o.Log)
	}
	return a, nil
}

// ImageTag is the tag of the block image of a source image, for block images
// without a name of their own. They are found by their subject; the tag is for
// registries that have lost an entry of a list of referrers.
func ImageTag(subject v1.Hash) string { return "thaw-image-" + subject.Hex }

// tagImage pushes ImageTag. Without it the image is found all the same.
func tagImage(ctx context.Context, dst Target, subject v1.Descriptor, a *Assembled, log *slog.Logger) {
	tag := ImageTag(subject.Digest)
	// Registries with immutable tags refuse even what the tag means already.
	if raw, err := dst.Tagged(ctx, tag); err == nil && bytes.Equal(raw, a.Raw) {
		return
	}
	if err := dst.PushManifest(ctx, a.Manifest, a.Raw, tag); err != nil && ctx.Err() == nil && log != nil {
		log.Warn("the block image has no tag of its own; it is found by the list of referrers alone", "tag", tag, "err", err)
	}
}
