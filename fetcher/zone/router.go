package zone

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// Router decides which peer a host asks for a run, and what it thinks of its peers. It
// does no I/O, starts no goroutine and has no clock: callers pass the time. It is safe
// for concurrent use.
type Router struct {
	self string
	o    RouterOptions

	mu struct {
		sync.Mutex
		ring   *Ring
		peers  map[string]*health // those that were asked; no more than there are members, and some distrusted ones
		all    latencies          // of all peers
		signs  latencies          // the first signs of life of their requests, see late.go
		quiet  latencies          // the longest pauses in their answers
		budget budget

		failures int       // peers that have failed since one gave a sign of life
		probe    time.Time // while these are many, no peer is asked before this
		rng      *rand.Rand
	}
}

// RouterOptions are the settings of a Router. Zero means the default.
type RouterOptions struct {
	Zone string // its name, the salt of the ring
	// Owners is how many owners of a run that live but do not bring it are asked, one after
	// the other, before the registry. It defaults to 2. MaxFailed is how many that fail are,
	// because they cannot be reached. It defaults to 12: where half of the members are, one
	// attempt in 4096 ends at the registry for that.
	Owners, MaxFailed int
	// MaxAsked bounds how many requests one Attempt makes to peers. It defaults to 16.
	MaxAsked int
	// SignFloor and SignMost bound how long a peer has for its first sign of life. They
	// default to 250 ms and 2 s.
	SignFloor, SignMost time.Duration
	// QuietFloor and HedgeMost bound how long a pause in an answer may be until it is late;
	// HedgeFloor and HedgeMost how long an answer may take whose bytes trickle. They default
	// to 750 ms, 300 ms and 2 s.
	QuietFloor, HedgeFloor, HedgeMost time.Duration
	// OnlySigns is how long a peer is waited for that gives signs of life and nothing else. It
	// defaults to 5 s.
	OnlySigns time.Duration
	// HedgeShare is the share of requests that may be made a second time. It defaults to
	// 0.1. HedgeBurst is how many of them may be made at once. It defaults to 8.
	HedgeShare, HedgeBurst float64
	// Seed makes the random pauses repeatable; 0 for pauses that are not.
	Seed uint64
}

var noMembers = NewRing("", nil)

// NewRouter makes the Router of the host named self. It has no members yet.
func NewRouter(self string, o RouterOptions) *Router {
	o.Owners = cmp.Or(o.Owners, 2)
	o.MaxFailed = cmp.Or(o.MaxFailed, 12)
	o.MaxAsked = cmp.Or(o.MaxAsked, 16)
	o.SignFloor = cmp.Or(o.SignFloor, 250*time.Millisecond)
	o.OnlySigns = cmp.Or(o.OnlySigns, onlySigns)
	o.SignMost = max(cmp.Or(o.SignMost, 2*time.Second), o.SignFloor)
	o.QuietFloor = cmp.Or(o.QuietFloor, 750*time.Millisecond)
	o.HedgeFloor = cmp.Or(o.HedgeFloor, 300*time.Millisecond)
	o.HedgeMost = max(cmp.Or(o.HedgeMost, 2*time.Second), o.HedgeFloor)
	o.HedgeShare = cmp.Or(o.HedgeShare, 0.1)
	o.HedgeBurst = cmp.Or(o.HedgeBurst, 8)
	if o.Seed == 0 {
		o.Seed = rand.Uint64()
	}
	r := &Router{self: self, o: o}
	r.mu.ring = noMembers
	r.mu.peers = make(map[string]*health)
	r.mu.budget = newBudget(o.HedgeShare, o.HedgeBurst)
	r.mu.rng = rand.New(rand.NewPCG(o.Seed, 1))
	return r
}

// SetMembers replaces the members of the zone. They may include this host.
func (r *Router) SetMembers(names []string) { r.SetRing(NewRing(r.o.Zone, names)) }

// SetRing is SetMembers with a ring that several Routers may share.
func (r *Router) SetRing(ring *Ring) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.ring = ring
	// A peer that is distrusted stays so if it leaves and comes back.
	gone := 0
	for name, h := range r.mu.peers {
		if ring.Has(name) || h.active > 0 {
			continue
		}
		if h.wrong > 0 && gone < maxGone {
			gone++
			continue
		}
		delete(r.mu.peers, name)
	}
}

