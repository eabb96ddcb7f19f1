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

// Opener reads a whole blob. Its reader fails, and does not end, if the bytes are not those
// of the descriptor.
type Opener func(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error)

// Verify fetches all of an image and checks it: every blob and every chunk against
// its digest, the roles of the streams, the map of the device and the filesystem
// against the policy, and the streams against the config. Of the guess it checks
// only that it is one of this device. It returns the first fault. temp is a
// directory for the metadata, "" for the system's.
func Verify(ctx context.Context, m *Image, ix *blockmap.Index, open Opener, p Policy, temp string) error {
	f, err := os.CreateTemp(temp, "thaw-verify-")
	if err != nil {
		return fmt.Errorf("make a temporary file for the metadata: %w", err)
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		return err
	}
	if len(ix.Streams) == 0 || len(ix.Streams) != len(m.Layers)-1 {
		return fmt.Errorf("index: %w: it has %d streams, and the image has %d", blockmap.ErrCorrupt, len(ix.Streams), len(m.Layers)-1)
	}
	if err := p.check(m, ix); err != nil {
		return fmt.Errorf("index: %w: %w", blockmap.ErrCorrupt, err)
	}
	if _, err := m.Guess(ix.Blocks); err != nil {
		return err
	}
	meta := &metadata{ix: ix, file: f, at: make(map[uint32]int64)}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	var kept int64
	for i := range ix.Streams {
		t := &ix.Streams[i]
		keep := io.Writer(io.Discard)
		if p.metadata(m, i) {
			meta.at[uint32(i)] = kept
			keep = io.NewOffsetWriter(f, kept)
			kept += int64(t.Blocks()) * blockSize
		}
		g.Go(func() error {
			if err := verifyStream(gctx, t, m.Layers[1+i], open, keep); err != nil {
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
	size := int64(ix.Blocks) * blockSize
	if p == FromLayers {
		err = ext4.CheckMapped(meta, size, meta.mapped)
	} else {
		// An overlay omits blocks of zeros, and its filesystem may have been in use.
		err = ext4.CheckWritten(meta, size)
	}
	if err != nil {
		return fmt.Errorf("the file system: %w", err)
	}
	return nil
}

// maxConfig is far above the limit of registries.
const maxConfig = 64 << 20

// verifyConfig reads the config of the source image and checks that it lists the layers that
// the streams were made of.
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
			return fmt.Errorf("%w: it does not list the layer %s, but the image has its stream", blockmap.ErrCorrupt, id)
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

// metadata reads the device as far as the blocks of the filesystem itself go. A
// check asks for nothing else.
type metadata struct {
	ix   *blockmap.Index
	file io.ReaderAt
	at   map[uint32]int64 // in file: the streams that can hold such blocks
}

// mapped reports whether count blocks of the device from start are in streams.
func (m *metadata) mapped(start, count uint32) bool {
	for at, end := uint64(start), uint64(start)+uint64(count); at < end; {
		r, ok := m.ix.Lookup(uint32(at))
		if !ok {
			return false
		}
		at = uint64(r.Device) + uint64(r.Count)
	}
	return true
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
		start, holds := m.at[r.Stream]
		switch {
		case !ok:
			clear(left)
		case !holds:
			return n, fmt.Errorf("block %d belongs to the file system itself, but lies in stream %d, among the contents of files", at/blockSize, r.Stream)
		default:
			if _, err := m.file.ReadAt(left, start+int64(r.Block)*blockSize+at-int64(r.Device)*blockSize); err != nil {
				return n, unexpected(err)
			}
		}
		n += len(left)
	}
	return n, nil
}
