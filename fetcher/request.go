package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"thaw/blockmap"
)

// request brings chunks of one blob, in its order.
type request struct {
	place  place
	ctx    context.Context
	cancel context.CancelFunc
	asked  time.Time
	demand bool  // somebody waited when it was made
	bytes  int64 // what it takes of MaxBytes
	extra  bool  // it was made since another brings its chunk too late

	elsewhere bool      // of an extra one: another server of the same origin was asked
	download  *download // of a bundle's download, which is no request for chunks

	demanded chan struct{} // closed when somebody waits for one of its fetches
	once     sync.Once     // closes demanded

	// What follows is guarded by Fetcher.mu.
	fetches    []*fetch  // what is to come, in its order
	ends       []int64   // where each ends in what comes
	total, got int64     // bytes that are to come, and that have
	moved      time.Time // when bytes came last, or when they were asked for
	samples    samples   // of got
	made       bool      // and not only looked for in the cache
	server     string    // that the bytes come from, where that is known
	cancelled  bool
	won        bool // it was an extra one, and the quickest

	claimed      time.Time // when it began to have the line for itself, see claimLink
	before       int64     // what had come by then
	paused, free time.Time // since and until when it gives way, and does not, see awaitLink
}

func newRequest(ctx context.Context, p place) *request {
	now := time.Now()
	r := &request{place: p, asked: now, moved: now, demanded: make(chan struct{})}
	r.ctx, r.cancel = context.WithCancel(ctx)
	return r
}

// hurry says that somebody waits for one of its fetches.
func (r *request) markDemand() { r.once.Do(func() { close(r.demanded) }) }

// brings says whether a fetch is still to come by this request.
func (r *request) brings(ft *fetch) bool {
	return ft.state == running && slices.Contains(ft.requests, r)
}

// read says whether somebody waits for something that is to come. f.mu is held.
func (r *request) awaited() bool {
	if r.download != nil {
		return len(r.download.awaited) > 0
	}
	return slices.ContainsFunc(r.fetches, func(ft *fetch) bool { return ft.demand && r.brings(ft) })
}

// expect says what is to come.
func (r *request) expect(fetches []*fetch) {
	r.fetches, r.ends, r.total = fetches, make([]int64, len(fetches)), 0
	for i, ft := range fetches {
		r.total += int64(r.stored(ft))
		r.ends[i] = r.total
	}
}

// stored is the length of a chunk's frame where the request is made.
func (r *request) stored(ft *fetch) int { return int(r.place.table.Chunks[ft.key.chunk].Stored) }

// ended takes a request out of the books. f.mu is held.
func (f *Fetcher) ended(r *request) {
	r.cancel()
	delete(r.place.src.running, r)
	delete(f.mu.running, r)
	f.unclaim(r)
}

// check cancels a request if nobody wants any more of what it is to bring. f.mu
// is held, and dispatch is called behind it.
func (f *Fetcher) cancelUnwanted(r *request) {
	if r.cancelled {
		return
	}
	for _, ft := range r.fetches {
		if r.brings(ft) && ft.isWanted() {
			return
		}
	}
	r.cancelled = true
	if r.got < r.total {
		f.cancelled.Add(1)
	}
	r.cancel()
	for _, ft := range r.fetches {
		if !r.brings(ft) {
			continue
		}
		if ft.leave(r); len(ft.requests) == 0 {
			f.end(ft, context.Canceled)
		}
	}
}

// leave notes that a request does not bring the fetch any more.
func (ft *fetch) leave(r *request) {
	ft.requests = slices.DeleteFunc(slices.Clone(ft.requests), func(x *request) bool { return x == r })
}

// run does what a request is for.
func (f *Fetcher) run(r *request) {
	var missing []*fetch
	for _, ft := range r.fetches {
		switch {
		case ft.stream.Has(ft.key.chunk):
			f.finish(r, ft, nil)
		case ft.stream.FillLocal(ft.key.chunk):
			f.local.Add(1)
			f.finish(r, ft, nil)
		default:
			missing = append(missing, ft)
		}
	}
	if len(missing) == 0 {
		return
	}
	f.mu.Lock()
	r.expect(missing)
	r.made = true
	if r.awaited() {
		r.markDemand()
	}
	f.mu.Unlock()
	f.fetch(r, missing)
}

// runs are the ranges of the blob that chunks are in, and how many chunks each has.
func runs(p place, fetches []*fetch) (ranges []blockmap.Extent, counts []int) {
	for _, ft := range fetches {
		c := &p.table.Chunks[ft.key.chunk]
		if last := len(ranges) - 1; last >= 0 && ranges[last].End == c.Offset {
			ranges[last].End += int64(c.Stored)
			counts[last]++
			continue
		}
		ranges, counts = append(ranges, blockmap.Range(c.Offset, int64(c.Stored))), append(counts, 1)
	}
	return ranges, counts
}