// maxGone bounds how many peers are remembered that are no members any more.
const maxGone = 256

// Ring returns the present members.
func (r *Router) Ring() *Ring {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.ring
}

// Owns reports whether this host is the owner of a run.
func (r *Router) Owns(run Run) bool {
	ring := r.Ring()
	return ring.Len() > 0 && ring.owner(run) == r.self
}

// Hop is a peer to ask.
type Hop struct {
	Peer string
	// Owner says that the peer is asked as an owner: it fetches the run from the registry
	// if it does not have it. Otherwise it was named as a holder.
	Owner bool
}

// Attempt is one attempt to get a run: which peers were asked, and which were named by
// others. The zero value is a new attempt. A Router's methods guard it.
type Attempt struct {
	asked    []string // in order; an owner may be in it several times
	owners   []string // those that were asked as owners; the last one is the owner now
	holders  []string // named by peers, and not asked yet
	hops     int      // holders that were asked since the owner was
	again    int      // how often the owner may be asked once more, because it has named others
	absents  int      // owners that live and did not bring the run
	failures int      // owners that have failed
	hedges   int      // peers that were asked because others are late

	// RegistryFailed says that the registry was asked and has failed: then peers are asked
	// for the runs that this host owns, too. The caller sets it before it calls Next.
	RegistryFailed bool
}

const (
	// maxHolders bounds how many names of one answer count.
	maxHolders = 4
	// maxHops bounds how many holders are asked until the owner is asked again: each may be
	// busy, and name others. The owner serves who asks it again.
	maxHops = 4
	// maxHedges bounds how many peers an attempt asks because others are late.
	maxHedges = 2
	// maxFailures is how many peers may fail in a row, while none gives a sign of life, until
	// this host is taken for one that cannot reach the zone. Then one request each probeEvery
	// finds out whether it can again, and the others go to the registry at once.
	maxFailures = 20
	probeEvery  = time.Second
)

// was reports whether a peer was asked.
func (a *Attempt) was(name string) bool { return slices.Contains(a.asked, name) }

// owner returns the peer that was asked as the owner last.
func (a *Attempt) owner() string {
	if len(a.owners) == 0 {
		return ""
	}
	return a.owners[len(a.owners)-1]
}

// Asked returns how many requests the attempt has led to.
func (a *Attempt) Asked() int { return len(a.asked) }

// Next returns the peer to ask next for a run. ok is false if the registry is to be
// asked.
//
// The owner is the first member in the order of the run that can be reached. So hosts that
// can reach the same members agree about it, also when the zone has fallen in two and the
// first members are all on the other side. If it is this host, the registry is asked.
//
// Each call returns a peer that the attempt did not ask before, except that an owner is
// asked once more each time that the holders that it named did not have the run, and that
// a holder may turn out to be the next owner. An attempt ends after Owners owners that live
// and do not bring the run, after MaxFailed that fail, and after MaxAsked requests,
// whatever peers say.
func (r *Router) Next(run Run, a *Attempt, now time.Time) (hop Hop, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	ring := r.mu.ring
	if ring.Len() == 0 || len(a.asked) >= r.o.MaxAsked || ring.owner(run) == r.self && !a.RegistryFailed {
		return Hop{}, false
	}
	if name, ok := r.holder(a, now); ok {
		return Hop{name, false}, true
	}
	if a.again > 0 && ring.Has(a.owner()) && r.usable(a.owner(), now) {
		a.again--
		a.hops = 0
		a.asked = append(a.asked, a.owner())
		return Hop{a.owner(), true}, true
	}
	return r.owner(run, a, now)
}

// owner returns the next owner to ask.
func (r *Router) owner(run Run, a *Attempt, now time.Time) (hop Hop, ok bool) {
	if a.absents >= r.o.Owners || a.failures >= r.o.MaxFailed {
		return Hop{}, false
	}
	alone := r.mu.failures >= maxFailures
	if alone && now.Before(r.mu.probe) {
		return Hop{}, false
	}
	name, ok := r.inOrder(run, a, now, func(name string) bool { return slices.Contains(a.owners, name) })
	if !ok {
		return Hop{}, false
	}
	if alone {
		r.mu.probe = now.Add(probeEvery)
	}
	a.asked, a.owners = append(a.asked, name), append(a.owners, name)
	a.again, a.hops = 0, 0
	return Hop{name, true}, true
}

