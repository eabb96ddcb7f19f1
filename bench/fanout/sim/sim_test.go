package sim

import (
	"bytes"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"thaw/fetcher/zone"
)

func simulate(t *testing.T, o Options) *Result {
	t.Helper()
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// The same options give the same result, and another seed another one.
func TestDeterministic(t *testing.T) {
	o := Defaults().Of(Zone)
	o.Hosts = 60
	o.Loss, o.Stragglers, o.Dead, o.Liars, o.Within = 0.001, 0.05, 0.05, 0.05, time.Second
	a, b := simulate(t, o), simulate(t, o)
	if !reflect.DeepEqual(a, b) {
		t.Errorf("two runs of the same seed differ:\n%+v\n%+v", a, b)
	}
	o.Seed++
	if c := simulate(t, o); reflect.DeepEqual(a, c) {
		t.Error("another seed gives the same result")
	}
}

// A zone reads each chunk once, however many hosts start, and its starts take at most twice as
// long as a lone one.
func TestZoneReachesItsAims(t *testing.T) {
	for _, rate := range []int64{1e9, 10e9} {
		o := Defaults()
		o.Hosts = 400
		o.Host.Up, o.Host.Down = rate, rate
		lone := simulate(t, o.Lone())
		r := simulate(t, o.Of(Zone))
		if a := r.Amplification(); a > 1.05 {
			t.Errorf("%d Gbit/s: amplification %.3f", rate/1e9, a)
		}
		if p, most := r.Percentile(0.99), 2*lone.Percentile(1); p > most {
			t.Errorf("%d Gbit/s: p99 %v, at most %v", rate/1e9, p, most)
		}
		if m := r.ToMean(); m > 4 {
			t.Errorf("%d Gbit/s: the busiest host sends %.1f times the mean", rate/1e9, m)
		}
	}
}

// Hosts send each other chunks as the registry has them, as far as their memory goes. Then a
// start at 1 Gbit/s reaches its aim, and peers send as many bytes as the registry would.
func TestZoneSendsStored(t *testing.T) {
	o := Defaults()
	o.Hosts = 300
	lone := simulate(t, o.Lone())
	var before *Result
	for _, memory := range []int64{o.Memory, 4 << 20, 0} {
		o.Memory = memory
		r := simulate(t, o.Of(Zone))
		t.Logf("%d MiB: p99 %v, %d MB from peers", memory>>20, r.Percentile(0.99), r.FromPeers/1e6)
		if before != nil && (r.FromPeers <= before.FromPeers || r.Percentile(0.99) <= before.Percentile(0.99)) {
			t.Errorf("%d bytes of memory make no difference", memory)
		}
		switch before = r; memory {
		case zone.StoredMemory:
			if most := int64(o.Hosts) * (o.Plan.Stored() + o.Plan.Index); r.FromPeers > most || r.FromPeers < most*9/10 {
				t.Errorf("peers have sent %d bytes", r.FromPeers)
			}
			if p, most := r.Percentile(0.99), 2*lone.Percentile(1); p > most {
				t.Errorf("p99 %v, at most %v", p, most)
			}
		case 0:
			if most := int64(o.Hosts) * (o.Plan.Size() + o.Plan.Index); r.FromPeers < most*9/10 {
				t.Errorf("without memory peers have sent %d bytes", r.FromPeers)
			}
		}
	}
}

// In a zone the index leaves the registry once.
func TestIndexThroughTheZone(t *testing.T) {
	o := Defaults()
	o.Hosts = 100
	for _, s := range []System{Zone, Registry} {
		r := simulate(t, o.Of(s))
		want := int64(o.Hosts) * (o.Plan.Manifest + o.Beside)
		if s == Registry {
			want += int64(o.Hosts) * o.Plan.Index
		} else if r.FromRegistry != o.Plan.Stored()+o.Plan.Index || r.Distinct != r.FromRegistry {
			t.Errorf("%d bytes from the registry, %d are distinct", r.FromRegistry, r.Distinct)
		}
		if r.Metadata != want {
			t.Errorf("%v: %d bytes beside the chunks, instead of %d", s, r.Metadata, want)
		}
	}
}

// With hosts that are slow, dead or lying, and lost packets, all starts end in twice the time
// of a lone one, and the registry reads little more. When the zone falls in two, each half
// reads what it lacks once.
func TestZoneBearsFaults(t *testing.T) {
	for name, change := range map[string]func(o *Options){
		"loss":       func(o *Options) { o.Loss = 0.001 },
		"stragglers": func(o *Options) { o.Stragglers = 0.05 },
		"dead":       func(o *Options) { o.Dead = 0.05 },
		"liars":      func(o *Options) { o.Liars = 0.02 },
		"all":        func(o *Options) { o.Loss, o.Stragglers, o.Dead, o.Liars = 0.001, 0.05, 0.02, 0.01 },
		"split":      func(o *Options) { o.Split = 40 * time.Millisecond },
	} {
		t.Run(name, func(t *testing.T) {
			o := Defaults().Of(Zone)
			o.Hosts = 200
			o.Host.Up, o.Host.Down = 10e9, 10e9
			o.Registry.Up, o.Registry.Down = 100e9, 100e9
			lone := simulate(t, o.Lone())
			change(&o)
			r := simulate(t, o)
			if n := len(r.Starts) + len(r.Slow); n != o.Hosts-int(o.Dead*float64(o.Hosts)) {
				t.Errorf("%d starts", n)
			}
			if name == "liars" && r.Wrong == 0 {
				t.Error("nobody has sent wrong bytes")
			}
			if name == "dead" && r.Late == 0 {
				t.Error("nobody was waited for in vain")
			}
			amplification, times := 1.05, 2.0
			if name == "split" { // what was under way comes to nothing after 2 s
				amplification, times = 2, 10
			}
			if a := r.Amplification(); a > amplification {
				t.Errorf("amplification %.3f", a)
			}
			if p, most := r.Percentile(0.99), time.Duration(times*float64(lone.Percentile(1))); p > most {
				t.Errorf("p99 %v, at most %v", p, most)
			}
		})
	}
}

// The other systems do what they are to do.
func TestOthers(t *testing.T) {
	o := Defaults()
	o.Hosts = 50
	lone := simulate(t, o.Lone())
	if lone.Amplification() != 1 || lone.FromPeers != 0 {
		t.Errorf("a lone host: amplification %v, %d bytes from peers", lone.Amplification(), lone.FromPeers)
	}
	all := simulate(t, o.Of(Registry))
	if all.Amplification() != 50 {
		t.Errorf("registry only: amplification %v", all.Amplification())
	}
	for _, s := range []System{PullThrough, Tree} {
		r := simulate(t, o.Of(s))
		if r.Amplification() != 1 {
			t.Errorf("%v: amplification %v", s, r.Amplification())
		}
		if want := float64(o.Hosts-1) * float64(o.Plan.Stored()); s == Tree && float64(r.FromPeers) != want {
			t.Errorf("%v: peers sent %v bytes, want %v", s, r.FromPeers, want)
		}
	}
}

// A cache or a parent that is slow is waited for: hosts do not turn to the registry.
func TestOthersAreWaitedFor(t *testing.T) {
	o := Defaults()
	o.Hosts = 100
	o.Host, o.Cache, o.Registry = Line{100e6, 100e6, 0}, Line{100e6, 100e6, 0}, Line{100e6, 100e6, 0}
	for _, s := range []System{PullThrough, Tree} {
		if r := simulate(t, o.Of(s)); r.Amplification() != 1 || s == PullThrough && r.Percentile(1) < 20*time.Second {
			t.Errorf("%v: amplification %v, %v", s, r.Amplification(), r.Percentile(1))
		}
	}
}

// A lone start cannot be faster than its work, or than its line, and is not much slower.
func TestLoneStart(t *testing.T) {
	for _, rate := range []int64{10e6, 100e6, 10e9} {
		o := Defaults()
		o.Host.Up, o.Host.Down = rate, rate
		r := simulate(t, o.Lone())
		line := time.Duration(float64(o.Plan.Stored()+o.Plan.Index+o.Plan.Manifest+o.Beside) * 8 / float64(rate) * 1e9)
		least := max(line, o.Plan.Work())
		if got := r.Percentile(1); got < least || got > least*13/10+50*time.Millisecond {
			t.Errorf("%d Mbit/s: %v, the line and the work take %v", rate/1e6, got, least)
		}
	}
}

// Flows that share an uplink or a downlink get equal parts of it.
func TestFairShares(t *testing.T) {
	p := Uniform(1, 100<<20, 100<<20, 0)
	p.Manifest, p.Index = 0, 0
	o := Defaults()
	o.Plan, o.Hosts, o.System = p, 4, Registry
	o.Host, o.Registry = Line{1e9, 1e9, 0}, Line{1e9, 1e9, 0}
	o.Latency, o.Jitter = 0, 0
	r := simulate(t, o)
	want := 4 * float64(p.Stored()) * 8 / 1e9
	for _, d := range r.Starts {
		if math.Abs(d.Seconds()-want) > 0.02*want {
			t.Errorf("four flows over one uplink: %v, want %.2f s", d, want)
		}
	}
	// The uplink is no bottleneck now; each downlink is.
	o.Registry.Up = 100e9
	if got, want := simulate(t, o).Percentile(1).Seconds(), float64(p.Stored())*8/1e9; math.Abs(got-want) > 0.02*want {
		t.Errorf("one flow over each downlink: %.3f s, want %.3f s", got, want)
	}
}

// The registry answers as many requests at a time as it has connections.
func TestConnections(t *testing.T) {
	p := Uniform(1, 1, 1, 0)
	p.Manifest, p.Index = 0, 0
	o := Defaults()
	o.Plan, o.Hosts, o.System = p, 100, Registry
	o.Connections, o.Latency = 10, 100*time.Millisecond
	r := simulate(t, o)
	if first, last := r.Percentile(0), r.Percentile(1); first > 150*time.Millisecond || last < time.Second {
		t.Errorf("the first start took %v and the last one %v", first, last)
	}
}

func TestBoundsOfOptions(t *testing.T) {
	for name, change := range map[string]func(o *Options){
		"no plan":    func(o *Options) { o.Plan = nil },
		"no hosts":   func(o *Options) { o.Hosts = 0 },
		"no rate":    func(o *Options) { o.Host.Down = 0 },
		"all dead":   func(o *Options) { o.Dead = 1 },
		"no time":    func(o *Options) { o.Limit = time.Millisecond },
		"long run":   func(o *Options) { o.RunChunks = 65 },
		"two faults": func(o *Options) { o.Dead, o.Liars = 0.6, 0.6 },
	} {
		o := Defaults()
		o.Hosts = 2
		change(&o)
		if _, err := Run(t.Context(), o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestPlan(t *testing.T) {
	p := Flask()
	if len(p.Chunks) < 50 || p.Work() < 100*time.Millisecond || p.Stored() < 10<<20 || p.Size() < p.Stored() {
		t.Errorf("%d chunks, %v of work, %d bytes stored as %d", len(p.Chunks), p.Work(), p.Size(), p.Stored())
	}
	var b bytes.Buffer
	if err := p.Write(&b); err != nil {
		t.Fatal(err)
	}
	again, err := ReadPlan(&b)
	if err != nil || !reflect.DeepEqual(p, again) {
		t.Errorf("the plan changes when it is written and read: %v", err)
	}
	packed := p.Bundle(FlaskBundle, 1<<20)
	if packed.Stored() != FlaskBundle || packed.Work() != p.Work() {
		t.Errorf("the bundle has %d bytes and %v of work", packed.Stored(), packed.Work())
	}
}

func FuzzReadPlan(f *testing.F) {
	f.Add("open 1 2\nchunk 0 1 2 3\nread 0 5\n")
	f.Add("chunk 0 0 0 0\n")
	f.Add("read 0 1\n")
	f.Add(flask)
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ReadPlan(strings.NewReader(s))
		if err != nil {
			return
		}
		var b strings.Builder
		if err := p.Write(&b); err != nil {
			t.Fatal(err)
		}
		again, err := ReadPlan(strings.NewReader(b.String()))
		if err != nil || !reflect.DeepEqual(p, again) {
			t.Fatalf("%q changes when it is written and read: %v", s, err)
		}
	})
}

func BenchmarkZone(b *testing.B) {
	o := Defaults().Of(Zone)
	o.Hosts = 1000
	var events int64
	for b.Loop() {
		r, err := Run(b.Context(), o)
		if err != nil {
			b.Fatal(err)
		}
		events += r.Events
	}
	b.ReportMetric(float64(events)/b.Elapsed().Seconds(), "events/s")
}

// Where the processors are too few, they are what a start waits for, and where hosts share them,
// all hosts do.
func TestProcessors(t *testing.T) {
	o := Defaults()
	o.Hosts = 8
	o.Host.Up, o.Host.Down = 10e9, 10e9
	size := o.Plan.Size() >> 20
	for name, x := range map[string]struct {
		p    Processors
		cost time.Duration // of all that each processor does
	}{
		"each has two":         {Processors{2, false, 20 * time.Millisecond, 20 * time.Millisecond}, time.Duration(size) * 10 * time.Millisecond},
		"all have two":         {Processors{2, true, 20 * time.Millisecond, 20 * time.Millisecond}, time.Duration(size) * 80 * time.Millisecond},
		"peers cost nothing":   {Processors{2, true, 20 * time.Millisecond, 0}, time.Duration(size) * 10 * time.Millisecond},
		"they cost hardly any": {Processors{2, true, 1, 1}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			fast := simulate(t, o.Of(Zone))
			o := o.Of(Zone)
			o.Processors = x.p
			r := simulate(t, o)
			if took, least := r.Percentile(1), max(x.cost, fast.Percentile(1)*9/10); took < least || took > least*13/10+fast.Percentile(1) {
				t.Errorf("%v, without processors %v, the processors work %v", took, fast.Percentile(1), x.cost)
			}
			if a := r.Amplification(); a > 1.05 {
				t.Errorf("amplification %.3f", a)
			}
		})
	}
}
