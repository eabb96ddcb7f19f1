package zone

import (
	"fmt"
	"testing"
	"time"
)

// give has a peer give its first sign of life to n requests.
func (r *Router) give(peer string, n int, after time.Duration, now time.Time) {
	for range n {
		r.Began(peer, now.Add(-after))
		r.Signed(peer, after, now)
		r.Ended(Run{}, nil, peer, Outcome{Result: Served, Took: after}, now)
	}
}

// late returns after which time a request to a peer that gives no sign has failed.
func (r *Router) late(peer string, asked time.Time) time.Duration {
	now := asked
	for {
		d := r.Patience(peer, asked, now)
		if d <= 0 {
			return now.Sub(asked)
		}
		now = now.Add(d)
	}
}

// How long a peer has for its first sign depends on how long others take, within bounds.
func TestPatience(t *testing.T) {
	for _, c := range []struct {
		signs int
		after time.Duration
		want  time.Duration
	}{
		{0, 0, time.Second}, // nothing is known
		{7, time.Millisecond, time.Second},
		{8, time.Millisecond, 250 * time.Millisecond},
		{32, 100 * time.Millisecond, 400 * time.Millisecond},
		{32, 3 * time.Second, 2 * time.Second},
	} {
		r, _, owners := routed(t, 20)
		r.give("host-9", c.signs, c.after, start)
		r.Began(owners[0], start)
		if d := r.late(owners[0], start); d != c.want {
			t.Errorf("after %d signs within %v, it is late after %v instead of %v", c.signs, c.after, d, c.want)
		}
		if d, want := r.SignPause(), nextSign+c.want; d != want {
			t.Errorf("after %d signs within %v, a pause may be %v instead of %v", c.signs, c.after, d, want)
		}
	}
}

// What is learnt while a request waits holds for it, too.
func TestPatienceIsLearnt(t *testing.T) {
	r, _, owners := routed(t, 20)
	r.Began(owners[0], start)
	now := start.Add(r.Patience(owners[0], start, start))
	if !now.Before(start.Add(time.Second)) {
		t.Fatal("nobody looks again before it is late")
	}
	r.give("host-9", 8, time.Millisecond, now)
	if d := r.Patience(owners[0], start, now); d > 0 {
		t.Errorf("it is waited for %v more", d)
	}
}

// If most peers are silent, this host is slow, and waits on. If some are, they are late.
func TestMostAreSilent(t *testing.T) {
	for _, c := range []struct {
		silent, heard int
		want          time.Duration
	}{
		{1, 0, 250 * time.Millisecond}, {2, 0, 250 * time.Millisecond}, {3, 0, 2 * time.Second}, {7, 0, 2 * time.Second},
		{7, 3, 2 * time.Second}, {4, 3, 250 * time.Millisecond}, {6, 3, 250 * time.Millisecond}, {10, 10, 250 * time.Millisecond},
	} {
		r, _, _ := routed(t, 30)
		r.give("host-29", 32, time.Millisecond, start.Add(-time.Minute))
		for i := range c.silent {
			r.Began(fmt.Sprint("host-", i+1), start)
		}
		for i := range c.heard {
			r.give(fmt.Sprint("host-", 20+i), 1, time.Millisecond, start.Add(10*time.Millisecond))
		}
		if d := r.late("host-1", start); d != c.want {
			t.Errorf("%d are silent and %d are not: late after %v instead of %v", c.silent, c.heard, d, c.want)
		}
	}
	// One that has given a sign and waits is not silent, and neither is one that was cancelled.
	r, run, _ := routed(t, 30)
	r.give("host-29", 32, time.Millisecond, start.Add(-time.Minute))
	for i := range 6 {
		name := fmt.Sprint("host-", i+1)
		r.Began(name, start)
		switch i {
		case 1, 2:
			r.Signed(name, time.Millisecond, start)
		case 3, 4, 5:
			r.Ended(run, nil, name, Outcome{Result: Cancelled, Silent: true}, start)
		}
	}
	if d := r.late("host-1", start); d != 250*time.Millisecond {
		t.Errorf("late after %v", d)
	}
}