// holder returns a peer that others have named as a holder.
func (r *Router) holder(a *Attempt, now time.Time) (name string, ok bool) {
	for len(a.holders) > 0 && a.hops < maxHops {
		name := a.holders[0]
		a.holders = a.holders[1:]
		if r.mu.ring.Has(name) && !a.was(name) && r.usable(name, now) {
			a.hops++
			a.asked = append(a.asked, name)
			return name, true
		}
	}
	return "", false
}

// inOrder returns the first usable member in the order of a run that was not asked, up to
// this host.
func (r *Router) inOrder(run Run, a *Attempt, now time.Time, asked func(name string) bool) (name string, ok bool) {
	ring := r.mu.ring
	for i := range min(ring.Len(), maxRank) {
		name := ring.names[ring.ranking(run, i+1)[i]]
		switch {
		case name == r.self && !a.RegistryFailed:
			return "", false
		case name != r.self && !asked(name) && r.usable(name, now):
			return name, true
		}
	}
	return "", false
}

// Hedge returns a peer to ask beside those that are late. The first time, it is one that
// may have the run, and that does not ask the registry for it: the owner may be waiting for
// that. The second time, it is the next owner, which asks the registry once for all hosts
// for which the owner is late. ok is false if only the registry is left.
func (r *Router) Hedge(run Run, a *Attempt, now time.Time) (hop Hop, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mu.ring.Len() == 0 || len(a.asked) >= r.o.MaxAsked || a.hedges >= maxHedges {
		return Hop{}, false
	}
	if a.hedges++; a.hedges > 1 {
		return r.owner(run, a, now)
	}
	name, ok := r.holder(a, now)
	if !ok {
		if name, ok = r.inOrder(run, a, now, a.was); !ok {
			return Hop{}, false
		}
		a.asked = append(a.asked, name)
	}
	return Hop{name, false}, true
}

func (r *Router) usable(name string, now time.Time) bool {
	h := r.mu.peers[name]
	return h == nil || h.usable(now)
}

// Usable reports whether a peer that Next has returned may still be asked: a request that
// has waited for its turn is better sent elsewhere when the peer has failed meanwhile.
func (r *Router) Usable(peer string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.mu.ring.Has(peer) {
		return false
	}
	h := r.mu.peers[peer]
	if h == nil {
		return true
	}
	state, _ := h.state(now)
	return state == Working
}

// Began records that a request to a peer was sent. Each call is followed by one of Ended.
func (r *Router) Began(peer string, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.peer(peer)
	if h.active <= h.signed {
		h.asked = now
	}
	h.active++
	r.mu.budget.earn()
}

// Result says how a request to a peer ended.
type Result uint8

const (
	Served    Result = iota // it has sent what was asked for
	Busy                    // it has no room for the request
	Absent                  // it does not have the run
	Slow                    // another source, which was asked as well, was quicker
	Late                    // it did not answer in time, or did not send its bytes in time
	Refused                 // it does not answer this host: a matter of certificates or of zones
	Broken                  // the connection failed, or the answer makes no sense
	Wrong                   // the bytes are not what was asked for
	Cancelled               // nobody wants the run any more
)

// Outcome is the end of a request to a peer.
type Outcome struct {
	Result     Result
	Bytes      int64         // received
	Took       time.Duration // from the request to the end of what was asked for
	Quiet      time.Duration // the longest pause between two signs of life, after the first
	Silent     bool          // it has given no sign of life
	RetryAfter time.Duration // of Busy
	Holders    []string      // of Busy: whom the peer names instead
}

// Ended records the end of a request, in the attempt and in what is known about the peer.
// Names of holders count only if they are members.
func (r *Router) Ended(run Run, a *Attempt, peer string, o Outcome, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a != nil {
		r.note(a, peer, o)
	}
	h := r.peer(peer)
	h.active--
	if !o.Silent {
		h.signed = max(h.signed-1, 0)
	}
	if h.ended(o, now, r.mu.rng) {
		r.mu.failures++
	}
	if o.Result == Served {
		r.mu.failures = 0
		r.mu.all.add(o.Took)
		r.mu.quiet.add(o.Quiet)
	}
	if h.active <= 0 && h.wrong == 0 && !r.mu.ring.Has(peer) {
		delete(r.mu.peers, peer)
	}
}

