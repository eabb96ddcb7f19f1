package fetcher_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// load is a bundle of all contents of a world, and the server that it comes from, which
// sends as many bytes as a test allows.
type load struct {
	fetcher.Bundle
	frames []byte
	ends   []int64 // of each part in the frames

	mu     sync.Mutex
	cond   *sync.Cond
	free   int64         // bytes that may be sent
	brk    error         // the error after these bytes; nil to hang then
	refuse error         // the error of Open
	steps  []int64       // the values of free for each Open, while there are some
	pace   time.Duration // before each part
	opened []int64
	closed int
	alive  int
}

// bundle makes a bundle of the world's contents, in the order of the wants.
func (w *world) bundle(t *testing.T, wants []blockmap.Want) *load {
	t.Helper()
	l := &load{free: 1 << 40}
	l.cond = sync.NewCond(&l.mu)
	parts := make(map[blockmap.Digest]int)
	size := 0
	for _, x := range wants {
		size += int(x.Table.Chunks[x.Chunk].Stored)
	}
	l.frames = make([]byte, 0, size)
	for _, x := range wants {
		c := &x.Table.Chunks[x.Chunk]
		i, ok := parts[c.Digest]
		if !ok {
			i = len(l.Frames)
			parts[c.Digest] = i
			l.Frames = append(l.Frames, fetcher.Frame{Stored: int64(c.Stored), Parts: []fetcher.Part{{Count: c.Leaves(), Size: c.Size()}}})
			l.frames = append(l.frames, w.Blobs[x.Table.Blob][c.Offset:][:c.Stored]...)
			l.ends = append(l.ends, int64(len(l.frames)))
		}
		l.part(i).Wants = append(l.part(i).Wants, x)
	}
	l.Open = l.open
	l.Close = func() { l.mu.Lock(); l.closed++; l.mu.Unlock() }
	return l
}

// part is the part of a frame that has one.
func (l *load) part(frame int) *fetcher.Part { return &l.Frames[frame].Parts[0] }

// replace gives part i another frame.
func (l *load) replace(i int, frame []byte) {
	begin := l.ends[i] - l.Frames[i].Stored
	l.frames = slices.Concat(l.frames[:begin], frame, l.frames[l.ends[i]:])
	for j := i; j < len(l.ends); j++ {
		l.ends[j] += int64(len(frame)) - l.Frames[i].Stored
	}
	l.Frames[i].Stored = int64(len(frame))
}

// let allows free bytes to be sent, and sets what happens after these.
func (l *load) let(free int64, brk error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.free, l.brk = free, brk
	l.cond.Broadcast()
}

func (l *load) opens() []int64 { l.mu.Lock(); defer l.mu.Unlock(); return slices.Clone(l.opened) }

func (l *load) open(ctx context.Context, off int64) (io.ReadCloser, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.opened = append(l.opened, off)
	if len(l.steps) > 0 {
		l.free, l.steps = l.steps[0], l.steps[1:]
	}
	if l.refuse != nil {
		return nil, l.refuse
	}
	if off != 0 && !slices.Contains(l.ends, off) {
		return nil, fmt.Errorf("opened at %d, which is not the start of a part", off)
	}
	l.alive++
	b := &loadBody{l: l, ctx: ctx, off: off}
	b.stop = context.AfterFunc(ctx, func() { l.mu.Lock(); defer l.mu.Unlock(); l.cond.Broadcast() })
	return b, nil
}

type loadBody struct {
	l    *load
	ctx  context.Context
	off  int64
	stop func() bool
}

func (b *loadBody) Read(p []byte) (int, error) {
	l := b.l
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pace > 0 && (b.off == 0 || slices.Contains(l.ends, b.off)) {
		l.mu.Unlock()
		time.Sleep(l.pace)
		l.mu.Lock()
	}
	for b.off >= l.free && l.brk == nil && b.ctx.Err() == nil {
		l.cond.Wait()
	}
	switch {
	case b.ctx.Err() != nil:
		return 0, context.Cause(b.ctx)
	case b.off >= l.free:
		return 0, l.brk
	case b.off == int64(len(l.frames)):
		return 0, io.EOF
	}
	end := min(l.free, int64(len(l.frames)))
	if i, _ := slices.BinarySearch(l.ends, b.off+1); i < len(l.ends) {
		end = min(end, l.ends[i]) // so that pace is each part's
	}
	n := copy(p, l.frames[b.off:end])
	b.off += int64(n)
	return n, nil
}

