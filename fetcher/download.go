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

const (
	// downloadTries bounds how often a download is resumed without a part in between.
	downloadTries = 3
	// downloadBytes is the part of Options.MaxBytes that a download takes, for the
	// parts that are being read and decompressed.
	downloadBytes = 8 << 20
	// maxWait is the longest time that a reader waits for a download. After that, a
	// request fetches the chunk.
	maxWait = 2 * time.Second
	// maxLater is how much later a chunk may come by a download than by a request. The
	// download saves a request, and bytes that would come twice.
	maxLater = 50 * time.Millisecond
)

// download is a bundle that is being downloaded. A chunk in it is a fetch like any
// other. A reader that needs it waits for the download if that brings it soon;
// otherwise a request fetches it.
type download struct {
	f       *Fetcher
	src     *source
	bundle  *Bundle
	limit   *rate.Limiter
	done    func(Part) // called for each part that is resident, by several goroutines
	missing []bool     // the parts that are not resident
	fetches []*fetch   // the fetches of the chunks in these parts
	next    int        // the part to be read next
	off     int64      // offset of that part

	// Fetcher.mu guards the fields below.
	asked   time.Time           // when the bundle was requested
	first   time.Time           // when its first part had arrived; zero until then
	base    int64               // bytes that had arrived by then
	got     int64               // bytes that have arrived so far
	hangs   bool                // a reader has waited too long, and no bytes have arrived since
	awaited map[*fetch]struct{} // the fetches that readers wait for
}

// soon reports whether the download brings the frame of this size that ends at byte at
// about as soon as a request would, and returns how long to wait for it.
func (d *download) soon(now time.Time, at, stored int64) (wait time.Duration, ok bool) {
	if d.hangs {
		return 0, false
	}
	if d.first.IsZero() {
		// A bundle begins with what a start reads first.
		return 250 * time.Millisecond, at <= 2<<20
	}
	latency := d.first.Sub(d.asked)
	perByte := float64(max(now.Sub(d.first), time.Millisecond)) / float64(max(d.got-d.base, 64<<10))
	eta := time.Duration(float64(at-d.got) * perByte)
	// A request would make the download pause.
	alone := latency + time.Duration(float64(stored)*perByte)
	return min(2*eta+latency+20*time.Millisecond, maxWait), eta <= alone+alone/4+maxLater
}

// leave records that no reader waits for the download to bring a fetch any more.
func (d *download) leave(ft *fetch) {
	if ft.late != nil {
		ft.late.Stop()
		ft.late = nil
	}
	delete(d.awaited, ft)
}

// awaitDownload makes a reader of a chunk in a download wait for the download, or for a
// request. f.mu is held; the caller calls dispatch.
func (f *Fetcher) awaitDownload(ft *fetch) {
	d := ft.download
	wait, ok := d.soon(time.Now(), ft.until, int64(ft.chunk().Stored))
	if !ok {
		f.enqueue(ft)
		return
	}
	got := d.got
	d.awaited[ft] = struct{}{}
	f.wakePaused()
	ft.late = time.AfterFunc(wait, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if _, ok := d.awaited[ft]; ok && !f.mu.closed {
			d.hangs = d.got == got
			f.enqueue(ft)
			f.dispatch()
		}
	})
}

