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
	// downloadTries bounds how often a download is resumed without a frame in between.
	downloadTries = 3
	// downloadBytes is the part of Options.MaxBytes that a download takes, for the
	// frames that are being read and decompressed.
	downloadBytes = 8 << 20
	// maxWait is the longest time that a reader waits for a download. After that, a
	// request fetches the chunk.
	maxWait = 2 * time.Second
	// maxLater is how much later leaves may come by a download than by a request. The
	// download saves a request, and bytes that would come twice.
	maxLater = 50 * time.Millisecond
)

// download is a bundle that is being downloaded. A chunk of which it brings leaves is a
// fetch like any other. A reader that needs some of these leaves waits for the download if
// that brings them soon; otherwise a request fetches the chunk.
type download struct {
	f       *Fetcher
	src     *source
	near    *Nearby
	bundle  *Bundle
	limit   *rate.Limiter
	done    func(*Frame, *Part) // called for each part that is resident, by several goroutines
	missing []bool              // the frames with leaves that are not resident
	fetches []*fetch            // the fetches of the chunks that have these leaves
	next    int                 // the frame to be read next
	off     int64               // offset of that frame
	ahead   int64               // bytes that a zone is asked for before they are read; 0 without a zone

	// Fetcher.mu guards the fields below.
	asked   time.Time           // when the bundle was requested
	first   time.Time           // when its first frame had arrived; zero until then
	base    int64               // bytes that had arrived by then
	got     int64               // bytes that have arrived so far
	hangs   bool                // a reader has waited too long, and no bytes have arrived since
	awaited map[*fetch]struct{} // the fetches that readers wait for
}

// arriving is leaves that a download brings, and where their frame ends in the bundle.
type arriving struct {
	leaves blockmap.LeafSet
	until  int64
}

// soon reports whether the download brings the frame of this size that ends at byte at
// about as soon as a request would, and returns how long to wait for it.
func (d *download) soon(now time.Time, at, stored int64) (wait time.Duration, ok bool) {
	if d.hangs {
		return 0, false
	}
	if at <= d.got+d.ahead {
		// Its piece is under way, and comes all at once. A request would make the chunk's
		// owner read the same content from the registry a second time.
		return maxWait, true
	}
	if d.first.IsZero() {
		// A bundle begins with what a start reads first.
		return 250 * time.Millisecond, at <= 2<<20
	}
	latency := d.first.Sub(d.asked)
	perByte := float64(max(now.Sub(d.first), time.Millisecond)) / float64(max(d.got-d.base, 64<<10))
	eta := time.Duration(float64(max(at-d.got, 0)) * perByte)
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

// awaitDownload makes the readers of a chunk of which a download brings leaves wait for
// the download, or for a request. f.mu is held; the caller calls dispatch.
func (f *Fetcher) awaitDownload(ft *fetch) {
	d := ft.download
	absent := ft.reads &^ ft.stream.Leaves(ft.key.chunk)
	if absent == 0 {
		return // the readers are being woken
	}
	wait, ok := d.soon(time.Now(), ft.until(absent), int64(ft.chunk().Stored))
	if !ok || !ft.coming.Contains(absent) {
		f.enqueue(ft)
		return
	}
	got := d.got
	d.leave(ft)
	d.awaited[ft] = struct{}{}
	f.wakePaused()
	ft.late = time.AfterFunc(wait, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if _, ok := d.awaited[ft]; ok && !f.mu.closed && !ft.stream.HasLeaves(ft.key.chunk, ft.reads) {
			d.hangs = d.got == got
			if !d.hangs && d.ahead > 0 && time.Since(ft.since) < f.nearMost() {
				f.awaitDownload(ft) // the zone is slow, and so would be a request
			} else {
				f.enqueue(ft)
			}
			f.dispatch()
		}
	})
}

// until returns where the last frame with any of leaves ends in the bundle.
func (ft *fetch) until(leaves blockmap.LeafSet) (at int64) {
	for _, a := range ft.arriving {
		if a.leaves&leaves != 0 {
			at = max(at, a.until)
		}
	}
	return at
}