func (b *loadBody) Close() error {
	b.stop()
	b.l.mu.Lock()
	defer b.l.mu.Unlock()
	b.l.alive--
	return nil
}

// replay starts a replay of the bundle, and of wants behind it.
func (w *world) replay(t *testing.T, l *load, wants []blockmap.Want) *fetcher.Replay {
	t.Helper()
	r := w.fetcher.From(w.origin).Replay(t.Context(), wants, fetcher.ReplayOptions{Bundle: &l.Bundle})
	t.Cleanup(r.Stop)
	return r
}

// resident counts the wants that are resident.
func resident(wants []blockmap.Want) (n int) {
	for _, x := range wants {
		if x.Stream.Has(x.Chunk) {
			n++
		}
	}
	return n
}

// leavesOf counts the leaves of chunks.
func leavesOf(wants []blockmap.Want) (n int64) {
	for _, x := range wants {
		n += int64(x.Table.Chunks[x.Chunk].Leaves())
	}
	return n
}

// fetch demands one chunk, and returns how long that took.
func (w *world) fetch(t *testing.T, x blockmap.Want) time.Duration {
	t.Helper()
	began := time.Now()
	if err := w.fetcher.From(w.origin).Fetch(t.Context(), []blockmap.Want{x}); err != nil {
		t.Error(err)
	}
	if !x.Stream.Has(x.Chunk) {
		t.Error("the chunk that was fetched is not resident")
	}
	return time.Since(began)
}

func (w *world) checkAll(t *testing.T) {
	t.Helper()
	if err := w.read(t.Context(), w.all()); err != nil {
		t.Error(err)
	}
}

func checkDone(t *testing.T, r *fetcher.Replay) {
	t.Helper()
	if err := r.Wait(t.Context(), 1); err != nil {
		t.Errorf("%v", err)
	}
	// The test knows that all chunks are here before the last request has been cleaned
	// up.
	settled(t, "the replay has ended", func() bool { return !r.Progress().Ended.IsZero() })
	if p := r.Progress(); p.DoneChunks != p.Chunks || p.DoneBytes != p.Bytes || p.Failed != 0 || p.Err != nil {
		t.Errorf("%+v", p)
	}
}

// settled waits until ok, for a minute at most.
func settled(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// stats returns the counts when nothing is being fetched any more. Readers go on as soon as a
// chunk is resident, and its fetch is counted, kept for peers and ended a moment later.
func (w *world) stats(t testing.TB) fetcher.Stats {
	t.Helper()
	settled(t, "all fetches and requests have ended", func() bool { return w.fetcher.Fetches() == 0 && w.fetcher.Stats().InFlight == 0 })
	return w.fetcher.Stats()
}

// A bundle makes all chunks with its contents resident, in its order, and nothing else is
// asked of the origin.
func TestBundle(t *testing.T) {
	m := blocktest.NewImage(t, 40, 1500)
	w := newWorld(t, m, fetcher.Options{})
	wants := w.wants(t)
	rand.New(rand.NewPCG(1, 1)).Shuffle(len(wants), func(i, j int) { wants[i], wants[j] = wants[j], wants[i] })
	l := w.bundle(t, wants)
	if len(l.Frames) == len(wants) {
		t.Fatal("no content is in two places")
	}
	l.let(l.ends[9], nil)
	r := w.replay(t, l, wants)
	var first int
	for _, p := range l.Frames[:10] {
		p := p.Parts[0]
		first += len(p.Wants)
	}
	settled(t, "ten parts are here", func() bool { return resident(wants) == first })
	if err := r.Wait(t.Context(), 0.01); err != nil {
		t.Error(err)
	}
	l.let(l.ends[10]-1, nil)
	time.Sleep(5 * time.Millisecond)
	if n := resident(wants); n != first {
		t.Errorf("%d chunks are resident, %d were sent", n, first)
	}
	for _, p := range l.Frames[:10] {
		p := p.Parts[0]
		if resident(p.Wants) != len(p.Wants) {
			t.Error("a part is missing and a later one is resident")
		}
	}
	short, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if err := r.Wait(short, 0.9); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait for more than has arrived: %v", err)
	}
	l.let(1<<40, nil)
	checkDone(t, r)
	w.checkAll(t)
	r.Stop()
	if n := w.origin.Requests(); n != 0 || len(l.opens()) != 1 || l.closed != 1 || l.alive != 0 {
		t.Errorf("%d requests beside the bundle, which was opened at %v, closed %d times, %d bodies left", n, l.opens(), l.closed, l.alive)
	}
	if st := w.stats(t); st.Requests != 1 || st.Leaves != leavesOf(wants) || st.Chunks != 0 || st.Bytes != int64(len(l.frames)) || st.InFlight != 0 {
		t.Errorf("%+v", st)
	}
}

