package sim

import (
	"math/bits"
	"time"
)

// system decides who is asked for chunks, and how a host answers its peers.
type system interface {
	next(f *fetch) (server int32)
	began(request int32)
	ended(request int32, o outcome)
	finished(request int32) // the server is free of it
	serve(request int32)
	patience(r *request) time.Duration // how much longer to wait for the server; 0: no longer, or for ever
	signed(request int32)              // its server has shown that it is alive
	isLate(r *request) bool
	mayHedge(r *request) bool
	beside(f *fetch) (server int32) // to ask as well
}

// outcome is how a request ended.
type outcome uint8

const (
	served outcome = iota
	busy
	absentThere
	late
	wrong
	cancelled // the chunks came from elsewhere
)

// answer is one without bytes.
type answer struct {
	outcome outcome
	holders []string
}

func newSystem(w *world) system {
	switch w.o.System {
	case Registry:
		return &alone{w}
	case PullThrough:
		return &cached{alone{w}}
	case Tree:
		return &tree{alone{w}}
	}
	return newZone(w)
}

// alone asks the registry.
type alone struct{ w *world }

func (s *alone) next(*fetch) int32      { return s.w.registry() }
func (s *alone) began(int32)            {}
func (s *alone) ended(int32, outcome)   {}
func (s *alone) finished(int32)         {}
func (s *alone) serve(int32)            {}
func (s *alone) signed(int32)           {}
func (s *alone) isLate(*request) bool   { return false }
func (s *alone) mayHedge(*request) bool { return false }
func (s *alone) beside(*fetch) int32    { return s.w.registry() }

// patience is for a server that does not answer. Others wait for one that works.
func (s *alone) patience(r *request) time.Duration {
	if !s.w.lines[r.to].dead {
		return 0
	}
	return r.moved + s.w.o.Timeout - s.w.now
}

// cached asks the pull-through cache, and the registry when that fails. A real one reads whole
// blobs; this one reads the chunks that it is asked for, which is the best that it can do.
type cached struct{ alone }

func (s *cached) next(f *fetch) int32 {
	if f.attempt.tried > 0 || f.host == s.w.cache() {
		return s.w.registry()
	}
	f.attempt.tried++
	return s.w.cache()
}

func (s *cached) serve(id int32) {
	s.w.fetchFor(id, true)
	s.w.respond(id)
}

// tree asks the parent of a host in a balanced tree, in the order in which the hosts began, and
// the registry when that fails. The root asks the registry. The parent fetches what it does not
// have in the same way.
type tree struct{ alone }

func (s *tree) next(f *fetch) int32 {
	if f.host == 0 || f.attempt.tried > 0 {
		return s.w.registry()
	}
	f.attempt.tried++
	return (f.host - 1) / int32(s.w.o.Children)
}

func (s *tree) serve(id int32) {
	s.w.fetchFor(id, false)
	s.w.respond(id)
}

// fetchFor makes the server of a request fetch what that asks for and nobody has asked for yet:
// from the registry if own is set, or as the server fetches for itself. If own is set and it is
// fetching that from a peer already, the registry is asked as well: the peer may be waiting for
// the very request.
func (w *world) fetchFor(id int32, own bool) {
	r := &w.requests[id]
	at, run := r.to, r.run
	for left := r.chunks; left != 0; {
		i := bits.TrailingZeros64(left)
		var want uint64
		for ; left&(1<<i) != 0; i++ { // neighbours
			if state := w.hosts[at].state[w.runs[run].chunks[i]]; state != absent {
				if own && state >= 0 {
					w.own(state)
				}
				left &^= 1 << i
				break
			}
			want |= 1 << i
			left &^= 1 << i
		}
		if want != 0 {
			w.fetchChunks(at, run, want, true, own)
		}
	}
}

// own makes a fetch ask the registry only, from now on.
func (w *world) own(id int32) {
	f := &w.fetches[id]
	f.own = true
	for _, r := range f.requests {
		if w.requests[r].to == w.registry() {
			return
		}
	}
	w.ask(f.host, id, w.registry())
}

// respond answers with what the server has, and with the rest when that comes.
func (w *world) respond(id int32) {
	r := &w.requests[id]
	w.q.push(w.now+w.o.ServerTime, serve, id, r.generation)
}
