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
		budget budget
		rng    *rand.Rand
	}
}

// RouterOptions are the settings of a Router. Zero means the default.
type RouterOptions struct {
	Zone string // its name, the salt of the ring
	// Owners is how many owners of a run are asked, one after the other, before the
	// registry. It defaults to 2, and is at most 3.
	Owners int
	// MaxAsked bounds how many requests one Attempt makes to peers. It defaults to 12.
	MaxAsked int
	// HedgeFloor and HedgeMost bound HedgeAfter. They default to 300 ms and 2 s.
	HedgeFloor, HedgeMost time.Duration
	// HedgeShare is the share of requests that may be made a second time. It defaults to
	// 0.1. HedgeBurst is how many of them may be made at once. It defaults to 8.
	HedgeShare, HedgeBurst float64
	// Seed makes the random pauses repeatable; 0 for pauses that are not.
	Seed uint64
}

var noMembers = NewRing("", nil)

// NewRouter makes the Router of the host named self. It has no members yet.
func NewRouter(self string, o RouterOptions) *Router {
	o.Owners = min(cmp.Or(o.Owners, 2), maxOwners)
	o.MaxAsked = cmp.Or(o.MaxAsked, 12)
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
	return ring.Len() > 0 && ring.names[ring.owners(run)[0]] == r.self
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
	asked    []string // in order; the owner may be in it several times
	holders  []string // named by peers, and not asked yet
	referred int      // how often the owner has named holders that were not asked before

	// RegistryFailed says that the registry was asked and has failed: then peers are asked
	// for the runs that this host owns, too. The caller sets it before it calls Next.
	RegistryFailed bool
}

// maxHolders bounds how many names of one answer count.
const maxHolders = 4

// times returns how often a peer was asked.
func (a *Attempt) times(name string) (n int) {
	for _, x := range a.asked {
		if x == name {
			n++
		}
	}
	return n
}

// Asked returns how many requests the attempt has led to.
func (a *Attempt) Asked() int { return len(a.asked) }

// Next returns the peer to ask next for a run. ok is false if the registry is to be
// asked. Each call returns a peer that the attempt did not ask before, except that the
// owner is asked once more each time that the holders that it named did not have the run.
// So every attempt ends after at most MaxAsked requests, whatever peers say.
func (r *Router) Next(run Run, a *Attempt, now time.Time) (hop Hop, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	ring := r.mu.ring
	if ring.Len() == 0 || len(a.asked) >= r.o.MaxAsked {
		return Hop{}, false
	}
	best := ring.owners(run)
	owners := best[:min(r.o.Owners, ring.Len())]
	if ring.names[owners[0]] == r.self && !a.RegistryFailed {
		return Hop{}, false
	}
	ask := func(name string, owner bool) (Hop, bool) {
		a.asked = append(a.asked, name)
		return Hop{name, owner}, true
	}
	for len(a.holders) > 0 {
		name := a.holders[0]
		a.holders = a.holders[1:]
		if ring.Has(name) && a.times(name) == 0 && r.usable(name, now) {
			return ask(name, false)
		}
	}
	for i, at := range owners {
		name := ring.names[at]
		if name == r.self && !a.RegistryFailed {
			break // this host is the owner if those before it are not usable
		}
		if name == r.self {
			continue
		}
		most := 1
		if i == 0 {
			most += a.referred
		}
		if a.times(name) < most && r.usable(name, now) {
			return ask(name, true)
		}
	}
	return Hop{}, false
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
	r.peer(peer).active++
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
	RetryAfter time.Duration // of Busy
	Holders    []string      // of Busy: whom the peer names instead
}

// Ended records the end of a request, in the attempt and in what is known about the peer.
// Names of holders count only if they are members.
func (r *Router) Ended(run Run, a *Attempt, peer string, o Outcome, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a != nil && o.Result == Busy {
		before := len(a.holders)
		for _, name := range o.Holders[:min(len(o.Holders), maxHolders)] {
			if name != r.self && name != peer && r.mu.ring.Has(name) && a.times(name) == 0 && !slices.Contains(a.holders, name) {
				a.holders = append(a.holders, name)
			}
		}
		owner := r.mu.ring.owners(run)[0]
		if len(a.holders) > before && r.mu.ring.Len() > 0 && r.mu.ring.names[owner] == peer {
			a.referred++
		}
	}
	h := r.peer(peer)
	h.active--
	h.ended(o, now, r.mu.rng)
	if o.Result == Served {
		r.mu.all.add(o.Took)
	}
	if h.active <= 0 && h.wrong == 0 && !r.mu.ring.Has(peer) {
		delete(r.mu.peers, peer)
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

// Overtaken records that another source was quicker than a peer, whose request is
// cancelled for that.
func (r *Router) Overtaken(peer string, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.peer(peer).ended(Outcome{Result: Slow}, now, r.mu.rng)
}

// HedgeAfter returns how long to wait for a peer before the next source is asked as well:
// the 95th percentile of how long its requests took, and no more than twice that of all
// peers, so that a peer that is always slow is not waited for.
func (r *Router) HedgeAfter(peer string) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	d := r.mu.all.high
	if h := r.mu.peers[peer]; h != nil && h.fails > 0 {
		return r.o.HedgeFloor // nobody should wait for a trial
	}
	if d == 0 {
		return r.o.HedgeMost
	}
	if h := r.mu.peers[peer]; h != nil && h.latency.high > 0 {
		d = min(h.latency.high, 2*d)
	} else {
		d = 2 * d
	}
	return min(max(d, r.o.HedgeFloor), r.o.HedgeMost)
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
			p.Requests, p.Bytes, p.Busy, p.Failed, p.Wrong = h.served, h.bytes, h.busy, h.failed, int64(h.wrong)
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
