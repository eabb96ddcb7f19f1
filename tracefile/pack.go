package tracefile

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"thaw/blockmap"
	"thaw/blockmap/race"
)

const (
	// frameContent is how much content a frame has. Larger frames compress better and make
	// a leaf wait longer for the end of its frame: bench/NOTES.md has the figures. The
	// first frames are smaller, so that a start has its first leaves at once.
	frameContent = 1 << 20
	firstContent = 64 << 10

	// Bounds on what Pack has in flight.
	packRequests = 8
	packRequest  = 4 << 20
)

// Scratch is a temporary file.
type Scratch interface {
	io.ReaderAt
	io.WriterAt
}

// Contents is where Pack gets the content of chunks.
type Contents struct {
	// Open reads n bytes at off of a blob that holds chunks. Several are open at once.
	Open func(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error)
	// Local, if not nil, reads a chunk of the index into p, if it is on this host, and
	// says whether it was.
	Local func(ctx context.Context, stream, chunk int, p []byte) bool
	// Do, if not nil, runs the jobs that take the time of a processor. Several goroutines
	// may call it; Pack then compresses one frame at a time.
	Do func(job func())
}

// Pack writes the bundle of the plan to w and returns its head. scratch takes the content
// of the leaves, and the frames until their lengths are known.
//
// Pack compresses the leaves as hard as it can: they are packed once, and each start waits
// for every byte of them. Pack checks each chunk against its digest, and fails where one
// does not match. The same plan gives the same bytes.
func (p *Plan) Pack(ctx context.Context, w io.Writer, scratch Scratch, from Contents) (*Bundle, error) {
	k, err := newPacker(p, scratch, from)
	if err != nil {
		return nil, fmt.Errorf("pack: %w", err)
	}
	defer k.close()
	if err := k.gather(ctx); err != nil {
		return nil, err
	}
	if err := k.compress(ctx); err != nil {
		return nil, fmt.Errorf("pack: %w", err)
	}
	head := k.bundle.Head()
	if len(head)-bundleHead > maxBundleHead {
		return nil, fmt.Errorf("pack: %d leaves are more than a bundle can have", k.leaves)
	}
	if _, err := w.Write(head); err != nil {
		return nil, fmt.Errorf("pack: %w", err)
	}
	for i := range k.bundle.Frames {
		if _, err := io.Copy(w, io.NewSectionReader(scratch, k.frames[i], int64(k.bundle.Frames[i].Stored))); err != nil {
			return nil, fmt.Errorf("pack: %w", err)
		}
	}
	return k.bundle, nil
}

// packer makes the frames of a bundle.
type packer struct {
	plan    *Plan
	from    Contents
	bundle  *Bundle
	leaves  int
	workers int          // frames that are compressed at once
	sources []packSource // of each chunk of the bundle
	content []int64      // of each frame: where its content begins in scratch
	frames  []int64      // of each frame: where it begins in scratch
	scratch Scratch
	dec     *blockmap.ChunkDecoder
	enc     *zstd.Encoder
}

// packSource is a chunk of the bundle in the index.
type packSource struct {
	stream, chunk int
	parts         []packPart
	listed        bool // the bundle has the list of its leaves
}

// packPart is a part of a bundle, and where its content lies in scratch.
type packPart struct {
	Part
	at int64
}

func newPacker(p *Plan, scratch Scratch, from Contents) (*packer, error) {
	k := &packer{plan: p, from: from, bundle: new(Bundle), scratch: scratch, workers: min(runtime.GOMAXPROCS(0), packRequests)}
	if k.from.Do != nil {
		k.workers = 1
	} else {
		k.from.Do = func(job func()) { job() }
	}
	k.layOut()
	var err error
	k.enc, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(k.workers),
		zstd.WithWindowSize(frameContent), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, err
	}
	k.dec = blockmap.NewChunkDecoder(k.workers)
	return k, nil
}

func (k *packer) close() {
	k.dec.Close()
	k.enc.Close() // writes nothing: EncodeAll alone is used
}

// layOut says which leaves are in which frame: those of the plan, in its order.
func (k *packer) layOut() {
	chunks := make(map[blockmap.Digest]int)
	limit, size := firstContent, 0
	var at int64
	for _, s := range k.plan.Steps {
		if s.Again {
			continue
		}
		c := k.plan.Chunk(s)
		i, ok := chunks[c.Digest]
		if !ok {
			i = len(k.bundle.Chunks)
			chunks[c.Digest] = i
			k.bundle.Chunks = append(k.bundle.Chunks, BundleChunk{Digest: c.Digest, Blocks: c.Count})
			k.sources = append(k.sources, packSource{stream: s.Stream, chunk: s.Chunk})
		}
		for leaf := s.Leaf; leaf < s.Leaf+s.Leaves; leaf++ {
			n := c.LeafSize(leaf)
			if len(k.bundle.Frames) == 0 || size+n > limit {
				if len(k.bundle.Frames) > 0 {
					limit = min(2*limit, frameContent)
				}
				k.bundle.Frames = append(k.bundle.Frames, Frame{})
				k.content = append(k.content, at)
				size = 0
			}
			k.addLeaf(i, leaf, at)
			size += n
			at += int64(n)
			k.leaves++
		}
	}
	for i := range k.sources {
		s := &k.sources[i]
		s.listed = !k.bundle.whole(s.parts[0].Part)
	}
	for i := range k.bundle.Frames {
		k.frames = append(k.frames, at)
		at += int64(k.bundle.FrameSize(&k.bundle.Frames[i])) + 1<<17
	}
}

