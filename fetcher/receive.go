package fetcher

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"thaw/blockmap"
)

// run brings the fetches of a request: from the cache if it has them by now, and
// otherwise from the origin.
func (f *Fetcher) run(r *request) {
	var missing []*fetch
	for _, ft := range r.fetches {
		switch {
		case f.finishHere(r, ft):
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

// runs returns the ranges of the blob that hold fetches, and how many fetches each
// holds.
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

// open asks the origin for ranges. A nil body without an error means that the caller
// must ask for each range separately.
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

// fetch asks the origin for fetches and finishes each as soon as its bytes have
// arrived.
func (f *Fetcher) fetch(r *request, group []*fetch) {
	if r.place.src.isPeer() {
		f.fetchNear(r, group)
		return
	}
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
	f.origins.requests.Add(1)
	if err != nil {
		f.fail(r, group, err)
		return
	}
	defer body.Close()
	f.answered(r, body, time.Since(asked))
	f.receive(r, body, group)
}

// answered records the answer to a request, and how long it took.
func (f *Fetcher) answered(r *request, body io.ReadCloser, after time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r.moved = time.Now()
	r.began = r.moved
	r.place.src.pace.answered(after)
	if b, ok := body.(sourced); ok {
		r.server = b.Source()
	}
	r.form = form{}
	if b, ok := body.(formed); ok && r.place.src.isPeer() && len(r.fetches) == 1 {
		r.form.stored, r.form.first = b.Form()
		r.expect(r.fetches)
	}
}

// fail finishes fetches whose bytes do not arrive.
func (f *Fetcher) fail(r *request, group []*fetch, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.dispatch() // when all are queued again, so that they share a request
	for _, ft := range group {
		f.finishOne(r, ft, err)
	}
	// The next body begins behind them.
	if i := slices.Index(r.fetches, group[len(group)-1]); i >= 0 {
		r.got = r.ends[i]
	}
}

// receive reads fetches from the body of an answer, and stores them meanwhile.
func (f *Fetcher) receive(r *request, body io.ReadCloser, group []*fetch) {
	var decoding sync.WaitGroup
	defer decoding.Wait()
	beside := make(chan struct{}, cap(f.decode)) // a token for each chunk of this request that is being kept
	for i, ft := range group {
		// Nothing is left to read while the last one is decompressed, unless that is done
		// while it arrives.
		awaited := i == len(group)-1 && f.awaits(r)
		stored, fr, n, err := f.readChunk(r, &incoming{f, r, body}, ft, awaited)
		f.counts(r.place.src).bytes.Add(n)
		if r.form.stored {
			f.nearStored.Add(n)
		}
		if err != nil {
			distrust(body, err)
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			f.fail(r, group[i:], fmt.Errorf("%w in the body of a range request", err))
			return
		}
		demanded, over := f.left(r, ft)
		if over {
			fr.release()
			f.buffers.Put(stored) // an extra request or a copy was quicker
			continue
		}
		keep := func(decompressed func()) {
			err := f.keep(blockmap.Want{Stream: ft.stream, Table: r.place.table, Chunk: ft.key.chunk}, &fr, decompressed)
			fr.release()
			if kept := r.kept(ft); err == nil && kept != nil {
				kept(ft.stream.ID(), ft.key.chunk, *stored)
			} else {
				f.buffers.Put(stored)
			}
			distrust(body, err)
			f.finish(r, ft, err)
		}
		switch {
		case !demanded:
			f.decodeLater(r.place.src, &decoding, r.demanded, func() { keep(func() {}) })
		case i == len(group)-1:
			keep(func() {}) // nothing is left to read meanwhile
		default:
			// f.decode limits only work of the processor, for all requests. A chunk
			// that waits for the disk, which may hang, delays only its own request.
			beside <- struct{}{}
			f.decode <- struct{}{}
			decoding.Go(func() {
				keep(func() { <-f.decode })
				<-beside
			})
		}
	}
}

// distrust tells a body that its bytes are wrong, if that is the error.
func distrust(body io.ReadCloser, err error) {
	if b, ok := body.(distruster); ok && errors.Is(err, blockmap.ErrDigest) {
		b.Distrust()
	}
}

// awaits reports whether a reader waits for any fetch of a request.
func (f *Fetcher) awaits(r *request) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return r.awaited()
}

// left reports whether a reader waits for ft, whose bytes have arrived, or for a later
// fetch of the request. If so, the request does not wait for a decoder. over reports
// that ft has ended already.
func (f *Fetcher) left(r *request, ft *fetch) (demanded, over bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return r.awaited(), ft.state == ended
}

// decodeLater has a decoder do a job, or a goroutine if urgent is closed before a
// decoder is free. A source has at most as many jobs with the decoders as there are
// decoders, so that a source whose jobs hang does not block the others.
func (f *Fetcher) decodeLater(s *source, decoding *sync.WaitGroup, urgent <-chan struct{}, job func()) {
	select {
	case s.decoding <- struct{}{}:
	case <-urgent:
		decoding.Go(job)
		return
	}
	decoding.Add(1)
	if !f.decoders.do(urgent, func() {
		defer decoding.Done()
		job()
		<-s.decoding
	}) {
		<-s.decoding
		decoding.Done()
		decoding.Go(job)
	}
}
