package flatten

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap/ext4"
)

// layout is what the layers add up to.
type layout struct {
	fs      *ext4.Filesystem
	wants   []want
	streams []Stream // the metadata, which has no table yet, and those of the layers in order
}

// layOut puts the layers together. Nothing is pushed.
func (b *builder) layOut(ctx context.Context, layers []*converted) (*layout, error) {
	l := &layout{streams: make([]Stream, 1, len(layers)+1)}
	l.streams[0].Role = RoleMetadata // ext4.Layout says so
	t := newTree()
	for i, c := range layers {
		stream := uint32(len(l.streams))
		if c.stream != nil {
			l.streams = append(l.streams, Stream{Role: RoleLayer, DiffID: b.diffIDs[i], Table: c.table})
		}
		if err := t.applyLayer(ctx, c.toc, stream, c.stored()); err != nil {
			return nil, fmt.Errorf("layer %d of %d (%s): %w", i+1, len(layers), b.src.Layers[i].Digest, err)
		}
	}
	var err error
	if !b.NoGuess {
		l.wants, err = b.guess(ctx, t, l.streams)
		b.streams.temp.release()
		if err != nil {
			return nil, err
		}
	}
	o := b.ext4Options()
	o.Plan = t.plan
	if l.fs, err = ext4.Layout(t.inodes(), o); err != nil {
		return nil, fmt.Errorf("lay out the filesystem of all layers: %w", err)
	}
	return l, nil
}

// hashSeed decides the order of the names in large directories. It is the same for all
// images, so that versions of an image share their directories. Whoever writes to a
// device can know it, and make names that collide; that slows down only directories of
// such names.
var hashSeed = [16]byte{'t', 'h', 'a', 'w', ' ', 'd', 0x89, 'r', 0xa5, 'h', 'a', 's', 'h', 'e', 's', '1'}

// ext4Options are a function of the image, so that every build of it gives the
// same bytes.
func (b *builder) ext4Options() ext4.Options {
	o := ext4.Options{Size: b.Size}
	h := sha256.New()
	fmt.Fprintf(h, "thaw filesystem %d\n", layerVersion)
	for _, id := range b.diffIDs {
		fmt.Fprintln(h, id)
	}
	copy(o.UUID[:], h.Sum(nil))
	o.UUID[6] = o.UUID[6]&0x0f | 0x80 // RFC 9562: version 8, made by a rule of its own
	o.UUID[8] = o.UUID[8]&0x3f | 0x80
	o.HashSeed = hashSeed
	var c v1.ConfigFile
	if json.Unmarshal(b.src.Config, &c) == nil && !c.Created.IsZero() {
		o.Time = timeOf(c.Created.Time)
	}
	return o
}

// image pushes the image of the layers.
func (b *builder) image(ctx context.Context, layers []*converted, l *layout) (*Result, error) {
	res := &Result{}
	twice := make(map[*converted]bool)
	for i, c := range layers {
		res.Layers = append(res.Layers, LayerResult{
			DiffID: b.diffIDs[i], Reused: c.reused || twice[c],
			Content: int64(c.table.Blocks()) * blockSize, Stored: c.table.BlobSize,
		})
		twice[c] = true
	}
	meta, err := b.metadata(ctx, l.fs)
	if err != nil {
		return nil, err
	}
	defer meta.Discard()
	l.streams[0].Table = meta.Table
	// The metadata is pushed while the index is made and pushed.
	pctx, cancel := context.WithCancel(ctx)
	pushed := make(chan error, 1)
	go func() { pushed <- guarded(func() error { return meta.Push(pctx, b.dst, func(int64) {}) })() }()
	wait := sync.OnceValue(func() error { return <-pushed })
	defer func() { _ = wait() }() // Assemble returns its error
	defer cancel()
	if res.Index, err = NewIndex(l.fs.Blocks(), l.fs.Runs(), l.streams); err != nil {
		return nil, err
	}
	g, report := locate(res.Index, l.wants)
	res.Guess = report
	res.Assembled, err = Assemble(ctx, b.dst, l.streams, res.Index, b.src.Manifest, AssembleOptions{
		Config: b.src.Config, Guess: g.extents(), Tag: b.Tag, Pin: b.Pin, Log: b.Log, Pending: wait,
	})
	if err != nil {
		return nil, err
	}
	return res, nil
}

// metadata makes the stream of the filesystem's metadata.
func (b *builder) metadata(ctx context.Context, fs *ext4.Filesystem) (*StreamFile, error) {
	s, err := b.streams.Create(ctx)
	if err != nil {
		return nil, err
	}
	f, err := s.end(fs.WriteMeta(&metadataCutter{s: s}))
	if err != nil {
		return nil, fmt.Errorf("write the filesystem's metadata: %w", err)
	}
	return f, nil
}

// metadataCutter cuts a stream of metadata into chunks at boundaries that depend on a
// block alone. Where two versions of a filesystem differ, only the chunks with the
// differences differ.
type metadataCutter struct{ s *StreamWriter }

const (
	// The metadata of two versions differ in a block here and there: an inode of a
	// directory, for example. So chunks of metadata are small, and larger than this.
	leastMetadataChunk = 64 << 10
	// One block of this many ends a chunk that is large enough.
	metadataMark = 16
)

// Write takes whole blocks.
func (m *metadataCutter) Write(b []byte) (n int, err error) {
	for ; n < len(b); n += blockSize {
		block := b[n : n+blockSize]
		if _, err := m.s.Write(block); err != nil {
			return n, err
		}
		if len(*m.s.chunk) >= leastMetadataChunk && crc32.Checksum(block, castagnoli)%metadataMark == 0 {
			if err := m.s.Cut(); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}
