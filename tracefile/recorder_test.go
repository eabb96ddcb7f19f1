package tracefile_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/klauspost/compress/zstd"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/tracefile"
)

// direct is a fetcher that fetches in the simplest way.
type direct struct {
	mu     sync.Mutex
	origin *blocktest.Origin
	dec    *zstd.Decoder
}

func (d *direct) Fetch(ctx context.Context, wants []blockmap.Want) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, w := range wants {
		if w.Stream.Has(w.Chunk) {
			continue
		}
		c := w.Table.Chunks[w.Chunk]
		body, err := d.origin.OpenRange(ctx, w.Table.Blob, c.Offset, int64(c.Stored))
		if err != nil {
			return err
		}
		b, err := io.ReadAll(body)
		body.Close()
		if err == nil {
			b, err = d.dec.DecodeAll(b, nil)
		}
		if err == nil {
			err = w.Stream.Fill(w.Chunk, b)
		}
		if err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (d *direct) Prefetch(wants []blockmap.Want) { _ = d.Fetch(context.Background(), wants) }

func newDirect(t testing.TB, m *blocktest.Image) *direct {
	t.Helper()
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(dec.Close)
	return &direct{origin: blocktest.NewOrigin(m), dec: dec}
}

func newImage(t testing.TB, m *blocktest.Image) (*blockmap.Image, *blockmap.Cache) {
	t.Helper()
	c, err := blockmap.OpenCache(t.TempDir(), blockmap.CacheOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	image, err := blockmap.NewImage(m.Index, c, newDirect(t, m))
	if err != nil {
		t.Fatal(err)
	}
	return image, c
}

// memory is a device of zeros, of which the blocks below resident are here.
type memory struct {
	blocks   uint32
	resident int64
	fault    func(context.Context) error
}

func (m *memory) Size() int64 { return int64(m.blocks) * blockmap.BlockSize }

func (m *memory) View(e blockmap.Extent) (v blockmap.View, ok bool) {
	if e.Check(m.Size()) != nil || e.End > m.resident*blockmap.BlockSize {
		return v, false
	}
	v.AppendZeros(e.Len())
	return v, true
}

func (m *memory) Load(_ context.Context, e blockmap.Extent) (v blockmap.View, ok bool) {
	return m.View(e)
}

func (m *memory) Fault(ctx context.Context, e blockmap.Extent) error {
	if m.fault != nil {
		return m.fault(ctx)
	}
	return e.Check(m.Size())
}

func (m *memory) Status(e blockmap.Extent) blockmap.Status {
	return blockmap.Status{Extent: e, Zero: true, Resident: e.End <= m.resident*blockmap.BlockSize}
}

func (m *memory) Prefetch(blockmap.Extent) {}

func view(d blockmap.Device, block, count int64) {
	v, _ := d.View(blockmap.Range(block*blockmap.BlockSize, count*blockmap.BlockSize))
	v.Release()
}

// stop ends a recording and reads what it has written.
func stop(t testing.TB, r *tracefile.Recorder, b *bytes.Buffer) *tracefile.Trace {
	t.Helper()
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	tr := decode(t, b.Bytes())
	if tr.Cut != nil || tr.End != r.End() {
		t.Fatalf("the recording ends with %+v (cut: %v), and is said to with %+v", tr.End, tr.Cut, r.End())
	}
	return tr
}

func TestRecorderConforms(t *testing.T) {
	m := blocktest.NewImage(t, 7, 3000)
	blocktest.TestDevice(t, m.Content, func(t *testing.T) blockmap.Device {
		image, _ := newImage(t, m)
		var b bytes.Buffer
		r := tracefile.NewRecorder(image, tracefile.IndexDigest(m.Index), &b, tracefile.Options{})
		t.Cleanup(func() { stop(t, r, &b) })
		return r
	})
}

// A recording has each block once, at the time of the first read, with the
// truth about hit and miss; View, Fault and View are one read.
func TestRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &memory{blocks: 1000, resident: 100, fault: func(context.Context) error {
			time.Sleep(20 * time.Millisecond)
			return nil
		}}
		var b bytes.Buffer
		r := tracefile.NewRecorder(d, blockmap.Digest{9}, &b, tracefile.Options{})
		time.Sleep(time.Second) // before the first read: not in the trace
		v, ok := r.View(blockmap.Range(5*4096+100, 3000))
		if !ok || v.Len() != 3000 {
			t.Error("a resident block was not seen")
		}
		v.Release()
		time.Sleep(10 * time.Millisecond)
		e := blockmap.Range(200*4096, 64*4096)
		if _, ok := r.View(e); ok {
			t.Error("an absent block was seen")
		}
		if err := r.Fault(t.Context(), e); err != nil {
			t.Error(err)
		}
		view(r, 200, 64)
		view(r, 199, 66) // 199 and 264 are new
		view(r, 5, 1)
		time.Sleep(10 * time.Millisecond)
		if err := r.Fault(t.Context(), blockmap.Range(700*4096, 1)); err != nil { // without a View
			t.Error(err)
		}
		for _, bad := range []blockmap.Extent{{Start: -1, End: 5}, {Start: 0, End: d.Size() + 1}, {Start: 9000, End: 8000}, {Start: 50000, End: 50000}, {Start: 0, End: 0}} {
			r.View(bad)
			_ = r.Fault(t.Context(), bad)
		}
		time.Sleep(100 * time.Millisecond)
		tr := stop(t, r, &b)
		want := &tracefile.Trace{
			Header: tracefile.Header{Index: blockmap.Digest{9}, Blocks: 1000, Starts: 1},
			Touches: []tracefile.Touch{
				{At: 0, Block: 5, Count: 1, Starts: 1},
				{At: 10 * ms, Block: 200, Count: 64, Miss: true, Starts: 1},
				{At: 30 * ms, Block: 199, Count: 1, Miss: true, Starts: 1},
				{At: 30 * ms, Block: 264, Count: 1, Miss: true, Starts: 1},
				{At: 40 * ms, Block: 700, Count: 1, Miss: true, Starts: 1},
			},
			End: tr.End,
		}
		if !reflect.DeepEqual(tr, want) {
			t.Errorf("recorded\n%+v, want\n%+v", tr, want)
		}
		if tr.Why != tracefile.Stopped || tr.After < 160*ms || tr.Dropped != 0 {
			t.Errorf("it ended with %+v", tr.End)
		}
		if s := r.Stats(); s.Bytes != 68*4096 || s.Ranges != 5 || s.Dropped != 0 {
			t.Errorf("stats are %+v", s)
		}
		// Reads go on, and are not recorded.
		view(r, 0, 300)
		if n := b.Len(); r.Stop() != nil || b.Len() != n {
			t.Error("something was written after the end")
		}
	})
}

