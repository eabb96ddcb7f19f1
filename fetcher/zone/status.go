package zone

import (
	"context"
	"encoding/json"
	"sync"
	"time"
)

// Status is the state of this host's membership in a zone.
type Status struct {
	Zone    string `json:"zone"`
	Name    string `json:"name"`    // of this host
	Address string `json:"address"` // HOST:PORT that peers reach it at
	TLS     bool   `json:"tls"`
	Alone   bool   `json:"alone"`           // no other member can be reached
	Error   string `json:"error,omitempty"` // why, if that is known
	Members int    `json:"members"`         // this host included

	Uploads  int   `json:"uploads"` // to peers, under way
	Sent     int64 `json:"sent_bytes"`
	Received int64 `json:"received_bytes"`
	// What of these went as the registry has it, compressed.
	SentStored     int64 `json:"sent_stored_bytes"`
	ReceivedStored int64 `json:"received_stored_bytes"`
	// Chunks in memory as the registry has them, for peers, and how many of the requests of
	// peers that take them in that form found theirs.
	Kept   int64 `json:"kept_bytes"`
	Hits   int64 `json:"kept_hits"`
	Misses int64 `json:"kept_misses"`
	// Requests of peers by their ends.
	Served   int64 `json:"served_requests"`
	Referred int64 `json:"referred_requests"` // sent to other members, which have it
	Absent   int64 `json:"absent_requests"`   // for what is not to be had here
	Refused  int64 `json:"refused_requests"`  // of no member, or malformed
	Busy     int64 `json:"busy_requests"`     // too many at a time
	Failed   int64 `json:"failed_requests"`   // the registry failed, or the peer left

	Peers []Peer `json:"peers"` // by name
}

// Peer is another member, or one that has left and is distrusted.
type Peer struct {
	Name    string    `json:"name"`
	Address string    `json:"address,omitempty"` // empty: it is not a member any more
	State   State     `json:"state"`             // how this host treats it
	Until   time.Time `json:"until,omitzero"`    // of the state, unless it is working
	Active  int       `json:"in_flight"`         // requests to it
	P95     float64   `json:"p95_seconds"`       // of these; 0 before there are enough

	Received int64 `json:"received_bytes"` // from it
	Sent     int64 `json:"sent_bytes"`     // to it
	Requests int64 `json:"served_requests"`
	Busy     int64 `json:"busy_answers"`
	Failed   int64 `json:"failed_requests"`
	Wrong    int64 `json:"wrong_answers"`

	Health *Health `json:"health,omitempty"` // what it says of itself, if it was asked and has answered
}

// Status returns the state of the membership.
func (z *Zone) Status() Status {
	alone, err := z.members.alone()
	s := Status{
		Zone: z.o.Zone, Name: z.self.Name, Address: z.self.Addr, TLS: z.o.TLS != nil, Alone: alone,
		Uploads: z.server.uploads.count(), Sent: z.traffic.all.Load(), Peers: []Peer{},
		SentStored: z.traffic.stored.Load(), ReceivedStored: z.client.stored.Load(),
		Kept: z.stored.size(), Hits: z.stored.hits.Load(), Misses: z.stored.misses.Load(),
		Served: z.server.asked.served.Load(), Referred: z.server.asked.referred.Load(), Absent: z.server.asked.absent.Load(),
		Refused: z.server.asked.refused.Load(), Busy: z.server.asked.busy.Load(), Failed: z.server.asked.failed.Load(),
	}
	if alone && err != nil {
		s.Error = shortened(err.Error())
	}
	known := *z.known.Load()
	s.Members = max(len(known), 1)
	sent := z.traffic.byPeer()
	for _, p := range z.router.Peers(time.Now()) {
		s.Received += p.Bytes
		s.Peers = append(s.Peers, Peer{
			Name: p.Name, Address: known[p.Name], State: p.State, Until: p.Until, Active: p.Active, P95: p.P95.Seconds(),
			Received: p.Bytes, Sent: sent[p.Name], Requests: p.Requests, Busy: p.Busy, Failed: p.Failed, Wrong: p.Wrong,
		})
	}
	return s
}

// Bounds of Ask.
const (
	maxAsked = 256 // peers that are asked
	askers   = 32  // at once
)

// Ask is Status with what the peers say of themselves, if they do so until ctx ends.
func (z *Zone) Ask(ctx context.Context) Status {
	s := z.Status()
	var wg sync.WaitGroup
	slots := make(chan struct{}, askers)
	for i := range s.Peers[:min(len(s.Peers), maxAsked)] {
		p := &s.Peers[i]
		if p.Address == "" {
			continue
		}
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			if ctx.Err() != nil {
				return
			}
			var h Health
			if b, err := z.client.Health(ctx, p.Name); err == nil && json.Unmarshal(b, &h) == nil && h.Name == p.Name {
				h.Version = shortened(h.Version)
				p.Health = &h
			}
		})
	}
	wg.Wait()
	return s
}