// A peer that is silent rests for longer than others that fail. When it proves to be alive,
// it is asked again, and all have more time.
func TestSilentPeer(t *testing.T) {
	r, run, owners := routed(t, 20)
	r.give("host-9", 31, time.Millisecond, start)
	var a, b, c Attempt
	next(t, r, run, &a, start, owners[0], true)
	r.Ended(run, &a, owners[0], Outcome{Result: Late, Silent: true}, start)
	if d := r.mu.peers[owners[0]].rest.Sub(start); d < silentRest || d > silentRest+restFirst {
		t.Errorf("it rests for %v", d)
	}
	next(t, r, run, &b, start, owners[1], true)
	for range 3 {
		r.Revived(owners[0], 300*time.Millisecond, start)
	}
	next(t, r, run, &c, start, owners[0], true)
	if d := r.late(owners[0], start); d != 1200*time.Millisecond {
		t.Errorf("late after %v", d)
	}
	// Other failures are not undone by that.
	r.Ended(run, &c, owners[0], Outcome{Result: Broken}, start)
	r.Revived(owners[0], time.Millisecond, start)
	if r.Usable(owners[0], start) {
		t.Error("a peer whose connections break is asked")
	}
	// Nobody is remembered for a sign alone.
	r.Revived("elsewhere", time.Millisecond, start)
	if r.mu.peers["elsewhere"] != nil {
		t.Error("a host that is no member is remembered")
	}
}

// An answer is late when nothing comes, or when its bytes trickle. One that takes long is
// not, as long as the peer says that it waits.
func TestLate(t *testing.T) {
	const second, ms = time.Second, time.Millisecond
	for _, c := range []struct {
		what              string
		took, quiet       time.Duration // usual
		asked, moved      time.Duration // ago; moved 0: never
		began             time.Duration // the same
		got, size         int64
		failed, wantsLate bool
	}{
		{what: "nothing is known", asked: 1900 * ms, size: 100},
		{what: "nothing is known", asked: 2 * second, size: 100, wantsLate: true},
		{what: "silent for a moment", took: ms, quiet: ms, asked: 700 * ms, size: 100},
		{what: "silent", took: ms, quiet: ms, asked: 750 * ms, size: 100, wantsLate: true},
		{what: "pauses are common", took: ms, quiet: 500 * ms, asked: 900 * ms, size: 100},
		{what: "pauses are common", took: ms, quiet: 500 * ms, asked: second, size: 100, wantsLate: true},
		{what: "waits for the registry", took: ms, quiet: ms, asked: 4 * second, moved: 500 * ms, size: 100},
		{what: "waits for ever", took: ms, quiet: ms, asked: 5 * second, moved: 100 * ms, size: 100, wantsLate: true},
		{what: "comes", took: ms, quiet: ms, asked: second, moved: ms, got: 90, size: 100},
		{what: "trickles", took: ms, quiet: ms, asked: second, moved: ms, got: 10, size: 100, wantsLate: true},
		{what: "comes after a long wait", took: ms, quiet: ms, asked: 4 * second, began: 200 * ms, moved: ms, got: 10, size: 100},
		{what: "trickles like all others", took: second, quiet: ms, asked: 1900 * ms, moved: ms, got: 80, size: 100},
		{what: "a trial", took: ms, quiet: ms, asked: 300 * ms, size: 100, failed: true, wantsLate: true},
		{what: "a trial that comes", took: ms, quiet: ms, asked: 400 * ms, moved: ms, got: 10, size: 100, failed: true},
	} {
		r, run, _ := routed(t, 20)
		if c.took > 0 {
			for range 32 {
				r.Began("host-1", start)
				r.Ended(run, nil, "host-1", Outcome{Result: Served, Took: c.took, Quiet: c.quiet}, start)
			}
		}
		if c.failed {
			r.Began("host-1", start)
			r.Ended(run, nil, "host-1", Outcome{Result: Broken}, start)
		}
		p := Progress{Asked: start.Add(-c.asked), Got: c.got, Size: c.size}
		if c.moved > 0 {
			p.Moved = start.Add(-c.moved)
		}
		if c.began > 0 {
			p.Began = start.Add(-c.began)
		}
		if late := r.Late("host-1", p, start); late != c.wantsLate {
			t.Errorf("%s: %+v: late %v", c.what, c, late)
		}
	}
	// A trial passes the budget.
	r, run, _ := routed(t, 20)
	r.Began("host-3", start)
	r.Ended(run, nil, "host-3", Outcome{Result: Broken}, start)
	for range 20 {
		r.MayHedge(start)
	}
	if r.MayPass("host-1", start) || !r.MayPass("host-3", start) {
		t.Error("a trial does not pass the budget")
	}
}

