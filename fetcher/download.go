package fetcher

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"thaw/blockmap"
)

// A bundle that breaks is taken up again where it broke, this often.
const downloadTries = 3

// While a bundle is on its way it takes this much of MaxBytes, for the parts
// that are being read and decompressed.
const downloadBytes = 8 << 20

// The most that a reader waits for a bundle before its chunk is fetched alone.
const maxPatience = 2 * time.Second

// download is a bundle on its way. A chunk in it is a fetch like any other, but
// for its state: whoever asks for it waits for the download if that will have
// it soon, and else has it fetched on its own.
type download struct {
	asked time.Time // for the download
	first time.Time // when its first part had come; zero until then
	base  int64     // bytes that had come by then
	got   int64     // bytes that have come by now
	hangs bool      // somebody has lost patience, and nothing has come since

	awaited map[*fetch]struct{} // that readers wait for here
}

// soon says whether the frame that ends at byte at, of so many bytes, comes about
// as soon as it would alone, and how long is too long to wait for it then.
func (c *download) soon(now time.Time, at, stored int64) (patience time.Duration, ok bool) {
	if c.hangs {
		return 0, false
	}
	if c.first.IsZero() {
		// What a start reads first is what a bundle begins with.
		return 250 * time.Millisecond, at <= 2<<20
	}
	latency := c.first.Sub(c.asked)
	perByte := float64(max(now.Sub(c.first), time.Millisecond)) / float64(max(c.got-c.base, 64<<10))
	eta := time.Duration(float64(at-c.got) * perByte)
	// The download would give way to it.
	alone := latency + time.Duration(float64(stored)*perByte)
	return min(2*eta+latency+20*time.Millisecond, maxPatience), eta <= alone+alone/4+maxLater
}

// maxLater is how much later than alone a chunk may come by a bundle: it spares a
// request, and bytes that come twice.
const maxLater = 50 * time.Millisecond

// leave notes that nobody waits any more for what the bundle is to bring.
func (c *download) leave(ft *fetch) {
	if ft.late != nil {
		ft.late.Stop()
		ft.late = nil
	}
	delete(c.awaited, ft)
}

// awaitDownload decides what a reader of a downloading chunk waits for. f.mu is held,
// and dispatch is called behind it.
func (f *Fetcher) awaitDownload(ft *fetch) {
	c := ft.download
	patience, ok := c.soon(time.Now(), ft.until, int64(ft.chunk().Stored))
	if !ok {
		f.enqueue(ft)
		return
	}
	got := c.got
	c.awaited[ft] = struct{}{}
	f.wakePaused()
	ft.late = time.AfterFunc(patience, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if _, ok := c.awaited[ft]; ok && !f.mu.closed {
			c.hangs = c.got == got
			f.enqueue(ft)
			f.dispatch()
		}
	})
}

