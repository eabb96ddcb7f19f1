package flatten

import (
	"context"
	"log/slog"
	"runtime"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
)

// Options are the settings of a build. The bytes of the image depend on the source
// and the first four options alone.
type Options struct {
	Size      int64 // of the device in bytes; made larger if the content needs more
	ChunkSize int   // bytes of a full chunk, a power of two
	Level     int   // zstd, 1 to 22
	NoGuess   bool  // omit AnnotationGuess

	Jobs     int     // layers converted at once; 0: one for each processor, at most 8
	Requests int     // operations of the target and its look-ups in flight; 0: DefaultRequests
	Reuse    []Place // where to look for conversions that the target lacks, in order
	TempDir  string  // for streams, until they are pushed and the guess is made; "": the system's
	Tag      string  // of the block image; "": ImageTag of the source's digest
	Pin      string  // the digest that the block image must have: if it has another, its manifest is not pushed; "": any
	Progress Progress
	Log      *slog.Logger
}

// Defaults of a build.
const (
	DefaultSize = 8 << 30
	// DefaultChunkSize won in bench/build on four real images: over a slow link, a
	// first start takes half the time that it takes with chunks of a quarter of
	// this size, and fetches 13 to 30 % more bytes.
	DefaultChunkSize = 1 << 20
	DefaultLevel     = 3
	// DefaultRequests lets all layers of an image be looked up, and their two blobs be
	// pushed, side by side: Docker's images have at most 127.
	DefaultRequests = 256
)

// The contents of 8 layers keep the compressors of many processors busy.
const maxJobs = 8

// Result describes the image that was built.
type Result struct {
	*Assembled
	Index  *blockmap.Index
	Layers []LayerResult
	Guess  GuessReport
}

// LayerResult describes one layer of the image.
type LayerResult struct {
	DiffID  v1.Hash
	Reused  bool // the target had its conversion already
	Content int64
	Stored  int64
}

type builder struct {
	Options
	src       *Source
	dst       Target
	diffIDs   []v1.Hash
	converter *converter
	streams   *Streams
	places    []*place // of Reuse
	bounds    bounds
	pieces    *sync.Pool // of downloads
	anew      bool       // do not reuse conversions that the target has
	empty     once       // of pushEmpty
	unfinished
}

// Build flattens src and pushes the result to dst. The manifest goes last: a build
// that fails pushes none. The layers that it has converted and pushed by then stay
// in dst, and the next build reuses them: the error is an *Unfinished, which says
// how many. When Build returns, its uploads have ended and its temporary files are
// gone, except for what an unfinished build has done for large layers (resume.go).
func Build(ctx context.Context, src *Source, dst Target, o Options) (*Result, error) {
	if err := CheckChunkSize(o.ChunkSize); err != nil {
		return nil, err
	}
	b := newBuilder(src, dst, o)
	var err error
	if b.diffIDs, err = diffIDs(src); err != nil {
		return nil, err
	}
	if b.streams, err = NewStreams(o.TempDir, o.ChunkSize, o.Level); err != nil {
		return nil, err
	}
	defer b.streams.Close()
	b.bounds.room = newBudget(b.roomFor(b.streams.temp.path))
	res, err := b.build(ctx)
	if err != nil {
		u := b.unfinished.error(distinct(b.diffIDs), err)
		u.Left = b.streams.temp.left()
		return nil, u
	}
	return res, nil
}

func newBuilder(src *Source, dst Target, o Options) *builder {
	if o.Jobs <= 0 {
		o.Jobs = min(runtime.GOMAXPROCS(0), maxJobs)
	}
	if o.Requests <= 0 {
		o.Requests = DefaultRequests
	}
	if o.Progress == nil {
		o.Progress = silent{}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	l := newLimited(dst, newBudget(int64(o.Requests)))
	b := &builder{
		Options: o, src: src, dst: l, converter: newConverter(o.Log),
		bounds: newBounds(o.Jobs), pieces: newPieces(), empty: newOnce(),
	}
	for _, p := range o.Reuse {
		b.places = append(b.places, &place{p, l})
	}
	return b
}

func (b *builder) build(ctx context.Context) (*Result, error) {
	layers, err := b.layers(ctx)
	if err != nil {
		return nil, err
	}
	l, err := b.layOut(ctx, layers)
	if err != nil && b.reconvert(ctx, layers, err) {
		if layers, err = b.layers(ctx); err != nil {
			return nil, err
		}
		l, err = b.layOut(ctx, layers)
	}
	if err != nil {
		return nil, err
	}
	return b.image(ctx, layers, l)
}

// reconvert has the layers converted again whose conversions were reused. It is for
// an image that could not be put together: a reused conversion may be damaged in a
// way that no checksum shows. It reports whether any was reused.
func (b *builder) reconvert(ctx context.Context, layers []*converted, cause error) bool {
	again := false
	for _, c := range layers {
		again = again || c.reused
	}
	if !again || ctx.Err() != nil {
		return false
	}
	b.Log.Warn("cannot put the image together from earlier conversions of its layers: converting the layers again", "err", cause)
	b.anew = true
	b.forget()
	return true
}