// open asks the origin for ranges. A nil body without an error says that they can
// only be had one by one.
func (f *Fetcher) open(r *request, ranges []blockmap.Extent) (io.ReadCloser, error) {
	src := r.place.src
	if len(ranges) == 1 {
		e := ranges[0]
		if body, err := f.openElsewhere(r, e); body != nil && err == nil {
			return body, nil
		}
		return src.origin.OpenRange(r.ctx, r.place.table.Blob, e.Start, e.Len())
	}
	if o, ok := src.origin.(Ranger); ok {
		return o.OpenRanges(r.ctx, r.place.table.Blob, ranges)
	}
	return nil, nil
}

// fetch asks the origin for chunks. Each is finished as soon as its bytes are
// there.
func (f *Fetcher) fetch(r *request, group []*fetch) {
	ranges, counts := runs(r.place, group)
	asked := time.Now()
	body, err := f.open(r, ranges)
	if body == nil && err == nil {
		for _, n := range counts {
			f.fetch(r, group[:n])
			group = group[n:]
		}
		return
	}
	f.requests.Add(1)
	if err != nil {
		f.fail(r, group, err)
		return
	}
	defer body.Close()
	f.answered(r, body, time.Since(asked))
	f.receive(r, body, group)
}

// answered takes account of the answer to a request.
func (f *Fetcher) answered(r *request, body io.ReadCloser, after time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r.moved = time.Now()
	r.place.src.pace.answered(after)
	if b, ok := body.(sourced); ok {
		r.server = b.Source()
	}
}

