package fetcher

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"thaw/blockmap"
)

// request brings a batch of chunks of one blob, in its order.
func (f *Fetcher) request(batch []*flight) {
	missing := make([]*flight, 0, len(batch))
	for _, fl := range batch {
		switch {
		case fl.stream.Has(fl.key.chunk):
			f.finish(fl, nil)
		case fl.stream.FillLocal(fl.key.chunk):
			f.local.Add(1)
			f.finish(fl, nil)
		default:
			missing = append(missing, fl)
		}
	}
	if len(missing) > 0 {
		f.fetch(missing)
	}
}

// runs are the ranges of the blob that flights are in, and how many flights each
// has.
func runs(flights []*flight) (ranges []blockmap.Extent, counts []int) {
	for _, fl := range flights {
		c := fl.chunk()
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
func (f *Fetcher) open(src source, ranges []blockmap.Extent) (io.ReadCloser, error) {
	if len(ranges) == 1 {
		return src.origin.OpenRange(f.ctx, src.table.Blob, ranges[0].Start, ranges[0].Len())
	}
	if r, ok := src.origin.(Ranger); ok {
		return r.OpenRanges(f.ctx, src.table.Blob, ranges)
	}
	return nil, nil
}

// fetch asks the origin for chunks. Each is finished as soon as its bytes are
// there.
func (f *Fetcher) fetch(group []*flight) {
	ranges, counts := runs(group)
	asked := time.Now()
	body, err := f.open(group[0].source, ranges)
	if body == nil && err == nil {
		for _, n := range counts {
			f.fetch(group[:n])
			group = group[n:]
		}
		return
	}
	f.requests.Add(1)
	if err != nil {
		for _, fl := range group {
			f.finish(fl, err)
		}
		return
	}
	defer body.Close()
	f.mu.Lock()
	f.mu.pace.answered(time.Since(asked))
	f.mu.Unlock()
	var decoding sync.WaitGroup
	defer decoding.Wait()
	for i, fl := range group {
		stored := f.buffer(int(fl.chunk().Stored))
		n, err := io.ReadFull(body, *stored)
		f.bytes.Add(int64(n))
		demanded := f.landed(group[i:], int64(n))
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
		switch {
		case !demanded:
			decoding.Add(1)
			f.decoders.do(func() {
				defer decoding.Done()
				keep()
			})
		case i == len(group)-1:
			keep() // nothing left to read meanwhile
		default:
			f.decode <- struct{}{}
			decoding.Go(func() {
				keep()
				<-f.decode
			})
		}
	}
}

// landed takes account of bytes that have come of a request, and says whether
// somebody waits by now for one of what is left of it: for that the decoders are
// not waited for.
func (f *Fetcher) landed(left []*flight, bytes int64) (demanded bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.pace.landed(bytes, time.Now())
	return slices.ContainsFunc(left, func(fl *flight) bool { return fl.demand })
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
	defer f.dispatch()                   // of what was waiting for it
	if err == nil || fl.state == ended { // a bundle may have been faster
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
		// What was fetched ahead may have taken the room, and can go for what
		// somebody waits for.
		permanent = !fl.demand || fl.tries >= spaceTries
	default:
		permanent = permanent || f.o.Temporary != nil && !f.o.Temporary(err)
	}
	if permanent && fl.tries > len(fl.others) {
		return -1
	}
	limit := min(f.o.Backoff<<min(fl.tries-1, 10), 2*time.Second)
	pause := f.heed(err, limit/2+rand.N(limit/2+1))
	if time.Since(fl.began)+pause > f.o.RetryFor {
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