// addLeaf adds a leaf to the last frame. Its content is at at in scratch.
func (k *packer) addLeaf(chunk, leaf int, at int64) {
	f, s := &k.bundle.Frames[len(k.bundle.Frames)-1], &k.sources[chunk]
	if n := len(f.Parts); n > 0 {
		if p := &f.Parts[n-1]; p.Chunk == chunk && p.Leaf+p.Count == leaf {
			p.Count++
			s.parts[len(s.parts)-1].Count++
			return
		}
	}
	p := Part{chunk, leaf, 1}
	f.Parts = append(f.Parts, p)
	s.parts = append(s.parts, packPart{p, at})
}

// gather brings the content of all leaves to scratch.
func (k *packer) gather(ctx context.Context) error {
	var absent []int
	for i := range k.sources {
		here, err := k.local(ctx, i)
		if err != nil {
			return fmt.Errorf("pack: %w", err)
		}
		if !here {
			absent = append(absent, i)
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(packRequests)
	for _, run := range k.runs(absent) {
		g.Go(func() error {
			if err := k.read(ctx, run); err != nil {
				return fmt.Errorf("pack chunks of blob sha256:%.12s…: %w", run.blob, err)
			}
			return nil
		})
	}
	return g.Wait()
}

func (k *packer) chunk(source int) *blockmap.Chunk {
	s := &k.sources[source]
	return &k.plan.Index.Streams[s.stream].Chunks[s.chunk]
}

// local keeps a chunk that is on this host.
func (k *packer) local(ctx context.Context, source int) (here bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, context.Cause(ctx)
	}
	if k.from.Local == nil {
		return false, nil
	}
	c := k.chunk(source)
	content := make([]byte, c.Size())
	k.from.Do(func() {
		here = k.from.Local(ctx, k.sources[source].stream, k.sources[source].chunk, content) && c.Verify(content) == nil
		if here {
			err = k.keep(source, content)
		}
	})
	return here, err
}

// packRun is chunks that lie side by side in a blob.
type packRun struct {
	blob    blockmap.Digest
	sources []int
}

// runs groups the chunks that are read together.
func (k *packer) runs(sources []int) (runs []*packRun) {
	slices.SortFunc(sources, func(a, b int) int {
		return cmp.Or(cmp.Compare(k.sources[a].stream, k.sources[b].stream), cmp.Compare(k.chunk(a).Block, k.chunk(b).Block))
	})
	var bytes int64
	for i, x := range sources {
		c, stream := k.chunk(x), k.sources[x].stream
		n := int64(c.Stored)
		if i == 0 || k.sources[sources[i-1]].stream != stream || bytes+n > packRequest ||
			k.chunk(sources[i-1]).Offset+int64(k.chunk(sources[i-1]).Stored) != c.Offset {
			runs = append(runs, &packRun{blob: k.plan.Index.Streams[stream].Blob})
			bytes = 0
		}
		bytes += n
		r := runs[len(runs)-1]
		r.sources = append(r.sources, x)
	}
	return runs
}

// read keeps the chunks of a run.
func (k *packer) read(ctx context.Context, r *packRun) error {
	first, last := k.chunk(r.sources[0]), k.chunk(r.sources[len(r.sources)-1])
	body, err := k.from.Open(ctx, r.blob, first.Offset, last.Offset+int64(last.Stored)-first.Offset)
	if err != nil {
		return err
	}
	defer body.Close()
	for _, x := range r.sources {
		c := k.chunk(x)
		frame := make([]byte, c.Stored)
		if _, err := io.ReadFull(body, frame); err != nil {
			return err
		}
		var err error
		k.from.Do(func() {
			var content []byte
			if content, err = k.dec.Decode(c, frame, nil); err == nil {
				err = k.keep(x, content)
			}
		})
		if err != nil {
			return fmt.Errorf("%d bytes at %d: %w", c.Stored, c.Offset, err)
		}
	}
	return nil
}

// keep writes the leaves of a chunk to scratch, and notes the list of them. The content is
// that of the chunk, and no other goroutine keeps this chunk.
func (k *packer) keep(source int, content []byte) error {
	s := &k.sources[source]
	if s.listed {
		list, err := blockmap.NewLeafList(k.chunk(source), blockmap.LeafDigests(nil, content))
		if err != nil {
			return err
		}
		k.bundle.Chunks[source].List = list
	}
	for _, p := range s.parts {
		at := p.Leaf * blockmap.LeafSize
		if _, err := k.scratch.WriteAt(content[at:at+k.bundle.PartSize(p.Part)], p.at); err != nil {
			return err
		}
	}
	return nil
}

// compress makes the frames.
func (k *packer) compress(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(k.workers)
	for i := range k.bundle.Frames {
		g.Go(func() error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			f := &k.bundle.Frames[i]
			content := make([]byte, k.bundle.FrameSize(f))
			if n, err := k.scratch.ReadAt(content, k.content[i]); n < len(content) {
				return err
			}
			var frame []byte
			race.Read(content)
			k.from.Do(func() { frame = k.enc.EncodeAll(content, nil) })
			f.Stored = uint32(len(frame)) // nobody else has this frame
			_, err := k.scratch.WriteAt(frame, k.frames[i])
			return err
		})
	}
	return g.Wait()
}
