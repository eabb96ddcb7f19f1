package fetcher_test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// wire is a link that all bodies of an origin share, one packet of each in turn. A body
// that is not read is sent until its window is full; when there is room again, the sender
// learns so half a round trip later.
type wire struct {
	rate   float64 // bytes per second
	rtt    time.Duration
	window int // of a body, like a socket's buffer

	mu     sync.Mutex
	cond   *sync.Cond
	bodies []*wired // bodies that are being sent
	busy   bool
	sent   int64
}

const packet = 8 << 10

func newWire(rate float64, rtt time.Duration, window int) *wire {
	w := &wire{rate: rate, rtt: rtt, window: window}
	w.cond = sync.NewCond(&w.mu)
	return w
}

// wired is a body that comes over a wire.
type wired struct {
	w      *wire
	ctx    context.Context
	unsent []byte
	here   []byte
	room   int
	left   int
	closed bool
	stop   func() bool
}

// open begins to send a body, half a round trip after the request.
func (w *wire) open(ctx context.Context, b []byte) (io.ReadCloser, error) {
	select {
	case <-time.After(w.rtt): // to the server, and the headers back
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	x := &wired{w: w, ctx: ctx, unsent: b, room: w.window, left: len(b)}
	x.stop = context.AfterFunc(ctx, w.wake)
	w.bodies = append(w.bodies, x)
	w.send()
	return x, nil
}

func (w *wire) wake() { w.mu.Lock(); defer w.mu.Unlock(); w.cond.Broadcast() }

// send sends the next packet, and goes on when it has been sent. w.mu is held.
func (w *wire) send() {
	if w.busy {
		return
	}
	for i, x := range w.bodies {
		n := min(packet, len(x.unsent), x.room)
		if n == 0 || x.closed || n < packet && n < len(x.unsent) {
			continue
		}
		p := x.unsent[:n]
		x.unsent, x.room = x.unsent[n:], x.room-n
		w.bodies = append(slices.Delete(w.bodies, i, i+1), x)
		w.busy = true
		w.sent += int64(n)
		took := time.Duration(float64(n) / w.rate * float64(time.Second))
		time.AfterFunc(took, func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.busy = false
			x.here = append(x.here, p...)
			w.cond.Broadcast()
			w.send()
		})
		return
	}
}

func (x *wired) Read(p []byte) (int, error) {
	w := x.w
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(x.here) == 0 && x.left > 0 && x.ctx.Err() == nil {
		w.cond.Wait()
	}
	if x.ctx.Err() != nil {
		return 0, context.Cause(x.ctx)
	}
	if x.left == 0 {
		return 0, io.EOF
	}
	n := copy(p, x.here)
	x.here, x.left = x.here[n:], x.left-n
	time.AfterFunc(w.rtt/2, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		x.room += n
		w.send()
	})
	return n, nil
}

func (x *wired) Close() error {
	x.stop()
	x.w.mu.Lock()
	defer x.w.mu.Unlock()
	x.closed = true
	x.w.bodies = slices.DeleteFunc(x.w.bodies, func(y *wired) bool { return x == y })
	x.w.send()
	return nil
}

// far is an origin at the other end of a wire.
type far struct {
	*wire
	blobs  map[blockmap.Digest][]byte
	ranges int
}

func (o *far) OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error) {
	return o.open(ctx, o.blobs[blob][off:off+n])
}

func (o *far) Ranges() int { return o.ranges }

func (o *far) OpenRanges(ctx context.Context, blob blockmap.Digest, ranges []blockmap.Extent) (io.ReadCloser, error) {
	var b []byte
	for _, r := range ranges {
		b = append(b, o.blobs[blob][r.Start:r.End]...)
	}
	return o.open(ctx, b)
}

// large is an image whose stream 1 has n chunks of random bytes, of 64 KiB to size.
func large(t testing.TB, n, size int) *blocktest.Image {
	t.Helper()
	rng := rand.New(rand.NewPCG(uint64(n), uint64(size)))
	var chunks [][]byte
	blocks := 0
	for i := range n {
		c := make([]byte, size)
		if i%3 > 0 {
			c = c[:max(size/16*(1+rng.IntN(15)), 64<<10)/blockmap.BlockSize*blockmap.BlockSize]
		}
		for j := 0; j < len(c); j += 8 {
			v := rng.Uint64()
			for k := range 8 {
				c[j+k] = byte(v >> (8 * k))
			}
		}
		chunks = append(chunks, c)
		blocks += len(c) / blockmap.BlockSize
	}
	meta, metaBlob := blocktest.Stream(t, [][]byte{make([]byte, blockmap.BlockSize)})
	table, blob := blocktest.Stream(t, chunks)
	m := &blocktest.Image{
		Index: &blockmap.Index{Blocks: uint32(blocks), Streams: []blockmap.Table{*meta, *table}},
		Blobs: map[blockmap.Digest][]byte{meta.Blob: metaBlob, table.Blob: blob},
	}
	m.Index.Runs = []blockmap.Run{{Stream: 1, Count: uint32(blocks)}}
	if err := m.Index.Seal(); err != nil {
		t.Fatal(err)
	}
	return m
}