// Parts that no chunk of the image has are skipped.
func TestBundleOfMore(t *testing.T) {
	w := newWorld(t, blocktest.NewImage(t, 41, 600), fetcher.Options{})
	wants := w.wants(t)
	l := w.bundle(t, wants)
	left := 0
	for i := range l.Frames {
		if i%4 == 1 {
			left += len(l.part(i).Wants)
			l.part(i).Wants = nil
		}
	}
	r := w.replay(t, l, nil)
	checkDone(t, r)
	if n := resident(wants); n != len(wants)-left || w.origin.Requests() > 0 {
		t.Errorf("%d of %d chunks are resident, %d requests", n, len(wants)-left, w.origin.Requests())
	}
	w.checkAll(t)
}

// A reader waits for the bundle if the chunk comes soon by it, and not if the chunk is
// far away in it.
func TestReadersOfABundle(t *testing.T) {
	m := blocktest.NewImage(t, 42, 3000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		w.origin.Set(blocktest.Faults{Delay: 30 * time.Millisecond})
		wants := w.wants(t)
		l := w.bundle(t, wants)
		l.pace = 10 * time.Millisecond
		r := w.replay(t, l, nil)
		time.Sleep(105 * time.Millisecond)
		// Ten parts have arrived, the next one arrives in 5 ms.
		if d := w.fetch(t, l.part(10).Wants[0]); d > 20*time.Millisecond || w.origin.Requests() != 0 {
			t.Errorf("the next part took %v and %d requests", d, w.origin.Requests())
		}
		if d := w.fetch(t, l.part(12).Wants[0]); d > 40*time.Millisecond || w.origin.Requests() != 0 {
			t.Errorf("the part after the next took %v and %d requests", d, w.origin.Requests())
		}
		last := l.part(len(l.Frames) - 2).Wants[0]
		if d := w.fetch(t, last); d > 50*time.Millisecond || w.origin.Requests() != 1 {
			t.Errorf("the last part took %v and %d requests", d, w.origin.Requests())
		}
		checkDone(t, r)
		if n := w.origin.Requests(); n != 1 {
			t.Errorf("%d requests", n)
		}
		late := int64(last.Table.Chunks[last.Chunk].Leaves())
		if st := w.fetcher.Stats(); st.Chunks != 1 || st.Leaves != leavesOf(wants)-late {
			t.Errorf("%d leaves and %d chunks were fetched of %d leaves: resident chunks were fetched again", st.Leaves, st.Chunks, leavesOf(wants))
		}
		w.checkAll(t)
	})
}