// fail finishes chunks that do not come.
func (f *Fetcher) fail(r *request, group []*fetch, err error) {
	for _, ft := range group {
		f.finish(r, ft, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	// What comes next is the answer to another question.
	if i := slices.Index(r.fetches, group[len(group)-1]); i >= 0 {
		r.got = r.ends[i]
	}
}

// receive reads chunks from the body of an answer.
func (f *Fetcher) receive(r *request, body io.ReadCloser, group []*fetch) {
	var decoding sync.WaitGroup
	defer decoding.Wait()
	beside := make(chan struct{}, cap(f.decode)) // a token for each chunk that is kept meanwhile
	for i, ft := range group {
		stored := f.buffer(r.stored(ft))
		n, err := io.ReadFull(&incoming{f, r, body}, *stored)
		f.bytes.Add(int64(n))
		if err != nil {
			f.buffers.Put(stored)
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			f.fail(r, group[i:], fmt.Errorf("%w in the body of a range request", err))
			return
		}
		demanded, over := f.left(r, ft)
		if over {
			f.buffers.Put(stored) // an extra request was quicker, or a copy
			continue
		}
		keep := func(decoded func()) {
			err := f.keep(r, ft, *stored, decoded)
			f.buffers.Put(stored)
			if b, ok := body.(distruster); ok && errors.Is(err, blockmap.ErrDigest) {
				b.Distrust()
			}
			f.finish(r, ft, err)
		}
		switch {
		case !demanded:
			f.decodeLater(r.place.src, &decoding, r.demanded, func() { keep(func() {}) })
		case i == len(group)-1:
			keep(func() {}) // nothing left to read meanwhile
		default:
			// Tokens of all are for the processor alone. Who waits for the disk,
			// which may hang, holds up its own request.
			beside <- struct{}{}
			f.decode <- struct{}{}
			decoding.Go(func() {
				keep(func() { <-f.decode })
				<-beside
			})
		}
	}
}

// left says whether somebody waits for ft, whose bytes have come, or for what is
// left of a request behind it: for that the decoders are not waited for. And it
// says whether ft is over already.
func (f *Fetcher) left(r *request, ft *fetch) (demanded, over bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return r.awaited(), ft.state == ended
}

// decodeLater has a job done by the decoders, or at once where hurry is closed
// before they are free. A source whose jobs hang occupies no more of them than
// there are: see decoders.
func (f *Fetcher) decodeLater(s *source, decoding *sync.WaitGroup, hurry <-chan struct{}, job func()) {
	select {
	case s.decoding <- struct{}{}:
	case <-hurry:
		decoding.Go(job)
		return
	}
	decoding.Add(1)
	if !f.decoders.do(hurry, func() {
		defer decoding.Done()
		job()
		<-s.decoding
	}) {
		<-s.decoding
		decoding.Done()
		decoding.Go(job)
	}
}

// keep decompresses a chunk, and stores it if it is what it should be.
func (f *Fetcher) keep(r *request, ft *fetch, stored []byte, decoded func()) error {
	size := r.place.table.Chunks[ft.key.chunk].Size()
	buf := f.buffer(size)
	defer f.buffers.Put(buf)
	content, err := f.zstd.DecodeAll(stored, (*buf)[:0:size])
	decoded()
	if err != nil {
		return fmt.Errorf("%w: %w", blockmap.ErrDigest, err)
	}
	return f.store(ft.stream, ft.key.chunk, content, func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return ft.demand && ft.state != ended
	})
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

// finish ends a fetch, or has it tried again. A try that fails is none that
// matters while others are on their way.
func (f *Fetcher) finish(r *request, ft *fetch, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.dispatch() // of what was waiting for it
	if ft.state == ended || err != nil && !r.brings(ft) {
		return // something else was faster, or this was not to bring it any more
	}
	others := len(ft.requests) > 1
	if err == nil {
		f.chunkCame(r, ft, others)
		f.end(ft, nil)
		f.cancelUnwanted(r) // what is left of it may be wanted no more
		return
	}
	ft.leave(r)
	ft.tries++
	if errors.Is(err, blockmap.ErrDigest) {
		f.wrong.Add(1)
		ft.wrong++
	}
	if len(ft.requests) > 0 {
		f.log.Debug("one of several requests for a chunk failed", "err", err)
		return
	}
	c := ft.chunk()
	err = fmt.Errorf("fetch %s chunk %d (%d bytes at %d of blob sha256:%.12s…): %w",
		map[bool]string{true: "demanded", false: "prefetched"}[ft.demand],
		ft.key.chunk, c.Stored, c.Offset, ft.place.table.Blob, err)
	pause := f.pause(ft, err)
	var noRoom *storeError
	switch {
	case f.mu.closed:
		f.end(ft, fmt.Errorf("%w: %w", blockmap.ErrClosed, err))
	case pause < 0 && !ft.demand && errors.As(err, &noRoom):
		f.log.Debug("no room for a prefetched chunk", "err", err)
		f.end(ft, err)
	case pause < 0:
		f.giveUp(ft, err)
	default:
		f.retries.Add(1)
		f.log.Debug("will try again", "err", err, "in", pause)
		if len(ft.others) > 0 {
			ft.place, ft.others = ft.others[0], append(ft.others[1:], ft.place)
		}
		ft.state = waiting
		f.wg.Go(func() { f.retryAfter(ft, pause) })
	}
}

// chunkCame takes account of a chunk that a request has brought.
func (f *Fetcher) chunkCame(r *request, ft *fetch, others bool) {
	if !r.made {
		return // it was here
	}
	src := r.place.src
	if now := time.Now(); now.Sub(r.asked) < tooLong || r.stored(ft) >= goodBytes {
		src.good = now // and not one that brings a byte now and then
	}
	f.chunks.Add(1)
	if r.extra && others {
		r.won = true
		f.overtaken.Add(1)
		f.avoidSlower(ft, r)
	}
}

// giveUp ends a fetch that cannot be had.
func (f *Fetcher) giveUp(ft *fetch, err error) {
	f.failed.Add(1)
	level := slog.LevelError
	if !ft.demand {
		level = slog.LevelWarn
	}
	f.log.Log(f.ctx, level, "gave up a chunk", "err", err, "tries", ft.tries)
	f.end(ft, err)
}

// late is the error of a chunk that did not come in time.
func (f *Fetcher) late(ft *fetch) error {
	c := ft.chunk()
	return fmt.Errorf("fetch chunk %d (%d bytes at %d of blob sha256:%.12s…): %w within %v",
		ft.key.chunk, c.Stored, c.Offset, ft.place.table.Blob, errLate, f.o.RetryFor)
}

// pause is how long to wait before the next try, negative where there is to be
// none.
func (f *Fetcher) pause(ft *fetch, err error) time.Duration {
	permanent := ft.wrong >= wrongTries
	var noRoom *storeError
	switch {
	case errors.Is(err, blockmap.ErrDigest), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, errNowhereElse):
	case errors.As(err, &noRoom):
		// What was fetched ahead may have taken the room, and can go for what
		// somebody waits for.
		if !ft.demand || ft.tries >= spaceTries {
			return -1
		}
	default:
		permanent = permanent || f.o.Temporary != nil && !f.o.Temporary(err)
	}
	if permanent && ft.tries > len(ft.others) {
		return -1
	}
	limit := min(f.o.Backoff<<min(ft.tries-1, 10), 2*time.Second)
	pause := f.heed(err, limit/2+rand.N(limit/2+1))
	if time.Since(ft.began)+pause > f.o.RetryFor || ft.demand && time.Since(ft.lastGood())+pause > f.o.RetryFor {
		return -1
	}
	return pause
}

// heed makes a pause as long as the origin asks for, if it does.
func (f *Fetcher) heed(err error, pause time.Duration) time.Duration {
	if f.o.RetryAfter != nil {
		pause = max(pause, f.o.RetryAfter(err))
	}
	return pause
}

func (f *Fetcher) retryAfter(ft *fetch, pause time.Duration) {
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-f.ctx.Done():
		return // Close has ended the fetch
	case <-ft.done:
		return
	case <-t.C:
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if ft.state == waiting && !f.mu.closed {
		f.push(ft)
		f.dispatch()
	}
}
