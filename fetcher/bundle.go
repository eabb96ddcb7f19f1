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

// Bundle is chunks that come in one download, in the order in which a start wants
// them.
type Bundle struct {
	Parts []Part
	// Open reads the frames of all parts, one behind the other, from byte off
	// of them to their end. The body lives no longer than ctx.
	Open func(ctx context.Context, off int64) (io.ReadCloser, error)
	// Asked is when the body that Open gives first was asked for; zero if that is
	// when Open is called.
	Asked time.Time
	// Close, if not nil, is called when Open will not be any more.
	Close func()
}

// Part is one chunk's content in a Bundle.
type Part struct {
	Stored int64 // bytes of its zstd frame
	// Wants are all places that the content belongs to. They may be none.
	Wants []blockmap.Want
}

// A bundle that breaks is taken up again where it broke, this often.
const carryTries = 3

// While a bundle is on its way it takes this much of MaxBytes, for the parts
// that are being read and decompressed.
const carryBytes = 8 << 20

// The most that a reader waits for a bundle before its chunk is fetched alone.
const mostPatience = 2 * time.Second

// carrier is a bundle on its way. A chunk in it is a flight like any other, but
// for its state: whoever asks for it waits for the download if that will have
// it soon, and else has it fetched on its own.
type carrier struct {
	asked time.Time // for the download
	first time.Time // when its first part had come; zero until then
	base  int64     // bytes that had come by then
	got   int64     // bytes that have come by now
	hangs bool      // somebody has lost patience, and nothing has come since

	awaited map[*flight]struct{} // that readers wait for here
}

// soon says whether the frame that ends at byte at, of so many bytes, comes about
// as soon as it would alone, and how long is too long to wait for it then.
func (c *carrier) soon(now time.Time, at, stored int64) (patience time.Duration, ok bool) {
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
	return min(2*eta+latency+20*time.Millisecond, mostPatience), eta <= alone+alone/4+mostLater
}

// mostLater is how much later than alone a chunk may come by a bundle: it spares a
// request, and bytes that come twice.
const mostLater = 50 * time.Millisecond

// leave notes that nobody waits any more for what the bundle is to bring.
func (c *carrier) leave(fl *flight) {
	if fl.late != nil {
		fl.late.Stop()
		fl.late = nil
	}
	delete(c.awaited, fl)
}

// awaitCarrier decides what a reader of a carried chunk waits for. f.mu is held,
// and dispatch is called behind it.
func (f *Fetcher) awaitCarrier(fl *flight) {
	c := fl.carrier
	patience, ok := c.soon(time.Now(), fl.until, int64(fl.chunk().Stored))
	if !ok {
		f.board(fl)
		return
	}
	got := c.got
	c.awaited[fl] = struct{}{}
	f.turnover()
	fl.late = time.AfterFunc(patience, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if _, ok := c.awaited[fl]; ok && !f.mu.closed {
			c.hangs = c.got == got
			f.board(fl)
			f.dispatch()
		}
	})
}

// carry downloads a bundle and fills its chunks. It calls done for each part that
// is here, from several goroutines. When it returns, nothing is carried any
// more: what the bundle did not bring is queued. A bundle of which most is here
// already, or on its way, is left alone.
func (b *Bound) carry(ctx context.Context, bundle *Bundle, limit *rate.Limiter, done func(Part)) error {
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
	c := &carrier{asked: bundle.Asked, awaited: make(map[*flight]struct{})}
	if c.asked.IsZero() {
		c.asked = time.Now()
	}
	flights, missing := f.embark(c, bundle, b.src)
	if flights == nil {
		return nil
	}
	err := f.download(ctx, b.src, c, bundle, missing, limit, done)
	f.disembark(b.src, flights)
	return err
}

