package host

import (
	"runtime"
	"runtime/metrics"

	"thaw/fetcher"
)

// Stats are the counts of every layer of a Host. Its JSON is a part of Status.
type Stats struct {
	fetcher.Stats
	Cached       int64     `json:"cached_bytes"`        // on disk, including the files that describe the chunks
	Held         int64     `json:"held_bytes"`          // in memory, because the disk has no room
	Evicted      int64     `json:"evicted_bytes"`       // since the start
	Damaged      int64     `json:"damaged"`             // chunks and files of the cache that could not be read
	OpenStreams  int64     `json:"open_streams"`        // streams whose files are open
	Devices      int       `json:"devices"`             // includes devices that are being opened or closed
	Goroutines   int       `json:"goroutines"`          // of the process
	Memory       int64     `json:"go_memory_bytes"`     // memory that Go has from the system
	Overlays     int       `json:"overlays"`            // that are open
	Changed      int64     `json:"changed_bytes"`       // in the blocks of these overlays that clients have changed
	OverlaySpace int64     `json:"overlay_space_bytes"` // on disk, of these overlays
	Poisoned     int       `json:"poisoned_overlays"`   // of these, those that take no more writes
	NBD          *NBDStats `json:"nbd,omitempty"`

	VhostUser *VhostUserStats `json:"vhost_user,omitempty"`
}

// NBDStats is nbd.Stats with names for JSON.
type NBDStats struct {
	Conns    int64 `json:"connections"`
	Accepted int64 `json:"accepted"`
	Hits     int64 `json:"hits"`
	Misses   int64 `json:"misses"`
	Others   int64 `json:"others"`
	Errors   int64 `json:"errors"`
	Sent     int64 `json:"sent_bytes"`
	Repaired int64 `json:"repaired"`
}

// VhostUserStats is vhost.Stats with names for JSON.
type VhostUserStats struct {
	Conns    int64 `json:"connections"`
	Accepted int64 `json:"accepted"`
	Hits     int64 `json:"hits"`
	Misses   int64 `json:"misses"`
	Others   int64 `json:"others"`
	Errors   int64 `json:"errors"`
	Read     int64 `json:"read_bytes"`
	Resumed  int64 `json:"resumed"`
	Repaired int64 `json:"repaired"`
}

// Stats returns the current counts.
func (h *Host) Stats() Stats {
	memory := []metrics.Sample{{Name: "/memory/classes/total:bytes"}}
	metrics.Read(memory)
	st := Stats{
		Stats: h.fetcher.Stats(), Cached: h.cache.Used(), Held: h.cache.Held(), Evicted: h.cache.Evicted(), Damaged: h.cache.Damaged(),
		OpenStreams: h.cache.OpenStreams(), Devices: len(h.Devices()),
		Goroutines: runtime.NumGoroutine(), Memory: int64(memory[0].Value.Uint64()),
	}
	for _, d := range h.Devices() {
		o := d.Overlay()
		if o == nil {
			continue
		}
		s := o.Stats()
		st.Overlays++
		st.Changed += s.Data + s.Zero
		st.OverlaySpace += s.Space
		if s.Err != nil {
			st.Poisoned++
		}
	}
	if h.nbd != nil {
		n := h.nbd.Stats()
		st.NBD = &NBDStats{
			Conns: n.Conns, Accepted: n.Accepted, Hits: n.Hits, Misses: n.Misses, Others: n.Others, Errors: n.Errors, Sent: n.Sent,
			Repaired: n.Repaired,
		}
	}
	if h.sockets.Dir != "" {
		n := h.sockets.Server.Stats()
		st.VhostUser = &VhostUserStats{
			Conns: n.Conns, Accepted: n.Accepted, Hits: n.Hits, Misses: n.Misses, Others: n.Others, Errors: n.Errors, Read: n.Read,
			Resumed: n.Resumed, Repaired: n.Repaired,
		}
	}
	return st
}
