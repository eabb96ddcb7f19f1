package host

import (
	"slices"
	"sync"
	"time"
)

// Rates are recent growth rates of counts of Stats, per second.
type Rates struct {
	Seconds  float64 `json:"seconds"` // the period of the averages: the last 10 s, or since the start
	Fetched  float64 `json:"fetched_bytes_per_second"`
	Requests float64 `json:"requests_per_second"`   // to origins
	Sent     float64 `json:"sent_bytes_per_second"` // to NBD clients and virtual machines
	Reads    float64 `json:"reads_per_second"`      // of these
}

// moved holds the counts that Rates are made of.
type moved struct{ fetched, requests, sent, reads int64 }

func (h *Host) moved() moved {
	f := h.fetcher.Stats()
	m := moved{fetched: f.Bytes, requests: f.Requests}
	if h.nbd != nil {
		n := h.nbd.Stats()
		m.sent, m.reads = n.Sent, n.Hits+n.Misses
	}
	if h.sockets.Dir != "" {
		n := h.sockets.Server.Stats()
		m.sent, m.reads = m.sent+n.Read, m.reads+n.Hits+n.Misses
	}
	return m
}

// A meter samples counts once a second, so that a status can tell how fast they have
// grown. The code that counts does not know of it.
type meter struct {
	read func() moved
	end  chan struct{}
	wg   sync.WaitGroup

	mu struct {
		sync.Mutex
		samples []sample // of the last meterWindow, the oldest first
	}
}

type sample struct {
	at time.Time
	moved
}

const (
	meterEvery  = time.Second
	meterWindow = 10 * time.Second
)

func startMeter(read func() moved) *meter {
	m := &meter{read: read, end: make(chan struct{})}
	m.take()
	m.wg.Go(func() {
		t := time.NewTicker(meterEvery)
		defer t.Stop()
		for {
			select {
			case <-m.end:
				return
			case <-t.C:
				m.take()
			}
		}
	})
	return m
}

// stop ends the sampling. It is called once.
func (m *meter) stop() {
	close(m.end)
	m.wg.Wait()
}

func (m *meter) take() {
	now := sample{time.Now(), m.read()}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.samples = slices.DeleteFunc(m.mu.samples, func(s sample) bool { return now.at.Sub(s.at) > meterWindow })
	m.mu.samples = append(m.mu.samples, now)
}

// rates returns the averages since the oldest sample.
func (m *meter) rates() Rates {
	now := sample{time.Now(), m.read()}
	m.mu.Lock()
	var from sample
	for _, from = range m.mu.samples {
		if now.at.Sub(from.at) <= meterWindow {
			break
		}
	}
	m.mu.Unlock()
	seconds := now.at.Sub(from.at).Seconds()
	if seconds <= 0 {
		return Rates{}
	}
	per := func(now, then int64) float64 { return float64(now-then) / seconds }
	return Rates{
		Seconds: seconds, Fetched: per(now.fetched, from.fetched), Requests: per(now.requests, from.requests),
		Sent: per(now.sent, from.sent), Reads: per(now.reads, from.reads),
	}
}
