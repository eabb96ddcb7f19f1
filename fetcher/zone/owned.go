package zone

import (
	"context"
	"sync"
)

// owned are the runs that this host is fetching from the registry, because peers have asked
// it as the owner.
//
// An owner that refers a peer to others still sees to it that the run comes. These others
// may be waiting for this host, and this host, in a fetch of its own, for a member that
// waits for the very peer: so it is when the first owner has failed, and its tree and that
// of the second owner have members in common.
type owned struct {
	mu   sync.Mutex
	runs map[Run]int
}

// begin notes that a run is being fetched, and returns what ends that.
func (o *owned) begin(run Run) (end func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.runs == nil {
		o.runs = make(map[Run]int)
	}
	o.runs[run]++
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.runs[run]--; o.runs[run] == 0 {
			delete(o.runs, run)
		}
	}
}

// idle reports whether nobody fetches a run.
func (o *owned) idle(run Run) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.runs[run] == 0
}

// fetchLater fetches a run for peers that were referred to others, unless that is being
// done. done is called at the end in any case.
func (s *server) fetchLater(run Run, fetch func(context.Context), done func()) {
	if !s.owned.idle(run) || !s.enter() {
		done()
		return
	}
	end := s.owned.begin(run)
	go func() {
		defer s.handlers.Done()
		defer done()
		defer end()
		ctx, cancel := context.WithTimeout(s.life, OriginTime)
		defer cancel()
		fetch(ctx)
	}()
}
