package zone

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

// Grants is the owner's side of a run that many ask for: it says who gets the run from
// this host, and whom the others are to ask instead. It does no I/O and has no clock:
// callers pass the time. It is safe for concurrent use, and its memory is bounded.
//
// The first Slots members get the run from here. Each of them, and each member that was
// told to ask one of them, has the run soon, so later ones are told to ask these, the
// earliest first, until each was named FanOut times. So the members form a tree whose root
// is this host. A member waits only for one that was granted the run before it, so no two
// wait for each other.
type Grants struct {
	o GrantOptions

	mu struct {
		sync.Mutex
		runs    map[Run]*granted
		entries int // holders in all
		swept   time.Time
	}
}

// GrantOptions are the settings of Grants. Zero means the default.
type GrantOptions struct {
	// Slots is how many members get the same run from here at once. It defaults to 2.
	Slots int
	// FanOut is how often a member is named as a holder of a run. It defaults to 4.
	FanOut int
	// Names is how many holders are named at once. The second one is for the case that the
	// first one fails. It defaults to 2.
	Names int
	// Forget is how long after the last request the holders of a run are forgotten: they
	// may have evicted it by then. It defaults to one minute.
	Forget time.Duration
	// MaxRuns bounds the runs that are remembered. It defaults to 4096.
	MaxRuns int
	// MaxHolders bounds the holders of a run that are remembered. It defaults to 4096.
	MaxHolders int
	// MaxEntries bounds the holders of all runs. It defaults to 262,144.
	MaxEntries int
}

// NewGrants makes Grants for one host.
func NewGrants(o GrantOptions) *Grants {
	o.Slots = cmp.Or(o.Slots, 2)
	o.FanOut = cmp.Or(o.FanOut, 4)
	o.Names = cmp.Or(o.Names, 2)
	o.Forget = cmp.Or(o.Forget, time.Minute)
	o.MaxRuns = cmp.Or(o.MaxRuns, 4096)
	o.MaxHolders = cmp.Or(o.MaxHolders, 4096)
	o.MaxEntries = cmp.Or(o.MaxEntries, 1<<18)
	g := &Grants{o: o}
	g.mu.runs = make(map[Run]*granted)
	return g
}

// granted is who was granted a run.
type granted struct {
	uploads int // to members, at present
	holders map[string]*holder
	order   []*holder // the same, the earliest first
	seq     int       // of the last holder
	full    int       // those at the front of order that were named FanOut times
	asked   time.Time
}

// holder is a member that has a run, or will have it soon.
type holder struct {
	name  string
	seq   int // its number among the holders of the run
	named int // how often it was named
	first int // how often it was named as the first one
}

// Ask says what to answer to a member that asks for a run. If serve is set, it gets the
// run from here, and the caller calls Done when it has it. Otherwise it is to ask the
// holders, of which there may be none. A member that asks again, because the holders that
// it was told did not have the run, gets it at once: slots bound only the first requests.
// How many uploads a host makes in all is bounded elsewhere.
func (g *Grants) Ask(run Run, from string, now time.Time) (serve bool, holders []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	x := g.run(run, now)
	x.asked = now
	if x.uploads < g.o.Slots || x.holders[from] != nil {
		x.uploads++
		g.add(x, from)
		return true, nil
	}
	holders = g.name(x)
	if len(holders) > 0 {
		g.add(x, from)
	}
	return false, holders
}

// Done ends what Ask began with serve. ok says that the member has the run now; otherwise
// it is not named as a holder any more.
func (g *Grants) Done(run Run, from string, ok bool, now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	x := g.mu.runs[run]
	if x == nil {
		return
	}
	x.uploads = max(x.uploads-1, 0)
	x.asked = now
	if !ok {
		g.drop(x, from)
	}
}

// Drop forgets a member, which has left the zone or has failed.
func (g *Grants) Drop(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, x := range g.mu.runs {
		g.drop(x, name)
	}
}