// Neighbours that are read at nearly the same time become one range, in whatever
// order several readers go about it; those that are not stay apart.
func TestMergesNeighbours(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &memory{blocks: 10000, resident: 9001}
		var b bytes.Buffer
		r := tracefile.NewRecorder(d, blockmap.Digest{}, &b, tracefile.Options{})
		for i := range int64(30) { // three readers in turn: up, down, and slowly up
			view(r, 100+32*i, 32)
			view(r, 5000-8*i, 8)
			if i%10 == 0 {
				view(r, 9000+i/10, 1)
			}
			time.Sleep(100 * us)
		}
		time.Sleep(10 * time.Millisecond)
		view(r, 100+32*30, 32) // goes on too late
		tr := stop(t, r, &b)
		want := []tracefile.Touch{
			{Block: 100, Count: 960, Starts: 1}, {Block: 5000 - 8*29, Count: 240, Starts: 1}, {Block: 9000, Count: 1, Starts: 1},
			{At: 1 * ms, Block: 9001, Count: 2, Starts: 1, Miss: true}, // the one before was a hit
			{At: 13 * time.Millisecond, Block: 1060, Count: 32, Starts: 1},
		}
		if !reflect.DeepEqual(tr.Touches, want) {
			t.Errorf("recorded %+v", tr.Touches)
		}
	})
}

// Readers that touch at the same time come in any order. In the trace time does
// not go back, nor begin before zero.
func TestTouchesOutOfOrder(t *testing.T) {
	var b bytes.Buffer
	r := tracefile.NewRecorder(&memory{blocks: 1000}, blockmap.Digest{}, &b, tracefile.Options{})
	time.Sleep(2 * ms)
	for i, at := range []time.Duration{500 * us, 400 * us, 700 * us, 0, 900 * us} {
		r.Put(at, uint32(10*i))
	}
	tr := stop(t, r, &b)
	var times []time.Duration
	for _, x := range tr.Touches {
		times = append(times, x.At)
	}
	if want := []time.Duration{0, 0, 200 * us, 200 * us, 400 * us}; !slices.Equal(times, want) {
		t.Errorf("the times are %v, want %v", times, want)
	}
}

