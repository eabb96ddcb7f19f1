package zone

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
)

// told is what a client has told about the signs of life of a request.
type told struct {
	first, next atomic.Int64
	revived     chan time.Duration
	patience    atomic.Int64 // in all
}

func (x *told) signs() *signs {
	x.revived = make(chan time.Duration, 10)
	return &signs{
		patience: func(asked time.Time) time.Duration { return time.Until(asked.Add(time.Duration(x.patience.Load()))) },
		pause:    func() time.Duration { return 30 * time.Second },
		first:    func(time.Duration) { x.first.Add(1) },
		next:     func() { x.next.Add(1) },
		revived:  func(after time.Duration) { x.revived <- after },
	}
}

func (x *told) ask(t *testing.T, c *Client) (*Body, error) {
	ctx := withSigns(t.Context(), x.signs())
	return c.Chunks(ctx, "peer", testImage, ChunksAsk{Stream: blockmap.Digest{1}, First: 4, Last: 6, Size: 5}, true)
}

// A client tells the first sign of life, and the later ones.
func TestSignsAreTold(t *testing.T) {
	for signs := range 3 {
		c := peerServer(t, ClientOptions{}, func(w http.ResponseWriter, r *http.Request) {
			for range signs {
				w.WriteHeader(http.StatusProcessing)
			}
			fmt.Fprint(w, "hello")
		})
		var x told
		x.patience.Store(int64(time.Minute))
		b, err := x.ask(t, c)
		if err != nil {
			t.Fatal(err)
		}
		all := ends(b)
		io.ReadAll(b)
		b.Close()
		if x.first.Load() != 1 || x.next.Load() != int64(signs) || len(x.revived) != 0 {
			t.Errorf("%d signs: %d first ones, %d later ones", signs, x.first.Load(), x.next.Load())
		}
		if len(*all) != 1 || (*all)[0].Silent || (*all)[0].Quiet <= 0 {
			t.Errorf("it ended with %+v", *all)
		}
	}
}

// A request that is given up without a sign of life goes on for a moment: a peer that gives
// the sign then was given up too soon.
func TestRevived(t *testing.T) {
	for _, sign := range []string{"102", "answer", "refusal"} {
		t.Run(sign, func(t *testing.T) {
			goOn := make(chan bool)
			c := peerServer(t, ClientOptions{}, func(w http.ResponseWriter, r *http.Request) {
				<-goOn
				switch sign {
				case "102":
					w.WriteHeader(http.StatusProcessing)
					<-r.Context().Done()
				case "answer":
					fmt.Fprint(w, "hello")
				case "refusal":
					http.Error(w, "no", http.StatusNotFound)
				}
			})
			var x told
			x.patience.Store(int64(10 * time.Millisecond))
			_, err := x.ask(t, c)
			if o := outcome(t, err); o.Result != Late || !o.Silent || o.Took < 10*time.Millisecond {
				t.Errorf("%+v", o)
			}
			close(goOn)
			select {
			case after := <-x.revived:
				if after < 10*time.Millisecond {
					t.Errorf("the sign came after %v", after)
				}
			case <-time.After(time.Minute):
				t.Error("nobody is told of the sign")
			}
			if x.first.Load()+x.next.Load() != 0 {
				t.Error("the sign counts as one of a request that goes on")
			}
		})
	}
}

// Close ends what is left of requests that were given up, and so does a caller that leaves.
func TestCloseEndsRequestsThatWereGivenUp(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	c := clientOf(t, ClientOptions{FirstSign: time.Hour, Answer: time.Hour}, silent.Addr().String())
	var x told
	x.patience.Store(int64(time.Millisecond))
	for range 3 {
		if _, err := x.ask(t, c); outcome(t, err).Result != Late {
			t.Error(err)
		}
	}
	closed := make(chan bool)
	go func() {
		c.Close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(30 * time.Second):
		t.Fatal("Close waits for a peer that is silent")
	}
	if len(x.revived) != 0 {
		t.Error("a silent peer is alive")
	}
	if _, err := x.ask(t, c); outcome(t, err).Result != Late {
		t.Error(err)
	}
	// A caller that leaves is not told that the peer is late.
	x.patience.Store(int64(time.Hour))
	ctx, cancel := context.WithTimeout(withSigns(t.Context(), x.signs()), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Chunks(ctx, "peer", testImage, ChunksAsk{Stream: blockmap.Digest{1}, First: 4, Last: 6, Size: 5}, true); outcome(t, err).Result != Cancelled || !outcome(t, err).Silent {
		t.Errorf("got %v", err)
	}
}

// A timer that is late shows that this host has no time, so the peer gets more.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &ClientOptions{FirstSign: 2 * time.Second, Answer: 10 * time.Second}
		var x told
		var stale atomic.Bool
		begin := func() *watch { return newWatch(o, x.signs(), time.Now(), func() { stale.Store(true) }) }
		overdue := func(w *watch) bool {
			synctest.Wait()
			select {
			case <-w.overdue:
				return true
			default:
				return false
			}
		}
		x.patience.Store(int64(250 * time.Millisecond))
		w := begin()
		time.Sleep(249 * time.Millisecond)
		if overdue(w) {
			t.Error("it is overdue too soon")
		}
		time.Sleep(time.Millisecond)
		if !overdue(w) {
			t.Error("it is not overdue")
		}
		// The sign comes before the caller has looked.
		if w.sign(false) || w.giveUp() {
			t.Error("it is given up although the sign has come")
		}
		w.stop()

		w = begin()
		w.mu.Lock()
		w.due = w.due.Add(-300 * time.Millisecond) // as if the timer had fired so late
		w.mu.Unlock()
		time.Sleep(849 * time.Millisecond)
		if overdue(w) {
			t.Error("it is overdue at once when the host has no time")
		}
		time.Sleep(time.Millisecond)
		if !overdue(w) || !w.giveUp() {
			t.Error("it is not given up")
		}
		if !w.sign(false) || len(x.revived) != 1 {
			t.Error("a sign that comes after that does not count")
		}

		// More patience, up to FirstSign.
		x.patience.Store(int64(time.Hour))
		w = begin()
		time.Sleep(2*time.Second - 1)
		if overdue(w) {
			t.Error("it is overdue too soon")
		}
		if time.Sleep(time.Nanosecond); !overdue(w) {
			t.Error("it is not overdue")
		}
		w.stop()

		// Signs, and then none.
		w = begin()
		for range 4 {
			time.Sleep(1900 * time.Millisecond)
			w.sign(false)
		}
		if time.Sleep(1999 * time.Millisecond); stale.Load() {
			t.Error("it is stale too soon")
		}
		time.Sleep(time.Millisecond)
		if synctest.Wait(); !stale.Load() {
			t.Error("it is not stale")
		}
		if silent, longest := w.stop(); silent || longest != 1900*time.Millisecond {
			t.Errorf("silent %v, the longest pause was %v", silent, longest)
		}
		// Signs alone end after a while.
		stale.Store(false)
		w = begin()
		for range 10 {
			time.Sleep(990 * time.Millisecond)
			w.sign(false)
		}
		if time.Sleep(99 * time.Millisecond); stale.Load() {
			t.Error("it is stale too soon")
		}
		time.Sleep(time.Millisecond)
		if synctest.Wait(); !stale.Load() {
			t.Error("signs alone are enough")
		}
	})
}
