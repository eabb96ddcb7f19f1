package sim

import (
	"math"
	"slices"
	"time"
)

// Result is what a run of the simulator found.
type Result struct {
	// Starts are the times of the starts of hosts that are not slow by themselves, sorted.
	Starts []time.Duration
	// Slow are those of the stragglers.
	Slow []time.Duration

	Distinct      int64   // bytes of the plan's chunks in the registry; in a zone, the index is one
	FromRegistry  int64   // bytes of chunks that the registry sent, including those that came for nothing
	Metadata      int64   // bytes of manifests, lists, and indexes outside zones that the registry sent
	FromPeers     int64   // bytes that hosts sent
	Refetched     int64   // the part of FromRegistry that it had sent before
	Busiest, Mean float64 // bytes that the busiest host sent, and that hosts sent on average

	Requests, RegistryRequests        int64
	Busy, Absent, Late, Wrong, Hedged int64
	Events                            int64
	Took                              time.Duration // virtual
}

func (w *world) result() *Result {
	r := &Result{
		Distinct: w.plan.Stored(), FromRegistry: w.fromRegistry, Metadata: w.metadata, Refetched: w.refetched,
		Requests: w.asked, RegistryRequests: w.registryAsked, Busy: w.busies, Absent: w.absents, Late: w.lates, Wrong: w.wrongs, Hedged: w.hedged,
		Events: w.events, Took: w.now,
	}
	alive := 0
	for i := range w.hosts[:w.o.Hosts] {
		h := &w.hosts[i]
		if h.dead {
			continue
		}
		alive++
		sent := w.lines[i].sent
		r.FromPeers += sent
		r.Busiest = max(r.Busiest, float64(sent))
		if h.straggler {
			r.Slow = append(r.Slow, h.end-h.began)
		} else {
			r.Starts = append(r.Starts, h.end-h.began)
		}
	}
	r.FromPeers += w.lines[w.cache()].sent
	r.Mean = float64(r.FromPeers) / float64(alive)
	slices.Sort(r.Starts)
	slices.Sort(r.Slow)
	return r
}

// Percentile returns the time within which this share (0 to 1) of the starts ended.
func (r *Result) Percentile(share float64) time.Duration {
	if len(r.Starts) == 0 {
		return 0
	}
	i := int(math.Ceil(share*float64(len(r.Starts)))) - 1
	return r.Starts[min(max(i, 0), len(r.Starts)-1)]
}

// Amplification returns how many bytes of chunks the registry sent for each byte of distinct
// chunks.
func (r *Result) Amplification() float64 { return float64(r.FromRegistry) / float64(r.Distinct) }

// OriginShare returns the registry's share of all bytes that the hosts received, with manifests,
// lists and indexes.
func (r *Result) OriginShare() float64 {
	origin := float64(r.FromRegistry + r.Metadata)
	return origin / (origin + float64(r.FromPeers))
}

// ToMean returns how many times the mean the busiest host sent.
func (r *Result) ToMean() float64 { return r.Busiest / r.Mean }
