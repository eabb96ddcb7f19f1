package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"thaw/bench"
	"thaw/bench/fanout/sim"
)

// agree compares the simulator with what was measured in namespaces: the same hosts, links,
// processors and plan, one start on each host. What a chunk costs a processor is measured with
// one host, and with a second one that gets everything from it.
func (b *benchmark) agree(ctx context.Context, s *site) error {
	p, err := simPlan(s.trace, s.index, s.manifest, s.indexBytes)
	if err != nil {
		return err
	}
	w := ways[1]
	run := func(m mode, hosts int) (name string, err error) {
		err = bench.Alternate(ctx, b.rounds, func(ctx context.Context, _ int) error { return b.hostsAtOnce(ctx, s, w, m, hosts, 1) })
		return hostsName(s.Name, w, m, hosts, 1), err
	}
	processors := sim.Processors{Count: runtime.NumCPU(), Shared: true}
	mib := float64(p.Size()) / (1 << 20)
	for _, x := range []struct {
		mode  mode
		hosts int
	}{{withoutZone, 1}, {withoutZone, b.hosts}, {withZone, b.hosts}} {
		name, err := run(x.mode, x.hosts)
		if err != nil {
			return err
		}
		if x.hosts == 1 {
			processors.FromRegistry = time.Duration(b.rec.Median(name, bench.CPU) / mib)
			cost, err := b.peerCost(ctx, s, w)
			if err != nil {
				return err
			}
			processors.FromPeer = time.Duration(float64(cost) / mib)
			progress("a MiB from the registry costs %v of a processor, and from a peer %v", processors.FromRegistry, processors.FromPeer)
		}
		o := sim.Defaults().Of(sim.Registry)
		if x.mode == withZone {
			o = sim.Defaults().Of(sim.Zone)
		}
		o.Plan, o.Hosts, o.Processors = p, x.hosts, processors
		o.Host = sim.Line{Up: b.hostRate, Down: b.hostRate, Delay: vethDelay}
		o.Registry = sim.Line{Up: b.link.rate, Down: b.link.rate, Delay: b.link.rtt/2 - vethDelay}
		o.Latency, o.Jitter = registryTime, 0
		r, err := sim.Run(ctx, o)
		if err != nil {
			return err
		}
		a := agreement{name, b.rec.Median(name, "p50-ns"), float64(r.Percentile(0.5)), b.rec.Median(name, registryUnit), float64(r.FromRegistry + r.Metadata)}
		b.agreements = append(b.agreements, a)
		progress("%s: simulated %v and %s, measured %v and %s", name, time.Duration(a.simTime).Round(time.Millisecond), bench.Bytes(a.simBytes),
			time.Duration(a.time).Round(time.Millisecond), bench.Bytes(a.bytes))
		if err := b.rec.Add("Agree/"+name, bench.Measure{Value: a.simTime, Unit: "simulated-ns"}, bench.Measure{Value: a.time, Unit: "p50-ns"},
			bench.Measure{Value: a.simBytes, Unit: "simulated-B"}, bench.Measure{Value: a.bytes, Unit: registryUnit}); err != nil {
			return err
		}
	}
	return nil
}

// peerCost returns the processor time of a start on a host of a zone in which another host has
// everything.
func (b *benchmark) peerCost(ctx context.Context, s *site, w way) (time.Duration, error) {
	name := fmt.Sprintf("PeerCost/image=%s/way=%s", s.Name, w.name)
	err := bench.Alternate(ctx, b.rounds, func(ctx context.Context, _ int) (err error) {
		f, err := b.newFleet(ctx, s, withZone, 2, w.args...)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.close()) }()
		for i := range f.hosts {
			x, err := f.start(ctx, w.tag, f.hosts[i:i+1], 1, nil)
			if err == nil {
				err = errors.Join(x.errs...)
			}
			if err == nil && i == 1 {
				err = b.rec.Add(name, x.measures(s.distinct(w))...)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	return time.Duration(b.rec.Median(name, bench.CPU)), err
}

const (
	vethDelay    = 25 * time.Microsecond // a quarter of the round trip between two namespaces
	registryTime = 2 * time.Millisecond  // of docker-registry, for a range of a blob
)

// agreement is what was measured, and what the simulator says.
type agreement struct {
	name            string
	time, simTime   float64 // of the median start, in nanoseconds
	bytes, simBytes float64 // from the registry
}

func (b *benchmark) agreementTable() *bench.Table {
	t := &bench.Table{Columns: []string{"what", "measured", "simulated", "ratio", "registry, measured", "simulated", "ratio"}}
	for _, x := range b.agreements {
		t.Row(x.name, bench.Seconds(x.time), bench.Seconds(x.simTime), fmt.Sprintf("%.2f", x.simTime/x.time), bench.Bytes(x.bytes), bench.Bytes(x.simBytes),
			fmt.Sprintf("%.2f", x.simBytes/x.bytes))
	}
	return t
}
