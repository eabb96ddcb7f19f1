package fetcher_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"thaw/blockmap"
	"thaw/blockmap/blocktest"
	"thaw/fetcher"
)

// zone is peers that have all chunks of an image, and go wrong as a test says. Package
// fetcher/zone has the tests with real ones; here the clock is a test's.
type zone struct {
	peers      map[string]*blocktest.Origin // each serves streams uncompressed
	order      []string                     // in which they are asked
	hedgeAfter time.Duration

	mu         sync.Mutex
	hedges     int             // how many are allowed
	unusable   map[string]bool // peers
	overtaken  map[string]int
	distrusted map[string]int
	signs      map[string]time.Time // the last ones of peers
	asked      []string             // peer, first and last chunk
	failed     int                  // routes that began after the registry had failed
}

func newZone(t *testing.T, w *world, names ...string) *zone {
	t.Helper()
	raw := &blocktest.Image{Blobs: make(map[blockmap.Digest][]byte)}
	for _, x := range w.wants(t) {
		id := x.Stream.ID()
		raw.Blobs[id] = append(raw.Blobs[id], w.content(t, x)...)
	}
	z := &zone{order: names, hedgeAfter: 500 * time.Millisecond, peers: make(map[string]*blocktest.Origin), unusable: make(map[string]bool),
		overtaken: make(map[string]int), distrusted: make(map[string]int)}
	for _, name := range names {
		z.peers[name] = blocktest.NewOrigin(raw)
		z.peers[name].Name = name
	}
	return z
}

// of binds a world to the zone.
func (z *zone) of(w *world) *fetcher.Bound {
	return w.fetcher.FromNear(w.origin, fetcher.Nearby{RunChunks: 4, PieceBytes: 1 << 20,
		Route: func(of blockmap.Digest, number uint32) fetcher.Route { return &route{z: z, of: of, number: number} }})
}

func (z *zone) requests() (all []string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	return slices.Clone(z.asked)
}

type route struct {
	z      *zone
	of     blockmap.Digest
	number uint32
	next   int
}

func (r *route) Next() (peer string, owner, ok bool) {
	r.z.mu.Lock()
	defer r.z.mu.Unlock()
	for r.next < len(r.z.order) {
		peer := r.z.order[r.next]
		if r.next++; !r.z.unusable[peer] {
			return peer, true, true
		}
	}
	return "", false, false
}

func (r *route) Usable(peer string) bool {
	r.z.mu.Lock()
	defer r.z.mu.Unlock()
	return !r.z.unusable[peer]
}
func (r *route) RegistryFailed() { r.z.mu.Lock(); defer r.z.mu.Unlock(); r.z.failed++ }
func (r *route) Sign(peer string) time.Time {
	r.z.mu.Lock()
	defer r.z.mu.Unlock()
	return r.z.signs[peer]
}
func (r *route) Overtaken(peer string) { r.z.mu.Lock(); defer r.z.mu.Unlock(); r.z.overtaken[peer]++ }
func (r *route) Doubt(peer string)     { r.z.mu.Lock(); defer r.z.mu.Unlock(); r.z.distrusted[peer]++ }

func (r *route) Late(peer string, asked, began, moved time.Time, got, size int64) bool {
	if moved.IsZero() {
		moved = asked
	}
	if sign := r.Sign(peer); sign.After(moved) {
		moved = sign
	}
	return time.Since(moved) >= r.z.hedgeAfter || got > 0 && got < size/2 && time.Since(began) >= r.z.hedgeAfter
}

func (r *route) Hedge() (peer string, owner, ok bool) { return r.Next() }

func (r *route) MayHedge(string) bool {
	r.z.mu.Lock()
	defer r.z.mu.Unlock()
	r.z.hedges--
	return r.z.hedges >= 0
}

func (r *route) OpenChunks(ctx context.Context, peer string, owner bool, first, last int, n, _ int64, _ blockmap.LeafSet) (io.ReadCloser, error) {
	r.z.mu.Lock()
	r.z.asked = append(r.z.asked, fmt.Sprintf("%s %d-%d", peer, first, last))
	r.z.mu.Unlock()
	if uint32(first/4) != r.number || uint32(last/4) != r.number {
		return nil, errors.New("the chunks are not of the run")
	}
	body, err := r.z.peers[peer].OpenRange(ctx, r.of, r.offset(first), n)
	if err != nil {
		return nil, err
	}
	return &nearBody{body, r, peer}, nil
}

