package fetcher_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// wants is every chunk of the image, stream by stream.
func (w *world) wants(t *testing.T) (wants []blockmap.Want) {
	t.Helper()
	for i := range w.Index.Streams {
		table := &w.Index.Streams[i]
		s, err := w.cache.Stream(table)
		if err != nil {
			t.Fatal(err)
		}
		for c := range table.Chunks {
			wants = append(wants, blockmap.Want{Stream: s, Table: table, Chunk: c})
		}
	}
	return wants
}

func TestReplay(t *testing.T) {
	m := blocktest.NewImage(t, 30, 2000)
	w := newWorld(t, m, fetcher.Options{})
	r := w.fetcher.From(w.origin).Replay(t.Context(), w.wants(t), fetcher.ReplayOptions{})
	if err := r.Wait(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	before := w.origin.Requests()
	if err := w.read(t.Context(), w.all()); err != nil || w.origin.Requests() != before {
		t.Errorf("a read after a full replay made %d requests (%v)", w.origin.Requests()-before, err)
	}
	if p := r.Progress(); p.DoneChunks != p.Chunks || p.DoneBytes != p.Bytes || p.Failed != 0 {
		t.Errorf("%+v", p)
	}
	if n := len(w.wants(t)); before > n*4/5 {
		t.Errorf("%d requests for %d chunks: neighbours did not share them", before, n)
	}
	r.Stop()
}

// A reader does not wait for chunks that are earlier in the list, and each chunk is still
// fetched once.
func TestReplayUnderReaders(t *testing.T) {
	m := blocktest.NewImage(t, 31, 3000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{MaxRequest: 1, MaxRequests: 8})
		w.origin.Set(blocktest.Faults{Delay: 2 * time.Millisecond})
		wants := w.wants(t)
		r := w.fetcher.From(w.origin).Replay(t.Context(), wants, fetcher.ReplayOptions{})
		defer r.Stop()
		places := w.places(t, 60)
		if err := w.read(t.Context(), places[59]); err != nil {
			t.Fatal(err)
		}
		if n := w.origin.Requests(); n > len(wants)/2 {
			t.Errorf("a reader waited for %d of %d requests", n, len(wants))
		}
		if err := r.Wait(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		for a, n := range w.origin.Asked() {
			if n != 1 {
				t.Errorf("%v was asked for %d times", a, n)
			}
		}
	})
}

// Stop cancels what no reader waits for.
func TestReplayStops(t *testing.T) {
	m := blocktest.NewImage(t, 32, 3000)
	w := newWorld(t, m, fetcher.Options{MaxRequest: 1, MaxRequests: 2})
	w.origin.Set(blocktest.Faults{Hang: true})
	r := w.fetcher.From(w.origin).Replay(t.Context(), w.wants(t), fetcher.ReplayOptions{})
	settled(t, "a request hangs", func() bool { return w.origin.Alive() > 0 })
	r.Stop()
	if err := r.Wait(t.Context(), 1); err == nil {
		t.Error("Wait says that a stopped replay is done")
	}
	asked := w.origin.Requests()
	if asked > 2 {
		t.Errorf("%d requests", asked)
	}
	// The reader of a forgotten chunk fetches it itself.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	w.origin.Set(blocktest.Faults{})
	places := w.places(t, 20)
	if err := w.read(ctx, places[19]); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// Chunks that are given up are counted, and the others come.
func TestReplayGoesOn(t *testing.T) {
	m := blocktest.NewImage(t, 33, 1000)
	gone := errors.New("gone")
	w := newWorld(t, m, fetcher.Options{MaxRequest: 1, Temporary: func(err error) bool { return !errors.Is(err, gone) }})
	w.origin.Set(blocktest.Faults{Err: gone, Left: 5})
	r := w.fetcher.From(w.origin).Replay(t.Context(), w.wants(t), fetcher.ReplayOptions{})
	if err := r.Wait(t.Context(), 1); !errors.Is(err, gone) {
		t.Errorf("%v", err)
	}
	if p := r.Progress(); p.Failed != 5 || p.DoneChunks != p.Chunks-5 || !errors.Is(p.Err, gone) {
		t.Errorf("%+v", p)
	}
}

// A replay keeps its rate limit.
func TestReplayRate(t *testing.T) {
	m := blocktest.NewImage(t, 34, 12000)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, m, fetcher.Options{})
		const rate = 4 << 20
		r := w.fetcher.From(w.origin).Replay(t.Context(), w.wants(t), fetcher.ReplayOptions{Rate: rate})
		if err := r.Wait(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		p := r.Progress()
		// A burst is let through at once.
		least := time.Duration(float64(p.Bytes-16<<20) / rate * float64(time.Second))
		if took := time.Since(p.Began); took < least || took > least+8*time.Second {
			t.Errorf("%d bytes took %v, at %d a second", p.Bytes, took, rate)
		}
		r.Stop()
	})
}
