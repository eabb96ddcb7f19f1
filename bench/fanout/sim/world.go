package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"thaw/fetcher/zone"
)

// kind is what an event is.
type kind uint8

const (
	begin   kind = iota // a host starts the image: a is the host
	opened              // it has the manifest and the index
	work                // its program goes on
	asks                // a request arrives at its server: a is the request, b its generation
	serve               // the server can answer it
	answers             // its answer without bytes arrives
	expires             // its server has been silent for too long
	signs               // its server shows that it is alive
	hedges              // a reader looks whether it is late
	overdue             // the server has waited long enough for its own fetch
	sent                // a line has sent a piece: a is the line
	came                // a piece has arrived: a is the flow, b the bytes
	acked               // the sender learns that it was read: a is the flow
	taken               // a processor is done with a chunk: a is the host, b the chunk
)

// world is a run of the simulator.
type world struct {
	o   Options
	q   queue
	now time.Duration
	rng *rand.Rand
	sys system

	plan  *Plan
	index int32 // the chunk of the plan that stands for the index, or nothing
	runs  []run
	runOf []int32 // of each chunk of the plan
	place []int   // of each chunk in its run

	hosts    []host
	lines    []line // of the hosts, then of the registry, then of the cache
	flows    []flow
	fetches  []fetch
	requests []request

	freeFlows, freeFetches, freeRequests []int32

	waiting []int32 // requests that wait for a connection of the registry
	head    int     // of waiting
	left    int     // starts that have not ended
	events  int64

	fromRegistry, metadata        int64 // bytes that the registry sent: of chunks, and of all else
	fromPeers                     int64
	asked, busies, absents, lates int64
	wrongs, hedged, registryAsked int64
	refetched                     int64 // bytes of chunks that the registry sent again
	seen                          []bool
}

// run is the part of the plan in one run of chunks of the image.
type run struct {
	stream, number int
	chunks         []int32 // positions in the plan, by their number
}

// registry returns the registry's line.
func (w *world) registry() int32 { return int32(w.o.Hosts) }

// cache returns the line of the pull-through cache.
func (w *world) cache() int32 { return int32(w.o.Hosts) + 1 }

// reaches reports whether something that leaves a line arrives at another.
func (w *world) reaches(from, to int32) bool {
	return !w.lines[from].dead && !w.lines[to].dead &&
		(w.o.Split == 0 || w.now < w.o.Split || int(from) >= w.o.Hosts || int(to) >= w.o.Hosts || from%2 == to%2)
}

// Run simulates the starts.
func Run(ctx context.Context, o Options) (*Result, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	w := newWorld(o)
	for w.left > 0 {
		if w.events++; w.events%(1<<20) == 0 && ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		e, ok := w.q.pop()
		if !ok {
			return nil, fmt.Errorf("simulate: %d of %d starts have not ended, and nothing is left to happen", w.left, o.Hosts)
		}
		if e.at > o.Limit {
			return nil, fmt.Errorf("simulate: %d of %d starts have not ended after %v", w.left, o.Hosts, o.Limit)
		}
		w.now = e.at
		w.happen(e)
	}
	return w.result(), nil
}

func (w *world) happen(e event) {
	switch e.kind {
	case begin:
		w.open(e.a)
	case opened:
		w.opened(e.a)
	case work:
		w.work(e.a)
	case sent:
		w.pieceSent(e.a)
	case came:
		w.arrived(e.a, int64(e.b))
	case acked:
		w.ack(e.a)
	case taken:
		w.chunkCame(e.a, e.b)
	default:
		r := &w.requests[e.a]
		if !r.used || r.generation != e.b {
			return
		}
		switch e.kind {
		case asks:
			w.serveRequest(e.a)
		case serve:
			w.startFlow(e.a)
		case answers:
			w.answered(e.a)
		case expires:
			w.expired(e.a)
		case signs:
			w.sign(e.a)
		case hedges:
			w.hedge(e.a)
		case overdue:
			w.overdue(e.a)
		}
	}
}