// A bundle that hangs delays one reader for a short time, and the next ones not at all,
// whatever the bounds are and however long it has hung.
func TestBundleHangs(t *testing.T) {
	m := blocktest.NewImage(t, 43, 1500)
	for _, o := range []fetcher.Options{{}, {MaxRequests: 1}, {MaxBytes: 1 << 20}} {
		for _, parts := range []int{0, 1, 5} {
			for _, late := range []time.Duration{0, 10 * time.Second} {
				t.Run(fmt.Sprintf("%d parts of %d requests after %v", parts, o.MaxRequests, late), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						w := newWorld(t, m, o)
						w.origin.Set(blocktest.Faults{Delay: 30 * time.Millisecond})
						l := w.bundle(t, w.wants(t))
						l.pace = time.Millisecond
						if parts == 0 {
							l.let(0, nil)
						} else {
							l.let(l.ends[parts-1], nil)
						}
						r := w.replay(t, l, nil)
						time.Sleep(20*time.Millisecond + late)
						if d := w.fetch(t, l.part(parts).Wants[0]); d > 2200*time.Millisecond {
							t.Errorf("the first reader of a bundle that hangs waited for %v", d)
						}
						if d := w.fetch(t, l.part(parts + 1).Wants[0]); d > 50*time.Millisecond {
							t.Errorf("the second reader waited for %v", d)
						}
						// It continues after all.
						l.let(1<<40, nil)
						checkDone(t, r)
						if n := w.origin.Requests(); n != 2 {
							t.Errorf("%d requests for two readers", n)
						}
						w.checkAll(t)
					})
				})
			}
		}
	}
}

// warnings counts what a log says.
type warnings struct {
	sync.Mutex
	bytes.Buffer
}

func (s *warnings) Write(p []byte) (int, error) { s.Lock(); defer s.Unlock(); return s.Buffer.Write(p) }

func (s *warnings) log() *slog.Logger {
	return slog.New(slog.NewTextHandler(s, &slog.HandlerOptions{Level: slog.LevelInfo}))
}

func (s *warnings) lines() []string {
	s.Lock()
	defer s.Unlock()
	return slices.DeleteFunc(strings.Split(s.String(), "\n"), func(l string) bool { return l == "" })
}

func frameOf(t testing.TB, content []byte) []byte {
	t.Helper()
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	return enc.EncodeAll(content, nil)
}

// The download of a bundle ends at the first wrong part; the other chunks are fetched one
// by one, and nothing is lost or counted wrong.
func TestBundleLies(t *testing.T) {
	m := blocktest.NewImage(t, 44, 1500)
	for name, alter := range map[string]func(frame []byte) []byte{
		"a bit":         func(f []byte) []byte { f = bytes.Clone(f); f[len(f)/2] ^= 16; return f },
		"short":         func(f []byte) []byte { return f[:len(f)-1] },
		"empty":         func([]byte) []byte { return nil },
		"longer":        func(f []byte) []byte { return append(bytes.Clone(f), 1, 2, 3) },
		"no frame":      func(f []byte) []byte { return make([]byte, len(f)) },
		"other content": func([]byte) []byte { return frameOf(t, random(8*blockmap.BlockSize)) },
		"one too many":  func(f []byte) []byte { return append(bytes.Clone(f), frameOf(t, random(blockmap.BlockSize))...) },
		"a bomb":        func([]byte) []byte { return frameOf(t, make([]byte, 256<<20)) },
	} {
		t.Run(name, func(t *testing.T) {
			var log warnings
			w := newWorld(t, m, fetcher.Options{MaxRequest: 1, Log: log.log()})
			wants := w.wants(t)
			l := w.bundle(t, wants)
			const bad = 7
			frame := l.frames[l.ends[bad]-l.Frames[bad].Stored : l.ends[bad]]
			l.replace(bad, alter(frame))
			// The maker of the bundle is at fault. The server that sends it is not
			// distrusted.
			var doubts atomic.Int64
			l.Open = func(ctx context.Context, off int64) (io.ReadCloser, error) {
				rc, err := l.open(ctx, off)
				return doubted{rc, &doubts}, err
			}
			r := w.replay(t, l, wants)
			checkDone(t, r)
			if n := doubts.Load(); n != 0 {
				t.Errorf("its sender was distrusted %d times", n)
			}
			w.checkAll(t)
			if lines := log.lines(); len(lines) != 1 || !strings.Contains(lines[0], "one by one") || !strings.Contains(lines[0], "digest") {
				t.Errorf("it says:\n%s", strings.Join(lines, "\n"))
			}
			if st := w.stats(t); st.Wrong != 1 || st.Failed != 0 || len(l.opens()) != 1 {
				t.Errorf("%+v, opened at %v", st, l.opens())
			}
			for a, n := range w.origin.Asked() {
				if n != 1 {
					t.Errorf("%v was asked for %d times", a, n)
				}
			}
			if n := w.origin.Requests(); n > len(l.Frames)-1 {
				t.Errorf("%d requests for at most %d contents that were left", n, len(l.Frames)-1)
			}
		})
	}
}