// offsets are where chunks begin in their streams, by the stream.
var offsets sync.Map

func (r *route) offset(chunk int) int64 {
	table, _ := offsets.Load(r.of)
	return int64(table.(*blockmap.Table).Chunks[chunk].Block) * blockmap.BlockSize
}

func (r *route) OpenPiece(context.Context, string, bool, int64, int64) (io.ReadCloser, error) {
	return nil, errors.New("no pieces here")
}

type nearBody struct {
	io.ReadCloser
	r    *route
	peer string
}

func (b *nearBody) Source() string { return b.peer }
func (b *nearBody) Distrust()      { b.r.Doubt(b.peer) }

// nearWorld is a world with peers.
func nearWorld(t *testing.T, seed uint64, o fetcher.Options, names ...string) (*world, *zone, *fetcher.Bound, []blockmap.Want) {
	t.Helper()
	w := newWorld(t, blocktest.NewImage(t, seed, 2000), o)
	wants := w.wants(t)
	for _, x := range wants {
		offsets.Store(x.Stream.ID(), x.Table)
	}
	z := newZone(t, w, names...)
	return w, z, z.of(w), wants
}

func fetchTook(t *testing.T, b *fetcher.Bound, wants []blockmap.Want) time.Duration {
	t.Helper()
	began := time.Now()
	if err := b.Fetch(t.Context(), wants); err != nil {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
	return time.Since(began)
}

// The peer is asked, and the origin is not.
func TestPeerFirst(t *testing.T) {
	w, z, b, wants := nearWorld(t, 200, fetcher.Options{}, "a", "b")
	if err := b.Fetch(t.Context(), wants); err != nil {
		t.Fatal(err)
	}
	if n := w.origin.Requests() + z.peers["b"].Requests(); n != 0 || resident(wants) != len(wants) {
		t.Errorf("%d requests elsewhere", n)
	}
	st := w.stats(t)
	if st.ZoneChunks == 0 || st.ZoneBytes == 0 || st.ZoneRequests != int64(z.peers["a"].Requests()) || st.Requests+st.Bytes+st.Chunks != 0 {
		t.Errorf("%+v", st)
	}
}

// A peer that fails, in whatever way, is passed over without a pause, and all that was
// asked for in one request is asked for in one request again.
func TestPassOver(t *testing.T) {
	for name, fault := range map[string]blocktest.Faults{
		"fails": {Err: blocktest.ErrInjected}, "cut": {Cut: true}, "breaks": {Break: blocktest.ErrInjected}, "lies": {Flip: true}, "gone": {Err: errGone},
	} {
		for _, all := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, all %v", name, all), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w, z, b, wants := nearWorld(t, 201, fetcher.Options{Temporary: func(err error) bool { return !errors.Is(err, errGone) }}, "a", "b")
					defer w.fetcher.Close()
					z.peers["a"].Set(fault)
					if all {
						z.peers["b"].Set(fault)
					}
					if took := fetchTook(t, b, wants[:4]); took > time.Millisecond {
						t.Errorf("it took %v", took)
					}
					if n := w.origin.Requests(); (n > 0) != all || n > 2 {
						t.Errorf("%d requests to the origin", n)
					}
					if got := z.requests(); len(got) > 4 || !all && name == "fails" && !slices.Equal(got, []string{"a 0-3", "b 0-3"}) {
						t.Errorf("asked %q", got)
					}
					if n := z.distrusted["a"]; (n > 0) != (name == "lies") {
						t.Errorf("it was distrusted %d times", n)
					}
					if st := w.fetcher.Stats(); st.PassedOver == 0 || st.Failed != 0 || st.Retries != 0 {
						t.Errorf("%+v", st)
					}
				})
			})
		}
	}
}

