package fetcher_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// The rest of an image comes as fast as the link carries it, in large requests.
func TestCompleteFillsTheLink(t *testing.T) {
	for _, size := range []int{1 << 20, 128 << 10} {
		m := large(t, 120, size)
		for _, rate := range []float64{25e6, 250e6} {
			synctest.Test(t, func(t *testing.T) {
				o := &far{wire: newWire(rate, 20*time.Millisecond, 4<<20), ranges: 1}
				w, bound, wants := o.world(t, m)
				began := time.Now()
				if err := bound.Complete(t.Context(), wants, fetcher.CompleteOptions{}); err != nil {
					t.Fatal(err)
				}
				took := time.Since(began)
				w.fetcher.Close()
				stored := m.Index.Streams[1].BlobSize
				least := time.Duration(float64(stored) / rate * float64(time.Second))
				requests := w.fetcher.Stats().Requests
				t.Logf("%.0f MB/s, chunks of %d: it took %v, the link's time is %v; %d requests", rate/1e6, size, took, least, requests)
				if took > least+least/10+10*20*time.Millisecond || requests > stored/(3<<20)+3 {
					t.Errorf("it took %v in %d requests, the link's time is %v for %d MiB", took, requests, least, stored>>20)
				}
				for _, x := range wants {
					if !x.Stream.Has(x.Chunk) {
						t.Errorf("chunk %d is absent", x.Chunk)
					}
				}
			})
		}
	}
}

// A demand takes hardly longer while an image is being completed, whether or not the
// chunk is in flight already.
func TestDemandBeforeComplete(t *testing.T) {
	m := large(t, 600, 1<<20)
	median := make(map[bool]time.Duration)
	for _, completing := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			o := &far{wire: newWire(25e6, 20*time.Millisecond, 256<<10), ranges: 1}
			w, bound, wants := o.world(t, m)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() {
				if completing {
					done <- bound.Complete(ctx, wants, fetcher.CompleteOptions{})
				} else {
					done <- nil
				}
			}()
			var took []time.Duration
			for i := range 30 {
				time.Sleep(time.Duration(300+i%7*50) * time.Millisecond)
				at := 599 - 3*i
				if i%4 == 3 { // near what is being fetched now
					for at = 0; at < 450 && wants[at].Stream.Has(wants[at].Chunk); at++ {
					}
					at += 3
				}
				x := wants[at]
				if x.Stream.Has(x.Chunk) {
					continue
				}
				began := time.Now()
				if err := bound.Fetch(t.Context(), []blockmap.Want{x}); err != nil {
					t.Fatal(err)
				}
				took = append(took, time.Since(began))
			}
			cancel()
			<-done
			w.fetcher.Close()
			slices.Sort(took)
			median[completing] = took[len(took)/2]
			t.Logf("completing %v: %d reads, median %v, most %v", completing, len(took), median[completing], took[len(took)-1])
			if most := took[len(took)-1]; most > 250*time.Millisecond {
				t.Errorf("a read took %v", most)
			}
		})
	}
	if median[true] > median[false]*5/4 {
		t.Errorf("a demand takes %v, and %v while the image is being completed", median[false], median[true])
	}
}

// While a list is being fetched and while readers wait, nothing idle is requested.
func TestCompleteWaits(t *testing.T) {
	m := noise(t, 200)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1 << 20})
		defer w.fetcher.Close()
		w.origin.Set(blocktest.Faults{Delay: 400 * time.Millisecond})
		b := w.fetcher.From(w.origin)
		wants := w.wants(t)[1:]
		r := b.Replay(t.Context(), wants[100:], fetcher.ReplayOptions{Window: 256 << 10})
		synctest.Wait()
		done := make(chan error, 1)
		go func() { done <- b.Complete(t.Context(), wants[:100], fetcher.CompleteOptions{}) }()
		if err := r.Wait(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		r.Stop()
		here := func() (n int) {
			for _, x := range wants[:60] {
				if x.Stream.Has(x.Chunk) {
					n++
				}
			}
			return n
		}
		if n := here(); n > 0 {
			t.Errorf("%d idle chunks came before the end of the list", n)
		}
		// A reader demands one chunk behind the other.
		before := here()
		for i := 99; i > 80; i-- {
			if err := b.Fetch(t.Context(), wants[i:i+1]); err != nil {
				t.Fatal(err)
			}
		}
		if n := here(); n > before+16 { // two requests may have been in flight
			t.Errorf("%d idle chunks came between demands", n-before)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// Complete fills the room that it is given, and evicts nothing.
func TestCompleteWithinItsRoom(t *testing.T) {
	m := noise(t, 100)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1 << 20})
		defer w.fetcher.Close()
		w.origin.Set(blocktest.Faults{Delay: 100 * time.Millisecond})
		b := w.fetcher.From(w.origin)
		wants := w.wants(t)[1:]
		const most = 4 << 20
		err := b.Complete(t.Context(), wants, fetcher.CompleteOptions{Room: func() int64 { return most - wants[0].Stream.Resident() }})
		n := wants[0].Stream.Resident()
		if !errors.Is(err, blockmap.ErrNoSpace) || n > most || n < most-256<<10 {
			t.Errorf("%d bytes are resident, of at most %d: %v", n, int64(most), err)
		}
	})
}

