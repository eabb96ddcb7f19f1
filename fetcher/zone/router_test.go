package zone

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

var start = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// routed is a Router with members, and a run that others own, by owners[0] and owners[1].
func routed(t testing.TB, n int) (r *Router, run Run, owners []string) {
	t.Helper()
	r = NewRouter("host-0", RouterOptions{Zone: "zone", Seed: 1})
	r.SetMembers(names(n))
	for i := range 10000 {
		run := Run{Number: uint32(i)}
		if owners := r.Ring().Owners(nil, run, 3); !slices.Contains(owners, "host-0") {
			return r, run, owners
		}
	}
	t.Fatal("no run is owned by others")
	return
}

// next checks whom Next returns; "" for the registry.
func next(t testing.TB, r *Router, run Run, a *Attempt, now time.Time, want string, owner bool) {
	t.Helper()
	hop, ok := r.Next(run, a, now)
	if hop.Peer != want || ok != (want != "") || hop.Owner != (owner && ok) {
		t.Fatalf("next is %q (owner %v), want %q (owner %v)", hop.Peer, hop.Owner, want, owner)
	}
	if ok {
		r.Began(hop.Peer, now)
	}
}

// An owner that lives and does not bring the run is followed by the second owner, and by the
// registry. Owners that cannot be reached are followed by the next one, up to this host.
func TestOwnersInOrder(t *testing.T) {
	for _, result := range []Result{Absent, Busy} {
		r, run, owners := routed(t, 20)
		var a Attempt
		next(t, r, run, &a, start, owners[0], true)
		r.Ended(run, &a, owners[0], Outcome{Result: result}, start)
		next(t, r, run, &a, start, owners[1], true)
		r.Ended(run, &a, owners[1], Outcome{Result: result}, start)
		next(t, r, run, &a, start, "", false)
	}
	for _, o := range []Outcome{{Result: Broken}, {Result: Late, Silent: true}, {Result: Late}, {Result: Refused}, {Result: Wrong}} {
		r, run, _ := routed(t, 20)
		all := r.Ring().Owners(nil, run, 20)
		var a, b Attempt
		now := start
		asked := 0
		for _, name := range all {
			if name == "host-0" || asked == r.o.MaxFailed {
				break
			}
			asked++
			next(t, r, run, &a, now, name, true)
			r.Ended(run, &a, name, o, now)
		}
		if asked < 3 {
			t.Fatal("the test tests nothing")
		}
		next(t, r, run, &a, now, "", false)
		// Another attempt begins where this one has ended.
		hop, ok := r.Next(run, &b, now)
		if want := all[asked]; ok != (want != "host-0") || ok && hop != (Hop{want, true}) {
			t.Errorf("%v: next is %v, %v, want %s", o.Result, hop, ok, want)
		}
	}
}

// When a zone has fallen in two, all hosts of a half ask the same member for a run, and it
// asks the registry: once in each half.
func TestHalvesAgree(t *testing.T) {
	const n = 40
	ring := NewRing("zone", names(n))
	var routers []*Router
	for i := range n {
		r := NewRouter(names(n)[i], RouterOptions{Zone: "zone", Seed: uint64(i + 1)})
		r.SetRing(ring)
		routers = append(routers, r)
	}
	half := make(map[string]int)
	for i, name := range names(n) {
		half[name] = i % 2
	}
	gaveUp := 0
	for i := range 200 {
		run := Run{Number: uint32(i)}
		readers := make(map[int]map[string]bool)
		for h, r := range routers {
			// Each asks for the runs at another time.
			now := start.Add(time.Duration(i*50+h) * time.Millisecond)
			var a Attempt
			reader := r.self
			for {
				hop, ok := r.Next(run, &a, now)
				if !ok {
					break
				}
				r.Began(hop.Peer, now)
				if half[hop.Peer] == h%2 {
					reader = hop.Peer
					r.Signed(hop.Peer, time.Millisecond, now)
					r.Ended(run, &a, hop.Peer, Outcome{Result: Served, Took: time.Millisecond}, now)
					break
				}
				now = now.Add(250 * time.Millisecond)
				r.Ended(run, &a, hop.Peer, Outcome{Result: Late, Silent: true}, now)
			}
			if a.failures == r.o.MaxFailed {
				gaveUp++
			}
			if readers[h%2] == nil {
				readers[h%2] = make(map[string]bool)
			}
			readers[h%2][reader] = true
		}
		for h, who := range readers {
			if len(who) != 1 && gaveUp == 0 {
				t.Errorf("run %d, half %d: %d hosts read it from the registry", i, h, len(who))
			}
		}
	}
	if gaveUp > 20 {
		t.Errorf("%d attempts gave up", gaveUp)
	}
}

