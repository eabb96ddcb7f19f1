package flatten

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"thaw/blockmap"
	"thaw/blockmap/ext4"
)

// Opener reads a blob whole. What it returns fails, rather than ends, where the
// bytes are not those of the descriptor.
type Opener func(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error)

// Verify fetches all of an image and checks it: every blob and every chunk
// against its digest, the map of the device against the order that it has, the
// streams against the config, and the file system against itself; the guess only
// for being one of this device. It returns the first fault. temp is a directory for the metadata, "" the system's.
func Verify(ctx context.Context, m *Image, ix *blockmap.Index, open Opener, temp string) error {
	f, err := os.CreateTemp(temp, "thaw-verify-")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		return err
	}
	if len(ix.Streams) == 0 {
		return fmt.Errorf("index: %w: it has no streams", blockmap.ErrCorrupt)
	}
	if err := verifyRuns(ix); err != nil {
		return fmt.Errorf("index: %w: %w", blockmap.ErrCorrupt, err)
	}
	if _, err := m.Guess(ix.Blocks); err != nil {
		return err
	}
	descriptors := make(map[v1.Hash]v1.Descriptor)
	for _, d := range m.Layers[1:] {
		descriptors[d.Digest] = d
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i := range ix.Streams {
		t := &ix.Streams[i]
		keep := io.Writer(io.Discard)
		if i == 0 {
			keep = f
		}
		g.Go(func() error {
			if err := verifyStream(gctx, t, descriptors[hashOf(t.Blob)], open, keep); err != nil {
				return fmt.Errorf("stream %d: %w", i, err)
			}
			return nil
		})
	}
	g.Go(func() error {
		if err := verifyConfig(gctx, m, open); err != nil {
			return fmt.Errorf("config: %w", err)
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return err
	}
	if err := ext4.Check(&metadata{ix, f}, int64(ix.Blocks)*blockSize); err != nil {
		return fmt.Errorf("the file system: %w", err)
	}
	return nil
}

// verifyRuns holds the map of the device to the order of ext4.Layout: all of
// stream 0, then contents of files without a gap, in the order of the streams.
// The file system does not know what its files are to contain, so nothing else
// would find two runs that have changed places.
func verifyRuns(ix *blockmap.Index) error {
	var meta uint32 // blocks of stream 0 so far
	var last *blockmap.Run
	for i := range ix.Runs {
		r := &ix.Runs[i]
		switch {
		case r.Stream == 0 && last != nil:
			return fmt.Errorf("metadata at block %d of the device, behind contents of files", r.Device)
		case r.Stream == 0 && r.Block != meta:
			return fmt.Errorf("block %d of the metadata is at block %d of the device, where block %d belongs", r.Block, r.Device, meta)
		case r.Stream == 0:
			meta += r.Count
			continue
		case last == nil:
		case r.Device != last.Device+last.Count:
			return fmt.Errorf("a gap in the contents of files at block %d of the device", last.Device+last.Count)
		case r.Stream < last.Stream || r.Stream == last.Stream && r.Block < last.Block+last.Count:
			return fmt.Errorf("block %d of stream %d is at block %d of the device, behind block %d of stream %d",
				r.Block, r.Stream, r.Device, last.Block+last.Count-1, last.Stream)
		}
		last = r
	}
	if n := ix.Streams[0].Blocks(); meta != n {
		return fmt.Errorf("%d of %d blocks of metadata are on the device", meta, n)
	}
	return nil
}

// maxConfig is far beyond what registries take.
const maxConfig = 64 << 20

// verifyConfig reads the config of the source image, which is to list the
// layers that the streams come from.
func verifyConfig(ctx context.Context, m *Image, open Opener) error {
	if m.Config.Size < 0 || m.Config.Size > maxConfig {
		return fmt.Errorf("%w: it has %d bytes", blockmap.ErrCorrupt, m.Config.Size)
	}
	r, err := open(ctx, m.Config)
	if err != nil {
		return err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	var c v1.ConfigFile
	if err := json.Unmarshal(b, &c); err != nil {
		return fmt.Errorf("%w: %w", blockmap.ErrCorrupt, err)
	}
	listed := make(map[string]bool)
	for _, id := range c.RootFS.DiffIDs {
		listed[id.String()] = true
	}
	for _, d := range m.Layers[1:] {
		if id, ok := d.Annotations[AnnotationDiffID]; ok && !listed[id] {
			return fmt.Errorf("%w: it does not list the layer %s, of which the image has the stream", blockmap.ErrCorrupt, id)
		}
	}
	return nil
}

// verifyStream reads a stream's blob from its beginning to its end, and writes
// its content to w.
func verifyStream(ctx context.Context, t *blockmap.Table, d v1.Descriptor, open Opener, w io.Writer) error {
	dec := blockmap.NewChunkDecoder(1)
	defer dec.Close()
	body, err := open(ctx, d)
	if err != nil {
		return err
	}
	defer body.Close()
	r := bufio.NewReaderSize(body, 1<<20)
	var at int64
	var stored, content []byte
	for i := range t.Chunks {
		c := &t.Chunks[i]
		if _, err := io.CopyN(io.Discard, r, c.Offset-at); err != nil {
			return unexpected(err)
		}
		at = c.Offset + int64(c.Stored)
		stored = grow(stored, int(c.Stored))
		if _, err := io.ReadFull(r, stored); err != nil {
			return unexpected(err)
		}
		content = grow(content, c.Size())
		got, err := dec.Decode(c, stored, content)
		if err != nil {
			return fmt.Errorf("chunk %d at byte %d of blob %v: %w", i, c.Offset, t.Blob, err)
		}
		if _, err := w.Write(got); err != nil {
			return err
		}
	}
	_, err = io.Copy(io.Discard, r) // the end of the blob tells whether it was the right one
	return err
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func grow(b []byte, n int) []byte {
	if cap(b) < n {
		return make([]byte, n)
	}
	return b[:n]
}

// metadata reads the device as far as the file system's own blocks go. Nothing
// else is asked for by a check.
type metadata struct {
	ix   *blockmap.Index
	meta io.ReaderAt
}

func (m *metadata) ReadAt(p []byte, off int64) (int, error) {
	size := int64(m.ix.Blocks) * blockSize
	n := 0
	for n < len(p) {
		at := off + int64(n)
		if at >= size {
			return n, io.EOF
		}
		left := p[n:min(int64(len(p)), int64(n)+size-at)]
		r, ok := m.ix.Lookup(uint32(at / blockSize))
		// To the end of the run, or of the hole.
		end := int64(r.Device)*blockSize + int64(r.Count)*blockSize
		left = left[:min(int64(len(left)), end-at)]
		switch {
		case !ok:
			clear(left)
		case r.Stream != 0:
			return n, fmt.Errorf("block %d is the file system's, and lies in stream %d, among the contents of files", at/blockSize, r.Stream)
		default:
			if _, err := m.meta.ReadAt(left, int64(r.Block)*blockSize+at-int64(r.Device)*blockSize); err != nil {
				return n, unexpected(err)
			}
		}
		n += len(left)
	}
	return n, nil
}