// A demand that is late is asked for at the next source as well.
func TestLatePeer(t *testing.T) {
	for name, fault := range map[string]blocktest.Faults{"no answer": {Mute: true}, "no bytes": {Hang: true}, "trickles": {Trickle: 10}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, z, b, wants := nearWorld(t, 202, fetcher.Options{}, "a", "b")
				defer w.fetcher.Close()
				z.peers["a"].Set(fault)
				z.hedges = 1
				if took := fetchTook(t, b, wants[:1]); took < z.hedgeAfter || took > z.hedgeAfter+300*time.Millisecond {
					t.Errorf("it took %v", took)
				}
				if w.origin.Requests() != 0 || z.overtaken["a"] != 1 {
					t.Errorf("%d requests to the origin, overtaken %v", w.origin.Requests(), z.overtaken)
				}
				synctest.Wait()
				if n := z.peers["a"].Alive(); n != 0 {
					t.Errorf("%d requests to the late peer go on", n)
				}
				// The budget is spent. The origin is asked while there is time for it.
				if took := fetchTook(t, b, wants[1:2]); took < 9*time.Second || took > 11*time.Second {
					t.Errorf("without a budget it took %v", took)
				}
				if st := w.fetcher.Stats(); st.Failed != 0 || st.Extra != 1 {
					t.Errorf("%+v", st)
				}
			})
		})
	}
}

// However many readers wait for a peer that hangs, all are served in time.
func TestManyWaitForAPeerThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, z, b, wants := nearWorld(t, 203, fetcher.Options{MaxRequest: 1}, "a")
		defer w.fetcher.Close()
		z.peers["a"].Set(blocktest.Faults{Mute: true})
		var readers sync.WaitGroup
		for _, one := range apart(wants) {
			readers.Go(func() {
				if took := fetchTook(t, b, one); took > 11*time.Second {
					t.Errorf("it took %v", took)
				}
			})
		}
		readers.Wait()
		if st := w.fetcher.Stats(); st.Failed != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// What waits for its turn at a peer goes elsewhere once the peer is not usable any more.
func TestUnusablePeer(t *testing.T) {
	for _, ahead := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w, z, b, wants := nearWorld(t, 204, fetcher.Options{MaxRequest: 1}, "a", "b")
			defer w.fetcher.Close()
			z.peers["a"].Set(blocktest.Faults{Err: blocktest.ErrInjected, Delay: time.Second, Left: 8})
			done := make(chan time.Duration)
			go func() {
				if ahead {
					began := time.Now()
					checkDone(t, b.Replay(t.Context(), wants, fetcher.ReplayOptions{}))
					done <- time.Since(began)
				} else {
					done <- fetchTook(t, b, wants)
				}
			}()
			time.Sleep(500 * time.Millisecond)
			asked := len(z.requests())
			z.mu.Lock()
			z.unusable["a"] = true
			z.mu.Unlock()
			if took := <-done; took > 2*time.Second {
				t.Errorf("it took %v", took)
			}
			if n := z.peers["a"].Requests(); n > asked {
				t.Errorf("%d requests to the peer, %d of them later", n, n-asked)
			}
			if n := w.origin.Requests(); n != 0 {
				t.Errorf("%d requests to the origin", n)
			}
		})
	}
}

// A peer has a bounded number of requests, and what has no room waits for it.
func TestPeerHasRoomForEight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, z, b, wants := nearWorld(t, 205, fetcher.Options{MaxRequest: 1}, "a")
		defer w.fetcher.Close()
		z.peers["a"].Set(blocktest.Faults{Delay: 50 * time.Millisecond})
		fetchTook(t, b, wants)
		if n := z.peers["a"].Most(); n != 8 {
			t.Errorf("%d requests at once", n)
		}
		if n := w.origin.Requests(); n != 0 {
			t.Errorf("%d requests to the origin", n)
		}
	})
}

// A peer that hangs delays nothing that comes from elsewhere.
func TestPeerThatHangsHoldsUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, z, b, wants := nearWorld(t, 206, fetcher.Options{MaxRequest: 1}, "a")
		defer w.fetcher.Close()
		z.peers["a"].Set(blocktest.Faults{Mute: true})
		ctx, cancel := context.WithCancel(t.Context())
		var readers sync.WaitGroup
		defer readers.Wait()
		defer cancel()
		third := len(wants) / 3
		hang := make(map[blockmap.Digest]bool)
		for _, one := range apart(wants[:third]) {
			hang[one[0].Table.Chunks[one[0].Chunk].Digest] = true
			readers.Go(func() { b.Fetch(ctx, one) })
		}
		time.Sleep(100 * time.Millisecond)
		other := w.fetcher.From(w.origin)
		for _, one := range apart(wants[third : third+20]) {
			if hang[one[0].Table.Chunks[one[0].Chunk].Digest] {
				continue // a duplicate waits for its original
			}
			if took := fetchTook(t, other, one); took > time.Millisecond {
				t.Errorf("it took %v", took)
			}
		}
	})
}