// downloadBundle downloads a bundle and fills its chunks. It calls done for each part that
// is here, from several goroutines. When it returns, nothing is downloading any
// more: what the bundle did not bring is queued. A bundle of which most is here
// already, or on its way, is left alone.
func (b *Bound) downloadBundle(ctx context.Context, bundle *Bundle, limit *rate.Limiter, done func(Part)) error {
	f := b.f
	if bundle.Close != nil {
		defer bundle.Close()
	}
	f.mu.Lock()
	if f.mu.closed {
		f.mu.Unlock()
		return blockmap.ErrClosed
	}
	f.wg.Add(1) // Close waits for what is being decompressed
	f.mu.Unlock()
	defer f.wg.Done()
	for _, p := range bundle.Parts {
		here := true
		for _, w := range p.Wants {
			switch {
			case w.Stream.Has(w.Chunk):
			case w.Stream.FillLocal(w.Chunk):
				f.local.Add(1)
			default:
				here = false
			}
		}
		if here {
			done(p)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(f.ctx, cancel)()
	c := &download{asked: bundle.Asked, awaited: make(map[*fetch]struct{})}
	if c.asked.IsZero() {
		c.asked = time.Now()
	}
	fetches, missing := f.beginDownload(c, bundle, b.src)
	if fetches == nil {
		return nil
	}
	err := f.download(ctx, b.src, c, bundle, missing, limit, done)
	f.endDownload(b.src, fetches)
	return err
}

// beginDownload makes fetches of the chunks that a bundle is to bring, and says which
// parts these are in; or does nothing where they are less than half of it, or
// where the bundles that are on their way have taken the room.
func (f *Fetcher) beginDownload(c *download, bundle *Bundle, s *source) (fetches []*fetch, missing []bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.closed {
		return nil, nil
	}
	lacks := func(w blockmap.Want) bool {
		ft := f.mu.fetches[key{w.Stream, w.Chunk}]
		return (ft == nil || ft.state == queued && !ft.demand) && !w.Stream.Has(w.Chunk)
	}
	missing = make([]bool, len(bundle.Parts))
	var at, lacking int64
	for i, p := range bundle.Parts {
		at += p.Stored
		if missing[i] = slices.ContainsFunc(p.Wants, lacks); missing[i] {
			lacking += p.Stored
		}
	}
	if lacking <= at/2 {
		return nil, nil
	}
	if f.mu.bundles > 0 && !(int64(f.mu.bundles+1)*downloadBytes <= f.o.MaxBytes && f.mu.pool.admits(s.active, downloadBytes) && f.admitsPrefetch(s, downloadBytes)) {
		f.log.Info("there is no room for one more bundle; its chunks are fetched one by one", "bundles", f.mu.bundles)
		return nil, nil
	}
	f.mu.bundles++
	s.bundles++
	f.charge(s, false, 1, downloadBytes)
	fetches = make([]*fetch, 0, len(bundle.Parts))
	at = 0
	for i, p := range bundle.Parts {
		at += p.Stored
		for _, w := range p.Wants {
			if !missing[i] || !lacks(w) {
				continue
			}
			k := key{w.Stream, w.Chunk}
			ft := f.mu.fetches[k]
			if ft == nil {
				f.mu.seq++
				ft = &fetch{key: k, place: place{s, w.Table}, seq: f.mu.seq, done: make(chan struct{})}
				f.mu.fetches[k] = ft
				if digest := ft.chunk().Digest; f.mu.contents[digest] == nil {
					f.mu.contents[digest] = ft
				}
			}
			ft.state, ft.download, ft.until = downloading, c, at
			fetches = append(fetches, ft)
		}
	}
	return fetches, missing
}

// endDownload queues what the bundle did not bring and somebody wants.
func (f *Fetcher) endDownload(s *source, fetches []*fetch) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.bundles--
	s.bundles--
	f.charge(s, false, -1, -downloadBytes)
	for _, ft := range fetches {
		switch {
		case ft.state != downloading:
		case ft.isWanted():
			f.enqueue(ft)
		default:
			f.end(ft, context.Canceled)
		}
	}
	f.dispatch()
}

// download reads the bundle from beginning to end, over connections that break if
// need be, and gives up at the first part that is not what it should be: who
// made one wrong part may have made them all.
func (f *Fetcher) download(ctx context.Context, s *source, c *download, bundle *Bundle, missing []bool, limit *rate.Limiter, done func(Part)) error {
	var off int64
	next := 0
	for try := 0; ; try++ {
		began := next
		err := f.downloadFrom(ctx, s, c, bundle, missing, limit, done, &next, &off)
		var unstored *storeError
		if err == nil || errors.Is(err, blockmap.ErrDigest) || errors.As(err, &unstored) || ctx.Err() != nil || next == len(bundle.Parts) {
			return err
		}
		if next > began {
			try = 0
		}
		if try == downloadTries-1 || f.o.Temporary != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !f.o.Temporary(err) {
			return err
		}
		f.retries.Add(1)
		f.log.Debug("the bundle broke off; it is taken up again", "err", err, "part", next, "of", len(bundle.Parts))
		select {
		case <-time.After(f.heed(err, f.o.Backoff<<try)):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// downloadFrom reads the parts from number *next on, which begins at *off, in one
// request, and moves both.
func (f *Fetcher) downloadFrom(ctx context.Context, s *source, c *download, bundle *Bundle, missing []bool, limit *rate.Limiter, done func(Part), next *int, off *int64) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	f.requests.Add(1)
	rc, err := bundle.Open(ctx, *off)
	if err != nil {
		return err
	}
	defer rc.Close()
	r := newRequest(ctx, place{src: s})
	r.download = c
	defer r.cancel()
	body := &incoming{f, r, rc}
	var refusals refusals
	var decoding sync.WaitGroup
	defer decoding.Wait()
	for ; *next < len(bundle.Parts); *next++ {
		p := bundle.Parts[*next]
		if err := limit.WaitN(ctx, int(p.Stored)); err != nil {
			return cmp.Or(context.Cause(ctx), err)
		}
		var stored *[]byte
		var n int64
		if missing[*next] {
			stored = f.buffer(int(p.Stored))
			var m int
			m, err = io.ReadFull(body, *stored)
			n = int64(m)
		} else {
			n, err = io.CopyN(io.Discard, body, p.Stored)
		}
		f.bytes.Add(n)
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return fmt.Errorf("part %d: %w", *next, err)
		}
		*off += p.Stored
		f.mu.Lock()
		if c.first.IsZero() {
			c.first, c.base = time.Now(), *off
		}
		c.got, c.hangs = *off, false
		s.good = time.Now()
		f.mu.Unlock()
		if stored == nil {
			continue
		}
		i := *next
		// A part that is wrong is the fault of who made the bundle, and not of who
		// sends it: what is fetched chunk by chunk will show whether it was.
		f.decodeLater(s, &decoding, nil, func() {
			defer f.buffers.Put(stored)
			err := f.keepPart(p, *stored)
			if err == nil {
				done(p)
			}
			if full := refusals.full(err); full || err != nil && !errors.Is(err, blockmap.ErrNoSpace) {
				cancel(fmt.Errorf("part %d: %w", i, err))
			}
		})
	}
	decoding.Wait()
	return context.Cause(ctx)
}

// keepPart makes a part resident wherever it is wanted, and wakes who waits for it.
func (f *Fetcher) keepPart(p Part, stored []byte) error {
	fr := frame{f: f, stored: stored}
	defer fr.release()
	for _, w := range p.Wants {
		k := key{w.Stream, w.Chunk}
		if !w.Stream.Has(w.Chunk) { // or else a reader could not wait, and had it fetched
			if err := f.keep(w, &fr, func() {}); err != nil {
				if errors.Is(err, blockmap.ErrDigest) {
					f.wrong.Add(1)
				}
				f.fetchAlone(k)
				return err
			}
			f.chunks.Add(1)
		}
		f.mu.Lock()
		if ft := f.mu.fetches[k]; ft != nil {
			f.end(ft, nil)
			f.dispatch()
		}
		f.mu.Unlock()
	}
	return nil
}

// fetchAlone has a chunk be fetched by itself that the bundle has brought in vain, if
// somebody wants it.
func (f *Fetcher) fetchAlone(k key) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if ft := f.mu.fetches[k]; ft != nil && ft.state == downloading && ft.isWanted() && !f.mu.closed {
		f.enqueue(ft)
		f.dispatch()
	}
}