func newWorld(o Options) *world {
	w := &world{o: o, plan: o.Plan, index: nothing, rng: rand.New(rand.NewPCG(o.Seed, 13))}
	if o.System == Zone && o.Plan.Index > 0 {
		w.plan, w.index = o.Plan.withIndex(), int32(len(o.Plan.Chunks))
	}
	w.findRuns()
	w.hosts = make([]host, o.Hosts+2)
	w.lines = make([]line, o.Hosts+2)
	w.lines[w.registry()] = newLine(o.Registry)
	w.lines[w.cache()] = newLine(o.Cache)
	states := make([]int32, (o.Hosts+2)*len(w.plan.Chunks))
	for i := range states {
		states[i] = absent
	}
	w.seen = make([]bool, len(w.plan.Chunks))
	faulty := w.rng.Perm(o.Hosts)
	take := func(share float64) []int {
		n := min(int(share*float64(o.Hosts)), len(faulty))
		taken := faulty[:n]
		faulty = faulty[n:]
		return taken
	}
	for i := range w.hosts {
		h := &w.hosts[i]
		h.state, states = states[:len(w.plan.Chunks)], states[len(w.plan.Chunks):]
		h.awaits, h.claim = nothing, nothing
		if i >= o.Hosts {
			continue
		}
		w.lines[i] = newLine(o.Host)
		w.lines[i].delay = time.Duration(float64(o.Host.Delay) * (1 + o.Jitter*(2*w.rng.Float64()-1)))
	}
	for _, i := range take(o.Stragglers) {
		w.hosts[i].straggler = true
		w.lines[i].up *= o.Slower
		w.lines[i].down *= o.Slower
	}
	for _, i := range take(o.Liars) {
		w.hosts[i].liar = true
	}
	for _, i := range take(o.Dead) {
		w.hosts[i].dead = true
		w.lines[i].dead = true
	}
	w.newWorkers()
	w.sys = newSystem(w)
	for i := range w.hosts[:o.Hosts] {
		at := time.Duration(0)
		if o.Within > 0 {
			at = time.Duration(w.rng.Int64N(int64(o.Within)))
		}
		if !w.hosts[i].dead {
			w.left++
			w.q.push(at, begin, int32(i), 0)
		}
	}
	return w
}

// findRuns divides the plan's chunks into runs.
func (w *world) findRuns() {
	type place struct{ stream, number int }
	at := make(map[place]int32)
	w.runOf = make([]int32, len(w.plan.Chunks))
	w.place = make([]int, len(w.plan.Chunks))
	for i, c := range w.plan.Chunks {
		p := place{c.Stream, c.Number / w.o.RunChunks}
		r, ok := at[p]
		if !ok {
			r = int32(len(w.runs))
			at[p] = r
			w.runs = append(w.runs, run{stream: p.stream, number: p.number})
		}
		w.runOf[i] = r
		w.runs[r].chunks = append(w.runs[r].chunks, int32(i))
	}
	for r := range w.runs {
		cs := w.runs[r].chunks
		for i := range cs { // a few: sorted by their number
			for j := i; j > 0 && w.plan.Chunks[cs[j]].Number < w.plan.Chunks[cs[j-1]].Number; j-- {
				cs[j], cs[j-1] = cs[j-1], cs[j]
			}
		}
		for i, c := range cs {
			w.place[c] = i
		}
	}
}

