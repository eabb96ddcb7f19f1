package main

import (
	"context"
	"fmt"
	"time"

	"thaw/bench"
	"thaw/bench/fanout/sim"
)

// agree compares the simulator with what was measured in namespaces: the same hosts, links and
// plan, one start on each host.
func (b *benchmark) agree(ctx context.Context, s *site) error {
	p, err := simPlan(s.trace, s.index, s.manifest, s.indexBytes)
	if err != nil {
		return err
	}
	for _, n := range []int{1, b.hosts} {
		for _, m := range []mode{withoutZone, withZone} {
			if n == 1 && m == withZone {
				continue
			}
			var sides []func(context.Context, int) error
			sides = append(sides, func(ctx context.Context, _ int) error { return b.hostsAtOnce(ctx, s, ways[1], m, n, 1) })
			if err := bench.Alternate(ctx, b.rounds, sides...); err != nil {
				return err
			}
			o := sim.Defaults().Of(sim.Registry)
			if m == withZone {
				o = sim.Defaults().Of(sim.Zone)
			}
			o.Plan, o.Hosts = p, n
			o.Host = sim.Line{Up: b.hostRate, Down: b.hostRate, Delay: vethDelay}
			o.Registry = sim.Line{Up: b.link.rate, Down: b.link.rate, Delay: b.link.rtt/2 - vethDelay}
			o.Latency, o.Jitter = registryTime, 0
			r, err := sim.Run(ctx, o)
			if err != nil {
				return err
			}
			name := hostsName(s.Name, ways[1], m, n, 1)
			b.agreements = append(b.agreements, agreement{name, b.rec.Median(name, "p50-ns"), float64(r.Percentile(0.5)),
				b.rec.Median(name, registryUnit), float64(r.FromRegistry + r.Metadata)})
			x := b.agreements[len(b.agreements)-1]
			progress("%s: simulated %v and %s, measured %v and %s", name, time.Duration(x.simTime).Round(time.Millisecond), bench.Bytes(x.simBytes),
				time.Duration(x.time).Round(time.Millisecond), bench.Bytes(x.bytes))
			if err := b.rec.Add("Agree/"+name, bench.Measure{Value: x.simTime, Unit: "simulated-ns"}, bench.Measure{Value: x.time, Unit: "p50-ns"},
				bench.Measure{Value: x.simBytes, Unit: "simulated-B"}, bench.Measure{Value: x.bytes, Unit: registryUnit}); err != nil {
				return err
			}
		}
	}
	return nil
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