// doubted is a body that counts how often it is distrusted.
type doubted struct {
	io.ReadCloser
	n *atomic.Int64
}

func (d doubted) Distrust() { d.n.Add(1) }

func random(n int) []byte {
	rng := rand.New(rand.NewPCG(uint64(n), 9))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// A download that breaks off resumes behind the last whole part.
func TestBundleBreaks(t *testing.T) {
	m := blocktest.NewImage(t, 45, 1500)
	for name, brk := range map[string]error{"cut": io.EOF, "broken": blocktest.ErrInjected} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, m, fetcher.Options{Backoff: time.Millisecond})
			wants := w.wants(t)
			l := w.bundle(t, wants)
			l.steps = []int64{l.ends[3] + 100, l.ends[4], l.ends[4] + 1, l.ends[20] - 1, 1 << 40}
			l.brk = brk
			r := w.replay(t, l, nil)
			checkDone(t, r)
			w.checkAll(t)
			if want := []int64{0, l.ends[3], l.ends[4], l.ends[4], l.ends[19]}; !slices.Equal(l.opens(), want) {
				t.Errorf("resumed at %v, want %v", l.opens(), want)
			}
			if n := w.origin.Requests(); n > 0 {
				t.Errorf("%d requests beside the bundle", n)
			}
			if l.alive != 0 || l.closed != 1 {
				t.Errorf("%d bodies are open, closed %d times", l.alive, l.closed)
			}
		})
	}
}

// A download ends after three tries without progress, or with a permanent error.
func TestBundleIsGivenUp(t *testing.T) {
	m := blocktest.NewImage(t, 46, 1500)
	gone := errors.New("gone for good")
	for name, c := range map[string]struct {
		set   func(*load)
		opens int
	}{
		"breaks at once": {func(l *load) { l.let(0, blocktest.ErrInjected) }, 3},
		"ends at once":   {func(l *load) { l.let(0, io.EOF) }, 3},
		"breaks later":   {func(l *load) { l.let(l.ends[5]+1, blocktest.ErrInjected) }, 3},
		"gone later":     {func(l *load) { l.let(l.ends[5]+1, gone) }, 1},
		"refused":        {func(l *load) { l.refuse = blocktest.ErrInjected }, 3},
		"gone":           {func(l *load) { l.refuse = gone }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log warnings
				w := newWorld(t, m, fetcher.Options{Log: log.log(), MaxRequest: 1, Temporary: func(err error) bool { return !errors.Is(err, gone) }})
				wants := w.wants(t)
				w.origin.Set(blocktest.Faults{Delay: 5 * time.Millisecond})
				l := w.bundle(t, wants)
				c.set(l)
				r := w.replay(t, l, wants)
				checkDone(t, r)
				w.checkAll(t)
				if len(l.opens()) != c.opens || l.closed != 1 || len(log.lines()) != 1 {
					t.Errorf("opened at %v, closed %d times; it says\n%v", l.opens(), l.closed, log.lines())
				}
				for a, n := range w.origin.Asked() {
					if n != 1 {
						t.Errorf("%v was asked for %d times", a, n)
					}
				}
				if n := w.origin.Requests(); n > len(l.Frames) {
					t.Errorf("%d requests for %d contents: content in two places was fetched twice", n, len(l.Frames))
				}
			})
		})
	}
}

// A chunk that a bundle has not brought in a minute is still tried for RetryFor.
func TestBundleDoesNotUseUpTheRetries(t *testing.T) {
	m := blocktest.NewImage(t, 47, 600)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		wants := w.wants(t)
		l := w.bundle(t, wants)
		l.let(l.ends[2], nil)
		r := w.replay(t, l, wants)
		time.Sleep(time.Minute)
		w.origin.Set(blocktest.Faults{Err: blocktest.ErrInjected})
		l.let(l.ends[2], blocktest.ErrInjected)
		read := make(chan time.Duration)
		go func() { read <- w.fetch(t, l.part(9).Wants[0]) }()
		time.Sleep(10 * time.Second)
		w.origin.Set(blocktest.Faults{})
		<-read
		checkDone(t, r)
	})
}

