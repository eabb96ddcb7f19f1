package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
)

func newAdmission(t testing.TB, all Limits) *Admission {
	t.Helper()
	a, err := NewAdmission(all)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAdmissionOfOneClient(t *testing.T) {
	for name, a := range map[string]*Admission{"none": nil, "unbounded": newAdmission(t, Limits{}), "bounded": newAdmission(t, Limits{Requests: 100})} {
		t.Run(name, func(t *testing.T) {
			c := a.Client(Limits{Requests: 3, Bytes: 1000})
			for _, step := range []struct {
				acquire int64
				want    bool
			}{{5000, true}, {1, false}} { // one of any size
				if c.TryAcquire(step.acquire) != step.want {
					t.Errorf("%d bytes: want %v", step.acquire, step.want)
				}
			}
			c.Release(1, 5000)
			for i, n := range []int64{300, 300, 400} {
				if !c.TryAcquire(n) {
					t.Errorf("request %d does not fit", i)
				}
			}
			if c.TryAcquire(0) {
				t.Error("a fourth request was admitted")
			}
			c.Release(1, 400)
			if c.TryAcquire(401) {
				t.Error("too many bytes were admitted")
			}
			if c.Fits(401) || !c.Fits(400) || c.TryGrow(401) || !c.TryGrow(400) || c.Fits(1) {
				t.Error("growth is counted wrongly")
			}
			if got := c.InFlight(); got != (Limits{2, 1000}) {
				t.Errorf("%+v in flight", got)
			}
			c.Release(2, 1000)
			if got := c.InFlight(); got != (Limits{}) {
				t.Errorf("%+v left", got)
			}
		})
	}
	if _, err := NewAdmission(Limits{Bytes: -1}); err == nil {
		t.Error("a negative limit was accepted")
	}
}

// The server admits the requests of a client in order, and no request overtakes a large
// one.
func TestAdmissionInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newAdmission(t, Limits{}).Client(Limits{Bytes: 10})
		c.TryAcquire(10)
		var mu sync.Mutex
		var order []int64
		for _, n := range []int64{9, 1, 1} {
			go func() {
				if err := c.Acquire(t.Context(), n); err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				order = append(order, n)
			}()
			synctest.Wait()
		}
		c.Release(0, 5) // a small one would fit
		synctest.Wait()
		if len(order) > 0 || c.TryAcquire(1) {
			t.Errorf("%v overtook", order)
		}
		c.Release(1, 5)
		synctest.Wait()
		mu.Lock()
		slices.Sort(order) // the two that are let in together run in any order
		if !slices.Equal(order, []int64{1, 9}) {
			t.Errorf("let in %v", order)
		}
		mu.Unlock()
		c.Release(1, 9)
		synctest.Wait()
		if got := c.InFlight(); got != (Limits{2, 2}) {
			t.Errorf("%+v in flight", got)
		}
	})
}

// The global bound is shared. If one client uses all of it, it blocks no other client:
// each client has one request admitted.
func TestAdmissionOfAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAdmission(t, Limits{Requests: 4, Bytes: 100})
		greedy, other := a.Client(Limits{}), a.Client(Limits{})
		for range 4 {
			if !greedy.TryAcquire(25) {
				t.Error("refused within the bounds")
			}
		}
		if greedy.TryAcquire(1) || greedy.TryGrow(1) {
			t.Error("the global bound is not kept")
		}
		if !other.TryAcquire(50) {
			t.Error("a client without requests in flight was refused")
		}
		if other.TryAcquire(1) {
			t.Error("a second request beyond the global bound was admitted")
		}
		if got := a.InFlight(); got != (Limits{5, 150}) {
			t.Errorf("%+v in flight", got)
		}

		// Requests that wait for room are admitted in order across clients. A client
		// whose other requests have ended gets one admitted beyond the bound.
		var let [2]atomic.Bool
		for i, c := range []*Client{greedy, other} {
			go func() {
				if err := c.Acquire(t.Context(), 10); err != nil {
					t.Error(err)
				}
				let[i].Store(true)
			}()
			synctest.Wait()
		}
		if let[0].Load() || let[1].Load() {
			t.Error("admitted beyond the bound")
		}
		other.Release(1, 50)
		synctest.Wait()
		if let[0].Load() || !let[1].Load() {
			t.Errorf("admitted: %v %v, want the idle client only", let[0].Load(), let[1].Load())
		}
		greedy.Release(2, 50)
		synctest.Wait()
		if !let[0].Load() {
			t.Error("a waiting request is not admitted when there is room")
		}
		greedy.Release(3, 60)
		other.Release(1, 10)
		if got := a.InFlight(); got != (Limits{}) {
			t.Errorf("%+v left", got)
		}
	})
}

