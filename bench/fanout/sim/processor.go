package sim

import "time"

// Processors are what hosts decompress, verify, encrypt and store with. Without any, that
// takes no time.
type Processors struct {
	// Count is how many each host has, or how many all of them have together: hosts in
	// namespaces of one machine share its processors.
	Count  int
	Shared bool
	// FromRegistry and FromPeer are what a MiB of a chunk's content costs one processor. Of a
	// MiB from a peer, that is the cost of both hosts.
	FromRegistry, FromPeer time.Duration
}

// workers are some processors, and when each of them is free.
type workers []time.Duration

// do takes the processor that is free first, and returns when it is done.
func (p workers) do(now, cost time.Duration) (done time.Duration) {
	first := 0
	for i, at := range p {
		if at < p[first] {
			first = i
		}
	}
	p[first] = max(now, p[first]) + cost
	return p[first]
}

// newWorkers gives hosts their processors.
func (w *world) newWorkers() {
	p := w.o.Processors
	if p.Count == 0 {
		return
	}
	shared := make(workers, p.Count)
	for i := range w.hosts {
		w.hosts[i].workers = shared
		if !p.Shared {
			w.hosts[i].workers = make(workers, p.Count)
		}
	}
}

// take does what a chunk that has arrived costs. The chunk is resident after that.
func (w *world) take(at, c int32, peer bool) {
	h := &w.hosts[at]
	if h.workers == nil {
		w.chunkCame(at, c)
		return
	}
	cost := w.o.Processors.FromRegistry
	if peer {
		cost = w.o.Processors.FromPeer
	}
	cost = time.Duration(float64(cost) * float64(w.plan.Chunks[c].Size) / (1 << 20))
	w.q.push(h.workers.do(w.now, cost), taken, at, c)
}
