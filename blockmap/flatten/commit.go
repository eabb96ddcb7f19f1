package flatten

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"thaw/blockmap"
)

// Annotations of an image that was committed, as the OCI image spec has them.
const (
	AnnotationBaseName   = "org.opencontainers.image.base.name"
	AnnotationBaseDigest = "org.opencontainers.image.base.digest"
)

// CommitBase is the block image that a device was made of before it was written to.
type CommitBase struct {
	Image    *Image
	Index    *blockmap.Index
	Manifest v1.Descriptor   // of its manifest
	Name     string          // its reference, which AnnotationBaseName has
	Device   blockmap.Device // of Index. What it has is compared with what was written
	Place    Place           // where its blobs are
	Here     bool            // the target is that place
}

// CommitOptions are the settings of a commit.
type CommitOptions struct {
	ChunkSize int    // bytes of a full chunk; 0: DefaultChunkSize
	Level     int    // zstd, 1 to 22; 0: DefaultLevel
	TempDir   string // for streams until they are pushed; "": the system's
	Tag       string // of the new image
	Progress  *CommitProgress
	Log       *slog.Logger
}

// CommitProgress is how far a commit is, in bytes. A commit sets its fields, and others
// read them meanwhile.
type CommitProgress struct {
	Changed atomic.Int64 // blocks that were written
	Read    atomic.Int64 // of these, compared and compressed
	Send    atomic.Int64 // of the stream that is sent; 0 until all is compressed
	Sent    atomic.Int64 // of it
	Copy    atomic.Int64 // streams of the base that the target lacks
	Copied  atomic.Int64 // of these, sent
}

// Committed describes the image that was committed, and where the changed bytes went.
type Committed struct {
	*Assembled
	Index *blockmap.Index

	Changed  int64 // bytes of blocks that were written, and those that became zeros
	Equal    int64 // of these, bytes of blocks that the base has in the same place
	Zeros    int64 // bytes of blocks that read as zeros: holes
	Content  int64 // bytes of blocks in the new stream
	Stored   int64 // bytes of the new stream in the target; 0 if it has none
	Uploaded int64 // bytes sent: the new stream, the index, the manifest, and what was copied
	Copied   int64 // bytes of streams of the base that the target lacked
	Mounted  int   // streams that the registry took from another of its repositories
	Dropped  int   // overlays of the base that nothing uses any more
}