// A host that reaches nobody goes to the registry at once, except for one request now and
// then. A sign of life ends that.
func TestHostThatReachesNobody(t *testing.T) {
	r := NewRouter("host-0", RouterOptions{Zone: "zone", Seed: 1})
	r.SetMembers(names(500))
	asked := func(from, to int, now time.Time) (n int) {
		for i := from; i < to; i++ {
			var a Attempt
			run := Run{Number: uint32(i)}
			for {
				hop, ok := r.Next(run, &a, now)
				if !ok {
					break
				}
				n++
				r.Began(hop.Peer, now)
				r.Ended(run, &a, hop.Peer, Outcome{Result: Late, Silent: true}, now)
			}
		}
		return n
	}
	if n := asked(0, 100, start); n != maxFailures+1 {
		t.Errorf("%d requests until it is known", n)
	}
	if n := asked(100, 200, start.Add(probeEvery)); n != 1 {
		t.Errorf("%d requests later", n)
	}
	r.Began("host-7", start)
	r.Signed("host-7", time.Millisecond, start)
	if n := asked(200, 210, start.Add(probeEvery)); n < 10 {
		t.Errorf("%d requests when one has answered", n)
	}
}

// What this host owns, and what it would own if those before it were usable, it asks the
// registry for.
func TestOwnRuns(t *testing.T) {
	r := NewRouter("host-0", RouterOptions{Zone: "zone"})
	var a Attempt
	next(t, r, Run{}, &a, start, "", false) // no members
	r.SetMembers(names(5))
	first, second := 0, 0
	for i := range 200 {
		run := Run{Number: uint32(i)}
		owners := r.Ring().Owners(nil, run, 2)
		if r.Owns(run) != (owners[0] == "host-0") {
			t.Fatal("Owns does not say who the owner is")
		}
		var a Attempt
		switch "host-0" {
		case owners[0]:
			first++
			next(t, r, run, &a, start, "", false)
		case owners[1]:
			second++
			next(t, r, run, &a, start, owners[0], true)
			r.Ended(run, &a, owners[0], Outcome{Result: Absent}, start)
			next(t, r, run, &a, start, "", false)
		}
	}
	if first == 0 || second == 0 {
		t.Error("the test tests nothing")
	}
}

// If the registry fails for a host, it asks other members even for what it owns.
func TestRegistryFailed(t *testing.T) {
	r := NewRouter("host-0", RouterOptions{Zone: "zone"})
	r.SetMembers(names(5))
	for i := range 200 {
		run := Run{Number: uint32(i)}
		owners := slices.DeleteFunc(r.Ring().Owners(nil, run, 3), func(x string) bool { return x == "host-0" })[:2]
		a := Attempt{RegistryFailed: true}
		for _, o := range owners {
			next(t, r, run, &a, start, o, true)
			r.Ended(run, &a, o, Outcome{Result: Absent}, start)
		}
		next(t, r, run, &a, start, "", false)
		for _, o := range owners {
			r.mu.peers[o].absents = 0
		}
	}
}

// A host that is no member itself asks the owners.
func TestNoMember(t *testing.T) {
	r := NewRouter("elsewhere", RouterOptions{})
	r.SetMembers(names(3))
	var a Attempt
	if _, ok := r.Next(Run{}, &a, start); !ok || r.Owns(Run{}) {
		t.Error("it does not ask the members")
	}
}