// A wait ends with its ctx, and the waits behind it move up.
func TestAdmissionCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newAdmission(t, Limits{Requests: 9}).Client(Limits{Bytes: 10})
		c.TryAcquire(5)
		ctx, cancel := context.WithCancelCause(t.Context())
		large := make(chan error, 1)
		go func() { large <- c.Acquire(ctx, 10) }()
		synctest.Wait()
		small := make(chan error, 1)
		go func() { small <- c.Acquire(t.Context(), 5) }()
		synctest.Wait()
		cancel(io.ErrNoProgress)
		if err := <-large; err != io.ErrNoProgress {
			t.Errorf("a cancelled wait: %v", err)
		}
		if err := <-small; err != nil {
			t.Error(err)
		}
		if err := c.Acquire(ctx, 0); err != io.ErrNoProgress {
			t.Errorf("a wait with a cancelled ctx: %v", err)
		}
		if got := c.InFlight(); got != (Limits{2, 10}) {
			t.Errorf("%+v in flight", got)
		}
	})
}

// Many clients at once: each client exceeds a bound by one request at most, and no
// client waits forever.
func TestAdmissionUnderLoad(t *testing.T) {
	const clients = 8
	all, each := Limits{Requests: 6, Bytes: 300}, Limits{Requests: 3, Bytes: 200}
	a := newAdmission(t, all)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	for i := range uint64(clients) {
		c := a.Client(each)
		for j := range uint64(4) {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(i, j))
				for range 500 {
					n := rng.Int64N(150)
					short := ctx
					if rng.IntN(8) == 0 {
						var stop context.CancelFunc
						short, stop = context.WithTimeout(ctx, time.Duration(rng.IntN(100))*time.Microsecond)
						defer stop()
					}
					if err := c.Acquire(short, n); err != nil {
						if ctx.Err() != nil {
							t.Errorf("client %d waits forever", i)
							return
						}
						continue
					}
					if got := c.InFlight(); got.Requests > each.Requests || got.Bytes > each.Bytes {
						t.Errorf("client %d has %+v in flight", i, got)
					}
					if got := a.InFlight(); got.Requests > all.Requests+clients || got.Bytes > all.Bytes+clients*150 {
						t.Errorf("all have %+v in flight", got)
					}
					if grown := rng.Int64N(20); c.TryGrow(grown) {
						n += grown
					}
					c.Release(1, n)
				}
			})
		}
	}
	wg.Wait()
	if got := a.InFlight(); got != (Limits{}) {
		t.Errorf("%+v left", got)
	}
}

func TestErrno(t *testing.T) {
	for _, test := range []struct {
		err                error
		read, write, other syscall.Errno
	}{
		{nil, 0, 0, 0},
		{blockmap.ErrReadOnly, syscall.EPERM, syscall.EPERM, syscall.EPERM},
		{syscall.EROFS, syscall.EPERM, syscall.EPERM, syscall.EPERM},
		{blockmap.ErrOutOfRange, syscall.EINVAL, syscall.ENOSPC, syscall.EINVAL},
		{blockmap.ErrNoSpace, syscall.EIO, syscall.ENOSPC, syscall.ENOSPC},
		{syscall.ENOSPC, syscall.EIO, syscall.ENOSPC, syscall.ENOSPC},
		{syscall.EDQUOT, syscall.EIO, syscall.ENOSPC, syscall.ENOSPC},
		{syscall.EFBIG, syscall.EIO, syscall.ENOSPC, syscall.ENOSPC},
		{blockmap.ErrClosed, syscall.ESHUTDOWN, syscall.ESHUTDOWN, syscall.ESHUTDOWN},
		{ErrServerClosed, syscall.ESHUTDOWN, syscall.ESHUTDOWN, syscall.ESHUTDOWN},
		{syscall.ENOMEM, syscall.ENOMEM, syscall.ENOMEM, syscall.ENOMEM},
		{blockmap.ErrDamaged, syscall.EIO, syscall.EIO, syscall.EIO},
		{context.DeadlineExceeded, syscall.EIO, syscall.EIO, syscall.EIO},
		{errors.ErrUnsupported, syscall.EIO, syscall.EIO, syscall.EIO},
	} {
		err := test.err
		if err != nil {
			err = fmt.Errorf("write the overlay: %w", err)
		}
		for op, want := range map[Op]syscall.Errno{OpRead: test.read, OpWrite: test.write, OpOther: test.other} {
			got := Errno(op, err)
			if got != want {
				t.Errorf("op %d, %v: %v, want %v", op, err, got, want)
			}
			// On amd64 and arm64 the protocol has Linux's numbers.
			if wireErrno(got) != errno(got) {
				t.Errorf("%v is %d on the wire", got, wireErrno(got))
			}
		}
	}
}
