// Package fetcher brings chunks into the cache: each once however many wait
// for it, what is waited for before what is not, neighbours in one request,
// verified, and retried until there is no more hope.
//
// One [Fetcher] serves all devices of a process. From binds it to where an
// image's blobs come from, and makes what a [blockmap.Image] asks:
//
//	f := fetcher.New(fetcher.Options{})
//	defer f.Close()
//	image, err := blockmap.NewImage(index, cache, f.From(repository))
//
// A chunk on its way is a flight. Whoever asks for it while it is under way
// joins it. A flight belongs to the Fetcher, not to who asked first: a reader
// that gives up leaves the flight to the others.
package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
)

// Origin is where the blobs of an image are read from.
type Origin interface {
	// OpenRange reads n bytes at off of a blob. The body ends with io.EOF
	// after n bytes, or with another error before.
	OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error)
}

// distruster is a body that can be told that its bytes were wrong, so that its
// source is asked last from then on.
type distruster interface{ Distrust() }

// Options are the settings of a Fetcher. Zero values mean what is said here.
type Options struct {
	MaxRequests   int           // requests in flight at once; 64
	MaxBytes      int64         // bytes in flight, compressed and not; 128 MiB
	MaxRequest    int64         // compressed bytes of a request for several chunks; 4 MiB
	PrefetchShare float64       // of both bounds, at most this much for prefetches; 0.5
	RetryFor      time.Duration // how long a chunk is tried before its readers get the error; 30 s
	Backoff       time.Duration // before the second try, doubled each time up to 2 s; 50 ms
	Log           *slog.Logger  // silent if nil

	// Temporary says whether an origin's error may pass, RetryAfter how long
	// the origin asked to be left alone for. Nil: every error may, at once.
	Temporary  func(error) bool
	RetryAfter func(error) time.Duration
}

// Stats counts what a Fetcher has done so far.
type Stats struct {
	Requests  int64 `json:"requests"`       // ranges asked of origins
	Bytes     int64 `json:"fetched_bytes"`  // received from origins
	Chunks    int64 `json:"fetched_chunks"` // brought from origins
	Local     int64 `json:"local_chunks"`   // chunks that another stream held already
	Retries   int64 `json:"retries"`        // tries after a first one
	Wrong     int64 `json:"wrong_chunks"`   // chunks that came and did not match their digest
	Failed    int64 `json:"failed_chunks"`  // chunks given up
	InFlight  int64 `json:"in_flight"`      // requests now
	MostAlive int64 `json:"most_in_flight"` // the most requests that were in flight at once
}

// wrongTries bounds how often wrong bytes are asked for again: an origin that
// lies twice is not believed a fourth time.
const wrongTries = 4

// Fetcher is the scheduler.
type Fetcher struct {
	o       Options
	log     *slog.Logger
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	zstd    *zstd.Decoder
	buffers sync.Pool
	decode  chan struct{} // a token for each chunk that is decoded beside its request

	requests, bytes, chunks, local, retries, wrong, failed, mostAlive atomic.Int64

	mu struct {
		sync.Mutex
		closed   bool
		flights  map[key]*flight
		demand   []*flight // in order of arrival; those that have started are skipped
		prefetch []*flight
		active   load
		ahead    load // the part of active that nobody waits for
	}
}

// key names a chunk of the cache.
type key struct {
	stream *blockmap.Stream
	chunk  int
}

// load is what requests in flight take.
type load struct {
	requests int
	bytes    int64
}

func (l *load) add(n int, bytes int64) { l.requests += n; l.bytes += bytes }

// New makes a Fetcher, to be closed.
func New(o Options) *Fetcher {
	setDefault(&o.MaxRequests, 64)
	setDefault(&o.MaxBytes, 128<<20)
	setDefault(&o.MaxRequest, 4<<20)
	setDefault(&o.PrefetchShare, 0.5)
	setDefault(&o.RetryFor, 30*time.Second)
	setDefault(&o.Backoff, 50*time.Millisecond)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	// Only a nonsensical option makes this fail.
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecodeAllCapLimit(true),
		zstd.WithDecoderMaxMemory(blockmap.MaxChunkBlocks*blockmap.BlockSize))
	if err != nil {
		panic(err)
	}
	f := &Fetcher{o: o, log: o.Log, zstd: dec, decode: make(chan struct{}, runtime.GOMAXPROCS(0))}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.mu.flights = make(map[key]*flight)
	return f
}