// What is resident of a chunk takes no room again: room for the absent leaves is enough.
func TestCompletePartlyResident(t *testing.T) {
	m := noise(t, 100)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1 << 20})
		defer w.fetcher.Close()
		wants := w.wants(t)[1:]
		var absent int64
		for _, x := range wants {
			c := &x.Table.Chunks[x.Chunk]
			if c.Leaves() > 1 {
				content := w.content(t, x)
				list, err := blockmap.NewLeafList(c, blockmap.LeafDigests(nil, content))
				if err == nil {
					err = x.Stream.FillLeaves(x.Chunk, list, 0, 1, content[:blockmap.LeafSize])
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			absent += x.Absent()
		}
		resident := wants[0].Stream.Resident()
		if resident == 0 || absent == 0 {
			t.Fatalf("%d bytes are resident, %d absent: this tests nothing", resident, absent)
		}
		room := func() int64 { return resident + absent - wants[0].Stream.Resident() }
		if err := w.fetcher.From(w.origin).Complete(t.Context(), wants, fetcher.CompleteOptions{Room: room}); err != nil {
			t.Error(err)
		}
		if n := wants[0].Stream.Resident(); n != resident+absent {
			t.Errorf("%d bytes are resident, want %d", n, resident+absent)
		}
	})
}

// A limit of the rate is kept.
func TestCompleteRate(t *testing.T) {
	m := noise(t, 100)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		defer w.fetcher.Close()
		began := time.Now()
		if err := w.fetcher.From(w.origin).Complete(t.Context(), w.wants(t)[1:], fetcher.CompleteOptions{Rate: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		// 12.5 MiB, of which the first burst of 4 MiB is free.
		if took := time.Since(began); took < 7*time.Second || took > 15*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

// An origin that fails or hangs ends Complete with its error, without a log line for each
// chunk. A reader of such a chunk is not affected: it gets the chunk once the origin works.
func TestCompleteFails(t *testing.T) {
	m := noise(t, 60)
	for name, c := range map[string]struct {
		blocktest.Faults
		within time.Duration
	}{
		"refuses": {blocktest.Faults{Err: blocktest.ErrInjected}, time.Second},
		"lies":    {blocktest.Faults{Flip: true}, time.Second},
		"hangs":   {blocktest.Faults{Hang: true}, time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				var mu sync.Mutex
				w := newWorld(t, m, fetcher.Options{Log: slog.New(slog.NewTextHandler(locked{&mu, &log}, nil))})
				defer w.fetcher.Close()
				w.origin.Set(c.Faults)
				b := w.fetcher.From(w.origin)
				wants := w.wants(t)[1:]
				began := time.Now()
				err := b.Complete(t.Context(), wants, fetcher.CompleteOptions{})
				if took := time.Since(began); err == nil || took > c.within {
					t.Errorf("after %v: %v", took, err)
				}
				mu.Lock()
				if log.Len() > 0 || w.fetcher.Stats().Failed > 0 {
					t.Errorf("%+v, log:\n%s", w.fetcher.Stats(), &log)
				}
				mu.Unlock()
				// Again, and a reader joins it. Then the origin works again.
				done := make(chan error, 1)
				go func() { done <- b.Complete(t.Context(), wants, fetcher.CompleteOptions{}) }()
				time.AfterFunc(3*time.Second, func() { w.origin.Set(blocktest.Faults{}) })
				if err := b.Fetch(t.Context(), wants[2:3]); err != nil {
					t.Error(err)
				}
				<-done
				time.Sleep(5 * time.Second) // the origin works by then, and what was in flight has ended
				if err := b.Complete(t.Context(), wants, fetcher.CompleteOptions{}); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// Complete ends with its ctx, and leaves no fetch behind.
func TestCompleteEnds(t *testing.T) {
	m := noise(t, 60)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		defer w.fetcher.Close()
		w.origin.Set(blocktest.Faults{Delay: time.Hour})
		b := w.fetcher.From(w.origin)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := b.Complete(ctx, w.wants(t)[1:], fetcher.CompleteOptions{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		time.Sleep(2 * time.Second)
		if n := w.fetcher.Fetches(); n > 0 {
			t.Errorf("%d fetches are left", n)
		}
	})
}

// locked is a buffer for several writers.
type locked struct {
	mu *sync.Mutex
	b  *bytes.Buffer
}

func (l locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// A chunk whose bytes are wrong at the origin does not keep those behind it away.
func TestCompleteAroundWrongChunks(t *testing.T) {
	m := noise(t, 200)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1 << 20})
		defer w.fetcher.Close()
		wants := w.wants(t)[1:]
		table := wants[0].Table
		const wrong = 3
		blob := bytes.Clone(m.Blobs[table.Blob])
		blob[table.Chunks[wants[wrong].Chunk].Offset+100] ^= 1
		w.origin.Add(table.Blob, blob)
		b := w.fetcher.From(w.origin)
		if err := b.Complete(t.Context(), wants, fetcher.CompleteOptions{}); !errors.Is(err, blockmap.ErrDigest) {
			t.Errorf("with wrong bytes at the origin: %v", err)
		}
		for i, x := range wants {
			if here := x.Stream.Has(x.Chunk); here != (i != wrong) {
				t.Fatalf("chunk %d of %d is here: %v", i, len(wants), here)
			}
		}
	})
}
