package sim

import (
	"crypto/sha256"
	"fmt"
	"math/bits"
	"strconv"
	"time"

	"thaw/fetcher/zone"
)

// zoned is what a host of a zone has.
type zoned struct {
	router *zone.Router
	grants *zone.Grants
}

// attempt is what a fetch knows of whom it has asked.
type attempt struct {
	zone.Attempt
	owner bool // the peer that was chosen last is asked as an owner
	tried int  // of the other systems
}

// members is thaw's zone: hosts that ask each other, by the decisions of package zone.
type members struct {
	alone
	names []string
	runs  []zone.Run // of the plan
}

func newZone(w *world) system {
	s := &members{alone: alone{w}, names: make([]string, w.o.Hosts), runs: make([]zone.Run, len(w.runs))}
	for i := range s.names {
		s.names[i] = "h" + strconv.Itoa(i)
	}
	for i, r := range w.runs {
		s.runs[i] = zone.Run{Of: sha256.Sum256(fmt.Appendf(nil, "stream %d", r.stream)), Number: uint32(r.number)}
	}
	ring := zone.NewRing("sim", s.names)
	for i := range s.names {
		h := &w.hosts[i]
		h.router = zone.NewRouter(s.names[i], zone.RouterOptions{Zone: "sim", Seed: w.o.Seed + uint64(i) + 1, MaxAsked: w.o.MaxAsked})
		h.router.SetRing(ring)
		h.grants = zone.NewGrants(w.o.Grants)
	}
	return s
}

// at returns the host with a name.
func (s *members) at(name string) int32 {
	n, err := strconv.Atoi(name[1:])
	if err != nil {
		panic(err) // the ring has only the names that newZone made
	}
	return int32(n)
}

// clock returns the virtual time as the zone takes it.
func (s *members) clock() time.Time { return epoch.Add(s.w.now) }

var epoch = time.Unix(1.8e9, 0)

func (s *members) next(f *fetch) int32 {
	hop, ok := s.w.hosts[f.host].router.Next(s.runs[f.run], &f.attempt.Attempt, s.clock())
	if !ok {
		return s.w.registry()
	}
	f.attempt.owner = hop.Owner
	return s.at(hop.Peer)
}

func (s *members) began(id int32) {
	r := &s.w.requests[id]
	r.owner = s.w.fetches[r.fetch].attempt.owner
	s.w.hosts[r.from].router.Began(s.names[r.to], s.clock())
}

func (s *members) ended(id int32, o outcome) {
	r := &s.w.requests[id]
	if int(r.to) >= s.w.o.Hosts {
		return
	}
	f := &s.w.fetches[r.fetch]
	out := zone.Outcome{Result: results[o], Took: s.w.now - r.asked}
	out.Silent = !r.signed
	if o == cancelled && s.isLate(r) {
		out.Result = zone.Slow
	}
	if o == busy {
		out.Holders = r.answer.holders
		out.RetryAfter = time.Second
	}
	if r.flow >= 0 {
		out.Bytes, out.Quiet = s.w.flows[r.flow].got, r.quiet
	}
	s.w.hosts[r.from].router.Ended(s.runs[r.run], &f.attempt.Attempt, s.names[r.to], out, s.clock())
}

var results = [...]zone.Result{served: zone.Served, busy: zone.Busy, absentThere: zone.Absent, late: zone.Late, wrong: zone.Wrong, cancelled: zone.Cancelled}

// finished ends what the owner granted.
func (s *members) finished(id int32) {
	r := &s.w.requests[id]
	if r.granted {
		r.granted = false
		s.w.hosts[r.to].grants.Done(s.runs[r.run], s.names[r.from], r.come == r.chunks, s.clock())
	}
}

// serve answers a peer, as package zone's server does: an owner has what it lacks fetched from the
// registry, and another host waits for its own fetch. Both name holders once they are busy.
func (s *members) serve(id int32) {
	w := s.w
	r := &w.requests[id]
	h := &w.hosts[r.to]
	run := s.runs[r.run]
	owns := r.owner || h.router.Owns(run)
	lacks := false
	for left := r.chunks; left != 0; left &= left - 1 {
		state := h.state[w.runs[r.run].chunks[bits.TrailingZeros64(left)]]
		lacks = lacks || state != resident
		if state == absent && !owns {
			w.reply(id, answer{outcome: absentThere})
			return
		}
	}
	ok, holders := h.grants.Ask(run, s.names[r.from], s.clock())
	if !ok {
		if owns { // those that it names may wait for this host
			w.fetchFor(id, true)
		}
		w.reply(id, answer{outcome: busy, holders: holders})
		return
	}
	r.granted = true
	if owns {
		w.fetchFor(id, true)
		r = &w.requests[id]
	} else if lacks {
		w.q.push(w.now+w.o.HolderWait, overdue, id, r.generation)
	}
	after := w.o.ServerTime
	if lacks {
		after = zone.FirstSign
	}
	w.q.push(w.now+after+w.rtt(r.from, r.to)/2, signs, id, r.generation)
	w.respond(id)
}

func (s *members) signed(id int32) {
	r := &s.w.requests[id]
	s.w.hosts[r.from].router.Signed(s.names[r.to], s.w.now-r.asked, s.clock())
}

// patience is that of package zone's client.
func (s *members) patience(r *request) time.Duration {
	w := s.w
	router := w.hosts[r.from].router
	switch {
	case !r.signed:
		return router.Patience(s.names[r.to], epoch.Add(r.asked), s.clock())
	case r.flow >= 0 && w.flows[r.flow].got > 0 || r.flow >= 0 && !r.waits: // the body
		return r.moved + w.o.Timeout - w.now
	}
	return w.lastSign(r) + router.SignPause() - w.now
}

func (s *members) isLate(r *request) bool {
	p := zone.Progress{Asked: epoch.Add(r.asked), Moved: epoch.Add(s.w.lastSign(r))}
	if r.flow >= 0 && r.began > 0 {
		p.Began = epoch.Add(r.began)
		p.Got, p.Size = s.w.flows[r.flow].got, s.w.flows[r.flow].size
	}
	return s.w.hosts[r.from].router.Late(s.names[r.to], p, s.clock())
}

func (s *members) mayHedge(r *request) bool {
	return s.w.hosts[r.from].router.MayPass(s.names[r.to], s.clock())
}

func (s *members) beside(f *fetch) int32 {
	hop, ok := s.w.hosts[f.host].router.Hedge(s.runs[f.run], &f.attempt.Attempt, s.clock())
	if !ok {
		return s.w.registry()
	}
	f.attempt.owner = hop.Owner
	return s.at(hop.Peer)
}