func TestEnds(t *testing.T) {
	for _, c := range []struct {
		name   string
		o      tracefile.Options
		read   func(r *tracefile.Recorder)
		why    tracefile.Reason
		blocks int64
		after  time.Duration
	}{
		{"time", tracefile.Options{For: 500 * ms}, func(r *tracefile.Recorder) {
			for i := range int64(100) {
				view(r, 10*i, 1)
				time.Sleep(30 * ms)
			}
		}, tracefile.TimeUp, 17, 500 * ms},
		{"bytes", tracefile.Options{Bytes: 100 * 4096}, func(r *tracefile.Recorder) {
			for i := range int64(100) {
				view(r, 10*i, 8)
				time.Sleep(30 * ms)
			}
		}, tracefile.Enough, 104, 410 * ms},
		{"quiet", tracefile.Options{Quiet: 200 * ms, For: time.Hour}, func(r *tracefile.Recorder) {
			view(r, 0, 1)
			time.Sleep(150 * ms)
			view(r, 10, 1)
			for range 100 { // nothing new
				view(r, 0, 1)
				time.Sleep(10 * ms)
			}
		}, tracefile.WentQuiet, 2, 350 * ms},
		{"quiet, but a fault waits", tracefile.Options{Quiet: 200 * ms}, func(r *tracefile.Recorder) {
			_ = r.Fault(context.Background(), blockmap.Range(0, 4096))
			time.Sleep(150 * ms)
			view(r, 10, 1)
			time.Sleep(time.Second)
		}, tracefile.WentQuiet, 2, 3350 * ms},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := &memory{blocks: 1000, resident: 1000, fault: func(context.Context) error { time.Sleep(3 * time.Second); return nil }}
				var b bytes.Buffer
				r := tracefile.NewRecorder(d, blockmap.Digest{}, &b, c.o)
				time.Sleep(time.Minute) // nothing ends before the first read
				c.read(r)
				select {
				case <-r.Done():
				case <-time.After(time.Minute):
					t.Error("it does not end")
				}
				tr := stop(t, r, &b)
				if tr.Why != c.why || tr.Bytes() != c.blocks*4096 {
					t.Errorf("ended since it %v with %d blocks", tr.Why, tr.Bytes()/4096)
				}
				if d := tr.After - c.after; d < 0 || d > 60*ms {
					t.Errorf("ended after %v", tr.After)
				}
			})
		})
	}
}

// gate is a writer that waits, or fails.
type gate struct {
	bytes.Buffer
	mu   sync.Mutex
	open chan struct{}
	fail error
	left int // bytes until fail
}

func (g *gate) Write(p []byte) (int, error) {
	if g.open != nil {
		<-g.open
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.fail != nil && g.Len()+len(p) > g.left {
		return 0, g.fail
	}
	return g.Buffer.Write(p)
}

// file is what has been written so far.
func (g *gate) file() []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	return bytes.Clone(g.Bytes())
}

// A writer that hangs holds up no read. What the buffer does not hold is counted.
func TestFullBufferDrops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gate{open: make(chan struct{})}
		d := &memory{blocks: 1 << 16, resident: 1 << 16}
		r := tracefile.NewRecorder(d, blockmap.Digest{}, g, tracefile.Options{Buffer: 64})
		begin := time.Now()
		for i := range int64(100) {
			view(r, 10*i, 3)
		}
		if time.Since(begin) > 0 {
			t.Error("a read has waited")
		}
		if s := r.Stats(); s.Dropped != 36*3*4096 {
			t.Errorf("%d bytes were dropped", s.Dropped)
		}
		close(g.open)
		tr := stop(t, r, &g.Buffer)
		if tr.Dropped != 36*3 || len(tr.Touches) != 64 {
			t.Errorf("%d touches, %d dropped blocks", len(tr.Touches), tr.Dropped)
		}
	})
}