// A reader that gives up ends the request to the peer.
func TestReaderLeavesPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, z, b, wants := nearWorld(t, 207, fetcher.Options{}, "a")
		defer w.fetcher.Close()
		z.peers["a"].Set(blocktest.Faults{Hang: true})
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := b.Fetch(ctx, wants[:2]); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		synctest.Wait()
		if n := z.peers["a"].Alive() + w.fetcher.Fetches(); n != 0 {
			t.Errorf("%d requests and fetches go on", n)
		}
	})
}

// The origin of a host that owns a chunk fails: peers are asked, once.
func TestOriginFailsThenPeers(t *testing.T) {
	for _, fault := range []error{blocktest.ErrInjected, errGone} {
		synctest.Test(t, func(t *testing.T) {
			w, z, b, wants := nearWorld(t, 208, fetcher.Options{RetryFor: 5 * time.Second, Temporary: func(err error) bool { return !errors.Is(err, errGone) }}, "a")
			defer w.fetcher.Close()
			w.origin.Set(blocktest.Faults{Err: fault})
			z.peers["a"].Set(blocktest.Faults{Err: blocktest.ErrInjected, Left: 1})
			fetchTook(t, b, wants[:1])
			if z.failed != 1 {
				t.Errorf("%d routes began after a failure", z.failed)
			}
			z.peers["a"].Set(blocktest.Faults{Err: blocktest.ErrInjected})
			began := time.Now()
			if err := b.Fetch(t.Context(), wants[1:2]); !errors.Is(err, fault) || time.Since(began) > 6*time.Second {
				t.Errorf("after %v: %v", time.Since(began), err)
			}
		})
	}
}

// A cache without room is no fault of a peer.
func TestPeerAndFullCache(t *testing.T) {
	var log warnings
	w, _ := roomless(t, blocktest.NewImage(t, 209, 1000), diskFaults["full"], &log)
	wants := w.wants(t)
	for _, x := range wants {
		offsets.Store(x.Stream.ID(), x.Table)
	}
	z := newZone(t, w, "a")
	b := z.of(w)
	if err := b.Fetch(t.Context(), wants[:3]); err != nil {
		t.Error(err)
	}
	if st := w.stats(t); st.Held == 0 || st.PassedOver != 0 || w.origin.Requests() != 0 {
		t.Errorf("%+v", st)
	}
}

// Close ends requests to peers that hang.
func TestCloseWithPeers(t *testing.T) {
	// So patient that no reader goes to the origin, however busy the machine is.
	w, z, b, wants := nearWorld(t, 210, fetcher.Options{MaxRequest: 1, RetryFor: time.Hour}, "a")
	z.peers["a"].Set(blocktest.Faults{Hang: true})
	var readers sync.WaitGroup
	for _, one := range apart(wants[:8]) {
		readers.Go(func() {
			if err := b.Fetch(t.Context(), one); !errors.Is(err, blockmap.ErrClosed) {
				t.Errorf("got %v", err)
			}
		})
	}
	settled(t, "the peer is asked for all", func() bool { return z.peers["a"].Alive() == 8 })
	w.fetcher.Close()
	readers.Wait()
	if n := z.peers["a"].Alive(); n != 0 {
		t.Errorf("%d bodies were left open", n)
	}
}

// The owner's own requests for peers leave the queue of a peer, and a duplicate's.
func TestOwnedWhileQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, z, b, wants := nearWorld(t, 211, fetcher.Options{MaxRequest: 1}, "a")
		defer w.fetcher.Close()
		z.peers["a"].Set(blocktest.Faults{Mute: true})
		ctx, cancel := context.WithCancel(t.Context())
		var readers sync.WaitGroup
		defer readers.Wait()
		defer cancel()
		for _, one := range apart(wants) {
			readers.Go(func() { b.Fetch(ctx, one) })
		}
		synctest.Wait()
		began := time.Now()
		if err := b.FetchOwned(t.Context(), wants); err != nil || time.Since(began) > 100*time.Millisecond {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
	})
}