// Options are what a run depends on.
type Options struct {
	Plan   *Plan
	System System
	Hosts  int
	Seed   uint64
	Within time.Duration // the starts begin within this time

	Host     Line
	Jitter   float64 // by how much the delays of hosts differ: 0.5 for half to one and a half
	Registry Line
	Cache    Line // of PullThrough
	// Connections is how many requests the registry answers at a time; Latency is its time for
	// each.
	Connections int
	Latency     time.Duration
	ServerTime  time.Duration // of a peer, for each request
	Processors  Processors

	Loss       float64 // share of packets
	Stragglers float64 // share of hosts whose lines are Slower
	Slower     float64
	Dead       float64 // share of hosts that are members and do not answer
	Liars      float64 // share of hosts whose chunks have wrong bytes
	// Split is when the zone falls in two: from then on, each host reaches every second one,
	// and the registry. 0: never.
	Split time.Duration

	Window   int64 // bytes of prefetches, as the registry has them, that a host has in flight
	Requests int   // prefetches that a host has in flight
	Among    int   // a host prefetches one of this many chunks of the plan, at random
	Writers  int   // answers that a host sends at a time; 0: all, in turns
	Whole    bool  // a host answers when it has all of what is asked for, instead of chunk by chunk

	Beside     int64 // bytes of the list of what is beside the image, which each host reads from the registry
	Memory     int64 // bytes of chunks as the registry has them that a host keeps for peers
	RunChunks  int
	Grants     zone.GrantOptions
	MaxAsked   int           // peers of one attempt; 0 for the Router's default
	Children   int           // of a host of Tree
	Timeout    time.Duration // of an answer that brings no bytes, or, outside of a zone, of a host that is dead
	OriginWait time.Duration // of an owner for the registry
	HolderWait time.Duration // of a holder for its own fetch

	Limit time.Duration // of virtual time
}

// System is who gives chunks to whom.
type System int

const (
	Zone        System = iota // thaw's zone
	Registry                  // everything from the registry
	PullThrough               // a cache between the hosts and the registry
	Tree                      // a binary tree of hosts, as FaaSNet's
)

func (s System) String() string {
	return [...]string{"zone", "registry", "pull-through", "tree"}[s]
}

// Defaults returns the options of hosts with 1 Gbit/s and half a millisecond between them, and
// a registry with 10 Gbit/s, 10 ms away. What a host does is what thaw does.
func Defaults() Options {
	return Options{
		Plan: Flask(), Hosts: 1000, Seed: 1,
		Host: Line{1e9, 1e9, 125 * time.Microsecond}, Jitter: 0.5,
		Registry: Line{10e9, 10e9, 4875 * time.Microsecond}, Cache: Line{10e9, 10e9, 125 * time.Microsecond},
		Connections: 1000, Latency: time.Millisecond, ServerTime: 100 * time.Microsecond,
		Slower: 10, Window: 4 << 20, Requests: 32, Among: 32, Writers: 2,
		Beside: 2100, Memory: zone.StoredMemory, RunChunks: zone.RunChunks, Children: 2,
		Timeout: 2 * time.Second, OriginWait: zone.OriginTime, HolderWait: zone.HolderTime,
		Limit: time.Hour,
	}
}

// Of sets the system, and how hosts prefetch under it: in a zone as a zone's member does, else in
// the order of the plan.
func (o Options) Of(s System) Options {
	o.System = s
	if s != Zone {
		o.Window, o.Among = 16<<20, 1
	}
	return o
}

// Lone returns the options of one host that reads the registry over the same line, and nothing
// goes wrong.
func (o Options) Lone() Options {
	o = o.Of(Registry)
	o.Hosts, o.Within = 1, 0
	o.Loss, o.Stragglers, o.Dead, o.Liars, o.Split = 0, 0, 0, 0, 0
	return o
}

func (o *Options) check() error {
	var errs []error
	need := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New("simulate: "+what))
		}
	}
	need(o.Plan != nil && len(o.Plan.Reads) > 0, "the plan reads nothing")
	need(o.Hosts > 0 && o.Hosts <= 1<<20, "hosts must be 1 to 1048576")
	need(o.Host.Up > 0 && o.Host.Down > 0 && o.Registry.Up > 0 && o.Registry.Down > 0 && o.Cache.Up > 0 && o.Cache.Down > 0, "a line has no rate")
	need(o.Connections > 0 && o.RunChunks > 0 && o.RunChunks <= 64 && o.Children > 0 && o.Window > 0 && o.Requests > 0 && o.Writers >= 0 && o.Slower > 0, "a bound is zero")
	need(o.Processors.Count >= 0 && o.Processors.FromRegistry >= 0 && o.Processors.FromPeer >= 0, "processors have costs below zero")
	need(o.Dead < 1 && o.Dead+o.Stragglers+o.Liars <= 1, "more hosts are faulty than there are")
	return errors.Join(errs...)
}