// The writer's error is Stop's. Readers see nothing of it, and what was written
// before can be read.
func TestWriterFails(t *testing.T) {
	for _, left := range []int{0, 60, 5000} {
		synctest.Test(t, func(t *testing.T) {
			g := &gate{fail: blocktest.ErrDiskFull, left: left}
			d := &memory{blocks: 1 << 16, resident: 1 << 16}
			r := tracefile.NewRecorder(d, blockmap.Digest{}, g, tracefile.Options{})
			for i := range int64(6000) {
				if v, ok := r.View(blockmap.Range(10*i*4096, 4096)); !ok {
					t.Fatal("a read has failed")
				} else {
					v.Release()
				}
				if i%100 == 0 {
					time.Sleep(10 * time.Millisecond)
				}
			}
			<-r.Done()
			if err := r.Stop(); !errors.Is(err, blocktest.ErrDiskFull) {
				t.Errorf("stopped with %v", err)
			}
			if left < tracefile.HeaderLen {
				return
			}
			if tr := decode(t, g.Bytes()); !errors.Is(tr.Cut, tracefile.ErrCut) || left > 4200 && len(tr.Touches) == 0 {
				t.Errorf("%d touches, cut %v", len(tr.Touches), tr.Cut)
			}
		})
	}
}

// What was touched is in the file a second later: a kill loses no more.
func TestFlushes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := new(gate)
		d := &memory{blocks: 1 << 16, resident: 1 << 16}
		r := tracefile.NewRecorder(d, blockmap.Digest{}, g, tracefile.Options{})
		for i := range int64(100) {
			view(r, 10*i, 1)
			time.Sleep(100 * time.Millisecond)
			if i%10 == 9 {
				if tr := decode(t, g.file()); len(tr.Touches) < int(i)-10 {
					t.Errorf("%d of %d touches are in the file", len(tr.Touches), i+1)
				}
			}
		}
		stop(t, r, &g.Buffer)
	})
}