// Beside one that is late, a holder is asked, or the next member, which does not ask the
// registry; then the next owner, which does; then the registry.
func TestHedge(t *testing.T) {
	for _, named := range []bool{false, true} {
		r, run, owners := routed(t, 20)
		var a Attempt
		next(t, r, run, &a, start, owners[0], true)
		want := owners[1]
		if named {
			want = r.Ring().Owners(nil, run, 8)[7]
			r.Ended(run, &a, owners[0], Outcome{Result: Busy, Holders: []string{"host-0", want}}, start)
			next(t, r, run, &a, start, want, false)
			want = owners[1]
		}
		if hop, ok := r.Hedge(run, &a, start); !ok || hop != (Hop{want, false}) {
			t.Errorf("first %v, %v", hop, ok)
		}
		r.Began(want, start)
		r.Ended(run, &a, want, Outcome{Result: Absent}, start)
		// That it does not have the run says nothing against it as the owner.
		if hop, ok := r.Hedge(run, &a, start); !ok || hop != (Hop{owners[1], true}) {
			t.Errorf("then %v, %v", hop, ok)
		}
		if hop, ok := r.Hedge(run, &a, start); ok {
			t.Errorf("at last %v", hop)
		}
	}
	// This host is the next owner: it asks the registry itself.
	r := NewRouter("host-0", RouterOptions{Zone: "zone", Seed: 1})
	r.SetMembers(names(5))
	for i := range 1000 {
		run := Run{Number: uint32(i)}
		if owners := r.Ring().Owners(nil, run, 2); owners[1] == "host-0" {
			var a Attempt
			next(t, r, run, &a, start, owners[0], true)
			if hop, ok := r.Hedge(run, &a, start); ok {
				t.Errorf("%v is asked for what this host owns next", hop)
			}
			return
		}
	}
	t.Fatal("the test tests nothing")
}

// Holders that are busy name others, and these others. After a few, the owner is asked again.
func TestChainsOfHolders(t *testing.T) {
	r, run, owners := routed(t, 200)
	var a Attempt
	asked := 0
	n := 100
	for {
		hop, ok := r.Next(run, &a, start)
		if !ok {
			t.Fatal("it ends at the registry")
		}
		r.Began(hop.Peer, start)
		if hop.Owner && asked > 0 {
			if hop.Peer != owners[0] || asked != 1+maxHops {
				t.Errorf("%s after %d requests", hop.Peer, asked)
			}
			return
		}
		asked++
		o := Outcome{Result: Busy}
		for range 2 {
			n++
			o.Holders = append(o.Holders, fmt.Sprint("host-", n))
		}
		r.Ended(run, &a, hop.Peer, o, start)
	}
}

// Whom an owner has named does not count any more when the owner has failed: those may have
// moved on to the next owner, and wait for this host there.
func TestHoldersOfAnOwnerThatFails(t *testing.T) {
	r, run, owners := routed(t, 20)
	var a Attempt
	next(t, r, run, &a, start, owners[0], true)
	holders := r.Ring().Owners(nil, run, 8)[4:8]
	r.Ended(run, &a, owners[0], Outcome{Result: Busy, Holders: holders[:1]}, start)
	next(t, r, run, &a, start, holders[0], false)
	r.Ended(run, &a, holders[0], Outcome{Result: Busy, Holders: holders[1:3]}, start)
	a.hops = maxHops
	next(t, r, run, &a, start, owners[0], true)
	r.Ended(run, &a, owners[0], Outcome{Result: Wrong}, start)
	next(t, r, run, &a, start, owners[1], true)
}

// Wrong bytes that a peer could not verify are excused a few times in a while.
func TestDoubt(t *testing.T) {
	r, _, owners := routed(t, 20)
	now := start
	doubt := func(want State) {
		t.Helper()
		r.Doubt(owners[0], now)
		if s, _ := r.mu.peers[owners[0]].state(now); s != want {
			t.Errorf("it is %s instead of %s", s, want)
		}
		now = now.Add(time.Minute)
	}
	for range maxDoubts - 1 {
		doubt(Resting)
	}
	now = now.Add(shunFirst)
	for range maxDoubts - 1 {
		doubt(Resting)
	}
	doubt(Distrusted)
	for _, p := range r.Peers(now) {
		if p.Name == owners[0] && p.Wrong != 2*maxDoubts {
			t.Errorf("%+v", p)
		}
	}
}
