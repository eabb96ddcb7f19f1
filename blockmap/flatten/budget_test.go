package flatten

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"testing/synctest"
)

// The lowest rank goes first, no one overtakes one that asks for much, and whoever gives
// up leaves the budget whole.
func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBudget(10)
		if n, err := b.take(t.Context(), 5, 100); n != 10 || err != nil {
			t.Fatalf("%d, %v: one that asks for more than there is gets all of it", n, err)
		}
		var order []int
		ctx, cancel := context.WithCancelCause(t.Context())
		ask := func(ctx context.Context, rank int, n int64) {
			go func() {
				n, err := b.take(ctx, rank, n)
				if err != nil {
					if !errors.Is(err, errPush) {
						t.Errorf("error %v, want the cause", err)
					}
					return
				}
				order = append(order, rank)
				if rank != 2 {
					b.give(n)
				}
			}()
			synctest.Wait()
		}
		ask(t.Context(), 4, 1)
		ask(t.Context(), 3, 10)
		ask(ctx, 1, 10)
		ask(t.Context(), 2, 6)
		b.give(4) // enough for the one that came first, but not for the lowest
		synctest.Wait()
		if len(order) > 0 {
			t.Errorf("%v went before the lowest", order)
		}
		cancel(errPush)
		synctest.Wait()
		b.give(6)
		synctest.Wait()
		if len(order) != 1 || order[0] != 2 {
			t.Errorf("served %v, want 2 alone", order)
		}
		b.give(6)
		synctest.Wait()
		if len(order) != 3 || order[1] != 3 || order[2] != 4 || b.mu.free != 10 {
			t.Errorf("served %v, and %d of 10 are free", order, b.mu.free)
		}
	})
}

// A download reads ahead as far as its window, and no farther, and gives what was read.
func TestDownload(t *testing.T) {
	want := noise(1, 1<<20)
	synctest.Test(t, func(t *testing.T) {
		in := &tally{r: bytes.NewReader([]byte(want))}
		d := newDownload(io.NopCloser(in), 256<<10, newPieces())
		synctest.Wait()
		if in.n != 256<<10 {
			t.Errorf("%d bytes were read ahead", in.n)
		}
		got, err := io.ReadAll(d)
		if err != nil || string(got) != want {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		d.Close()
		if _, err := d.Read(make([]byte, 1)); err == nil {
			t.Error("a closed download can be read")
		}
		bad := newDownload(io.NopCloser(io.MultiReader(bytes.NewReader([]byte("abc")), failing{errPush})), 1, newPieces())
		if got, err := io.ReadAll(bad); string(got) != "abc" || !errors.Is(err, errPush) {
			t.Errorf("%q, %v", got, err)
		}
		bad.Close()
		full := newDownload(io.NopCloser(bytes.NewReader(make([]byte, 1<<20))), 64<<10, newPieces())
		synctest.Wait()
		full.Close() // while it waits for room
	})
}

// Large files are pushed a few at a time.
func TestLargePushes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &far{dirTarget: newTarget(t)}
		l := newLimited(f, newBudget(DefaultRequests))
		var wg sync.WaitGroup
		defer wg.Wait()
		for i := range uint64(40) {
			wg.Go(func() {
				d := describe(MediaTypeStream, []byte(noise(i, 10)))
				d.Size = 100 << 20 // which the target finds out
				_ = l.PushFile(t.Context(), d, "/nowhere", func(int64) {})
			})
		}
		synctest.Wait()
		if n := f.now.Load(); n != sendBytes/sendMost {
			t.Errorf("%d large files are pushed at once", n)
		}
	})
}