// A disk that fails while the last part is written costs that part alone.
func TestBundleOnABadDisk(t *testing.T) {
	m := blocktest.NewImage(t, 54, 600)
	fs := blocktest.NewFS()
	cache, err := blockmap.OpenCache(t.TempDir(), blockmap.CacheOptions{FS: fs})
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	w := &world{Image: m, origin: blocktest.NewOrigin(m), cache: cache, fetcher: fetcher.New(fetcher.Options{MaxRequest: 1, Backoff: time.Millisecond})}
	defer w.fetcher.Close()
	l := w.bundle(t, w.wants(t))
	last := l.part(len(l.Frames) - 1).Wants
	l.let(l.ends[len(l.ends)-2], nil)
	r := w.replay(t, l, nil)
	settled(t, "all but the last part are here", func() bool { return r.Progress().DoneChunks == r.Progress().Chunks-int64(len(last)) })
	var once sync.Once
	fs.Fail(func(op, path string) (err error) {
		if op == "write" && strings.HasSuffix(path, "data") {
			once.Do(func() { err = blocktest.ErrInjected })
		}
		return err
	})
	l.let(1<<40, nil)
	checkDone(t, r)
	r.Stop()
	if resident(last) != len(last) || w.origin.Requests() != 1 || len(l.opens()) != 1 {
		t.Errorf("%d of %d are resident; %d requests, opened at %v", resident(last), len(last), w.origin.Requests(), l.opens())
	}
}

// A bundle that is mostly resident is not downloaded.
func TestBundleOfWhatIsHere(t *testing.T) {
	m := blocktest.NewImage(t, 48, 1500)
	w := newWorld(t, m, fetcher.Options{MaxRequest: 1})
	wants := w.wants(t)
	l := w.bundle(t, wants)
	var here []blockmap.Want
	for i, p := range l.Frames {
		p := p.Parts[0]
		if i%4 != 0 {
			here = append(here, p.Wants[0]) // the other places are filled from this one
		}
	}
	if err := w.fetcher.From(w.origin).Fetch(t.Context(), here); err != nil {
		t.Fatal(err)
	}
	before := w.origin.Requests()
	r := w.replay(t, l, wants)
	checkDone(t, r)
	r.Stop()
	if n := w.origin.Requests() - before; len(l.opens()) > 0 || l.closed != 1 || n != len(l.Frames)-len(here) {
		t.Errorf("opened %v, closed %d times, %d requests for %d parts", l.opens(), l.closed, n, len(l.Frames)-len(here))
	}
	w.checkAll(t)
	l = w.bundle(t, wants)
	r = w.replay(t, l, nil)
	checkDone(t, r)
	r.Stop()
	if len(l.opens()) > 0 || l.closed != 1 {
		t.Error("a bundle that is resident was downloaded")
	}
}

// When a bundle is stopped, a reader that waits for it gets its chunk by a request.
func TestBundleIsStopped(t *testing.T) {
	m := blocktest.NewImage(t, 49, 1500)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1})
		wants := w.wants(t)
		l := w.bundle(t, wants)
		l.pace = 100 * time.Millisecond
		l.let(l.ends[6]-1, nil)
		r := w.replay(t, l, wants)
		time.Sleep(750 * time.Millisecond)
		read := make(chan time.Duration)
		go func() { read <- w.fetch(t, l.part(6).Wants[0]) }()
		synctest.Wait()
		if w.origin.Requests() > 0 {
			t.Fatal("the reader does not wait for the bundle")
		}
		r.Stop()
		if d := <-read; d > 10*time.Millisecond {
			t.Errorf("a reader waited for %v after Stop", d)
		}
		time.Sleep(time.Minute)
		if n := w.origin.Requests(); n != 1 || l.alive != 0 || l.closed != 1 {
			t.Errorf("%d requests for one reader, %d bodies open, closed %d times", n, l.alive, l.closed)
		}
		err := r.Wait(t.Context(), 1)
		if !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "%!") {
			t.Errorf("Wait says %v", err)
		}
		w.checkAll(t)
	})
}