// note records the end of a request in its attempt.
func (r *Router) note(a *Attempt, peer string, o Outcome) {
	named := false
	if o.Result == Busy {
		for _, name := range o.Holders[:min(len(o.Holders), maxHolders)] {
			if name != r.self && name != peer && r.mu.ring.Has(name) && !a.was(name) && !slices.Contains(a.holders, name) {
				a.holders = append(a.holders, name)
				named = true
			}
		}
	}
	if peer != a.owner() {
		return
	}
	switch {
	case named:
		a.again = 1
	case o.Result == Busy, o.Result == Absent:
		a.absents++
		a.holders = nil
	case o.Result == Late, o.Result == Refused, o.Result == Broken, o.Result == Wrong:
		a.failures++
		// Whom it has named may be waiting for it, or have moved on to the next owner. There,
		// they may come to wait for this host: a host waits for members of one owner's tree
		// at a time, so that no two wait for each other.
		a.holders = nil
	}
}

func (r *Router) peer(name string) *health {
	h := r.mu.peers[name]
	if h == nil {
		h = new(health)
		r.mu.peers[name] = h
	}
	return h
}

// Distrust records that a peer has sent wrong bytes, which were found after Ended.
func (r *Router) Distrust(peer string, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.peer(peer).ended(Outcome{Result: Wrong}, now, r.mu.rng)
}

// Doubt records that a peer has sent wrong bytes that it could not verify itself: a piece
// of a blob. It may have them from the registry, or from another peer, in this form. So it
// is excused a few times, and rests as after a failure; then it is distrusted.
func (r *Router) Doubt(peer string, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.peer(peer).mistaken(now, r.mu.rng)
}

// Overtaken records that another source was quicker than a peer, whose request is
// cancelled for that.
func (r *Router) Overtaken(peer string, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.peer(peer).ended(Outcome{Result: Slow}, now, r.mu.rng)
}

// MayHedge reports whether an extra request may be made, and counts it if so. It may if
// extra requests are at most a tenth of all.
func (r *Router) MayHedge(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mu.budget.spend()
}

// MayPass is MayHedge for a request to a certain peer. The request that finds out whether a
// peer works again may be made elsewhere in any case; there is only one such request.
func (r *Router) MayPass(peer string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h := r.mu.peers[peer]; h != nil && h.fails > 0 {
		return true
	}
	return r.mu.budget.spend()
}

// PeerStatus is what is known about a peer.
type PeerStatus struct {
	Name     string        `json:"name"`
	Member   bool          `json:"member"`
	State    State         `json:"state"`
	Until    time.Time     `json:"until,omitzero"` // of the state
	P95      time.Duration `json:"p95_ns"`         // of its requests; 0 before there are enough
	Active   int           `json:"in_flight"`
	Requests int64         `json:"served_requests"`
	Bytes    int64         `json:"received_bytes"`
	Busy     int64         `json:"busy_answers"`
	Failed   int64         `json:"failed_requests"`
	Wrong    int64         `json:"wrong_answers"`
}

// Peers returns what is known about the members other than this host, and about peers
// that were members, by name.
func (r *Router) Peers(now time.Time) (all []PeerStatus) {
	r.mu.Lock()
	defer r.mu.Unlock()
	add := func(name string, h *health) {
		p := PeerStatus{Name: name, Member: r.mu.ring.Has(name), State: Working}
		if h != nil {
			p.State, p.Until = h.state(now)
			p.P95, p.Active = h.latency.high, h.active
			p.Requests, p.Bytes, p.Busy, p.Failed, p.Wrong = h.served, h.bytes, h.busy, h.failed, int64(h.wrong)+h.doubt
		}
		all = append(all, p)
	}
	for _, name := range r.mu.ring.names {
		if name != r.self {
			add(name, r.mu.peers[name])
		}
	}
	for name, h := range r.mu.peers {
		if !r.mu.ring.Has(name) {
			add(name, h)
		}
	}
	slices.SortFunc(all, func(a, b PeerStatus) int { return cmp.Compare(a.Name, b.Name) })
	return all
}