// Holders that the owner names are asked, then the owner once more, then the second owner.
func TestReferrals(t *testing.T) {
	r, run, owners := routed(t, 20)
	var others []string
	for _, name := range names(20)[1:] {
		if !slices.Contains(owners, name) {
			others = append(others, name)
		}
	}
	var a Attempt
	next(t, r, run, &a, start, owners[0], true)
	r.Ended(run, &a, owners[0], Outcome{Result: Busy, RetryAfter: time.Second, Holders: others[:2]}, start)
	// The owner of other runs is asked all the same: it is busy with this one only.
	var b Attempt
	next(t, r, run, &b, start, owners[0], true)
	next(t, r, run, &a, start, others[0], false)
	r.Ended(run, &a, others[0], Outcome{Result: Absent}, start)
	next(t, r, run, &a, start, others[1], false)
	r.Ended(run, &a, others[1], Outcome{Result: Broken}, start)
	next(t, r, run, &a, start, owners[0], true)
	r.Ended(run, &a, owners[0], Outcome{Result: Busy, Holders: others[2:3]}, start)
	next(t, r, run, &a, start, others[2], false)
	// A holder that is busy names others. It is not asked again, but the owner is.
	r.Ended(run, &a, others[2], Outcome{Result: Busy, Holders: others[3:4]}, start)
	next(t, r, run, &a, start, others[3], false)
	r.Ended(run, &a, others[3], Outcome{Result: Absent}, start)
	next(t, r, run, &a, start, owners[0], true)
	// Whom it has named before does not count.
	r.Ended(run, &a, owners[0], Outcome{Result: Busy, Holders: others[:3]}, start)
	next(t, r, run, &a, start, owners[1], true)
	r.Ended(run, &a, owners[1], Outcome{Result: Absent}, start)
	next(t, r, run, &a, start, "", false)
}

// Names that are no members, this host, the peer itself or already asked do not count.
func TestHostileHolders(t *testing.T) {
	r, run, owners := routed(t, 20)
	var a Attempt
	next(t, r, run, &a, start, owners[0], true)
	r.Ended(run, &a, owners[0], Outcome{Result: Busy, Holders: []string{"host-0", "evil.example:80", "", owners[0]}}, start)
	next(t, r, run, &a, start, owners[1], true)
	r.Ended(run, &a, owners[1], Outcome{Result: Absent}, start)
	next(t, r, run, &a, start, "", false)
	if n := len(r.mu.peers); n != 2 {
		t.Errorf("%d peers are remembered", n)
	}
}

// Whatever peers answer, an attempt ends after a few, and asks only members, each once
// except for the owner.
func TestAttemptsEnd(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	members := names(30)
	for i := range 2000 {
		r := NewRouter("host-0", RouterOptions{Zone: "zone", Seed: uint64(i + 1)})
		r.SetMembers(members)
		checkAttempt(t, r, Run{Number: uint32(i)}, func(string) Outcome {
			o := Outcome{Result: Result(rng.IntN(int(Cancelled) + 1)), RetryAfter: time.Duration(rng.Int64())}
			for range rng.IntN(40) {
				o.Holders = append(o.Holders, fmt.Sprintf("host-%d", rng.IntN(40)))
			}
			return o
		})
	}
}

func checkAttempt(t *testing.T, r *Router, run Run, answer func(peer string) Outcome) {
	var a Attempt
	asked := make(map[string]int)
	now := start
	owner := r.Ring().Owners(nil, run, 1)[0]
	for n := 0; ; n++ {
		hop, ok := r.Next(run, &a, now)
		if !ok {
			break
		}
		if n >= r.o.MaxAsked {
			t.Fatalf("%d peers were asked", n)
		}
		asked[hop.Peer]++
		if hop.Owner {
			owner = hop.Peer
		}
		// One may be asked as a holder, and as the owner after that.
		if !r.Ring().Has(hop.Peer) || hop.Peer == r.self || asked[hop.Peer] > 1 && hop.Peer != owner {
			t.Fatalf("%s was asked: %v", hop.Peer, asked)
		}
		r.Began(hop.Peer, now)
		r.Ended(run, &a, hop.Peer, answer(hop.Peer), now)
		now = now.Add(time.Millisecond)
	}
	if len(r.mu.peers) > r.Ring().Len() {
		t.Fatalf("%d peers are remembered", len(r.mu.peers))
	}
	for name, h := range r.mu.peers {
		if h.active != 0 {
			t.Fatalf("%s has %d requests in flight", name, h.active)
		}
	}
}

func FuzzAttempt(f *testing.F) {
	f.Add(uint32(1), []byte("\x01host-1,host-2\n\x02\n\x01host-1"))
	f.Add(uint32(7), []byte("\x06\n\x03\n\x05"))
	f.Fuzz(func(t *testing.T, number uint32, answers []byte) {
		r := NewRouter("host-0", RouterOptions{Zone: "zone", Seed: 1})
		r.SetMembers(names(10))
		checkAttempt(t, r, Run{Number: number}, func(string) (o Outcome) {
			line := answers
			if i := slices.Index(answers, '\n'); i >= 0 {
				line, answers = answers[:i], answers[i+1:]
			} else {
				answers = nil
			}
			if len(line) == 0 {
				return Outcome{Result: Busy, Holders: names(10)}
			}
			return Outcome{Result: Result(line[0]) % (Cancelled + 1), Holders: ParseHolders(string(line[1:])), Took: time.Duration(len(line)), RetryAfter: -1}
		})
	})
}