// An owner does not wait for a bundle download either, which may be waiting for a peer.
func TestOwnedWhileDownloading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _, b, wants := nearWorld(t, 212, fetcher.Options{}, "a")
		defer w.fetcher.Close()
		l := w.bundle(t, wants)
		l.let(0, nil)
		r := b.Replay(t.Context(), wants, fetcher.ReplayOptions{Bundle: &l.Bundle})
		defer r.Stop()
		synctest.Wait()
		began := time.Now()
		if err := b.FetchOwned(t.Context(), wants[:3]); err != nil || time.Since(began) > time.Millisecond {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		if w.origin.Requests() == 0 {
			t.Error("the origin was not asked")
		}
	})
}

// A replay in a zone fetches every chunk of its list, in another order on each host.
func TestReplaysDiffer(t *testing.T) {
	var orders [][]string
	for range 2 {
		w, z, b, wants := nearWorld(t, 213, fetcher.Options{MaxRequest: 1}, "a")
		checkDone(t, b.Replay(t.Context(), wants, fetcher.ReplayOptions{}))
		if n := resident(wants); n != len(wants) || w.origin.Requests() != 0 {
			t.Errorf("%d of %d chunks", n, len(wants))
		}
		orders = append(orders, z.requests())
	}
	if slices.Equal(orders[0], orders[1]) {
		t.Error("two hosts fetch in the same order")
	}
}

// alive has a peer say that it will answer, now and then, until the returned function is called.
func (z *zone) alive(peer string) (stop func()) {
	done := make(chan bool)
	var says sync.WaitGroup
	says.Go(func() {
		for {
			z.mu.Lock()
			if z.signs == nil {
				z.signs = make(map[string]time.Time)
			}
			z.signs[peer] = time.Now()
			z.mu.Unlock()
			select {
			case <-done:
				return
			case <-time.After(400 * time.Millisecond):
			}
		}
	})
	return func() {
		close(done)
		says.Wait()
	}
}

// A peer that says that it waits for the registry is waited for: nobody else would have the
// chunk sooner. That holds for what waits for its turn there, too.
func TestPeerThatWaitsForTheRegistry(t *testing.T) {
	for _, many := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w, z, b, wants := nearWorld(t, 214, fetcher.Options{MaxRequest: 1}, "a", "b")
			defer w.fetcher.Close()
			z.hedges = 100
			z.peers["a"].Set(blocktest.Faults{Delay: 4 * time.Second})
			defer z.alive("a")()
			all := apart(wants)[:1]
			if many {
				all = apart(wants)[:12]
			}
			var readers sync.WaitGroup
			for _, one := range all {
				readers.Go(func() {
					if took := fetchTook(t, b, one); took > 9*time.Second { // two after each other
						t.Errorf("it took %v", took)
					}
				})
			}
			readers.Wait()
			if n := w.origin.Requests() + z.peers["b"].Requests(); n != 0 || len(z.overtaken) != 0 {
				t.Errorf("%d requests elsewhere, overtaken %v", n, z.overtaken)
			}
		})
	}
}

// A demand waits for the pieces of a bundle that are under way: a request for its chunk would
// read the same content from the registry again. If nothing comes, it is requested.
func TestDemandWaitsForPieces(t *testing.T) {
	for _, after := range []time.Duration{0, 1500 * time.Millisecond, 3500 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			w, z, b, wants := nearWorld(t, 215, fetcher.Options{}, "a")
			defer w.fetcher.Close()
			l := w.bundle(t, wants)
			l.let(0, nil)
			r := b.Replay(t.Context(), wants, fetcher.ReplayOptions{Bundle: &l.Bundle})
			defer r.Stop()
			synctest.Wait()
			last := len(l.ends) / 3
			if after > 0 {
				// The first frames come at once. The wanted one comes later, others before it.
				go func() {
					time.Sleep(time.Second)
					l.let(l.ends[0], nil)
					for at := 1500 * time.Millisecond; at < after; at += 500 * time.Millisecond {
						time.Sleep(500 * time.Millisecond)
						l.let(l.ends[int(at/(500*time.Millisecond))], nil)
					}
					time.Sleep(500 * time.Millisecond)
					l.let(1<<40, nil)
				}()
			}
			took := fetchTook(t, b, l.part(last).Wants[:1])
			switch asked := len(z.requests()) + w.origin.Requests(); {
			case after > 0 && (asked != 0 || took < after):
				t.Errorf("%d requests, after %v", asked, took)
			case after == 0 && (asked == 0 || took < time.Second || took > 3*time.Second):
				t.Errorf("nothing comes: %d requests, after %v", asked, took)
			}
		})
	}
}
