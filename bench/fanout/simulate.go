package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"thaw/bench"
	"thaw/bench/fanout/sim"
)

// simulated is a result of the simulator, with its name.
type simulated struct {
	scenario, system string
	*sim.Result
	lone time.Duration // the start of one host that reads the registry, over the same line
}

// scenario is what is simulated.
type scenario struct {
	name    string
	systems []sim.System
	change  func(o *sim.Options)
}

// split is the scenario in which the zone falls in two when a start has begun.
const split = "split-at-40ms"

var all = []sim.System{sim.Zone, sim.Registry, sim.PullThrough, sim.Tree}

// lines sets the rates of the hosts' lines. The registry and the cache have ten times as much, up
// to 100 Gbit/s.
func lines(o *sim.Options, rate int64) {
	o.Host.Up, o.Host.Down = rate, rate
	o.Registry.Up, o.Registry.Down = min(10*rate, 100e9), min(10*rate, 100e9)
	o.Cache.Up, o.Cache.Down = o.Registry.Up, o.Registry.Down
}

func scenarios(p *sim.Plan, bundle int64, hosts int) []scenario {
	at := func(n int, rate int64, packed bool, more func(o *sim.Options)) func(o *sim.Options) {
		return func(o *sim.Options) {
			o.Plan, o.Hosts = p, n
			if packed {
				o.Plan = p.Bundle(bundle, 1<<20)
			}
			lines(o, rate)
			if more != nil {
				more(o)
			}
		}
	}
	name := func(n int, rate int64, what string) string { return fmt.Sprintf("%d-hosts-%dG-%s", n, rate/1e9, what) }
	few := max(hosts/10, 10)
	var out []scenario
	for _, n := range []int{few, hosts} {
		for _, rate := range []int64{1e9, 10e9} {
			out = append(out, scenario{name(n, rate, "trace"), all, at(n, rate, false, nil)}, scenario{name(n, rate, "bundle"), all, at(n, rate, true, nil)})
		}
	}
	for _, n := range slices.Compact([]int{max(few/10, 10), few}) {
		for _, x := range []struct {
			name string
			more func(o *sim.Options)
		}{
			{"over-10s", func(o *sim.Options) { o.Within = 10 * time.Second }},
			{"loss-0.1%", func(o *sim.Options) { o.Loss = 0.001 }},
			{"stragglers-5%", func(o *sim.Options) { o.Stragglers = 0.05 }},
			{"dead-2%", func(o *sim.Options) { o.Dead = 0.02 }},
			{"liars-1%", func(o *sim.Options) { o.Liars = 0.01 }},
			{"all-of-these", func(o *sim.Options) { o.Loss, o.Stragglers, o.Dead, o.Liars = 0.001, 0.05, 0.02, 0.01 }},
			{split, func(o *sim.Options) { o.Split = 40 * time.Millisecond }},
		} {
			out = append(out, scenario{name(n, 10e9, "trace-"+x.name), []sim.System{sim.Zone}, at(n, 10e9, false, x.more)})
		}
	}
	return out
}

// simulate runs all scenarios.
func (b *benchmark) simulate(ctx context.Context) (err error) {
	p, bundle := sim.Flask(), int64(sim.FlaskBundle)
	if b.plan != "" {
		f, err := os.Open(b.plan)
		if err != nil {
			return err
		}
		defer f.Close()
		if p, err = sim.ReadPlan(f); err != nil {
			return err
		}
		bundle = p.Stored() * 2 / 3
	}
	for _, s := range scenarios(p, bundle, b.simHosts) {
		o := sim.Defaults()
		o.Seed = b.seed
		s.change(&o)
		lone, err := sim.Run(ctx, o.Lone())
		if err != nil {
			return err
		}
		for _, system := range s.systems {
			began := time.Now()
			r, err := sim.Run(ctx, o.Of(system))
			if err != nil {
				return fmt.Errorf("%s, %v: %w", s.name, system, err)
			}
			x := simulated{s.name, system.String(), r, lone.Percentile(1)}
			b.simulated = append(b.simulated, x)
			progress("%s, %v: p99 %v, amplification %.3f; simulated in %v", s.name, system, r.Percentile(0.99).Round(time.Millisecond), r.Amplification(), time.Since(began).Round(time.Millisecond))
			if err := b.rec.Add("Simulated/"+x.scenario+"/system="+x.system, x.measures()...); err != nil {
				return err
			}
		}
	}
	return nil
}

func (x simulated) measures() []bench.Measure {
	return []bench.Measure{
		{Value: float64(x.Percentile(1)), Unit: bench.Wall}, {Value: float64(x.Percentile(0.5)), Unit: "p50-ns"},
		{Value: float64(x.Percentile(0.9)), Unit: "p90-ns"}, {Value: float64(x.Percentile(0.99)), Unit: "p99-ns"},
		{Value: float64(x.lone), Unit: "lone-ns"}, {Value: x.Amplification(), Unit: "amplification"},
		{Value: x.OriginShare(), Unit: "origin-share"}, {Value: x.toMean(), Unit: toMeanUnit},
		{Value: float64(x.Requests), Unit: requestsUnit}, {Value: float64(x.RegistryRequests), Unit: "registry-requests"},
	}
}

// toMean is 0 where hosts send nothing.
func (x simulated) toMean() float64 {
	if x.Mean == 0 || x.Busiest == 0 {
		return 0
	}
	return x.ToMean()
}

// simulatedTable has a row for each scenario and system.
func (b *benchmark) simulatedTable() *bench.Table {
	t := &bench.Table{Columns: []string{"scenario", "system", "p50", "p90", "p99", "max", "p99 of a lone start", "amplification", "registry's share", "busiest to mean"}}
	for _, x := range b.simulated {
		mean := ""
		if m := x.toMean(); m > 0 {
			mean = fmt.Sprintf("%.2f", m)
		}
		ms := func(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) }
		t.Row(x.scenario, x.system, ms(x.Percentile(0.5)), ms(x.Percentile(0.9)), ms(x.Percentile(0.99)), ms(x.Percentile(1)),
			fmt.Sprintf("%.2f", float64(x.Percentile(0.99))/float64(x.lone)), fmt.Sprintf("%.3f", x.Amplification()), fmt.Sprintf("%.4f %%", 100*x.OriginShare()), mean)
	}
	return t
}