// After failures a peer rests for longer and longer, and then one request tries it.
func TestRest(t *testing.T) {
	r, run, owners := routed(t, 20)
	now := start
	var longest time.Duration
	for n := range 12 {
		var a Attempt
		next(t, r, run, &a, now, owners[0], true)
		// Only one request tries a peer that has failed.
		if n > 0 {
			var b Attempt
			next(t, r, run, &b, now, owners[1], true)
			r.Ended(run, &b, owners[1], Outcome{Result: Served}, now)
		}
		r.Ended(run, &a, owners[0], Outcome{Result: Broken}, now)
		// Others that were in flight with it make the rest no longer.
		rest := r.mu.peers[owners[0]].rest
		r.Began(owners[0], now)
		r.Ended(run, &a, owners[0], Outcome{Result: Broken}, now)
		if r.Usable(owners[0], now) || !r.mu.peers[owners[0]].rest.Equal(rest) {
			t.Fatal("it is asked, or two failures count")
		}
		d := rest.Sub(now)
		if d < restLeast || d > restLeast+min(restFirst<<n, restMost) {
			t.Fatalf("rest %d is %v", n, d)
		}
		longest = max(longest, d)
		now = rest
	}
	if longest < 10*time.Second {
		t.Errorf("the longest rest is %v", longest)
	}
	// It works again.
	var a, b Attempt
	next(t, r, run, &a, now, owners[0], true)
	r.Ended(run, &a, owners[0], Outcome{Result: Served, Took: time.Millisecond}, now)
	next(t, r, run, &b, now, owners[0], true)
	r.Ended(run, &b, owners[0], Outcome{Result: Broken}, now)
	if d := r.mu.peers[owners[0]].rest.Sub(now); d > restLeast+restFirst {
		t.Errorf("the next failure costs %v", d)
	}
}

// A trial whose end is never heard of does not keep a peer out for good.
func TestTrialIsForgotten(t *testing.T) {
	r, run, owners := routed(t, 20)
	var a, b, c Attempt
	next(t, r, run, &a, start, owners[0], true)
	r.Ended(run, &a, owners[0], Outcome{Result: Broken}, start)
	now := start.Add(time.Minute)
	next(t, r, run, &b, now, owners[0], true)
	next(t, r, run, &c, now, owners[1], true)
	c = Attempt{}
	next(t, r, run, &c, now.Add(trialFor), owners[0], true)
}

// Pauses are drawn at random, so that hosts do not come back all at once.
func TestJitter(t *testing.T) {
	seen := make(map[time.Duration]bool)
	for seed := range uint64(20) {
		r := NewRouter("host-0", RouterOptions{Seed: seed + 1})
		r.SetMembers(names(3))
		r.Began("host-1", start)
		r.Ended(Run{}, new(Attempt), "host-1", Outcome{Result: Broken}, start)
		seen[r.mu.peers["host-1"].rest.Sub(start)] = true
	}
	if len(seen) < 15 {
		t.Errorf("20 hosts have %d different pauses", len(seen))
	}
}

// A peer that has sent wrong bytes is not asked for a long time, even if it leaves the
// zone and joins again, and each time for longer.
func TestDistrust(t *testing.T) {
	r, run, owners := routed(t, 20)
	now := start
	for n := range 5 {
		var a Attempt
		next(t, r, run, &a, now, owners[0], true)
		r.Ended(run, &a, owners[0], Outcome{Result: Wrong}, now)
		all := names(20)
		r.SetMembers(slices.DeleteFunc(all, func(x string) bool { return x == owners[0] }))
		r.SetMembers(names(20))
		until := r.mu.peers[owners[0]].shun
		if d := until.Sub(now); d < 10*time.Minute<<(2*n) && d != shunMost {
			t.Errorf("it is distrusted for %v", d)
		}
		a = Attempt{}
		next(t, r, run, &a, until.Add(-1), owners[1], true)
		r.Ended(run, &a, owners[1], Outcome{Result: Served}, now)
		now = until
	}
	// The memory for those who left is bounded.
	many := names(3000)
	r.SetMembers(many)
	for _, name := range many {
		r.Distrust(name, now)
	}
	r.SetMembers(names(1))
	if n := len(r.mu.peers); n > maxGone+1 {
		t.Errorf("%d peers are remembered", n)
	}
}