// Many readers at once: every block that was read is recorded exactly once.
func TestRecordsConcurrently(t *testing.T) {
	d := &memory{blocks: 5000, resident: 2500}
	var b bytes.Buffer
	r := tracefile.NewRecorder(d, blockmap.Digest{}, &b, tracefile.Options{Buffer: 20000})
	var read [5000]bool
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 5))
			for range 500 {
				n := 1 + rng.Int64N(200)
				at := rng.Int64N(5000 - n)
				view(r, at, n)
				mu.Lock()
				for j := range n {
					read[at+j] = true
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	tr := stop(t, r, &b) // Read has checked that no block is there twice
	for _, x := range tr.Touches {
		for i := range x.Count {
			if !read[x.Block+i] {
				t.Fatalf("block %d was not read", x.Block+i)
			}
			read[x.Block+i] = false
		}
	}
	for i, missing := range read {
		if missing {
			t.Fatalf("block %d is missing, and %d were dropped", i, tr.Dropped)
		}
	}
}

// Status and Prefetch are the device's own, and touch nothing.
func TestPassesThrough(t *testing.T) {
	m := blocktest.NewImage(t, 3, 200)
	image, _ := newImage(t, m)
	var b bytes.Buffer
	r := tracefile.NewRecorder(image, blockmap.Digest{}, &b, tracefile.Options{})
	e := blockmap.Extent{Start: int64(m.Index.Runs[0].Device) * blockmap.BlockSize, End: image.Size()} // no hole
	if st := r.Status(e); st != image.Status(e) || st.Resident {
		t.Errorf("the status of %v is %+v, and that of the image %+v", e, st, image.Status(e))
	}
	r.Prefetch(e)
	if v, ok := image.View(e); !ok {
		t.Error("a prefetch was lost")
	} else {
		v.Release()
	}
	if st := r.Status(e); st != image.Status(e) || !st.Resident {
		t.Errorf("after the prefetch the status of %v is %+v, and that of the image %+v", e, st, image.Status(e))
	}
	view(r, 10, 1)
	if tr := stop(t, r, &b); len(tr.Touches) != 1 || tr.Touches[0].Miss {
		t.Errorf("recorded %+v", tr.Touches)
	}
}

func TestHitsAllocateNothing(t *testing.T) {
	d := &memory{blocks: 1000, resident: 1000}
	r := tracefile.NewRecorder(d, blockmap.Digest{}, io.Discard, tracefile.Options{})
	defer r.Stop()
	view(r, 0, 500)
	if n := testing.AllocsPerRun(100, func() { view(r, 3, 1); view(r, 50, 100) }); n > 0 {
		t.Errorf("a hit allocates %v times", n)
	}
	at := int64(500)
	if n := testing.AllocsPerRun(100, func() { view(r, at, 3); at += 4 }); n > 0 {
		t.Errorf("a first touch allocates %v times", n)
	}
}

// overSocket is what any transport does at least: a request comes over a unix
// socket, and the view goes back.
func overSocket(b *testing.B, d blockmap.Device, offs []int64, n int64) {
	client, server := socketPair(b)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer client.Close()
	wg.Go(func() {
		defer server.Close()
		var req [8]byte
		for {
			if _, err := io.ReadFull(server, req[:]); err != nil {
				return
			}
			v, ok := d.View(blockmap.Range(int64(binary.LittleEndian.Uint64(req[:])), n))
			if !ok {
				b.Error("not resident")
				return
			}
			for _, s := range v.Segments() {
				if _, err := server.Write(s.Bytes); err != nil {
					b.Error(err)
				}
			}
			v.Release()
		}
	})
	var req [8]byte
	reply := make([]byte, n)
	i := 0
	for b.Loop() {
		binary.LittleEndian.PutUint64(req[:], uint64(offs[i%len(offs)]))
		i++
		if _, err := client.Write(req[:]); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(client, reply); err != nil {
			b.Fatal(err)
		}
	}
}

func socketPair(b *testing.B) (client, server net.Conn) {
	b.Helper()
	l, err := net.Listen("unix", filepath.Join(b.TempDir(), "s"))
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("unix", l.Addr().String()); err != nil {
		b.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		b.Fatal(err)
	}
	return client, server
}

// BenchmarkView reads resident blocks of an image, alone and while a recorder
// looks on: only the view, the view and a copy of the bytes, the whole way over
// a socket as a client reads, and the view when it touches a block for the
// first time.
func BenchmarkView(b *testing.B) {
	m := blocktest.NewImage(b, 1, 20000)
	image, _ := newImage(b, m)
	if _, err := blocktest.Read(b.Context(), image, blockmap.Range(0, image.Size())); err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 128<<10)
	offs := make([]int64, 1<<12)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range offs {
		offs[i] = rng.Int64N(image.Size()/int64(len(buf))-1) * int64(len(buf))
	}
	read := func(d blockmap.Device, n int64, copied bool) func(b *testing.B) {
		return func(b *testing.B) {
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				v, ok := d.View(blockmap.Range(offs[i%len(offs)], n))
				if !ok {
					b.Fatal("not resident")
				}
				if copied {
					if err := v.CopyTo(buf[:n]); err != nil {
						b.Error(err)
					}
				}
				v.Release()
				i++
			}
		}
	}
	r := tracefile.NewRecorder(image, blockmap.Digest{}, io.Discard, tracefile.Options{})
	defer r.Stop()
	view(r, 0, image.Size()/4096)
	for _, c := range []struct {
		name   string
		n      int64
		copied bool
	}{{"view/4k", 4096, false}, {"view/128k", 128 << 10, false}, {"read/4k", 4096, true}, {"read/128k", 128 << 10, true}} {
		b.Run(c.name+"/alone", read(image, c.n, c.copied))
		b.Run(c.name+"/recorded", read(r, c.n, c.copied))
	}
	for _, n := range []int64{4096, 128 << 10} {
		name := fmt.Sprintf("socket/%dk", n>>10)
		b.Run(name+"/alone", func(b *testing.B) { overSocket(b, image, offs, n) })
		b.Run(name+"/recorded", func(b *testing.B) { overSocket(b, r, offs, n) })
	}
	b.Run("first/recorded", func(b *testing.B) {
		d := &memory{blocks: 1 << 28, resident: 1 << 28}
		r := tracefile.NewRecorder(d, blockmap.Digest{}, io.Discard, tracefile.Options{})
		defer r.Stop()
		at := int64(0)
		for b.Loop() {
			view(r, at, 1)
			at = (at + 2) % (1 << 28)
		}
		b.ReportMetric(float64(r.Stats().Dropped)/4096/float64(b.N), "dropped/op")
	})
}
