package host

import (
	"os"
	"time"

	"thaw/blockmap"
)

// Phase is the phase of a host.
type Phase string

// The phases of a host, in their order.
const (
	Starting Phase = "starting" // clients cannot read yet
	Serving  Phase = "serving"
	Stopping Phase = "stopping" // the host opens no devices any more
)

// Status is the state of a host.
type Status struct {
	State   Phase     `json:"state"`
	Ending  bool      `json:"ending,omitempty"`  // the server ends soon, unless somebody uses it before
	Version string    `json:"version,omitempty"` // of the program; the host does not know it
	PID     int       `json:"pid"`
	Time    time.Time `json:"time"` // of this status
	Started time.Time `json:"started"`
	Uptime  float64   `json:"uptime_seconds"`

	Cache string        `json:"cache_directory"`
	Mode  blockmap.Mode `json:"cache_mode"`
	Quota int64         `json:"cache_quota_bytes"` // 0: no bound except the size of the disk

	Zone    *ZoneBrief   `json:"zone,omitempty"`
	Devices DeviceCounts `json:"devices"`
	Rates   Rates        `json:"rates"`
	Counts  Stats        `json:"counts"`
}

// ZoneBrief is the membership of a host in a zone in brief: see Host.Zone.
type ZoneBrief struct {
	Name     string `json:"name"` // of the zone
	Members  int    `json:"members"`
	Alone    bool   `json:"alone"`
	Sent     int64  `json:"sent_bytes"`     // to peers
	Received int64  `json:"received_bytes"` // from peers
}

// DeviceCounts are the numbers of devices by state.
type DeviceCounts struct {
	Opening int `json:"opening"`
	Ready   int `json:"ready"`
	Failed  int `json:"failed"`
	Closing int `json:"closing"`

	Complete int   `json:"complete"`             // of those that are ready: they need their registries no longer
	Missing  int64 `json:"missing_stored_bytes"` // of those that are not, as it is stored in the registries
}

// Status returns the current state of the host.
func (h *Host) Status() Status {
	now := time.Now()
	s := Status{
		State: Starting, PID: os.Getpid(), Time: now.Round(0), Started: h.began.Round(0), Uptime: now.Sub(h.began).Seconds(),
		Cache: h.dir, Mode: h.mode, Quota: h.quota, Rates: h.meter.rates(), Counts: h.Stats(),
	}
	switch {
	case h.Stopping():
		s.State = Stopping
	case h.traces.serving.Load():
		s.State = Serving
	}
	s.Ending = s.State == Stopping || h.unused && !h.Used()
	if h.zone != nil {
		z := h.zone.Status()
		s.Zone = &ZoneBrief{z.Zone, z.Members, z.Alone, z.Sent, z.Received}
	}
	for _, d := range h.Devices() {
		switch d.state() {
		case Opening:
			s.Devices.Opening++
		case Ready:
			s.Devices.Ready++
			if in := d.whose().completion.info(); in.Missing == 0 {
				s.Devices.Complete++
			} else if d.base == nil {
				s.Devices.Missing += in.Stored
			}
		case Failed:
			s.Devices.Failed++
		case Closing:
			s.Devices.Closing++
		}
	}
	return s
}

// state is the State of Info.
func (d *Device) state() State {
	d.of.mu.Lock()
	named := d.of.mu.named[d.key()] == d
	d.of.mu.Unlock()
	select {
	case <-d.ready:
	default:
		return Opening
	}
	switch {
	case d.err != nil:
		return Failed
	case !named:
		return Closing
	}
	return Ready
}