// world over a wire.
func (o *far) world(t testing.TB, m *blocktest.Image) (*world, *fetcher.Bound, []blockmap.Want) {
	w := newWorld(t, m, fetcher.Options{})
	o.blobs = m.Blobs
	table := &m.Index.Streams[1]
	s, err := w.cache.Stream(table)
	if err != nil {
		t.Fatal(err)
	}
	var wants []blockmap.Want
	for i := range table.Chunks {
		wants = append(wants, blockmap.Want{Stream: s, Table: table, Chunk: i})
	}
	return w, w.fetcher.From(o), wants
}

// ahead is what is prefetched while a reader demands chunks.
type besides string

const (
	alone  besides = "alone"
	replay besides = "replay"
	bundle besides = "bundle"
)

// demands reads chunks of the largest size, one after the other with pauses, and returns
// how long they took.
func demands(t *testing.T, o *far, m *blocktest.Image, with besides) (took []time.Duration, all time.Duration) {
	w, bound, wants := o.world(t, m)
	var list, cold []blockmap.Want
	for i, x := range wants {
		if i%9 == 3 && i > 10 { // one of the largest
			cold = append(cold, x)
		} else {
			list = append(list, x)
		}
	}
	// In a different order, so that neighbours do not share requests.
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	began := time.Now()
	var r *fetcher.Replay
	switch with {
	case replay:
		r = bound.Replay(t.Context(), list, fetcher.ReplayOptions{})
	case bundle:
		l := w.bundle(t, list)
		l.Open = func(ctx context.Context, off int64) (io.ReadCloser, error) { return o.open(ctx, l.frames[off:]) }
		r = bound.Replay(t.Context(), list, fetcher.ReplayOptions{Bundle: &l.Bundle})
	}
	time.Sleep(3 * time.Second)
	rng := rand.New(rand.NewPCG(3, 4))
	for _, x := range cold {
		if with != alone && !r.Progress().Ended.IsZero() {
			break
		}
		at := time.Now()
		if err := bound.Fetch(t.Context(), []blockmap.Want{x}); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(at))
		time.Sleep(time.Duration(500+rng.IntN(1000)) * time.Millisecond)
	}
	if with != alone {
		if err := r.Wait(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		all = time.Since(began)
		r.Stop()
	}
	w.fetcher.Close()
	slices.Sort(took)
	return took, all
}

// On a slow link a reader hardly waits longer while chunks are prefetched.
func TestDemandFirstOnTheLink(t *testing.T) {
	m := large(t, 70, 1<<20)
	for ranges, window := range map[int]int{1: 128 << 10, 16: 256 << 10} {
		median := make(map[besides]time.Duration)
		for _, with := range []besides{alone, replay, bundle} {
			synctest.Test(t, func(t *testing.T) {
				o := &far{wire: newWire(2e6, 20*time.Millisecond, window), ranges: ranges}
				took, all := demands(t, o, m, with)
				median[with] = took[len(took)/2]
				t.Logf("%d ranges, window of %d, %s: %d reads, median %v, most %v, all %v", ranges, window, with, len(took), median[with], took[len(took)-1], all)
			})
		}
		for _, with := range []besides{replay, bundle} {
			if median[with] > median[alone]*3/2 {
				t.Errorf("%d ranges, window of %d: a demand takes %v, and %v beside a %s", ranges, window, median[alone], median[with], with)
			}
		}
	}
}

// A replay takes as long as the link takes for its bytes.
func TestReplayFillsTheLink(t *testing.T) {
	images := make(map[int]*blocktest.Image) // by the size of their chunks
	for _, c := range []struct {
		rate float64
		rtt  time.Duration
		size int
	}{{25e6, 20 * time.Millisecond, 1 << 20}, {25e6, 20 * time.Millisecond, 128 << 10}, {2e6, 20 * time.Millisecond, 1 << 20}, {125e6, 20 * time.Millisecond, 1 << 20}} {
		m := images[c.size]
		if m == nil {
			m = large(t, 70, c.size)
			images[c.size] = m
		}
		for _, ranges := range []int{1, 16} {
			t.Run(fmt.Sprintf("%.0f MB/s, chunks of %d, %d ranges", c.rate/1e6, c.size, ranges), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					o := &far{wire: newWire(c.rate, c.rtt, 4<<20), ranges: ranges}
					w, bound, wants := o.world(t, m)
					rand.New(rand.NewPCG(1, 2)).Shuffle(len(wants), func(i, j int) { wants[i], wants[j] = wants[j], wants[i] })
					began := time.Now()
					r := bound.Replay(t.Context(), wants, fetcher.ReplayOptions{})
					if err := r.Wait(t.Context(), 1); err != nil {
						t.Fatal(err)
					}
					took := time.Since(began)
					r.Stop()
					least := time.Duration(float64(o.sent)/c.rate*float64(time.Second)) + c.rtt
					t.Logf("it took %v, the link's time is %v; %d requests", took, least, w.fetcher.Stats().Requests)
					if took > least+least/33+3*c.rtt {
						t.Errorf("it took %v, the link's time is %v", took, least)
					}
				})
			})
		}
	}
}