// downloadBundle downloads a bundle and makes its chunks resident. It calls done for
// each part that is resident, from several goroutines. When it returns, no chunk is
// downloading any more: chunks that the bundle did not bring are queued. It does
// nothing if most of the bundle is resident or in flight already.
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
	f.wg.Add(1) // Close waits for the parts that are being decompressed
	f.mu.Unlock()
	defer f.wg.Done()
	for _, p := range bundle.Parts {
		resident := true
		for _, w := range p.Wants {
			switch {
			case w.Stream.Has(w.Chunk):
			case w.Stream.FillLocal(w.Chunk):
				f.local.Add(1)
			default:
				resident = false
			}
		}
		if resident {
			done(p)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(f.ctx, cancel)()
	d := &download{f: f, src: b.src, bundle: bundle, limit: limit, done: done, asked: bundle.Asked, awaited: make(map[*fetch]struct{})}
	if d.asked.IsZero() {
		d.asked = time.Now()
	}
	if !d.begin() {
		return nil
	}
	defer d.end()
	return d.run(ctx)
}

// begin makes fetches of the chunks that a bundle brings. It returns false and does
// nothing if these are less than half of the bundle, or if other downloads have taken
// the room.
func (d *download) begin() bool {
	f, s := d.f, d.src
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.closed {
		return false
	}
	lacks := func(w blockmap.Want) bool {
		ft := f.mu.fetches[key{w.Stream, w.Chunk}]
		return (ft == nil || ft.state == queued && !ft.demand) && !w.Stream.Has(w.Chunk)
	}
	d.missing = make([]bool, len(d.bundle.Parts))
	var at, lacking int64
	for i, p := range d.bundle.Parts {
		at += p.Stored
		if d.missing[i] = slices.ContainsFunc(p.Wants, lacks); d.missing[i] {
			lacking += p.Stored
		}
	}
	if lacking <= at/2 {
		return false
	}
	if f.mu.bundles > 0 && !(int64(f.mu.bundles+1)*downloadBytes <= f.o.MaxBytes && f.mu.pool.admits(s.active, downloadBytes) && f.admitsPrefetch(s, downloadBytes)) {
		f.log.Info("no room for one more bundle download, so thaw fetches its chunks one by one", "downloads", f.mu.bundles)
		return false
	}
	f.mu.bundles++
	s.bundles++
	f.charge(s, false, 1, downloadBytes)
	at = 0
	for i, p := range d.bundle.Parts {
		at += p.Stored
		for _, w := range p.Wants {
			if !d.missing[i] || !lacks(w) {
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
			ft.state, ft.download, ft.until = downloading, d, at
			d.fetches = append(d.fetches, ft)
		}
	}
	return true
}

// end queues the fetches that the bundle did not bring and that are still wanted.
func (d *download) end() {
	f := d.f
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.bundles--
	d.src.bundles--
	f.charge(d.src, false, -1, -downloadBytes)
	for _, ft := range d.fetches {
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

// run reads the bundle from its beginning to its end. If a connection breaks, run
// resumes the download. It gives up at the first part that is wrong: the program that
// made it also made the other parts, so they may be wrong too.
func (d *download) run(ctx context.Context) error {
	f := d.f
	for try := 0; ; try++ {
		began := d.next
		err := d.read(ctx)
		var unstored *storeError
		if err == nil || errors.Is(err, blockmap.ErrDigest) || errors.As(err, &unstored) || ctx.Err() != nil || d.next == len(d.bundle.Parts) {
			return err
		}
		if d.next > began {
			try = 0
		}
		if try == downloadTries-1 || f.o.Temporary != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !f.o.Temporary(err) {
			return err
		}
		f.retries.Add(1)
		f.log.Debug("resuming a bundle download that broke off", "err", err, "part", d.next, "of", len(d.bundle.Parts))
		select {
		case <-time.After(f.heed(err, f.o.Backoff<<try)):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// read reads the parts from d.next on, in one request.
func (d *download) read(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	f := d.f
	f.requests.Add(1)
	rc, err := d.bundle.Open(ctx, d.off)
	if err != nil {
		return err
	}
	defer rc.Close()
	r := newRequest(ctx, place{src: d.src})
	r.download = d
	defer r.cancel()
	body := &incoming{f, r, rc}
	var refusals refusals
	var decoding sync.WaitGroup
	defer decoding.Wait()
	for ; d.next < len(d.bundle.Parts); d.next++ {
		i, p := d.next, d.bundle.Parts[d.next]
		stored, err := d.readPart(ctx, body)
		if err != nil {
			return err
		}
		d.received(p)
		if stored == nil {
			continue
		}
		// A wrong part is not the fault of the server that sends it, so no server is
		// distrusted for it. Chunks that requests fetch show whether a server is at
		// fault.
		f.decodeLater(d.src, &decoding, nil, func() {
			defer f.buffers.Put(stored)
			err := f.keepPart(p, *stored)
			if err == nil {
				d.done(p)
			}
			if full := refusals.full(err); full || err != nil && !errors.Is(err, blockmap.ErrNoSpace) {
				cancel(fmt.Errorf("part %d: %w", i, err))
			}
		})
	}
	decoding.Wait()
	return context.Cause(ctx)
}

// readPart reads the next part, or skips it and returns nil if it is not missing.
func (d *download) readPart(ctx context.Context, body io.Reader) (stored *[]byte, err error) {
	p := d.bundle.Parts[d.next]
	if err := d.limit.WaitN(ctx, int(p.Stored)); err != nil {
		return nil, cmp.Or(context.Cause(ctx), err)
	}
	var n int64
	if d.missing[d.next] {
		stored = d.f.buffer(int(p.Stored))
		var m int
		m, err = io.ReadFull(body, *stored)
		n = int64(m)
	} else {
		n, err = io.CopyN(io.Discard, body, p.Stored)
	}
	d.f.bytes.Add(n)
	if err == nil {
		return stored, nil
	}
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err == io.EOF:
		err = io.ErrUnexpectedEOF
	}
	return nil, fmt.Errorf("part %d: %w", d.next, err)
}

// received records that a part has arrived.
func (d *download) received(p Part) {
	d.off += p.Stored
	d.f.mu.Lock()
	defer d.f.mu.Unlock()
	now := time.Now()
	if d.first.IsZero() {
		d.first, d.base = now, d.off
	}
	d.got, d.hangs = d.off, false
	d.src.good = now
}

// keepPart makes a part resident in all its places, and ends their fetches.
func (f *Fetcher) keepPart(p Part, stored []byte) error {
	fr := frame{f: f, stored: stored}
	defer fr.release()
	for _, w := range p.Wants {
		k := key{w.Stream, w.Chunk}
		if !w.Stream.Has(w.Chunk) { // a request may have been faster
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

// fetchAlone queues the fetch of a chunk whose content in a bundle was of no use, if
// the fetch is still wanted.
func (f *Fetcher) fetchAlone(k key) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if ft := f.mu.fetches[k]; ft != nil && ft.state == downloading && ft.isWanted() && !f.mu.closed {
		f.enqueue(ft)
		f.dispatch()
	}
}