// embark makes flights of the chunks that a bundle is to bring, and says which
// parts these are in; or does nothing where they are less than half of it, or
// where the bundles that are on their way have taken the room.
func (f *Fetcher) embark(c *carrier, bundle *Bundle, s *source) (flights []*flight, missing []bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.mu.closed {
		return nil, nil
	}
	lacks := func(w blockmap.Want) bool {
		fl := f.mu.flights[key{w.Stream, w.Chunk}]
		return (fl == nil || fl.state == queued && !fl.demand) && !w.Stream.Has(w.Chunk)
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
	if f.mu.bundles > 0 && !(int64(f.mu.bundles+1)*carryBytes <= f.o.MaxBytes && f.mu.pool.admits(s.active, carryBytes) && f.admitsAhead(s, carryBytes)) {
		f.log.Info("there is no room for one more bundle; its chunks are fetched one by one", "bundles", f.mu.bundles)
		return nil, nil
	}
	f.mu.bundles++
	s.bundles++
	f.charge(s, false, 1, carryBytes)
	flights = make([]*flight, 0, len(bundle.Parts))
	at = 0
	for i, p := range bundle.Parts {
		at += p.Stored
		for _, w := range p.Wants {
			if !missing[i] || !lacks(w) {
				continue
			}
			k := key{w.Stream, w.Chunk}
			fl := f.mu.flights[k]
			if fl == nil {
				f.mu.turns++
				fl = &flight{key: k, place: place{s, w.Table}, turn: f.mu.turns, done: make(chan struct{})}
				f.mu.flights[k] = fl
				if digest := fl.chunk().Digest; f.mu.contents[digest] == nil {
					f.mu.contents[digest] = fl
				}
			}
			fl.state, fl.carrier, fl.until = carried, c, at
			flights = append(flights, fl)
		}
	}
	return flights, missing
}

// disembark queues what the bundle did not bring and somebody wants.
func (f *Fetcher) disembark(s *source, flights []*flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.mu.bundles--
	s.bundles--
	f.charge(s, false, -1, -carryBytes)
	for _, fl := range flights {
		switch {
		case fl.state != carried:
		case fl.isWanted():
			f.board(fl)
		default:
			f.end(fl, context.Canceled)
		}
	}
	f.dispatch()
}

// download reads the bundle from beginning to end, over connections that break if
// need be, and gives up at the first part that is not what it should be: who
// made one wrong part may have made them all.
func (f *Fetcher) download(ctx context.Context, s *source, c *carrier, bundle *Bundle, missing []bool, limit *rate.Limiter, done func(Part)) error {
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
		if try == carryTries-1 || f.o.Temporary != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !f.o.Temporary(err) {
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
func (f *Fetcher) downloadFrom(ctx context.Context, s *source, c *carrier, bundle *Bundle, missing []bool, limit *rate.Limiter, done func(Part), next *int, off *int64) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	f.requests.Add(1)
	rc, err := bundle.Open(ctx, *off)
	if err != nil {
		return err
	}
	defer rc.Close()
	r := newRequest(ctx, place{src: s})
	r.carrier = c
	defer r.cancel()
	body := &incoming{f, r, rc}
	var crowd crowd
	var decoding sync.WaitGroup
	defer decoding.Wait()
	for ; *next < len(bundle.Parts); *next++ {
		p := bundle.Parts[*next]
		if err := limit.WaitN(ctx, int(p.Stored)); err != nil {
			return cmp.Or(context.Cause(ctx), err)
		}
		var frame *[]byte
		var n int64
		if missing[*next] {
			frame = f.buffer(int(p.Stored))
			var m int
			m, err = io.ReadFull(body, *frame)
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
		if frame == nil {
			continue
		}
		i := *next
		// A part that is wrong is the fault of who made the bundle, and not of who
		// sends it: what is fetched chunk by chunk will show whether it was.
		f.decodeLater(s, &decoding, nil, func() {
			defer f.buffers.Put(frame)
			err := f.deliver(p, *frame)
			if err == nil {
				done(p)
			}
			if full := crowd.full(err); full || err != nil && !errors.Is(err, blockmap.ErrNoSpace) {
				cancel(fmt.Errorf("part %d: %w", i, err))
			}
		})
	}
	decoding.Wait()
	return context.Cause(ctx)
}

// deliver stores a part wherever it is wanted, and wakes who waits for it.
func (f *Fetcher) deliver(p Part, frame []byte) error {
	var content []byte
	for _, w := range p.Wants {
		if !w.Stream.Has(w.Chunk) {
			if content == nil { // else somebody could not wait, and has fetched it
				size := w.Table.Chunks[w.Chunk].Size()
				buf := f.buffer(size)
				defer f.buffers.Put(buf)
				var err error
				if content, err = f.zstd.DecodeAll(frame, (*buf)[:0:size]); err != nil {
					f.wrong.Add(1)
					return fmt.Errorf("%w: %w", blockmap.ErrDigest, err)
				}
			}
			if err := f.store(w.Stream, w.Chunk, content, func() bool { return f.isRead(key{w.Stream, w.Chunk}) }); err != nil {
				if errors.Is(err, blockmap.ErrDigest) {
					f.wrong.Add(1)
				}
				f.stays(key{w.Stream, w.Chunk})
				return err
			}
			f.chunks.Add(1)
		}
		f.mu.Lock()
		if fl := f.mu.flights[key{w.Stream, w.Chunk}]; fl != nil {
			f.end(fl, nil)
			f.dispatch()
		}
		f.mu.Unlock()
	}
	return nil
}

// isRead says whether somebody waits for a chunk.
func (f *Fetcher) isRead(k key) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	fl := f.mu.flights[k]
	return fl != nil && fl.demand
}

// stays has a chunk be fetched by itself that the bundle has brought in vain, if
// somebody wants it.
func (f *Fetcher) stays(k key) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl := f.mu.flights[k]; fl != nil && fl.state == carried && fl.isWanted() && !f.mu.closed {
		f.board(fl)
		f.dispatch()
	}
}

// crowd notices that a cache cannot keep what is fetched ahead: several chunks in
// a row say so, where one may only have come when all others were in use.
type crowd struct {
	mu sync.Mutex
	n  int
}

const crowded = 3

// full says whether this is the end of it: err is why a chunk could not be kept.
func (c *crowd) full(err error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		c.n = 0
		return false
	}
	c.n++
	return c.n >= crowded
}