// A start reads in the order of its replay, and now and then a chunk that is not in it. On
// a fast link that costs the replay nothing.
func TestStartOnAFastLink(t *testing.T) {
	for _, size := range []int{1 << 20, 256 << 10} {
		m := large(t, 75, size)
		for _, ranges := range []int{1, 16} {
			for _, with := range []besides{replay, bundle} {
				synctest.Test(t, func(t *testing.T) {
					o := &far{wire: newWire(25e6, 20*time.Millisecond, 1<<20), ranges: ranges}
					w, bound, wants := o.world(t, m)
					rand.New(rand.NewPCG(1, 2)).Shuffle(len(wants), func(i, j int) { wants[i], wants[j] = wants[j], wants[i] })
					list, cold := wants[:65], wants[65:]
					var options fetcher.ReplayOptions
					if with == bundle {
						l := w.bundle(t, list)
						l.Open = func(ctx context.Context, off int64) (io.ReadCloser, error) { return o.open(ctx, l.frames[off:]) }
						options.Bundle = &l.Bundle
					}
					began := time.Now()
					r := bound.Replay(t.Context(), list, options)
					for i := range list {
						wanted := list[i : i+1]
						if i%7 == 6 {
							wanted = append(slices.Clone(wanted), cold[i/7])
						}
						if err := bound.Fetch(t.Context(), wanted); err != nil {
							t.Fatal(err)
						}
						time.Sleep(2 * time.Millisecond)
					}
					r.Stop()
					took, line := time.Since(began), time.Duration(float64(o.sent)/25e6*float64(time.Second))
					t.Logf("chunks of %d KiB, %d ranges, %s: %v, the link's time is %v", size>>10, ranges, with, took, line)
					if took > line+line/10+50*time.Millisecond {
						t.Errorf("chunks of %d KiB, %d ranges, %s: it took %v, and the link's time is %v", size>>10, ranges, with, took, line)
					}
				})
			}
		}
	}
}

// uneven is a far origin that sends one range slowly, over a link of its own.
type uneven struct {
	*far
	slow int64 // where the range begins
	body func(ctx context.Context, b []byte) io.Reader
}

func (o *uneven) OpenRange(ctx context.Context, blob blockmap.Digest, off, n int64) (io.ReadCloser, error) {
	if off == o.slow {
		return io.NopCloser(o.body(ctx, o.blobs[blob][off:off+n])), nil
	}
	return o.far.OpenRange(ctx, blob, off, n)
}

// slowly is a body that gets the same number of bytes after each pause.
type slowly struct {
	ctx   context.Context
	b     []byte
	n     int
	pause time.Duration
}

func (s *slowly) Read(p []byte) (int, error) {
	select {
	case <-time.After(s.pause):
	case <-s.ctx.Done():
		return 0, context.Cause(s.ctx)
	}
	n := copy(p, s.b[:min(s.n, len(s.b))])
	s.b = s.b[n:]
	return n, nil
}

// A demand that hangs in the middle, or trickles, does not stop prefetches.
func TestSlowDemandDoesNotStopTheRest(t *testing.T) {
	m := large(t, 70, 1<<20)
	for name, body := range map[string]func(ctx context.Context, b []byte) io.Reader{
		"hangs": func(ctx context.Context, b []byte) io.Reader {
			return io.MultiReader(&slowly{ctx, b[:200_000], 20_000, 10 * time.Millisecond}, &slowly{ctx, b[200_000:], 1, time.Hour})
		},
		"trickles": func(ctx context.Context, b []byte) io.Reader { return &slowly{ctx, b, 1000, 50 * time.Millisecond} },
	} {
		for _, with := range []besides{replay, bundle} {
			t.Run(fmt.Sprintf("%s beside a %s", name, with), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					o := &uneven{far: &far{wire: newWire(2e6, 20*time.Millisecond, 128<<10), ranges: 1}, body: body}
					w, _, wants := o.world(t, m)
					cold, list := wants[0], wants[1:]
					o.slow = cold.Table.Chunks[0].Offset
					bound := w.fetcher.From(o)
					var options fetcher.ReplayOptions
					if with == bundle {
						l := w.bundle(t, list)
						l.Open = func(ctx context.Context, off int64) (io.ReadCloser, error) { return o.open(ctx, l.frames[off:]) }
						options.Bundle = &l.Bundle
					}
					began := time.Now()
					r := bound.Replay(t.Context(), list, options)
					time.Sleep(3 * time.Second)
					ctx, cancel := context.WithCancel(t.Context())
					read := make(chan error)
					go func() { read <- bound.Fetch(ctx, []blockmap.Want{cold}) }()
					if err := r.Wait(t.Context(), 1); err != nil {
						t.Error(err)
					}
					took, line := time.Since(began), time.Duration(float64(o.sent)/2e6*float64(time.Second))
					if took > line+2500*time.Millisecond {
						t.Errorf("it took %v, and the link's time is %v", took, line)
					}
					cancel()
					<-read
					r.Stop()
				})
			})
		}
	}
}