func setDefault[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

// Close ends all fetches; who waits for one gets blockmap.ErrClosed.
func (f *Fetcher) Close() {
	f.cancel()
	f.mu.Lock()
	f.mu.closed = true
	for _, fl := range f.mu.flights {
		if fl.state != running {
			f.end(fl, blockmap.ErrClosed)
		}
	}
	f.mu.Unlock()
	f.wg.Wait()
	f.zstd.Close()
}

// Stats returns the counts so far.
func (f *Fetcher) Stats() Stats {
	f.mu.Lock()
	n := f.mu.active.requests
	f.mu.Unlock()
	return Stats{
		Requests: f.requests.Load(), Bytes: f.bytes.Load(), Chunks: f.chunks.Load(), Local: f.local.Load(),
		Retries: f.retries.Load(), Wrong: f.wrong.Load(), Failed: f.failed.Load(),
		InFlight: int64(n), MostAlive: f.mostAlive.Load(),
	}
}

// Bound is a Fetcher that knows where to fetch from.
type Bound struct {
	f      *Fetcher
	origin Origin
}

// From binds f to an origin.
func (f *Fetcher) From(o Origin) *Bound { return &Bound{f, o} }

// Fetch returns when all of wants are resident, or with the first error: that
// of a chunk given up, or that of ctx.
func (b *Bound) Fetch(ctx context.Context, wants []blockmap.Want) error {
	for _, fl := range b.f.join(wants, b.origin, true) {
		select {
		case <-fl.done:
			if fl.err != nil {
				return fl.err
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// Prefetch has wants fetched when nobody waits for anything else.
func (b *Bound) Prefetch(wants []blockmap.Want) { b.f.join(wants, b.origin, false) }

// flight is one chunk on its way.
type flight struct {
	key
	source source
	others []source // further places that readers who joined know of
	demand bool     // somebody waits
	state  state
	began  time.Time
	tries  int
	wrong  int

	done chan struct{} // closed when err is final
	err  error
}

type state uint8

const (
	queued  state = iota
	running       // within a request
	waiting       // for its next try
	forgotten
)

// source says where the compressed bytes of a chunk are.
type source struct {
	origin Origin
	table  *blockmap.Table
}

func (fl *flight) chunk() *blockmap.Chunk { return &fl.source.table.Chunks[fl.key.chunk] }

// cost is what the flight takes of MaxBytes.
func (fl *flight) cost() int64 { return int64(fl.chunk().Stored) + int64(fl.chunk().Size()) }

// join finds or makes the flights of wants. Those that are resident by now have
// none.
func (f *Fetcher) join(wants []blockmap.Want, o Origin, demand bool) []*flight {
	flights := make([]*flight, 0, len(wants))
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range wants {
		k := key{w.Stream, w.Chunk}
		src := source{o, w.Table}
		fl := f.mu.flights[k]
		switch {
		case fl != nil:
			if fl.source != src && len(fl.others) < 4 {
				fl.others = append(fl.others, src)
			}
			if demand && !fl.demand {
				fl.demand = true
				if fl.state == queued {
					f.mu.demand = append(f.mu.demand, fl)
				}
			}
		case w.Stream.Has(w.Chunk):
			continue
		default:
			fl = &flight{key: k, source: src, demand: demand, began: time.Now(), done: make(chan struct{})}
			if f.mu.closed {
				fl.err = blockmap.ErrClosed
				close(fl.done)
				break
			}
			f.mu.flights[k] = fl
			f.enqueue(fl)
		}
		flights = append(flights, fl)
	}
	f.dispatch()
	return flights
}

func (f *Fetcher) enqueue(fl *flight) {
	fl.state = queued
	if fl.demand {
		f.mu.demand = append(f.mu.demand, fl)
	} else {
		f.mu.prefetch = append(f.mu.prefetch, fl)
	}
}

// dispatch starts requests while the bounds allow. f.mu is held.
func (f *Fetcher) dispatch() {
	for !f.mu.closed {
		demand := true
		q := &f.mu.demand
		skipStarted(q)
		if len(*q) == 0 {
			demand, q = false, &f.mu.prefetch
			skipStarted(q)
			if len(*q) == 0 {
				return
			}
		}
		batch := f.gather((*q)[0])
		var bytes int64
		for _, fl := range batch {
			bytes += fl.cost()
		}
		// One request is always let through, however large its chunk is.
		if a := &f.mu.active; a.requests > 0 && (a.requests >= f.o.MaxRequests || a.bytes+bytes > f.o.MaxBytes) {
			return
		}
		if a := &f.mu.ahead; !demand && a.requests > 0 &&
			(float64(a.requests) >= float64(f.o.MaxRequests)*f.o.PrefetchShare ||
				float64(a.bytes+bytes) > float64(f.o.MaxBytes)*f.o.PrefetchShare) {
			return
		}
		f.mu.active.add(1, bytes)
		if !demand {
			f.mu.ahead.add(1, bytes)
		}
		f.mostAlive.Store(max(f.mostAlive.Load(), int64(f.mu.active.requests)))
		for _, fl := range batch {
			fl.state = running
		}
		f.wg.Go(func() {
			f.request(batch)
			f.mu.Lock()
			defer f.mu.Unlock()
			f.mu.active.add(-1, -bytes)
			if !demand {
				f.mu.ahead.add(-1, -bytes)
			}
			f.dispatch()
		})
	}
}

// skipStarted drops the flights at the head of q that need not start from
// there: they went along with a neighbour, or were promoted and have ended.
func skipStarted(q *[]*flight) {
	for len(*q) > 0 && (*q)[0].state != queued {
		(*q)[0] = nil
		*q = (*q)[1:]
	}
}

// gather collects the flights that can share a request with first: its queued
// neighbours in the blob. Those that nobody waits for only come behind it, so
// that they hold up nothing.
func (f *Fetcher) gather(first *flight) []*flight {
	batch := []*flight{first}
	bytes := int64(first.chunk().Stored)
	neighbour := func(of *flight, step int) *flight {
		fl := f.mu.flights[key{of.stream, of.key.chunk + step}]
		if fl == nil || fl.state != queued || fl.source != first.source || bytes+int64(fl.chunk().Stored) > f.o.MaxRequest {
			return nil
		}
		a, b := of.chunk(), fl.chunk()
		if step < 0 {
			a, b = b, a
		}
		if a.Offset+int64(a.Stored) != b.Offset {
			return nil
		}
		return fl
	}
	for fl := neighbour(first, 1); fl != nil; fl = neighbour(batch[len(batch)-1], 1) {
		batch = append(batch, fl)
		bytes += int64(fl.chunk().Stored)
	}
	before := 0
	for fl := neighbour(first, -1); fl != nil && fl.demand == first.demand; fl = neighbour(fl, -1) {
		batch = append(batch, fl)
		bytes += int64(fl.chunk().Stored)
		before++
	}
	if before > 0 {
		ordered := make([]*flight, 0, len(batch))
		for i := len(batch) - 1; i >= len(batch)-before; i-- {
			ordered = append(ordered, batch[i])
		}
		batch = append(ordered, batch[:len(batch)-before]...)
	}
	return batch
}

// request brings a batch of neighbouring chunks.
func (f *Fetcher) request(batch []*flight) {
	var group []*flight
	flush := func() {
		if len(group) > 0 {
			f.fetch(group)
		}
		group = nil
	}
	for _, fl := range batch {
		if fl.stream.Has(fl.key.chunk) {
			flush()
			f.finish(fl, nil)
		} else if fl.stream.FillLocal(fl.key.chunk) {
			flush()
			f.local.Add(1)
			f.finish(fl, nil)
		} else {
			group = append(group, fl)
		}
	}
	flush()
}

// fetch asks the origin for chunks that lie side by side. Each is finished as
// soon as its bytes are there.
func (f *Fetcher) fetch(group []*flight) {
	src := group[0].source
	first, last := group[0].chunk(), group[len(group)-1].chunk()
	end := last.Offset + int64(last.Stored)
	f.requests.Add(1)
	body, err := src.origin.OpenRange(f.ctx, src.table.Blob, first.Offset, end-first.Offset)
	if err != nil {
		for _, fl := range group {
			f.finish(fl, err)
		}
		return
	}
	defer body.Close()
	var decoding sync.WaitGroup
	defer decoding.Wait()
	for i, fl := range group {
		stored := f.buffer(int(fl.chunk().Stored))
		n, err := io.ReadFull(body, *stored)
		f.bytes.Add(int64(n))
		if err != nil {
			f.buffers.Put(stored)
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			for _, fl := range group[i:] {
				f.finish(fl, fmt.Errorf("%w in the body of a range request", err))
			}
			return
		}
		keep := func() {
			err := f.keep(fl, *stored)
			f.buffers.Put(stored)
			if b, ok := body.(distruster); ok && errors.Is(err, blockmap.ErrDigest) {
				b.Distrust()
			}
			f.finish(fl, err)
		}
		if i == len(group)-1 {
			keep() // nothing left to read meanwhile
			return
		}
		f.decode <- struct{}{}
		decoding.Go(func() {
			keep()
			<-f.decode
		})
	}
}

// keep decompresses a chunk, and stores it if it is what it should be.
func (f *Fetcher) keep(fl *flight, stored []byte) error {
	size := fl.chunk().Size()
	buf := f.buffer(size)
	defer f.buffers.Put(buf)
	content, err := f.zstd.DecodeAll(stored, (*buf)[:0:size])
	if err != nil {
		return fmt.Errorf("%w: %w", blockmap.ErrDigest, err)
	}
	if err := fl.stream.Fill(fl.key.chunk, content); err != nil {
		return err
	}
	f.chunks.Add(1)
	return nil
}

// buffer returns n bytes, to be put back into f.buffers.
func (f *Fetcher) buffer(n int) *[]byte {
	p, _ := f.buffers.Get().(*[]byte)
	if p == nil || cap(*p) < n {
		b := make([]byte, n)
		p = &b
	}
	*p = (*p)[:n]
	return p
}

// finish ends a flight, or has it tried again.
func (f *Fetcher) finish(fl *flight, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		f.end(fl, nil)
		return
	}
	c := fl.chunk()
	err = fmt.Errorf("fetch %s chunk %d (%d bytes at %d of blob sha256:%.12s…): %w",
		map[bool]string{true: "demanded", false: "prefetched"}[fl.demand],
		fl.key.chunk, c.Stored, c.Offset, fl.source.table.Blob, err)
	fl.tries++
	if errors.Is(err, blockmap.ErrDigest) {
		f.wrong.Add(1)
		fl.wrong++
	}
	pause := f.pause(fl, err)
	switch {
	case f.mu.closed:
		f.end(fl, fmt.Errorf("%w: %w", blockmap.ErrClosed, err))
	case pause < 0:
		f.failed.Add(1)
		f.log.Error("gave up", "cause", err, "tries", fl.tries)
		f.end(fl, err)
	default:
		f.retries.Add(1)
		f.log.Debug("will try again", "cause", err, "in", pause)
		if len(fl.others) > 0 {
			fl.source, fl.others = fl.others[0], append(fl.others[1:], fl.source)
		}
		fl.state = waiting
		f.wg.Go(func() { f.retryAfter(fl, pause) })
	}
}

// pause is how long to wait before the next try, negative where there is to be
// none.
func (f *Fetcher) pause(fl *flight, err error) time.Duration {
	permanent := fl.wrong >= wrongTries
	switch {
	case errors.Is(err, blockmap.ErrDigest), errors.Is(err, io.ErrUnexpectedEOF):
	case errors.Is(err, blockmap.ErrNoSpace):
		permanent = true
	default:
		permanent = permanent || f.o.Temporary != nil && !f.o.Temporary(err)
	}
	if permanent && fl.tries > len(fl.others) {
		return -1
	}
	limit := min(f.o.Backoff<<min(fl.tries-1, 10), 2*time.Second)
	pause := limit/2 + rand.N(limit/2+1)
	if f.o.RetryAfter != nil {
		pause = max(pause, f.o.RetryAfter(err))
	}
	if time.Since(fl.began)+pause > f.o.RetryFor {
		return -1
	}
	return pause
}

func (f *Fetcher) retryAfter(fl *flight, pause time.Duration) {
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-f.ctx.Done():
		return // Close has ended the flight
	case <-t.C:
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl.state == waiting && !f.mu.closed {
		f.enqueue(fl)
		f.dispatch()
	}
}

// forget ends the flights that nobody waits for and that have not started.
func (f *Fetcher) forget(flights []*flight, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, fl := range flights {
		if !fl.demand && fl.state != running {
			fl.state = forgotten
			f.end(fl, err)
		}
	}
}

// end makes err final and wakes who waits. f.mu is held.
func (f *Fetcher) end(fl *flight, err error) {
	if f.mu.flights[fl.key] != fl {
		return
	}
	delete(f.mu.flights, fl.key)
	fl.err = err
	close(fl.done)
}
