package blocktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"thaw/blockmap"
)

// Origin serves blobs from memory, and fails as its Faults say. Set changes the faults
// while it serves.
type Origin struct {
	Name string // the Source of its bodies

	mu     sync.Mutex
	blobs  map[blockmap.Digest][]byte
	faults Faults

	ranges   int // how many a request may have; 0 for 1
	requests int
	alive    int
	most     int
	asked    map[Asked]int
}

// Faults say what goes wrong with later requests. The zero Faults are none.
type Faults struct {
	Delay   time.Duration // before the body begins
	Err     error         // instead of a body
	ErrEach int           // with Err: only every ErrEach-th request fails; 0: all
	Cut     bool          // the body ends half way, without an error of its own
	Break   error         // the body fails half way with this
	Flip    bool          // a bit of the body is wrong
	Hang    bool          // the body does not come before the context ends
	Mute    bool          // neither answer nor body comes before the context ends
	Trickle int64         // bytes of the body a second, a few at a time; 0: at once
	Left    int           // faults end after this many requests; 0: never

	// Only, if not nil, chooses the ranges that the faults concern.
	Only func(Asked) bool
}

// Asked names a requested range.
type Asked struct {
	Blob   blockmap.Digest
	Off, N int64
}

// ErrInjected is an error for Faults.
var ErrInjected = errors.New("injected fault")

// NewOrigin makes an origin of an image's blobs.
func NewOrigin(m *Image) *Origin {
	return &Origin{blobs: m.Blobs, asked: make(map[Asked]int)}
}

// Add adds a blob. No request is under way meanwhile.
func (o *Origin) Add(digest blockmap.Digest, blob []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.blobs = maps.Clone(o.blobs)
	o.blobs[digest] = blob
}

// Set changes what goes wrong from now on.
func (o *Origin) Set(f Faults) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.faults = f
}

// Requests is how many requests were made.
func (o *Origin) Requests() int { o.mu.Lock(); defer o.mu.Unlock(); return o.requests }

// Most is the largest number of requests that were under way at once.
func (o *Origin) Most() int { o.mu.Lock(); defer o.mu.Unlock(); return o.most }

// Alive is how many bodies are open.
func (o *Origin) Alive() int { o.mu.Lock(); defer o.mu.Unlock(); return o.alive }

// Asked lists how often each range was requested.
func (o *Origin) Asked() map[Asked]int {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := make(map[Asked]int, len(o.asked))
	for k, n := range o.asked {
		all[k] = n
	}
	return all
}

// GiveRanges allows n ranges in a request. The default is one.
func (o *Origin) GiveRanges(n int) { o.mu.Lock(); defer o.mu.Unlock(); o.ranges = n }

// Ranges is how many ranges a request may have.
func (o *Origin) Ranges() int { o.mu.Lock(); defer o.mu.Unlock(); return max(o.ranges, 1) }

// OpenRange opens one range.
func (o *Origin) OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error) {
	return o.open(ctx, Asked{blob, off, n})
}

// OpenRanges opens several ranges of a blob. It returns nil where they are more than a
// request may have.
func (o *Origin) OpenRanges(ctx context.Context, blob blockmap.Digest, ranges []blockmap.Extent) (io.ReadCloser, error) {
	if len(ranges) > o.Ranges() {
		return nil, nil
	}
	asked := make([]Asked, len(ranges))
	for i, r := range ranges {
		if slices.ContainsFunc(ranges[:i], func(before blockmap.Extent) bool { return r.Intersect(before).Len() > 0 }) {
			return nil, fmt.Errorf("the ranges %v overlap", ranges)
		}
		asked[i] = Asked{blob, r.Start, r.Len()}
	}
	return o.open(ctx, asked...)
}

// open returns the bytes of all ranges, which are of one blob.
func (o *Origin) open(ctx context.Context, asked ...Asked) (io.ReadCloser, error) {
	o.mu.Lock()
	blob, ok := o.blobs[asked[0].Blob]
	f := o.faults
	if f.Only != nil && !slices.ContainsFunc(asked, f.Only) {
		f = Faults{}
	}
	if f.ErrEach > 0 && o.requests%f.ErrEach != 0 {
		f.Err = nil
	}
	if o.faults.Left > 0 && (o.faults.Only == nil || slices.ContainsFunc(asked, o.faults.Only)) {
		if o.faults.Left--; o.faults.Left == 0 {
			o.faults = Faults{Delay: f.Delay}
		}
	}
	o.requests++
	for _, a := range asked {
		o.asked[a]++
	}
	o.alive++
	o.most = max(o.most, o.alive)
	o.mu.Unlock()
	body := &body{o: o}
	fail := func(err error) (io.ReadCloser, error) {
		body.Close()
		return nil, err
	}
	if !ok {
		return fail(fmt.Errorf("no blob %v", asked[0].Blob))
	}
	for _, a := range asked {
		if a.Off < 0 || a.N <= 0 || a.Off+a.N > int64(len(blob)) {
			return fail(fmt.Errorf("bytes %d+%d of a blob of %d", a.Off, a.N, len(blob)))
		}
	}
	b := blob[asked[0].Off:][:asked[0].N:asked[0].N]
	for _, a := range asked[1:] {
		b = append(b, blob[a.Off:][:a.N]...) // a copy: b has no room
	}
	n := len(b)
	if f.Delay > 0 {
		select {
		case <-time.After(f.Delay):
		case <-ctx.Done():
			return fail(context.Cause(ctx))
		}
	}
	if f.Err != nil {
		return fail(f.Err)
	}
	if f.Mute {
		<-ctx.Done()
		return fail(context.Cause(ctx))
	}
	switch {
	case f.Hang:
		body.Reader = hang{ctx}
	case f.Cut:
		body.Reader = bytes.NewReader(b[:n/2])
	case f.Break != nil:
		body.Reader = io.MultiReader(bytes.NewReader(b[:n/2]), broken{f.Break})
	case f.Flip:
		b = bytes.Clone(b)
		b[n/2] ^= 4
		fallthrough
	default:
		body.Reader = bytes.NewReader(b)
	}
	if f.Trickle > 0 {
		body.Reader = &trickle{ctx, body.Reader, f.Trickle}
	}
	return body, nil
}

type body struct {
	io.Reader
	o    *Origin
	once sync.Once
}

func (b *body) Close() error {
	b.once.Do(func() {
		b.o.mu.Lock()
		b.o.alive--
		b.o.mu.Unlock()
	})
	return nil
}

// Source is the name of the origin.
func (b *body) Source() string { return b.o.Name }

// trickle limits a reader to rate bytes a second.
type trickle struct {
	ctx  context.Context
	from io.Reader
	rate int64
}

func (t *trickle) Read(p []byte) (int, error) {
	// At most ten times a second, at least one byte.
	n := max(t.rate/10, 1)
	select {
	case <-time.After(time.Duration(n) * time.Second / time.Duration(t.rate)):
	case <-t.ctx.Done():
		return 0, context.Cause(t.ctx)
	}
	return t.from.Read(p[:min(int64(len(p)), n)])
}

type broken struct{ err error }

func (b broken) Read([]byte) (int, error) { return 0, b.err }

type hang struct{ ctx context.Context }

func (h hang) Read([]byte) (int, error) {
	<-h.ctx.Done()
	return 0, context.Cause(h.ctx)
}