// Close ends a bundle download at any point.
func TestCloseEndsABundle(t *testing.T) {
	m := blocktest.NewImage(t, 50, 1500)
	for i := range 30 {
		w := newWorld(t, m, fetcher.Options{})
		wants := w.wants(t)
		l := w.bundle(t, wants)
		l.let(l.ends[len(l.ends)*(i%10+1)/10-1], nil)
		r := w.replay(t, l, wants)
		waited := make(chan error)
		go func() { waited <- w.fetcher.From(w.origin).Fetch(t.Context(), wants[len(wants)-1:]) }()
		time.Sleep(time.Duration(i) * 300 * time.Microsecond)
		w.fetcher.Close()
		if err := <-waited; err != nil && !errors.Is(err, blockmap.ErrClosed) {
			t.Errorf("a reader got %v", err)
		}
		if err := r.Wait(t.Context(), 1); err == nil && resident(wants) < len(wants) {
			t.Error("Wait reports that everything has arrived")
		} else if err != nil && strings.Contains(err.Error(), "%!") {
			t.Error(err)
		}
		if l.alive != 0 {
			t.Errorf("%d bodies are left open", l.alive)
		}
		// A later download ends at once.
		again := w.bundle(t, wants)
		w.replay(t, again, wants).Stop()
		if again.closed != 1 || again.alive != 0 {
			t.Error("a bundle that came too late is not closed")
		}
	}
}

// The rate limit holds for a bundle, too.
func TestBundleRate(t *testing.T) {
	m := blocktest.NewImage(t, 51, 12000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		const rate = 4 << 20
		l := w.bundle(t, w.wants(t))
		r := w.fetcher.From(w.origin).Replay(t.Context(), nil, fetcher.ReplayOptions{Rate: rate, Bundle: &l.Bundle})
		checkDone(t, r)
		least := time.Duration(float64(len(l.frames)-16<<20) / rate * float64(time.Second))
		if took := time.Since(r.Progress().Began); took < least || took > least+8*time.Second {
			t.Errorf("%d bytes took %v, at %d a second", len(l.frames), took, rate)
		}
	})
}

// Two starts at once with the same plan fetch each content once, and the one that ends
// early takes nothing from the other.
func TestTwoReplays(t *testing.T) {
	m := blocktest.NewImage(t, 52, 1500)
	for _, bundle := range []bool{false, true} {
		for _, stop := range []bool{false, true} {
			t.Run(fmt.Sprintf("bundle %v, stopped %v", bundle, stop), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, m, fetcher.Options{MaxRequest: 1, MaxRequests: 4})
					w.origin.Set(blocktest.Faults{Delay: 5 * time.Millisecond})
					wants := w.wants(t)
					var rs []*fetcher.Replay
					var ls []*load
					for range 2 {
						var o fetcher.ReplayOptions
						if bundle {
							l := w.bundle(t, wants)
							l.pace = 2 * time.Millisecond
							ls = append(ls, l)
							o.Bundle = &l.Bundle
						}
						rs = append(rs, w.fetcher.From(w.origin).Replay(t.Context(), wants, o))
						t.Cleanup(rs[len(rs)-1].Stop)
						synctest.Wait()
					}
					if stop {
						time.Sleep(50 * time.Millisecond)
						rs[0].Stop()
					} else {
						checkDone(t, rs[0])
					}
					checkDone(t, rs[1])
					contents := make(map[blockmap.Digest]bool)
					for _, x := range wants {
						contents[x.Table.Chunks[x.Chunk].Digest] = true
					}
					requests := w.origin.Requests()
					if bundle {
						if len(ls[0].opens()) != 1 || len(ls[1].opens()) != 0 || ls[1].closed != 1 {
							t.Errorf("opened at %v and %v", ls[0].opens(), ls[1].opens())
						}
						if !stop && requests > 0 {
							t.Errorf("%d requests beside the bundle", requests)
						}
					} else if requests != len(contents) {
						t.Errorf("%d requests for %d contents", requests, len(contents))
					}
					for a, n := range w.origin.Asked() {
						if n != 1 {
							t.Errorf("%v was asked for %d times", a, n)
						}
					}
					w.checkAll(t)
				})
			})
		}
	}
}