// downloadBundle downloads a bundle and makes its leaves resident. It calls done for
// each part that is resident, from several goroutines and perhaps twice. When it returns,
// no chunk is downloading any more: chunks that readers still wait for are queued. It does
// nothing if most of the bundle is resident or in flight already.
func (b *Bound) downloadBundle(ctx context.Context, bundle *Bundle, limit *rate.Limiter, done func(*Frame, *Part)) error {
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
	for i := range bundle.Frames {
		fr := &bundle.Frames[i]
		for j := range fr.Parts {
			if p := &fr.Parts[j]; f.partHere(p) {
				done(fr, p)
			}
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(f.ctx, cancel)()
	d := &download{f: f, src: b.src, near: b.near, bundle: bundle, limit: limit, done: done, asked: bundle.Asked, awaited: make(map[*fetch]struct{})}
	if d.asked.IsZero() {
		d.asked = time.Now()
	}
	if b.hasPeers() {
		d.ahead = (piecesAhead - 1) * b.near.PieceBytes
	}
	if !d.begin() {
		return nil
	}
	defer d.end()
	return d.run(ctx)
}

// partHere reports whether a part is resident in all its places, and copies it there if
// the cache has it elsewhere.
func (f *Fetcher) partHere(p *Part) bool {
	for _, w := range p.Wants {
		switch {
		case w.Stream.HasLeaves(w.Chunk, p.leaves()):
		case p.List == nil && w.Stream.FillLocal(w.Chunk):
			f.local.Add(1)
		case p.List != nil && w.Stream.FillLeavesLocal(w.Chunk, p.List, p.leaves()) == p.leaves():
			f.local.Add(1)
		default:
			return false
		}
	}
	return true
}

// begin makes fetches of the chunks that have leaves of a bundle. It returns false and
// does nothing if the leaves to bring are less than half of the bundle, or if other
// downloads have taken the room.
func (d *download) begin() bool {
	f, s := d.f, d.src
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.closed {
		return false
	}
	// lacks returns the leaves of a part that are to be brought to a place. A chunk that
	// a request brings soon needs nothing.
	lacks := func(p *Part, w blockmap.Want) blockmap.LeafSet {
		ft := f.mu.fetches[key{w.Stream, w.Chunk}]
		if ft != nil && ft.download != d && (ft.state != queued || ft.demand || ft.download != nil || len(ft.duplicates) > 0) {
			return 0
		}
		return p.leaves() &^ w.Stream.Leaves(w.Chunk)
	}
	d.missing = make([]bool, len(d.bundle.Frames))
	var all, lacking int64
	for i := range d.bundle.Frames {
		fr := &d.bundle.Frames[i]
		for j := range fr.Parts {
			p := &fr.Parts[j]
			all += int64(p.Size)
			if slices.ContainsFunc(p.Wants, func(w blockmap.Want) bool { return lacks(p, w) != 0 }) {
				d.missing[i] = true
				lacking += int64(p.Size)
			}
		}
	}
	if lacking <= all/2 {
		return false
	}
	if f.mu.bundles > 0 && !(int64(f.mu.bundles+1)*downloadBytes <= f.o.MaxBytes && f.mu.pool.admits(s.active, downloadBytes) && f.admitsPrefetch(s, downloadBytes)) {
		f.log.Info("no room for one more bundle download, so thaw fetches its chunks one by one", "downloads", f.mu.bundles)
		return false
	}
	f.mu.bundles++
	s.bundles++
	f.charge(s, false, 1, downloadBytes)
	var at int64
	for i := range d.bundle.Frames {
		fr := &d.bundle.Frames[i]
		at += fr.Stored
		for j := range fr.Parts {
			for _, w := range fr.Parts[j].Wants {
				if leaves := lacks(&fr.Parts[j], w); leaves != 0 {
					d.expect(w, arriving{leaves, at})
				}
			}
		}
	}
	return true
}

// expect notes that the download brings leaves of a chunk. f.mu is held.
func (d *download) expect(w blockmap.Want, a arriving) {
	f, k := d.f, key{w.Stream, w.Chunk}
	ft := f.mu.fetches[k]
	if ft == nil {
		f.mu.seq++
		ft = &fetch{key: k, place: place{d.src, w.Table}, near: d.near, seq: f.mu.seq, done: make(chan struct{})}
		f.mu.fetches[k] = ft
	}
	if ft.download == nil {
		if f.mu.contents[ft.chunk().Digest] == ft {
			delete(f.mu.contents, ft.chunk().Digest) // it may bring only a part of the content
		}
		ft.state, ft.download = downloading, d
		d.fetches = append(d.fetches, ft)
	}
	ft.coming |= a.leaves
	ft.arriving = append(ft.arriving, a)
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
		if ft.coming != 0 {
			f.settle(ft, context.Canceled)
		}
		ft.download, ft.coming, ft.arriving = nil, 0, nil
	}
	f.dispatch()
}

// settle is called when a download brings nothing more of a fetch, or not all that it was
// to bring. The fetch ends, with the error unwanted if nobody wants it, or is queued for a
// request if more is needed of it. f.mu is held; the caller calls dispatch.
func (f *Fetcher) settle(ft *fetch, unwanted error) {
	switch {
	case ft.state != downloading:
	case !ft.isWanted():
		f.end(ft, unwanted)
	case ft.here():
		f.end(ft, nil)
	default:
		f.enqueue(ft)
	}
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
		if err == nil || errors.Is(err, blockmap.ErrDigest) || errors.As(err, &unstored) || ctx.Err() != nil || d.next == len(d.bundle.Frames) {
			return err
		}
		if d.next > began {
			try = 0
		}
		if try == downloadTries-1 || f.o.Temporary != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !f.o.Temporary(err) {
			return err
		}
		f.retries.Add(1)
		f.log.Debug("resuming a bundle download that broke off", "err", err, "frame", d.next, "of", len(d.bundle.Frames))
		select {
		case <-time.After(f.heed(err, f.o.Backoff<<try)):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// read reads the frames from d.next on, in one request.
func (d *download) read(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	f := d.f
	rc, err := d.bundle.Open(ctx, d.off)
	if err != nil {
		return err
	}
	defer rc.Close()
	pieces, _ := rc.(*BlobReader)
	var begin int64 // of the bundle in the blob
	if pieces == nil {
		f.origins.requests.Add(1)
	} else {
		begin = pieces.off - d.off
	}
	r := newRequest(ctx, place{src: d.src})
	r.download, r.unpaced = d, pieces != nil
	defer r.cancel()
	body := &incoming{f, r, rc}
	var refusals refusals
	var decoding sync.WaitGroup
	defer decoding.Wait()
	for ; d.next < len(d.bundle.Frames); d.next++ {
		i, fr, at := d.next, &d.bundle.Frames[d.next], begin+d.off
		stored, err := d.readFrame(ctx, body)
		if err != nil {
			return err
		}
		d.received(fr)
		if stored == nil {
			continue
		}
		// A wrong frame is not the fault of the server that sends it, so no server is
		// distrusted for it. Chunks that requests fetch show whether a server is at
		// fault. Peers are distrusted if the origin has other bytes.
		f.decodeLater(d.src, &decoding, nil, func() {
			defer f.buffers.Put(stored)
			var err error
			if pieces == nil {
				err = d.keepFrame(fr, *stored, true)
			} else {
				err = d.keepPieces(ctx, pieces, at, fr, *stored)
			}
			if full := refusals.full(err); full || err != nil && !errors.Is(err, blockmap.ErrNoSpace) {
				cancel(fmt.Errorf("frame %d: %w", i, err))
			}
		})
	}
	decoding.Wait()
	return context.Cause(ctx)
}

// readFrame reads the next frame, or skips it and returns nil if no leaf of it is
// missing.
func (d *download) readFrame(ctx context.Context, body io.Reader) (stored *[]byte, err error) {
	fr := &d.bundle.Frames[d.next]
	if err := d.limit.WaitN(ctx, int(fr.Stored)); err != nil {
		return nil, cmp.Or(context.Cause(ctx), err)
	}
	var n int64
	if d.missing[d.next] {
		stored = d.f.buffer(int(fr.Stored))
		var m int
		m, err = io.ReadFull(body, *stored)
		n = int64(m)
	} else {
		n, err = io.CopyN(io.Discard, body, fr.Stored)
	}
	if body, ok := body.(*incoming); ok && !body.r.unpaced { // otherwise they were counted piece by piece
		d.f.origins.bytes.Add(n)
	}
	if err == nil {
		return stored, nil
	}
	if stored != nil {
		d.f.buffers.Put(stored)
	}
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err == io.EOF:
		err = io.ErrUnexpectedEOF
	}
	return nil, fmt.Errorf("frame %d: %w", d.next, err)
}

// received records that a frame has arrived.
func (d *download) received(fr *Frame) {
	d.off += fr.Stored
	d.f.mu.Lock()
	defer d.f.mu.Unlock()
	now := time.Now()
	if d.first.IsZero() {
		d.first, d.base = now, d.off
	}
	d.got, d.hangs = d.off, false
	d.src.good = now
}

// keepPieces is keepFrame for a frame at this offset of a blob that comes from a zone. If
// the frame is wrong, it reads the frame from the origin, which shows who is at fault. Also
// a piece that the origin has sent to this host may be wrong once: then no peer gets it.
func (d *download) keepPieces(ctx context.Context, pieces *BlobReader, at int64, fr *Frame, stored []byte) error {
	err := d.keepFrame(fr, stored, false)
	if errors.Is(err, blockmap.ErrDigest) {
		d.f.wrong.Add(1)
		right, recheckErr := pieces.recheck(ctx, at, stored)
		if recheckErr != nil {
			d.f.log.Debug("cannot find out who has sent a wrong frame of a bundle", "err", recheckErr)
			right = stored
		}
		return d.keepFrame(fr, right, true)
	}
	return err
}

// keepFrame makes the leaves of a frame resident. It returns the first error, after which
// other leaves may have come. If last is not set, the caller tries the frame again when it
// is wrong: then keepFrame gives nothing up.
func (d *download) keepFrame(fr *Frame, stored []byte, last bool) (err error) {
	f := d.f
	buf := f.buffer(fr.size())
	defer f.buffers.Put(buf)
	content, err := f.chunkDecoder.DecompressSize(fr.size(), stored, *buf)
	if err == nil && len(content) != fr.size() {
		err = fmt.Errorf("%w: it has %d bytes instead of %d", blockmap.ErrDigest, len(content), fr.size())
	}
	at := 0
	for i := range fr.Parts {
		p := &fr.Parts[i]
		partErr := err
		if err == nil || errors.Is(err, blockmap.ErrNoSpace) {
			partErr = f.keepPart(p, content[at:at+p.Size])
		}
		if partErr == nil {
			d.done(fr, p)
		} else {
			if err == nil || errors.Is(partErr, blockmap.ErrDigest) {
				err = partErr
			}
			if last || !errors.Is(err, blockmap.ErrDigest) {
				f.leavesLost(p)
			}
		}
		at += p.Size
	}
	if last && errors.Is(err, blockmap.ErrDigest) {
		f.wrong.Add(1)
	}
	return err
}

// keepPart makes a part resident in all its places, and wakes the readers that wait for
// it.
func (f *Fetcher) keepPart(p *Part, content []byte) error {
	for _, w := range p.Wants {
		if !w.Stream.HasLeaves(w.Chunk, p.leaves()) { // a request may have been faster
			if err := f.keepLeaves(w, p, content); err != nil {
				return err
			}
			f.leaves.Add(int64(p.Count))
		}
		f.leavesCame(key{w.Stream, w.Chunk}, p.leaves())
	}
	return nil
}

// leavesCame records that leaves of a chunk are resident. It ends the fetch of the chunk
// if nothing more of it is to come, and otherwise wakes those who wait for the chunk: they
// see whether they have what they need.
func (f *Fetcher) leavesCame(k key, leaves blockmap.LeafSet) {
	f.mu.Lock()
	defer f.mu.Unlock()
	ft := f.mu.fetches[k]
	if ft == nil {
		return
	}
	ft.coming &^= leaves
	switch {
	case ft.stream.Has(k.chunk):
		f.end(ft, nil)
	case ft.coming == 0 && ft.state == downloading:
		f.settle(ft, nil)
	case ft.late != nil && ft.stream.HasLeaves(ft.key.chunk, ft.reads):
		ft.download.leave(ft)
	}
	if ft.moved != nil {
		close(ft.moved)
		ft.moved = nil
	}
	f.dispatch()
}

// leavesLost records that a download does not bring a part: requests bring its chunks to
// those who want them.
func (f *Fetcher) leavesLost(p *Part) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range p.Wants {
		ft := f.mu.fetches[key{w.Stream, w.Chunk}]
		if ft == nil {
			continue
		}
		ft.coming &^= p.leaves()
		if ft.state == downloading && !f.mu.closed && (ft.coming == 0 || ft.isWanted()) {
			f.settle(ft, context.Canceled)
		}
	}
	f.dispatch()
}