// Uploads returns how many uploads of a run Ask has allowed and Done has not ended.
func (g *Grants) Uploads(run Run) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if x := g.mu.runs[run]; x != nil {
		return x.uploads
	}
	return 0
}

// run finds or makes what is known of a run.
func (g *Grants) run(run Run, now time.Time) *granted {
	if now.Sub(g.mu.swept) > g.o.Forget/2 || len(g.mu.runs) >= g.o.MaxRuns || g.mu.entries >= g.o.MaxEntries && now.Sub(g.mu.swept) > time.Second {
		g.sweep(now)
	}
	x := g.mu.runs[run]
	switch {
	case x == nil:
		x = &granted{holders: make(map[string]*holder)}
		g.mu.runs[run] = x
	case now.Sub(x.asked) > g.o.Forget:
		g.mu.entries -= len(x.order)
		*x = granted{uploads: x.uploads, holders: make(map[string]*holder)}
	}
	return x
}

// sweep forgets runs that nobody has asked for lately, and the least recent ones if there
// are too many. Runs that are being uploaded stay.
func (g *Grants) sweep(now time.Time) {
	g.mu.swept = now
	for run, x := range g.mu.runs {
		if x.uploads == 0 && now.Sub(x.asked) > g.o.Forget {
			g.forget(run, x)
		}
	}
	if len(g.mu.runs) < g.o.MaxRuns && g.mu.entries < g.o.MaxEntries {
		return
	}
	// A quarter at once, so that this is rare.
	idle := make([]Run, 0, len(g.mu.runs))
	for run, x := range g.mu.runs {
		if x.uploads == 0 {
			idle = append(idle, run)
		}
	}
	slices.SortFunc(idle, func(a, b Run) int { return g.mu.runs[a].asked.Compare(g.mu.runs[b].asked) })
	for _, run := range idle {
		if len(g.mu.runs) <= g.o.MaxRuns*3/4 && g.mu.entries <= g.o.MaxEntries*3/4 {
			break
		}
		g.forget(run, g.mu.runs[run])
	}
}

func (g *Grants) forget(run Run, x *granted) {
	g.mu.entries -= len(x.order)
	delete(g.mu.runs, run)
}

// add records that a member was granted a run. If there are many, it takes the place of
// one that is not named any more; if there is none, it is not recorded.
func (g *Grants) add(x *granted, name string) {
	if x.holders[name] != nil {
		return
	}
	if len(x.order) >= g.o.MaxHolders || g.mu.entries >= g.o.MaxEntries {
		if x.full == 0 {
			return
		}
		delete(x.holders, x.order[0].name)
		x.order[0] = nil
		x.order = x.order[1:]
		x.full--
		g.mu.entries--
	}
	x.seq++
	g.mu.entries++
	h := &holder{name: name, seq: x.seq}
	x.holders[name] = h
	x.order = append(x.order, h)
}

// drop forgets a holder.
func (g *Grants) drop(x *granted, name string) {
	h := x.holders[name]
	if h == nil {
		return
	}
	delete(x.holders, name)
	g.mu.entries--
	i, _ := slices.BinarySearchFunc(x.order, h.seq, func(h *holder, seq int) int { return cmp.Compare(h.seq, seq) })
	x.order = slices.Delete(x.order, i, i+1)
	if i < x.full {
		x.full--
	}
}

// name chooses the holders that a member is to ask.
func (g *Grants) name(x *granted) (names []string) {
	for x.full < len(x.order) && x.order[x.full].named >= g.o.FanOut {
		x.full++
	}
	var chosen []*holder
	for _, h := range x.order[x.full:] {
		if len(chosen) == g.o.Names {
			break
		}
		if h.named < g.o.FanOut {
			chosen = append(chosen, h)
		}
	}
	// Each is the first one as often as the others.
	slices.SortStableFunc(chosen, func(a, b *holder) int { return cmp.Compare(a.first, b.first) })
	for i, h := range chosen {
		h.named++
		if i == 0 {
			h.first++
		}
		names = append(names, h.name)
	}
	return names
}