// Commit makes a block image of a device that was written to, and pushes it to dst. The
// image has the streams of its base and one more, of RoleOverlay, with the blocks that
// were written, in the order of the device. Blocks of zeros become holes, and blocks that
// are what the base has are those of the base. It compares them without fetching: bytes
// if the base has them here, and otherwise digests, where a whole chunk was written.
//
// dst gets what it lacks: the new stream, the index, the config and the manifest. The
// streams of the base are in dst already, or are mounted or copied, one by one.
//
// The subject of the image is the base. So a server of the image that the base was built
// from still finds the base, and not this image.
func Commit(ctx context.Context, d Changed, base CommitBase, dst Target, o CommitOptions) (*Committed, error) {
	o.ChunkSize, o.Level = cmp.Or(o.ChunkSize, DefaultChunkSize), cmp.Or(o.Level, DefaultLevel)
	if o.Progress == nil {
		o.Progress = new(CommitProgress)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if size := int64(base.Index.Blocks) * blockSize; d.Size() != size || base.Device.Size() != size {
		return nil, fmt.Errorf("the device has %d bytes, and the image that it was made of has %d", d.Size(), size)
	}
	if _, err := base.Image.Policy(); err != nil {
		return nil, fmt.Errorf("the base image: %w", err)
	}
	streams, err := NewStreams(o.TempDir, o.ChunkSize, o.Level)
	if err != nil {
		return nil, err
	}
	defer streams.Close()
	c := &commit{
		CommitOptions: o, base: base, device: d, streams: streams,
		dst: newLimited(dst, newBudget(DefaultRequests)),
	}
	return c.run(ctx)
}

type commit struct {
	CommitOptions
	base    CommitBase
	device  Changed
	streams *Streams
	dst     *limited

	copied, mounted atomic.Int64
}

func (c *commit) run(ctx context.Context) (*Committed, error) {
	// Shared streams go their way while the changes are compared and compressed. A stream
	// that the new image will not use is copied in vain: those of layers never are.
	var d *delta
	var config []byte
	g, gctx := errgroup.WithContext(ctx)
	g.Go(guarded(func() (err error) {
		d, err = c.stream(gctx)
		return err
	}))
	g.Go(guarded(func() (err error) {
		from := &place{c.base.Place, c.dst}
		config, err = from.Blob(gctx, c.base.Image.Config)
		return err
	}))
	g.Go(guarded(func() error { return c.share(gctx) }))
	if err := g.Wait(); err != nil {
		return nil, err
	}
	all, runs, dropped := d.assemble(c.base.Image.Streams(c.base.Index))
	ix, err := NewIndex(c.base.Index.Blocks, runs, all)
	if err != nil {
		return nil, err
	}
	guess, err := d.guess(c.base.Image)
	if err != nil {
		// It is a hint, and whoever made the base is to blame for it.
		c.Log.Warn("the prediction of the base image cannot be read: the new image has none", "err", err)
		guess = nil
	}
	a, err := Assemble(ctx, c.dst, all, ix, c.base.Manifest, AssembleOptions{
		Config: config, Guess: guess, Tag: c.Tag, Log: c.Log,
		Annotations: map[string]string{AnnotationBaseName: c.base.Name, AnnotationBaseDigest: c.base.Manifest.Digest.String()},
	})
	if err != nil {
		return nil, err
	}
	r := &Committed{
		Assembled: a, Index: ix, Changed: d.changed, Equal: d.equal, Zeros: d.zeros, Dropped: dropped,
		Copied: c.copied.Load(), Mounted: int(c.mounted.Load()),
	}
	if d.table != nil {
		r.Content, r.Stored = int64(d.table.Blocks())*blockSize, d.table.BlobSize
	}
	r.Uploaded = r.Stored + a.IndexBytes + int64(len(a.Raw)) + r.Copied
	return r, nil
}

// stream writes the changed blocks to a stream, and pushes it.
func (c *commit) stream(ctx context.Context) (*delta, error) {
	w, err := c.streams.Create(ctx)
	if err != nil {
		return nil, err
	}
	d := &delta{ctx: ctx, base: c.base, device: c.device, progress: c.Progress, w: w, chunk: c.ChunkSize}
	f, err := w.end(d.write())
	if err != nil {
		return nil, err
	}
	if f.Table.Blocks() == 0 {
		f.Discard()
		return d, nil
	}
	d.table = f.Table
	c.Progress.Send.Store(f.Table.BlobSize)
	err = f.Push(ctx, c.dst, c.Progress.Sent.Store)
	f.Discard()
	return d, err
}

// shareAtOnce bounds the temporary files of streams that are copied.
const shareAtOnce = 2

// share brings the streams of the base to the target.
func (c *commit) share(ctx context.Context) error {
	if c.base.Here {
		return nil
	}
	seen := make(map[v1.Hash]bool)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(shareAtOnce)
	for i := range c.base.Index.Streams {
		d := describeBlob(&c.base.Index.Streams[i])
		if seen[d.Digest] {
			continue
		}
		seen[d.Digest] = true
		g.Go(guarded(func() error {
			if err := c.shareStream(ctx, d); err != nil {
				return fmt.Errorf("stream %d of the base image: %w", i, err)
			}
			return nil
		}))
	}
	return g.Wait()
}

func (c *commit) shareStream(ctx context.Context, d v1.Descriptor) error {
	has, err := c.dst.HasBlob(ctx, d)
	if has || err != nil {
		return err
	}
	switch mounted, err := c.dst.Mount(ctx, d, c.base.Place); {
	case err != nil:
		return err
	case mounted:
		c.mounted.Add(1)
		return nil
	}
	c.Progress.Copy.Add(d.Size)
	var sent int64
	err = copyBlob(ctx, c.streams.temp, &place{c.base.Place, c.dst}, c.dst, d, func(n int64) {
		c.Progress.Copied.Add(n - sent)
		sent = n
	})
	if err == nil {
		c.copied.Add(d.Size)
	}
	return err
}
