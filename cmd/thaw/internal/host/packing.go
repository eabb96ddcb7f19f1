package host

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"thaw/blockmap"
	"thaw/tracefile"
)

// packing is the packing of bundles in the background, one after the other: at low priority,
// and of what is in the cache.
type packing struct {
	ctx    context.Context
	cancel context.CancelFunc
	turn   sync.Mutex // held while a bundle is packed

	mu struct {
		sync.Mutex
		n    int           // bundles that are being packed, or wait for their turn
		none chan struct{} // closed while n is 0
	}
}

// packTimeout bounds the packing of one bundle.
const packTimeout = time.Hour

func (p *packing) init(limit context.Context) {
	p.ctx, p.cancel = context.WithCancel(limit)
	p.mu.none = make(chan struct{})
	close(p.mu.none)
}

// stop ends all packing. A later start packs what is missing.
func (p *packing) stop() { p.cancel() }

// ended returns a channel that is closed when nothing is being packed.
func (p *packing) ended() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mu.none
}

// run calls pack in the background.
func (p *packing) run(pack func(ctx context.Context)) {
	p.mu.Lock()
	if p.mu.n == 0 {
		p.mu.none = make(chan struct{})
	}
	p.mu.n++
	p.mu.Unlock()
	go func() {
		defer func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			if p.mu.n--; p.mu.n == 0 {
				close(p.mu.none)
			}
		}()
		p.turn.Lock()
		defer p.turn.Unlock()
		ctx, cancel := context.WithTimeout(p.ctx, packTimeout)
		defer cancel()
		if ctx.Err() == nil {
			pack(ctx)
		}
	}()
}

// pack packs and stores the bundle of an image in the background, of the traces beside it
// and of one that was just stored, if there is one. If anew is set, it packs that one alone.
func (t *tracer) pack(s *start, recorded []byte, anew bool) {
	t.packing.run(func(ctx context.Context) {
		log := t.log.With("image", s.image.Name)
		began := time.Now()
		p, fetched, err := t.packNow(ctx, s.image, recorded, anew)
		switch {
		case ctx.Err() != nil:
			log.Info("the bundle is not packed, because the server stops; a later start packs it")
		case errors.Is(err, errPacked):
			log.Info("the image has a bundle by now")
		case err != nil:
			log.Warn("no bundle could be packed", "err", err)
		default:
			log.Info("packed a bundle and stored it beside its image", "leaves", p.Leaves, "content_bytes", p.Content, "bytes", p.Bytes,
				"starts", p.Starts, "fetched_bytes", fetched, "seconds", time.Since(began).Seconds())
		}
	})
}

// errPacked says that another host was faster.
var errPacked = errors.New("the image has a bundle by now")

func (t *tracer) packNow(ctx context.Context, b *BlockImage, recorded []byte, anew bool) (p *Packed, fetched int64, err error) {
	var own *tracefile.Trace
	var traces []*tracefile.Trace
	if recorded != nil {
		if own, err = tracefile.Read(bytes.NewReader(recorded)); err != nil {
			return nil, 0, err
		}
		traces = append(traces, own)
	}
	if !anew {
		found, err := b.Beside(ctx)
		if err != nil && own == nil {
			return nil, 0, err
		}
		if len(found.Bundles) > 0 {
			return nil, 0, errPacked
		}
		// The list may have the recording already.
		layer, _, err := v1.SHA256(bytes.NewReader(recorded))
		if err != nil {
			return nil, 0, err
		}
		others := slices.DeleteFunc(found.Traces, func(d v1.Descriptor) bool {
			listed, ok := tracefile.AnnotatedLayer(d, tracefile.MediaTypeTrace)
			return ok && listed.Digest == layer
		})
		traces = append(traces, b.storedTraces(ctx, others, t.opener.readBlob, t.log)...)
	}
	if len(traces) == 0 {
		return nil, 0, errors.New("none of the traces beside the image can be used")
	}
	// Missing rights are to be known before the work.
	if err := b.Repo.CheckPush(ctx); err != nil {
		return nil, 0, err
	}
	// A device of its own: that of the start may be closed meanwhile.
	image, err := blockmap.NewImage(b.Index, t.opener.cache, nil)
	if err != nil {
		return nil, 0, err
	}
	defer image.Close()
	var mu sync.Mutex
	p, err = b.Pack(ctx, traces, PackOptions{
		Least: tracefile.DefaultLeast,
		do:    t.opener.fetcher.Background,
		local: func(ctx context.Context, stream, chunk int, content []byte) bool {
			table := &b.Index.Streams[stream]
			s, err := image.Stream(table)
			if err == nil && ctx.Err() == nil && s.ReadChunk(chunk, content) {
				return true
			}
			mu.Lock()
			defer mu.Unlock()
			fetched += int64(table.Chunks[chunk].Stored)
			return false
		},
	})
	return p, fetched, err
}