// A peer that is busy as a whole is spared for as long as it says, within bounds, and is
// not counted as failed.
func TestSpared(t *testing.T) {
	for _, after := range []time.Duration{-time.Hour, 0, 2 * time.Second, 1000 * time.Hour} {
		r, run, owners := routed(t, 20)
		var a, b Attempt
		next(t, r, run, &a, start, owners[0], true)
		r.Ended(run, &a, owners[0], Outcome{Result: Busy, RetryAfter: after}, start)
		next(t, r, run, &b, start, owners[1], true)
		h := r.mu.peers[owners[0]]
		d := min(max(after, spareFirst), spareMost)
		if got := h.spare.Sub(start); got < d/2 || got > d || h.fails != 0 || h.failed != 0 {
			t.Errorf("it is spared for %v, with %d failures", got, h.fails)
		}
		b = Attempt{}
		next(t, r, run, &b, h.spare, owners[0], true)
	}
}

// An owner that never has anything, and one that is always overtaken, is passed over.
func TestUseless(t *testing.T) {
	for result, most := range map[Result]int{Absent: maxAbsents, Slow: maxSlow} {
		r, run, owners := routed(t, 20)
		for range most {
			var a Attempt
			next(t, r, run, &a, start, owners[0], true)
			r.Ended(run, &a, owners[0], Outcome{Result: result}, start)
		}
		var a Attempt
		next(t, r, run, &a, start, owners[1], true)
	}
}

// Requests that nobody wants any more say nothing about a peer.
func TestCancelled(t *testing.T) {
	r, run, owners := routed(t, 20)
	for range 100 {
		var a Attempt
		next(t, r, run, &a, start, owners[0], true)
		r.Ended(run, &a, owners[0], Outcome{Result: Cancelled}, start)
	}
	if h := r.mu.peers[owners[0]]; h.fails+int(h.failed) != 0 {
		t.Error("they count as failures")
	}
}

// Extra requests are a tenth of all, after a few.
func TestHedgeBudget(t *testing.T) {
	r, _, _ := routed(t, 20)
	extra := 0
	for range 1000 {
		r.Began("host-1", start)
		for r.MayHedge(start) {
			extra++
		}
	}
	if extra < 95 || extra > 110 {
		t.Errorf("%d of 1000", extra)
	}
}

// A Router takes next to no memory before it is used: simulations have thousands.
func TestNewRouterIsSmall(t *testing.T) {
	ring := NewRing("zone", names(1000))
	n := testing.AllocsPerRun(100, func() {
		r := NewRouter("host-0", RouterOptions{Seed: 1})
		r.SetRing(ring)
	})
	if n > 6 {
		t.Errorf("%v allocations", n)
	}
}

func TestPeers(t *testing.T) {
	r, run, owners := routed(t, 5)
	r.Began(owners[0], start)
	r.Ended(run, nil, owners[0], Outcome{Result: Wrong}, start)
	r.Began(owners[1], start)
	all := r.Peers(start)
	if len(all) != 4 || !slices.IsSortedFunc(all, func(a, b PeerStatus) int { return len(a.Name) - len(b.Name) }) {
		t.Fatalf("%+v", all)
	}
	for _, p := range all {
		switch p.Name {
		case owners[0]:
			if p.State != Distrusted || p.Wrong != 1 || !p.Until.After(start) {
				t.Errorf("%+v", p)
			}
		case owners[1]:
			if p.State != Working || p.Active != 1 {
				t.Errorf("%+v", p)
			}
		}
	}
}

// Routers are used by many goroutines at once.
func TestRouterIsSafe(t *testing.T) {
	r, _, _ := routed(t, 20)
	done := make(chan bool)
	for i := range 8 {
		go func() {
			defer func() { done <- true }()
			for n := range 500 {
				run := Run{Number: uint32(n)}
				var a Attempt
				for {
					hop, ok := r.Next(run, &a, time.Now())
					if !ok {
						break
					}
					r.Began(hop.Peer, time.Now())
					r.Ended(run, &a, hop.Peer, Outcome{Result: Result(n % 9), Holders: names(5)}, time.Now())
					r.Late(hop.Peer, Progress{Asked: start}, time.Now())
					r.Patience(hop.Peer, start, time.Now())
					r.Hedge(run, &a, time.Now())
				}
				if n%100 == i {
					r.SetMembers(names(10 + i))
				}
				r.MayHedge(time.Now())
				r.Peers(time.Now())
			}
		}()
	}
	for range 8 {
		<-done
	}
}