// Reads, prefetches, replays and bundles at once, in a cache that is too small for them:
// every read gets the right bytes.
func TestSoak(t *testing.T) {
	m := blocktest.NewImage(t, 53, 2500)
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	for round := range rounds {
		rng := rand.New(rand.NewPCG(uint64(round), 53))
		quota := int64(0)
		if round%2 == 1 {
			quota = int64(len(m.Content)) / 3
		}
		cache, err := blockmap.OpenCache(t.TempDir(), blockmap.CacheOptions{Quota: quota, FS: threads{blockmap.OS}})
		if err != nil {
			t.Fatal(err)
		}
		w := &world{Image: m, origin: blocktest.NewOrigin(m), cache: cache,
			fetcher: fetcher.New(fetcher.Options{Backoff: time.Millisecond, MaxRequests: 1 + rng.IntN(16)})}
		bound := w.fetcher.From(w.origin)
		if round%3 == 0 {
			bound.ReadAhead(0)
		}
		if w.device, err = blockmap.NewImage(m.Index, cache, bound); err != nil {
			t.Fatal(err)
		}
		wants := w.wants(t)
		var wg, faults sync.WaitGroup
		stop := make(chan struct{})
		faults.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(round), 54))
			for {
				all := []blocktest.Faults{{}, {Err: blocktest.ErrInjected, ErrEach: 3}, {Cut: true, Left: 3}, {Break: blocktest.ErrInjected, Left: 3},
					{Flip: true, Left: 2}, {Delay: time.Millisecond}}
				w.origin.Set(all[rng.IntN(len(all))])
				select {
				case <-stop:
					return
				case <-time.After(time.Duration(rng.IntN(5000)) * time.Microsecond):
				}
			}
		})
		for i := range 2 {
			seed := rng.Uint64()
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(seed, uint64(i)))
				for range 3 {
					list := slices.Clone(wants)
					rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
					l := w.bundle(t, list)
					if rng.IntN(2) == 0 {
						all := w.leaves(t, 1, rng.Uint64())
						l = w.bundleLeaves(t, all[rng.IntN(len(all)/2):], 1+rng.IntN(8))
					}
					free := rng.Int64N(2 * int64(len(l.frames)))
					switch rng.IntN(4) {
					case 0:
						l.let(free, nil)
					case 1:
						l.let(free, blocktest.ErrInjected)
					case 2:
						l.replace(rng.IntN(len(l.Frames)), random(100))
					}
					r := w.fetcher.From(w.origin).Replay(t.Context(), list, fetcher.ReplayOptions{Bundle: &l.Bundle})
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rng.IntN(60))*time.Millisecond)
					r.Wait(ctx, 1)
					cancel()
					r.Stop()
				}
			})
		}
		for i := range 8 {
			seed := rng.Uint64()
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(seed, uint64(i)))
				for range 40 {
					n := 1 + rng.Int64N(200_000)
					if err := w.read(t.Context(), blockmap.Range(rng.Int64N(w.device.Size()-n), n)); err != nil && !errors.Is(err, blockmap.ErrDigest) &&
						!(quota > 0 && errors.Is(err, blockmap.ErrNoSpace)) { // all chunks may be in use at once
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		close(stop)
		faults.Wait()
		w.origin.Set(blocktest.Faults{})
		for at := int64(0); at < w.device.Size(); at += 1 << 20 {
			if err := w.read(t.Context(), blockmap.Extent{Start: at, End: min(at+1<<20, w.device.Size())}); err != nil {
				t.Error(err)
			}
		}
		settled(t, "no request is left", func() bool { return w.fetcher.Stats().InFlight == 0 })
		w.fetcher.Close()
		if err := cache.Close(); err != nil {
			t.Error(err)
		}
		if n := w.origin.Alive(); n != 0 {
			t.Errorf("%d bodies are left open", n)
		}
	}
}
