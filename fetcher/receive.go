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
		keep := func(decompressed func()) {
			fr := frame{f: f, stored: *stored}
			err := f.keep(blockmap.Want{Stream: ft.stream, Table: r.place.table, Chunk: ft.key.chunk}, &fr, decompressed)
			fr.release()
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
